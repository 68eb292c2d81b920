"""Seeded randomness, so that an experiment repeats to the bit. Never in the product: a known seed is no noise."""

import hashlib
from collections import Counter

import numpy as np
from numpy.typing import NDArray

from hanse_common.randomness import AesCtrStream


class SeededRandomness(AesCtrStream):
    """The AES-CTR stream whose key is the hash of a seed and a name, one stream for each purpose."""

    def __init__(self, seed: int, name: str) -> None:
        super().__init__(hashlib.sha256(f"hanse simulation {seed} {name}".encode()).digest())


class RoundRandomness:
    """A `Randomness` with a stream of its own for each try at each round.

    What a round draws does not depend on the rounds before it in the same process, so a training that was
    stopped between rounds and resumed draws what an uninterrupted one does.
    """

    def __init__(self, seed: int, name: str) -> None:
        self._seed = seed
        self._name = name
        self._stream = SeededRandomness(seed, name)
        self._tries: Counter[int] = Counter()

    def begin(self, round_: int) -> None:
        """Begin the stream of the next try at the round `round_`, counted in this process."""
        number = self._tries[round_]
        self._tries[round_] += 1
        self._stream = SeededRandomness(self._seed, f"{self._name} round {round_} try {number}")

    def words(self, count: int) -> NDArray[np.uint64]:
        """Return the next `count` words of the current stream, shape (count,), dtype uint64."""
        return self._stream.words(count)


def seed_for(seed: int, name: str) -> int:
    """Return a 63-bit seed for numpy's or torch's generators, one for each purpose."""
    return int.from_bytes(hashlib.sha256(f"hanse generator {seed} {name}".encode()).digest()[:8], "big") >> 1
