"""The operator's public reference photos become the recipe's whitening. No merchant's photo is ever here.

fitted = fit_whitening(recipe, images, dimensions=192)
path.write_bytes(fitted.file)                   # handed to the merchants beside the plan
fitted.recipe.backbone.whitening.weights        # the digest that the plan names
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from hanse_common.errors import RecognizerError
from hanse_common.vision.backbones import extract, raw_features
from hanse_common.vision.recipe import PublicWhitening, Recipe
from hanse_common.vision.whitening import Whitening


@dataclass(frozen=True)
class FittedWhitening:
    """The recipe that names the whitening, and the content of its file."""

    recipe: Recipe
    file: bytes


def fit_whitening(
    recipe: Recipe, images: Sequence[Image.Image], dimensions: int, weights: Path | None = None
) -> FittedWhitening:
    """Return `recipe` with a whitening to `dimensions` numbers, fitted to public `images`.

    `weights` is the backbone's local file, if any. Raises `RecognizerError` when the recipe has no backbone, or
    there are fewer images than dimensions.
    """
    if recipe.backbone is None:
        raise RecognizerError("The recipe has no backbone, so it has no features to whiten.")
    network = raw_features(recipe, weights=weights)
    file = Whitening.fit(extract(network, images, recipe.preprocessing), dimensions).to_bytes()
    named = PublicWhitening(dimensions=dimensions, weights=hashlib.sha256(file).hexdigest())
    backbone = recipe.backbone.model_copy(update={"projection": None, "whitening": named})
    return FittedWhitening(recipe.model_copy(update={"backbone": backbone}), file)
