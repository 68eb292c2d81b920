"""Fitting a whitening: the file, the name, and the recipe that results belong together."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hanse_common.errors import RecognizerError
from hanse_common.vision.backbones import load_backbone
from hanse_common.vision.extraction import extract
from hanse_common.vision.recipe import Recipe
from hanse_common.vision.recipe_features import Preprocessing, Projection, Scattering
from hanse_common.vision.recipe_model import SmallCnn
from hanse_server.whitening import fit_whitening

RECIPE = Recipe(
    preprocessing=Preprocessing(size=8, channels=1),
    backbone=Scattering(scales=1, angles=2, groups=None, normalisation="none"),
)


def images(count: int) -> Iterator[Image.Image]:
    rng = np.random.default_rng(1)
    for _ in range(count):
        # Correlated neighbours, or there is nothing to decorrelate.
        small = Image.fromarray(rng.integers(0, 256, (3, 3), dtype=np.uint8))
        yield small.resize((8, 8), Image.Resampling.BICUBIC)


def test_the_reference_photos_come_out_centred_and_uncorrelated(tmp_path: Path) -> None:
    fitted = fit_whitening(RECIPE, images(150), 3)
    path = tmp_path / "w.safetensors"
    path.write_bytes(fitted.file)
    features = extract(load_backbone(fitted.recipe, whitening=path), list(images(150)), RECIPE.views)
    assert (fitted.photos, features.shape) == (150, (150, 3))
    covariance = np.cov(features.T)
    assert np.allclose(features.mean(0), 0, atol=1e-4)
    assert np.allclose(covariance, np.diag(np.diag(covariance)), atol=1e-3)
    assert np.all(np.diag(covariance) < 1)


def test_the_recipe_names_the_file_and_loses_its_projection() -> None:
    backbone = RECIPE.backbone.model_copy(update={"projection": Projection(dimensions=4)})  # type: ignore[union-attr]
    fitted = fit_whitening(RECIPE.model_copy(update={"backbone": backbone}), images(20), 3)
    assert fitted.name.weights == hashlib.sha256(fitted.file).hexdigest()
    assert fitted.recipe.backbone.whitening == fitted.name  # type: ignore[union-attr]
    # What was built field by field also holds as a whole.
    assert Recipe.model_validate(fitted.recipe.model_dump()) == fitted.recipe
    assert fitted.recipe.feature_dimension == 3


def test_fitting_again_gives_the_same_file_even_on_top_of_the_first() -> None:
    first = fit_whitening(RECIPE, images(70), 3)
    assert fit_whitening(RECIPE, images(70), 3).file == first.file
    assert fit_whitening(first.recipe, images(70), 3).file == first.file


def test_what_cannot_be_fitted() -> None:
    with pytest.raises(RecognizerError, match="found 2 photos"):
        fit_whitening(RECIPE, images(2), 3)
    with pytest.raises(RecognizerError, match="found 0 photos"):
        fit_whitening(RECIPE, [], 3)
    with pytest.raises(RecognizerError, match="of 48 features"):
        fit_whitening(RECIPE, images(60), 49)
    with pytest.raises(RecognizerError, match="no backbone"):
        fit_whitening(Recipe(backbone=None, model=SmallCnn()), images(5), 3)
