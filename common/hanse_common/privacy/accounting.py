"""The ε of T steps of rounding plus discrete Gaussian noise, by privacy loss distributions.

    >>> setting = Noise(sigma=2000.0, sensitivity=1000.0, dimension=10_000)
    >>> round(epsilon(setting, sampling_rate=0.01, steps=1000, delta=1e-5), 2)
    0.62

Everything here is public. Neighbouring data differ by one example, present or absent; each step samples every
example independently with probability q (Poisson). dp-accounting computes the privacy loss distribution (PLD)
of *continuous* Gaussian noise in *one* dimension. Four steps lead there from what runs; lengths are in grid
steps.

1. *Sampler.* One share of one coordinate's noise is within total variation t of N_Z(0, σ²/h)
   (`discrete.total_variation`), so all T steps of h shares are within τ = T·d·h·t of ideal noise. For any event: δ
   grows by τ·(1 + e^ε).

   *Shares.* Noise is the sum of h independent shares N_Z(0, σ²/h), one from each of h honest merchants, or h = 1. With
   s = σ/√h the sum's law and N_Z(0, σ²) agree within a factor e^{±ω} in each coordinate, ω =
   10·Σ_{k<h} e^{−2π²s²k/(k+1)} ≤ 10(h − 1)·e^{−π²s²} [2, Theorem 9, for each
   of the h − 1 sums of two]. More shares, and whatever else
   is added to the sum that is independent of the example, are post-processing.

2. *Smoothing.* For an integer vector x, draw W from the continuous N(x, (σ² − r²)I), then each K_i from the
   integers with probability proportional to exp(−(k − W_i)²/2r²). Let θ_s(w) = Σ_k exp(−(k − w)²/2s²); by
   Poisson summation θ_s(w) = √(2π)·s·(1 + 2Σ_{n≥1} e^{−2π²s²n²} cos 2πnw), within a factor 1 ± κ_s of
   √(2π)·s, where κ_s = 2Σ_{n≥1} e^{−2π²s²n²}. Were θ_r constant, convolution of Gaussians would give exactly
   P(K = k) ∝ exp(−‖k − x‖²/2σ²), which is x + N_Z(0, σ²)^d [1]. Hence for all k and x the two laws agree
   within a factor e^{±η},

       η = d·(−ln(1 − κ_r) + κ_σ) ≤ 3d·e^{−2π²r²}  for r = 2 and σ ≥ 4,

   and with shares within e^{±(η + dω)}; below, η is the sum of both.

   Mixtures keep the factor, so it survives Poisson sampling, and T adaptive steps multiply to e^{±Tη}. So
   ideal noise has ε ≤ ε' + 2Tη and δ ≤ e^{Tη}·δ', (ε', δ') those of the smoothed mechanism; and that is a
   post-processing of continuous noise N(0, (σ² − r²)I) on R_u(S).

3. *Rounding.* Fix u and the other examples' sampling; neither differs between neighbours. Except with
   probability β the sums are then at most c̃ apart (`encoding`, [2]), and the pair of outputs is dominated by
   that of the Poisson subsampled Gaussian with multiplier z' = √(σ² − r²)/c̃. So the pair without conditioning
   is dominated by one that reveals everything with probability β and is the subsampled Gaussian otherwise
   [3, Theorem 11], and T adaptive steps by its T-fold composition [3, Theorem 10]: δ grows by
   1 − (1 − β)^T ≤ T·β.

4. *PLD.* dp-accounting's estimate is pessimistic (connect the dots [4]): its ε is an upper bound, apart from
   rounding errors of float64 in its Fourier transforms. They are measured, not proven: φ for each step is charged
   to δ, and δ below `DELTA_MIN` is refused.

Together: ε(δ) = ε_PLD(δ') + 2Tη with e^{Tη}·(δ' + T·(β + φ)) + τ·(1 + e^ε) = δ.

References:
[1] Canonne, Kamath, Steinke 2020, "The Discrete Gaussian for Differential Privacy".
[2] Kairouz, Liu, Steinke 2021, "The Distributed Discrete Gaussian Mechanism for Federated Learning with
    Secure Aggregation".
[3] Zhu, Dong, Wang 2022, "Optimal Accounting of Differential Privacy via Characteristic Function".
[4] Doroshenko, Ghazi, Kamath, Kumar, Manurangsi 2022, "Connect the Dots: Tighter Discrete Approximations of
    Privacy Loss Distributions".
"""

import math
from dataclasses import dataclass
from functools import lru_cache

from dp_accounting.pld import privacy_loss_distribution as pld

from hanse_common.privacy.discrete import total_variation, validate_sigma
from hanse_common.privacy.encoding import ROUNDING_FAILURE

DELTA_MIN = 1e-10
"""Smaller δ drown in the rounding errors of the PLD's Fourier transforms."""

STEPS_MAX = 1_000_000
"""No finite ε is claimed for more steps: a PLD of them would take minutes."""

EPSILON_MAX = 20.0
"""No finite ε beyond this is claimed; it bounds the e^ε in the sampler's cost."""

SHARES_MAX = 1 << 16
"""Bound of the shares that one step's noise is made of."""

_FOURIER_ERROR = 1e-15
"""Charged to δ for each step: thirty times the error seen in the PLD's Fourier transforms, where at δ near 1e-10
and 10⁴ steps ε came out up to 0.002 below that of the exact Gaussian mechanism."""

