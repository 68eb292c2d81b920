"""A league of four whose server is killed, twenty times, at random moments; its merchants stay up throughout."""

import os
import random
import signal
import sqlite3
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml

from hanse_common import signing, wire
from hanse_common.config import load
from hanse_common.plan import Plan, SignedPlan
from hanse_common.vision.recognizer import Recognizer
from hanse_server.audit import verify
from hanse_server.config import ServerConfig, make_evaluation_plan
from hanse_server.storage import State

KILLS, EARLY = 20, 7
"""How often the server is killed, and how often of that while it starts or gathers; the rest is while it trains."""

ROUNDS, EVERY = 90, 15
SEED = 41
WAIT = 240.0


def with_evaluation(league: Any) -> Plan:
    """Have the league's models tried every so many rounds, and return the plan for that."""
    text = yaml.safe_load(league.server_config.read_text())
    text["evaluation"] = {
        "privacy": {"epsilon": 2, "delta": 1e-6}, "holdout": 24, "times": ROUNDS // EVERY, "repeats": KILLS,
        "every": EVERY,
    }  # fmt: skip
    text["service"]["evaluation"] = "evaluation.hanse"
    league.server_config.write_text(yaml.safe_dump(text))
    config = load(ServerConfig, league.server_config)
    assert config.evaluation is not None
    plan = make_evaluation_plan(config.plan, config.evaluation, os.urandom(16))
    signed = SignedPlan.sign(plan, signing.load_key(config.signing_key))
    (league.server_config.parent / "evaluation.hanse").write_bytes(wire.encode(signed))
    for name in league.shops:
        league.edit_shop(name, lambda settings: settings["policy"].update(epsilon=20, delta=1e-4))
    return plan


class Records:
    """What is on the server's disk, read as it is while the server writes."""

    def __init__(self, league: Any, plan: Plan) -> None:
        self._path = league.folder / "server" / "state" / "hanse.sqlite"
        self._plan = plan.digest.hex()

    def count(self, query: str) -> int:
        if not self._path.exists():
            return 0
        try:
            with closing(sqlite3.connect(f"{self._path.as_uri()}?mode=ro", uri=True)) as db:
                return db.execute(query, (self._plan,)).fetchone()[0]
        except sqlite3.OperationalError:  # it was killed before there were tables
            return 0

    def begun(self) -> bool:
        return self.count("SELECT count(*) FROM attempt WHERE plan = ?") > 0

    def applied(self) -> int:
        return self.count("SELECT count(*) FROM round WHERE state = 'applied' AND plan = ?")


