"""`hanse-sim run` on real photos: the folder it leaves is complete, runs again, and is resumed."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from hanse_client.charges import Budget
from hanse_client.ledger import Ledger
from hanse_common.config import load
from hanse_common.errors import ConfigError
from hanse_common.vision.recognizer import Recognizer
from hanse_simulations import cli
from hanse_simulations.experiment import Experiment
from hanse_simulations.results import Curve, new_folder

Write = Callable[..., Path]


@pytest.fixture
def sim(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Return a function that types `hanse-sim …` and returns exit code and all output."""

    def type_in(*words: object) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["hanse-sim", *map(str, words)])
        code: object = 0
        try:
            cli.main()
        except SystemExit as stopped:
            code = stopped.code
        captured = capsys.readouterr()
        assert isinstance(code, int)
        return code, captured.out + captured.err

    return type_in


Sim = Callable[..., tuple[int, str]]


def figures(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    del found["seconds"]
    return found


@pytest.mark.slow
def test_a_result_folder_is_complete_and_runs_again(
    write_experiment: Write,
    tmp_path: Path,
    data_folder: Path,
    sim: Sim,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Relative paths, which mean something else from the result folder.
    monkeypatch.chdir(tmp_path)
    changes = {
        "whiten": {"dimensions": 20, "photos": 100},
        "evaluate_every": 3,
        "data.folder": os.path.relpath(data_folder, tmp_path),
    }
    path = write_experiment(changes).relative_to(tmp_path)
    root = tmp_path / "results"
    code, text = sim("run", path, "--results", root, "--json", tmp_path / "figures.json")
    assert code == 0, text
    first = root / "tiny" / "run-001"

    found = figures(first)
    assert json.loads((tmp_path / "figures.json").read_text()).items() >= found.items()
    assert f"accuracy {100 * found['accuracy']:.2f} %" in text
    assert found["rounds"] == [3, 4]
    assert found["accuracies"][-1] == found["accuracy"]
    assert found["epsilon_max"] == max(found["epsilon"].values()) <= 1
    assert (first / "metrics.csv").read_text().splitlines()[0] == "round,merchants,accuracy"

    for name in ("learning-curve.png", "confusion.png", "roc.png"):
        with Image.open(first / name) as picture:
            assert picture.format == "PNG"
            darkest, brightest = picture.convert("L").getextrema()
            assert darkest < 128 < brightest == 255, f"{name} is blank"
    for name in ("alder", "birch", "cedar"):
        ledger = Ledger(first / "merchants" / name / "ledger.sqlite", Budget(1.0, 1e-5))
        assert ledger.counter == 4
    card = Recognizer.load(first / "recognizer").card
    assert card.metrics["accuracy"] == found["accuracy"]
    assert card.epsilon == found["epsilon_max"]
    assert card.plan_digest == found["plan_digest"]

    code, text = sim("run", first / "experiment.yaml", "--results", root)
    assert code == 0, text
    assert figures(root / "tiny" / "run-002") == found

    code, text = sim("run", path, "--results", root, "--seed", 8)
    assert code == 0, text
    assert figures(root / "tiny" / "run-003")["vector_digest"] != found["vector_digest"]

    # Resuming what is finished changes nothing, and another experiment is refused before anything is touched.
    code, text = sim("run", path, "--results", root, "--resume", first)
    assert code == 0, text
    assert figures(first) == found
    before = (first / "experiment.yaml").read_bytes()
    code, text = sim("run", path, "--seed", 9, "--results", root, "--resume", first)
    assert code == ConfigError.exit_code
    assert "another experiment or seed" in text
    assert (first / "experiment.yaml").read_bytes() == before


def test_output_without_a_terminal_is_a_line_for_each_thing_done(
    write_experiment: Write, tmp_path: Path, sim: Sim
) -> None:
    _, text = sim("run", write_experiment(), "--results", tmp_path / "results")
    lines = text.splitlines()
    assert sum("embedding" in line for line in lines) == 1
    assert sum("rounds" in line for line in lines) == 4
    assert "\x1b" not in text
    assert not any("Warning" in line for line in lines)


def test_mistakes_show_before_the_work(write_experiment: Write, tmp_path: Path, sim: Sim) -> None:
    results = tmp_path / "results"
    unknown = write_experiment({"optimization.optimizer": {"name": "lion"}})
    assert sim("run", unknown, "--results", results)[0] == ConfigError.exit_code
    path = write_experiment()
    code, text = sim("run", path, "--results", results, "--json", tmp_path / "no" / "x.json")
    assert code == ConfigError.exit_code
    assert "there is no folder" in text
    code, text = sim("run", path, "--results", results, "--resume", tmp_path)
    assert code == ConfigError.exit_code
    assert "found no experiment.yaml" in text
    assert not results.exists()


def test_folders_are_numbered_and_never_reused(tmp_path: Path) -> None:
    assert new_folder(tmp_path, "a").name == "run-001"
    assert new_folder(tmp_path, "a").name == "run-002"
    assert new_folder(tmp_path, "b") == tmp_path / "b" / "run-001"


def test_a_curve_goes_on_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    Curve(path).add(1, 3, 1 / 3)
    second = Curve(path)
    second.add(2, 2, 0.1 + 0.2)
    assert Curve(path).rounds == [1, 2]
    assert Curve(path).accuracies == [1 / 3, 0.1 + 0.2]
    path.write_text("round,merchants,accuracy\n1,3,\n")
    with pytest.raises(ConfigError, match=r"metrics\.csv"):
        Curve(path)


@pytest.mark.slow
def test_smoke_repeats_to_the_bit(root: Path, tmp_path: Path, sim: Sim) -> None:
    smoke = root / "simulations" / "experiments" / "smoke.yaml"
    for _ in range(2):
        code, text = sim("run", smoke, "--results", tmp_path)
        assert code == 0, text
    first, second = (figures(tmp_path / "smoke" / name) for name in ("run-001", "run-002"))
    assert first == second
    assert first["accuracy"] > 0.8
    assert load(Experiment, tmp_path / "smoke" / "run-001" / "experiment.yaml").seed == 1