_SMOOTHING = 2.0  # r, in grid steps


@dataclass(frozen=True)
class Noise:
    """The noise of one step, in grid steps.

    `sigma` is the parameter of the noise in each of `dimension` coordinates: that of a discrete Gaussian, or of the
    sum of `shares` independent ones of parameter sigma/√shares. `sensitivity` is c̃/γ, the distance of rounded
    neighbouring sums (`Grid.sensitivity`).

    Raises:
        ValueError: a field is out of range.
    """

    sigma: float
    sensitivity: float
    dimension: int
    shares: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.shares <= SHARES_MAX:
            raise ValueError(f"Expected 1 to {SHARES_MAX} shares of noise, found {self.shares}.")
        validate_sigma(self.share)
        if not 0 < self.sensitivity < math.inf:
            raise ValueError(f"Expected a finite sensitivity > 0, found {self.sensitivity}.")
        if self.dimension < 1:
            raise ValueError(f"Expected dimension ≥ 1, found {self.dimension}.")

    @property
    def share(self) -> float:
        """The parameter of one share."""
        return self.sigma / math.sqrt(self.shares)

    @property
    def distance(self) -> float:
        """η: all of one step's ideal noise is within a factor e^{±η} of what steps 2 to 4 account for."""
        smoothing = 3 * math.exp(-2 * (math.pi * _SMOOTHING) ** 2)
        summing = 10 * (self.shares - 1) * math.exp(-((math.pi * self.share) ** 2))
        return self.dimension * (smoothing + summing)

    @property
    def failure(self) -> float:
        """The total variation between one step's noise and ideal noise."""
        return self.dimension * self.shares * total_variation(self.share)

    @property
    def multiplier(self) -> float:
        """z' = √(σ² − r²)/c̃: the multiplier of continuous noise that reveals no less."""
        return math.sqrt(self.sigma**2 - _SMOOTHING**2) / self.sensitivity


def epsilon(noise: Noise, *, sampling_rate: float, steps: int, delta: float) -> float:
    """Return an ε such that `steps` steps are (ε, delta)-DP, or infinity above `EPSILON_MAX` and `STEPS_MAX`.

    Args:
        noise: what each step adds.
        sampling_rate: Poisson sampling probability of each example in each step, in (0, 1].
        steps: how many steps, at least 1, of which each may depend on the outcome of those before.
        delta: in [`DELTA_MIN`, 1).

    Raises:
        ValueError: an argument is out of range.
    """
    if not 0 < sampling_rate <= 1:
        raise ValueError(f"Expected 0 < sampling_rate ≤ 1, found {sampling_rate}.")
    if steps < 1:
        raise ValueError(f"Expected steps ≥ 1, found {steps}.")
    if not DELTA_MIN <= delta < 1:
        raise ValueError(f"Expected {DELTA_MIN:g} ≤ delta < 1, found {delta}.")
    if steps > STEPS_MAX:
        return math.inf
    distance = steps * noise.distance
    left = delta - steps * noise.failure * (1 + math.exp(EPSILON_MAX))
    delta_pld = left * math.exp(-distance) - steps * (ROUNDING_FAILURE + _FOURIER_ERROR)
    if delta_pld < DELTA_MIN / 2 or _hopeless(noise.multiplier, sampling_rate, steps):
        return math.inf
    found = _pld_epsilon(noise.multiplier, sampling_rate, steps, delta_pld) + 2 * distance
    return found if found <= EPSILON_MAX else math.inf


@lru_cache(maxsize=1024)
def _pld_epsilon(multiplier: float, sampling_rate: float, steps: int, delta: float) -> float:
    return float(_composed(multiplier, sampling_rate, steps).get_epsilon_for_delta(delta))


@lru_cache(maxsize=64)
def _composed(multiplier: float, sampling_rate: float, steps: int) -> pld.PrivacyLossDistribution:
    # An interval well below the spread of one step's privacy loss costs less than 0.1 % of ε.
    # 200 000 of them span the losses out to eight standard deviations of the noise.
    span = 0.5 / multiplier**2 + 8 / multiplier
    interval = max(min(1e-4, _spread(multiplier, sampling_rate) / 20), 2e-5, span / 200_000)
    one_step = pld.from_gaussian_mechanism(
        standard_deviation=multiplier,
        sensitivity=1.0,
        pessimistic_estimate=True,
        value_discretization_interval=interval,
        sampling_prob=sampling_rate,
        use_connect_dots=True,
        neighboring_relation=pld.NeighborRel.ADD_OR_REMOVE_ONE,
    )
    return one_step.self_compose(steps)


def _spread(multiplier: float, sampling_rate: float) -> float:
    """About the standard deviation of one step's privacy loss; speed and tightness alone depend on it."""
    return min(
        sampling_rate * math.sqrt(math.expm1(min(multiplier**-2, 700.0))),
        math.sqrt(sampling_rate) / multiplier,
    )


def _hopeless(multiplier: float, sampling_rate: float, steps: int) -> bool:
    """Whether noise is so weak that a PLD would take gigabytes to tell an ε far above `EPSILON_MAX`."""
    return multiplier < 0.1 or _spread(multiplier, sampling_rate) * math.sqrt(steps) > 10
