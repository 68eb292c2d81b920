"""How much noise a promise needs.

    >>> z = noise_multiplier(
    ...     epsilon=2.7, delta=1e-5, sampling_rate=0.1365, steps=400, clipping_norm=0.3, dimension=35_800
    ... )
    >>> round(z, 1)
    4.3

In secure aggregation the n_min − c honest merchants that are in every released sum each add a share of the noise, so
`shares` is n_min − c, and each share is z·c̃/√(n_min − c) on the grid. The answer is tried on `Mechanism.epsilon`
itself: what is calibrated is what will be charged."""

import math

from scipy.optimize import brentq

from hanse_common.errors import PlanRefused
from hanse_common.privacy.discrete import SIGMA_MAX, SIGMA_MIN
from hanse_common.privacy.encoding import Grid
from hanse_common.privacy.mechanism import Mechanism

_TOLERANCE = 1e-3
_WIDENING = 1.25


def noise_multiplier(
    *,
    epsilon: float,
    delta: float,
    sampling_rate: float,
    steps: int,
    clipping_norm: float,
    dimension: int,
    shares: int = 1,
) -> float:
    """Return a noise multiplier that meets (epsilon, delta), at most 0.1 % above the smallest that does.

    Arguments are those of `Mechanism`, and the (ε, δ) that all its steps together must meet.

    Raises:
        PlanRefused: no noise in the sampler's range meets the promise.
        ValueError: an argument is out of range.
    """
    if not epsilon > 0:
        raise ValueError(f"Expected epsilon > 0, found {epsilon}.")
    sensitivity = Grid(clipping_norm, dimension).sensitivity
    one = math.sqrt(shares) / sensitivity
    weakest, strongest = _inward(SIGMA_MIN * one, SIGMA_MAX * one)

    def reached(z: float) -> float:
        return Mechanism(clipping_norm, dimension, z, sampling_rate, steps, shares).epsilon(delta)

    if not reached(strongest) <= epsilon:
        raise PlanRefused(
            f"epsilon {epsilon:g} at delta {delta:g} is out of reach: {steps} steps at sampling rate "
            f"{sampling_rate:g} with the largest noise multiplier that dimension {dimension} allows, "
            f"{strongest:.4g}, cost epsilon {reached(strongest):.4g}. "
            "Plan fewer steps, a lower sampling rate, or a larger epsilon or delta."
        )
    # Widening from about the right place keeps the far ends, slow to account for, out of the search.
    low = high = min(max(_guess(epsilon, sampling_rate, steps), weakest), strongest)
    while reached(high) > epsilon:
        low, high = high, min(high * _WIDENING, strongest)
    while reached(low) <= epsilon:
        if low == weakest:
            return weakest
        low, high = max(low / _WIDENING, weakest), low
    # ln ε is almost a line in ln z, so a root finder needs few of these slow evaluations.
    root = math.exp(
        brentq(
            lambda log_z: math.log(min(reached(math.exp(log_z)), 1e6) / epsilon),
            math.log(low),
            math.log(high),
            xtol=_TOLERANCE / 4,
            maxiter=100,
        )
    )
    found = root * (1 + _TOLERANCE / 2)
    return found if reached(found) <= epsilon else high


def _guess(epsilon: float, sampling_rate: float, steps: int) -> float:
    """Where to begin; only speed depends on it."""
    return max(4 * sampling_rate * math.sqrt(steps) / epsilon, 0.5)


def _inward(low: float, high: float) -> tuple[float, float]:
    """Rounding must not carry a multiplier's σ past the sampler's limits."""
    return low * (1 + 1e-12), high * (1 - 1e-12)
