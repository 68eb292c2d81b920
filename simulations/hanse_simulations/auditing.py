"""The privacy claim against an attack: what is measured must stay below what is claimed, and sabotage must show.

    figures = run(quick=True)
    show(figures)
    passed(figures)                               # lower ≤ claimed < every sabotage's, and the same for one run

The accountant proves an upper bound on ε; an audit measures a lower bound on the code that runs. Where the lower one is
the larger, code or proof is wrong. Two audits: one step in the worst case, here, and a whole training in one run,
`one_run_audit`.

**One step.** Two worlds: one honest merchant has one photo, or it has none. The photo's gradient comes out of the
product's clipping with norm C. Every merchant contributes through `Mechanism.contribute` at q = 1, residues are added
mod 2³² and decoded as the server does. The adversary projects the sum onto the gradient, which is all that noise
equal in all directions leaves to know, and says "present" above a threshold. The threshold is the best on one half of
the trials; the other half gives the rates of false positives and false negatives, and Clopper and Pearson's interval
an upper bound on each, both true with 95 % confidence [1]. Two bounds on ε follow from them:

- *Whatever the noise*: (ε, δ)-DP allows no test with 1 − FNR > e^ε·FPR + δ, nor the same with worlds exchanged [2].
  At a small δ it is loose: the events that tell most are too rare to be seen.
- *For Gaussian noise*: the accountant claims not one (ε, δ) but the whole trade-off curve of the Gaussian mechanism
  [3, 4]: FNR ≥ Φ(Φ⁻¹(1 − FPR) − μ), μ = 1/z'. Rates below that curve refute the claim, and the largest μ that they
  refute, turned into ε at δ [5, Theorem 8], is within a few per cent of what is claimed. It is the one that decides.

**Sabotage.** A test that nothing fails proves nothing. So the same is measured with half of the noise, without
clipping (the photo counts twice over), and with one merchant who leaves its share of noise out: each bound must be
above the claim.

Everything is seeded: the audit of the same code gives the same figures.

References:
[1] Clopper, Pearson 1934, "The Use of Confidence or Fiducial Limits Illustrated in the Case of the Binomial".
[2] Jagielski, Ullman, Oprea 2020, "Auditing Differentially Private Machine Learning"; Nasr, Song, Thakurta, Papernot,
    Carlini 2021, "Adversary Instantiation: Lower Bounds for Differentially Private Machine Learning".
[3] Dong, Roth, Su 2022, "Gaussian Differential Privacy".
[4] Nasr, Hayes, Steinke, Balle, Tramèr, Jagielski, Carlini, Terzis 2023, "Tight Auditing of Differentially Private
    Machine Learning" (section 4: the bound through Gaussian DP).
[5] Balle, Wang 2018, "Improving the Gaussian Mechanism for Differential Privacy".
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from rich.table import Table
from scipy import stats

from hanse_client.exact_sums import ExactSums
from hanse_client.examples import Examples
from hanse_common.plan import Plan
from hanse_common.privacy.mechanism import Mechanism
from hanse_common.randomness import Randomness
from hanse_common.secagg import ring
from hanse_simulations import one_run_audit
from hanse_simulations.console import bar, console
from hanse_simulations.one_run_audit import CONFIDENCE, MERCHANTS, head_plan
from hanse_simulations.seeded import SeededRandomness

TRIALS, QUICK_TRIALS = 200_000, 10_000
"""How many times each world is tried."""

FAILED = 24
"""Exit code of an audit that refutes the claim, or misses a sabotage."""

SABOTAGES = ("lower_half_noise", "lower_no_clipping", "lower_share_dropped")

_WORDS = {
    "lower": "as it runs",
    "lower_half_noise": "half of the noise",
    "lower_no_clipping": "a photo counts twice",
    "lower_share_dropped": f"1 of {MERCHANTS} adds no noise",
}

_THRESHOLDS = 30
"""At as many quantiles of all scores. Farther out errors are few, and what looked best there was mostly luck."""

_EPSILON_MAX = 100.0

Rates: TypeAlias = NDArray[np.float64]
Bound: TypeAlias = Callable[[Rates, Rates, float], Rates]
Contribute: TypeAlias = Callable[[NDArray[np.int64], Randomness], NDArray[np.int64]]


def run(quick: bool) -> dict[str, Any]:
    """Measure everything and return the figures for JSON; ε has no unit, time is in seconds.

    `claimed` is the accountant's, `lower` and the `SABOTAGES` are measured, all at `delta`. `whatever_the_noise` holds
    the same by the bound that needs no Gaussian. `one_run` is `one_run_audit.run`'s.
    """
    started = time.perf_counter()
    trials = QUICK_TRIALS if quick else TRIALS
    plan = step_plan()
    figures: dict[str, Any] = {"claimed": plan.epsilon()}
    whatever: dict[str, float] = {}
    for name, (contributions, photo) in _variants(plan).items():
        absent, present = step_scores(plan, contributions, photo, trials, _WORDS[name])
        figures[name] = epsilon_lower(gaussian_bound, absent, present, plan.delta)
        whatever[name] = epsilon_lower(any_bound, absent, present, plan.delta)
    return figures | {
        "whatever_the_noise": whatever,
        "trials": trials,
        "delta": plan.delta,
        "confidence": CONFIDENCE,
        "merchants": MERCHANTS,
        "one_run": one_run_audit.run(quick),
        "seconds": time.perf_counter() - started,
    }


def passed(figures: dict[str, Any]) -> bool:
    """Return whether no measurement refutes the claim and every sabotage is found."""
    one_run = figures["one_run"]
    return bool(
        figures["lower"] <= figures["claimed"]
        and figures["whatever_the_noise"]["lower"] <= figures["claimed"]
        and all(figures[name] > figures["claimed"] for name in SABOTAGES)
        and one_run["lower"] <= one_run["claimed"]
        and one_run["lower_hardly_any_noise"] > 1
    )


def show(figures: dict[str, Any]) -> None:
    """Print the figures as two tables, what they mean, and whether all is well."""
    claimed, whatever, one_run = figures["claimed"], figures["whatever_the_noise"], figures["one_run"]
    step = _table("One step, worst case", "ε at least", "whatever the noise")
    for name, words in _WORDS.items():
        sabotage = name in SABOTAGES
        verdict = _verdict(figures[name] > claimed, sabotage)
        step.add_row(words, f"{claimed:.2f}", f"{figures[name]:.2f}", f"{whatever[name]:.2f}", verdict)
    console.print(step)
    console.print(
        f"{figures['trials']:,} trials with one photo and as many without; δ = {figures['delta']:g}. An attacker's "
        "errors show that ε is at least so much, for noise of Gaussian shape and whatever its shape.\n"
    )
    whole = _table("A whole training in one run", "ε at least", "right guesses")
    weak = one_run["lower_hardly_any_noise"]
    for words, expected, lower, right, verdict in (
        (
            "as it runs",
            f"{one_run['claimed']:.2f}",
            one_run["lower"],
            one_run["correct"],
            _verdict(one_run["lower"] > one_run["claimed"], sabotage=False),
        ),
        ("hardly any noise", "over 1", weak, one_run["correct_hardly_any_noise"], _verdict(weak > 1, True)),
    ):
        whole.add_row(words, expected, f"{lower:.2f}", f"{right} of {one_run['guesses']}", verdict)
    console.print(whole)
    console.print(
        f"{one_run['canaries']:,} made-up photos, each in the training by a coin; the attacker sees the finished "
        "model and guesses which were in. A loose bound: half of all guesses are right by chance.\n"
    )
    console.print(
        f"{'Passed' if passed(figures) else 'FAILED'}, {figures['seconds']:.0f} s. "
        f"Each bound holds with {100 * CONFIDENCE:.0f} % confidence."
    )


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("what ran", no_wrap=True)
    for heading in ("claimed", *headings):
        table.add_column(heading, justify="right")
    table.add_column("verdict", no_wrap=True)
    return table


def _verdict(above: bool, sabotage: bool) -> str:
    if sabotage:
        return "sabotage found" if above else "[red]SABOTAGE MISSED[/red]"
    return "[red]CLAIM REFUTED[/red]" if above else "claim holds"


def step_plan() -> Plan:
    """Return the plan of one step at q = 1 with 64 numbers, whose ε at the plan's δ is about 2."""
    return head_plan(
        features=31,
        classes=2,
        rounds=1,
        sampling_rate=1.0,
        expected_batch=1.0,
        clipping_norm=1.0,
        noise_multiplier=2.0,
    )


