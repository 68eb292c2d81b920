"""A whole training audited in one run: how many of its photos can an adversary tell from the finished model?

    figures = run(quick=True)
    figures["lower"], figures["claimed"]          # a bound on ε that was measured, and the ε that is claimed

Each of m made-up photos, the canaries, is in the training or not by a fair coin. The training is mode `distributed`
as it runs in a league: every merchant's `ShopTrainer` samples, clips, sums, rounds and adds its share of the noise,
and the sums mod 2³² are added up. Masks are left out, since an honest sum is the same with and without. Only the
honest merchants take part: the server and its accomplices know their own contributions and subtract them.

The adversary knows the canaries and sees the finished model. It guesses that those of the highest scores were in and
those of the lowest were not, and abstains on the rest. Under (ε, δ)-DP its right guesses are dominated by r coins of
e^ε/(1 + e^ε), up to a term in m·δ [1, Theorem 5.2]; the largest ε that r guesses, v of them right, refute with 95 %
confidence is the lower bound. One run of many canaries costs one training, where [2] needs thousands. In exchange
the bound is loose: it is a smoke test of everything at once, and `auditing` is the sharp test of one step.

Canaries are random directions with random labels, so that no two look alike to the model. What is left of their
likeness, about √(m / 2d), hides a canary behind the others: d must be large beside m.

References:
[1] Steinke, Nasr, Jagielski 2023, "Privacy Auditing with One (1) Training Run".
[2] Jagielski, Ullman, Oprea 2020, "Auditing Differentially Private Machine Learning".
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from scipy.optimize import brentq

from hanse_client.examples import Examples
from hanse_client.training import ShopTrainer
from hanse_common.modes import DistributedTraining
from hanse_common.plan import Cohort, Plan
from hanse_common.vision.recipe import Recipe
from hanse_common.vision.recipe_features import Projection, Scattering
from hanse_common.vision.recipe_model import Linear
from hanse_common.vision.taxonomy import Taxonomy
from hanse_simulations.console import bar
from hanse_simulations.seeded import SeededRandomness, seed_for

DELTA = 1e-5
CONFIDENCE = 0.95

MERCHANTS = 2
"""h, the honest merchants: n_min = 3 of whom c = 1 may be corrupt."""

HARDLY_ANY_NOISE = 0.05
"""A noise multiplier for which canaries must be found."""

_EPSILON_MAX = 50.0


@dataclass(frozen=True)
class OneRun:
    """One training to audit. `guesses` is r, fixed beforehand: half of them say in, half of them out."""

    canaries: int
    guesses: int
    features: int
    classes: int
    noise_multiplier: float
    steps: int = 40
    sampling_rate: float = 0.25

    @property
    def plan(self) -> Plan:
        """The plan of this training."""
        return head_plan(
            self.features,
            self.classes,
            rounds=self.steps,
            sampling_rate=self.sampling_rate,
            expected_batch=self.sampling_rate * self.canaries / 2,
            clipping_norm=1.0,
            noise_multiplier=self.noise_multiplier,
        )


FULL = OneRun(canaries=30_000, guesses=600, features=500, classes=300, noise_multiplier=2.0)
QUICK = OneRun(canaries=4_000, guesses=200, features=250, classes=100, noise_multiplier=2.0)


def run(quick: bool) -> dict[str, Any]:
    """Audit a training as claimed and one with hardly any noise. Returns figures for JSON; ε without a unit.

    `lower` must not exceed `claimed`, and `lower_hardly_any_noise` shows that the audit would find something.
    """
    setting = QUICK if quick else FULL
    correct = correct_guesses(setting, "as claimed")
    without = correct_guesses(replace(setting, noise_multiplier=HARDLY_ANY_NOISE), "hardly any noise")
    return {
        "claimed": setting.plan.epsilon(),
        "lower": epsilon_lower(setting.canaries, setting.guesses, correct, DELTA),
        "lower_hardly_any_noise": epsilon_lower(setting.canaries, setting.guesses, without, DELTA),
        "correct": correct,
        "correct_hardly_any_noise": without,
        "canaries": setting.canaries,
        "guesses": setting.guesses,
        "steps": setting.steps,
        "sampling_rate": setting.sampling_rate,
        "noise_multiplier": setting.noise_multiplier,
        "dimension": setting.plan.dimension,
        "delta": DELTA,
    }


def correct_guesses(setting: OneRun, name: str) -> int:
    """Train once and return v, how many of the r guesses are right. `name` keeps the randomness of runs apart."""
    generator = np.random.default_rng(seed_for(1, f"canaries {name}"))
    photos = generator.standard_normal((setting.canaries, setting.features), dtype=np.float32)
    labels = generator.integers(setting.classes, size=setting.canaries)
    included = generator.integers(2, size=setting.canaries).astype(bool)
    model = _trained(setting.plan, photos[included], labels[included], name)
    order = np.argsort(_scores(model, photos, labels))
    half = setting.guesses // 2
    return int(included[order[-half:]].sum() + (~included[order[:half]]).sum())


def _trained(
    plan: Plan, photos: NDArray[np.float32], labels: NDArray[np.int64], name: str
) -> NDArray[np.float32]:
    """Return the finished model, shape (d,), of a league whose honest merchants share the photos out."""
    trainers = [
        ShopTrainer(
            plan.recipe,
            plan.taxonomy,
            Examples.of(photos[merchant::MERCHANTS], labels[merchant::MERCHANTS], "cpu"),
            SeededRandomness(1, f"one-run audit, {name}, merchant {merchant}"),
        )
        for merchant in range(MERCHANTS)
    ]
    model = np.zeros(plan.dimension, dtype=np.float32)
    with bar(f"one run, {name}", plan.training.rounds) as progress:
        for round_ in range(plan.training.rounds):
            total = np.zeros(plan.dimension, dtype=np.uint32)
            for trainer in trainers:
                total += trainer.contribution(plan, round_, model)
            model += plan.decode(total, MERCHANTS).astype(np.float32)
            progress.update(round_ + 1)
    return model


def _scores(
    model: NDArray[np.float32], photos: NDArray[np.float32], labels: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Return by how much the model prefers each canary's label over the mean of all, shape (m,).

    It is the model's projection onto the canary's gradient at the start, up to scale: that is (y − 1/K)·[x, 1]ᵀ.
    """
    classes = len(model) // (photos.shape[1] + 1)
    weights, bias = model[:-classes].reshape(classes, -1), model[-classes:]
    logits = photos @ weights.T + bias
    scores: NDArray[np.float32] = logits[np.arange(len(labels)), labels] - logits.mean(axis=1)
    return scores


