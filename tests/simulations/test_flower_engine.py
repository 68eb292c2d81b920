"""Flower's own engine: the same model to the bit, faults that are told, and nothing left behind."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.app import RecordDict
from numpy.typing import NDArray

from hanse_client.ledger import Ledger
from hanse_common import wire
from hanse_common.config import load
from hanse_common.errors import ConfigError, RoundFailed
from hanse_common.flower import to_record
from hanse_common.plan import Plan
from hanse_server.league import RoundReport
from hanse_simulations import cli, results, run, shops
from hanse_simulations.experiment import Experiment
from hanse_simulations.flower_engine import FlowerLeague, FlowerRounds, WatchedGrid
from hanse_simulations.flower_merchant import Answer, Order, answer
from hanse_simulations.simulation import League, seeded_members, train_with

Write = Callable[..., Path]
Told = list[tuple[str, str]]
HANSE_SIM = Path(sys.executable).with_name("hanse-sim")


@pytest.fixture
def experiment(write_experiment: Write) -> Experiment:
    return load(Experiment, write_experiment())


class Reply:
    """What the engine reads of a Flower message."""

    def __init__(self, data: bytes = b"", error: str | None = None) -> None:
        self.content: RecordDict = to_record(data)
        self.error = SimpleNamespace(reason=error)

    def has_error(self) -> bool:
        return self.error.reason is not None


@dataclass
class Direct(WatchedGrid):
    """The worker's side without Flower, Ray and processes; `change` puts something in a reply's place."""

    folder: Path
    cache: Path
    merchants: int = 3
    change: Callable[[int, bytes], Reply] = lambda partition, data: Reply(data)

    def exchange(self, data: bytes, patience: float) -> Iterator[Any]:
        for partition in reversed(range(self.merchants)):
            yield self.change(partition, answer(self.folder, self.cache, partition, data))


def direct(
    experiment: Experiment, folder: Path, told: Told, **grid: Any
) -> tuple[FlowerLeague, FlowerRounds]:
    """Return a league whose result folder is `folder`, and rounds for it in this process."""
    folder.mkdir()
    results.write_config(experiment, folder)
    cache = folder.parent / "embeddings.sqlite"
    league = FlowerLeague.assemble(experiment, folder, cache, lambda name, text: told.append((name, text)))
    rounds = FlowerRounds(
        Direct(league.folder, league.cache, **grid),
        league.plan,
        tuple(league.ledgers),
        league.progress.next_attempt,
        2,
        league.tell,
    )
    return league, rounds


def zeros(plan: Plan) -> NDArray[np.float32]:
    return np.zeros(plan.dimension, dtype=np.float32)


def test_the_same_model_as_in_one_process(experiment: Experiment, tmp_path: Path) -> None:
    told: Told = []
    league, rounds = direct(experiment, tmp_path / "flower", told)
    model = train_with(rounds, experiment, league.progress, lambda report: None)

    made = shops.make_shops(experiment, league.cache, tmp_path / "none", "cpu", lambda done, total: None)
    members = seeded_members(experiment, made.merchants, tmp_path / "local", run.tell)
    local = League.assemble(experiment, members, tmp_path / "local")
    assert model.tobytes() == local.train().tobytes()
    assert told == []

    def paid(ledgers: Any) -> dict[str, Any]:
        return {
            name: [event.charge for event in Ledger(one.path, one.budget).events()]
            for name, one in ledgers.items()
        }

    assert paid(league.ledgers) == paid(local.ledgers)
    assert {len(charges) for charges in paid(league.ledgers).values()} == {4}


class Stop(Exception):
    pass


def test_the_other_engine_goes_on_with_it(experiment: Experiment, tmp_path: Path) -> None:
    league, rounds = direct(experiment, tmp_path / "whole", [])
    whole = train_with(rounds, experiment, league.progress, lambda report: None)

    def stop(report: RoundReport) -> None:
        if report.round == 1:
            raise Stop

    league, rounds = direct(experiment, tmp_path / "parts", [])
    with pytest.raises(Stop):
        train_with(rounds, experiment, league.progress, stop)
    made = shops.make_shops(experiment, league.cache, tmp_path / "none", "cpu", lambda done, total: None)
    members = seeded_members(experiment, made.merchants, tmp_path / "parts", run.tell)
    rest = League.assemble(experiment, members, tmp_path / "parts").train()
    assert rest.tobytes() == whole.tobytes()
    assert {ledger.counter for ledger in league.ledgers.values()} == {4}


def test_who_has_paid_already_declines_and_is_heard(experiment: Experiment, tmp_path: Path) -> None:
    told: Told = []
    league, rounds = direct(experiment, tmp_path / "a", told)
    rounds.run(1, zeros(league.plan))
    with pytest.raises(RoundFailed, match=r"Round 1 of 4 failed\. attempt 0: 0 of 3 .* \(repeated\)"):
        rounds.run(0, zeros(league.plan))
    assert {name for name, _ in told} == {"alder", "birch", "cedar"}
    assert all("declined (repeated): Plan " in text for _, text in told)
    assert [ledger.counter for ledger in league.ledgers.values()] == [1, 1, 1]


def test_a_ledger_that_is_damaged_is_told_and_the_others_go_on(
    write_experiment: Write, tmp_path: Path
) -> None:
    told: Told = []
    cohort = {"min_merchants": 3, "max_merchants": 4}
    four = load(Experiment, write_experiment({"data.merchants": 4, "plan.cohort": cohort}))
    league, rounds = direct(four, tmp_path / "a", told, merchants=4)
    league.ledgers["birch"].path.write_bytes(b"half a ledger")
    outcome = rounds.run(0, zeros(league.plan))
    assert outcome.uploaded == ("alder", "cedar", "damson")
    assert outcome.dropped == ("birch",)
    assert outcome.declined == {"birch": "unavailable"}
    ((name, text),) = told
    assert name == "birch"
    assert "Round 1: declined (unavailable): " in text
    assert "ledger" in text


def test_what_a_step_logs_is_heard(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise MemoryError("no room")

    told: Told = []
    league, rounds = direct(experiment, tmp_path / "a", told)
    monkeypatch.setattr("hanse_client.examples.poisson_sample", broken)
    assert rounds.run(0, zeros(league.plan)).uploaded == ("alder", "birch", "cedar")
    assert len(told) == 3
    assert "contributes noise alone. (MemoryError('no room'))" in told[0][1]


def other_round(data: bytes) -> Reply:
    reply = wire.decode(Answer, data)
    return Reply(wire.encode(reply.model_copy(update={"round": reply.round + 1})))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda data: Reply(error="<class 'X'>:<'\x1b[31mdied\nand more"),
            r"an error: <class 'X'>:<'\[31mdied;",
        ),
        (lambda data: Reply(b"\x00"), "Answer: "),
        (other_round, "another order"),
        (
            lambda data: Reply(wire.encode(wire.decode(Answer, data).model_copy(update={"vector": b"12"}))),
            "words",
        ),
    ],
    ids=["error", "bytes", "round", "length"],
)
def test_replies_that_are_none_are_left_out(
    experiment: Experiment, tmp_path: Path, change: Callable[[bytes], Reply], match: str
) -> None:
    told: Told = []
    league, rounds = direct(
        experiment,
        tmp_path / "a",
        told,
        change=lambda partition, data: Reply(data) if partition == 0 else change(data),
    )
    with pytest.raises(RoundFailed, match=match):
        rounds.run(0, zeros(league.plan))
    assert len(told) == 4  # of two merchants in two attempts


def test_an_order_for_another_plan_touches_nothing(experiment: Experiment, tmp_path: Path) -> None:
    league, _ = direct(experiment, tmp_path / "a", [])
    order = Order(plan_digest=bytes(32), round=0, attempt=0, model=b"")
    reply = wire.decode(Answer, answer(league.folder, league.cache, 0, wire.encode(order)))
    assert (reply.merchant, reply.code, reply.vector) == ("alder", "malformed", b"")
    assert league.ledgers["alder"].counter == 0


@pytest.fixture
def refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[[Path], str]:
    """Return a function that types `hanse-sim run … --engine flower`, which is refused, and returns the error."""

    def type_in(path: Path) -> str:
        out = tmp_path / "results"
        monkeypatch.setattr(
            "sys.argv", ["hanse-sim", "run", str(path), "--engine", "flower", "--results", str(out)]
        )
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == ConfigError.exit_code
        assert not out.exists()
        return capsys.readouterr().err

    return type_in


def test_without_ray_it_says_what_to_install(
    write_experiment: Write, refused: Callable[[Path], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    (line,) = refused(write_experiment()).splitlines()
    assert line.startswith("error: --engine flower: ")
    assert "pip install 'hanse[flower-simulation]'" in line


def test_lost_replies_are_the_local_engines_alone(
    write_experiment: Write, refused: Callable[[Path], str]
) -> None:
    assert "dropout_rate: found 0.1; Flower" in refused(write_experiment({"dropout_rate": 0.1}))


def running(session: int) -> list[str]:
    """Return what runs in a session of processes."""
    command = ["ps", "-ww", "-o", "stat=,args=", "-s", str(session)]
    lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    return [line for line in lines if not line.startswith("Z")]


def left(session: int) -> list[str]:
    """Return what still runs after the seconds in which Ray's workers notice that the rest is gone."""
    deadline = time.monotonic() + 20
    while running(session) and time.monotonic() < deadline:
        time.sleep(0.1)
    return running(session)


