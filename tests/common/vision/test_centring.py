"""A centre: what it does to features, and that no file but the recipe's is taken for one."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors.numpy import save

from hanse_common.errors import RecognizerError
from hanse_common.vision.centring import Centre, centred, load_centre
from hanse_common.vision.recipe import Recipe
from hanse_common.vision.recipe_features import Projection, Scattering


def features(count: int = 50, dimension: int = 8) -> NDArray[np.float32]:
    rng = np.random.default_rng(1)
    return (rng.normal(size=(count, dimension)) + 3).astype(np.float32)


def recipe(centre: str | None = None, norm: float = 1.0) -> Recipe:
    return Recipe(
        backbone=Scattering(projection=Projection(dimensions=8), norm=norm),
        centre=centre,
    )


def test_features_are_seen_from_the_mean_and_have_the_norm_again() -> None:
    x = features()
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    centre = Centre(unit.mean(axis=0), 0.05, 1e-6)
    moved = centre.apply(x, 5.0)
    wanted = unit - unit.mean(axis=0)
    wanted = 5 * wanted / np.linalg.norm(wanted, axis=1, keepdims=True)
    np.testing.assert_allclose(moved, wanted, rtol=1e-4, atol=1e-5)
    assert moved.dtype == np.float32
    np.testing.assert_allclose(centre.apply(7 * x, 5.0), moved, rtol=1e-3, atol=1e-4)


def test_what_is_zero_stays_zero() -> None:
    x = features(3)
    x[1] = 0
    moved = Centre(np.full(8, 0.3, dtype=np.float32), 0, 0).apply(x, 1.0)
    assert not moved[1].any()
    assert np.isfinite(moved).all()


def test_without_a_centre_nothing_moves() -> None:
    x = features()
    assert centred(x, recipe(), None) is x
    assert load_centre(recipe(), None) is None


def test_a_file_is_the_recipes_or_refused(tmp_path: Path) -> None:
    centre = Centre(np.linspace(0, 1, 8, dtype=np.float32), 0.05, 1e-6)
    path = tmp_path / "centre.safetensors"
    path.write_bytes(centre.to_bytes())
    named = recipe(centre.digest)
    loaded = load_centre(named, path)
    assert loaded is not None
    assert np.array_equal(loaded.mean, centre.mean)
    assert (loaded.epsilon, loaded.delta) == (0.05, 1e-6)
    with pytest.raises(RecognizerError, match="name that file"):
        load_centre(named, None)
    with pytest.raises(RecognizerError, match=r"other\.safetensors"):
        load_centre(named, tmp_path / "other.safetensors")
    path.write_bytes(Centre(centre.mean + 1, 0.05, 1e-6).to_bytes())
    with pytest.raises(RecognizerError, match="the recipe names"):
        load_centre(named, path)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"nothing of the kind", "not a safetensors file"),
        (save({"mean": np.zeros(7, dtype=np.float32)}), r"shape \(8,\)"),
        (save({"mean": np.zeros(8, dtype=np.float64)}), "float32"),
        (save({"average": np.zeros(8, dtype=np.float32)}), "array mean"),
        (save({"mean": np.zeros(8, dtype=np.float32)}), "array cost"),
        (save({"mean": np.array([np.nan] * 8, dtype=np.float32), "cost": np.zeros(2)}), "not finite"),
        (save({"mean": np.zeros(8, dtype=np.float32), "cost": np.array([-1.0, 0])}), "below zero"),
        (save({"mean": np.zeros(8, dtype=np.float32), "cost": np.array([np.inf, 0])}), "not finite"),
    ],
)
def test_bytes_that_are_no_centre_are_refused(tmp_path: Path, data: bytes, match: str) -> None:
    path = tmp_path / "centre.safetensors"
    path.write_bytes(data)
    with pytest.raises(RecognizerError, match=match):
        load_centre(recipe(hashlib.sha256(data).hexdigest()), path)


def test_what_is_cached_does_not_depend_on_the_centre() -> None:
    assert recipe("ab" * 32).embedding_digest() == recipe().embedding_digest()
    assert recipe("ab" * 32).digest() != recipe().digest()


def test_only_features_of_one_norm_have_a_centre() -> None:
    with pytest.raises(ValidationError, match="normalisation l2"):
        Recipe(backbone=Scattering(normalisation="none"), centre="ab" * 32)
