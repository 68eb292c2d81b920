"""The merchant's side of a round: what it answers, what it charges, and in which order."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hanse_client.charges import Budget, Charge
from hanse_client.ledger import Ledger
from hanse_client.participant import Participant
from hanse_client.policy import Policy
from hanse_client.training import Examples, LocalTrainer
from hanse_common import messages, signing, wire
from hanse_common.messages import DeclineCode, Declined, Invitation, Joined, Start, Upload
from hanse_common.plan import Cohort, Plan, SignedPlan
from hanse_common.randomness import AesCtrStream, OsRandomness
from hanse_common.secagg import ring
from hanse_common.vision.taxonomy import Taxonomy

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
POLICY = Policy(league="test", epsilon=6.0, delta=2e-5)
TAXONOMY = Taxonomy(classes=("shirt", "shoe", "bag"))

MakePlan = Callable[..., Plan]


class Recorder:
    """A trainer that notes, for each call, how many charges the ledger held by then."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.accepted = True
        self.fault: BaseException | None = None
        self.update_: float = 0.5
        self.charges_seen: list[int] = []
        self.models: list[NDArray[np.float32]] = []

    def accepts(self, plan: Plan) -> bool:
        return self.accepted

    def update(self, plan: Plan, round_: int, model: NDArray[np.float32]) -> NDArray[np.float64]:
        self.charges_seen.append(self.ledger.counter)
        self.models.append(model)
        if self.fault is not None:
            raise self.fault
        return np.full(plan.dimension, self.update_)


class Shop:
    """A participant over a real ledger, with all that an owner would be told."""

    def __init__(self, folder: Path, policy: Policy = POLICY) -> None:
        self.ledger = Ledger(folder / "ledger.sqlite", Budget(policy.epsilon, policy.delta))
        self.trainer = Recorder(self.ledger)
        self.told: list[str] = []
        self.participant = Participant(
            signing.public_bytes(KEY), policy, TAXONOMY, self.ledger, self.trainer, self.told.append
        )

    def ask(self, request: Any) -> Any:
        data = request if isinstance(request, bytes) else wire.encode(request)
        return answer(self.participant.handle(data))

    def untouched(self) -> bool:
        return self.ledger.counter == 0 and not self.trainer.charges_seen


def answer(reply: bytes) -> Any:
    kinds = {model.kind: model for model in (Joined, Declined, Upload)}
    return wire.decode(kinds[reply[2]], reply, messages.MAX_MESSAGE_BYTES)


def invite(plan: Plan, *, round_: int = 0, attempt: int = 0, key: Any = KEY, **changes: Any) -> Invitation:
    fields: dict[str, Any] = {
        "plan_digest": plan.digest,
        "round": round_,
        "attempt": attempt,
        "signed_plan": SignedPlan.sign(plan, key),
        "model": messages.model_to_bytes(np.zeros(plan.dimension, dtype=np.float32)),
    }
    return Invitation(**(fields | changes))


def start(plan: Plan, *, round_: int = 0, attempt: int = 0, cohort_size: int = 3) -> Start:
    return Start(plan_digest=plan.digest, round=round_, attempt=attempt, cohort_size=cohort_size)


def charge_of(plan: Plan) -> Charge:
    steps = plan.training.total_steps
    return Charge(plan.digest, 0, 0, plan.mechanism(steps), steps, plan.delta)


def train(shop: Shop, plan: Plan, round_: int = 0, attempt: int = 0) -> Any:
    assert isinstance(shop.ask(invite(plan, round_=round_, attempt=attempt)), Joined)
    return shop.ask(start(plan, round_=round_, attempt=attempt))


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(tmp_path)


def test_an_honest_round(shop: Shop, make_plan: MakePlan) -> None:
    plan = make_plan()
    model = np.linspace(-1, 1, plan.dimension, dtype=np.float32)
    invitation = invite(plan, round_=2, attempt=1, model=messages.model_to_bytes(model))
    joined = shop.ask(invitation)
    assert joined == Joined(**invitation.work, model_digest=messages.model_digest(invitation.model))
    assert shop.untouched(), "joining is free"

    upload = shop.ask(start(plan, round_=2, attempt=1))
    assert upload.work == invitation.work
    residues = ring.from_bytes(upload.vector, plan.dimension)
    assert np.array_equal(plan.ring.decode(residues), np.full(plan.dimension, 0.5))
    np.testing.assert_array_equal(shop.trainer.models, [model])
    assert not shop.told


