"""Trends across real daemons: counted under noise by who allows it, compared with the week before, through two crashes.

The weeks asked about end on the day of the test, since the daemons go by the clock of the machine.
"""

import json
import os
import signal
import sqlite3
import subprocess
from collections import Counter
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from hanse_client.config import ClientConfig
from hanse_client.queries import QueryLog
from hanse_client.recognition.service import Recognition
from hanse_common import wire
from hanse_common.config import load
from hanse_common.plan import Plan, SignedPlan
from hanse_common.vision.recognizer import Recognizer
from hanse_server.trends import TrendsReport
from hanse_simulations.processes import command

COUNTING, REFUSING = ("alder", "birch", "cedar"), "damson"
SLOT = 3.0
"""How long an upload is held back, in seconds: long enough to kill the server between a charge and the sum."""

WEEKS = ({"Sneaker": 30, "Bag": 40}, {"Sneaker": 90, "Bag": 5, "Coat": 10})
"""What shoppers of each shop searched for, week by week."""


def slowly(experiment: dict[str, Any]) -> None:
    experiment["plan"]["privacy"] = {"epsilon": 2, "delta": 1e-6}
    experiment["plan"]["cohort"] |= {"upload_slot": SLOT, "upload_deadline": 20}


def config(league: Any, name: str) -> ClientConfig:
    return load(ClientConfig, league.shops[name] / "hanse-client.yaml")


