"""`hanse-sim demo` as a person types it: however it ends, no process stays."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hanse_simulations.processes import command

WAIT = 120.0


class Demo:
    """The demo as a process, with all that it started."""

    def __init__(self, league: Any) -> None:
        self.folder: Path = league.folder / "demo"
        self.output = league.folder / "demo.log"
        words = [command("hanse-sim"), "demo", "--folder", str(self.folder)]
        words += ["--experiment", str(league.folder / "experiment.yaml")]
        with self.output.open("wb") as log:
            self.process = subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True)

    def said(self) -> str:
        return self.output.read_text(errors="replace")

    def until(self, what: str, true: Callable[[], Any]) -> None:
        given_up = time.monotonic() + WAIT
        while not true():
            if time.monotonic() > given_up:
                logs = "\n".join(path.read_text()[-2000:] for path in self.folder.rglob("*.log"))
                pytest.fail(f"waited in vain for: {what}\n{self.said()}\n{logs}")
            time.sleep(0.05)

    def until_end(self) -> int:
        self.until("the end", lambda: self.process.poll() is not None)
        return self.process.wait()

    def until_rounds(self) -> None:
        log = self.folder / "server" / "server.log"
        self.until(
            "rounds, or an early end",
            lambda: self.process.poll() is not None or (log.exists() and "Round 2" in log.read_text()),
        )
        assert self.process.poll() is None, self.said()

    def descendants(self, helpers: Any) -> dict[int, str]:
        found: dict[int, str] = {}
        border = [self.process.pid]
        while border:
            border = [child for pid in border for child in helpers.children(pid)]
            for pid in border:
                found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        return found


@pytest.fixture
def demo(make_league: Callable[..., Any]) -> Iterator[Callable[..., Demo]]:
    made: list[Demo] = []

    def start(**training: Any) -> Demo:
        made.append(Demo(make_league(**training)))
        return made[-1]

    yield start
    for one in made:
        if one.process.poll() is None:
            one.process.terminate()
            one.process.wait(WAIT)


@pytest.mark.slow
def test_a_demo_of_processes(demo: Callable[..., Demo], helpers: Any) -> None:
    running = demo()
    code = running.until_end()
    said = running.said()
    assert code == 0, said
    assert "5 processes started" in said
    assert "rounds 6/6, 4 merchants, accuracy" in said
    assert re.search(r"Accuracy \d+\.\d %", said)
    assert (running.folder / "result" / "recognizer" / "card.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_leaves_nobody(
    demo: Callable[..., Demo], helpers: Any, number: signal.Signals
) -> None:
    running = demo(rounds=900)
    running.until_rounds()
    everyone = running.descendants(helpers)
    assert len(everyone) == 9, everyone  # a server, four daemons, four nodes
    os.kill(running.process.pid, number)
    assert running.until_end() == 130
    running.until("everyone to be gone", lambda: not any(map(helpers.lives, everyone)))
    assert "Traceback" not in running.said()


@pytest.mark.slow
def test_a_failing_round_ends_the_demo_and_leaves_nobody(demo: Callable[..., Demo], helpers: Any) -> None:
    running = demo(rounds=900)
    running.until_rounds()
    everyone = running.descendants(helpers)
    for pid, line in everyone.items():
        if "hanse-client" in line and "/alder/" not in line:
            os.kill(pid, signal.SIGKILL)
    assert running.until_end() == 16, running.said()
    said = " ".join(running.said().split())
    # It looks as they are killed, and two are too many already.
    assert re.search(r"[23] of 4 shops' daemons ended by themselves, and the league needs 3", said)
    running.until("everyone to be gone", lambda: not any(map(helpers.lives, everyone)))