def test_the_charge_is_on_disk_before_photos_are_touched(shop: Shop, make_plan: MakePlan) -> None:
    plan = make_plan()
    for round_ in range(3):
        train(shop, plan, round_)
    assert shop.trainer.charges_seen == [1, 2, 3]
    (spend,) = shop.ledger.spent().plans
    assert (spend.plan_digest, spend.steps, spend.plan_steps) == (plan.digest, 6, plan.training.total_steps)


REFUSED_INVITATIONS: dict[str, tuple[DeclineCode, Callable[[MakePlan], Invitation], str]] = {
    "forged signature": (
        DeclineCode.SIGNATURE,
        lambda make: invite(make(), signed_plan=SignedPlan(plan=wire.encode(make()), signature=b"\1" * 64)),
        "does not verify",
    ),
    "signature of another plan": (
        DeclineCode.SIGNATURE,
        lambda make: invite(
            make(),
            signed_plan=SignedPlan(
                plan=wire.encode(make()), signature=SignedPlan.sign(make(delta=1e-6), KEY).signature
            ),
        ),
        "does not verify",
    ),
    "another operator": (
        DeclineCode.SIGNATURE,
        lambda make: invite(make(), key=Ed25519PrivateKey.generate()),
        "does not verify",
    ),
    "names another plan": (
        DeclineCode.MALFORMED,
        lambda make: invite(make(), plan_digest=bytes(32)),
        "names another plan",
    ),
    "signed bytes are no plan": (
        DeclineCode.MALFORMED,
        lambda make: invite(
            make(),
            signed_plan=SignedPlan(plan=b"\xc0", signature=signing.sign(KEY, SignedPlan.DOMAIN, b"\xc0")),
        ),
        "Plan",
    ),
    "too much ε": (DeclineCode.POLICY, lambda make: invite(make({"noise_multiplier": 0.5})), "ε"),
    "no ε at all": (DeclineCode.POLICY, lambda make: invite(make({"noise_multiplier": 1e-9})), "noise"),
    "too much δ": (DeclineCode.POLICY, lambda make: invite(make(delta=5e-4)), "δ"),
    "another league": (DeclineCode.POLICY, lambda make: invite(make(league="other")), "league"),
    "other classes": (
        DeclineCode.POLICY,
        lambda make: invite(make(taxonomy=Taxonomy(classes=("shoe", "shirt", "bag")))),
        "classes",
    ),
    "too many rounds": (DeclineCode.POLICY, lambda make: invite(make({"rounds": 1001})), "rounds"),
    "round beyond the plan": (DeclineCode.UNEXPECTED, lambda make: invite(make(), round_=4), "4 rounds"),
    "model with NaN": (DeclineCode.MODEL, lambda make: invite(make(), model=model_with(np.nan)), "finite"),
    "model with inf": (DeclineCode.MODEL, lambda make: invite(make(), model=model_with(-np.inf)), "finite"),
    "model too short": (DeclineCode.MODEL, lambda make: invite(make(), model=bytes(80)), "80 bytes"),
    "model too long": (DeclineCode.MODEL, lambda make: invite(make(), model=bytes(88)), "88 bytes"),
    "model empty": (DeclineCode.MODEL, lambda make: invite(make(), model=b""), "0 bytes"),
}


def model_with(number: float) -> bytes:
    model = np.zeros(21, dtype=np.float32)
    model[-1] = number
    return messages.model_to_bytes(model)


@pytest.mark.parametrize("case", REFUSED_INVITATIONS)
def test_refused_invitations(shop: Shop, make_plan: MakePlan, case: str) -> None:
    code, make, why = REFUSED_INVITATIONS[case]
    assert make_plan().dimension == 21
    invitation = make(make_plan)
    assert shop.ask(invitation) == Declined(**invitation.work, code=code)
    assert shop.untouched()
    assert len(shop.told) == 1 and why in shop.told[0], "the owner hears the reason"
    # Nothing was joined, so there is nothing to start.
    assert shop.ask(Start(**invitation.work, cohort_size=3)).code == DeclineCode.UNEXPECTED
    assert shop.untouched()


def test_photos_not_prepared(shop: Shop, make_plan: MakePlan) -> None:
    shop.trainer.accepted = False
    assert shop.ask(invite(make_plan())).code == DeclineCode.UNAVAILABLE
    assert shop.untouched()


