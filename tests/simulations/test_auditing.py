"""The audits: their statistics against slow exact computation, and that broken code does not pass them."""

import json
import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats
from typer.testing import CliRunner

from hanse_client.exact_sums import ExactSums
from hanse_common.privacy import mechanism as mechanisms
from hanse_common.privacy.mechanism import Mechanism
from hanse_simulations import auditing, one_run_audit
from hanse_simulations.auditing import (
    any_bound,
    clopper_pearson,
    epsilon_lower,
    gaussian_bound,
    gaussian_epsilon,
    step_plan,
)
from hanse_simulations.cli import app
from hanse_simulations.one_run_audit import p_value

TINY = one_run_audit.OneRun(
    canaries=1000, guesses=100, features=100, classes=50, noise_multiplier=2.0, steps=10
)


# Clopper and Pearson


@pytest.mark.parametrize(("successes", "trials"), [(0, 20), (1, 20), (7, 50), (49, 50), (50, 50), (3, 10**5)])
def test_clopper_pearson_is_scipys(successes: int, trials: int) -> None:
    found = float(clopper_pearson(np.array([successes]), trials, 0.025)[0])
    expected = stats.binomtest(successes, trials).proportion_ci(0.95, method="exact").high
    assert found == pytest.approx(expected, rel=1e-9)


def test_clopper_pearson_at_the_textbooks_values() -> None:
    # The rule of three, exactly: no success in n trials gives 1 − failure^{1/n}.
    found = clopper_pearson(np.array([0, 10]), 10, 0.05)
    assert found[0] == pytest.approx(1 - 0.05 ** (1 / 10), rel=1e-9)
    assert found[1] == 1.0


def test_clopper_pearsons_bound_is_where_the_binomial_tail_is_the_failure() -> None:
    bound = Fraction(float(clopper_pearson(np.array([4]), 30, 0.025)[0]))
    tail = sum(math.comb(30, k) * bound**k * (1 - bound) ** (30 - k) for k in range(5))
    assert float(tail) == pytest.approx(0.025, rel=1e-9)


# The bounds of one step


def test_the_gaussians_epsilon_is_the_accountants() -> None:
    plan = step_plan()
    found = float(gaussian_epsilon(np.array([1 / plan.mechanism(1).noise.multiplier]), plan.delta)[0])
    # The accountant's discretised losses may only err upwards.
    assert found <= plan.epsilon() <= found * 1.002


