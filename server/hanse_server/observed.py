"""A transport that says how each trip went: who answered, after how long, and how many bytes it took.

    transport = ObservedTransport(streams, observers=[latencies.add, metrics.trip])

What is observed is what the operator sees anyway: no payload is looked at.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from hanse_common.wire import Buffer
from hanse_server.transport import Transport


@dataclass(frozen=True)
class TripObservation:
    """One question to many merchants, after its end.

    `kind` is joined, shares, ready, upload, agreed or unmasked. `seconds` holds, of each merchant of `asked` that
    answered, the time from the question to its answer; `deadline` and `lasted` are in seconds, too.
    """

    kind: str
    asked: tuple[str, ...]
    seconds: Mapping[str, float]
    deadline: float
    lasted: float
    sent_bytes: int
    received_bytes: int


class ObservedTransport:
    """Implements `Transport` by another one; each of `observers` hears of every trip once it is over.

    `on_answer` hears a trip's kind, how many answered so far, and how many were asked.
    """

    def __init__(
        self,
        transport: Transport,
        observers: Sequence[Callable[[TripObservation], None]],
        on_answer: Callable[[str, int, int], None] = lambda kind, answered, asked: None,
    ) -> None:
        self._transport = transport
        self._on_answer = on_answer
        self._observers = tuple(observers)

    def gather(self) -> tuple[str, ...]:
        """As `Transport.gather`."""
        return self._transport.gather()

    def merchants(self) -> tuple[str, ...]:
        """As `Transport.merchants`."""
        return self._transport.merchants()

    def exchange(
        self, kind: str, payloads: Mapping[str, bytes], deadline: float
    ) -> Iterator[tuple[str, Buffer]]:
        """As `Transport.exchange`."""
        began = time.monotonic()
        seconds: dict[str, float] = {}
        received = 0
        self._on_answer(kind, 0, len(payloads))
        try:
            for merchant, reply in self._transport.exchange(kind, payloads, deadline):
                seconds[merchant] = time.monotonic() - began
                received += len(reply)
                self._on_answer(kind, len(seconds), len(payloads))
                yield merchant, reply
                del reply  # while it waits for the next
        finally:
            observation = TripObservation(
                kind=kind,
                asked=tuple(sorted(payloads)),
                seconds=seconds,
                deadline=deadline,
                lasted=time.monotonic() - began,
                sent_bytes=sum(map(len, payloads.values())),
                received_bytes=received,
            )
            for observer in self._observers:
                observer(observation)
