"""What shoppers search for, and what of it grows: from the noisy counts that plans of mode `trends` came to.

    for report in trends(state):
        for each in report.classes:
            print(report.first_day, each.name, each.queries.value, each.may_be_more, each.growth)

Counts are the league's sums as they were opened, so their 95 % intervals are for the noise alone, which is a discrete
Gaussian of known variance: one share of each merchant in the sum, and a quarter of a grid step's square for each
rounding. Growth is against the plan whose days end where these begin, of the same league and classes, a day's queries
against a day's. Its interval is for chance, too: as many queries as a count has vary by its root (a Poisson number), so
growth outside of zero is more than noise and chance make. It is Fieller's interval of a ratio [1]. Where the earlier
count may well be none, there is no growth.

A merchant contributes no more queries of one class than its plan says (`hanse_common.counting`). Where the sum over all
merchants is below that, nothing was cut; else some may have been, and then the count is of those that were contributed,
and has no growth: nobody can tell whether one merchant had them or many.

[1] Fieller 1954, "Some Problems in Interval Estimation".
"""

import math
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hanse_common import wire
from hanse_common.counting import most_of_a_class
from hanse_common.evaluation_sums import DEVIATIONS, VISIBLE, count
from hanse_common.federated_report import Count, Figure
from hanse_common.modes import TrendsTraining
from hanse_common.plan import MAX_PLAN_BYTES, Plan, SignedPlan
from hanse_common.wire import Value

if TYPE_CHECKING:
    from hanse_server.storage import State


class ClassTrend(Value):
    """How many queries of one class there were, and by which share more than before, −1 being none any more.

    `may_be_more` where some of a merchant with very many may not be counted.
    """

    name: str
    queries: Count
    may_be_more: bool
    growth: Figure | None


class TrendsReport(Value):
    """What shoppers of `merchants` merchants searched for on `days` days from `first_day` on, under ε and δ a query.

    Each merchant contributed at most `most` queries of one class.
    """

    league: str
    plan: str
    first_day: str
    days: int
    merchants: int
    most: int
    epsilon: float
    delta: float
    queries: Count
    classes: tuple[ClassTrend, ...]


@dataclass(frozen=True)
class Counted:
    """The noisy counts of one plan, (K,) float64, and how many merchants are in the sum."""

    plan: Plan
    counts: NDArray[np.float64]
    merchants: int

    @property
    def training(self) -> TrendsTraining:
        """The plan's training. Raises `ValueError` in another mode."""
        if not isinstance(self.plan.training, TrendsTraining):
            raise ValueError(f"Expected a plan of mode trends, found {self.plan.training.mode}.")
        return self.plan.training

    @property
    def variance(self) -> float:
        """The noise's variance in each count."""
        mechanism = self.plan.mechanism(1)
        shares = max(self.merchants, mechanism.shares)
        return shares * (mechanism.noise.share**2 + 0.25) * mechanism.grid.step**2

    def may_be_more(self, index: int) -> bool:
        """Return whether a merchant may have had more queries of the class `index` than it contributed."""
        return float(self.counts[index]) > most_of_a_class(self.plan) - VISIBLE * math.sqrt(self.variance)

    def begins_after(self, other: "Counted") -> bool:
        """Return whether `other` has the days right before, in the same league and by the same classes."""
        same = (self.plan.league, self.plan.taxonomy) == (other.plan.league, other.plan.taxonomy)
        return same and other.training.end == self.training.first


def trends(state: "State") -> list[TrendsReport]:
    """Return the reports of all plans of mode `trends` that were counted, in order. Raises `StorageError`."""
    found = []
    for signed, merchants in state.history.sums("trends"):
        plan = wire.decode(Plan, wire.decode(SignedPlan, signed).plan, MAX_PLAN_BYTES)
        checkpoint = state.checkpoint(plan.digest)
        if checkpoint is not None:
            found.append(Counted(plan, checkpoint.model, merchants))
    return reports(found)


def reports(found: list[Counted]) -> list[TrendsReport]:
    """Return the report of each, by first day; of several for the days before the latest given is compared with."""

    def first(one: Counted) -> date:
        return one.training.first

    made = []
    for each in sorted(found, key=first):
        before = [other for other in found if each.begins_after(other)]
        made.append(_report(each, before[-1] if before else None))
    return made


def growth(
    now: float, before: float, noise_now: float, noise_before: float, days: float = 1.0
) -> Figure | None:
    """Return (now/before)·`days` − 1 with its 95 % interval, or None where `before` may be none, or nothing is certain.

    `noise_now` and `noise_before` are variances; `days` is how many days `before` is of for each of `now`.
    """
    if before <= VISIBLE * math.sqrt(noise_before) or before < 1:
        return None
    # (now − θ·before)² = z²·(variance of now + θ²·variance of before) has two roots, for a `before` that is not zero.
    z = DEVIATIONS**2
    square = before**2 - z * (noise_before + before)
    constant = now**2 - z * (noise_now + max(now, 0.0))
    if square <= 0:
        return None
    root = math.sqrt(max((now * before) ** 2 - square * constant, 0.0))
    low, value, high = (now * before - root) / square, now / before, (now * before + root) / square
    low, value, high = (max(part, 0.0) * days - 1 for part in (min(low, value), value, max(high, value)))
    return Figure(value=value, low=low, high=high)


def _report(each: Counted, before: Counted | None) -> TrendsReport:
    plan, training, variance = each.plan, each.training, each.variance
    classes = []
    for index, name in enumerate(plan.taxonomy.classes):
        grown = None
        may_be_more = each.may_be_more(index)
        if before is not None and not (may_be_more or before.may_be_more(index)):
            ratio = before.training.days / training.days
            grown = growth(
                float(each.counts[index]), float(before.counts[index]), variance, before.variance, ratio
            )
        queries = count(float(each.counts[index]), math.sqrt(variance))
        classes.append(ClassTrend(name=name, queries=queries, may_be_more=may_be_more, growth=grown))
    total = count(float(each.counts.sum()), math.sqrt(variance * len(each.counts)))
    return TrendsReport(
        league=plan.league,
        plan=plan.digest.hex(),
        first_day=training.first_day,
        days=training.days,
        merchants=each.merchants,
        most=most_of_a_class(plan),
        epsilon=plan.epsilon(),
        delta=plan.delta,
        queries=total,
        classes=tuple(classes),
    )
