"""The seam between the coordinator and whatever carries its bytes."""

from collections.abc import Iterator, Mapping
from typing import Protocol

from hanse_common.wire import Buffer


class Transport(Protocol):
    """Carries one trip of a round to many merchants at once.

    The coordinator sees nothing else of the world: in a simulation the merchants are objects in the same
    process, in a deployment they are streams over TLS.
    """

    def gather(self) -> tuple[str, ...]:
        """Return the names of the merchants that come together for a new set-up, sorted; may wait for them."""
        ...

    def merchants(self) -> tuple[str, ...]:
        """Return the names of the merchants of the last `gather` that can be reached now, sorted."""
        ...

    def exchange(
        self, kind: str, payloads: Mapping[str, bytes], deadline: float
    ) -> Iterator[tuple[str, Buffer]]:
        """Send each merchant its payload and yield (merchant, reply) as replies arrive.

        `kind` names the trip, for logs and metrics. A merchant that does not answer within `deadline` seconds
        is left out; it is not an error. Each merchant is yielded once at most. Replies are untrusted bytes; who asks
        for the next one is done with the last, so that memory stays bounded if none is kept.
        """
        ...