@pytest.mark.slow
def test_twenty_kills_of_the_server_lose_no_sum_and_no_charge_and_the_training_ends(
    make_league: Callable[..., Any],
) -> None:
    league = make_league(rounds=ROUNDS, repeats=KILLS, attempts=5)
    league.edit_server(lambda service: service["blocks"].update(rounds=6, patience=180, gather=2))
    # Flower's own state is in a file, too, and dies with the server.
    league.edit_server(lambda service: service.update(database="flower.sqlite"))
    evaluation = with_evaluation(league)
    plan = wire.decode(Plan, league.signed_plan.plan)
    records = Records(league, plan)
    chance = random.Random(SEED)
    kinds = ["early"] * EARLY + ["training"] * (KILLS - EARLY)
    chance.shuffle(kinds)
    league.start_shops()

    def start() -> Any:
        return league.start_server(verb="resume" if records.begun() else "run")

    def lives() -> bool:
        assert server.poll() is None, league.text("server")
        return True

    moments = []
    began = time.monotonic()
    for kind in kinds:
        server = start()  # on the ports of the one before, at once
        before = records.applied()
        if kind == "early":
            time.sleep(chance.uniform(0.0, 8.0))
        else:
            target = min(before + chance.randint(1, 5), ROUNDS - 1)
            league.until("more rounds", lambda target=target: lives() and records.applied() >= target, WAIT)
            # Anywhere within a round or an evaluation, or between two blocks.
            time.sleep(chance.uniform(0.0, 0.6))
        lives()
        os.kill(server.pid, signal.SIGKILL)
        server.wait()
        moments.append(f"{kind} after {records.applied()}")
    print(f"{KILLS} kills in {time.monotonic() - began:.0f} s, by seed {SEED}: {', '.join(moments)}")
    assert records.applied() < ROUNDS
    server = start()
    league.until("the server to end", lambda: server.poll() is not None, WAIT)
    assert server.returncode == 0, league.text("server")
    assert all(league.running[name].poll() is None for name in league.shops)
    league.processes.stop()
    require_sound(league, plan, ROUNDS)
    require_sound(league, evaluation, ROUNDS // EVERY)
    require_whole_state(league.folder / "server", plan)


def require_sound(league: Any, plan: Plan, rounds: int) -> None:
    """Hold the server's rounds of a plan against all ledgers."""
    with closing(sqlite3.connect(league.folder / "server" / "state" / "hanse.sqlite")) as db:
        digest = plan.digest.hex()
        query = "SELECT number, attempt, state, survivors FROM round WHERE plan = ? ORDER BY number"
        recorded = db.execute(query, (digest,)).fetchall()
        query = "SELECT round, name FROM participant WHERE plan = ? AND role = 'uploaded'"
        uploaded = db.execute(query, (digest,)).fetchall()
        query = "SELECT number FROM attempt WHERE plan = ? ORDER BY number"
        attempts = [number for (number,) in db.execute(query, (digest,))]
        blamed = db.execute("SELECT * FROM participant WHERE role = 'blamed'").fetchall()
    assert [number for number, *_ in recorded] == list(range(rounds))
    assert {state for _, _, state, _ in recorded} == {"applied"}
    assert attempts == list(range(len(attempts)))
    assert blamed == [], "nobody answered twice, or unasked, or for other work"
    took_part = Counter(round_ for round_, _ in uploaded)
    assert all(took_part[number] == survivors >= 3 for number, _, _, survivors in recorded)
    attempt_of = {number: attempt for number, attempt, *_ in recorded}
    again = []
    for name in league.shops:
        ledger = league.ledger(name)  # reads and checks all of it
        charges = [event.charge for event in ledger.events() if event.charge.plan_digest == plan.digest]
        works = [(charge.round, charge.attempt) for charge in charges]
        assert works == sorted(set(works)), "each round's photos were used once in an attempt"
        assert {attempt for _, attempt in works} <= set(attempts), "no attempt was asked for unrecorded"
        paid = {(round_, attempt_of[round_]) for round_, who in uploaded if who == name}
        assert paid <= set(works), f"{name} is in a sum that it did not pay for"
        assert len(works) <= rounds + KILLS, "a kill costs a merchant one round more at most"
        sent = league.text(name).count(f" of {rounds}: trained, charged, sent.")
        assert sent <= len(works), f"{name} sent more than it paid for"
        again.append(len(works) - len({round_ for round_, _ in works}))
    print(f"{plan.training.mode}: {rounds} rounds, {len(attempts)} attempts, paid again {again}")


def require_whole_state(folder: Path, plan: Plan) -> None:
    """Hold the server's records against each other."""
    with State.open(folder / "state") as state:
        verify(state.audit.entries())
        checkpoint = state.checkpoint(plan.digest)
        assert checkpoint is not None and checkpoint.rounds_done == ROUNDS
        records = state.history.evaluations(plan.digest)
        assert [record.after for record in records] == list(range(EVERY, ROUNDS + 1, EVERY))
        (version,) = state.versions.all()
        assert version.state == "candidate"
        recognizer = Recognizer.load(folder / "state" / "recognizer")
        assert recognizer.digest().hex() == version.digest
        last = state.history.last_run()
        assert last is not None and last.state == "finished"
        with state.alone():
            assert state.collect() == 0, "nothing was left over"