def epsilon_lower(canaries: int, guesses: int, correct: int, delta: float) -> float:
    """Return the largest ε that `correct` right ones of `guesses` refute at `CONFIDENCE`, 0 if none.

    Args:
        canaries: m, how many were in by a fair coin each.
        guesses: r, how many guesses were made; abstentions are not counted.
        correct: v, how many of them were right.
        delta: δ of the (ε, δ) that is refuted.

    Raises:
        ValueError: not 0 ≤ correct ≤ guesses ≤ canaries.
    """

    def over(epsilon: float) -> float:
        return p_value(canaries, guesses, correct, epsilon, delta) - (1 - CONFIDENCE)

    if over(0.0) > 0:
        return 0.0
    if over(_EPSILON_MAX) <= 0:
        return _EPSILON_MAX
    # The root finder may end on either side of the root; only below it is refuted.
    return max(float(brentq(over, 0.0, _EPSILON_MAX, xtol=1e-9)) - 1e-6, 0.0)


def p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Return a bound on the probability of `correct` or more right guesses under (epsilon, delta)-DP.

    β + 2mδ·max_{1≤i≤v} P(v > W ≥ v − i)/i with β = P(W ≥ v), W ~ Binomial(r, e^ε/(1 + e^ε)) [1, Theorem 5.2 and
    appendix D]. Arguments and errors are those of `epsilon_lower`.
    """
    if not 0 <= correct <= guesses <= canaries:
        raise ValueError(
            f"Expected 0 ≤ correct ≤ guesses ≤ canaries, found correct {correct}, guesses {guesses}, "
            f"canaries {canaries}."
        )
    coin = stats.binom(guesses, 1 / (1 + np.exp(-epsilon)))
    beta = float(coin.sf(correct - 1))
    if correct == 0:
        return 1.0
    just_below = np.cumsum(coin.pmf(np.arange(correct - 1, -1, -1)))
    alpha = float((just_below / np.arange(1, correct + 1)).max())
    return min(beta + 2 * canaries * delta * alpha, 1.0)


def head_plan(features: int, classes: int, **training: Any) -> Plan:
    """Return a plan of mode `distributed` for a linear head, `MERCHANTS` honest merchants and `DELTA`.

    Args:
        features: F, of one photo; at most 11 907.
        classes: K; the dimension is d = K·(F + 1).
        training: fields of `DistributedTraining`.
    """
    recipe = Recipe(backbone=Scattering(projection=Projection(dimensions=features)), model=Linear())
    return Plan(
        league="audit",
        serial=bytes(16),
        recipe=recipe,
        taxonomy=Taxonomy(classes=tuple(f"class {number}" for number in range(classes))),
        dimension=recipe.dimension(classes),
        training=DistributedTraining(**training),
        cohort=Cohort(min_merchants=MERCHANTS + 1, max_merchants=MERCHANTS + 1, max_corrupt=1),
        delta=DELTA,
    )
