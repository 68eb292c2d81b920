"""Privacy filters: what several plans cost together, each chosen after the results of those before were seen.

    >>> from hanse_common.privacy.mechanism import Mechanism
    >>> plan = Mechanism(clipping_norm=0.3, dimension=1000, noise_multiplier=8.0, sampling_rate=0.05, steps=200)
    >>> uses = [Use(plan, delta=5e-7, steps=200)] * 20
    >>> for name in ("sum", "rdp-16"):
    ...     epsilon, delta = parse(name).spent(uses, delta=1e-5)
    ...     print(f"{name}: ε = {epsilon:.2f} at δ = {delta:g}")
    sum: ε = 7.40 at δ = 1e-05
    rdp-16: ε = 1.79 at δ = 1e-05

A filter says, before each use, whether what is spent with it stays within a budget (ε, δ). Whoever asks for the next
use may choose its parameters by all results so far; the whole of what is ever released is then (ε, δ)-DP. Everything
here is public. Which filter a ledger has is fixed before its first use: the best of several, picked afterwards, is
no filter, and neither is the best of several orders.

`sum` sets each plan's whole ε(δ), of all the steps that it may take and by privacy loss distributions, and its δ
aside when it starts, and adds those up [1, section 3]; for plans that run interleaved, too [2].

`rdp-ALPHA` adds up ρ, the Rényi divergence of one order α, of the steps that were taken. Whatever decides which step
comes next, Σρ ≤ B in every case makes the whole (α, B)-RDP [3]. It has four parts.

1. *One step.* The Poisson subsampled Gaussian of multiplier z and rate q has, for integer α [4, section 3.3],

       (α − 1)·ρ = ln Σ_{k=0..α} C(α,k)·(1 − q)^{α−k}·q^k·e^{k(k−1)/2z²}.

   The binomial sums to one and k = 0, 1 have e^0, so the sum is 1 + Σ_{k≥2} C(α,k)·(1 − q)^{α−k}·q^k·(e^{…} − 1):
   positive terms, added up by their logarithms.

2. *From continuous to what runs.* z is `accounting.Noise.multiplier`, and ideal noise is within a factor e^{±η} of
   what that accounts for, in both neighbours: ∫P^α·Q^{1−α} grows by e^{αη + (α−1)η}, so ρ by η·(2α − 1)/(α − 1).

3. *Failures.* In each step rounding fails with probability β, and what is drawn is within total variation t of ideal
   noise, which costs t·(1 + e^ε) of δ (`accounting`); both add up over steps, however chosen. A fixed thousandth
   of the budget's δ is set aside for them: could ρ and failures trade against each other, a choice by results
   between the two would be covered by neither.

4. *To ε.* ε = B + ln((α − 1)/α) − (ln δ + ln α)/(α − 1) [5, Proposition 12], with the rest of δ.

Steps are cheap and ε begins high: −ln δ/(α − 1) is there from the first step on. So `rdp-ALPHA` is for many small
plans, and `sum` for one or two that take it all. At δ = 1e-5 an α of 18 has the most room where ε = 1, one of 8 where
ε = 3.

References:
[1] Rogers, Roth, Ullman, Vadhan 2016, "Privacy Odometers and Filters: Pay-as-you-Go Composition".
[2] Haney, Shoemate, Tian, Vadhan, Vyrros, Xu, Zhang 2023, "Concurrent Composition for Interactive
    Differential Privacy with Adaptive Privacy-Loss Parameters".
[3] Feldman, Zrnic 2021, "Individual Privacy Accounting via a Rényi Filter".
[4] Mironov, Talwar, Zhang 2019, "Rényi Differential Privacy of the Sampled Gaussian Mechanism".
[5] Canonne, Kamath, Steinke 2020, "The Discrete Gaussian for Differential Privacy".
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from hanse_common.privacy.accounting import EPSILON_MAX, Noise
from hanse_common.privacy.encoding import ROUNDING_FAILURE
from hanse_common.privacy.mechanism import Mechanism

ORDER_MAX = 256
"""The largest order α that `parse` takes."""

FAILURE_SHARE = 1e-3
"""The part of the budget's δ that `rdp-ALPHA` sets aside for failures. It costs 0.001/(α − 1) of ε."""


@dataclass(frozen=True)
class Use:
    """What one plan has used: `mechanism` is that of all the steps it may take, `delta` its δ, `steps` those taken."""

    mechanism: Mechanism
    delta: float
    steps: int


