"""The grid: exact sums of clipped gradients become integers by one unbiased rounding, at a known cost.

    >>> import numpy as np
    >>> from hanse_common.randomness import OsRandomness
    >>> grid = Grid(clipping_norm=1.0, dimension=4)
    >>> grid.dequantise(grid.round(np.zeros(4, dtype=np.int64), OsRandomness()))
    array([0., 0., 0., 0.])

Clipping norm and dimension are public, and everything here follows from them. Two units, both powers of two: a *step*
γ, the grid on which noise is added and sums are released, with 10√d ≤ C/γ < 20√d; and a *fine* unit of γ/m, in which
one example's gradient is written and C is 2⁴⁵ to 2⁴⁶. The caller's duty, on which all privacy rests: every example
contributes a vector of integers in fine units whose exact Euclidean norm is at most C, and they are added in a
`FineSum`. Scaling a float32 gradient to C·(1 − 2⁻²⁰) by a norm taken in float64, then cutting toward zero, does it:
the roundings on the way are below 2⁻²², the target leaves 2⁻²⁰, and cutting toward zero never lengthens. A `FineSum`
is exact for any number of examples, in any order of addition; what lies beyond ±2⁶² is cut only at the end,
coordinate by coordinate, which moves neighbours no further apart. Nothing is ever left out because there is too much
of it: that would depend on a single example.

**Sensitivity after rounding.** The sum S is released as R_u(S) = ⌊(S + u)/m⌋, u uniform on {0, …, m − 1}
and independent for each coordinate. Take neighbouring sums S and S + g, ‖g‖ ≤ C, and *the same* u for both,
which is allowed because u does not depend on the data: publishing u too would only tell more. In each
coordinate w = (S + u) mod m is uniform whatever S is, and R_u(S + g) − R_u(S) = ⌊(w + g)/m⌋. So the
difference Δ has exactly the law of a stochastic rounding of g alone: with y = g/γ, Δ_i = ⌊y_i⌋ +
Bernoulli(y_i − ⌊y_i⌋), independently. Then E‖Δ‖² ≤ ‖y‖² + d/4, as a Bernoulli's variance is at most 1/4, and
Δ_i² takes two values that lie |2⌊y_i⌋ + 1| ≤ 2|y_i| + 1 apart, so that by Hoeffding's lemma, for every β,

    P( γ²‖Δ‖² > C² + γ²d/4 + √(2 ln(1/β))·γ·(C + γ√d/2) ) ≤ β,  and always  γ‖Δ‖ ≤ C + γ√d.

`Grid.sensitivity` is the smaller bound at β = 2⁻⁶⁰. No rounding is rejected and drawn again: the exceptional
event is one of u and of the other examples, has probability at most β in each step, and costs at most β of δ
each step.

Where several parties each round a sum of their own and the rounded sums are added, an example is in one of them,
and the same bound holds. So it does when a party then cuts each coordinate to a fixed range: neighbours come no
further apart by it.

References:
[1] Kairouz, Liu, Steinke 2021, "The Distributed Discrete Gaussian Mechanism for Federated Learning with
    Secure Aggregation", Theorem 1 and Section 4.1 (the bound, there for one vector and enforced by
    rejection).
[2] Casacuberta, Shoemate, Vadhan, Wagaman 2022, "Widespread Underestimation of Sensitivity in Differentially
    Private Libraries and How to Fix It" (why sums are exact).
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray

from hanse_common.randomness import Randomness

ROUNDING_FAILURE = 2.0**-60
"""β: the probability, in one step, that rounding leaves neighbours further apart than the sensitivity."""

NORM_BITS = 46
"""C is less than 2^NORM_BITS fine units, and at least half of that."""

MAX_DIMENSION = 1 << 30
"""Beyond it a step would have too few fine units for an unbiased rounding."""

_STEPS_PER_NORM = 10  # C/γ ≥ 10√d: rounding then adds under 1 % to the sensitivity from d = 1000 on
_EXACT = 2**62  # int64 holds sums up to here, and room to add the rounding's u
_LIMB_BITS = 31


@dataclass(frozen=True)
class Grid:
    """The grid for vectors of `dimension` numbers clipped to Euclidean norm `clipping_norm`.

    Raises:
        ValueError: a field is out of range.
    """

    clipping_norm: float
    dimension: int

    def __post_init__(self) -> None:
        if not 1e-9 <= self.clipping_norm <= 1e9:
            raise ValueError(f"Expected 1e-9 ≤ clipping_norm ≤ 1e9, found {self.clipping_norm}.")
        if not 1 <= self.dimension <= MAX_DIMENSION:
            raise ValueError(f"Expected 1 ≤ dimension ≤ {MAX_DIMENSION}, found {self.dimension}.")

    @cached_property
    def step_exponent(self) -> int:
        """The grid step is γ = 2^step_exponent, the largest power of two with C/γ ≥ 10√d."""
        return math.frexp(self.clipping_norm / (_STEPS_PER_NORM * math.sqrt(self.dimension)))[1] - 1

    @property
    def step(self) -> float:
        """The grid step γ, in the gradient's own units."""
        return math.ldexp(1.0, self.step_exponent)

    @property
    def fine_unit(self) -> float:
        """The unit of one example's integers, in the gradient's own units."""
        return math.ldexp(1.0, self.fine_exponent)

    @cached_property
    def fine_exponent(self) -> int:
        """The fine unit is 2^fine_exponent."""
        return math.frexp(self.clipping_norm)[1] - NORM_BITS

    @property
    def fine_per_step(self) -> int:
        """m: how many fine units a step has, a power of two."""
        return 1 << (self.step_exponent - self.fine_exponent)

    @cached_property
    def sensitivity(self) -> float:
        """c̃/γ: how many grid steps apart rounded neighbouring sums are, except with probability β."""
        return rounded_norm(self.clipping_norm, self.step, self.dimension, ROUNDING_FAILURE) / self.step

    def round(self, fine_sum: NDArray[np.int64], randomness: Randomness) -> NDArray[np.int64]:
        """Round an exact sum to the grid, exactly unbiased.

        Args:
            fine_sum: shape (dimension,), dtype int64, in fine units.
            randomness: one word is drawn for each coordinate.

        Returns:
            Shape (dimension,), dtype int64, in grid steps.

        Raises:
            ValueError: the shape, the dtype or a magnitude is not one that a `FineSum` has.
        """
        if fine_sum.shape != (self.dimension,) or fine_sum.dtype != np.int64:
            raise ValueError(
                f"fine_sum: expected int64 of shape ({self.dimension},), "
                f"found {fine_sum.dtype} of shape {fine_sum.shape}."
            )
        if fine_sum.max() > _EXACT or fine_sum.min() < -_EXACT:
            raise ValueError("fine_sum: expected magnitudes up to 2^62, as a FineSum has.")
        bits = self.step_exponent - self.fine_exponent
        uniform = randomness.words(self.dimension) >> np.uint64(64 - bits)
        return (fine_sum + uniform.astype(np.int64)) >> bits

    def dequantise(self, steps: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return `steps` (int64, up to 2⁵³) in the gradient's own units, float64, same shape, exactly."""
        return np.ldexp(steps.astype(np.float64), self.step_exponent)


class FineSum:
    """An exact sum of many vectors of int64, cut to ±2⁶² in each coordinate at the end.

    Kept in two limbs, so that neither overflows before 2³¹ additions.
    """

    LARGEST: Final = _EXACT

    def __init__(self, dimension: int) -> None:
        self._high = np.zeros(dimension, dtype=np.int64)
        self._low = np.zeros(dimension, dtype=np.int64)

    def add(self, part: NDArray[np.int64]) -> None:
        """Add a vector of shape (dimension,), dtype int64, of any magnitude."""
        self._high += part >> _LIMB_BITS
        self._low += part & ((1 << _LIMB_BITS) - 1)

    def value(self) -> NDArray[np.int64]:
        """Return the sum, shape (dimension,), dtype int64, each coordinate at most 2⁶² in magnitude."""
        high = self._high + (self._low >> _LIMB_BITS)
        low = self._low & ((1 << _LIMB_BITS) - 1)
        most = _EXACT >> _LIMB_BITS
        inside = (np.clip(high, -most, most - 1) << _LIMB_BITS) + low
        return np.where(high < -most, -_EXACT, np.where(high >= most, _EXACT, inside))


def rounded_norm(norm: float, step: float, dimension: int, failure: float) -> float:
    """A bound on the norm of a vector after stochastic rounding, in the vector's own units.

    It holds except with probability `failure`, for any vector of `dimension` numbers and Euclidean norm at
    most `norm`, rounded to multiples of `step`. Source: [1], Theorem 1; proof in the module's text.
    """
    half_diagonal = step * math.sqrt(dimension) / 2
    tail = math.sqrt(2 * math.log(1 / failure)) * step * (norm + half_diagonal)
    return min(math.sqrt(norm**2 + half_diagonal**2 + tail), norm + 2 * half_diagonal)
