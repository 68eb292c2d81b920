"""Public photos to deal out: labels stay with their photos, whatever the league's classes and wherever they lie."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hanse_client.catalog import Record
from hanse_common.config import load
from hanse_common.errors import CatalogError, ConfigError
from hanse_common.vision.taxonomy import Taxonomy
from hanse_simulations import shops
from hanse_simulations.datasets import CLASSES, fashion_mnist
from hanse_simulations.experiment import Data, Experiment
from hanse_simulations.photos import ArrayPhoto, public_photos
from hanse_simulations.run import run

Write = Callable[..., Path]
COLOURS = {"red": (200, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 200)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Photos of one colour each, of many sizes, in a folder for each colour."""
    for name, colour in COLOURS.items():
        for number in range(60):
            path = tmp_path / "public" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            shade = tuple(min(value + number, 255) for value in colour)
            Image.new("RGB", (20 + number, 30), shade).save(path)
    return tmp_path / "public"


def test_a_part_of_the_classes_in_another_order(data_folder: Path) -> None:
    data, taxonomy = Data(folder=data_folder), Taxonomy(classes=("Bag", "Trouser"))
    found, source = public_photos(data, taxonomy), fashion_mnist(data_folder)
    for photos, labels, images, codes in (
        (found.train, found.train_labels, source.train_images, source.train_labels),
        (found.test, found.test_labels, source.test_images, source.test_labels),
    ):
        assert len(photos) == np.isin(codes, [CLASSES.index("Bag"), CLASSES.index("Trouser")]).sum()
        for name, code in (("Bag", 0), ("Trouser", 1)):
            first = photos[int(np.flatnonzero(labels == code)[0])]
            assert isinstance(first, ArrayPhoto)
            expected = images[int(np.flatnonzero(codes == CLASSES.index(name))[0])]
            assert np.array_equal(first.pixels, expected)


def test_classes_that_the_dataset_lacks_are_named(data_folder: Path) -> None:
    with pytest.raises(ConfigError, match="found Hat; expected classes of fashion-mnist: T-shirt"):
        public_photos(Data(folder=data_folder), Taxonomy(classes=("Bag", "Hat")))


def test_a_folders_photos_have_their_folders_class_and_serve_one_purpose(folder: Path) -> None:
    taxonomy = Taxonomy(classes=("green", "red"))
    found = public_photos(Data(dataset="folder", folder=folder), taxonomy)
    assert len(found.train) + len(found.test) == 120
    assert len(found.test) >= 10
    for photos, labels in ((found.train, found.train_labels), (found.test, found.test_labels)):
        for photo, label in zip(photos, labels, strict=True):
            assert isinstance(photo, Record)
            assert photo.path.parent.name == taxonomy.classes[label]
    assert not {photo.digest for photo in found.train} & {photo.digest for photo in found.test}


def test_a_folder_that_lacks_a_class_or_photos_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no photo to train on of violet"):
        public_photos(Data(dataset="folder", folder=folder), Taxonomy(classes=("red", "violet")))
    (tmp_path / "bare").mkdir()
    with pytest.raises(CatalogError):
        public_photos(Data(dataset="folder", folder=tmp_path / "bare"), Taxonomy(classes=("red", "green")))


def settings(folder: Path) -> dict[str, object]:
    return {
        "data": {
            "dataset": "folder",
            "folder": str(folder),
            "merchants": 3,
            "photos_per_merchant": 40,
            "test_photos": 20,
        },
        "plan.taxonomy.classes": sorted(COLOURS),
        "plan.recipe.preprocessing": {"size": 8, "channels": 3},
    }


@pytest.mark.slow
def test_a_league_learns_colours_from_a_folder(write_experiment: Write, folder: Path, tmp_path: Path) -> None:
    experiment = load(Experiment, write_experiment(settings(folder) | {"plan.privacy.epsilon": 8}))
    (tmp_path / "result").mkdir()
    figures = run(experiment, tmp_path / "result", tmp_path / "embeddings.sqlite")
    assert figures["accuracy"] > 0.6


def test_a_photo_that_cannot_be_decoded_moves_no_label(
    write_experiment: Write, folder: Path, tmp_path: Path
) -> None:
    for path in (folder / "red").iterdir():  # so that one of them is dealt out
        data = path.read_bytes()
        path.write_bytes(data[:45] + bytes(len(data) - 45))
    experiment = load(Experiment, write_experiment(settings(folder)))
    with pytest.raises(CatalogError, match=r"red.*Take it out of the public photos"):
        shops.make_shops(experiment, tmp_path / "cache", tmp_path / "none", "cpu", lambda done, total: None)
