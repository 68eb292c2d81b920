"""Experiments in YAML: the shipped ones load, and whatever is wrong is named."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hanse_common.config import load
from hanse_common.errors import ConfigError
from hanse_server.optimizers import create
from hanse_simulations.experiment import Dirichlet, Experiment, Iid
from hanse_simulations.shops import require_classes

Write = Callable[..., Path]
FOLDER = Path(__file__).parents[2] / "simulations" / "experiments"
STUDIES = {"robustness.yaml"}  # of many experiments each; their own tests load them
SHIPPED = sorted(path for path in FOLDER.glob("*.yaml") if path.name not in STUDIES)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_experiments_load(path: Path) -> None:
    experiment = load(Experiment, path)
    assert experiment.name == path.stem
    require_classes(experiment.plan.taxonomy)
    create(experiment.optimization.optimizer)
    assert experiment.data.folder.resolve() == path.parents[2] / ".data" / "fashion-mnist"


def test_there_are_shipped_experiments() -> None:
    assert {"demo.yaml", "smoke.yaml", "cnn.yaml"} <= {path.name for path in SHIPPED}


def test_defaults(write_experiment: Write) -> None:
    experiment = load(Experiment, write_experiment())
    assert experiment.data.partition == Iid()
    assert (experiment.dropout_rate, experiment.evaluate_every, experiment.extensions) == (0.0, 1, ())
    skewed = load(Experiment, write_experiment({"data.partition": {"kind": "dirichlet"}}))
    assert skewed.data.partition == Dirichlet(alpha=1.0)


def test_all_faults_are_listed(write_experiment: Write) -> None:
    path = write_experiment(
        {
            "seed": -1,
            "data.merchants": "five",
            "data.partition": {"kind": "normal"},
            "plan.training.sampling_rate": 2,
            "dropout_rat": 0.5,
        }
    )
    with pytest.raises(ConfigError) as found:
        load(Experiment, path)
    lines = str(found.value).splitlines()
    assert all(line.startswith(f"{path}:") for line in lines)
    for words in (
        "seed: found -1",
        "data.merchants: found 'five'",
        "data.partition.kind: found 'normal'",
        "plan.training.sampling_rate: found 2",
        "dropout_rat: unknown key, did you mean dropout_rate?",
    ):
        assert any(words in line for line in lines), words


PROJECTED = {"name": "scattering", "scales": 1, "angles": 2, "groups": None, "projection": {"dimensions": 4}}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"plan.cohort.min_merchants": 3, "data.merchants": 2}, "data.merchants is 2"),
        ({"data.merchants": 4}, "or some would never be asked"),
        ({"whiten": {"dimensions": 5, "photos": 9000}, "data.test_photos": 1001}, "at most 10000 together"),
        ({"whiten": {"dimensions": 5}, "plan.recipe.backbone": PROJECTED}, "without projection"),
        (
            {
                "whiten": {"dimensions": 5},
                "plan.recipe.backbone": None,
                "plan.recipe.model": {"name": "cnn"},
            },
            "expected a plan.recipe.backbone",
        ),
    ],
)
def test_values_that_contradict_each_other(
    write_experiment: Write, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        load(Experiment, write_experiment(changes))
