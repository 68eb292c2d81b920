"""The Grocery Store Dataset: 5 125 photos of groceries, taken with phones in stores, of 81 fine and 43 coarse classes.

    data = Grocery.load(Path("GroceryStoreDataset/dataset"))
    photo = data.train[0]
    photo.open(), data.coarse[photo.coarse]          # an image, "Apple"

Whoever has it gives the folder, which has `classes.csv`, `train.txt`, `val.txt` and `test.txt`; it is not fetched. Its
splits keep photos of one shelf on one side.

Reference: Klasson, Zhang, Kjellström 2019, "A Hierarchical Grocery Store Image Dataset with Visual and Semantic
Labels", github.com/marcusklasson/GroceryStoreDataset (MIT licence).
"""

import csv
import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

from PIL import Image

from hanse_common.errors import DatasetUnavailable
from hanse_common.vision import photo as photos
from hanse_common.vision.taxonomy import Taxonomy


@dataclass(frozen=True)
class GroceryPhoto:
    """One photo, with the indices of its `fine` and `coarse` class. Implements `hanse_client.embeddings.Photo`."""

    path: Path
    fine: int
    coarse: int

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the file, 32 bytes."""
        return hashlib.sha256(self.path.read_bytes()).digest()

    def open(self) -> Image.Image:
        """Return the decoded photo. Raises `PhotoError` when it can't be decoded."""
        return photos.decode(self.path, photos.LIMITS)


@dataclass(frozen=True)
class Grocery:
    """All photos; `train` has those of `train.txt` and `val.txt`. Class names are in the order of their indices."""

    train: tuple[GroceryPhoto, ...]
    test: tuple[GroceryPhoto, ...]
    fine: tuple[str, ...]
    coarse: tuple[str, ...]

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Return the dataset in `folder`. Raises `DatasetUnavailable` when a list is missing or malformed."""
        try:
            with (folder / "classes.csv").open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
            fine = {int(row["Class ID (int)"]): row["Class Name (str)"] for row in rows}
            coarse = {int(row["Coarse Class ID (int)"]): row["Coarse Class Name (str)"] for row in rows}
            lists = {name: _listed(folder, name) for name in ("train", "val", "test")}
            return cls(
                (*lists["train"], *lists["val"]),
                lists["test"],
                tuple(fine[index] for index in range(len(fine))),
                tuple(coarse[index] for index in range(len(coarse))),
            )
        except (OSError, ValueError, KeyError) as error:
            raise DatasetUnavailable(
                f"{folder}: not the Grocery Store Dataset ({error}). Clone "
                "https://github.com/marcusklasson/GroceryStoreDataset and name its folder dataset."
            ) from None

    @property
    def taxonomy(self) -> Taxonomy:
        """The coarse classes."""
        return Taxonomy(classes=self.coarse)


def _listed(folder: Path, name: str) -> tuple[GroceryPhoto, ...]:
    found = []
    for line in (folder / f"{name}.txt").read_text(encoding="utf-8").splitlines():
        path, fine, coarse = (part.strip() for part in line.split(","))
        found.append(GroceryPhoto(folder / path, int(fine), int(coarse)))
    return tuple(found)
