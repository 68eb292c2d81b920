"""A league of five in which merchants' daemons and nodes are killed, twenty times, at random moments."""

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from hanse_common import wire
from hanse_common.plan import Plan

KILLS, NODES = 20, 4
"""How many processes are killed, and how many of them are nodes, which Flower then keeps out for a minute."""

ROUNDS, REPEATS = 120, 30
SEED = 20
WAIT = 240.0


def five(experiment: dict[str, Any]) -> None:
    experiment["data"] |= {"merchants": 5}
    experiment["plan"]["cohort"] |= {
        "min_merchants": 3, "max_merchants": 5, "upload_slot": 0.2, "join_deadline": 6, "upload_deadline": 6,
    }  # fmt: skip


@pytest.mark.slow
def test_twenty_kills_lose_no_charge_repeat_no_answer_and_stop_no_training(
    make_league: Callable[..., Any], helpers: Any
) -> None:
    league = make_league(rounds=ROUNDS, repeats=REPEATS, attempts=REPEATS, change=five)
    league.edit_server(lambda service: service["blocks"].update(rounds=4, patience=180, gather=2))
    server = league.start_server()
    league.start_shops()
    chance = random.Random(SEED)
    kinds = ["node"] * NODES + ["daemon"] * (KILLS - NODES)
    chance.shuffle(kinds)
    returning: dict[str, float] = {}
    killed: Counter[str] = Counter()

    def come_back() -> None:
        for name in [name for name, when in returning.items() if when <= time.monotonic()]:
            del returning[name]
            league.start_shop(name)

    def rounds() -> int:
        come_back()
        assert server.poll() is None, league.text("server")
        return len(league.events("round"))

    for kind in kinds:
        target = rounds() + chance.randint(1, 3)
        league.until("more rounds", lambda target=target: rounds() >= target, WAIT)
        time.sleep(chance.uniform(0.0, 0.5))  # anywhere within a round, or between two blocks
        there = [name for name in league.events("round")[-1]["uploaded"] if name not in returning]
        name = chance.choice(there or sorted(league.shops.keys() - returning.keys()))
        daemon = league.running[name]
        nodes = helpers.children(daemon.pid)
        killed[kind] += 1
        if kind == "node" and nodes:
            os.kill(nodes[0], signal.SIGKILL)  # its daemon starts another
            continue
        os.kill(daemon.pid, signal.SIGKILL)
        daemon.wait()
        returning[name] = time.monotonic() + chance.choice((0.0, chance.uniform(0.0, 6.0)))
    assert sum(killed.values()) == KILLS and len(league.events("round")) < ROUNDS
    league.until("everyone to be back", lambda: rounds() >= 0 and not returning, WAIT)
    league.until("the server to end", lambda: server.poll() is not None, WAIT)
    assert server.returncode == 0, league.text("server")

    plan = wire.decode(Plan, league.signed_plan.plan)
    done = league.events("round")
    assert [event["round"] for event in done] == list(range(1, ROUNDS + 1))
    assert all(len(event["uploaded"]) >= plan.cohort.min_merchants for event in done)
    assert all(event["blamed"] == [] for event in done), (
        "nobody answered twice, or unasked, or for other work"
    )
    assert all("repeated" not in event["declined"].values() for event in done)
    for name in league.shops:
        ledger = league.ledger(name)  # reads and checks all of it
        works = [(event.charge.round, event.charge.attempt) for event in ledger.events()]
        assert works == sorted(set(works)), "each round's photos were used once in an attempt"
        charges = Counter(round_ for round_, _ in works)
        uploaded = {event["round"] - 1 for event in done if name in event["uploaded"]}
        assert uploaded <= charges.keys(), f"{name} uploaded without a charge"
        for round_ in range(ROUNDS):
            sent = league.text(name).count(f"Round {round_ + 1} of {ROUNDS}: trained, charged, sent.")
            assert sent <= charges[round_], f"{name} sent more of round {round_ + 1} than it paid for"
        assert ledger.spent().epsilon <= plan.epsilon()
        assert ledger.spent().plans[0].steps == len(works) <= ROUNDS + REPEATS
    print(f"{KILLS} kills ({dict(killed)}) in {ROUNDS} rounds; uploads {[len(e['uploaded']) for e in done]}")
