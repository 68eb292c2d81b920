"""The operator's public reference photos become the recipe's whitening. No merchant's photo is ever here.

    fitted = fit_whitening(recipe, images, dimensions=192)
    path.write_bytes(fitted.file)                   # handed to the merchants beside the plan
    fitted.name.weights                             # the digest that the plan names

The mathematics is in `hanse_common.vision.whitening`.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from hanse_common.errors import RecognizerError
from hanse_common.vision.backbones import raw_features
from hanse_common.vision.extraction import extract
from hanse_common.vision.recipe import Recipe
from hanse_common.vision.recipe_features import PublicWhitening
from hanse_common.vision.whitening import Whitening


@dataclass(frozen=True)
class FittedWhitening:
    """The whitening's name, the recipe that holds it, the file's content, and how many photos it was fitted to."""

    name: PublicWhitening
    recipe: Recipe
    file: bytes
    photos: int


def fit_whitening(
    recipe: Recipe, images: Iterable[Image.Image], dimensions: int, weights: Path | None = None
) -> FittedWhitening:
    """Return `recipe` with a whitening to `dimensions` numbers, fitted to public `images`; a projection goes.

    Images are taken one by one: only their features, 4·raw_dimension bytes each, stay in memory.
    `weights` is the backbone's local file, if any. Raises `RecognizerError` when the recipe has no backbone, or
    there are fewer images, or features, than dimensions.
    """
    if recipe.backbone is None:
        raise RecognizerError("The recipe has no backbone, so it has no features to whiten.")
    network = raw_features(recipe, weights=weights)
    features = extract(network, images, recipe.views)
    file = Whitening.fit(features, dimensions).to_bytes()
    name = PublicWhitening(dimensions=dimensions, weights=hashlib.sha256(file).hexdigest())
    backbone = recipe.backbone.model_copy(update={"projection": None, "whitening": name})
    return FittedWhitening(name, recipe.model_copy(update={"backbone": backbone}), file, len(features))
