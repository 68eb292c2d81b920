"""What the operator is told first: each alert when there is cause, none when all is well, the worst first."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hanse_server import plausibility
from hanse_server.alerts import DIRECTORY_SECONDS, SILENT_SECONDS, Alert, Facts, alerts
from hanse_server.certificates import Notice, Severity
from hanse_server.page_data import ROLES, RoundView, TrainingView
from hanse_server.storage.schema import DirectoryRecord, RunRecord

NOW = 1_800_000_000.0


def run(state: str = "running", reason: str = "", begun: float = NOW - 60) -> RunRecord:
    return RunRecord(number=3, plan="p", state=state, begun=begun, ended=None, after=0, reason=reason)


def directory(left: float) -> DirectoryRecord:
    return DirectoryRecord(digest="d", version=7, members=[], expires=NOW + left, seen=NOW)


def round_(
    number: int, released: float = NOW - 30, seconds: float = 100, **roles: dict[str, str]
) -> RoundView:
    default = {"uploaded": {"alder": "", "birch": "", "cedar": ""}}
    return RoundView(number, released, seconds, 40.0, 70.0, {role: {} for role in ROLES} | default | roles)


def found(**facts: Any) -> list[tuple[str, str]]:
    return [(one.kind, one.what) for one in told(**facts)]


def told(**facts: Any) -> list[Alert]:
    fields: dict[str, Any] = {"training": TrainingView(run()), "rounds": [round_(1)]} | facts
    return alerts(Facts(**fields), NOW)


def test_nothing_is_told_when_all_is_well() -> None:
    assert found() == []
    assert found(training=TrainingView()) == []
    assert found(training=TrainingView(run("finished")), rounds=[]) == []
    assert found(training=TrainingView(run("stopped")), disk=(50, 100)) == []
    assert found(training=TrainingView(run(), directory=directory(DIRECTORY_SECONDS))) == []


@pytest.mark.parametrize("state", ["failed", "lost"])
def test_a_run_that_ended_badly(state: str) -> None:
    assert found(training=TrainingView(run(state))) == [("bad", state)]


def test_a_sum_that_no_honest_merchants_make(make_plan: Any) -> None:
    plan = make_plan()
    total = np.full(plan.dimension, 1 << 30, dtype=np.uint32)
    verdict = plausibility.judge(plan, 0, np.zeros(plan.model_dimension, dtype=np.float32), total, 3)
    assert not verdict.plausible
    text = verdict.refusal(plan, 3)  # as it is said today
    assert found(training=TrainingView(run("failed", text))) == [("bad", "implausible")]
    line = (NOW, "round", f"Round 2 of 4: 3 merchants. Before: {text}")
    (alert,) = told(lines=[line])
    assert (alert.kind, alert.what, alert.values["text"]) == ("bad", "refused", text)


def test_attempts_that_failed_are_told_with_the_last_one() -> None:
    lines = [(NOW, "round", f"Round {n} of 4: 3 merchants. Before: reason {n}") for n in (1, 2)]
    lines += [(NOW, "round", "Round 3 of 4: 3 merchants."), (NOW, "merchants", "said Before: x")]
    (alert,) = told(lines=lines)
    assert (alert.what, alert.values) == ("attempts", {"text": "reason 2", "count": 2})


def test_silence_is_told_by_what_a_round_takes() -> None:
    late = NOW - SILENT_SECONDS - 61
    assert found(training=TrainingView(run(begun=late)), rounds=[]) == [("warning", "silent")]
    assert found(training=TrainingView(run(begun=late)), rounds=[round_(1, NOW - 30)]) == []
    assert found(training=TrainingView(run(begun=late)), rounds=[round_(1, late)]) == [("warning", "silent")]
    assert found(training=TrainingView(run(begun=late)), rounds=[round_(1, late, SILENT_SECONDS)]) == []
    assert found(training=TrainingView(run("stopped", begun=late)), rounds=[round_(1, late)]) == []


@pytest.mark.parametrize(
    ("left", "expected"),
    [(-1, [("bad", "directory-ended")]), (1, [("warning", "directory-ends")]), (30 * 86_400, [])],
)
def test_a_directory_that_ends(left: float, expected: list[tuple[str, str]]) -> None:
    assert found(training=TrainingView(run(), directory=directory(left))) == expected


def test_a_certificate_speaks_for_itself() -> None:
    notices = [Notice(Severity.WARNING, "a", 7, "soon"), Notice(Severity.ERROR, "b", 0, "now")]
    assert [one.values["text"] for one in told(notices=notices, trouble="unreadable")] == [
        "now",
        "unreadable",
        "soon",
    ]


def test_dropouts_over_a_fifth_and_whoever_is_blamed() -> None:
    lost: dict[str, Any] = {"dropped": {"elm": ""}}
    assert found(rounds=[round_(1, **lost)] + [round_(n) for n in range(2, 5)]) == []
    (alert,) = told(rounds=[round_(n, **lost) for n in range(1, 5)])
    assert (alert.what, alert.values) == ("dropouts", {"percent": 25, "rounds": 4})
    (alert,) = told(rounds=[round_(1, blamed={"fir": "lied"})])
    assert (alert.what, alert.values["merchants"]) == ("blamed", [("fir", "lied")])
    assert found(rounds=[round_(1, blamed={"fir": "lied"})] + [round_(n) for n in range(2, 12)]) == []


def test_a_disk_that_fills() -> None:
    assert found(disk=(9, 100)) == [("warning", "disk")]
    assert found(disk=(0, 100)) == [("bad", "disk")]
    (alert,) = told(disk=(5_100_000_000, 100_000_000_000))
    assert alert.values == {"free": "5.1 GB"}


@given(st.sampled_from(["failed", "lost", "running"]), st.floats(-1e6, 1e6), st.integers(0, 100))
def test_the_worst_comes_first(state: str, left: float, free: int) -> None:
    kinds = [
        kind
        for kind, _ in found(training=TrainingView(run(state), directory=directory(left)), disk=(free, 100))
    ]
    assert kinds == sorted(kinds)
