"""A league in one process: the transport calls each participant's `handle` and hands back its reply.

    transport = LocalGrid({"alder": alder.handle, "birch": birch.handle})

Nothing waits, and nothing is sent anywhere.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping

from hanse_simulations.seeded import seed_for

Handler = Callable[[bytes], bytes]


class LocalGrid:
    """An in-process `hanse_server.transport.Transport` with seeded dropouts.

    Each reply is lost with probability `dropout_rate`, after its merchant has done the work and paid for it. A
    merchant whose reply is lost is out for the rest of that round's attempt. Which replies are lost follows from
    `seed`, merchant and request alone, so it is the same in a resumed training. Deadlines are not kept: nothing
    here waits.
    """

    def __init__(self, merchants: Mapping[str, Handler], dropout_rate: float = 0.0, seed: int = 0) -> None:
        self._merchants = dict(sorted(merchants.items()))
        self._dropout_rate = dropout_rate
        self._seed = seed

    def merchants(self) -> tuple[str, ...]:
        """Return the names of all merchants, sorted."""
        return tuple(self._merchants)

    def exchange(
        self, kind: str, payloads: Mapping[str, bytes], deadline: float
    ) -> Iterator[tuple[str, bytes]]:
        """Yield (merchant, reply) one after the other, in the order of names."""
        for merchant, payload in sorted(payloads.items()):
            reply = self._merchants[merchant](payload)
            if not self._is_lost(kind, merchant, payload):
                yield merchant, reply

    def _is_lost(self, kind: str, merchant: str, payload: bytes) -> bool:
        name = f"dropout {kind} {merchant} {hashlib.sha256(payload).hexdigest()}"
        return seed_for(self._seed, name) < self._dropout_rate * 2.0**63