def typed(*words: object) -> tuple[int, str, list[str]]:
    """Run a command in a session of its own; return its exit code, its output and what it left running."""
    command = [*map(str, words)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            text, _ = process.communicate(timeout=300)
        finally:
            process.kill()
    return process.returncode, text, left(process.pid)


@pytest.mark.slow
def test_on_ray_the_same_figures_as_in_one_process(write_experiment: Write, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    path = write_experiment({"whiten": {"dimensions": 20, "photos": 100}})
    command = (HANSE_SIM, "run", path, "--results", tmp_path / "results")
    found = []
    for number, engine in enumerate(("local", "flower"), start=1):
        code, text, rest = typed(*command, "--engine", engine)
        assert code == 0, text
        assert rest == []
        figures = json.loads((tmp_path / "results" / "tiny" / f"run-00{number}" / "result.json").read_text())
        del figures["seconds"]
        found.append(figures)
    assert found[0] == found[1]
    # As tidy as the local engine: one line more, which says what is missing.
    assert "without secure aggregation" in text
    assert [line.split()[0] for line in text.splitlines()] == [
        "embedding", "Flower's", "rounds", "rounds", "rounds", "rounds", "accuracy",
    ]  # fmt: skip

    # A round that fails ends in order, too: from scratch with the old ledgers, everyone has paid.
    folder = tmp_path / "results" / "tiny" / "run-002"
    (folder / "server").rename(tmp_path / "forgotten")
    code, text, rest = typed(*command, "--engine", "flower", "--resume", folder)
    assert code == RoundFailed.exit_code
    assert "cedar: Round 1: declined (repeated)" in text
    assert "error: Round 1 of 4 failed." in text.splitlines()[-1]
    assert rest == []


SLEEPERS = """
import time
from hanse_simulations.flower_engine import engine

def merchant(message, context):
    time.sleep(600)

with engine(merchant, 2, 10) as grid:
    print("up", flush=True)
    list(grid.exchange(b"", 600.0))
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_stopped_in_the_middle_it_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    script = tmp_path / "sleepers.py"
    script.write_text(SLEEPERS)
    with subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "up\n"
            time.sleep(3)
            scratch = re.search(r"/[\w/]*/hanse-ray-\w+", " ".join(running(process.pid)))
            assert scratch is not None
            assert Path(scratch[0]).is_dir()
            os.kill(process.pid, number)
            process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode != 0
    assert left(process.pid) == []
    assert not Path(scratch[0]).exists()
