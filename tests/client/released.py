"""Recognizers small enough for tests, releases of them, and a shelf from which they are handed out."""

import hashlib
import io
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hanse_client.releases import Releases
from hanse_common import signing
from hanse_common.release import Release, ReleasedFile, SignedRelease
from hanse_common.vision.recipe import Recipe
from hanse_common.vision.recipe_features import Preprocessing, Projection, Scattering
from hanse_common.vision.recipe_model import Linear
from hanse_common.vision.recognizer import Recognizer
from hanse_common.vision.taxonomy import Taxonomy

OPERATOR = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
CLASSES = ("shirt", "shoe", "bag")
RECIPE = Recipe(
    preprocessing=Preprocessing(size=8, channels=1),
    backbone=Scattering(scales=1, angles=2, groups=None, projection=Projection(dimensions=6)),
    model=Linear(),
)


class Made:
    """One recognizer: its files by name."""

    def __init__(
        self, folder: Path, seed: int = 0, classes: tuple[str, ...] = CLASSES, recipe: Recipe = RECIPE
    ) -> None:
        taxonomy = Taxonomy(classes=classes)
        vector = np.random.default_rng(seed).normal(size=recipe.dimension(len(classes))).astype(np.float32)
        made = Recognizer.create(recipe, taxonomy, vector, created=datetime(2026, 1, 1, tzinfo=UTC))
        made.save(folder)
        self.files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.files["card.json"]).hexdigest()

    def release(self, number: int, version: int = 1, **changes: Any) -> Release:
        fields: dict[str, Any] = {
            "league": "test",
            "number": number,
            "version": version,
            "recognizer": bytes.fromhex(self.digest),
            "files": tuple(
                ReleasedFile(name=name, digest=hashlib.sha256(data).digest(), size=len(data))
                for name, data in self.files.items()
            ),
            "made": 0,
            "reason": "better shoes",
        }
        return Release(**(fields | changes))

    def signed(self, number: int, key: Ed25519PrivateKey = OPERATOR, **changes: Any) -> SignedRelease:
        return SignedRelease.sign(self.release(number, **changes), key)

    def fetch(self, file: ReleasedFile) -> Iterator[bytes]:
        """Hand a file out honestly, in two pieces."""
        data = self.files[file.name]
        yield data[: len(data) // 2]
        yield data[len(data) // 2 :]


class Shelf:
    """A server's releases, in memory."""

    def __init__(self, *made: Made) -> None:
        self.files: dict[str, bytes] = {}
        self.signed: SignedRelease | None = None
        self.opened: list[str] = []
        for one in made:
            self.add(one)

    def add(self, made: Made) -> None:
        self.files |= {hashlib.sha256(data).hexdigest(): data for data in made.files.values()}

    def current(self) -> SignedRelease | None:
        return self.signed

    def open(self, digest: str) -> BinaryIO:
        self.opened.append(digest)
        return io.BytesIO(self.files[digest])


def releases_in(folder: Path, **changes: Any) -> Releases:
    """A shop's releases in `folder`, whose operator is `OPERATOR`."""
    fields: dict[str, Any] = {
        "path": folder,
        "league": "test",
        "operator_key": signing.public_bytes(OPERATOR),
        "taxonomy": Taxonomy(classes=CLASSES),
        "recipes": None,
    }
    return Releases(**(fields | changes))
