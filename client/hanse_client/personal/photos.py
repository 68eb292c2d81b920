"""The shop's photos with the shop's own labels: its catalog's, as they are, and the owner's corrections.

    found = gather(Shop(config), corrections)
    found.labels[found.index[0]], found.held_out[0]

A label is what a folder or a line of the catalog says, not the league's class that the label map makes of it. Labels
that the map leaves out on purpose stay out; labels without a class do count here. Labels are equal where they differ in
case, spaces and Unicode form alone.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hanse_client.duplicates import SAME
from hanse_client.embeddings import Photo
from hanse_client.personal.corrections import LIMITS, Correction, Corrections
from hanse_client.shop import Shop
from hanse_common.errors import CatalogError, PhotoUnreadable
from hanse_common.vision import photo as photos
from hanse_common.vision.taxonomy import LabelMap, folded


@dataclass
class OwnLabels:
    """Numbers for the shop's labels, given as they come; the league's `mapping` says which are left out."""

    mapping: LabelMap
    names: list[str] = field(default_factory=list)
    _numbers: dict[str, int] = field(default_factory=dict)

    def encode(self, label: str) -> int | None:
        """Return the number of `label`, None where the map leaves it out."""
        if self.left_out(label):
            return None
        if folded(label) not in self._numbers:
            self._numbers[folded(label)] = len(self.names)
            self.names.append(label.strip())
        return self._numbers[folded(label)]

    def left_out(self, label: str) -> bool:
        """Return whether the map leaves `label` out on purpose."""
        return self.mapping.left_out(label)

    def class_of(self) -> list[int | None]:
        """Return the league's class of each label, None for one outside of the taxonomy."""
        return [self.mapping.encode(name) for name in self.names]


@dataclass(frozen=True)
class StoredPhoto:
    """A prepared photo in a database of the shop: its SHA-256, and what returns the JPEG of a SHA-256."""

    digest: bytes
    source: Callable[[bytes], bytes | None] = field(repr=False)

    def open(self) -> Image.Image:
        """Return the decoded photo. Raises `PhotoError` when it is gone or damaged."""
        jpeg = self.source(self.digest)
        if jpeg is None or hashlib.sha256(jpeg).digest() != self.digest:
            raise PhotoUnreadable(
                f"Photo {self.digest.hex()[:12]}: found gone or altered, expected what was kept. Add it again."
            )
        return photos.decode(jpeg, LIMITS)


@dataclass(frozen=True)
class LabelledPhotos:
    """`labels[index[i]]` is what `photos[i]` shows; the first `from_catalog` are the catalog's, then come corrections.

    `class_of` is the league's class of each label; `products[i]` the SKU, if known; `held_out[i]` whether the photo is
    never trained on.
    """

    photos: tuple[Photo, ...]
    from_catalog: int
    labels: tuple[str, ...]
    class_of: tuple[int | None, ...]
    index: NDArray[np.int64]
    held_out: NDArray[np.bool_]
    products: tuple[str | None, ...]


def gather(shop: Shop, corrections: Corrections) -> LabelledPhotos:
    """Return the shop's labelled photos. Raises `CatalogError` when there is none, and as `Shop.catalog` does."""
    own = OwnLabels(shop.labels())
    try:
        records = shop.catalog(labels=own).records
    except CatalogError:
        if not corrections.labels():
            raise
        records = ()
    said = [each for each in every(corrections) if each.label is not None]
    numbered = [(each, number) for each in said if (number := own.encode(each.label or "")) is not None]
    stored = [StoredPhoto(each.photo, corrections.photo) for each, _ in numbered]
    return LabelledPhotos(
        photos=(*records, *stored),
        from_catalog=len(records),
        labels=tuple(own.names),
        class_of=tuple(own.class_of()),
        index=np.array([*(r.label for r in records), *(number for _, number in numbered)], dtype=np.int64),
        held_out=np.array(
            [*(r.holdout for r in records), *(shop.holds_out(p.digest) for p in stored)], dtype=np.bool_
        ),
        products=(*(r.sku for r in records), *(None for _ in stored)),
    )


def every(corrections: Corrections) -> Iterator[Correction]:
    """Yield all corrections that hold."""
    after = 0
    while page := corrections.list(after=after):
        yield from page
        after = page[-1].number


def copies(features: NDArray[np.float32], of: NDArray[np.float32], chunk: int = 256) -> NDArray[np.intp]:
    """Return for each row of `features`, (n, F), the row of `of`, (m, F), that is the same picture, else −1."""
    found = np.full(len(features), -1, dtype=np.intp)
    if len(of) == 0:
        return found
    others = _unit(of)
    for start in range(0, len(features), chunk):
        cosines = _unit(features[start : start + chunk]) @ others.T
        nearest = cosines.argmax(axis=1)
        near = cosines[np.arange(len(nearest)), nearest] >= SAME
        found[start : start + chunk][near] = nearest[near]
    return found


def _unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    unit: NDArray[np.float32] = rows / np.maximum(
        np.linalg.norm(rows, axis=1, keepdims=True), np.float32(1e-12)
    )
    return unit