def test_a_local_trainer_accepts_its_own_recipe_and_classes_only(make_plan: MakePlan) -> None:
    plan = make_plan()
    trainer = local_trainer(plan)
    assert trainer.accepts(plan)
    assert trainer.accepts(make_plan(delta=1e-6))
    other = plan.recipe.model_copy(update={"model": plan.recipe.model.model_copy(update={"l2": 0.1})})
    assert not trainer.accepts(make_plan(recipe=other))
    assert not trainer.accepts(make_plan(taxonomy=Taxonomy(classes=("shirt", "bag", "shoe"))))
    assert not trainer.accepts(make_plan(dimension=22))


@pytest.mark.parametrize(("round_", "attempt"), [(1, 1), (1, 0), (0, 5)])
def test_no_work_is_done_twice_or_backwards(
    shop: Shop, make_plan: MakePlan, round_: int, attempt: int
) -> None:
    plan = make_plan({"repeats": 9})
    train(shop, plan, 1, 1)
    reply = shop.ask(invite(plan, round_=round_, attempt=attempt))
    assert reply.code == DeclineCode.REPEATED
    assert shop.trainer.charges_seen == [1] and shop.ledger.counter == 1
    assert isinstance(train(shop, plan, 1, 2), Upload), "a later attempt is new work"


def test_a_start_serves_once(shop: Shop, make_plan: MakePlan) -> None:
    plan = make_plan()
    assert isinstance(train(shop, plan), Upload)
    assert shop.ask(start(plan)).code == DeclineCode.UNEXPECTED
    assert shop.trainer.charges_seen == [1] and shop.ledger.counter == 1


def test_a_start_without_joining(shop: Shop, make_plan: MakePlan) -> None:
    assert shop.ask(start(make_plan())).code == DeclineCode.UNEXPECTED
    assert shop.untouched()


def test_a_start_for_other_work_than_joined(shop: Shop, make_plan: MakePlan) -> None:
    plan = make_plan()
    others = [start(plan, round_=1), start(plan, attempt=1), start(make_plan(delta=1e-6))]
    for other in others:
        assert isinstance(shop.ask(invite(plan)), Joined)
        assert shop.ask(other).code == DeclineCode.UNEXPECTED
        assert shop.ask(start(plan)).code == DeclineCode.UNEXPECTED, "what was joined is forgotten"
    assert shop.untouched()


def test_a_refused_invitation_does_not_undo_a_join(shop: Shop, make_plan: MakePlan) -> None:
    """Whoever can't sign plans can't take a merchant out of a round."""
    plan = make_plan()
    shop.ask(invite(plan))
    shop.ask(invite(plan, key=Ed25519PrivateKey.generate()))
    shop.ask(b"garbage")
    assert isinstance(shop.ask(start(plan)), Upload)


def test_a_cohort_under_the_policys_minimum(tmp_path: Path, make_plan: MakePlan) -> None:
    shop = Shop(tmp_path, POLICY.model_copy(update={"minimum_cohort": 3}))
    plan = make_plan(cohort=Cohort(min_merchants=3, max_merchants=5))
    assert isinstance(shop.ask(invite(plan)), Joined)
    assert shop.ask(start(plan, cohort_size=2)).code == DeclineCode.POLICY
    assert shop.untouched()
    assert shop.ask(start(plan, cohort_size=3)).code == DeclineCode.UNEXPECTED
    assert isinstance(train(shop, plan), Upload)


def test_an_exceeded_budget_is_declined_and_told(shop: Shop, make_plan: MakePlan) -> None:
    plans = [make_plan(serial=bytes([i]) * 16) for i in range(3)]
    assert isinstance(train(shop, plans[0]), Upload)
    assert isinstance(train(shop, plans[1]), Upload)
    reply = shop.ask(invite(plans[2]))
    assert reply.code == DeclineCode.BUDGET
    assert shop.ledger.counter == 2 and shop.trainer.charges_seen == [1, 2]
    assert "budget" in shop.told[-1] and "ε = 6" in shop.told[-1] and "round 1" in shop.told[-1]


def test_a_plan_that_is_used_up_is_declined(shop: Shop, make_plan: MakePlan) -> None:
    plan = make_plan({"rounds": 2, "repeats": 1})
    for attempt in range(3):
        assert isinstance(train(shop, plan, 0, attempt), Upload)
    assert shop.ask(invite(plan, round_=1)).code == DeclineCode.BUDGET
    assert shop.ledger.counter == 3


