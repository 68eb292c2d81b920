"""From nothing to the first masked block by the merchant's guide: its own commands, typed as they stand there.

Each ```sh block of `client/README.md` has a name and the answers to its questions in a comment above it. Here they are
typed in a shell, by the people whose part they are: three holders who found the league, its three founders, and fir,
a newcomer. The operator's side is prepared; it has a guide of its own.
"""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from hanse_client.config import ClientConfig
from hanse_client.ledger import Ledger
from hanse_common import signing, wire
from hanse_common.charter import CharterFile
from hanse_common.config import load
from hanse_common.plan import SignedPlan
from hanse_server.config import make_plan
from hanse_server.development_keys import make_keys
from hanse_simulations import demo
from hanse_simulations.daemons import ONE_THREAD
from hanse_simulations.experiment import Experiment
from hanse_simulations.processes import Processes, command, free_ports

WAIT = 120.0
FOUNDERS = ("alder", "birch", "cedar")
BIN = Path(command("hanse-client")).parent

BLOCK = re.compile(r"<!-- step: ([a-z-]+)(?:; answers: ([^>]*))? -->\n```sh\n(.*?)```", re.S)


@dataclass(frozen=True)
class Step:
    """A block of the guide: what is typed, and what is answered."""

    text: str
    answers: str


@pytest.fixture
def steps(root: Path) -> dict[str, Step]:
    found = BLOCK.findall((root / "client" / "README.md").read_text())
    assert len(found) == len({name for name, _, _ in found})
    return {name: Step(text, answers.replace("|", "\n") + "\n") for name, answers, text in found}


@pytest.fixture
def processes() -> Iterator[Processes]:
    with Processes() as running:
        yield running


class People:
    """A folder for each person; `does` types a step of the guide there, with files as mail brought them."""

    def __init__(self, folder: Path, steps: dict[str, Step]) -> None:
        self.folder = folder
        self.steps = steps
        self.done: set[str] = set()

    def __getitem__(self, name: str) -> Path:
        path = self.folder / name
        path.mkdir(exist_ok=True)
        return path

    def does(self, who: str, step: str, answers: str | None = None, **changes: str) -> str:
        self.done.add(step)
        text = self.steps[step].text
        for old, new in changes.items():
            assert old in text
            text = text.replace(old, new)
        return self.types(who, text, self.steps[step].answers if answers is None else answers)

    def types(self, who: str, text: str, answers: str = "") -> str:
        result = subprocess.run(
            ["bash", "-e", "-c", text],
            cwd=self[who],
            input=answers,
            env=os.environ | ONE_THREAD | {"PATH": f"{BIN}:{os.environ['PATH']}", "COLUMNS": "200"},
            capture_output=True,
            text=True,
            timeout=WAIT,
            check=False,
        )
        assert result.returncode == 0, f"{who}: {text}\n{result.stdout}\n{result.stderr}"
        return result.stdout

    def sends(self, one: str, file: str, other: str, name: str | None = None) -> None:
        shutil.copy(self[one] / file, self[other] / (name or Path(file).name))


def experiment(folder: Path, data: Path) -> Experiment:
    path = folder / "experiment.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "name": "guide",
                "data": {
                    "dataset": "fashion-mnist",
                    "folder": str(data),
                    "merchants": 4,
                    "photos_per_merchant": 60,
                    "test_photos": 50,
                },
                "plan": {
                    "league": "textiles",
                    "taxonomy": {"classes": list(demo.datasets.CLASSES)},
                    "recipe": {
                        "preprocessing": {"size": 8, "channels": 1},
                        "backbone": {"name": "scattering", "scales": 1, "angles": 2, "groups": None},
                    },
                    "training": {
                        "mode": "local",
                        "update_bound": 16,
                        "rounds": 6,
                        "local_steps": 1,
                        "sampling_rate": 0.5,
                        "expected_batch": 30,
                        "clipping_norm": 0.5,
                        "learning_rate": 2,
                    },
                    "privacy": {"epsilon": 3, "delta": 1e-5},
                    "cohort": {"min_merchants": 4, "max_merchants": 4, "upload_slot": 1},
                },
            }
        )
    )
    return load(Experiment, path)


def start_operator(folder: Path, made: Experiment, pinned: str) -> None:
    """Prepare the operator's folder: keys, signed plan, configuration."""
    key = signing.create_key(folder / "operator.key")
    make_keys(folder / "keys", ("localhost",), ())
    signed = SignedPlan.sign(make_plan(made.plan, bytes(16)), key)
    (folder / "plan.hanse").write_bytes(wire.encode(signed))
    admin, fleet, streams = free_ports(3)
    keys = {"authority": "keys/ca.crt", "certificate": "keys/server.crt", "key": "keys/server.key"}
    (folder / "hanse-server.yaml").write_text(
        yaml.safe_dump(
            {
                "signing_key": "operator.key",
                "plan": made.plan.model_dump(mode="json"),
                "service": {
                    "plan": "plan.hanse",
                    "directory": "directory.hanse",
                    "charter": pinned,
                    "state": "state",
                    "tls": keys,
                    "admin": {"port": admin, "token": "keys/admin.token"},
                    "fleet": {"host": "127.0.0.1", "port": fleet},
                    "aggregator": {
                        "host": "127.0.0.1",
                        "port": streams,
                        "address": f"localhost:{streams}",
                    },
                    "blocks": {"rounds": 3, "patience": 100, "gather": 5},
                    "page": {"port": 0},
                },
            }
        )
    )


