"""A recognizer and pictures small enough for tests of what is the shop's own."""

from datetime import UTC, datetime

import numpy as np
from PIL import Image

from hanse_common.vision.recipe import Recipe
from hanse_common.vision.recipe_features import Preprocessing, Projection, Scattering
from hanse_common.vision.recipe_model import Linear
from hanse_common.vision.recognizer import Recognizer
from hanse_common.vision.taxonomy import Taxonomy

CLASSES = ("shirt", "shoe")
RECIPE = Recipe(
    preprocessing=Preprocessing(size=8, channels=1),
    backbone=Scattering(scales=1, angles=2, groups=None, projection=Projection(dimensions=8)),
    model=Linear(),
)

KINDS = ("fine stripes", "coarse stripes", "fine board", "coarse board")
OWN = {"fine stripes": "shirt", "coarse stripes": "shirt", "fine board": "shoe", "coarse board": "shoe"}


def picture(kind: int, seed: int) -> Image.Image:
    step = (2, 4)[kind % 2]
    down, across = np.indices((16, 16)) // step % 2
    pattern = down if kind < 2 else down ^ across
    noise = np.random.default_rng(seed).normal(scale=25, size=(16, 16))
    return Image.fromarray(np.clip(80 + 90 * pattern + noise, 0, 255).astype(np.uint8)).convert("RGB")


def league(recipe: Recipe = RECIPE, classes: tuple[str, ...] = CLASSES, scale: float = 3.0) -> Recognizer:
    """Return a recognizer whose head tells classes by the first features."""
    weight = np.zeros((len(classes), recipe.feature_dimension), np.float32)
    np.fill_diagonal(weight, scale)
    vector = np.concatenate([weight.ravel(), np.zeros(len(classes), np.float32)]).astype(np.float32)
    return Recognizer.create(
        recipe, Taxonomy(classes=classes), vector, created=datetime(2026, 1, 1, tzinfo=UTC)
    )
