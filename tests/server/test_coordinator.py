"""One round on the server's side, against honest, silent, declining and hostile merchants."""

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hanse_common import messages, wire
from hanse_common.errors import RoundFailed
from hanse_common.messages import DeclineCode, Declined, Invitation, Joined, Start, Upload
from hanse_common.plan import Cohort, Plan, SignedPlan
from hanse_common.secagg import ring
from hanse_server.coordinator import RoundOutcome, run_round

MakePlan = Callable[..., Plan]
Handler = Callable[[bytes], bytes | None]


class Merchants:
    """A transport over functions; one that returns None is silent."""

    def __init__(self, handlers: Mapping[str, Handler], extra: tuple[tuple[str, bytes], ...] = ()) -> None:
        self.handlers = dict(handlers)
        self.extra = extra
        self.asked: list[tuple[str, tuple[str, ...]]] = []

    def merchants(self) -> tuple[str, ...]:
        return tuple(sorted(self.handlers))

    def exchange(
        self, kind: str, payloads: Mapping[str, bytes], deadline: float
    ) -> Iterator[tuple[str, bytes]]:
        self.asked.append((kind, tuple(payloads)))
        for name, payload in payloads.items():
            reply = self.handlers[name](payload)
            if reply is not None:
                yield name, reply
        yield from self.extra


def honest(plan: Plan, value: float) -> Handler:
    def handle(data: bytes) -> bytes:
        message = wire.decode_any((Invitation, Start), data, messages.MAX_MESSAGE_BYTES)
        if isinstance(message, Invitation):
            return wire.encode(Joined(**message.work, model_digest=messages.model_digest(message.model)))
        vector = plan.ring.encode(np.full(plan.dimension, value))
        return wire.encode(Upload(**message.work, vector=ring.to_bytes(vector)))

    return handle


def go(plan: Plan, transport: Merchants) -> RoundOutcome:
    signed = SignedPlan.sign(plan, Ed25519PrivateKey.generate())
    return run_round(transport, signed, plan, 1, 2, np.zeros(plan.dimension, dtype=np.float32))


def test_the_update_is_the_mean_of_those_who_uploaded(make_plan: MakePlan) -> None:
    plan = make_plan()
    outcome = go(plan, Merchants({"a": honest(plan, 1.0), "b": honest(plan, 2.0), "c": lambda data: None}))
    assert outcome.uploaded == ("a", "b")
    assert np.allclose(outcome.update, 1.5, atol=plan.ring.step)
    assert not outcome.declined
    assert not outcome.blamed


def test_a_merchant_that_declines_is_not_asked_to_train(make_plan: MakePlan) -> None:
    plan = make_plan()

    def declines(data: bytes) -> bytes:
        message = wire.decode(Invitation, data, messages.MAX_MESSAGE_BYTES)
        return wire.encode(Declined(**message.work, code=DeclineCode.BUDGET))

    transport = Merchants({"a": honest(plan, 1.0), "b": honest(plan, 1.0), "c": declines})
    outcome = go(plan, transport)
    assert outcome.declined == {"c": DeclineCode.BUDGET}
    assert transport.asked == [("join", ("a", "b", "c")), ("upload", ("a", "b"))]


def joins_then(answer: Callable[[Start], bytes | None]) -> Handler:
    def handle(data: bytes) -> bytes | None:
        message = wire.decode_any((Invitation, Start), data, messages.MAX_MESSAGE_BYTES)
        if isinstance(message, Invitation):
            return wire.encode(Joined(**message.work, model_digest=messages.model_digest(message.model)))
        return answer(message)

    return handle


def good_vector(plan: Plan) -> bytes:
    return bytes(4 * plan.dimension)


@pytest.mark.parametrize(
    "answer",
    [
        lambda plan, start: b"nonsense",
        lambda plan, start: b"",
        lambda plan, start: wire.encode(Upload(**start.work, vector=good_vector(plan)[:-4])),
        lambda plan, start: wire.encode(Upload(**start.work, vector=good_vector(plan) + bytes(4))),
        lambda plan, start: wire.encode(Upload(**(start.work | {"round": 0}), vector=good_vector(plan))),
        lambda plan, start: wire.encode(Upload(**(start.work | {"attempt": 1}), vector=good_vector(plan))),
        lambda plan, start: wire.encode(
            Upload(**(start.work | {"plan_digest": b"x" * 32}), vector=good_vector(plan))
        ),
        lambda plan, start: wire.encode(Joined(**start.work, model_digest=bytes(32))),
    ],
)
def test_a_bad_upload_is_blamed_and_the_round_goes_on(
    make_plan: MakePlan, answer: Callable[[Plan, Start], bytes]
) -> None:
    plan = make_plan()
    bad = joins_then(lambda start: answer(plan, start))
    outcome = go(plan, Merchants({"a": honest(plan, 1.0), "b": honest(plan, 2.0), "bad": bad}))
    assert set(outcome.blamed) == {"bad"}
    assert outcome.uploaded == ("a", "b")
    assert np.allclose(outcome.update, 1.5, atol=plan.ring.step)


