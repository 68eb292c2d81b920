"""Seeded randomness, so that an experiment repeats to the bit. Never in the product: a known seed is no noise."""

import hashlib

from hanse_common.randomness import AesCtrStream


class SeededRandomness(AesCtrStream):
    """The AES-CTR stream whose key is the hash of a seed and a name, one stream for each purpose."""

    def __init__(self, seed: int, name: str) -> None:
        super().__init__(hashlib.sha256(f"hanse simulation {seed} {name}".encode()).digest())


def seed_for(seed: int, name: str) -> int:
    """Return a 63-bit seed for numpy's or torch's generators, one for each purpose."""
    return int.from_bytes(hashlib.sha256(f"hanse generator {seed} {name}".encode()).digest()[:8], "big") >> 1
