"""What shoppers asked for: kept as counts alone, counted once, and silent about what is in the log."""

import sqlite3
from collections import Counter
from collections.abc import Callable
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hanse_client.config import ClientConfig
from hanse_client.examples import Examples
from hanse_client.queries import QueryLog, today
from hanse_client.training import ShopTrainer
from hanse_common.counting import most_of_a_class
from hanse_common.errors import CatalogError
from hanse_common.modes import TrendsTraining
from hanse_common.plan import Cohort, Plan
from hanse_common.privacy.mechanism import Mechanism
from hanse_common.randomness import AesCtrStream
from hanse_common.secagg import ring

MakePlan = Callable[..., Plan]
MONDAY = date(2026, 11, 16)


class Clock:
    def __init__(self, day: date = MONDAY) -> None:
        self.day = day

    def __call__(self) -> date:
        return self.day


def asking(make_plan: MakePlan, first: date = MONDAY, days: int = 7, serial: int = 0) -> Plan:
    training = TrendsTraining(
        first_day=first.isoformat(), days=days, expected_batch=50.0, noise_multiplier=2.0
    )
    cohort = Cohort(min_merchants=5, max_merchants=7, max_corrupt=1)
    plan = make_plan(cohort=cohort, dimension=3, serial=bytes([serial] * 16))
    return plan.model_copy(update={"training": training})


def noted(path: Path, clock: Clock, labels: dict[date, list[str]], days: int = 35) -> QueryLog:
    log = QueryLog(path, days, clock)
    for day, of_day in sorted(labels.items()):
        clock.day = day
        for label in of_day:
            log.note(label)
    return log


def test_queries_of_the_days_are_counted_by_class(make_plan: MakePlan, tmp_path: Path) -> None:
    clock = Clock()
    sunday = MONDAY + timedelta(days=6)
    log = noted(
        tmp_path / "state" / "queries.sqlite",
        clock,
        {
            MONDAY - timedelta(days=1): ["bag"] * 9,
            MONDAY: ["shoe", "bag", "shoe"],
            sunday: ["shirt", "hat"],  # a hat is no class of the plan
            sunday + timedelta(days=1): ["shirt"] * 9,
        },
    )
    assert log.take(asking(make_plan)).tolist() == [1, 2, 1]
    again = QueryLog(tmp_path / "state" / "queries.sqlite", 35, clock)
    assert again.take(asking(make_plan)).tolist() == [1, 2, 1], "a repeated round counts the same"


def test_days_that_are_not_over_or_no_longer_kept_are_not_open(make_plan: MakePlan, tmp_path: Path) -> None:
    clock = Clock()
    log = QueryLog(tmp_path / "q.sqlite", 10, clock)
    plan = asking(make_plan)
    for day, is_open in ((6, False), (7, True), (10, True), (11, False)):
        clock.day = MONDAY + timedelta(days=day)
        assert log.open_to(plan) is is_open, day


def test_a_query_is_counted_under_one_plan_alone(make_plan: MakePlan, tmp_path: Path) -> None:
    clock = Clock()
    log = noted(tmp_path / "q.sqlite", clock, {MONDAY + timedelta(days=n): ["shoe"] for n in range(21)})
    clock.day = MONDAY + timedelta(days=21)
    first = asking(make_plan, MONDAY + timedelta(days=7))
    assert log.open_to(first) and log.take(first).sum() == 7 and log.open_to(first)
    for shift in (1, 7, 13):
        other = asking(make_plan, MONDAY + timedelta(days=shift), serial=1)
        assert not log.open_to(other) and log.take(other).sum() == 0, shift
    for shift in (0, 14):
        other = asking(make_plan, MONDAY + timedelta(days=shift), serial=1 + shift)
        assert log.open_to(other) and log.take(other).sum() == 7, shift


def test_what_is_old_is_really_gone(tmp_path: Path) -> None:
    clock, path = Clock(), tmp_path / "q.sqlite"
    log = noted(path, clock, {MONDAY: ["a-very-special-class"]}, days=5)
    assert b"a-very-special-class" in path.read_bytes()
    clock.day = MONDAY + timedelta(days=6)
    log.note("shoe")
    assert {file.name for file in tmp_path.iterdir()} == {"q.sqlite"}
    assert b"a-very-special-class" not in path.read_bytes() and b"2026-11-16" not in path.read_bytes()


