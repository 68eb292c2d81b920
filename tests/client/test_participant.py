"""The merchant's side of a round: what it answers, what it charges, and in which order."""

import itertools
import math
import multiprocessing
import os
import signal
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
from hanse_client.examples import Examples
from hanse_client.ledger import Ledger
from hanse_client.markers import Markers
from hanse_client.participant import Participant, PinnedLeague, _until_slot
from hanse_client.policy import Policy
from hanse_client.training import ShopTrainer
from hanse_common import messages, signing, wire
from hanse_common.charter import SignedCharter, founded
from hanse_common.directory import Directory, Entry, SignedDirectory
from hanse_common.errors import LedgerError
from hanse_common.membership import Request, SignedRequest
from hanse_common.messages import DeclineCode, Declined, Invitation, Start
from hanse_common.plan import Cohort, Plan, SignedPlan
from hanse_common.randomness import AesCtrStream, OsRandomness
from hanse_common.secagg import ring, transcript
from hanse_common.secagg.aggregator import Aggregator, MaskedSum
from hanse_common.secagg.faults import Fault, Refusal
from hanse_common.secagg.merchant import Merchant
from hanse_common.secagg.messages import (
    Agreed,
    Agreement,
    Delivery,
    Joined,
    Member,
    Ready,
    Roster,
    Shares,
    Survivors,
    Unmasked,
    Upload,
)
from hanse_common.secagg.suite import Setup
from hanse_common.secagg.witness import Witness
from hanse_common.vision.taxonomy import Taxonomy

KEY, LEAGUE_KEY, OWN, *PEERS = (Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32) for n in range(1, 7))
CHARTER = founded("test", LEAGUE_KEY)
POLICY = Policy(league="test", epsilon=6.0, delta=2e-5)
TAXONOMY = Taxonomy(classes=("shirt", "shoe", "bag"))
NOW = 1_800_000_000

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

    def contribution(self, plan: Plan, round_: int, model: NDArray[np.float32]) -> NDArray[np.uint32]:
        self.charges_seen.append(self.ledger.counter)
        self.models.append(model)
        if self.fault is not None:
            raise self.fault
        return plan.encode(np.full(plan.dimension, self.update_))


class Shop:
    """A participant over real files, with all that an owner would be told."""

    def __init__(
        self, folder: Path, policy: Policy = POLICY, trainer: Any = None, ledger: str = "ledger.sqlite"
    ) -> None:
        self.ledger = Ledger(folder / ledger, Budget(policy.epsilon, policy.delta))
        self.markers = Markers(folder / "markers.sqlite")
        self.trainer = trainer or Recorder(self.ledger)
        self.told: list[str] = []
        self.attempts = itertools.count()
        self.replies: list[bytes] = []
        self.waits: list[float] = []
        self.participant = Participant(
            PinnedLeague(signing.public_bytes(KEY), CHARTER.read().digest, TAXONOMY),
            policy,
            OWN,
            self.ledger,
            self.markers,
            self.trainer,
            self.told.append,
            clock=lambda: NOW,
            wait=self.waited,
        )

    def waited(self, seconds: float) -> None:
        self.waits.append(seconds)

    def ask(self, request: Any) -> Any:
        data = request if isinstance(request, bytes) else wire.encode(request)
        self.replies.append(self.participant.handle(data))
        return answer(self.replies[-1])

    def untouched(self) -> bool:
        return self.ledger.counter == 0 and not self.trainer.charges_seen


ANSWERS = {model.kind: model for model in (Joined, Shares, Ready, Upload, Agreed, Unmasked, Declined)}


def answer(reply: bytes) -> Any:
    return wire.decode(ANSWERS[reply[2]], reply, messages.MAX_MESSAGE_BYTES)


def directory(**changes: Any) -> Directory:
    entries = tuple(
        Entry(name=f"m{number}", entity=f"e{number}", identity=signing.public_bytes(key), expires=NOW + 99)
        for number, key in enumerate((OWN, *PEERS))
    )
    fields = {
        "league": "test",
        "charter": CHARTER.read().digest,
        "version": 3,
        "expires": NOW + 99,
        "entries": entries,
    }
    return Directory(**(fields | changes))


def signed_directory(
    listed: Directory, key: Ed25519PrivateKey = LEAGUE_KEY, charter: SignedCharter = CHARTER
) -> SignedDirectory:
    return SignedDirectory.of(listed, (charter,)).signed_by(key)


def invite(
    plan: Plan,
    *,
    round_: int = 0,
    attempt: int = 0,
    rounds: int = 1,
    key: Any = KEY,
    league_key: Any = LEAGUE_KEY,
    listed: Directory | None = None,
    **changes: Any,
) -> Invitation:
    fields: dict[str, Any] = {
        "plan_digest": plan.digest,
        "round": round_,
        "attempt": attempt,
        "rounds": rounds,
        "signed_plan": SignedPlan.sign(plan, key),
        "signed_directory": signed_directory(listed or directory(), league_key),
    }
    return Invitation(**(fields | changes))