class Filter(Protocol):
    """A way of adding up. `whole_plans` says whether a plan is paid for in full when its first step is."""

    @property
    def name(self) -> str:
        """What `parse` takes."""

    @property
    def whole_plans(self) -> bool:
        """Whether steps not taken are paid for, too."""

    def spent(self, uses: Sequence[Use], delta: float) -> tuple[float, float]:
        """Return ε, infinite when none can be claimed, and δ of all `uses` under a budget of `delta` in (0, 1)."""


@dataclass(frozen=True)
class Sum:
    """The filter `sum`."""

    name = "sum"
    whole_plans = True

    def spent(self, uses: Sequence[Use], delta: float) -> tuple[float, float]:
        """Return Σε and Σδ of whole plans; the budget's `delta` plays no part."""
        return math.fsum(_epsilon(use.mechanism, use.delta) for use in uses), math.fsum(
            use.delta for use in uses
        )


@dataclass(frozen=True)
class Renyi:
    """The filter `rdp-ALPHA` of one integer `order` α in [2, `ORDER_MAX`]."""

    order: int
    whole_plans = False

    @property
    def name(self) -> str:
        """Such as rdp-16."""
        return f"rdp-{self.order}"

    def spent(self, uses: Sequence[Use], delta: float) -> tuple[float, float]:
        """Return the ε that goes with `delta`, of the steps taken; plans' own δ play no part. No uses: (0, 0)."""
        if not uses:
            return 0.0, 0.0
        divergence = math.fsum(use.steps * step_divergence(use.mechanism, self.order) for use in uses)
        failure = math.fsum(use.steps * _step_failure(use.mechanism.noise) for use in uses)
        if failure > FAILURE_SHARE * delta:
            return math.inf, delta
        epsilon = to_epsilon(divergence, self.order, (1 - FAILURE_SHARE) * delta)
        return (epsilon if epsilon <= EPSILON_MAX else math.inf), delta


SUM = Sum()


def parse(name: str) -> Filter:
    """Return the filter called `name`: sum, or rdp-2 to rdp-256. Raises ValueError for another name."""
    if name == SUM.name:
        return SUM
    match = re.fullmatch(r"rdp-([1-9][0-9]{0,2})", name, re.ASCII)
    if match is None or not 2 <= int(match[1]) <= ORDER_MAX:
        raise ValueError(f"expected sum, or rdp-ALPHA with a whole ALPHA from 2 to {ORDER_MAX}")
    return Renyi(int(match[1]))


def step_divergence(mechanism: Mechanism, order: int) -> float:
    """Return ρ(order) of one of the mechanism's steps, but for its failures; parts 1 and 2 above."""
    noise = mechanism.noise
    smoothing = noise.distance * (2 * order - 1) / (order - 1)
    return _gaussian_divergence(noise.multiplier, mechanism.sampling_rate, order) + smoothing


def to_epsilon(divergence: float, order: int, delta: float) -> float:
    """Return an ε ≥ 0 such that (order, divergence)-RDP is (ε, delta)-DP [5, Proposition 12]."""
    epsilon = divergence + math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1)
    return max(0.0, epsilon)


@lru_cache(maxsize=1024)
def _gaussian_divergence(multiplier: float, sampling_rate: float, order: int) -> float:
    if sampling_rate == 1:
        return order / (2 * multiplier**2)
    taken, left = math.log(sampling_rate), math.log1p(-sampling_rate)
    terms = []
    for k in range(2, order + 1):
        exponent = k * (k - 1) / (2 * multiplier**2)
        excess = exponent + math.log(-math.expm1(-exponent))  # ln(e^exponent − 1), without overflow
        terms.append(math.log(math.comb(order, k)) + k * taken + (order - k) * left + excess)
    top = max(terms)
    log_excess = top + math.log(math.fsum(math.exp(term - top) for term in terms))
    # ln(1 + e^x), exact for small and without overflow for large x
    return (max(log_excess, 0.0) + math.log1p(math.exp(-abs(log_excess)))) / (order - 1)


@lru_cache(maxsize=1024)
def _step_failure(noise: Noise) -> float:
    return noise.failure * (1 + math.exp(EPSILON_MAX)) + ROUNDING_FAILURE


@lru_cache(maxsize=1024)
def _epsilon(mechanism: Mechanism, delta: float) -> float:
    try:
        return mechanism.epsilon(delta)
    except ValueError:  # out of the accountant's range: no ε can be claimed
        return math.inf
