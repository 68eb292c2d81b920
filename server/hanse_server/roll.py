"""Who answered what was asked, who declined, and who is to blame: one trip of a round, and the roll it fills."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from hanse_common import wire
from hanse_common.errors import WireError
from hanse_common.messages import DeclineCode, Declined
from hanse_common.secagg.messages import Work
from hanse_common.wire import Buffer
from hanse_server.transport import Transport

R = TypeVar("R", bound=Work)


@dataclass
class Roll:
    """What is noted of merchants while a round runs, by the transport's names.

    `accused` holds the identity that a merchant blames when it declines.
    """

    declined: dict[str, DeclineCode] = field(default_factory=dict)
    blamed: dict[str, str] = field(default_factory=dict)
    accused: dict[str, bytes] = field(default_factory=dict)

    def describe(self) -> str:
        """Return all of it in words."""
        notes = [f"{name} declined ({code})" for name, code in sorted(self.declined.items())]
        notes += [f"{name}: {reason}" for name, reason in sorted(self.blamed.items())]
        return "; ".join(notes) or "the others did not answer in time"


def trip(
    transport: Transport,
    expected: type[R],
    payloads: Mapping[str, Work],
    deadline: float,
    max_bytes: int,
    roll: Roll,
) -> Iterator[tuple[str, R, memoryview]]:
    """Ask each merchant its question and yield the valid answers of the expected type as they arrive.

    Of each answer there are its merchant, the message with an empty tail, and the tail, as `wire.decode_tailed` has
    them. Of a question only its bytes are kept, so that a model is not in memory twice if the caller does not keep it.

    Everything else is noted in `roll`: a reply that cannot be understood, is longer than `max_bytes`, comes unasked or
    is for other work is dropped and blamed on its sender; a `Declined` is written down.
    """
    kind = expected.__name__.lower()
    # One question to many merchants is one object: it is encoded once.
    encoded = {id(payload): wire.encode(payload) for payload in payloads.values()}
    sent = {name: encoded[id(payload)] for name, payload in payloads.items()}
    works = {name: payload.work for name, payload in payloads.items()}
    del payloads, encoded
    answered = set()
    for merchant, data in transport.exchange(kind, sent, deadline):
        if merchant not in works or merchant in answered:
            roll.blamed[merchant] = f"{kind}: answered unasked"
            continue
        answered.add(merchant)
        answer = _heard(merchant, expected, works[merchant], data, max_bytes, roll)
        del data
        if answer is not None:
            yield merchant, *answer
        del answer  # whoever waits for the next upload keeps nothing of the last


def _heard(
    merchant: str, expected: type[R], work: Mapping[str, Any], data: Buffer, max_bytes: int, roll: Roll
) -> tuple[R, memoryview] | None:
    """Return the answer in `data` and its tail, or note in `roll` what is there instead."""
    kind = expected.__name__.lower()
    either: tuple[type[Work], ...] = (expected, Declined)
    try:
        reply, tail = wire.decode_tailed(either, data, max_bytes)
    except WireError as error:
        roll.blamed[merchant] = f"{kind}: {error}"
        return None
    if reply.work != work:
        roll.blamed[merchant] = f"{kind}: answered for another round"
    elif isinstance(reply, Declined):
        roll.declined[merchant] = reply.code
        roll.accused[merchant] = reply.culprit
    elif isinstance(reply, expected):
        return reply, tail
    return None