class SetUp:
    """Brings a shop and two other merchants together; each method is a trip with the shop, whose reply it returns."""

    def __init__(
        self,
        shop: Shop,
        plan: Plan,
        round_: int = 0,
        attempt: int | None = None,
        rounds: int = 1,
        peers: int = 2,
    ) -> None:
        self.shop, self.plan = shop, plan
        attempt = next(shop.attempts) if attempt is None else attempt
        self.invitation = invite(plan, round_=round_, attempt=attempt, rounds=rounds)
        listed = directory()
        self.setup = Setup(**self.invitation.work, rounds=rounds, directory_digest=listed.digest)
        entities, parameters = listed.entities(NOW), plan.cohort.parameters
        self.aggregator = Aggregator(self.setup, parameters, entities)
        self.peers = {
            signing.public_bytes(key): Merchant(self.setup, parameters, key, entities)
            for key in PEERS[:peers]
        }
        self.witnesses: dict[bytes, Witness] = {}
        self.first_counter = 10
        self.own = signing.public_bytes(OWN)
        self.sum: MaskedSum | None = None

    def join(self) -> Any:
        return self.shop.ask(self.invitation)

    def roster(self, joined: Joined) -> Roster:
        self.aggregator.add_member(self.own, joined)
        for identity, peer in self.peers.items():
            self.aggregator.add_member(identity, peer.join())
        return self.aggregator.roster()

    def share(self) -> Any:
        self.made = self.roster(self.join())
        return self.shop.ask(self.made)

    def deliver(self) -> Delivery:
        self.aggregator.add_shares(self.own, self.share())
        for number, (identity, peer) in enumerate(self.peers.items()):
            self.aggregator.add_shares(
                identity, peer.share(self.made, self.first_counter + number, self.witnesses)
            )
        return self.aggregator.delivery(self.own)

    def ready(self) -> Any:
        reply = self.shop.ask(self.deliver())
        for identity, peer in self.peers.items():
            peer.receive(self.aggregator.delivery(identity))
        return reply

    def start(self, round_: int | None = None, model: bytes | None = None) -> Start:
        work = self.setup.work | ({} if round_ is None else {"round": round_})
        return Start(**work, model=bytes(4 * self.plan.dimension) if model is None else model)

    def upload(self, round_: int | None = None, model: bytes | None = None) -> Any:
        return self.shop.ask(self.start(round_, model))

    def finish(self, upload: Upload, model: bytes | None = None, absent: bytes = b"") -> NDArray[np.float64]:
        """Run the rest of the round with the shop, and return the sum of all updates; the peers' are zero.

        The peer `absent` is not heard of again.
        """
        peers = {identity: peer for identity, peer in self.peers.items() if identity != absent}
        digest = messages.model_digest(self.start(upload.round, model).model)
        sum_ = self.aggregator.open_round(upload.round, digest, self.plan.dimension)
        sum_.add_upload(self.own, upload)
        for identity, peer in peers.items():
            peer.open_round(upload.round, digest)
            zeros = np.zeros(self.plan.dimension, dtype=np.uint32)
            peer.mask(zeros)
            sum_.add_upload(identity, Upload(**sum_.work, vector=ring.to_bytes(zeros)))
        survivors = sum_.survivors()
        sum_.add_agreed(self.own, self.shop.ask(survivors))
        for identity, peer in peers.items():
            sum_.add_agreed(identity, peer.agree(survivors))
        agreement = sum_.agreement()
        sum_.add_unmasked(self.own, self.shop.ask(agreement))
        for identity, peer in peers.items():
            sum_.add_unmasked(identity, peer.unmask(agreement))
        return self.plan.decode(sum_.total(), 1)


def ready(shop: Shop, plan: Plan, *where: Any, **changes: Any) -> SetUp:
    made = SetUp(shop, plan, *where, **changes)
    assert isinstance(made.ready(), Ready)
    return made


def charge_of(plan: Plan) -> Charge:
    steps = plan.training.total_steps
    return Charge(plan.digest, 0, 0, plan.mechanism(steps), steps, plan.delta)


def train(shop: Shop, plan: Plan, round_: int = 0, attempt: int | None = None) -> Any:
    return ready(shop, plan, round_, attempt).upload()


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(tmp_path)


def test_an_honest_round(shop: Shop, make_plan: MakePlan) -> None:
    plan = make_plan()
    model = np.linspace(-1, 1, plan.dimension, dtype=np.float32)
    made = ready(shop, plan, 2, 1)
    assert shop.untouched(), "a set-up is free"
    upload = made.upload(model=messages.model_to_bytes(model))
    assert upload.work == made.setup.work
    plain = plan.encode(np.full(plan.dimension, 0.5))
    assert not (ring.from_bytes(upload.vector, plan.dimension) == plain).all(), "it is masked"
    total = made.finish(upload, messages.model_to_bytes(model))
    assert np.array_equal(total, np.full(plan.dimension, 0.5))
    np.testing.assert_array_equal(shop.trainer.models, [model])
    assert not shop.told


def test_the_rounds_of_one_set_up(shop: Shop, make_plan: MakePlan) -> None:
    plan = make_plan()
    made = ready(shop, plan, rounds=4)
    for round_ in (0, 1, 3):  # one may be left out
        total = made.finish(made.upload(round_))
        assert np.array_equal(total, np.full(plan.dimension, 0.5))
    assert shop.ledger.counter == 3
    assert made.upload(2).code == DeclineCode.UNEXPECTED