def test_a_ledger_that_is_gone_or_damaged(shop: Shop, make_plan: MakePlan) -> None:
    plan = make_plan()
    assert isinstance(shop.ask(invite(plan)), Joined)
    shop.ledger.path.write_bytes(b"x" * 4096)
    assert shop.ask(start(plan)).code == DeclineCode.UNAVAILABLE
    assert shop.ask(invite(plan)).code == DeclineCode.UNAVAILABLE
    shop.ledger.path.unlink()
    assert shop.ask(invite(plan)).code == DeclineCode.UNAVAILABLE
    assert not shop.trainer.charges_seen


def not_for_merchants(make: MakePlan) -> list[bytes]:
    plan = make()
    work: dict[str, Any] = {"plan_digest": plan.digest, "round": 0, "attempt": 0}
    invitation = wire.encode(invite(plan))
    return [
        b"",
        b"\xc1",
        b"GET / HTTP/1.1\r\n",
        bytes(100),
        invitation[:-1],
        invitation + b"\0",
        invitation.replace(bytes([wire.WIRE_VERSION]), b"\2", 1),
        b"\x91" * 100_000,
        wire.encode(plan),
        wire.encode(SignedPlan.sign(plan, KEY)),
        wire.encode(Joined(**work, model_digest=bytes(32))),
        wire.encode(Upload(**work, vector=bytes(84))),
        wire.encode(Declined(**work, code=DeclineCode.BUDGET)),
    ]


def test_what_is_no_request(shop: Shop, make_plan: MakePlan) -> None:
    nameless = Declined(plan_digest=bytes(32), round=0, attempt=0, code=DeclineCode.MALFORMED)
    for data in not_for_merchants(make_plan):
        assert shop.ask(data) == nameless, data[:40]
    assert shop.untouched()


def test_an_oversized_request(shop: Shop) -> None:
    assert shop.ask(bytes(messages.MAX_MESSAGE_BYTES + 1)).code == DeclineCode.MALFORMED
    assert str(messages.MAX_MESSAGE_BYTES) in shop.told[0]


def test_what_the_owner_reads_is_text_of_bounded_length(shop: Shop, make_plan: MakePlan) -> None:
    """A server can't write escape codes into the owner's terminal, nor fill the disk that holds the log."""
    fields = invite(make_plan()).model_dump() | {"\x1b[2J" + "x" * 100_000: 1}
    data = msgpack.packb([wire.WIRE_VERSION, Invitation.kind, fields], use_bin_type=True)
    assert shop.ask(data).code == DeclineCode.MALFORMED
    (text,) = shop.told
    assert "[2Jxxx" in text and text.isprintable() and len(text) < 5000


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_bytes_make_it_raise(shop: Shop, make_plan: MakePlan, data: st.DataObject) -> None:
    valid = wire.encode(invite(make_plan()))
    position = data.draw(st.integers(0, len(valid) - 1))
    damage = data.draw(st.binary(max_size=4))
    shop.ask(valid[:position] + damage + valid[position + len(damage) :])
    assert shop.untouched()


def test_a_reply_carries_no_text(shop: Shop, make_plan: MakePlan) -> None:
    """Two declines of the same code are the same bytes, however much their reasons differ."""
    plan = make_plan()
    shop.trainer.accepted = False
    first = shop.participant.handle(wire.encode(invite(plan)))
    shop.trainer.accepted = True
    shop.participant.handle(wire.encode(invite(plan)))
    shop.ledger.path.unlink()
    assert shop.participant.handle(wire.encode(start(plan))) == first
    assert shop.told[0] != shop.told[1]


def test_a_trainer_that_breaks_its_promise_falls_silent_and_has_paid(shop: Shop, make_plan: MakePlan) -> None:
    plan = make_plan()
    shop.trainer.fault = RuntimeError("photo 17")
    shop.ask(invite(plan))
    with pytest.raises(RuntimeError):
        shop.ask(start(plan))
    assert shop.ledger.counter == 1
    shop.trainer.fault = None
    assert shop.ask(start(plan)).code == DeclineCode.UNEXPECTED
    assert shop.ask(invite(plan)).code == DeclineCode.REPEATED


