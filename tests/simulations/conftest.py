"""A tiny experiment on real photos."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from hanse_simulations.datasets import CLASSES

TINY: dict[str, Any] = {
    "name": "tiny",
    "seed": 7,
    "data": {"dataset": "fashion-mnist", "merchants": 3, "photos_per_merchant": 60, "test_photos": 50},
    "plan": {
        "league": "tiny",
        "taxonomy": {"classes": list(CLASSES)},
        "recipe": {
            "preprocessing": {"size": 8, "channels": 1},
            "backbone": {"name": "scattering", "scales": 1, "angles": 2, "groups": None},
        },
        "training": {
            "mode": "local",
            "update_bound": 16,
            "rounds": 4,
            "local_steps": 2,
            "sampling_rate": 0.5,
            "expected_batch": 30,
            "clipping_norm": 0.5,
            "learning_rate": 2,
        },
        "privacy": {"epsilon": 1, "delta": 1e-5},  # a larger one takes seconds to find the noise for
        "cohort": {"min_merchants": 3, "max_merchants": 3},
    },
    "optimization": {"optimizer": {"name": "fedavgm", "momentum": 0.5}, "tail_average": 0.5},
}


@pytest.fixture
def write_experiment(tmp_path: Path, data_folder: Path) -> Callable[..., Path]:
    """Return a function that writes the tiny experiment, changed by dotted keys, and returns the file."""

    def write(changes: dict[str, Any] | None = None, name: str = "tiny.yaml") -> Path:
        tree = copy.deepcopy(TINY)
        tree["data"]["folder"] = str(data_folder)
        for where, value in (changes or {}).items():
            *outer, key = where.split(".")
            section = tree
            for step in outer:
                section = section.setdefault(step, {})
            section[key] = value
        path = tmp_path / name
        path.write_text(yaml.safe_dump(tree))
        return path

    return write
