"""The study of options on a small scale, degraded photos, and the reader of the Grocery Store Dataset."""

import json
from itertools import product
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from hanse_common.config import load
from hanse_common.errors import ConfigError, DatasetUnavailable
from hanse_common.vision.recipe_model import Augmentation
from hanse_simulations import robust_recognition
from hanse_simulations.cli import app
from hanse_simulations.degradations import Degraded, Name
from hanse_simulations.grocery import Grocery
from hanse_simulations.photos import ArrayPhoto
from hanse_simulations.robust_recognition import Metric, Study, Test, long_tail, run_name, run_study, table

ROOT = Path(__file__).parents[2]
STUDY = ROOT / "simulations/studies/recognition.yaml"


def photo(seed: int = 1, shape: tuple[int, ...] = (60, 50, 3)) -> ArrayPhoto:
    return ArrayPhoto(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


@pytest.mark.parametrize("name", get_args(Name))
@pytest.mark.parametrize("shape", [(60, 50, 3), (28, 28)])
def test_degraded_photos_repeat_and_differ(name: Name, shape: tuple[int, ...]) -> None:
    plain = photo(1, shape)
    worse = Degraded(plain, name, photo(2, shape))
    first, second = np.asarray(worse.open()), np.asarray(worse.open())
    np.testing.assert_array_equal(first, second)
    assert first.shape == plain.pixels.shape
    assert (first != plain.pixels).mean() > 0.1
    names = {Degraded(plain, each, photo(2, shape)).digest for each in get_args(Name)} | {plain.digest}
    assert len(names) == len(get_args(Name)) + 1


@pytest.fixture
def grocery(tmp_path: Path) -> Path:
    folder = tmp_path / "dataset"
    (folder / "train").mkdir(parents=True)
    rng = np.random.default_rng(1)
    lines: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for index in range(80):
        fine = index % 3
        side = ("train", "val", "test", "test")[index // 3 % 4]
        pixels = rng.integers(80 * fine, 80 * fine + 60, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "train" / f"{index}.png")
        lines[side].append(f"train/{index}.png, {fine}, {min(fine, 1)}")
    for side, entries in lines.items():
        (folder / f"{side}.txt").write_text("\n".join(entries) + "\n")
    header = "Class Name (str),Class ID (int),Coarse Class Name (str),Coarse Class ID (int)\n"
    (folder / "classes.csv").write_text(header + "Gala,0,Apple,0\nLime,1,Citrus,1\nLemon,2,Citrus,1\n")
    return folder


def test_the_grocery_dataset_is_read(grocery: Path) -> None:
    found = Grocery.load(grocery)
    assert found.fine == ("Gala", "Lime", "Lemon")
    assert found.taxonomy.classes == ("Apple", "Citrus")
    assert (len(found.train), len(found.test)) == (42, 38)
    assert found.train[0].open().size == (40, 40)
    assert len({each.digest for each in found.train}) == 42
    (grocery / "val.txt").write_text("nonsense\n")
    with pytest.raises(DatasetUnavailable, match="not the Grocery Store Dataset"):
        Grocery.load(grocery)


def small(folder: Path, **changes: Any) -> Study:
    recipe = {
        "preprocessing": {"size": 16},
        "backbone": {"name": "scattering", "projection": {"dimensions": 50}},
    }
    steps = {"rounds": 3, "sampling_rate": 0.5, "learning_rate": 2.0}
    tree: dict[str, Any] = {
        "fashion_mnist": "nowhere",
        "epsilons": [8.0, None],
        "seeds": [1, 2],
        "data": {"grocery": {"dataset": "grocery", "test_photos": 30, "steps": steps}},
        "arms": {
            "plain": {"data": "grocery", "recipe": recipe, "tests": ["occlusion", "clutter"]},
            "balanced": {
                "data": "grocery",
                "recipe": recipe,
                "weights_beta": 1.0,
                "offsets_temperature": 0.5,
                "rates_power": 0.5,
            },
        },
        "rows": [
            {"option": "balance", "against": "imbalance", "source": "A", "without": "plain", "with": "balanced"},
            {
                "option": "fused", "against": "doubt", "source": "B", "without": "plain", "with": "plain",
                "test": "clutter", "with_metric": "fused_accuracy",
            },
        ],
    }  # fmt: skip
    path = folder / "study.yaml"
    path.write_text(json.dumps(tree | changes))
    return load(Study, path)


@pytest.mark.slow
def test_a_study_is_run_once_and_shown_as_a_table(grocery: Path, tmp_path: Path) -> None:
    told: list[str] = []
    study = small(tmp_path)
    figures = run_study(study, grocery, tmp_path / "out", told.append)
    assert len(told) == 2 * 2 * 2
    assert set(figures["plain - 2 clutter"]) == {
        "accuracy", "macro_recall", "tail_recall", "log_loss", "fused_accuracy"
    }  # fmt: skip
    assert figures["plain - 1 clean"]["accuracy"] > 0.6
    assert run_study(study, grocery, tmp_path / "out", told.append) == figures
    assert len(told) == 8
    lines = table(study, figures).splitlines()
    assert lines[0] == "| option | against | measured | ε = 8 | no noise | source |"
    assert len(lines) == 4
    assert "fused | doubt | accuracy, clutter photos" in lines[3]
    again = run_study(study, grocery, tmp_path / "again")
    assert again == figures


def test_without_the_dataset_its_arms_are_left_out(tmp_path: Path) -> None:
    assert run_study(small(tmp_path), None, tmp_path) == {}
    assert len(table(small(tmp_path), {}).splitlines()) == 2


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"data": {}}, "expected one of"),
        ({"rows": [{"option": "a", "against": "b", "source": "c", "without": "d", "with": "plain"}]}, "arms"),
        (
            {
                "rows": [
                    {"option": "a", "against": "b", "source": "c", "without": "plain", "with": "balanced",
                     "test": "clutter"}
                ]
            },
            "balanced is not tried on clutter",
        ),
    ],
)  # fmt: skip
def test_a_study_that_makes_no_sense_is_refused(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=reason):
        small(tmp_path, **changes)


