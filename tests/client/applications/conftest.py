"""A shop with a recognizer and a gallery of real product photos, which all applications are tried on."""

import gzip
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from hanse_client.config import ClientConfig
from hanse_client.gallery.product import Product
from hanse_client.recognition.service import Recognition
from hanse_common.vision.recipe import Recipe
from hanse_common.vision.recipe_features import Preprocessing, Scattering
from hanse_common.vision.recipe_model import Linear
from hanse_common.vision.recognizer import Recognizer
from hanse_common.vision.taxonomy import Taxonomy

CLASSES = (
    "T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


@pytest.fixture(scope="session")
def pictures(data_folder: Path) -> list[tuple[Image.Image, str]]:
    """The first 120 test photos of Fashion-MNIST, each of another product, with their classes."""
    pixels = gzip.decompress((data_folder / "t10k-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((data_folder / "t10k-labels-idx1-ubyte.gz").read_bytes())
    images = np.frombuffer(pixels, np.uint8, offset=16).reshape(-1, 28, 28)[:120]
    return [
        (
            Image.fromarray(image).convert("RGB").resize((112, 112), Image.Resampling.BICUBIC),
            CLASSES[labels[8 + n]],
        )
        for n, image in enumerate(images)
    ]


def photographed(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Another photo of the same product: a little nearer, aside and darker."""
    edge = image.width
    x, y = (float(shift) for shift in rng.uniform(-0.04, 0.04, 2) * edge)
    nearer = float(rng.uniform(0.94, 1.0))
    moved = image.transform(
        image.size, Image.Transform.AFFINE, (nearer, 0, x, 0, nearer, y), Image.Resampling.BICUBIC
    )
    return ImageEnhance.Brightness(moved).enhance(float(rng.uniform(0.8, 1.0)))


@pytest.fixture(scope="session")
def another_photo() -> Callable[[Image.Image, np.random.Generator], Image.Image]:
    return photographed


def configuration(folder: Path) -> ClientConfig:
    """A shop's file with a recognizer whose head knows nothing: what is tried is the embedding."""
    recipe = Recipe(
        preprocessing=Preprocessing(size=28, channels=1),
        backbone=Scattering(scales=2, angles=8, centred=True),
        model=Linear(),
    )
    vector = np.zeros(recipe.dimension(len(CLASSES)), np.float32)
    recognizer = Recognizer.create(
        recipe, Taxonomy(classes=CLASSES), vector, created=datetime(2026, 1, 1, tzinfo=UTC)
    )
    recognizer.save(folder / "recognizer")
    found: dict[str, Any] = {
        "photos": folder / "photos",
        "state": folder / "state",
        "device": "cpu",
        "recognizer": folder / "recognizer",
        "league": {
            "operator_key": "00" * 32,
            "charter": "00" * 32,
            "taxonomy": {"classes": CLASSES},
        },
        "policy": {"league": "test", "epsilon": 1.0},
        "search": {"false_reject": 0.02},
    }
    return ClientConfig.model_validate(found)


@pytest.fixture(scope="session")
def open_shop() -> Callable[[Path], Recognition]:
    """Return a function that opens a shop with an empty gallery in a folder."""
    return lambda folder: Recognition.open(configuration(folder))


@pytest.fixture(scope="module")
def recognition(
    tmp_path_factory: pytest.TempPathFactory, pictures: list[tuple[Image.Image, str]]
) -> Iterator[Recognition]:
    """60 products, P-00 to P-59, of three photos each, priced 10.00, 11.00 and so on."""
    rng = np.random.default_rng(0)
    with Recognition.open(configuration(tmp_path_factory.mktemp("shop"))) as opened:
        for number, (image, label) in enumerate(pictures[:60]):
            product = Product(
                sku=f"P-{number:02}", title=f"{label} {number}", price=Decimal(10 + number), category=label
            )
            opened.put(product, [image, photographed(image, rng), photographed(image, rng)])
        yield opened
