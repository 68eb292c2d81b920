"""What daemon and owner say to each other through files: pause, status, lock, journal, approvals, traffic."""

import json
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from hanse_client import journal as journal_module
from hanse_client import traffic as traffic_module
from hanse_client.approvals import MAX_WAITING, Approvals, Standing
from hanse_client.control import FOR_GOOD, Control, State, Status
from hanse_client.journal import Journal
from hanse_client.schedule import DAYS, Schedule
from hanse_client.traffic import Network, Traffic
from hanse_common.errors import ConfigError, PlanRefused
from hanse_common.plan import Plan, SignedPlan

NOW = datetime(2026, 3, 2, 12, 0, tzinfo=UTC)

STATUS = Status(
    version="1", pid=1, started=NOW, updated=NOW, state=State.WAITING, since=NOW, note="Well.", server="a:1"
)


# -- control ------------------------------------------------------------------------------------------------------


def test_a_pause_ends_by_itself_or_by_word(tmp_path: Path) -> None:
    control = Control(tmp_path / "state")
    now = datetime.now(UTC)
    assert control.paused_until(now) is None
    until = control.pause(timedelta(hours=1))
    assert Control(tmp_path / "state").paused_until(now) == until, (
        "also for another process, and after a restart"
    )
    assert control.paused_until(now + timedelta(hours=2)) is None
    assert control.pause(None) == FOR_GOOD == control.paused_until(now + timedelta(days=9999))
    control.resume()
    control.resume()
    assert control.paused_until(now) is None


@pytest.mark.parametrize("content", [b"", b"soon", b"\xff\xfe", b"2026-99-99"])
def test_a_pause_that_cannot_be_read_still_is_one(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "paused").write_bytes(content)
    assert Control(tmp_path).paused_until(NOW) == FOR_GOOD


def test_a_status_that_nobody_keeps_up_is_told_from_one_that_somebody_does(tmp_path: Path) -> None:
    control = Control(tmp_path)
    assert control.status() is None and not control.is_held()
    with control.hold():
        control.publish(STATUS)
        assert control.is_held()
        assert control.status() == STATUS
        with pytest.raises(ConfigError, match="another hanse-client runs"), Control(tmp_path).hold():
            pass
    found = control.status()
    assert found is not None and found.state is State.STOPPED
    (tmp_path / "status.json").write_bytes(b"{")
    assert control.status() is None


def test_the_lock_goes_with_a_killed_daemon(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path; from hanse_client.control import Control\n"
        "with Control(Path(sys.argv[1])).hold(): os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", script, tmp_path], check=False, timeout=60)
    assert not Control(tmp_path).is_held()
    with Control(tmp_path).hold():
        pass


@pytest.mark.parametrize("address", ["a b", "x" * 400, "a\x1b[2J:1", ""])
def test_an_address_from_a_damaged_file_is_none(tmp_path: Path, address: str) -> None:
    control = Control(tmp_path)
    control.note_aggregator("league.example:9093")
    assert control.aggregator() == "league.example:9093"
    control.note_aggregator(address)
    assert control.aggregator() is None


# -- journal ------------------------------------------------------------------------------------------------------


def test_the_journal_keeps_the_last_events_and_never_grows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "MAX_BYTES", 2000)
    journal = Journal(tmp_path)
    for number in range(300):
        journal.note("round", f"Round {number}.", round=number)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 4500
    assert [event.facts["round"] for event in journal.recent(5)] == list(range(295, 300))
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in tmp_path.iterdir())
    assert journal.recent(0) == []


