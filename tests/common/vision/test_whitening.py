"""Whitening against the definition, and its file against whoever changes it."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save

from hanse_common.errors import RecognizerError
from hanse_common.vision.whitening import RIDGE, Whitening


@pytest.fixture(scope="module")
def features() -> NDArray[np.float32]:
    """Correlated, off-centre features of 500 photos."""
    rng = np.random.default_rng(3)
    return (rng.normal(size=(500, 6)) @ rng.normal(size=(6, 20)) + 2).astype(np.float32)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_it_is_the_whitening_of_the_definition(features: NDArray[np.float32]) -> None:
    whitening = Whitening.fit(features, 5)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    assert np.allclose(whitening.mean, unit.mean(0), atol=1e-6)
    white = (unit - whitening.mean) @ whitening.matrix
    eigenvalues = np.sort(np.linalg.eigvalsh(np.cov(unit.T)))[::-1][:5]
    assert np.allclose(np.cov(white.T), np.diag(eigenvalues / (eigenvalues + RIDGE)), atol=1e-3)


def test_fitting_twice_gives_the_same_bytes(features: NDArray[np.float32]) -> None:
    assert Whitening.fit(features, 5).to_bytes() == Whitening.fit(features, 5).to_bytes()


def test_the_file_round_trips(features: NDArray[np.float32], tmp_path: Path) -> None:
    whitening = Whitening.fit(features, 5)
    data = whitening.to_bytes()
    path = tmp_path / "whitening.safetensors"
    path.write_bytes(data)
    again = Whitening.load(path, digest(data), 20, 5)
    assert np.array_equal(again.mean, whitening.mean)
    assert np.array_equal(again.matrix, whitening.matrix)


def test_a_black_photo_has_features(features: NDArray[np.float32]) -> None:
    with_black = np.concatenate([features, np.zeros((1, 20), dtype=np.float32)])
    assert np.isfinite(Whitening.fit(with_black, 5).matrix).all()


def test_too_few_photos_are_refused(features: NDArray[np.float32]) -> None:
    with pytest.raises(RecognizerError, match="found 4 photos"):
        Whitening.fit(features[:4], 5)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"mean": np.zeros(20, np.float32)}, "expected float32 arrays"),
        ({"mean": np.zeros(20, np.float32), "matrix": np.zeros((20, 4), np.float32)}, "expected float32"),
        ({"mean": np.zeros(20, np.float64), "matrix": np.zeros((20, 5), np.float32)}, "expected float32"),
        ({"mean": np.full(20, np.nan, np.float32), "matrix": np.zeros((20, 5), np.float32)}, "not finite"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(arrays: dict[str, NDArray[np.float32]], words: str) -> None:
    data = save(arrays)
    with pytest.raises(RecognizerError, match=words):
        Whitening.from_bytes(data, digest(data), 20, 5)


def test_other_bytes_than_the_recipe_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecognizerError, match="SHA-256"):
        Whitening.from_bytes(b"x", digest(b"y"), 20, 5)
    with pytest.raises(RecognizerError, match="not a safetensors"):
        Whitening.from_bytes(b"x", digest(b"x"), 20, 5)
    with pytest.raises(RecognizerError, match="cannot be read"):
        Whitening.load(tmp_path / "none", digest(b"x"), 20, 5)


def test_a_type_that_numpy_does_not_have_is_refused() -> None:
    header = b'{"mean":{"dtype":"BF16","shape":[1],"data_offsets":[0,2]}}'
    data = len(header).to_bytes(8, "little") + header + bytes(2)
    with pytest.raises(RecognizerError, match="not a safetensors file of numpy's types"):
        Whitening.from_bytes(data, digest(data), 20, 5)


def test_just_enough_photos_do(features: NDArray[np.float32]) -> None:
    assert Whitening.fit(features[:5], 5).matrix.shape == (20, 5)
