"""Mode `distributed` across real daemons: many masked steps of ten merchants, and a crash in the middle."""

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from hanse_common import wire
from hanse_common.plan import Plan
from hanse_common.vision.recognizer import Recognizer

STEPS = 200
WAIT = 400.0


def many_steps(experiment: dict[str, Any]) -> None:
    experiment["data"] |= {"merchants": 10, "photos_per_merchant": 200}
    plan = experiment["plan"]
    plan["recipe"] = {
        "preprocessing": {"size": 28, "channels": 1},
        "backbone": {"name": "scattering", "projection": {"dimensions": 2000}, "norm": 5},
    }
    plan["training"] = {
        "mode": "distributed",
        "rounds": STEPS,
        "repeats": 5,
        "sampling_rate": 0.2,
        "expected_batch": 360,
        "clipping_norm": 1.5,
    }
    plan["cohort"] |= {"min_merchants": 8, "max_merchants": 10, "upload_slot": 0.1, "upload_deadline": 30}
    experiment["optimization"] |= {
        "optimizer": {"name": "fedavgm", "learning_rate": 1, "momentum": 0.9},
        "schedule": {"name": "linear"},
    }


@pytest.mark.slow
def test_two_hundred_masked_steps_of_ten_merchants_with_a_crash_in_the_middle(
    make_league: Callable[..., Any],
) -> None:
    league = make_league(change=many_steps)
    league.edit_server(lambda service: service["blocks"].update(rounds=20, patience=90, gather=90))
    plan = wire.decode(Plan, league.signed_plan.plan)
    assert plan.training.mode == "distributed"
    assert plan.dimension == 20_010
    server = league.start_server()
    league.start_shops()
    league.until("a first round", lambda: league.events("round"), WAIT)
    started = time.monotonic()
    league.until("half of the rounds", lambda: len(league.events("round")) >= STEPS // 2, WAIT)
    os.kill(server.pid, signal.SIGKILL)
    server.wait()
    seconds = time.monotonic() - started
    done = len(league.events("round"))
    league.log("server").rename(league.folder / "server-before.log")
    again = league.start_server(verb="resume")
    league.until("the next round", lambda: league.events("round"))
    started = time.monotonic()
    assert league.events("round")[0]["round"] == done + 1
    league.until("the server to end", lambda: again.poll() is not None, WAIT)
    seconds += time.monotonic() - started
    assert again.returncode == 0, league.text("server")
    rounds = [event["round"] for event in league.events("round")]
    assert rounds == list(range(done + 1, STEPS + 1))
    print(f"{STEPS} masked steps of ten merchants: {seconds:.0f} s")
    recognizer = Recognizer.load(league.folder / "server" / "state" / "recognizer")
    assert recognizer.card.epsilon == pytest.approx(plan.epsilon())
    for name in league.shops:
        ledger = league.ledger(name)
        assert STEPS <= ledger.counter <= STEPS + 2  # a round that was open is paid again
        assert ledger.spent().epsilon == pytest.approx(plan.epsilon())
