"""What several test files need: a small plan, and the folder of public data."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Tests run side by side, one process a core; torch's threads would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from hanse_common.plan import Cohort, LocalTraining, Plan
from hanse_common.vision.recipe import Linear, Preprocessing, Projection, Recipe, Scattering
from hanse_common.vision.taxonomy import Taxonomy

ROOT = Path(__file__).parent.parent

TRAINING: dict[str, Any] = {
    "rounds": 4,
    "local_steps": 2,
    "sampling_rate": 0.2,
    "expected_batch": 20.0,
    "clipping_norm": 1.0,
    "learning_rate": 0.5,
    "noise_multiplier": 2.0,
}


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Where `make install` puts Fashion-MNIST."""
    return ROOT / ".data" / "fashion-mnist"


@pytest.fixture
def make_plan() -> Callable[..., Plan]:
    """Return a function that makes a small valid plan, changed by keyword."""

    def make(training: dict[str, Any] | None = None, **changes: Any) -> Plan:
        recipe = Recipe(
            preprocessing=Preprocessing(size=8, channels=1),
            backbone=Scattering(scales=1, angles=2, groups=None, projection=Projection(dimensions=6)),
            model=Linear(),
        )
        taxonomy = Taxonomy(classes=("shirt", "shoe", "bag"))
        fields: dict[str, Any] = {
            "league": "test",
            "serial": bytes(16),
            "recipe": recipe,
            "taxonomy": taxonomy,
            "dimension": recipe.dimension(3),
            "training": LocalTraining(**(TRAINING | (training or {}))),
            "cohort": Cohort(min_merchants=2, max_merchants=5),
            "delta": 1e-5,
            "update_bound": 8.0,
        }
        return Plan(**(fields | changes))

    return make