def test_an_update_that_is_not_finite_still_leaves_as_numbers(shop: Shop, make_plan: MakePlan) -> None:
    shop.trainer.update_ = np.nan
    upload = train(shop, make_plan())
    assert upload.vector == bytes(84)


# With the real trainer


def local_trainer(plan: Plan, count: int = 40, broken: bool = False) -> LocalTrainer:
    features = np.random.default_rng(1).normal(size=(count, 6)).astype(np.float32)
    labels = np.arange(count) % 3
    examples = Examples.of(features, labels + 100 * broken, "cpu")
    return LocalTrainer(plan.recipe, plan.taxonomy, examples, AesCtrStream(bytes(32)))


def replies(folder: Path, plan: Plan, trainer: LocalTrainer) -> list[bytes]:
    ledger = Ledger(folder / "ledger.sqlite", Budget(POLICY.epsilon, POLICY.delta))
    participant = Participant(
        signing.public_bytes(KEY), POLICY, TAXONOMY, ledger, trainer, tell=lambda text: None
    )
    requests = [r for i in range(3) for r in (invite(plan, round_=i), start(plan, round_=i))]
    return [participant.handle(wire.encode(request)) for request in requests]


@pytest.mark.parametrize("other", [{"count": 39}, {"count": 0}, {"broken": True}])
def test_neighbouring_catalogs_answer_with_the_same_kinds_and_lengths(
    tmp_path: Path, make_plan: MakePlan, other: dict[str, Any]
) -> None:
    """One photo less, no photo at all, or a failure inside training: it does not show."""
    plan = make_plan()
    here = replies(tmp_path / "here", plan, local_trainer(plan))
    there = replies(tmp_path / "there", plan, local_trainer(plan, **other))
    assert [type(answer(reply)) for reply in here] == [Joined, Upload] * 3
    assert [(type(answer(r)), len(r)) for r in here] == [(type(answer(r)), len(r)) for r in there]
    assert here[::2] == there[::2], "joining says nothing of photos"
    assert here[1] != there[1]


def test_two_processes_on_one_ledger_upload_once(tmp_path: Path, make_plan: MakePlan) -> None:
    """All have joined the same work; who charges second must not touch photos."""
    plan = make_plan()
    Shop(tmp_path).ledger.check(charge_of(plan))  # ε is computed once, before the processes part
    context = multiprocessing.get_context("fork")
    together, kinds = context.Barrier(4), context.SimpleQueue()

    def other_process() -> None:
        shop = Shop(tmp_path)
        joined = shop.ask(invite(plan))
        together.wait(30)
        uploaded = shop.ask(start(plan))
        kinds.put((joined.kind, uploaded.kind, len(shop.trainer.charges_seen)))

    processes = [context.Process(target=other_process) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    found = sorted(kinds.get() for _ in processes)
    assert found == [(Joined.kind, Declined.kind, 0)] * 3 + [(Joined.kind, Upload.kind, 1)]
    assert Shop(tmp_path).ledger.counter == 1


def test_two_participants_on_one_ledger_share_the_budget(tmp_path: Path, make_plan: MakePlan) -> None:
    first, second = Shop(tmp_path), Shop(tmp_path)
    plans = [make_plan(serial=bytes([i]) * 16) for i in range(3)]
    assert isinstance(first.ask(invite(plans[2])), Joined)
    assert isinstance(train(first, plans[0]), Upload)
    assert isinstance(train(second, plans[1]), Upload)
    assert first.ask(invite(plans[2])).code == DeclineCode.BUDGET
    assert first.ledger.counter == second.ledger.counter == 2


def test_the_product_trains_with_the_operating_systems_randomness(
    tmp_path: Path, make_plan: MakePlan
) -> None:
    plan = make_plan()
    examples = Examples.of(np.ones((5, 6), dtype=np.float32), np.zeros(5, dtype=np.int64), "cpu")
    uploads = {
        replies(tmp_path / str(i), plan, LocalTrainer(plan.recipe, TAXONOMY, examples, OsRandomness()))[1]
        for i in range(2)
    }
    assert len(uploads) == 2


def test_a_refused_invitation_ends_the_round_joined_before(shop: Shop, make_plan: MakePlan) -> None:
    plan = make_plan()
    assert isinstance(shop.ask(invite(plan)), Joined)
    assert shop.ask(invite(plan, round_=4)).code == DeclineCode.UNEXPECTED
    assert shop.ask(start(plan)).code == DeclineCode.UNEXPECTED
