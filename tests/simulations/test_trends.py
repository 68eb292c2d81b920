"""Trends over real merchants: masked, charged before a query is read, right, and compared with the days before."""

import shutil
import sqlite3
from collections.abc import Callable
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hanse_client.examples import Examples
from hanse_client.ledger import Ledger
from hanse_client.queries import QueryLog
from hanse_common.config import load
from hanse_common.errors import RoundFailed
from hanse_common.messages import DeclineCode
from hanse_server.config import PrivacyTarget
from hanse_server.storage import State
from hanse_server.trends import trends
from hanse_simulations.experiment import Experiment
from hanse_simulations.shops import merchant_names
from hanse_simulations.simulation import League, seeded_members

Write = Callable[..., Path]
MONDAY = date(2026, 11, 2)
MERCHANTS = 3
WEEKS = {
    MONDAY: {"Sneaker": 150, "Bag": 200, "Coat": 100},
    MONDAY + timedelta(days=7): {"Sneaker": 300, "Bag": 190, "Coat": 10},
}
"""What each merchant's shoppers searched for in two weeks."""

BUDGET = PrivacyTarget(epsilon=4, delta=1e-5)


@pytest.fixture
def experiment(write_experiment: Write) -> Callable[..., Experiment]:
    def make(first: date, expected: float = 2000) -> Experiment:
        training = {"mode": "trends", "first_day": first.isoformat(), "days": 7, "expected_batch": expected}
        changes: dict[str, Any] = {
            "data.merchants": MERCHANTS,
            "plan.training": training,
            "plan.privacy": {"epsilon": 2, "delta": 1e-6},
            "plan.cohort": {"min_merchants": MERCHANTS, "max_merchants": MERCHANTS},
        }
        return load(Experiment, write_experiment(changes, f"{first}-{expected:g}.yaml"))

    return make


@pytest.fixture(scope="module")
def weeks_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One merchant's log, as it is after both weeks."""
    file, day = tmp_path_factory.mktemp("log") / "queries.sqlite", MONDAY
    log = QueryLog(file, 35, lambda: day)
    for first, counts in WEEKS.items():
        for number, (label, count) in enumerate(counts.items()):
            day = first + timedelta(days=3 * number)
            log.note(label)
            with sqlite3.connect(file) as db:
                db.execute("UPDATE query SET count = ? WHERE day = ?", (count, day.isoformat()))
    return file


@pytest.fixture
def queries(tmp_path: Path, weeks_log: Path) -> dict[str, QueryLog]:
    """Each merchant's log, on the day after both weeks."""
    logs = {}
    for name in merchant_names(MERCHANTS):
        file = tmp_path / f"{name}.sqlite"
        shutil.copyfile(weeks_log, file)
        logs[name] = QueryLog(file, 35, lambda: MONDAY + timedelta(days=14))
    return logs


def shops() -> dict[str, Examples]:
    empty = Examples.of(np.zeros((0, 48), np.float32), np.zeros(0, np.int64), "cpu")
    return dict.fromkeys(merchant_names(MERCHANTS), empty)


def counted(
    settings: Experiment, folder: Path, queries: dict[str, QueryLog] | None, told: list[str] | None = None
) -> League:
    heard: list[str] = [] if told is None else told
    members = seeded_members(
        settings, shops(), folder, lambda name, text: heard.append(text), BUDGET, queries
    )
    league = League.assemble(settings, members, folder)
    league.train()
    return league


def test_two_weeks_are_counted_once_and_compared(
    experiment: Callable[..., Experiment], queries: dict[str, QueryLog], tmp_path: Path
) -> None:
    for first in WEEKS:
        league = counted(experiment(first), tmp_path, queries)
    for ledger in league.ledgers.values():
        assert len(ledger.spent().plans) == 2 and 3.8 < ledger.spent().epsilon <= 4
    with State.open(tmp_path / "server") as state:
        before, after = trends(state)
    assert (before.first_day, after.first_day) == ("2026-11-02", "2026-11-09")
    assert before.merchants == MERCHANTS and 1.9 < before.epsilon <= 2
    for report, (_, true) in zip((before, after), WEEKS.items(), strict=True):
        found = {each.name: each.queries for each in report.classes}
        inside = [found[name].low <= MERCHANTS * true.get(name, 0) <= found[name].high for name in found]
        assert sum(inside) >= 8, found
        assert report.queries.low <= MERCHANTS * sum(true.values()) <= report.queries.high
    growth = {each.name: each.growth for each in after.classes}
    assert all(each.growth is None for each in before.classes) and growth["Dress"] is None
    sneaker = growth["Sneaker"]
    assert sneaker is not None and sneaker.low <= 1.0 <= sneaker.high
    # These days were counted under other plans.
    with pytest.raises(RoundFailed, match=DeclineCode.UNAVAILABLE):
        counted(experiment(MONDAY + timedelta(days=1)), tmp_path, queries)


@pytest.mark.parametrize(("expected", "most"), [(150.0, None), (60.0, 120)])
def test_more_queries_than_were_expected_are_counted_all_the_same(
    experiment: Callable[..., Experiment],
    queries: dict[str, QueryLog],
    tmp_path: Path,
    expected: float,
    most: int | None,
) -> None:
    """1350 queries, for a plan that knows of 150 or 60: what was paid for is used, and what was cut is told."""
    counted(experiment(MONDAY, expected), tmp_path, queries)
    with State.open(tmp_path / "server") as state:
        (report,) = trends(state)
    found = {each.name: each for each in report.classes}
    for name, count in WEEKS[MONDAY].items():
        true, figure = MERCHANTS * min(count, most or count), found[name].queries
        deviation = (figure.high - figure.value) / 1.96
        assert abs(figure.value - true) <= 6 * deviation, (name, figure)
        assert found[name].may_be_more, "more than one merchant's most: nobody can tell whether it is one's"
    assert not found["Dress"].may_be_more


def test_the_ledger_is_charged_before_the_log_is_read(
    experiment: Callable[..., Experiment],
    queries: dict[str, QueryLog],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[str] = []

    def noting(what: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            seen.append(what)
            return original(*arguments)

        return call

    monkeypatch.setattr(Ledger, "charge", noting("charge", Ledger.charge))
    monkeypatch.setattr(QueryLog, "take", noting("log", QueryLog.take))
    counted(experiment(MONDAY), tmp_path, queries)
    assert seen == ["charge", "log"] * MERCHANTS


def test_nobody_answers_before_the_days_are_over_or_without_a_log(
    experiment: Callable[..., Experiment], queries: dict[str, QueryLog], tmp_path: Path
) -> None:
    for number, (first, logs) in enumerate(((MONDAY + timedelta(days=8), queries), (MONDAY, None))):
        told: list[str] = []
        with pytest.raises(RoundFailed, match=DeclineCode.UNAVAILABLE):
            counted(experiment(first), tmp_path / str(number), logs, told)
        assert told and all(
            f"the searches of 7 days from {first} on can't be counted" in text for text in told
        )