def clipped_photo(plan: Plan) -> NDArray[np.int64]:
    """Return the clipped gradient of a made-up photo, shape (d,), in fine units: its norm is C."""
    features = np.random.default_rng(1).standard_normal((1, plan.recipe.feature_dimension), dtype=np.float32)
    photos = Examples.of(features, np.zeros(1, dtype=np.int64), "cpu")
    sums = ExactSums(plan.recipe, plan.taxonomy, photos)
    start = np.zeros(plan.dimension)
    return sums.sum(start, np.arange(1), plan.mechanism(1).grid, seed=0)


def _variants(plan: Plan) -> dict[str, tuple[Sequence[Contribute], NDArray[np.int64]]]:
    """Return, by the figure's name, what each honest merchant does, and the photo that the first may have."""
    mechanism, photo = plan.mechanism(1), clipped_photo(plan)
    weak = replace(mechanism, noise_multiplier=mechanism.noise_multiplier / 2)
    honest, half = _contribute(plan, mechanism), _contribute(plan, weak)
    return {
        "lower": ([honest] * MERCHANTS, photo),
        "lower_half_noise": ([half] * MERCHANTS, photo),
        "lower_no_clipping": ([honest] * MERCHANTS, 2 * photo),
        "lower_share_dropped": ([mechanism.grid.round, *[honest] * (MERCHANTS - 1)], photo),
    }


def _contribute(plan: Plan, mechanism: Mechanism) -> Contribute:
    limit = plan.limit
    return lambda fine_sum, randomness: mechanism.contribute(fine_sum, limit, randomness)