def test_one_that_drops_out_costs_nobody_the_sum(shop: Shop, make_plan: MakePlan) -> None:
    plan = make_plan()
    made = ready(shop, plan, peers=3, rounds=2)
    for round_, absent in zip(range(2), made.peers, strict=False):
        total = made.finish(made.upload(round_), absent=absent)
        assert np.array_equal(total, np.full(plan.dimension, 0.5))
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
    "rounds beyond the plan": (
        DeclineCode.UNEXPECTED,
        lambda make: invite(make(), round_=3, rounds=2),
        "4 rounds",
    ),
    "directory signed by the operator": (
        DeclineCode.DIRECTORY,
        lambda make: invite(make(), league_key=KEY),
        "0 of the 1 signatures",
    ),
    "directory under a charter of the operator's own": (
        DeclineCode.DIRECTORY,
        lambda make: invite(
            make(),
            signed_directory=signed_directory(
                directory(charter=founded("test", KEY).read().digest), KEY, founded("test", KEY)
            ),
        ),
        "another league's",
    ),
    "directory under another charter than it names": (
        DeclineCode.DIRECTORY,
        lambda make: invite(make(), listed=directory(charter=bytes(32))),
        "under another charter",
    ),
    "directory of another league": (
        DeclineCode.DIRECTORY,
        lambda make: invite(make(), listed=directory(league="other")),
        "other",
    ),
    "directory out of date": (
        DeclineCode.DIRECTORY,
        lambda make: invite(make(), listed=directory(expires=NOW)),
        "expired",
    ),
    "directory without this shop": (
        DeclineCode.DIRECTORY,
        lambda make: invite(make(), listed=directory(entries=directory().entries[1:])),
        "not in the league's directory",
    ),
    "directory where this shop's entry is over": (
        DeclineCode.DIRECTORY,
        lambda make: invite(
            make(),
            listed=directory(
                entries=tuple(
                    entry.model_copy(update={"expires": NOW} if entry.name == "m0" else {})
                    for entry in directory().entries
                )
            ),
        ),
        "or no longer",
    ),
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
    assert shop.ask(Start(**invitation.work, model=bytes(84))).code == DeclineCode.UNEXPECTED
    assert shop.untouched()


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (model_with(np.nan), "finite"),
        (model_with(-np.inf), "finite"),
        (bytes(80), "80 bytes"),
        (bytes(88), "88 bytes"),
        (b"", "0 bytes"),
    ],
)
def test_a_model_that_makes_no_sense_costs_nothing(
    shop: Shop, make_plan: MakePlan, model: bytes, why: str
) -> None:
    made = ready(shop, make_plan())
    assert made.upload(model=model).code == DeclineCode.MODEL
    assert shop.untouched()
    assert why in shop.told[0]
    assert isinstance(made.upload(), Upload), "nothing was used up, so a good model is served"
    assert shop.trainer.charges_seen == [1]


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


@pytest.mark.parametrize("attempt", [0, 3, 4])
def test_a_set_up_is_joined_once_and_never_an_earlier_one(
    shop: Shop, make_plan: MakePlan, tmp_path: Path, attempt: int
) -> None:
    plan = make_plan()
    assert isinstance(shop.ask(invite(plan, attempt=4)), Joined)
    for asked in (shop, Shop(tmp_path)):  # the same process, and one after a crash
        assert asked.ask(invite(plan, attempt=attempt)).code == DeclineCode.REPEATED
        assert isinstance(asked.ask(invite(make_plan(delta=1e-6), attempt=attempt)), Joined | Declined)
    assert isinstance(Shop(tmp_path).ask(invite(plan, attempt=5)), Joined)


@pytest.mark.parametrize("round_", [0, 1])
def test_no_round_is_trained_twice_or_backwards(shop: Shop, make_plan: MakePlan, round_: int) -> None:
    plan = make_plan({"repeats": 9})
    train(shop, plan, 1, 1)
    reply = shop.ask(invite(plan, round_=round_, attempt=1))
    assert reply.code == DeclineCode.REPEATED
    assert shop.trainer.charges_seen == [1] and shop.ledger.counter == 1
    assert isinstance(train(shop, plan, 1, 2), Upload), "a later attempt is new work"
    assert shop.ask(invite(plan, round_=0, attempt=3)).code == DeclineCode.REPEATED


def test_a_start_serves_once(shop: Shop, make_plan: MakePlan) -> None:
    made = ready(shop, make_plan())
    assert isinstance(made.upload(), Upload)
    assert made.upload().code == DeclineCode.UNEXPECTED
    assert shop.trainer.charges_seen == [1] and shop.ledger.counter == 1


def test_nothing_of_a_set_up_is_answered_after_a_crash(
    shop: Shop, make_plan: MakePlan, tmp_path: Path
) -> None:
    made = ready(shop, make_plan())
    again = made.shop = Shop(tmp_path)
    assert made.upload().code == DeclineCode.UNEXPECTED
    assert again.untouched()


