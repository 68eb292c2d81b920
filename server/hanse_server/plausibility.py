"""Whether a round's sum is one that honest merchants can have: its norm beside a bound that theirs stays below.

    verdict = judge(plan, round_, model, total, survivors)
    verdict.norm, verdict.bound, verdict.plausible

Single uploads are masked, so their sum is all that can be looked at. Honest merchants' sum is longer than `bound` with
probability at most `FAILURE` in a round, whatever their photos are; who made a longer one longer, nobody can tell.
With n survivors, d numbers, clipping norm C, a grid step γ, and failures for which the tails below have L = ln(1/p):

- *Contributions.* In mode `merchant-level` each merchant's is clipped as a whole, then rounded: at most n times
  the grid's sensitivity. In the other modes each photo's is clipped, or each product's, so together they are at most as
  long as C times how many were sampled, which the server isn't told. It holds the league to `ABUNDANCE` times the
  photos that `expected_batch` speaks of: the number sampled is a sum of independent coins with mean
  M = ABUNDANCE·expected_batch, thus at most M + L/3 + √(L²/9 + 2ML) (Bernstein). Rounding moves each upload by at most
  γ√d. So A bounds the length of all contributions, before noise.
- *Noise* of n shares is sub-Gaussian with variance V = n·σ²/h in each coordinate, as the discrete Gaussian is [1,
  Corollary 17], and independent of the contributions. Its own squared norm is at most V·(d + 2√(dL) + 2L) [2, Theorem
  2.1; for Gaussian noise 3, Lemma 1], and what it adds along them at most A·√(2VL). Together

      bound² = A² + 2A·√(2VL) + V·(d + 2√(dL) + 2L).

- *Mode `trends`.* Each merchant cuts each number at what the plan says, m (`hanse_common.counting`), and nothing is
  rounded. So it is the largest number that is looked at, in place of the length: at most n·m and the noise of one
  coordinate, √(2V(L + ln 2d)) for all of them together.
- *Mode `local`.* An update is T steps of momentum and decay, linear in each step's noisy sum but for `l1`: with the
  responses r_k of that recursion, −Σ r_k·(sum of step k)/expected_batch. Later sums depend on earlier noise, and each
  coordinate is cut to ±update_bound, so nothing cancels for certain: the lengths of all steps' contributions, of each
  merchant's noise, and of the penalties are added up. No sum is longer than n·update_bound·√d either.

All bounds are the worst case, in which all photos pull the same way. Honest sums are mostly a tenth as long or less,
and whoever stays below the bound passes: `docs/robustness.md` shows what that lets through.

References:
[1] Canonne, Kamath, Steinke 2020, "The Discrete Gaussian for Differential Privacy".
[2] Hsu, Kakade, Zhang 2012, "A tail inequality for quadratic forms of subgaussian random vectors".
[3] Laurent, Massart 2000, "Adaptive estimation of a quadratic functional by model selection".
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hanse_common.counting import most_of_a_class
from hanse_common.modes import LocalTraining, MerchantLevelTraining, TrendsTraining
from hanse_common.plan import Plan
from hanse_common.secagg import ring
from hanse_common.secagg.ring import Ring

FAILURE = 1e-9
"""The probability, in one round, that honest merchants' sum is longer than its bound."""

ABUNDANCE = 2.0
"""The league may have so many times the photos, or products, that the plan's `expected_batch` speaks of."""

_EVENTS = 4  # the number sampled, the noise, its part along the contributions; the sampler's and roundings' own tails
_ROUNDING = 1 + 1e-9  # float64's, of the merchant and here
_CHUNK = 1 << 16


@dataclass(frozen=True)
class Verdict:
    """The norm of a sum, and what honest merchants' stays below, in the units of what merchants add up."""

    norm: float
    bound: float

    @property
    def plausible(self) -> bool:
        """Whether honest merchants can have made this sum."""
        return self.norm <= self.bound

    def refusal(self, plan: Plan, survivors: int) -> str:
        """Return in words why the sum of `survivors` uploads is not used."""
        text = (
            f"The sum of {survivors} uploads has norm {self.norm:.4g}, and that of honest merchants stays below "
            f"{self.bound:.4g}. It was thrown away. Somebody uploaded what no honest merchant does; nobody can tell "
            "who, as no single upload is ever seen."
        )
        if isinstance(plan.training, MerchantLevelTraining | TrendsTraining):
            return text
        return (
            f"{text} Or the league has over {ABUNDANCE:g} times the photos that expected_batch "
            f"({plan.training.expected_batch:g}) speaks of: then sign a plan that knows."
        )


def judge(
    plan: Plan, round_: int, model: NDArray[np.float32], total: NDArray[np.uint32], survivors: int
) -> Verdict:
    """Return the verdict on a sum of `survivors` uploads.

    Args:
        plan: what merchants follow.
        round_: counted from 0.
        model: what they started from, shape (d,), in the model's units.
        total: the residues of their sum, shape (d,).
        survivors: how many uploads are in it, at least 1.
    """
    summed = ring.integers(total)
    if isinstance(plan.training, TrendsTraining):
        norm = unit(plan) * float(np.abs(summed.astype(np.int64)).max(initial=0))
    else:
        norm = unit(plan) * _norm(summed)
    return Verdict(norm, bound(plan, round_, _norm(model), survivors))