@pytest.mark.parametrize("mu", [0.1, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("delta", [1e-2, 1e-5])
def test_the_gaussians_epsilon_by_numerical_integration(mu: float, delta: float) -> None:
    epsilon = float(gaussian_epsilon(np.array([mu]), delta)[0])
    x = np.linspace(-12, 16, 200_001)
    excess = np.maximum(stats.norm.pdf(x - mu) - math.exp(epsilon) * stats.norm.pdf(x), 0)
    assert np.trapezoid(excess, x) == pytest.approx(delta, rel=1e-3)


def test_no_gaussian_and_no_bound_without_an_advantage() -> None:
    assert gaussian_epsilon(np.array([0.0, -1.0]), 1e-5).tolist() == [0.0, 0.0]
    same = np.random.default_rng(1).normal(size=2000)
    for bound in (gaussian_bound, any_bound):
        assert epsilon_lower(bound, same, same.copy(), 1e-5) == 0.0


def test_randomised_response_is_bounded_by_its_epsilon_and_nearly_reaches_it() -> None:
    """Whatever the noise: coins that tell the truth with e^ε/(1 + e^ε), the worst of all (ε, 0)-DP mechanisms."""
    epsilon = 1.0
    rng = np.random.default_rng(2)
    found = []
    for _ in range(200):
        lies = rng.random((2, 2000)) < 1 / (1 + math.exp(epsilon))
        jitter = rng.random((2, 2000)) * 0.1  # so that thresholds between the answers exist
        found.append(epsilon_lower(any_bound, lies[0] + jitter[0], ~lies[1] + jitter[1], 0.0))
    assert np.median(found) > 0.6
    assert sum(one > epsilon for one in found) <= stats.binom.isf(1e-6, 200, 0.05)


def test_the_gaussian_bound_covers_and_is_tight() -> None:
    mu, delta = 0.5, 1e-5
    true = float(gaussian_epsilon(np.array([mu]), delta)[0])
    rng = np.random.default_rng(3)
    found = [
        epsilon_lower(gaussian_bound, rng.normal(size=10_000), rng.normal(size=10_000) + mu, delta)
        for _ in range(100)
    ]
    assert sum(one > true for one in found) <= stats.binom.isf(1e-6, 100, 0.05)
    assert np.median(found) > 0.7 * true


# One run


def exact_p_value(m: int, r: int, v: int, odds: Fraction, delta: Fraction) -> Fraction:
    """The same with integers, written from the theorem: f(v) + 2mδ·max_i (f(v − i) − f(v))/i; odds = e^ε."""
    q = odds / (1 + odds)

    def f(least: int) -> Fraction:
        return sum((math.comb(r, k) * q**k * (1 - q) ** (r - k) for k in range(least, r + 1)), Fraction(0))

    return min(f(v) + 2 * m * delta * max((f(v - i) - f(v)) / i for i in range(1, v + 1)), Fraction(1))


@pytest.mark.parametrize(
    ("m", "r", "v"), [(40, 40, 30), (40, 20, 20), (1000, 30, 25), (50, 50, 1), (9, 1, 1)]
)
@pytest.mark.parametrize("odds", [Fraction(1), Fraction(3), Fraction(20)])
@pytest.mark.parametrize("delta", [Fraction(0), Fraction(1, 10**5), Fraction(1, 100)])
def test_the_p_value_is_the_theorems(m: int, r: int, v: int, odds: Fraction, delta: Fraction) -> None:
    expected = float(exact_p_value(m, r, v, odds, delta))
    assert p_value(m, r, v, math.log(odds), float(delta)) == pytest.approx(expected, rel=1e-9)


def test_all_right_guesses_have_a_closed_form() -> None:
    # q^r = 0.05 at the bound.
    q = 0.05 ** (1 / 500)
    found = one_run_audit.epsilon_lower(1000, 500, 500, 0.0)
    assert found == pytest.approx(math.log(q / (1 - q)), abs=1e-5)
    assert found < math.log(q / (1 - q))


def test_a_bound_of_one_run_is_refuted_and_little_more_is() -> None:
    found = one_run_audit.epsilon_lower(30_000, 600, 525, 1e-5)
    assert p_value(30_000, 600, 525, found, 1e-5) <= 0.05 < p_value(30_000, 600, 525, found + 1e-4, 1e-5)
    assert one_run_audit.epsilon_lower(30_000, 600, 525, 1e-6) > found
    assert one_run_audit.epsilon_lower(30_000, 600, 300, 1e-5) == 0.0
    assert one_run_audit.epsilon_lower(30_000, 600, 0, 1e-5) == 0.0


def test_one_run_of_randomised_response_is_bounded_by_its_epsilon() -> None:
    rng = np.random.default_rng(4)
    right = rng.binomial(500, 1 / (1 + math.exp(-1.0)), size=400)
    bounds = {v: one_run_audit.epsilon_lower(2000, 500, v, 0.0) for v in set(right.tolist())}
    found = [bounds[v] for v in right.tolist()]
    assert sum(one > 1.0 for one in found) <= stats.binom.isf(1e-6, 400, 0.05)
    assert np.median(found) > 0.7


@pytest.mark.parametrize(("m", "r", "v"), [(10, 11, 5), (10, 5, 6), (10, 5, -1)])
def test_impossible_counts_are_refused(m: int, r: int, v: int) -> None:
    with pytest.raises(ValueError, match=f"found correct {v}, guesses {r}, canaries {m}"):
        p_value(m, r, v, 1.0, 0.0)


def test_canaries_are_found_with_hardly_any_noise_and_lost_in_much() -> None:
    found = one_run_audit.correct_guesses(replace(TINY, noise_multiplier=0.05), "test")
    lost = one_run_audit.correct_guesses(replace(TINY, noise_multiplier=200.0), "test")
    assert one_run_audit.epsilon_lower(TINY.canaries, TINY.guesses, found, 1e-5) > 1
    assert one_run_audit.epsilon_lower(TINY.canaries, TINY.guesses, lost, 1e-5) == 0
    assert stats.binom.cdf(lost, TINY.guesses, 0.5) < 1 - 1e-4


def test_one_run_notices_noise_that_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    strict = replace(TINY, noise_multiplier=8.0)
    monkeypatch.setattr(
        Mechanism, "contribute", lambda self, fine, limit, source: self.grid.round(fine, source)
    )
    right = one_run_audit.correct_guesses(strict, "test")
    lower = one_run_audit.epsilon_lower(strict.canaries, strict.guesses, right, 1e-5)
    assert lower > strict.plan.epsilon()


# The whole


def test_the_photo_is_as_long_as_clipping_allows() -> None:
    plan = step_plan()
    grid = plan.mechanism(1).grid
    photo = [int(number) for number in auditing.clipped_photo(plan)]
    square = sum(number**2 for number in photo) * Fraction(grid.fine_unit) ** 2
    assert Fraction(plan.training.clipping_norm) ** 2 * (1 - Fraction(1, 2**16)) < square
    assert square <= Fraction(plan.training.clipping_norm) ** 2


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `--quick` but shorter."""
    monkeypatch.setattr(auditing, "QUICK_TRIALS", 6000)
    monkeypatch.setattr(one_run_audit, "QUICK", TINY)


@pytest.mark.usefixtures("brief")
def test_the_command_passes_and_writes_its_figures(tmp_path: Path) -> None:
    file = tmp_path / "audit.json"
    result = CliRunner().invoke(app, ["audit", "--quick", "--json", str(file)])
    assert result.exit_code == 0, result.output
    figures = json.loads(file.read_text())
    assert figures["trials"] == 6000
    assert figures["delta"] == 1e-5
    assert 0.5 * figures["claimed"] < figures["lower"] <= figures["claimed"] < 3
    assert min(figures[name] for name in auditing.SABOTAGES) > figures["claimed"]
    assert figures["one_run"]["lower"] <= figures["one_run"]["claimed"]
    assert figures["one_run"]["lower_hardly_any_noise"] > 1


class Sampler:
    """Stands for a sampler that draws another σ than it was asked for."""

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.made: dict[float, Any] = {}

    def __call__(self, sigma: float) -> Any:
        if sigma not in self.made:
            self.made[sigma] = mechanisms.DiscreteGaussian(self.factor * sigma)
        return self.made[sigma]


def broken_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mechanisms, "_sampler", Sampler(0.6))


def longer_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    original = ExactSums.sum

    def stretched(self: ExactSums, *args: Any, **kwargs: Any) -> NDArray[np.int64]:
        return original(self, *args, **kwargs) * 3 // 2

    monkeypatch.setattr(ExactSums, "sum", stretched)


def boasting_accountant(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Mechanism.epsilon
    monkeypatch.setattr(Mechanism, "epsilon", lambda self, delta: 0.6 * honest(self, delta))


@pytest.mark.parametrize("fault", [broken_sampler, longer_gradients, boasting_accountant])
@pytest.mark.usefixtures("brief")
def test_the_command_fails_on_a_broken_product(fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fault(monkeypatch)
    figures = auditing.run(quick=True)
    assert figures["lower"] > figures["claimed"]
    assert not auditing.passed(figures)
    monkeypatch.setattr(auditing, "run", lambda quick: figures)
    result = CliRunner().invoke(app, ["audit", "--quick"])
    assert result.exit_code == auditing.FAILED
    assert "CLAIM REFUTED" in result.output


def test_every_part_of_the_verdict_counts() -> None:
    good: dict[str, Any] = {
        "claimed": 2.0,
        "lower": 1.5,
        "lower_half_noise": 4.0,
        "lower_no_clipping": 4.0,
        "lower_share_dropped": 3.0,
        "whatever_the_noise": {"lower": 1.0},
        "one_run": {"claimed": 4.0, "lower": 2.0, "lower_hardly_any_noise": 3.0},
    }
    assert auditing.passed(good)
    for change in (
        {"lower": 2.01},
        *({name: 1.99} for name in auditing.SABOTAGES),
        {"whatever_the_noise": {"lower": 2.01}},
        {"one_run": good["one_run"] | {"lower": 4.01}},
        {"one_run": good["one_run"] | {"lower_hardly_any_noise": 0.9}},
        {"lower": math.nan},
    ):
        assert not auditing.passed(good | change)


@pytest.mark.slow
def test_the_full_audit_passes_and_is_tight() -> None:
    figures = auditing.run(quick=False)
    assert auditing.passed(figures)
    assert figures["trials"] >= 100_000
    assert figures["one_run"]["canaries"] >= 30_000
    assert figures["lower"] > 0.85 * figures["claimed"]
    assert figures["one_run"]["lower"] > 1