@pytest.mark.parametrize("seconds", [0.0, 0.4, 2.0, 2.5, 7.0])
def test_an_upload_leaves_at_the_plans_slot_however_long_training_took(
    shop: Shop, make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    plan = make_plan(cohort=Cohort(min_merchants=3, max_merchants=5, upload_slot=2.0))
    made = ready(shop, plan)
    times = iter([100.0, 100.0 + seconds])
    monkeypatch.setattr(shop.participant, "_monotonic", lambda: next(times))
    assert isinstance(made.upload(), Upload)
    (waited,) = shop.waits
    assert waited >= 0
    assert seconds + waited == pytest.approx(max(2.0, 2.0 * math.ceil(seconds / 2.0)))


def test_no_rounding_makes_a_wait_negative() -> None:
    slot, elapsed = 0.1, 0.9000000000000001
    assert math.ceil(elapsed / slot) * slot < elapsed, "else this test shows nothing"
    assert _until_slot(elapsed, slot) == 0.0


class Dying:
    """A trainer whose process ends while it has photos in its hands."""

    def accepts(self, plan: Plan) -> bool:
        return True

    def contribution(self, plan: Plan, round_: int, model: NDArray[np.float32]) -> NDArray[np.uint32]:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("is dead")


@pytest.mark.parametrize("when", ["before the answer to an invitation", "while training"])
def test_a_kill_leaves_what_was_begun_begun(
    tmp_path: Path, make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    plan = make_plan({"repeats": 1})
    charged = int(when == "while training")

    def until_killed() -> None:
        shop = Shop(tmp_path, trainer=Dying())
        if charged:
            train(shop, plan, 0, 3)
        monkeypatch.setattr(Merchant, "join", lambda _: os.kill(os.getpid(), signal.SIGKILL))
        shop.ask(invite(plan, attempt=3))

    process = multiprocessing.get_context("fork").Process(target=until_killed)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    after = Shop(tmp_path)
    assert after.ledger.counter == charged
    assert after.ask(invite(plan, attempt=3)).code == DeclineCode.REPEATED
    assert after.ask(Start(**invite(plan, attempt=3).work, model=bytes(84))).code == DeclineCode.UNEXPECTED
    assert not after.trainer.charges_seen
    assert isinstance(train(after, plan, 0, 4), Upload)


def test_nothing_without_joining(shop: Shop, make_plan: MakePlan) -> None:
    made = SetUp(shop, make_plan())
    assert made.upload().code == DeclineCode.UNEXPECTED
    survivors = Survivors(**made.setup.work, places=(0, 1, 2))
    assert shop.ask(survivors).code == DeclineCode.UNEXPECTED
    assert shop.untouched()


def test_questions_about_other_work_than_joined(shop: Shop, make_plan: MakePlan) -> None:
    plan = make_plan()
    for change in ({"round": 1}, {"attempt": 77}, {"plan_digest": b"x" * 32}):
        made = ready(shop, plan)
        other = Start(**(made.setup.work | change), model=bytes(84))
        assert shop.ask(other).code == DeclineCode.UNEXPECTED
    assert shop.untouched()


def test_what_nobody_signed_does_not_undo_a_set_up(shop: Shop, make_plan: MakePlan) -> None:
    """Whoever can't sign plans can't take a merchant out of a round."""
    plan = make_plan()
    made = ready(shop, plan)
    shop.ask(invite(plan, key=Ed25519PrivateKey.generate(), attempt=99))
    shop.ask(b"garbage")
    assert isinstance(made.upload(), Upload)


def shared(made: SetUp) -> SetUp:
    made.deliver()
    return made


def prepared(made: SetUp) -> SetUp:
    assert isinstance(made.ready(), Ready)
    return made


def uploaded(made: SetUp) -> SetUp:
    assert isinstance(prepared(made).upload(), Upload)
    return made


def agreed(made: SetUp) -> SetUp:
    assert isinstance(uploaded(made).shop.ask(survivors(made)), Agreed)
    return made


def joined(made: SetUp) -> SetUp:
    made.made = made.roster(made.join())
    return made


def survivors(made: SetUp, *places: int) -> Survivors:
    return Survivors(**made.setup.work, places=places or (0, 1, 2))


def low_order(made: SetUp) -> Roster:
    """Return the roster with a key of a peer's that gives everybody the same secret; the peer signed it."""
    place = next(n for n, m in enumerate(made.made.members) if m.identity == signing.public_bytes(PEERS[1]))
    member = made.made.members[place]
    keys = bytes(32) + member.mask_keys[32:]
    statement = transcript.join_statement(made.setup, member.identity, member.sealing_key, keys)
    bad = Member(
        identity=member.identity,
        sealing_key=member.sealing_key,
        mask_keys=keys,
        signature=signing.sign(PEERS[1], "join", statement),
    )
    members = (*made.made.members[:place], bad, *made.made.members[place + 1 :])
    return made.made.model_copy(update={"members": members})


REFUSED_LATER: dict[str, tuple[DeclineCode, Callable[[SetUp], SetUp], Callable[[SetUp], Any]]] = {
    "shares before the roster": (
        DeclineCode.UNEXPECTED,
        joined,
        lambda made: Delivery(**made.setup.work, packets=()),
    ),
    "a key of low order": (DeclineCode.ROSTER, joined, low_order),
    "a start before the roster": (DeclineCode.UNEXPECTED, joined, SetUp.start),
    "the roster again": (DeclineCode.UNEXPECTED, shared, lambda made: made.made),
    "a start before all shares": (DeclineCode.UNEXPECTED, shared, SetUp.start),
    "shares of too few": (
        DeclineCode.SHARES,
        shared,
        lambda made: Delivery(**made.setup.work, packets=made.aggregator.delivery(made.own).packets[:1]),
    ),
    "shares again": (DeclineCode.UNEXPECTED, prepared, lambda made: made.aggregator.delivery(made.own)),
    "a round that is not of the set-up": (DeclineCode.UNEXPECTED, prepared, lambda made: made.start(2)),
    "survivors before the upload": (DeclineCode.UNEXPECTED, prepared, survivors),
    "a round again": (DeclineCode.UNEXPECTED, uploaded, SetUp.start),
    "too few survivors": (DeclineCode.SURVIVORS, uploaded, lambda made: survivors(made, 0)),
    "no survivors": (
        DeclineCode.SURVIVORS,
        uploaded,
        lambda made: Survivors(**made.setup.work, places=()),
    ),
    "survivors from nowhere": (DeclineCode.SURVIVORS, uploaded, lambda made: survivors(made, 0, 1, 2, 3)),
    "an agreement before survivors": (
        DeclineCode.UNEXPECTED,
        uploaded,
        lambda made: Agreement(**made.setup.work, places=(), signatures=b""),
    ),
    "other survivors": (DeclineCode.SURVIVORS, agreed, survivors),
    "an agreement of nobody": (
        DeclineCode.AGREEMENT,
        agreed,
        lambda made: Agreement(**made.setup.work, places=(), signatures=b""),
    ),
    "an agreement that is forged": (
        DeclineCode.AGREEMENT,
        agreed,
        lambda made: Agreement(**made.setup.work, places=(0, 1, 2), signatures=b"x" * 192),
    ),
}


@pytest.mark.parametrize("case", REFUSED_LATER)
def test_a_refusal_of_secure_aggregation_ends_the_set_up(shop: Shop, make_plan: MakePlan, case: str) -> None:
    code, bring, make = REFUSED_LATER[case]
    made = bring(SetUp(shop, make_plan(), rounds=2))
    charged = shop.ledger.counter
    reply = shop.ask(make(made))
    assert (type(reply), reply.code) == (Declined, code)
    assert reply.culprit == (signing.public_bytes(PEERS[1]) if case == "a key of low order" else b"")
    for request in (
        made.made,
        Delivery(**made.setup.work, packets=()),
        made.start(0),
        made.start(1),
        survivors(made),
        Agreement(**made.setup.work, places=(), signatures=b""),
    ):
        assert shop.ask(request).code == DeclineCode.UNEXPECTED
        assert "not joined" in shop.told[-1]
    assert shop.ledger.counter == len(shop.trainer.charges_seen) == charged
    assert shop.ask(made.invitation).code == DeclineCode.REPEATED
    assert isinstance(train(shop, made.plan, 1), Upload), "the next set-up is another matter"


def test_a_roster_under_the_plans_minimum(shop: Shop, make_plan: MakePlan) -> None:
    made = SetUp(shop, make_plan(cohort=Cohort(min_merchants=3, max_merchants=5)))
    roster = made.roster(made.join())
    small = roster.model_copy(update={"members": roster.members[:2]})
    assert shop.ask(small).code == DeclineCode.ROSTER
    assert shop.ask(roster).code == DeclineCode.UNEXPECTED
    assert shop.untouched()


def test_a_dealer_of_bad_shares_is_named(shop: Shop, make_plan: MakePlan) -> None:
    made = SetUp(shop, make_plan())
    delivery = made.deliver()
    others = [member.identity for member in made.made.members if member.identity != made.own]
    bad = delivery.packets[1].model_copy(update={"sealed": delivery.packets[1].sealed[:-1] + b"x"})
    reply = shop.ask(delivery.model_copy(update={"packets": (delivery.packets[0], bad)}))
    assert (reply.code, reply.culprit) == (DeclineCode.SHARES, others[1])
    assert shop.untouched()


def test_peers_ledgers_are_remembered_before_saying_ready(shop: Shop, make_plan: MakePlan) -> None:
    made = ready(shop, make_plan())
    remembered = shop.markers.witnesses()
    assert {identity: found.counter for identity, found in remembered.items()} == dict(
        zip(made.peers, (10, 11), strict=True)
    )


def test_a_peer_is_told_when_its_ledger_was_put_back(shop: Shop, make_plan: MakePlan, tmp_path: Path) -> None:
    plan = make_plan()
    ready(shop, plan)
    made = SetUp(Shop(tmp_path), plan, attempt=1)  # after a restart
    made.first_counter = 9
    with pytest.raises(Refusal, match="older copy") as refused:
        made.ready()
    assert refused.value.fault is Fault.LEDGER
    remembered = {found.counter for found in shop.markers.witnesses().values()}
    assert remembered == {10, 11}, "never lowered"


def test_what_was_not_remembered_is_not_relied_on(
    shop: Shop, make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: Any) -> None:
        raise LedgerError("the disk is full")

    made = SetUp(shop, make_plan())
    with monkeypatch.context() as patched:
        patched.setattr(shop.markers, "remember", full)
        assert made.ready().code == DeclineCode.UNAVAILABLE
    assert shop.told == ["Declined round 1 (unavailable): the disk is full"]
    assert made.upload().code == DeclineCode.UNEXPECTED
    assert shop.untouched()
    assert isinstance(train(shop, made.plan), Upload)


def test_a_ledger_put_back_from_a_backup_is_noticed(shop: Shop, make_plan: MakePlan, tmp_path: Path) -> None:
    plan = make_plan()
    for round_ in range(2):
        train(shop, plan, round_)
    restored = Shop(tmp_path, ledger="backup.sqlite")  # without the two charges
    made = SetUp(restored, plan, 2, 7)
    made.witnesses = {made.own: Witness.sign(OWN, 2)}  # what its peers have seen
    reply = restored.ask(made.deliver())
    assert reply.code == DeclineCode.LEDGER
    assert "older copy" in restored.told[0]
    assert restored.untouched()
    assert made.upload().code == DeclineCode.UNEXPECTED


def test_a_directory_never_goes_back(shop: Shop, make_plan: MakePlan, tmp_path: Path) -> None:
    plan = make_plan()
    assert isinstance(shop.ask(invite(plan, attempt=0, listed=directory(version=5))), Joined)
    earlier, other = directory(version=4), directory(version=5, expires=NOW + 50)
    for asked in (shop, Shop(tmp_path)):
        for listed in (earlier, other):
            reply = asked.ask(invite(plan, attempt=9, listed=listed))
            assert reply.code == DeclineCode.DIRECTORY
            assert "version" in asked.told[-1]
    assert isinstance(shop.ask(invite(plan, attempt=9, listed=directory(version=6))), Joined)


def test_an_exceeded_budget_is_declined_and_told(shop: Shop, make_plan: MakePlan) -> None:
    plans = [make_plan(serial=bytes([i]) * 16) for i in range(3)]
    assert isinstance(train(shop, plans[0]), Upload)
    assert isinstance(train(shop, plans[1]), Upload)
    reply = shop.ask(invite(plans[2]))
    assert reply.code == DeclineCode.BUDGET
    assert shop.ledger.counter == 2 and shop.trainer.charges_seen == [1, 2]
    assert "budget" in shop.told[-1] and "ε = 6" in shop.told[-1] and "round 1" in shop.told[-1]


def test_a_budget_that_was_spent_after_joining(shop: Shop, make_plan: MakePlan, tmp_path: Path) -> None:
    """It is the charge that counts, not the check before."""
    plans = [make_plan(serial=bytes([i]) * 16) for i in range(3)]
    made, other = ready(shop, plans[2], rounds=2), Shop(tmp_path)
    for plan in plans[:2]:
        assert isinstance(train(other, plan), Upload)
    assert made.upload().code == DeclineCode.BUDGET
    assert shop.ledger.counter == 2 and not shop.trainer.charges_seen
    assert shop.ask(survivors(made)).code == DeclineCode.UNEXPECTED, "nothing was uploaded"


def test_a_plan_that_is_used_up_is_declined(shop: Shop, make_plan: MakePlan) -> None:
    plan = make_plan({"rounds": 2, "repeats": 1})
    for attempt in range(3):
        assert isinstance(train(shop, plan, 0, attempt), Upload)
    assert shop.ask(invite(plan, round_=1, attempt=9)).code == DeclineCode.BUDGET
    assert shop.ledger.counter == 3


def test_a_ledger_that_is_gone_or_damaged(shop: Shop, make_plan: MakePlan) -> None:
    plan = make_plan()
    made = ready(shop, plan)
    shop.ledger.path.write_bytes(b"x" * 4096)
    assert made.upload().code == DeclineCode.UNAVAILABLE
    assert shop.ask(invite(plan, attempt=8)).code == DeclineCode.UNAVAILABLE
    shop.ledger.path.unlink()
    assert shop.ask(invite(plan, attempt=9)).code == DeclineCode.UNAVAILABLE
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
        invitation[:1] + b"\x63" + invitation[2:],  # of a later version
        b"\x91" * 100_000,
        wire.encode(plan),
        wire.encode(SignedPlan.sign(plan, KEY)),
        wire.encode(Ready(**work)),
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


TRIPS: dict[str, tuple[Callable[[SetUp], SetUp], Callable[[SetUp], Any]]] = {
    "roster": (joined, lambda made: made.made),
    "delivery": (shared, lambda made: made.aggregator.delivery(made.own)),
    "start": (prepared, SetUp.start),
    "survivors": (uploaded, survivors),
    "agreement": (agreed, lambda made: Agreement(**made.setup.work, places=(0, 1), signatures=bytes(128))),
}


@pytest.mark.parametrize("trip", TRIPS)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_bytes_make_it_raise_in_any_trip(
    shop: Shop, make_plan: MakePlan, trip: str, data: st.DataObject
) -> None:
    bring, make = TRIPS[trip]
    plan = make_plan({"repeats": 400, "noise_multiplier": 50.0})
    made = bring(SetUp(shop, plan))
    valid = wire.encode(make(made))
    position = data.draw(st.integers(0, len(valid) - 1))
    damage = data.draw(st.binary(max_size=4))
    charged = shop.ledger.counter
    reply = shop.ask(valid[:position] + damage + valid[position + len(damage) :])
    assert shop.ledger.counter - charged == isinstance(reply, Upload)
    assert shop.ledger.counter == len(shop.trainer.charges_seen)


def test_a_reply_carries_no_text(shop: Shop, make_plan: MakePlan) -> None:
    """Two declines of the same code are the same bytes, however much their reasons differ."""
    plan = make_plan()
    shop.trainer.accepted = False
    first = shop.participant.handle(wire.encode(invite(plan)))
    shop.trainer.accepted = True
    shop.ledger.path.unlink()
    assert shop.participant.handle(wire.encode(invite(plan))) == first
    assert shop.told[0] != shop.told[1]


def test_a_trainer_that_breaks_its_promise_falls_silent_and_has_paid(shop: Shop, make_plan: MakePlan) -> None:
    plan = make_plan()
    shop.trainer.fault = RuntimeError("photo 17")
    made = ready(shop, plan)
    with pytest.raises(RuntimeError):
        made.upload()
    assert shop.ledger.counter == 1
    shop.trainer.fault = None
    assert made.upload().code == DeclineCode.UNEXPECTED
    assert shop.ask(made.invitation).code == DeclineCode.REPEATED


def test_an_update_that_is_not_finite_still_leaves_as_numbers(shop: Shop, make_plan: MakePlan) -> None:
    shop.trainer.update_ = np.nan
    made = ready(shop, make_plan())
    assert not made.finish(made.upload()).any()


# With the real trainer


def local_trainer(plan: Plan, count: int = 40, broken: bool = False) -> ShopTrainer:
    features = np.random.default_rng(1).normal(size=(count, 6)).astype(np.float32)
    labels = np.arange(count) % 3
    examples = Examples.of(features, labels + 100 * broken, "cpu")
    return ShopTrainer(plan.recipe, plan.taxonomy, examples, AesCtrStream(bytes(32)))


def replies(folder: Path, plan: Plan, trainer: ShopTrainer) -> list[bytes]:
    """Return all that leaves a shop in three rounds, and see that the sums come out."""
    shop = Shop(folder, trainer=trainer)
    made = ready(shop, plan, rounds=3)
    for round_ in range(3):
        made.finish(made.upload(round_))
    return shop.replies


@pytest.mark.parametrize("other", [{"count": 39}, {"count": 0}, {"broken": True}])
def test_neighbouring_catalogs_answer_with_the_same_kinds_and_lengths(
    tmp_path: Path, make_plan: MakePlan, other: dict[str, Any]
) -> None:
    """One photo less, no photo at all, or a failure inside training: it does not show."""
    plan = make_plan()
    here = replies(tmp_path / "here", plan, local_trainer(plan))
    there = replies(tmp_path / "there", plan, local_trainer(plan, **other))
    assert [type(answer(reply)) for reply in here] == [Joined, Shares, Ready] + 3 * [Upload, Agreed, Unmasked]
    assert [(type(answer(r)), len(r)) for r in here] == [(type(answer(r)), len(r)) for r in there]
    assert [set(answer(r).model_dump()) for r in here] == [set(answer(r).model_dump()) for r in there]
    assert here[2] == there[2], "being ready says nothing at all"


def test_two_processes_on_one_state_join_once(tmp_path: Path, make_plan: MakePlan) -> None:
    plan = make_plan()
    Shop(tmp_path).ledger.check(charge_of(plan))  # ε is computed once, before the processes part
    context = multiprocessing.get_context("fork")
    together, kinds = context.Barrier(4), context.SimpleQueue()

    def other_process() -> None:
        shop = Shop(tmp_path)
        together.wait(30)
        kinds.put(shop.ask(invite(plan)).kind)

    processes = [context.Process(target=other_process) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert sorted(kinds.get() for _ in processes) == [Joined.kind] + 3 * [Declined.kind]


def test_two_participants_on_one_ledger_share_the_budget(tmp_path: Path, make_plan: MakePlan) -> None:
    first, second = Shop(tmp_path), Shop(tmp_path)
    plans = [make_plan(serial=bytes([i]) * 16) for i in range(3)]
    assert isinstance(first.ask(invite(plans[2])), Joined)
    assert isinstance(train(first, plans[0]), Upload)
    assert isinstance(train(second, plans[1]), Upload)
    assert first.ask(invite(plans[2], attempt=1)).code == DeclineCode.BUDGET
    assert first.ledger.counter == second.ledger.counter == 2


def test_the_product_trains_with_the_operating_systems_randomness(
    tmp_path: Path, make_plan: MakePlan
) -> None:
    plan = make_plan()
    examples = Examples.of(np.ones((5, 6), dtype=np.float32), np.zeros(5, dtype=np.int64), "cpu")
    sums = set()
    for number in range(2):
        trainer = ShopTrainer(plan.recipe, TAXONOMY, examples, OsRandomness())
        made = ready(Shop(tmp_path / str(number), trainer=trainer), plan)
        sums.add(made.finish(made.upload()).tobytes())
    assert len(sums) == 2


def test_a_signed_invitation_that_is_refused_ends_the_set_up_before(shop: Shop, make_plan: MakePlan) -> None:
    plan = make_plan()
    made = ready(shop, plan)
    assert shop.ask(invite(plan, round_=4, attempt=99)).code == DeclineCode.UNEXPECTED
    assert made.upload().code == DeclineCode.UNEXPECTED


def knowing(*peers: int, minimum: int) -> Policy:
    verified = {f"m{number + 1}": signing.public_bytes(PEERS[number]).hex() for number in peers}
    return POLICY.model_copy(update={"verified": verified, "minimum_verified": minimum})


def test_a_roster_without_those_the_owner_verified_is_left(tmp_path: Path, make_plan: MakePlan) -> None:
    """An operator who invented the others brings the shop together with these alone."""
    shop = Shop(tmp_path, knowing(2, minimum=1))
    setup = SetUp(shop, make_plan())  # PEERS[2] is not in it
    declined = setup.share()
    assert isinstance(declined, Declined) and declined.code is DeclineCode.ROSTER
    assert "your policy needs 1 (minimum_verified)" in shop.told[-1]
    assert shop.untouched()


def test_a_sum_without_those_the_owner_verified_is_not_opened(tmp_path: Path, make_plan: MakePlan) -> None:
    """They were in the roster, and the server says that they dropped out."""
    shop = Shop(tmp_path, knowing(0, minimum=1))
    plan = make_plan()
    setup = SetUp(shop, plan, peers=3)
    assert isinstance(setup.ready(), Ready)
    upload = setup.upload()
    absent = signing.public_bytes(PEERS[0])
    places = tuple(place for place, member in enumerate(setup.made.members) if member.identity != absent)
    declined = shop.ask(Survivors(**setup.start().work, places=places))
    assert isinstance(declined, Declined) and declined.code is DeclineCode.SURVIVORS
    assert "your policy needs 1" in shop.told[-1]
    assert setup.finish(upload, absent=signing.public_bytes(PEERS[1])).shape == (21,), "others may go on"


def test_enough_verified_merchants_in_roster_and_sum(tmp_path: Path, make_plan: MakePlan) -> None:
    shop = Shop(tmp_path, knowing(0, 1, minimum=2))
    setup = SetUp(shop, make_plan())
    setup.ready()
    assert setup.finish(setup.upload()).shape == (21,)


def test_a_directory_that_expires_during_a_block_ends_it(tmp_path: Path, make_plan: MakePlan) -> None:
    shop = Shop(tmp_path)
    now = [NOW]
    shop.participant._clock = lambda: now[0]
    setup = SetUp(shop, make_plan())
    setup.ready()
    now[0] = NOW + 99
    declined = setup.upload()
    assert isinstance(declined, Declined) and declined.code is DeclineCode.DIRECTORY
    assert shop.untouched()


def test_an_operator_among_the_holders_of_the_leagues_key_is_refused(
    tmp_path: Path, make_plan: MakePlan
) -> None:
    shop = Shop(tmp_path)
    charter = founded("test", LEAGUE_KEY, KEY)
    shop.participant._league = PinnedLeague(signing.public_bytes(KEY), charter.read().digest, TAXONOMY)
    listed = directory(charter=charter.read().digest)
    signed = SignedDirectory.of(listed, (charter,)).signed_by(LEAGUE_KEY).signed_by(KEY)
    declined = shop.ask(invite(make_plan(), signed_directory=signed))
    assert isinstance(declined, Declined) and declined.code is DeclineCode.DIRECTORY
    assert "the operator is one of those who hold the league's key" in shop.told[-1]


def test_a_member_that_nobody_admitted_is_refused_with_its_directory(
    tmp_path: Path, make_plan: MakePlan
) -> None:
    """The holders' key was stolen, or two of them are bought: the members' word is missing all the same."""
    shop = Shop(tmp_path)
    holders = [LEAGUE_KEY]
    charter = founded("test", *holders, endorsements=2)
    pinned = charter.read().digest
    shop.participant._league = PinnedLeague(signing.public_bytes(KEY), pinned, TAXONOMY)
    first = directory(charter=pinned)
    key = Ed25519PrivateKey.generate()
    request = Request(charter=pinned, name="zz", entity="Invented", identity=signing.public_bytes(key))
    for version, vouching, taken in ((4, (), False), (4, PEERS[:1], False), (4, PEERS[:2], True)):
        assert isinstance(shop.ask(invite(make_plan(), attempt=next(shop.attempts), signed_directory=(
            SignedDirectory.of(first, (charter,)).signed_by(LEAGUE_KEY)
        ))), Joined)  # fmt: skip
        asked = SignedRequest.make(request, key)
        for peer in vouching:
            asked = asked.endorsed_by(peer)
        listed = first.model_copy(
            update={"version": version, "entries": (*first.entries, Entry.of(asked, int(NOW + 99)))}
        )
        signed = SignedDirectory.of(listed, (charter,)).signed_by(LEAGUE_KEY)
        reply = shop.ask(invite(make_plan(), attempt=next(shop.attempts), signed_directory=signed))
        assert isinstance(reply, Joined) is taken
