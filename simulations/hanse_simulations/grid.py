"""A league in one process: the transport calls each participant's `handle` and hands back its reply.

transport = LocalGrid({"alder": alder.handle, "birch": birch.handle})
"""

from collections.abc import Callable, Iterator, Mapping

import numpy as np

Handler = Callable[[bytes], bytes]


class LocalGrid:
    """An in-process `hanse_server.transport.Transport` with seeded dropouts.

    A merchant that drops out is silent for the rest of a round: with probability `dropout_rate` a trip, drawn
    from `rng`, its reply is lost. Deadlines are not kept: nothing here waits.
    """

    def __init__(
        self,
        merchants: Mapping[str, Handler],
        dropout_rate: float = 0.0,
        rng: np.random.Generator | None = None,
    ) -> None:
        self._merchants = dict(sorted(merchants.items()))
        self._dropout_rate = dropout_rate
        self._rng = rng or np.random.default_rng(0)

    def merchants(self) -> tuple[str, ...]:
        """Return the names of all merchants, sorted."""
        return tuple(self._merchants)

    def exchange(
        self, kind: str, payloads: Mapping[str, bytes], deadline: float
    ) -> Iterator[tuple[str, bytes]]:
        """Yield (merchant, reply) one after the other, in the order of names."""
        for merchant, payload in sorted(payloads.items()):
            reply = self._merchants[merchant](payload)
            if self._rng.random() >= self._dropout_rate:
                yield merchant, reply
