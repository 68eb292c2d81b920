"""The demo in small, as it is typed, through real folders and configurations."""

import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hanse_client.catalog import Catalog
from hanse_client.config import ClientConfig
from hanse_common.config import load
from hanse_common.vision.taxonomy import LabelMap
from hanse_simulations.demo import client_config, write_shops
from hanse_simulations.demo import demo as run_demo
from hanse_simulations.experiment import Experiment

HANSE_SIM = Path(sys.executable).with_name("hanse-sim")
Write = Callable[..., Path]


def typed(*words: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"COLUMNS": "80"}
    return subprocess.run(
        [*map(str, words)], env=environment, capture_output=True, text=True, timeout=180, check=False
    )


@pytest.fixture
def experiment(write_experiment: Write) -> Path:
    return write_experiment({"whiten": {"dimensions": 20, "photos": 100}, "data.merchants": 3})


@pytest.mark.slow
def test_the_demo_twice_and_the_commands_it_prints(experiment: Path, tmp_path: Path) -> None:
    folder, figures = tmp_path / "demo", tmp_path / "figures.json"
    done = typed(
        HANSE_SIM, "demo", "--experiment", experiment, "--folder", folder, "--json", figures, "--in-process"
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "\x1b" not in done.stdout

    found = json.loads(figures.read_text())
    assert 0 <= found["accuracy"] <= 1  # so few photos teach nothing reliably, and the noise is not seeded
    assert 0 < found["epsilon_max"] <= 1
    assert found["seconds"] > 0
    assert f"Accuracy {100 * found['accuracy']:.1f} %" in done.stdout

    commands = [line.strip() for line in done.stdout.splitlines() if "hanse-client" in line]
    classify, ledger = (typed(*shlex.split(line)) for line in commands)
    assert classify.returncode == 0, classify.stderr
    assert str(folder / "photo-to-try.png") in classify.stdout
    assert " %" in classify.stdout
    assert ledger.returncode == 0, ledger.stderr
    shown = math.ceil(1000 * found["epsilon"]["alder"]) / 1000  # never less than was paid
    assert f"ε = {shown:.3f} of the 1 you allow" in ledger.stdout
    for picture in ("confusion.png", "learning-curve.png", "roc.png"):
        assert str(folder / "result" / picture) in done.stdout

    again = run_demo(load(Experiment, experiment), folder, in_process=True)
    assert again["epsilon_max"] == found["epsilon_max"]
    assert (folder / "result-001" / "result.json").exists()  # the first one is put aside, not lost


def test_shops_of_another_experiment_leave_no_photos_behind(write_experiment: Write, tmp_path: Path) -> None:
    def catalogs(changes: dict[str, object]) -> dict[str, set[str]]:
        settings = load(Experiment, write_experiment(changes))
        found = {}
        for name, path in write_shops(settings, tmp_path / "shops").items():
            client = load(ClientConfig, path)
            labels = LabelMap(client.league.taxonomy)
            catalog = Catalog.load(client.photos, labels, holdout_key=bytes(32), holdout_fraction=0.1)
            assert len(catalog.records) == settings.data.photos_per_merchant
            found[name] = {path.name for path in client.photos.rglob("*.png")}
        return found

    first = catalogs({})
    assert not first["alder"] & first["birch"]
    assert catalogs({}) == first
    second = catalogs({"seed": 8, "data.photos_per_merchant": 40})
    assert second["alder"] != first["alder"]


def test_another_seed_alone_deals_the_photos_anew(write_experiment: Write, tmp_path: Path) -> None:
    def photos(seed: int) -> set[str]:
        configs = write_shops(load(Experiment, write_experiment({"seed": seed})), tmp_path / "shops")
        return {path.name for path in load(ClientConfig, configs["alder"]).photos.rglob("*.png")}

    assert photos(1) != photos(2)


def test_a_shops_budget_is_the_plans_rounded_up(write_experiment: Write) -> None:
    settings = load(Experiment, write_experiment({"plan.privacy.epsilon": 2.5}))
    config = client_config(settings)
    assert config["policy"]["epsilon"] == 3.0
    assert config["holdout_fraction"] == 0.1