def test_a_long_tail_falls_by_its_ratio_and_another_seed_puts_other_classes_at_its_end() -> None:
    data = load(Study, STUDY).data["long-tail"]
    counts = long_tail(data, 10, 1)
    assert (counts.max(), counts.min()) == (3000, 30)
    assert counts.tolist() != long_tail(data, 10, 2).tolist()
    assert sorted(counts) == sorted(long_tail(data, 10, 2))


def test_each_augmentation_is_tried_on_clean_photos_and_on_what_it_is_against() -> None:
    study = load(Study, STUDY)
    tried: dict[str, dict[str, set[str]]] = {}
    for row in study.rows:
        changed = study.arms[row.with_].recipe
        if changed.augmentation is None:
            continue
        assert changed.model_copy(update={"augmentation": None}) == study.arms[row.without].recipe
        assert changed.augmentation != Augmentation()
        for name in changed.augmentation.model_fields_set:
            tried.setdefault(name, {}).setdefault(row.against, set()).add(row.test)
    assert tried == {
        "erasing": {"occlusion": {"clean", "occlusion"}},
        "brightness": {"light": {"clean", "light"}},
        "contrast": {"light": {"clean", "light"}},
        "rotation": {"viewpoint": {"clean", "viewpoint"}},
        "crop_padding": {"viewpoint": {"clean", "viewpoint"}},
    }


def test_the_document_shows_each_row_of_the_shipped_study() -> None:
    study = load(Study, STUDY)
    figures = {
        run_name(arm, epsilon, seed, test): dict.fromkeys(get_args(Metric), 0.0)
        for arm, epsilon, seed, test in product(study.arms, study.epsilons, study.seeds, get_args(Test))
    }

    def named(lines: list[str]) -> list[list[str]]:
        cells = [line.strip("| ").split(" | ") for line in lines]
        return [[*each[:3], each[-1]] for each in cells]

    expected = table(study, figures).splitlines()
    shown = (ROOT / "docs/recognition.md").read_text(encoding="utf-8").splitlines()
    first = shown.index(expected[0])
    assert named(shown[first + 2 : first + len(expected)]) == named(expected[2:])
    assert not shown[first + len(expected)]


def test_the_command_writes_what_it_prints(
    grocery: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(robust_recognition, "run_study", lambda study, given, folder, tell: {})
    arguments = ["recognition", str(STUDY), "--grocery", str(grocery), "--json", str(tmp_path / "found.json")]
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 0, found.output
    assert "| option |" in found.output
    assert (tmp_path / "found.json").read_text() == "{}\n"
    with pytest.raises(ConfigError):
        load(Study, tmp_path / "missing.yaml")
