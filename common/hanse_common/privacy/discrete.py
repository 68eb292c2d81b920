"""The discrete Gaussian N_Z(0, σ²): integers k with probability proportional to exp(−k²/2σ²).

    >>> from hanse_common.randomness import OsRandomness
    >>> DiscreteGaussian(sigma=100.0).sample(5, OsRandomness()).dtype
    dtype('int64')

A sample is one look-up of a uniform 128-bit number U in a table of the cumulative distribution. The table is
made of integers alone, so every machine has the same one to the last bit:

    F_j = ⌈2¹²⁸·P(X ≤ j − K)⌉ for j < K, mirrored above, and X = −K + #{j : F_j ≤ U}, with K = ⌈13.5σ⌉.

The sampled law is exactly symmetric, and within total variation (K + 2)·2⁻¹²⁸ of N_Z(0, σ²), which is 2⁻¹¹⁴
at σ = 1000: rounding F moves each probability by less than 2⁻¹²⁸ (that of zero by less than 2⁻¹²⁷), less
than 2⁻¹²⁸ of mass lies beyond ±K, and the fixed-point weights behind F (256 fraction bits) are off by less
than 2⁻¹⁸⁸ in all. `accounting` charges the distance to δ.

References:
[1] Canonne, Kamath, Steinke 2020, "The Discrete Gaussian for Differential Privacy", Definition 1.
[2] Chen, Asau 1974, "On generating random variates from an empirical distribution" (the guide table).
"""

import math
from fractions import Fraction
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from hanse_common.randomness import Randomness

SIGMA_MIN = 4.0
SIGMA_MAX = 2.0**18  # a table of 0.1 GiB

_FRACTION_BITS = 256
_TAIL = 13.5  # P(|X| > 13.5σ) < 2⁻¹²⁸
_GUIDE_CELLS_PER_SIGMA = 32
_GUIDE_BITS_MAX = 22  # 16 MiB; beyond it misses of the cache cost more than searching
_CHUNK = 1 << 15
_WORD = 64


class DiscreteGaussian:
    """A sampler of N_Z(0, σ²), `SIGMA_MIN` ≤ sigma ≤ `SIGMA_MAX` in units of the integer grid.

    Building one takes 13.5σ steps of big-integer arithmetic: keep it.

    Raises:
        ValueError: sigma is out of range.
    """

    def __init__(self, sigma: float) -> None:
        validate_sigma(sigma)
        self.sigma = sigma
        self._reach = reach(sigma)
        self._high, self._low = _cumulative_table(sigma)
        guide_bits = min(_GUIDE_BITS_MAX, math.ceil(math.log2(_GUIDE_CELLS_PER_SIGMA * sigma)))
        self._shift = np.uint64(_WORD - guide_bits)
        cells = np.arange(1 << guide_bits, dtype=np.uint64) << self._shift
        self._guide = np.searchsorted(self._high, cells, side="left").astype(np.int32)

    def sample(self, count: int, randomness: Randomness) -> NDArray[np.int64]:
        """Return `count` independent samples, shape (count,), dtype int64, in grid units."""
        samples = np.empty(count, dtype=np.int64)
        for start in range(0, count, _CHUNK):
            chunk = samples[start : start + _CHUNK]
            chunk[:] = self._look_up(randomness.words(len(chunk)), randomness)
        samples -= self._reach
        return samples

    def _look_up(self, high: NDArray[np.uint64], randomness: Randomness) -> NDArray[np.int32]:
        """Return #{j : F_j ≤ U} for U of these high words; a low word is drawn where it matters."""
        index: NDArray[np.int32] = self._guide[high >> self._shift]
        index += self._high[index] < high
        # Entries at or below U are still ahead where a guide cell holds several, or words are equal.
        ahead = np.flatnonzero(self._high[index] <= high)
        index[ahead] = np.searchsorted(self._high, high[ahead], side="left")
        for tie in ahead[self._high[index[ahead]] == high[ahead]]:
            end = np.searchsorted(self._high, high[tie], side="right")
            index[tie] += np.searchsorted(self._low[index[tie] : end], randomness.words(1)[0], side="right")
        return index


def total_variation(sigma: float) -> float:
    """An upper bound on the distance of one sample's law from N_Z(0, sigma²); see the module's text."""
    return math.ldexp(reach(sigma) + 2, -2 * _WORD)


def validate_sigma(sigma: float) -> None:
    """Raise ValueError unless a table can be built for `sigma` (grid units)."""
    if not SIGMA_MIN <= sigma <= SIGMA_MAX:
        raise ValueError(
            f"Expected {SIGMA_MIN:g} ≤ sigma ≤ {SIGMA_MAX:g} grid units, found {sigma}. "
            "Change the noise multiplier; a large dimension makes the grid finer and sigma larger."
        )


def reach(sigma: float) -> int:
    """Return K, the largest magnitude of a sample."""
    return math.ceil(_TAIL * sigma)


def _cumulative_table(sigma: float) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Return the high words of F_0 … F_{2K−1} with a last one above all, and their low words."""
    weights = _weights(sigma, reach(sigma))
    total = 2 * sum(weights) - weights[0]
    # Rounding up keeps F_0 above 0, so that its mirror image still fits 128 bits.
    below_zero = b"".join(
        (-((-mass << 2 * _WORD) // total)).to_bytes(16, "big") for mass in accumulate(reversed(weights[1:]))
    )
    high, low = np.frombuffer(below_zero, dtype=">u8").astype(np.uint64).reshape(-1, 2).T
    mirrored_low = (~low + np.uint64(1))[::-1]
    mirrored_high = (~high + (low == 0))[::-1]
    last = np.array([np.iinfo(np.uint64).max], dtype=np.uint64)
    return np.concatenate([high, mirrored_high, last]), np.concatenate([low, mirrored_low])


def _weights(sigma: float, reach: int) -> list[int]:
    """Return e^{−k²/2σ²} for k = 0 … reach in fixed point, by w_{k+1} = w_k·r^{2k+1} with r = e^{−1/2σ²}.

    Each product is cut by less than one unit of 2⁻²⁵⁶, so r^{2k+1} is off by at most 4k + 1 units, w_k by at
    most 2k² + 2k, and their sum by less than (13.5·2¹⁸)³ < 2⁶⁶.
    """
    ratio = _exponential(-1 / (2 * Fraction(sigma) ** 2))
    squared = ratio * ratio >> _FRACTION_BITS
    weights = [1 << _FRACTION_BITS]
    for _ in range(reach):
        weights.append(weights[-1] * ratio >> _FRACTION_BITS)
        ratio = ratio * squared >> _FRACTION_BITS
    return weights


def _exponential(x: Fraction) -> int:
    """Return e^x in fixed point, |x| < 1, by its Taylor series."""
    term = value = Fraction(1)
    for n in range(1, 64):  # 1/64! < 2⁻²⁹⁵
        term *= x / n
        value += term
    return (value.numerator << _FRACTION_BITS) // value.denominator