def test_damaged_lines_are_left_out(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.note("a", "One.")
    with (tmp_path / "journal.jsonl").open("ab") as file:
        file.write(b'{"time": 5\n\xff\xfe\n[1]\n')
    journal.note("b", "Two.")
    assert [event.text for event in journal.recent(10)] == ["One.", "Two."]


def test_a_journal_that_cannot_be_written_stops_nobody(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").mkdir()
    Journal(tmp_path).note("a", "One.")
    Journal(tmp_path / "nowhere").note("a", "One.")


# -- schedule -----------------------------------------------------------------------------------------------------


@given(st.datetimes(datetime(2026, 1, 1), datetime(2027, 1, 1)))
def test_by_default_it_is_always_open(now: datetime) -> None:
    assert Schedule().open_at(now)


@pytest.mark.parametrize(
    ("days", "hours", "now", "open_"),
    [
        (DAYS, "09:00-17:00", datetime(2026, 3, 2, 9, 0), True),
        (DAYS, "09:00-17:00", datetime(2026, 3, 2, 8, 59), False),
        (DAYS, "09:00-17:00", datetime(2026, 3, 2, 17, 0), False),
        (("fri",), "22:00-06:00", datetime(2026, 3, 6, 23, 0), True),  # a Friday
        (("fri",), "22:00-06:00", datetime(2026, 3, 7, 5, 59), True),  # its night
        (("fri",), "22:00-06:00", datetime(2026, 3, 7, 6, 0), False),
        (("fri",), "22:00-06:00", datetime(2026, 3, 7, 23, 0), False),
        (("fri",), "22:00-06:00", datetime(2026, 3, 6, 5, 0), False),  # Thursday's night
        (("sat", "sun"), None, datetime(2026, 3, 8, 23, 59), True),
        (("sat", "sun"), None, datetime(2026, 3, 9, 0, 0), False),
        (("sun",), None, datetime(2026, 3, 9, 0, 0), False),
    ],
)
def test_days_and_hours(days: Any, hours: str | None, now: datetime, open_: bool) -> None:
    assert Schedule(days=days, hours=hours).open_at(now) is open_


@pytest.mark.parametrize("hours", ["9-17", "25:00-06:00", "10:00-10:00", "10:00", "10:00-11:60"])
def test_hours_that_are_none(hours: str) -> None:
    with pytest.raises(ValueError, match="two different times"):
        Schedule(hours=hours)


# -- approvals ----------------------------------------------------------------------------------------------------


@pytest.fixture
def signed(make_plan: Callable[..., Plan]) -> Callable[[int], tuple[bytes, SignedPlan]]:
    def make(number: int) -> tuple[bytes, SignedPlan]:
        plan = make_plan(serial=number.to_bytes(16, "big"))
        return plan.digest, SignedPlan.sign(plan, Ed25519PrivateKey.from_private_bytes(bytes(32)))

    return make


def test_a_plan_waits_until_its_owner_says_yes_or_no(tmp_path: Path, signed: Any) -> None:
    approvals = Approvals(tmp_path / "plans")
    digest, plan = signed(1)
    assert approvals.list() == {}
    assert approvals.standing(digest, plan) is Standing.WAITING
    assert approvals.plan(digest.hex()[:6]) == plan
    approvals.decide(digest.hex()[:6].upper(), Standing.APPROVED)
    assert Approvals(tmp_path / "plans").standing(digest, plan) is Standing.APPROVED
    approvals.decide(digest.hex(), Standing.REFUSED)
    assert approvals.standing(digest, plan) is Standing.REFUSED
    assert approvals.list() == {digest.hex(): Standing.REFUSED}
    for unknown in ("ffff" * 16, ""):
        if unknown or len(approvals.list()) != 1:
            with pytest.raises(ConfigError, match="found 0 plans"):
                approvals.decide(unknown, Standing.APPROVED)


def test_an_operator_who_signs_without_end_fills_no_disk(tmp_path: Path, signed: Any) -> None:
    approvals = Approvals(tmp_path)
    first, plan = signed(0)
    approvals.standing(first, plan)
    approvals.decide(first.hex(), Standing.APPROVED)
    for number in range(1, MAX_WAITING + 10):
        digest, plan = signed(number)
        approvals.standing(digest, plan)
        os.utime(tmp_path / f"{digest.hex()}.waiting", (number, number))
    kept = approvals.list()
    assert len(kept) == MAX_WAITING + 1
    assert kept[first.hex()] is Standing.APPROVED, "what the owner decided is kept"
    assert kept[digest.hex()] is Standing.WAITING


# -- traffic ------------------------------------------------------------------------------------------------------


def test_a_month_has_a_limit(
    tmp_path: Path, make_plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(traffic_module, "_month", lambda: "2026-03")
    plan = make_plan()
    traffic = Traffic(tmp_path / "traffic.json", Network(monthly_megabytes=40))
    traffic.require_room(plan, 1)
    traffic.add(39_000_000)
    with pytest.raises(PlanRefused, match=r"39 MB were moved this month.*allow 40"):
        traffic.require_room(plan, 1)
    traffic.save()
    again = Traffic(tmp_path / "traffic.json", Network(monthly_megabytes=40))
    assert again.megabytes == 39
    Traffic(tmp_path / "traffic.json", Network()).require_room(plan, 64)
    monkeypatch.setattr(traffic_module, "_month", lambda: "2026-04")
    again.require_room(plan, 1)
    assert again.megabytes == 0


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b'{"month": 5, "bytes": 1}', b'{"month": "x", "bytes": -1}']
)
def test_a_lost_count_begins_anew(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "traffic.json").write_bytes(content)
    assert Traffic(tmp_path / "traffic.json", Network()).megabytes == 0


def test_the_count_is_written_from_time_to_time(tmp_path: Path) -> None:
    traffic = Traffic(tmp_path / "traffic.json", Network())
    traffic.add(traffic_module.SAVED_EVERY)
    assert json.loads((tmp_path / "traffic.json").read_bytes())["bytes"] == traffic_module.SAVED_EVERY


# -- what happens at the same time --------------------------------------------------------------------------------


def test_plans_are_listed_while_their_owner_decides(tmp_path: Path, signed: Any) -> None:
    approvals, over = Approvals(tmp_path), threading.Event()
    for number in range(5):
        approvals.standing(*signed(number))
    names = list(approvals.list())

    def decide() -> None:
        while not over.is_set():
            for name in names:
                for standing in (Standing.APPROVED, Standing.REFUSED):
                    approvals.decide(name, standing)

    thread = threading.Thread(target=decide)
    thread.start()
    try:
        for _ in range(2000):
            approvals.list()
    finally:
        over.set()
        thread.join()


def test_who_looks_whether_a_daemon_runs_keeps_none_from_starting(tmp_path: Path) -> None:
    control, over = Control(tmp_path), threading.Event()
    with control.hold():
        pass

    def look() -> None:
        while not over.is_set():
            Control(tmp_path).is_held()

    thread = threading.Thread(target=look)
    thread.start()
    try:
        for _ in range(30):
            with control.hold():
                pass
    finally:
        over.set()
        thread.join()


def test_a_name_that_is_no_text_is_written_down_all_the_same(tmp_path: Path) -> None:
    Journal(tmp_path).note("problem", "caf\udce9 cannot be listed")
    assert Journal(tmp_path).recent(1)[0].text == "caf\\udce9 cannot be listed"
