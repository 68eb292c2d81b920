"""A league in one process: the transport calls each participant's `handle` and hands back its reply.

    transport = LocalGrid({"alder": alder.handle, "birch": birch.handle})

Nothing waits, and nothing is sent anywhere.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial

from hanse_common import wire
from hanse_common.messages import MAX_MESSAGE_BYTES, Start
from hanse_common.secagg.messages import Agreement, Survivors, Work
from hanse_simulations.seeded import seed_for

TRIPS = ("upload", "agreed", "unmasked")
"""The trips of a round, by their answers, in which a merchant can drop out."""

_QUESTIONS: tuple[type[Work], ...] = (Start, Survivors, Agreement)

Handler = Callable[[bytes], bytes]


class LocalGrid:
    """An in-process `hanse_server.transport.Transport` with seeded dropouts.

    In each try at a round `dropouts` merchants drop out, and each of the others with probability `dropout_rate`: one
    of its three replies, any of them, is lost after it has done the work. It is back in the next round. Which ones
    are lost follows from `seed`, merchant, round and try alone, so it is the same in a resumed training. Deadlines
    are not kept: nothing here waits.
    """

    def __init__(
        self,
        merchants: Mapping[str, Handler],
        dropout_rate: float = 0.0,
        seed: int = 0,
        dropouts: int = 0,
    ) -> None:
        self._merchants = dict(sorted(merchants.items()))
        self._dropout_rate = dropout_rate
        self._dropouts = dropouts
        self._seed = seed
        self._tries: Counter[int] = Counter()

    def gather(self) -> tuple[str, ...]:
        """Return the names of all merchants, sorted."""
        return tuple(self._merchants)

    def merchants(self) -> tuple[str, ...]:
        """Return the names of all merchants, sorted."""
        return tuple(self._merchants)

    def exchange(
        self, kind: str, payloads: Mapping[str, bytes], deadline: float
    ) -> Iterator[tuple[str, bytes]]:
        """Yield (merchant, reply) one after the other, in the order of names."""
        round_ = -1
        if kind in TRIPS and payloads:
            round_ = wire.decode_any(_QUESTIONS, next(iter(payloads.values())), MAX_MESSAGE_BYTES).round
            self._tries[round_] += kind == TRIPS[0]
        for merchant, payload in sorted(payloads.items()):
            reply = self._merchants[merchant](payload)
            if not self._is_lost(kind, merchant, round_):
                yield merchant, reply

    def _is_lost(self, kind: str, merchant: str, round_: int) -> bool:
        if round_ < 0 or not (self._dropout_rate or self._dropouts):
            return False
        draw = partial(self._draw, round_)
        if merchant in sorted(self._merchants, key=partial(draw, "turn"))[: self._dropouts]:
            return TRIPS[int(draw("trip", merchant) * len(TRIPS))] == kind
        drawn = draw("dropout", merchant)
        # What is under the rate is divided among the trips, evenly.
        return drawn < self._dropout_rate and TRIPS[int(drawn / self._dropout_rate * len(TRIPS))] == kind

    def _draw(self, round_: int, purpose: str, merchant: str) -> float:
        """Return a number in [0, 1), the same for the same try."""
        name = f"{purpose} {merchant} round {round_} try {self._tries[round_]}"
        return seed_for(self._seed, name) / 2.0**63
