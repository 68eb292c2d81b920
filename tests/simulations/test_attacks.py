"""Merchants that attack a real league: what is stopped, what is not, and the study that makes a table of it."""

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray

from hanse_common.config import load
from hanse_common.errors import ConfigError, RoundFailed
from hanse_common.plan import Plan
from hanse_common.secagg import ring
from hanse_server import plausibility
from hanse_server.league import RoundReport
from hanse_simulations import datasets, robustness
from hanse_simulations.attacks import Attack, Attacker, Backdoor, LabelFlip, Noise, Random, Scaling, poisoned
from hanse_simulations.experiment import Experiment
from hanse_simulations.robustness import Row, Study, run_study, table
from hanse_simulations.shops import attackers, make_shops
from hanse_simulations.simulation import League, seeded_members

Write = Callable[..., Path]
CLASSES = ("shirt", "shoe", "bag")

DISTRIBUTED = {
    "plan.training": {
        "mode": "distributed",
        "rounds": 4,
        "sampling_rate": 0.5,
        "expected_batch": 90,
        "clipping_norm": 0.5,
    },
    "optimization.attempts": 1,
}
LOCAL = {"optimization.attempts": 1}
MERCHANT_LEVEL = {
    "plan.training": {
        "mode": "merchant-level",
        "rounds": 4,
        "sampling_rate": 1,
        "expected_batch": 3,
        "clipping_norm": 0.5,
        "local_steps": 2,
        "local_rate": 0.5,
        "learning_rate": 0.5,
    },
    "optimization.attempts": 1,
}
READ_ONCE = functools.cache(datasets.fashion_mnist)
MODES = pytest.mark.parametrize(
    "mode", [DISTRIBUTED, LOCAL, MERCHANT_LEVEL], ids=["distributed", "local", "merchant-level"]
)


@pytest.fixture(autouse=True)
def read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unpack the dataset once for all tests."""
    monkeypatch.setattr(datasets, "fashion_mnist", READ_ONCE)


@pytest.fixture
def experiment(write_experiment: Write) -> Callable[..., Experiment]:
    return lambda mode, attack=None: load(
        Experiment, write_experiment(mode | ({"attack": attack} if attack else {}))
    )


def league(settings: Experiment, folder: Path) -> League:
    shops = make_shops(
        settings, folder / "embeddings.sqlite", folder / "none", "cpu", lambda done, total: None
    )
    return League.assemble(
        settings, seeded_members(settings, shops.merchants, folder, lambda name, text: None), folder
    )


@MODES
def test_an_honest_league_stays_below_the_bound(
    experiment: Callable[..., Experiment], tmp_path: Path, mode: dict[str, Any]
) -> None:
    seen: list[RoundReport] = []
    league(experiment(mode), tmp_path).train(seen.append)
    assert len(seen) == 4
    assert all(0 < report.outcome.norm < report.outcome.bound for report in seen)


@pytest.mark.parametrize(
    ("mode", "attack"),
    [
        (DISTRIBUTED, {"name": "random"}),
        (LOCAL, {"name": "random"}),
        (MERCHANT_LEVEL, {"name": "random"}),
        (DISTRIBUTED, {"name": "scaling", "factor": 1_000_003}),
        (LOCAL, {"name": "noise", "of_bound": 2.0}),
    ],
    ids=["random", "random-local", "random-merchant-level", "scaling", "noise-local"],
)
def test_an_implausible_upload_fails_the_round_and_nothing_is_applied(
    experiment: Callable[..., Experiment], tmp_path: Path, mode: dict[str, Any], attack: dict[str, Any]
) -> None:
    seen: list[RoundReport] = []
    attacked = league(experiment(mode, attack), tmp_path)
    with pytest.raises(RoundFailed, match=r"Round 1 of 4 failed.*no single upload is ever seen"):
        attacked.train(seen.append)
    assert not seen
    assert attacked.progress.checkpoint() is None


def test_what_keeps_below_the_bound_is_not_stopped(
    experiment: Callable[..., Experiment], tmp_path: Path
) -> None:
    """The table's other half: it is the truth about these attacks that no round fails, and that they tell."""
    models = [league(experiment(DISTRIBUTED), tmp_path / "honest").train().tobytes()]
    for attack in (
        {"name": "label-flip", "copies": 3},
        {"name": "backdoor", "target": "Bag"},
        {"name": "scaling", "factor": -1},
        {"name": "noise", "of_bound": 0.5},
    ):
        seen: list[RoundReport] = []
        attacked = league(experiment(DISTRIBUTED, attack), tmp_path / str(attack["name"]))
        models.append(attacked.train(seen.append).tobytes())
        assert len(seen) == 4, attack
        assert not any(report.outcome.failures or report.outcome.blamed for report in seen), attack
    assert len(set(models)) == 5