def test_nothing_is_kept_of_a_query_but_its_day_and_class(tmp_path: Path) -> None:
    path = tmp_path / "q.sqlite"
    noted(path, Clock(), {MONDAY: ["shoe", "shoe", "bag"]})
    assert path.stat().st_mode & 0o077 == 0
    with sqlite3.connect(path) as db:
        tables = [name for (name,) in db.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")]
        assert sorted(tables) == ["query", "used"]
        assert db.execute("SELECT * FROM query ORDER BY class").fetchall() == [
            ("2026-11-16", "bag", 1),
            ("2026-11-16", "shoe", 2),
        ]


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["shirt", "shoe", "bag"])), max_size=15))
def test_any_order_of_queries_and_days_counts_as_a_counter_does(
    make_plan: MakePlan, tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, str]]
) -> None:
    clock = Clock()
    log = QueryLog(tmp_path_factory.mktemp("log") / "q.sqlite", 366, clock)
    wanted: Counter[str] = Counter()
    for shift, label in steps:
        clock.day += timedelta(days=shift)
        log.note(label)
        wanted[label] += MONDAY <= clock.day < MONDAY + timedelta(days=20)
    assert log.take(asking(make_plan, days=20)).tolist() == [wanted[c] for c in ("shirt", "shoe", "bag")]


def test_a_damaged_or_foreign_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "damaged").write_bytes(b"nothing of ours" * 300)
    with pytest.raises(CatalogError, match="cannot be used"):
        QueryLog(tmp_path / "damaged", 5)
    with sqlite3.connect(tmp_path / "foreign") as db:
        db.execute("CREATE TABLE other (x)")
    with pytest.raises(CatalogError, match="another program's"):
        QueryLog(tmp_path / "foreign", 5)
    (tmp_path / "file").touch()
    with pytest.raises(CatalogError, match="cannot be made"):
        QueryLog(tmp_path / "file" / "q.sqlite", 5)


def test_a_log_is_kept_where_the_policy_allows_trends_alone(settings: dict[str, Any]) -> None:
    def configured(**changes: Any) -> ClientConfig:
        return ClientConfig.model_validate(settings | {"policy": settings["policy"] | changes})

    assert QueryLog.of(configured()) is None
    assert not (settings["state"] / "queries.sqlite").exists()
    log = QueryLog.of(configured(modes=("trends",), trends_days=3))
    assert log is not None
    log.note("shoe")
    assert (settings["state"] / "queries.sqlite").exists() and today() >= MONDAY


def test_counts_are_deleted_when_the_owner_allows_trends_no_longer(
    settings: dict[str, Any], make_plan: MakePlan, caplog: pytest.LogCaptureFixture
) -> None:
    def configured(**changes: Any) -> ClientConfig:
        return ClientConfig.model_validate(settings | {"policy": settings["policy"] | changes})

    allowing, path = configured(modes=("trends",)), settings["state"] / "queries.sqlite"
    log = QueryLog.of(allowing)
    assert log is not None
    log.note("shoe")
    week = asking(make_plan, today() - timedelta(days=7))
    log.take(week)
    assert QueryLog.of(configured()) is None and QueryLog.of(configured()) is None
    with sqlite3.connect(path) as db:
        assert db.execute("SELECT count(*) FROM query").fetchone() == (0,)
    again = QueryLog.of(allowing)
    assert again is not None and again.open_to(week)
    assert not again.open_to(asking(make_plan, today() - timedelta(days=8), serial=1))
    path.write_bytes(b"damaged" * 1000)
    assert QueryLog.of(configured()) is None and "can't be deleted" in caplog.text
    assert QueryLog.of(allowing) is None and "can't be kept" in caplog.text


# What is contributed


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> list[NDArray[np.int64]]:
    """Note each exact sum, in fine units, that gets rounded and noise."""
    seen: list[NDArray[np.int64]] = []
    original = Mechanism.contribute

    def contribute(self: Mechanism, fine: NDArray[np.int64], limit: int, source: Any) -> NDArray[np.int64]:
        seen.append(fine.copy())
        return original(self, fine, limit, source)

    monkeypatch.setattr(Mechanism, "contribute", contribute)
    return seen


def trainer(plan: Plan, queries: QueryLog | None) -> ShopTrainer:
    examples = Examples.of(np.zeros((0, 6), np.float32), np.zeros(0, np.int64), "cpu")
    return ShopTrainer(plan.recipe, plan.taxonomy, examples, AesCtrStream(bytes(32)), queries=queries)