def unit(plan: Plan) -> float:
    """Return what 1 is among the integers that are summed, in the units of a `Verdict`."""
    if isinstance(plan.training, LocalTraining):
        return _ring(plan, plan.training).step
    return plan.mechanism(1).grid.step


def bound(plan: Plan, round_: int, model_norm: float, survivors: int) -> float:
    """Return the largest norm that the sum of `survivors` honest uploads has, but with probability `FAILURE`.

    In mode `trends` the norm is the largest number's size, else the Euclidean one.

    `round_` is counted from 0; `model_norm` is the norm of the model that they start from.
    """
    if isinstance(plan.training, LocalTraining):
        return _ROUNDING * _local_bound(plan, plan.training, round_, model_norm, survivors)
    mechanism, tail = plan.mechanism(1), math.log(_EVENTS / FAILURE)
    grid, dimension = mechanism.grid, plan.dimension
    variance = survivors * (mechanism.noise.share * grid.step) ** 2
    if isinstance(plan.training, TrendsTraining):
        most = survivors * most_of_a_class(plan) * grid.clipping_norm
        return _ROUNDING * (most + math.sqrt(2 * variance * (tail + math.log(2 * dimension))))
    if isinstance(plan.training, MerchantLevelTraining):
        contributions = survivors * grid.sensitivity * grid.step
    else:
        sampled = _at_most(ABUNDANCE * plan.training.expected_batch, tail)
        contributions = sampled * grid.clipping_norm + survivors * grid.step * math.sqrt(dimension)
    return _ROUNDING * _with_noise(contributions, variance, dimension, tail)


def _local_bound(
    plan: Plan, training: LocalTraining, round_: int, model_norm: float, survivors: int
) -> float:
    mechanism, penalties = plan.mechanism(1), plan.recipe.model
    grid, root = mechanism.grid, math.sqrt(plan.dimension)
    rate, steps = training.learning_rate_of(round_), training.local_steps
    drift, responses = _responses(rate, training.momentum, penalties.l2, training.proximal, steps)
    sampled = _at_most(ABUNDANCE * survivors * training.expected_batch, math.log(_EVENTS * steps / FAILURE))
    gradients = (sampled * grid.clipping_norm + survivors * grid.step * root) / training.expected_batch
    contributions = sum(map(abs, responses)) * (gradients + survivors * penalties.l1 * root)
    deviation = math.hypot(*responses) * mechanism.noise_deviation / training.expected_batch
    noise = deviation * math.sqrt(_chi_squared(plan.dimension, math.log(_EVENTS * survivors / FAILURE)))
    found = contributions + survivors * (drift * model_norm + noise)
    cut = survivors * training.update_bound * root
    encoding = survivors * _ring(plan, training).step / 2 * root
    return encoding + (found if found < cut else cut)  # a recursion that explodes gives inf or nan


def _responses(
    rate: float, momentum: float, l2: float, proximal: float, steps: int
) -> tuple[float, list[float]]:
    """Return |what `steps` steps without gradients add to a weight of 1|, and what a gradient of 1 in each one does."""
    moved, velocity = 0.0, 0.0
    for _ in range(steps):
        velocity = momentum * velocity + l2 * (1.0 + moved) + proximal * moved
        moved -= rate * velocity
    drift = abs(moved)
    moved, velocity = -rate, 1.0
    responses = []
    for _ in range(steps):
        responses.append(moved)
        velocity = momentum * velocity + (l2 + proximal) * moved
        moved -= rate * velocity
    return drift, responses


def _at_most(mean: float, tail: float) -> float:
    """Bernstein's bound of a sum of independent coins with this mean, at probability e^−tail."""
    return mean + tail / 3 + math.sqrt(tail**2 / 9 + 2 * mean * tail)


def _with_noise(contributions: float, variance: float, dimension: int, tail: float) -> float:
    """Bound the norm of independent noise and of something at most as long as `contributions`, at probability 2e^−tail.

    `variance` is that of the noise in each of `dimension` coordinates.
    """
    along = contributions * math.sqrt(2 * variance * tail)
    return math.sqrt(contributions**2 + 2 * along + variance * _chi_squared(dimension, tail))


def _chi_squared(dimension: int, tail: float) -> float:
    """The bound of a squared norm of `dimension` numbers of variance 1, at probability e^−tail."""
    return dimension + 2 * math.sqrt(dimension * tail) + 2 * tail


def _norm(vector: NDArray[np.int32] | NDArray[np.float32]) -> float:
    """Return a vector's norm in float64, without another copy of a large one."""
    parts = (vector[start : start + _CHUNK].astype(np.float64) for start in range(0, len(vector), _CHUNK))
    return math.sqrt(math.fsum(float(part @ part) for part in parts))


def _ring(plan: Plan, training: LocalTraining) -> Ring:
    return Ring(training.update_bound, plan.cohort.max_merchants)