def test_only_the_last_merchants_attack(experiment: Callable[..., Experiment], tmp_path: Path) -> None:
    flip = experiment(DISTRIBUTED, {"name": "label-flip", "merchants": 2, "copies": 3})
    assert attackers(flip) == ("birch", "cedar")
    assert attackers(experiment(DISTRIBUTED)) == ()
    arguments = (tmp_path / "embeddings.sqlite", tmp_path / "none", "cpu", lambda done, total: None)
    attacked = make_shops(flip, *arguments)
    honest = make_shops(experiment(DISTRIBUTED), *arguments)
    assert attacked.triggered is None
    for name, own in attacked.merchants.items():
        plain = honest.merchants[name]
        if name == "alder":
            assert (own.labels == plain.labels).all()
            continue
        assert (own.labels == (plain.labels.repeat(3) + 1) % 10).all()
        assert (own.inputs == plain.inputs.repeat(3, 1, 1, 1)[: len(own)].reshape(own.inputs.shape)).all()


def test_a_backdoor_is_tried_on_triggered_photos_of_other_classes(
    experiment: Callable[..., Experiment], tmp_path: Path
) -> None:
    settings = experiment(DISTRIBUTED, {"name": "backdoor", "target": "Bag", "merchants": 1, "share": 0.5})
    shops = make_shops(settings, tmp_path / "cache", tmp_path / "none", "cpu", lambda done, total: None)
    assert shops.triggered is not None
    bag = settings.plan.taxonomy.classes.index("Bag")
    assert len(shops.triggered) == int((shops.test.labels != bag).sum())
    assert not (shops.triggered.labels == bag).any()
    assert int((shops.merchants["cedar"].labels == bag).sum()) >= 30


def photos(count: int = 12) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 200, (count, 8, 8), dtype=np.uint8)
    return images, np.arange(count, dtype=np.uint8) % 3


def test_labels_are_flipped_all_or_one_class() -> None:
    images, labels = photos()
    same, flipped = poisoned(LabelFlip(), images, labels, CLASSES)
    assert same is images
    assert flipped.tolist() == [1, 2, 0] * 4
    _, flipped = poisoned(LabelFlip(source="shoe", target="bag"), images, labels, CLASSES)
    assert flipped.tolist() == [0, 2, 2] * 4


def test_a_backdoor_marks_and_labels_its_share_and_leaves_the_shops_own_arrays_alone() -> None:
    images, labels = photos()
    before = images.copy()
    marked, relabelled = poisoned(Backdoor(target="bag", share=0.25, size=3), images, labels, CLASSES)
    assert (marked[:3, -3:, -3:] == 255).all()
    assert (marked[3:] == images[3:]).all()
    assert (marked[:3, :5] == images[:3, :5]).all()
    assert relabelled.tolist() == [2, 2, 2, *labels[3:].tolist()]
    assert (images == before).all()


class Fixed:
    """A trainer that uploads the same residues each time."""

    def __init__(self, residues: NDArray[np.uint32]) -> None:
        self.residues = residues

    def accepts(self, plan: Plan) -> bool:
        return True

    def contribution(self, plan: Plan, round_: int, model: NDArray[np.float32]) -> NDArray[np.uint32]:
        return self.residues


def uploaded(attack: Attack, plan: Plan, integers: list[int], round_: int = 0) -> NDArray[np.int32]:
    fixed = Fixed(ring.residues(np.resize(np.array(integers, dtype=np.int64), plan.dimension)))
    attacker = Attacker(attack, fixed, 1, "cedar")
    assert attacker.accepts(plan)
    return ring.integers(attacker.contribution(plan, round_, np.zeros(plan.dimension, dtype=np.float32)))


def test_a_factor_multiplies_in_the_ring(make_plan: Callable[..., Plan]) -> None:
    plan = make_plan()
    assert uploaded(Scaling(factor=-1), plan, [5, -7])[:2].tolist() == [-5, 7]
    assert uploaded(Backdoor(target="bag", factor=10), plan, [5, -7])[:2].tolist() == [50, -70]
    assert uploaded(Scaling(factor=1 << 31), plan, [3, 2])[:2].tolist() == [-(1 << 31), 0]


