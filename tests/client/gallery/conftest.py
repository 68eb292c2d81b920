"""What tests of the gallery share: small stored photos, unit vectors, and a gallery in a folder of its own."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from hanse_client.gallery.gallery import Gallery

EMBEDDING = bytes(range(32))
DIMENSION = 16


@pytest.fixture
def embedding() -> bytes:
    """The name of the embedding that most tests use."""
    return EMBEDDING


@pytest.fixture
def jpeg() -> Callable[[int], bytes]:
    """Return a function that makes the stored form of the photo with a number; others look different."""

    def make(number: int) -> bytes:
        data = io.BytesIO()
        pixels = np.random.default_rng(number).integers(256, size=(16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(data, "JPEG", quality=95, comment=str(number).encode())
        return data.getvalue()

    return make


@pytest.fixture
def unit() -> Callable[..., NDArray[np.float32]]:
    """Return a function that makes n unit rows (n, d) of a seed."""

    def make(n: int, seed: int = 0, d: int = DIMENSION) -> NDArray[np.float32]:
        rows = np.random.default_rng(seed).standard_normal((n, d))
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)

    return make


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the gallery lies."""
    return tmp_path / "gallery"


@pytest.fixture
def gallery(folder: Path) -> Iterator[Gallery]:
    """An empty gallery."""
    with Gallery.open(folder) as gallery:
        yield gallery
