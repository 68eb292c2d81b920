"""Processes that end with their block, whoever wants it to end and however they take it."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hanse_simulations.processes import Processes, command, free_ports

WAIT = 30.0

CHILD = """
import os, pathlib, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path("asked").touch(), STUBBORN or sys.exit()))
grandchild = subprocess.Popen(["sleep", "60"])
pathlib.Path("pids.new").write_text(f"{os.getpid()} {grandchild.pid}")
os.replace("pids.new", "pids")
while True:
    time.sleep(60)
"""

PARENT = """
import pathlib, sys, time
from hanse_simulations import processes
processes.GRACE_SECONDS = 2
with processes.Processes() as running:
    running.start("child", [sys.executable, "-c", pathlib.Path("child.py").read_text()], pathlib.Path("log"))
    time.sleep(60)
"""


def until(true: Callable[[], Any]) -> None:
    given_up = time.monotonic() + WAIT
    while not true():
        assert time.monotonic() < given_up
        time.sleep(0.02)


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def write_child(folder: Path, stubborn: bool) -> None:
    (folder / "child.py").write_text(f"STUBBORN = {stubborn}\n{CHILD}")


@pytest.mark.parametrize("stubborn", [False, True])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_everyone_and_a_second_one_does_not_break_that_off(
    tmp_path: Path, number: signal.Signals, stubborn: bool
) -> None:
    write_child(tmp_path, stubborn)
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT], cwd=tmp_path, stderr=subprocess.PIPE, start_new_session=True
    )
    until((tmp_path / "pids").exists)
    pids = [int(word) for word in (tmp_path / "pids").read_text().split()]
    os.kill(parent.pid, number)
    until((tmp_path / "asked").exists)
    for again in (signal.SIGTERM, signal.SIGINT):
        os.kill(parent.pid, again)
    said = parent.communicate(timeout=WAIT)[1]
    assert b"KeyboardInterrupt" in said  # as for a Ctrl-C, also for a SIGTERM
    assert parent.returncode != 0
    until(lambda: not any(map(lives, pids)))


def test_an_error_in_the_block_ends_everyone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_child(tmp_path, stubborn=False)
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError), Processes() as processes:
        processes.start("child", [sys.executable, str(tmp_path / "child.py")], tmp_path / "log")
        until((tmp_path / "pids").exists)
        raise RuntimeError
    pids = [int(word) for word in (tmp_path / "pids").read_text().split()]
    until(lambda: not any(map(lives, pids)))
    assert signal.getsignal(signal.SIGTERM) is before


def test_some_are_ended_and_others_stay(tmp_path: Path) -> None:
    with Processes() as processes:
        one, other = (processes.start(name, ["sleep", "60"], tmp_path / "log") for name in ("one", "other"))
        processes.stop("one")
        assert (one.poll(), other.poll()) == (-signal.SIGTERM, None)
    assert other.poll() == -signal.SIGTERM


def test_a_thread_other_than_the_main_one_can_hold_processes(tmp_path: Path) -> None:
    ended = []

    def run() -> None:
        with Processes() as processes:
            process = processes.start("one", ["sleep", "60"], tmp_path / "log")
        ended.append(process.poll())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(WAIT)
    assert ended == [-signal.SIGTERM]


def test_ports_are_free_and_different() -> None:
    assert len(set(free_ports(5))) == 5


def test_commands_are_beside_this_python() -> None:
    assert Path(command("hanse-server")).exists()
