"""One round, from the invitation to the sum. Read `run_round` from top to bottom.

    outcome = run_round(transport, signed_plan, plan, round_, attempt, model)
    model = optimizer.step(model, outcome.update)

The coordinator knows neither Flower nor files: it speaks through `Transport.exchange` and returns what
happened. Every reply is untrusted. One that cannot be understood is dropped and noted against its sender, and
the round goes on with the others, down to the plan's minimum.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from hanse_common import messages, wire
from hanse_common.errors import RoundFailed, WireError
from hanse_common.messages import DeclineCode, Declined, Invitation, Joined, Start, Upload, Work
from hanse_common.plan import Plan, SignedPlan
from hanse_common.secagg import ring
from hanse_server.aggregation import PlainAggregator
from hanse_server.transport import Transport


@dataclass(frozen=True)
class RoundOutcome:
    """What a round gave: the mean client update and who took what part.

    `update` has shape (d,), float64, in the model's units. `blamed` holds a reason for each merchant whose
    reply was malformed. Names are the transport's.
    """

    update: NDArray[np.float64]
    uploaded: tuple[str, ...]
    declined: Mapping[str, DeclineCode]
    blamed: Mapping[str, str]


@dataclass
class _Roll:
    """Who declined and who is to blame, filled while the round runs."""

    declined: dict[str, DeclineCode] = field(default_factory=dict)
    blamed: dict[str, str] = field(default_factory=dict)

    def describe(self) -> str:
        notes = [f"{name} declined ({code})" for name, code in sorted(self.declined.items())]
        notes += [f"{name}: {reason}" for name, reason in sorted(self.blamed.items())]
        return "; ".join(notes) or "the others did not answer in time"


def run_round(
    transport: Transport,
    signed_plan: SignedPlan,
    plan: Plan,
    round_: int,
    attempt: int,
    model: NDArray[np.float32],
) -> RoundOutcome:
    """Run the round `round_`, attempt `attempt`, from `model`, shape (d,), and return its outcome.

    Raises `RoundFailed` when fewer than the plan's minimum join or upload; no sum is then released.
    """
    roll = _Roll()
    cohort = plan.cohort
    work = Work(plan_digest=plan.digest, round=round_, attempt=attempt)
    model_bytes = messages.model_to_bytes(model)

    invitation = wire.encode(
        Invitation(**work.work, signed_plan=signed_plan, model=model_bytes),
    )
    invited = transport.merchants()[: cohort.max_merchants]
    model_digest = messages.model_digest(model_bytes)
    joined = [
        merchant
        for merchant, reply in _trip(
            transport,
            "join",
            Joined,
            work,
            dict.fromkeys(invited, invitation),
            cohort.join_deadline,
            wire.MAX_DOCUMENT_BYTES,
            roll,
        )
        if _holds(reply.model_digest == model_digest, merchant, "joined with another model", roll)
    ]
    _require(len(joined), cohort.min_merchants, "joined", len(invited), roll)

    start = wire.encode(Start(**work.work, cohort_size=len(joined)))
    aggregator = PlainAggregator(plan.dimension)
    uploaded = []
    for merchant, reply in _trip(
        transport,
        "upload",
        Upload,
        work,
        dict.fromkeys(joined, start),
        cohort.upload_deadline,
        ring.WORD.itemsize * plan.dimension + wire.MAX_DOCUMENT_BYTES,
        roll,
    ):
        try:
            aggregator.add(reply.vector)
        except ValueError as error:
            roll.blamed[merchant] = str(error)
        else:
            uploaded.append(merchant)
    _require(len(uploaded), cohort.min_merchants, "uploaded", len(joined), roll)

    return RoundOutcome(
        update=plan.ring.decode(aggregator.total()) / len(uploaded),
        uploaded=tuple(sorted(uploaded)),
        declined=roll.declined,
        blamed=roll.blamed,
    )


R = TypeVar("R", Joined, Upload)


def _trip(
    transport: Transport,
    kind: str,
    expected: type[R],
    work: Work,
    payloads: Mapping[str, bytes],
    deadline: float,
    max_bytes: int,
    roll: _Roll,
) -> Iterator[tuple[str, R]]:
    """Yield the valid replies of the expected type as they arrive; note all others in `roll`."""
    answered = set()
    for merchant, data in transport.exchange(kind, payloads, deadline):
        if merchant not in payloads or merchant in answered:
            roll.blamed[merchant] = f"{kind}: answered unasked"
            continue
        answered.add(merchant)
        try:
            reply: R | Declined = wire.decode_any((expected, Declined), data, max_bytes)
        except WireError as error:
            roll.blamed[merchant] = f"{kind}: {error}"
            continue
        if not _holds(reply.work == work.work, merchant, f"{kind}: answered for another round", roll):
            continue
        if isinstance(reply, Declined):
            roll.declined[merchant] = reply.code
        else:
            yield merchant, reply


def _holds(condition: bool, merchant: str, reason: str, roll: _Roll) -> bool:
    if not condition:
        roll.blamed[merchant] = reason
    return condition


def _require(found: int, minimum: int, verb: str, asked: int, roll: _Roll) -> None:
    if found < minimum:
        raise RoundFailed(
            f"{found} of {asked} merchants {verb}, the plan needs {minimum}: {roll.describe()}."
        )