def test_a_merchant_that_joined_with_another_model_is_left_out(make_plan: MakePlan) -> None:
    plan = make_plan()

    def liar(data: bytes) -> bytes:
        message = wire.decode(Invitation, data, messages.MAX_MESSAGE_BYTES)
        return wire.encode(Joined(**message.work, model_digest=b"x" * 32))

    transport = Merchants({"a": honest(plan, 1.0), "b": honest(plan, 1.0), "liar": liar})
    assert set(go(plan, transport).blamed) == {"liar"}
    assert transport.asked[1] == ("upload", ("a", "b"))


def test_unasked_and_second_answers_are_not_added(make_plan: MakePlan) -> None:
    plan = make_plan()
    work = {"plan_digest": plan.digest, "round": 1, "attempt": 2}
    vector = ring.to_bytes(plan.ring.encode(np.full(plan.dimension, 4.0)))
    extra = wire.encode(Upload(**work, vector=vector))
    transport = Merchants(
        {"a": honest(plan, 1.0), "b": honest(plan, 1.0)}, extra=(("stranger", extra), ("a", extra))
    )
    outcome = go(plan, transport)
    assert set(outcome.blamed) == {"stranger", "a"}
    assert outcome.uploaded == ("a", "b")
    assert np.allclose(outcome.update, 1.0, atol=plan.ring.step)


@pytest.mark.parametrize("silent_at", ["join", "upload"])
def test_under_the_minimum_nothing_is_released(make_plan: MakePlan, silent_at: str) -> None:
    plan = make_plan()
    silent: Handler = (lambda data: None) if silent_at == "join" else joins_then(lambda start: None)
    with pytest.raises(RoundFailed, match="1 of 2 merchants"):
        go(plan, Merchants({"a": honest(plan, 1.0), "b": silent}))


def test_no_more_than_the_plans_maximum_is_invited(make_plan: MakePlan) -> None:
    plan = make_plan(cohort=Cohort(min_merchants=2, max_merchants=3))
    transport = Merchants({name: honest(plan, 1.0) for name in "abcdef"})
    assert len(go(plan, transport).uploaded) == 3


def test_start_tells_how_many_joined(make_plan: MakePlan) -> None:
    """The merchants' own minimum rests on this number."""
    plan, sizes = make_plan(), []

    def curious(data: bytes) -> bytes | None:
        message = wire.decode_any((Invitation, Start), data, messages.MAX_MESSAGE_BYTES)
        if isinstance(message, Start):
            sizes.append(message.cohort_size)
        return honest(plan, 1.0)(data)

    go(plan, Merchants({"a": curious, "b": curious, "silent": lambda data: None}))
    assert sizes == [2, 2]


def test_oversized_answers_are_refused_unparsed(make_plan: MakePlan) -> None:
    plan = make_plan()
    upload = joins_then(lambda start: bytes(4 * plan.dimension + wire.MAX_DOCUMENT_BYTES + 1))
    transport = Merchants(
        {
            "a": honest(plan, 1.0),
            "b": honest(plan, 1.0),
            "big join": lambda data: bytes(wire.MAX_DOCUMENT_BYTES + 1),
            "big upload": upload,
        }
    )
    outcome = go(plan, transport)
    assert set(outcome.blamed) == {"big join", "big upload"}
    assert all("expected at most" in reason for reason in outcome.blamed.values())


def test_each_trip_has_its_own_deadline_and_names_come_sorted(make_plan: MakePlan) -> None:
    plan, deadlines = make_plan(), []

    class Reversed(Merchants):
        def exchange(
            self, kind: str, payloads: Mapping[str, bytes], deadline: float
        ) -> Iterator[tuple[str, bytes]]:
            deadlines.append(deadline)
            yield from reversed(list(super().exchange(kind, payloads, deadline)))

    outcome = go(plan, Reversed({"a": honest(plan, 1.0), "b": honest(plan, 1.0)}))
    assert deadlines == [plan.cohort.join_deadline, plan.cohort.upload_deadline]
    assert outcome.uploaded == ("a", "b")