def contribution(plan: Plan, queries: QueryLog) -> NDArray[np.int64]:
    residues = trainer(plan, queries).contribution(plan, 0, np.zeros(3, np.float32))
    return ring.integers(residues).astype(np.int64)


def test_one_query_more_changes_the_exact_sum_by_norm_one(
    make_plan: MakePlan, tmp_path: Path, bare: list[NDArray[np.int64]]
) -> None:
    plan, clock = asking(make_plan), Clock()
    for name, labels in (("a", ["shoe", "bag"]), ("b", ["shoe", "bag", "bag"])):
        contribution(plan, noted(tmp_path / name, clock, {MONDAY: labels}))
    grid = plan.mechanism(1).grid
    one = int(1 / grid.fine_unit)
    assert bare[0].tolist() == [0, one, one] and bare[1].tolist() == [0, one, 2 * one]
    assert one * grid.fine_unit == grid.clipping_norm == 1


def test_queries_beyond_the_most_that_the_plan_says_are_cut_class_by_class(
    make_plan: MakePlan, tmp_path: Path, bare: list[NDArray[np.int64]]
) -> None:
    """So neighbouring logs stay as near as they were, and the league's sum has a bound."""
    plan = asking(make_plan)
    one, most = int(1 / plan.mechanism(1).grid.fine_unit), most_of_a_class(plan)
    assert most == 100  # twice the 50 that are expected
    log = noted(tmp_path / "q", Clock(), {MONDAY: ["shirt", "shoe", "bag"]})
    for kept, count in enumerate((99, 100, 101, 1 << 60)):
        with sqlite3.connect(tmp_path / "q") as db:
            db.execute("UPDATE query SET count = ? WHERE class = 'shoe'", (count,))
        found = contribution(plan, log)
        assert bare[kept].tolist() == [one, one * min(count, most), one]
        assert np.abs(found).max() <= plan.limit


@pytest.mark.parametrize(("merchants", "noise"), [(7, 2.0), (300, 1e4)], ids=["integers", "noise"])
def test_the_most_has_room_in_the_sum_whatever_is_expected(
    make_plan: MakePlan, merchants: int, noise: float
) -> None:
    plan = asking(make_plan)
    training = plan.training.model_copy(update={"expected_batch": 1e9, "noise_multiplier": noise})
    cohort = Cohort(min_merchants=3, max_merchants=merchants, max_corrupt=1)
    plan = plan.model_copy(update={"training": training, "cohort": cohort})
    mechanism, most = plan.mechanism(1), most_of_a_class(plan)
    fine = np.full(3, round(most / mechanism.grid.fine_unit))
    steps = mechanism.contribute(fine, plan.limit, AesCtrStream(bytes(32)))
    free = mechanism.contribute(fine, 1 << 60, AesCtrStream(bytes(32)))
    assert steps.tolist() == free.tolist() and np.abs(steps).max() <= plan.limit, "nothing more is cut"
    one = round(1 / mechanism.grid.step)
    room = 2**62 * mechanism.grid.fine_unit if merchants == 7 else mechanism.room(plan.limit) // one
    assert most == room, "as much as the exact sum has room for, or the masked one beside its noise"


def test_after_the_charge_nothing_raises(
    make_plan: MakePlan, tmp_path: Path, bare: list[NDArray[np.int64]]
) -> None:
    plan = asking(make_plan)
    log = noted(tmp_path / "q", Clock(), {MONDAY: ["shoe"]})
    (tmp_path / "q").write_bytes(b"damaged" * 1000)
    contribution(plan, log)
    assert bare[0].tolist() == [0, 0, 0]


def test_a_plan_is_taken_whatever_is_in_the_log(make_plan: MakePlan, tmp_path: Path) -> None:
    plan, clock = asking(make_plan), Clock()
    empty = QueryLog(tmp_path / "empty", 35, clock)
    full = noted(tmp_path / "full", clock, {MONDAY: ["shoe"] * 5})
    for days, taken in ((3, False), (7, True), (99, False)):
        clock.day = MONDAY + timedelta(days=days)
        assert trainer(plan, empty).accepts(plan) is trainer(plan, full).accepts(plan) is taken
    assert not trainer(plan, None).accepts(plan)
