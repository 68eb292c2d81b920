"""An experiment's public photos: Fashion-MNIST's, or those in a folder with a sub-folder for each class.

    photos = public_photos(experiment.data, experiment.plan.taxonomy)
    photos.train[0].open(), photos.train_labels[0], len(photos.test)

Labels are indices into the league's classes. Photos of classes that the league does not have are left out.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hanse_client.catalog import Catalog
from hanse_client.embeddings import Photo
from hanse_common.errors import ConfigError
from hanse_common.vision.taxonomy import LabelMap, Taxonomy
from hanse_simulations import datasets
from hanse_simulations.experiment import Data

TEST_SHARE = 0.2
"""The part of a folder's photos that is kept for tests. Which ones follows from each photo's own content."""

_TEST_KEY = b"hanse public test photos"


@dataclass(frozen=True)
class ArrayPhoto:
    """A photo of a dataset: `pixels`, shape (h, w) or (h, w, 3), uint8."""

    pixels: NDArray[np.uint8]

    @property
    def digest(self) -> bytes:
        """SHA-256 of the shape and the pixels, 32 bytes."""
        return hashlib.sha256(repr(self.pixels.shape).encode() + self.pixels.tobytes()).digest()

    def open(self) -> Image.Image:
        """Return the photo."""
        return Image.fromarray(self.pixels)


@dataclass(frozen=True)
class PublicPhotos:
    """Photos to deal out to merchants, and others to test with; labels have shape (n,), integers."""

    train: Sequence[Photo]
    train_labels: NDArray[np.integer[Any]]
    test: Sequence[Photo]
    test_labels: NDArray[np.integer[Any]]


def public_photos(data: Data, taxonomy: Taxonomy) -> PublicPhotos:
    """Return the photos that `data` names, of the classes in `taxonomy`.

    Raises `ConfigError` when the dataset lacks one of them, `CatalogError` for a folder without photos, and
    `DatasetUnavailable` without the dataset.
    """
    return _of_folder(data, taxonomy) if data.dataset == "folder" else _of_fashion_mnist(data, taxonomy)


def _of_fashion_mnist(data: Data, taxonomy: Taxonomy) -> PublicPhotos:
    missing = [name for name in taxonomy.classes if name not in datasets.CLASSES]
    if missing:
        raise ConfigError(
            f"plan.taxonomy.classes: found {', '.join(missing)}; expected classes of fashion-mnist: "
            f"{', '.join(datasets.CLASSES)}."
        )
    source = datasets.fashion_mnist(data.folder)
    codes = np.full(len(datasets.CLASSES), -1)
    for code, name in enumerate(taxonomy.classes):
        codes[datasets.CLASSES.index(name)] = code
    sides = []
    for images, labels in (
        (source.train_images, source.train_labels),
        (source.test_images, source.test_labels),
    ):
        kept = codes[labels] >= 0
        sides.append(([ArrayPhoto(image) for image in images[kept]], codes[labels][kept]))
    (train, train_labels), (test, test_labels) = sides
    return PublicPhotos(train, train_labels, test, test_labels)


def _of_folder(data: Data, taxonomy: Taxonomy) -> PublicPhotos:
    catalog = Catalog.load(
        data.folder, LabelMap(taxonomy), holdout_key=_TEST_KEY, holdout_fraction=TEST_SHARE
    )
    train, test = catalog.train, catalog.holdout
    found = {record.label for record in train}
    missing = [name for code, name in enumerate(taxonomy.classes) if code not in found]
    if missing or not test:
        lack = f"no photo to train on of {', '.join(missing)}" if missing else "too few photos to test with"
        raise ConfigError(
            f"{data.folder}: found {lack}; expected a sub-folder with photos for each of the league's classes."
        )
    return PublicPhotos(
        train, np.array([record.label for record in train]), test, np.array([record.label for record in test])
    )