def step_scores(
    plan: Plan,
    contributions: Sequence[Contribute],
    photo: NDArray[np.int64],
    trials: int,
    name: str,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return what the adversary computes of each trial, without and with the photo: two arrays of shape (trials,).

    Args:
        plan: decodes the sums.
        contributions: what each honest merchant makes of its exact sum, shape (d,), fine units, to grid steps.
        photo: what the first merchant's sum is when the photo is present; all else is zero.
        trials: of each world.
        name: keeps the randomness of one measurement apart from another's.
    """
    direction = photo / np.linalg.norm(photo)
    nothing = np.zeros_like(photo)
    scores: list[NDArray[np.float64]] = []
    with bar(f"one step, {name}", 2 * trials) as progress:
        for world, first in (("absent", nothing), ("present", photo)):
            sources = [SeededRandomness(1, f"audit {name} {world} {n}") for n in range(len(contributions))]
            sums = [first, *[nothing] * (len(contributions) - 1)]
            totals = np.zeros((trials, plan.dimension), dtype=np.uint32)
            for trial, total in enumerate(totals):
                for contribute, fine_sum, source in zip(contributions, sums, sources, strict=True):
                    total += ring.residues(contribute(fine_sum, source))
                if trial % 1000 == 999:
                    progress.update(len(scores) * trials + trial + 1)
            # An update points downhill or up as the sign is agreed; a projection does not care.
            decoded = plan.decode(totals.reshape(-1), len(contributions)).reshape(totals.shape)
            scores.append(decoded @ direction)
    return scores[0], scores[1]


def epsilon_lower(
    bound: Bound, absent: NDArray[np.float64], present: NDArray[np.float64], delta: float
) -> float:
    """Return a lower bound on ε at `delta` that holds with `CONFIDENCE`, 0 if nothing can be told.

    Args:
        bound: `gaussian_bound` or `any_bound`.
        absent: scores of trials without the photo, shape (n,).
        present: scores of as many trials with it; they tend to be higher.
        delta: δ.
    """
    half = len(absent) // 2
    candidates = np.quantile(
        np.concatenate([absent[:half], present[:half]]), np.linspace(0, 1, _THRESHOLDS + 2)[1:-1]
    )
    tried = _bounds(bound, absent[:half], present[:half], candidates, delta)
    best = candidates[[int(np.argmax(tried))]]
    return float(_bounds(bound, absent[half:], present[half:], best, delta)[0])


def _bounds(
    bound: Bound,
    absent: NDArray[np.float64],
    present: NDArray[np.float64],
    thresholds: NDArray[np.float64],
    delta: float,
) -> Rates:
    """Return the bound on ε for each threshold, each as if it were the only one."""
    false_positives = len(absent) - np.searchsorted(np.sort(absent), thresholds, side="right")
    false_negatives = np.searchsorted(np.sort(present), thresholds, side="right")
    failure = (1 - CONFIDENCE) / 2  # of each of the two rates
    found = bound(
        clopper_pearson(false_positives, len(absent), failure),
        clopper_pearson(false_negatives, len(present), failure),
        delta,
    )
    return np.maximum(found, 0.0)


def clopper_pearson(successes: NDArray[np.integer[Any]], trials: int, failure: float) -> Rates:
    """Return upper bounds on probabilities of which `successes` of `trials` were seen, wrong with `failure` at most.

    The bound is the p at which so few successes, or fewer, have probability `failure`: a quantile of a Beta [1].
    """
    upper = stats.beta.isf(failure, successes + 1, np.maximum(trials - successes, 1))
    return np.where(successes >= trials, 1.0, upper)


def any_bound(false_positive: Rates, false_negative: Rates, delta: float) -> Rates:
    """Return the largest ε that the rates refute at `delta` whatever the mechanism; −∞ where none."""
    with np.errstate(divide="ignore"):
        one = np.log(np.maximum(1 - false_negative - delta, 0.0) / false_positive)
        other = np.log(np.maximum(1 - false_positive - delta, 0.0) / false_negative)
    return np.maximum(one, other)


def gaussian_bound(false_positive: Rates, false_negative: Rates, delta: float) -> Rates:
    """Return ε at `delta` of the Gaussian mechanism whose trade-off curve the rates lie on; 0 where there is none."""
    return gaussian_epsilon(stats.norm.isf(false_positive) - stats.norm.ppf(false_negative), delta)


def gaussian_epsilon(mu: Rates, delta: float) -> Rates:
    """Return the ε, at most 100, at which N(0, 1) hides sensitivities `mu` at `delta`; 0 for mu ≤ 0.

    δ(ε) = Φ(−ε/μ + μ/2) − e^ε·Φ(−ε/μ − μ/2), which falls in ε [5, Theorem 8]: found by bisection, to 10⁻¹⁰.
    """
    positive = np.maximum(mu, 1e-9)
    low, high = np.zeros_like(positive), np.full_like(positive, _EPSILON_MAX)
    for _ in range(40):
        middle = (low + high) / 2
        first = stats.norm.cdf(positive / 2 - middle / positive)
        second = np.exp(middle + stats.norm.logcdf(-positive / 2 - middle / positive))
        enough = first - second <= delta
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    return np.where(mu > 0, low, 0.0)
