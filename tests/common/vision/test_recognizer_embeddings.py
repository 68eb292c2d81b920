"""What a recognizer compares photos by, and what names it."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.preprocessing import normalize

from hanse_common.errors import RecognizerError
from hanse_common.vision.centring import Centre
from hanse_common.vision.extraction import extract
from hanse_common.vision.recipe import Recipe
from hanse_common.vision.recipe_features import Preprocessing, Projection, Scattering
from hanse_common.vision.recipe_model import Linear, Mlp, SmallCnn
from hanse_common.vision.recognizer import Recognizer
from hanse_common.vision.taxonomy import Taxonomy

LINEAR = Recipe(
    preprocessing=Preprocessing(size=8),
    backbone=Scattering(groups=None, projection=Projection(dimensions=6), norm=3.0),
)
CNN = Recipe(preprocessing=Preprocessing(size=8), backbone=None, model=SmallCnn(width=4))


def recognizer(recipe: Recipe = LINEAR, *, seed: int = 0, **options: Any) -> Recognizer:
    vector = np.random.default_rng(seed).standard_normal(recipe.dimension(2)).astype(np.float32)
    taxonomy = Taxonomy(classes=("Shirt", "Tasche"))
    return Recognizer.create(recipe, taxonomy, vector, created=datetime(2026, 1, 2, tzinfo=UTC), **options)


def photos(n: int) -> list[Image.Image]:
    generator = np.random.default_rng(7)
    return [Image.fromarray(generator.integers(0, 256, (20, 12, 3), dtype=np.uint8)) for _ in range(n)]


def centred_by(folder: Path, mean: float) -> Recognizer:
    centre = Centre(np.full(6, mean, dtype=np.float32), 0.05, 1e-6)
    path = folder / f"{mean}.safetensors"
    path.write_bytes(centre.to_bytes())
    return recognizer(LINEAR.model_copy(update={"centre": centre.digest}), centre=path)


def test_probabilities_are_those_of_the_features() -> None:
    made = recognizer()
    features = made.features(photos(5))
    assert features.shape == (5, 6)
    assert features.dtype == np.float32
    np.testing.assert_array_equal(made.probabilities(features), made.predict(photos(5)))
    assert made.features([]).shape == (0, 6)


def test_features_are_the_backbones_seen_from_the_centre(tmp_path: Path) -> None:
    made = recognizer()
    raw = extract(made._backbone, photos(4), LINEAR.views)
    np.testing.assert_array_equal(made.features(photos(4)), raw)
    moved = normalize(normalize(raw) - 0.1) * 3
    np.testing.assert_allclose(centred_by(tmp_path, 0.1).features(photos(4)), moved, rtol=1e-4, atol=1e-5)


def test_embeddings_are_the_features_with_norm_1() -> None:
    made = recognizer()
    features = made.features(photos(4))
    found = made.embeddings(features)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, normalize(features.astype(np.float64)), atol=1e-7)
    features[1] = 0
    assert not made.embeddings(features)[1].any()
    assert made.embeddings(np.empty((0, 6), dtype=np.float32)).shape == (0, 6)


def test_the_digest_names_what_the_embedding_depends_on(tmp_path: Path) -> None:
    digest = recognizer().embedding_digest()
    assert len(digest) == 32
    mlp = LINEAR.model_copy(update={"model": Mlp(hidden=3)})
    for same in (recognizer(seed=1), recognizer(mlp), recognizer(epsilon=1.0, delta=1e-5)):
        assert same.embedding_digest() == digest
    other = LINEAR.model_copy(update={"preprocessing": Preprocessing(size=12), "model": Linear()})
    others = [recognizer(other), centred_by(tmp_path, 0.1), centred_by(tmp_path, 0.2)]
    assert len({digest, *(one.embedding_digest() for one in others)}) == 4


def test_a_model_that_is_trained_whole_has_no_embedding() -> None:
    made = recognizer(CNN)
    assert made.features(photos(2)).shape == (2, 3, 8, 8)
    with pytest.raises(RecognizerError, match="no embedding"):
        made.embeddings(made.features(photos(2)))
    with pytest.raises(RecognizerError, match="no embedding"):
        made.embedding_digest()
