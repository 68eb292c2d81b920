"""A small league of real processes: one server, four shops with real photos, over TLS on loopback."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from hanse_client.config import ClientConfig
from hanse_client.ledger import Ledger
from hanse_common.config import load
from hanse_simulations import daemons, demo
from hanse_simulations.experiment import Experiment
from hanse_simulations.processes import Processes, command

WAIT = 120.0

TRAINING = {
    "mode": "local",
    "update_bound": 16,
    "rounds": 6,
    "local_steps": 1,
    "sampling_rate": 0.5,
    "expected_batch": 30,
    "clipping_norm": 0.5,
    "learning_rate": 2,
}


class League:
    """The folders of a league, and its processes by name: "server" and the shops."""

    def __init__(
        self,
        folder: Path,
        data: Path,
        processes: Processes,
        attempts: int = 3,
        change: Callable[[dict[str, Any]], None] = lambda experiment: None,
        **training: Any,
    ) -> None:
        self.folder = folder
        self.processes = processes
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        experiment = folder / "experiment.yaml"
        settings: dict[str, Any] = {
            "name": "tiny",
            "data": {
                "dataset": "fashion-mnist",
                "folder": str(data),
                "merchants": 4,
                "photos_per_merchant": 60,
                "test_photos": 50,
            },
            "plan": {
                "league": "tiny",
                "taxonomy": {"classes": list(demo.datasets.CLASSES)},
                "recipe": {
                    "preprocessing": {"size": 8, "channels": 1},
                    "backbone": {"name": "scattering", "scales": 1, "angles": 2, "groups": None},
                },
                "training": TRAINING | training,
                "privacy": {"epsilon": 3, "delta": 1e-5},
                "cohort": {
                    "min_merchants": 3,
                    "max_merchants": 4,
                    "join_deadline": 8,
                    "upload_deadline": 8,
                    "upload_slot": 0.05,
                },
            },
            "optimization": {"attempts": attempts},
        }
        change(settings)
        experiment.write_text(yaml.safe_dump(settings))
        self.experiment = load(Experiment, experiment)
        self.shops = {
            name: config.parent
            for name, config in demo.write_shops(self.experiment, folder / "shops").items()
        }
        self.signed_plan = daemons.make_server(self.experiment, folder / "server", self.shops, os.urandom(16))
        self.edit_server(lambda service: service["blocks"].update(rounds=3, patience=60, gather=5))

    @property
    def server_config(self) -> Path:
        return self.folder / "server" / "hanse-server.yaml"

    @property
    def flwr_home(self) -> Path:
        return self.folder / "server" / "state" / "flwr"

    def edit_server(self, change: Callable[[dict[str, Any]], None]) -> None:
        settings = yaml.safe_load(self.server_config.read_text())
        change(settings["service"])
        self.server_config.write_text(yaml.safe_dump(settings))

    def edit_shop(self, name: str, change: Callable[[dict[str, Any]], None]) -> None:
        path = self.shops[name] / "hanse-client.yaml"
        settings = yaml.safe_load(path.read_text())
        change(settings)
        path.write_text(yaml.safe_dump(settings))

    def start_server(self, *arguments: str, verb: str = "run") -> subprocess.Popen[bytes]:
        words = [command("hanse-server"), verb, "--json", "--config", str(self.server_config), *arguments]
        return self._start("server", words)

    def start_shop(self, name: str) -> subprocess.Popen[bytes]:
        words = [command("hanse-client"), "run", "--config", str(self.shops[name] / "hanse-client.yaml")]
        return self._start(name, words)

    def start_shops(self) -> None:
        for name in self.shops:
            self.start_shop(name)

    def _start(self, name: str, words: list[str]) -> subprocess.Popen[bytes]:
        self.running[name] = self.processes.start(name, words, self.log(name), daemons.ONE_THREAD)
        return self.running[name]

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def text(self, name: str) -> str:
        path = self.log(name)
        return path.read_text(errors="replace") if path.exists() else ""

    def events(self, kind: str) -> list[dict[str, Any]]:
        lines = [line for line in self.text("server").splitlines() if line.startswith("{")]
        return [event for event in map(json.loads, lines) if event["kind"] == kind]

    def ledger(self, name: str) -> Ledger:
        config = load(ClientConfig, self.shops[name] / "hanse-client.yaml")
        return Ledger(config.ledger_path, config.policy.budget)

    def until(self, what: str, true: Callable[[], object], wait: float = WAIT) -> None:
        """Wait until `true()`, or fail with everything the processes said."""
        given_up = time.monotonic() + wait
        while not true():
            if time.monotonic() > given_up:
                said = "\n".join(f"--- {name}\n{self.text(name)[-3000:]}" for name in ("server", *self.shops))
                pytest.fail(f"waited in vain for: {what}\n{said}")
            time.sleep(0.02)

    def flwr(self, *arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run one of Flower's own commands as the operator would."""
        return subprocess.run(
            [command("flwr"), *arguments],
            env=os.environ | {"FLWR_HOME": str(self.flwr_home), "COLUMNS": "300"},
            cwd=folder or self.folder,
            capture_output=True,
            text=True,
            timeout=WAIT,
            check=False,
        )


def children(pid: int) -> list[int]:
    """Return the processes that `pid` started and that live."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def make_league(tmp_path: Path, data_folder: Path) -> Iterator[Callable[..., League]]:
    with Processes() as processes:
        made: list[League] = []

        def make(**training: Any) -> League:
            made.append(League(tmp_path, data_folder, processes, **training))
            return made[-1]

        yield make
        for league in made:  # a process that a test stopped can't end in order
            for process in league.running.values():
                if process.poll() is None:
                    os.kill(process.pid, signal.SIGCONT)


@pytest.fixture
def helpers() -> Any:
    """Functions for tests that look at processes."""

    class Helpers:
        children = staticmethod(children)
        lives = staticmethod(lives)

    return Helpers
