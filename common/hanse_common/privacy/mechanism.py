"""The one mechanism: what is added to a sum of clipped gradients, and what that guarantees, in one object.

    >>> import numpy as np
    >>> from hanse_common.randomness import OsRandomness
    >>> mechanism = Mechanism(
    ...     clipping_norm=0.3, dimension=1000, noise_multiplier=4.0, sampling_rate=0.1, steps=100
    ... )
    >>> released = mechanism.release(np.zeros(1000, dtype=np.int64), OsRandomness())
    >>> round(mechanism.epsilon(delta=1e-5), 2)
    0.98

In secure aggregation several parties each add a share of the noise to a sum of their own:

    >>> shared = Mechanism(0.3, 1000, noise_multiplier=4.0, sampling_rate=0.1, steps=100, shares=8)
    >>> steps = shared.contribute(np.zeros(1000, dtype=np.int64), limit=2**27, randomness=OsRandomness())
    >>> steps.dtype, shared.epsilon(delta=1e-5) == mechanism.epsilon(delta=1e-5)
    (dtype('int64'), True)

Its six fields are public; they stand in the signed plan. Grid, sensitivity, noise and ε all follow from
them, so that nobody can account for one mechanism and run another. What the caller still owes is named in
`encoding` (every example's exact norm) and here: `sampling_rate` is the probability with which each example
is sampled, independently and secretly, in each of at most `steps` releases.
"""

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from hanse_common.privacy import accounting
from hanse_common.privacy.discrete import DiscreteGaussian, reach
from hanse_common.privacy.encoding import Grid
from hanse_common.randomness import Randomness


@dataclass(frozen=True)
class Mechanism:
    """Poisson sampling, clipping, one stochastic rounding, discrete Gaussian noise, `steps` times.

    Attributes:
        clipping_norm: C, the largest Euclidean norm of one example's gradient.
        dimension: d, the number of coordinates.
        noise_multiplier: z, the noise's σ over the sensitivity c̃ of the rounded sum.
        sampling_rate: q, in (0, 1].
        steps: T, at least 1.
        shares: h, how many parties' noise hides an example; each adds σ/√h. 1: whoever holds the sum adds all.

    Raises:
        ValueError: a field is out of range, or z and d ask for noise outside `discrete`'s range of σ.
    """

    clipping_norm: float
    dimension: int
    noise_multiplier: float
    sampling_rate: float
    steps: int
    shares: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.noise_multiplier < math.inf:
            raise ValueError(f"Expected a finite noise_multiplier > 0, found {self.noise_multiplier}.")
        if not 0 < self.sampling_rate <= 1:
            raise ValueError(f"Expected 0 < sampling_rate ≤ 1, found {self.sampling_rate}.")
        if self.steps < 1:
            raise ValueError(f"Expected steps ≥ 1, found {self.steps}.")
        _ = self.noise

    @cached_property
    def grid(self) -> Grid:
        """The grid that clipping norm and dimension fix."""
        return Grid(self.clipping_norm, self.dimension)

    @cached_property
    def noise(self) -> accounting.Noise:
        """One step's noise and sensitivity, in grid steps: what is drawn is what is accounted for."""
        sensitivity = self.grid.sensitivity
        return accounting.Noise(self.noise_multiplier * sensitivity, sensitivity, self.dimension, self.shares)

    @property
    def noise_deviation(self) -> float:
        """The standard deviation of one released coordinate's noise, in the gradient's own units."""
        return self.noise.sigma * self.grid.step

    def epsilon(self, delta: float) -> float:
        """Return an ε such that all `steps` releases together are (ε, delta)-DP; may be infinite.

        One example, present or absent, is what it hides. Raises ValueError for a delta outside [1e-10, 1).
        """
        return accounting.epsilon(self.noise, sampling_rate=self.sampling_rate, steps=self.steps, delta=delta)

    def release(self, fine_sum: NDArray[np.int64], randomness: Randomness) -> NDArray[np.float64]:
        """Round the exact sum of one step's examples, add all the noise, and return what may be seen.

        Args:
            fine_sum: shape (dimension,), dtype int64, in `grid.fine_unit`; zeros for an empty sample.
            randomness: drawn afresh for rounding and noise.

        Returns:
            Shape (dimension,), dtype float64, in the gradient's own units: multiples of `grid.step`.

        Raises:
            ValueError: fine_sum is not the sum that `Grid.round` expects, or the noise is in several shares.
        """
        if self.shares != 1:
            raise ValueError(f"Expected all the noise in one share, found {self.shares} shares.")
        steps = self.grid.round(fine_sum, randomness)
        steps += _sampler(self.noise.share).sample(self.dimension, randomness)
        return self.grid.dequantise(steps)

    def contribute(
        self, fine_sum: NDArray[np.int64], limit: int, randomness: Randomness
    ) -> NDArray[np.int64]:
        """Round one party's exact sum, add its share of the noise, and return what goes into the masked sum.

        What is returned may be seen in a sum over at least `shares` parties that keep their noise secret, not alone.

        Args:
            fine_sum: as in `release`.
            limit: no coordinate of what is returned is larger in magnitude. Rounded coordinates are cut to where the
                largest noise there is leaves them below it: each is moved by itself, never away from its neighbour's,
                so sensitivity and noise are as without.
            randomness: drawn afresh for rounding and noise.

        Returns:
            Shape (dimension,), dtype int64, in grid steps.

        Raises:
            ValueError: fine_sum is not the sum that `Grid.round` expects, or `limit` leaves no room.
        """
        room = self.room(limit)
        if room < 1:
            raise ValueError(f"Expected a limit over the largest noise, {self.reach}, found {limit}.")
        steps = np.clip(self.grid.round(fine_sum, randomness), -room, room)
        steps += _sampler(self.noise.share).sample(self.dimension, randomness)
        return steps

    @property
    def reach(self) -> int:
        """The largest magnitude of one share of noise, in grid steps."""
        return reach(self.noise.share)

    def room(self, limit: int) -> int:
        """Return the largest magnitude that one party's rounded sum may have below `limit`, in grid steps."""
        return limit - self.reach


@lru_cache(maxsize=8)
def _sampler(sigma: float) -> DiscreteGaussian:
    """A sampler's table takes longer to make than a round's noise to draw, and a plan has one σ."""
    return DiscreteGaussian(sigma)