def operate(league: Any, *words: str) -> str:
    """Run one of the operator's commands and return what it says."""
    done = subprocess.run(
        [command("hanse-server"), *words, "--config", str(league.server_config)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def signed(league: Any, first: date) -> Plan:
    """Have the operator sign a plan for the seven days from `first` on and name it to the server; return it."""
    settings = yaml.safe_load(league.server_config.read_text())
    settings["plan"]["training"] = {
        "mode": "trends", "first_day": first.isoformat(), "days": 7, "expected_batch": 500, "repeats": 2,
    }  # fmt: skip
    file = league.server_config.with_name(f"{first}.hanse")
    settings["service"]["plan"] = file.name
    league.server_config.write_text(yaml.safe_dump(settings))
    operate(league, "sign", "--out", str(file))
    return wire.decode(Plan, wire.decode(SignedPlan, file.read_bytes()).plan)


def noted(league: Any, name: str, monday: date) -> None:
    """Have the shop's shoppers search as `WEEKS` says, in the two weeks from `monday` on."""
    day = [monday]
    log = QueryLog(config(league, name).state / "queries.sqlite", 35, lambda: day[0])
    for week in WEEKS:
        for label, count in week.items():
            for _ in range(count):
                log.note(label)
            day[0] += timedelta(days=2)
        day[0] = monday + timedelta(days=7)


def searched(league: Any, name: str, day: date) -> Counter[str]:
    """Search one shop by photos of its own, let it be on `day`, and return how often each class was recognized."""
    plan = wire.decode(Plan, league.signed_plan.plan)
    weights = np.random.default_rng(3).normal(size=plan.recipe.dimension(10)).astype(np.float32)
    Recognizer.create(
        plan.recipe, plan.taxonomy, weights, created=datetime.now(UTC), metrics={}, epsilon=1.0, delta=1e-6,
        plan_digest=bytes(32),
    ).save(league.folder / "recognizer")  # fmt: skip
    league.edit_shop(name, lambda shop: shop.update(recognizer=str(league.folder / "recognizer")))
    photos = sorted((league.shops[name] / "photos").rglob("*.png"))[:25]
    found: Counter[str] = Counter()
    with Recognition.open(config(league, name), follow=True) as recognition:
        for photo in photos:
            with Image.open(photo) as image:
                found[recognition.classify(image, top=1).classes[0].label] += 1
                recognition.search(image)
    with sqlite3.connect(config(league, name).state / "queries.sqlite") as db:  # the day goes by
        for label, count in found.items():
            now = (datetime.now(UTC).date().isoformat(), label)
            (kept,) = db.execute("SELECT count FROM query WHERE day = ? AND class = ?", now).fetchone()
            assert kept == count
            db.execute("UPDATE query SET day = ? WHERE day = ? AND class = ?", (day.isoformat(), *now))
    return found


def paid(league: Any) -> dict[str, list[tuple[bytes, int]]]:
    """Return what each shop paid for: plan and attempt."""
    charges = {name: [event.charge for event in league.ledger(name).events()] for name in league.shops}
    return {name: [(one.plan_digest, one.attempt) for one in each] for name, each in charges.items()}


def counted(league: Any) -> list[TrendsReport]:
    """Return what `hanse-server trends` shows."""
    shown = json.loads(operate(league, "trends", "--json"))
    return [TrendsReport.model_validate_json(json.dumps(one)) for one in shown]


def finished(league: Any, server: subprocess.Popen[bytes]) -> None:
    league.until("the server to end", lambda: server.poll() is not None)
    assert server.returncode == 0, league.text("server")
    assert league.events("counted") and not league.events("published")


def require_true(report: TrendsReport, true: Counter[str]) -> None:
    """Hold noisy counts against true ones: 6 of 10 intervals have them, which fails once in 10⁵; all are within 6 σ."""
    found = {each.name: each.queries for each in report.classes}
    deviation = max(each.high - each.value for each in found.values()) / 1.96  # below zero intervals are cut
    assert sum(each.low <= true[name] <= each.high for name, each in found.items()) >= 6, found
    assert all(abs(each.value - true[name]) <= 6 * deviation for name, each in found.items()), found
    assert report.merchants == len(COUNTING) and report.epsilon <= 2


@pytest.mark.slow
def test_two_weeks_are_counted_once_each_by_the_shops_that_allow_it(make_league: Callable[..., Any]) -> None:
    league = make_league(change=slowly)
    today = datetime.now(UTC).date()
    mondays = (today - timedelta(days=14), today - timedelta(days=7))
    for name in league.shops:
        league.edit_shop(name, lambda shop: shop["policy"].update(epsilon=4, delta=2e-6))
    for name in COUNTING:
        league.edit_shop(name, lambda shop: shop["policy"].update(modes=["local", "trends"]))
        noted(league, name, mondays[0])
    true = [Counter({label: 3 * count for label, count in week.items()}) for week in WEEKS]
    true[1] += searched(league, "alder", mondays[1] + timedelta(days=3))

    before = signed(league, mondays[0])
    server = league.start_server()
    league.start_shops()
    league.until("all to pay", lambda: all(league.ledger(name).counter for name in COUNTING))
    os.kill(server.pid, signal.SIGKILL)  # the uploads are held back still: this sum is lost
    server.wait()
    assert not league.events("round")
    finished(league, league.start_server(verb="resume"))
    (event,) = league.events("round")
    assert event["uploaded"] == list(COUNTING)
    (report,) = counted(league)
    assert (report.first_day, report.plan) == (mondays[0].isoformat(), before.digest.hex())
    require_true(report, true[0])
    assert all(each.growth is None for each in report.classes)
    attempts = [(before.digest, 0), (before.digest, 1)]
    assert paid(league) == dict.fromkeys(COUNTING, attempts) | {REFUSING: []}
    assert all(league.ledger(name).spent().epsilon == pytest.approx(before.epsilon()) for name in COUNTING)

    after = signed(league, mondays[1])
    told = league.text("server")
    league.log("server").unlink()
    server = league.start_server()
    league.until("the sum", lambda: league.events("round"))
    os.kill(server.pid, signal.SIGKILL)  # at the end of the run, or just before: nobody is to be asked again
    server.wait()
    finished(league, league.start_server(verb="resume"))
    assert len(league.events("round")) == 1
    attempts.append((after.digest, 0))
    assert paid(league) == dict.fromkeys(COUNTING, attempts) | {REFUSING: []}
    first, second = counted(league)
    assert first == report
    assert (second.first_day, second.plan) == (mondays[1].isoformat(), after.digest.hex())
    require_true(second, true[1])
    growth = {each.name: each.growth for each in second.classes}
    sneaker, bag = growth["Sneaker"], growth["Bag"]
    assert sneaker is not None and sneaker.low > 0.5 and bag is not None and bag.high < 0
    assert sneaker.value == pytest.approx(true[1]["Sneaker"] / true[0]["Sneaker"] - 1, abs=0.5)
    assert growth["Dress"] is None

    assert f"{REFUSING} does not take part in this block (policy)." in told + league.text("server")
    refusals = league.text(REFUSING).count("Not taking part now (policy): mode: found 'trends'")
    assert refusals == 3, "it is asked once a block, and never again in it"
    assert "Looking through your photos" not in league.text(REFUSING)
