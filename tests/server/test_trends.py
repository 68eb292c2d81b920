"""Counts and growth: their intervals hold for the noise that there is, and the command shows them."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from hanse_common.modes import TrendsTraining
from hanse_common.plan import Cohort, Plan
from hanse_common.privacy.encoding import Grid
from hanse_common.randomness import AesCtrStream
from hanse_common.secagg import ring
from hanse_server.trends import Counted, TrendsReport, growth, reports

MakePlan = Callable[..., Plan]
COUNTS = np.array([400, 35, 0])
SURVIVORS = 6


def asking(
    make_plan: MakePlan,
    first_day: str = "2026-11-02",
    days: int = 7,
    league: str = "test",
    expected: float = 5000.0,
) -> Plan:
    training = TrendsTraining(first_day=first_day, days=days, expected_batch=expected, noise_multiplier=3.0)
    cohort = Cohort(min_merchants=5, max_merchants=7, max_corrupt=1)
    plan = make_plan(cohort=cohort, dimension=3, league=league)
    return plan.model_copy(update={"training": training})


def opened(plan: Plan, key: int) -> np.ndarray:
    """What the server gets of `SURVIVORS` merchants, the first of whom has all queries."""
    mechanism, source = plan.mechanism(1), AesCtrStream(key.to_bytes(32, "big"))
    fine = COUNTS * round(1 / Grid(1.0, 3).fine_unit)
    parts = [
        mechanism.contribute(fine if n == 0 else np.zeros(3, np.int64), plan.limit, source)
        for n in range(SURVIVORS)
    ]
    return plan.decode(ring.residues(np.sum(parts, axis=0)), SURVIVORS)


def test_the_variance_is_that_of_the_noise(make_plan: MakePlan) -> None:
    plan = asking(make_plan)
    found = np.stack([opened(plan, key) for key in range(400)])
    expected = Counted(plan, found[0], SURVIVORS).variance
    ratio = float(((found - COUNTS) ** 2).sum()) / expected
    assert stats.chi2(found.size).ppf(1e-5) < ratio < stats.chi2(found.size).isf(1e-5)


def test_of_a_hundred_intervals_about_ninety_five_hold_the_count(make_plan: MakePlan) -> None:
    plan = asking(make_plan)
    made = reports([Counted(plan, opened(plan, key), SURVIVORS) for key in range(200)])
    inside = [
        each.queries.low <= true <= each.queries.high
        for report in made
        for each, true in zip(report.classes, COUNTS, strict=True)
    ]
    assert stats.binom(600, 0.95).ppf(1e-4) <= sum(inside)


def test_intervals_of_growth_hold_for_noise_and_chance() -> None:
    """Poisson counts around 300 and 450, in noise of deviation 10: growth of one half, 19 times in 20."""
    rng = np.random.default_rng(4)
    inside = 0
    for _ in range(1000):
        before, now = (rng.poisson(mean) + rng.normal(scale=10) for mean in (300, 450))
        found = growth(now, before, 100.0, 100.0)
        assert found is not None
        inside += found.low <= 0.5 <= found.high
    assert stats.binom(1000, 0.95).ppf(1e-4) <= inside <= stats.binom(1000, 0.95).isf(1e-4)


@given(st.floats(-1e4, 1e6), st.floats(-1e4, 1e6), st.floats(0.01, 1e6), st.floats(0.1, 10))
def test_growth_is_ordered_above_minus_one_or_unknown(
    now: float, before: float, noise: float, days: float
) -> None:
    found = growth(now, before, noise, noise, days)
    assert found is None or -1 <= found.low <= found.value <= found.high
    if before <= 4 * np.sqrt(noise):
        assert found is None


def test_growth_is_against_the_days_right_before_of_the_same_league_and_classes(make_plan: MakePlan) -> None:
    week = Counted(asking(make_plan, "2026-11-02"), np.array([1000.0, 400.0, 0.0]), 6)
    after = Counted(asking(make_plan, "2026-11-09", days=14), np.array([4000.0, 400.0, 9.0]), 6)
    first, second = reports([after, week])
    assert [each.growth for each in first.classes] == [None] * 3
    doubled, halved, none = (each.growth for each in second.classes)
    assert doubled is not None and doubled.value == pytest.approx(1.0) and doubled.low > 0.8
    assert halved is not None and halved.value == pytest.approx(-0.5) and halved.high < -0.3
    assert none is None
    gap = replace(after, plan=asking(make_plan, "2026-11-10", days=14))
    other = replace(after, plan=asking(make_plan, "2026-11-09", days=14, league="other"))
    for each in (gap, other):
        assert all(one.growth is None for one in reports([week, each])[1].classes)
    assert TrendsReport.model_validate_json(second.model_dump_json()) == second


def test_a_count_that_one_merchant_may_have_been_cut_in_has_no_growth_and_says_so(
    make_plan: MakePlan,
) -> None:
    """Below a merchant's most, with room for the noise, nothing was cut: a sum is no less than each of its parts."""
    week = Counted(asking(make_plan, expected=500.0), np.array([1000.0, 400.0, 0.0]), 6)
    after = Counted(asking(make_plan, "2026-11-09", expected=500.0), np.array([500.0, 400.0, 2000.0]), 6)
    first, second = reports([week, after])
    assert (first.most, first.merchants) == (1000, 6)
    assert [each.may_be_more for each in first.classes] == [True, False, False]
    assert [each.may_be_more for each in second.classes] == [False, False, True]
    assert [each.growth is None for each in second.classes] == [True, False, True]
    near = 1000 - 4 * np.sqrt(week.variance)
    for count, cut in ((near - 1, False), (near + 1, True)):
        assert replace(week, counts=np.array([count])).may_be_more(0) is cut
