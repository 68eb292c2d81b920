"""The integer ring mod 2³² in which client updates are summed, with head room proven for the largest cohort.

    >>> ring = Ring(bound=4.0, max_merchants=5)
    >>> total = ring.encode(np.array([1.5])) + ring.encode(np.array([-0.25]))
    >>> float(ring.decode(total)[0])
    1.25

A coordinate is clipped to ±bound, rounded to the nearest multiple of a power of two, and kept as the residue of
that integer mod 2³². The step is the smallest for which max_merchants coordinates at the bound still add up to
less than 2³¹, so a sum of at most that many updates never wraps. What is encoded here is already differentially
private, so rounding to nearest is post-processing and costs no privacy.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hanse_common.wire import Buffer

MODULUS_BITS = 32

WORD = np.dtype("<u4")
"""A coordinate on the wire: unsigned, 32 bits, little-endian."""

MAX_DIMENSION = 1 << 26
"""Largest number of trained parameters: 2²⁶, an upload of 256 MiB."""

MAX_VECTOR_BYTES = WORD.itemsize * MAX_DIMENSION


@dataclass(frozen=True)
class Ring:
    """How a float64 update becomes residues mod 2³² and a sum of residues becomes floats again.

    `bound` is the largest magnitude of one coordinate, in the model's units; `max_merchants` the largest number
    of updates in one sum. Both are public: they come from the plan.
    """

    bound: float
    max_merchants: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.bound) and self.bound > 0):
            raise ValueError(f"Expected a finite bound > 0, found {self.bound}.")
        if not 1 <= self.max_merchants < 1 << 16:
            raise ValueError(f"Expected 1 to 65535 merchants, found {self.max_merchants}.")

    @property
    def step(self) -> float:
        """The distance of two neighbouring values, a power of two, in the model's units."""
        return 2.0 ** math.ceil(math.log2(self.bound / share(self.max_merchants)))

    def encode(self, update: NDArray[np.float64]) -> NDArray[np.uint32]:
        """Return `update`, shape (d,), as residues, shape (d,), dtype uint32. Non-finite coordinates become 0."""
        finite = np.where(np.isfinite(update), update, 0.0)
        return residues(np.rint(np.clip(finite, -self.bound, self.bound) / self.step).astype(np.int64))

    def decode(self, total: NDArray[np.uint32]) -> NDArray[np.float64]:
        """Return the sum that the residues `total`, shape (d,), stand for, in the model's units, float64."""
        return integers(total).astype(np.float64) * self.step


def share(max_merchants: int) -> int:
    """Return the largest magnitude of one merchant's integers for which `max_merchants` of them never wrap."""
    return ((1 << (MODULUS_BITS - 1)) - 1) // max_merchants


def residues(integers: NDArray[np.int64]) -> NDArray[np.uint32]:
    """Return integers, int64, mod 2³², dtype uint32, same shape."""
    return (integers & 0xFFFFFFFF).astype(np.uint32)


def integers(residues: NDArray[np.uint32]) -> NDArray[np.int32]:
    """Return the integers nearest zero that `residues` stand for, dtype int32, same shape: a view of them."""
    return residues.view(np.int32)


def to_bytes(residues: NDArray[np.uint32]) -> bytes:
    """Return residues, shape (d,), as 4·d bytes for the wire."""
    return residues.astype(WORD).tobytes()


def from_bytes(data: Buffer, dimension: int) -> NDArray[np.uint32]:
    """Return the residues in `data`, shape (dimension,), dtype uint32: a view of them, where words are like that.

    Raises `ValueError` when `data` is not exactly 4·dimension bytes.
    """
    if len(data) != dimension * WORD.itemsize:
        raise ValueError(f"Expected {dimension} words of 4 bytes, found {len(data)} bytes.")
    return np.frombuffer(data, dtype=WORD).astype(np.uint32, copy=False)