@pytest.mark.slow
def test_the_guide_from_nothing_to_the_first_masked_block(
    tmp_path: Path,
    data_folder: Path,
    steps: dict[str, Step],
    processes: Processes,
    wait_until: Callable[..., Any],
) -> None:
    people = People(tmp_path / "people", steps)
    people.folder.mkdir()
    made = experiment(tmp_path, data_folder)
    photos = demo.write_shops(made, tmp_path / "shops")
    for (name, config), who in zip(photos.items(), (*FOUNDERS, "fir"), strict=True):
        shutil.copytree(config.parent / "photos", people[who] / "photos")
        assert name

    # Three holders found the league.
    for holder in FOUNDERS:
        people.does(holder, "key")
        people.sends(holder, "league.key.pub", "alder", f"{holder}.key.pub")
    people.does("alder", "found")
    people.does("alder", "sign-charter")
    people.sends("alder", "charter.hanse", "cedar")
    assert "It has all the signatures" in people.does("cedar", "sign-charter")
    people.sends("cedar", "charter.hanse", "alder")
    charters = wire.decode(CharterFile, (people["cedar"] / "charter.hanse").read_bytes())
    start_operator(people["operator"], made, charters.charters[0].read().digest.hex())
    people.types("operator", "hanse-server card")

    # The founders set up, and are the first directory.
    for founder in FOUNDERS:
        people.sends("operator", "league.yaml", founder)
        answers = steps["init"].answers.replace("fir", founder).replace("Fir", founder.title())
        people.does(founder, "init", answers)
        people.does(founder, "join")
        if founder != "alder":
            people.sends(founder, f"{founder}.request", "alder")
    people.types(
        "alder", "hanse-client league admit alder.request birch.request cedar.request --out d.hanse", "y\n"
    )
    people.types("alder", "hanse-client league sign d.hanse", "y\n")
    people.sends("alder", "d.hanse", "birch")
    people.types("birch", "hanse-client league sign d.hanse", "y\n")
    people.sends("birch", "d.hanse", "operator", "directory.hanse")
    people.sends("birch", "d.hanse", "alder", "directory.hanse")
    server = processes.start(
        "server", [command("hanse-server"), "run", "--config", str(people["operator"] / "hanse-server.yaml")],
        tmp_path / "server.log", ONE_THREAD,
    )  # fmt: skip

    def run(who: str) -> None:
        people.done.add("run")
        words = ["bash", "-c", f"cd {people[who]} && exec {steps['run'].text}"]
        processes.start(
            who, words, tmp_path / f"{who}.log", ONE_THREAD | {"PATH": f"{BIN}:{os.environ['PATH']}"}
        )

    for founder in FOUNDERS:
        run(founder)

    # Fir does what the guide says, and the others their part in it.
    people.sends("operator", "league.yaml", "fir")
    said = people.does("fir", "init")
    card = people.types("alder", "hanse-client words league.yaml").strip()
    assert card in said, "both read out the same words"
    assert "to train on" in people.does("fir", "catalog")
    said = people.does("fir", "join")
    for founder in ("birch", "cedar"):
        people.sends("fir", "fir.request", founder)
        people.sends("fir" if founder == "birch" else "birch", "fir.request", founder)
        read_out = people.does(founder, "endorse")
        assert re.findall(r"(?m)^  ((?:\w+ ){11}\w+)$", read_out)[0] in said
    people.sends("cedar", "fir.request", "alder")
    people.does("alder", "admit")
    people.does("alder", "sign")
    people.sends("alder", "directory.next.hanse", "cedar")
    assert "It has all the signatures" in people.does("cedar", "sign")
    people.sends("cedar", "directory.next.hanse", "operator", "directory.hanse")
    # The plan needs four merchants: the server waits with three, and sees that there is a fourth.
    log = tmp_path / "server.log"
    wait_until("the next directory", lambda: "now version 2, with 4 members" in log.read_text())
    checks = people.does("fir", "doctor").splitlines()
    assert not [line for line in checks if line.startswith("bad")]
    run("fir")
    until = time.monotonic() + WAIT
    while "Round 3 of 6: trained, charged, sent." not in (tmp_path / "fir.log").read_text():
        assert time.monotonic() < until, (tmp_path / "fir.log").read_text() + (
            tmp_path / "server.log"
        ).read_text()
        time.sleep(0.1)
    looked = people.does("fir", "look")
    assert "round " in looked and "ε = " in looked and "Round 1 of 6" in looked
    config = load(ClientConfig, people["fir"] / "hanse-client.yaml")
    assert Ledger(config.ledger_path, config.policy.budget).counter >= 3
    assert server.wait(WAIT) == 0, (tmp_path / "server.log").read_text()
    assert "4 merchants" in (tmp_path / "server.log").read_text()
    assert people.done == set(steps), "every block of the guide was typed"
