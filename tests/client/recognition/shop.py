"""A small shop: recognizers whose embeddings are alike or differ, photos that can be told apart, a configuration."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tests.client.released import CLASSES, OPERATOR, Made

from hanse_client.config import ClientConfig
from hanse_client.releases import Releases
from hanse_common import signing
from hanse_common.vision.recipe import Recipe
from hanse_common.vision.recipe_features import Preprocessing, Projection, Scattering
from hanse_common.vision.recipe_model import Linear
from hanse_common.vision.recognizer import Recognizer

DIMENSION = 24


def recipe(projection: int) -> Recipe:
    """Return a recipe whose embedding is another one for each `projection`, all of one dimension."""
    return Recipe(
        preprocessing=Preprocessing(size=16, channels=1),
        backbone=Scattering(
            scales=1, angles=4, groups=None, projection=Projection(dimensions=DIMENSION, seed=projection)
        ),
        model=Linear(),
    )


class Shelf:
    """Recognizers in memory, each with its files, and as the league's own code computes."""

    def __init__(self, folder: Path) -> None:
        self.made: dict[tuple[int, int], Made] = {}
        self.known: dict[bytes, Recognizer] = {}
        for embedding, head in ((0, 0), (0, 1), (1, 0), (2, 0)):
            place = folder / f"{embedding}-{head}"
            made = Made(place, seed=head, recipe=recipe(embedding))
            self.made[embedding, head] = made
            self.known[bytes.fromhex(made.digest)] = Recognizer.load(place)


def shop(folder: Path, **changes: Any) -> ClientConfig:
    """Return the configuration of a shop whose recognizers are those that the league releases."""
    (folder / "photos").mkdir(parents=True, exist_ok=True)
    found = {
        "photos": folder / "photos",
        "state": folder / "state",
        "device": "cpu",
        "league": {
            "operator_key": signing.public_bytes(OPERATOR).hex(),
            "charter": "00" * 32,
            "taxonomy": {"classes": CLASSES},
        },
        "policy": {"league": "test", "epsilon": 6.0, "delta": 2e-5},
    }
    return ClientConfig.model_validate(found | changes)


def release(config: ClientConfig, made: Made, number: int) -> Path:
    """Have the recognizer be the one that the league released last."""
    releases = Releases.of(config)
    return releases.take(releases.consider(made.signed(number)), made.fetch)


def picture(seed: int, width: int = 48, height: int = 40) -> Image.Image:
    """Return a picture of coarse blocks, another one for each seed, which a JPEG keeps well."""
    blocks = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST)