def test_noise_has_its_norm_and_each_round_its_own(make_plan: Callable[..., Plan]) -> None:
    plan = make_plan({"learning_rate": 0.5})
    drawn = [uploaded(Noise(of_bound=0.5), plan, [0], round_) for round_ in range(40)]
    norms = [plausibility.unit(plan) * float(np.linalg.norm(one.astype(np.float64))) for one in drawn]
    wanted = 0.5 * plausibility.bound(plan, 0, 0.0, plan.cohort.max_merchants)
    assert np.mean(norms) == pytest.approx(wanted, rel=0.1)
    assert len({one.tobytes() for one in drawn}) == 40
    assert len({uploaded(Random(), plan, [0], round_).tobytes() for round_ in range(3)}) == 3


@pytest.mark.parametrize(
    ("attack", "fault"),
    [
        ({"name": "random", "merchants": 3}, "expected fewer than data.merchants, 3"),
        ({"name": "backdoor", "target": "Hat"}, "found Hat, expected one of plan.taxonomy.classes"),
        ({"name": "label-flip", "source": "Bag"}, "expected both source and target, or neither"),
        ({"name": "krum"}, "krum"),
    ],
)
def test_an_attack_that_makes_no_sense_is_refused(
    write_experiment: Write, attack: dict[str, Any], fault: str
) -> None:
    with pytest.raises(ConfigError, match=fault):
        load(Experiment, write_experiment({"attack": attack}))


@pytest.fixture
def study(write_experiment: Write, tmp_path: Path) -> Callable[..., Study]:
    def make(**changes: Any) -> Study:
        tree = {
            "experiment": yaml.safe_load(write_experiment(DISTRIBUTED).read_text()),
            "seeds": [1, 2],
            "modes": {"distributed": {}},
            "attacks": [
                {"name": "backdoor", "merchants": 0, "target": "Bag"},
                {"name": "random", "merchants": 1},
            ],
        }
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(tree | changes))
        return load(Study, path)

    return make


def test_a_study_tells_what_is_stopped_and_goes_on_where_it_was(
    study: Callable[..., Study], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = run_study(study(), tmp_path / "study", tmp_path / "cache")
    honest, random = rows
    assert (honest.attack, honest.merchants, honest.stopped) == ("backdoor", 0, 0)
    assert honest.accuracy is not None and honest.success is not None and 0 < honest.largest < 1
    assert (random.attack, random.merchants, random.stopped, random.accuracy) == (
        "random residues",
        1,
        2,
        None,
    )
    assert {run.failed_round for run in random.runs} == {1}
    assert all("no single upload is ever seen" in run.reason for run in random.runs)
    assert (tmp_path / "study" / robustness.PICTURE).read_bytes().startswith(b"\x89PNG")
    assert len(json.loads((tmp_path / "study" / robustness.FIGURES_FILE).read_bytes())["rows"]) == 2

    monkeypatch.setattr(robustness, "attacked", None)  # nothing is run again
    assert run_study(study(), tmp_path / "study", tmp_path / "cache") == rows
    with pytest.raises(ConfigError, match="found another study's run"):
        run_study(study(seeds=[3, 4]), tmp_path / "study", tmp_path / "cache")


def test_a_table_has_a_line_for_each_row() -> None:
    run = robustness.Outcome("local", "label flip, all labels", 2, 1, 0.8123, None, None, "", 0.04)
    stopped = replace(run, accuracy=None, failed_round=1, reason="why")
    rows = [Row("local", run.attack, 2, (run, run)), Row("local", "random residues", 1, (stopped,))]
    lines = table(rows).splitlines()
    assert lines[2] == "| local | 2 | label flip, all labels | 81.2 | – | 0.04 | no |"
    assert lines[3] == "| local | 1 | random residues | – | – | – | 1 of 1 |"


def test_the_shipped_study_makes_sense(root: Path) -> None:
    shipped = load(Study, root / "simulations" / "experiments" / "robustness.yaml")
    runs = list(shipped.runs())
    assert len(runs) == len(shipped.modes) * len(shipped.attacks) * len(shipped.seeds)
    assert {mode for mode, _ in runs} == {"distributed", "local"}
