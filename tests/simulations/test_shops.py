"""Shops made from the dataset: every photo keeps its label, and no photo serves two purposes."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hanse_common.config import load
from hanse_server.whitening import fit_whitening
from hanse_simulations import datasets, shops
from hanse_simulations.experiment import Experiment
from hanse_simulations.shops import ArrayPhoto


@pytest.fixture(scope="module")
def experiment(root: Path) -> Experiment:
    smoke = load(Experiment, root / "simulations" / "experiments" / "smoke.yaml")
    data = smoke.data.model_copy(update={"photos_per_merchant": 40, "test_photos": 50})
    whiten = smoke.whiten
    assert whiten is not None
    whiten = whiten.model_copy(update={"photos": 100, "dimensions": 5})
    return smoke.model_copy(update={"data": data, "whiten": whiten})


def test_labels_stay_with_their_photos(experiment: Experiment, tmp_path: Path) -> None:
    path = tmp_path / "whitening.safetensors"
    whitened = shops.whitened(experiment, path)
    made = shops.make_shops(whitened, tmp_path / "cache", path, "cpu", lambda done, total: None)
    source = datasets.fashion_mnist(experiment.data.folder)
    dealt = shops.deal(experiment.data, experiment.seed, source.train_labels)
    for name, examples in made.merchants.items():
        assert np.array_equal(examples.labels.numpy(), source.train_labels[dealt[name]])
    assert np.array_equal(made.test.labels.numpy(), source.test_labels[100:150])
    # The same photos embedded on their own, in the cache's absence, are the same rows.
    alone = shops.make_test_examples(whitened, tmp_path / "other", path, "cpu", lambda done, total: None)
    assert np.array_equal(alone.inputs.numpy(), made.test.inputs.numpy())


def test_photos_that_whiten_do_not_evaluate(experiment: Experiment, tmp_path: Path) -> None:
    assert shops.test_indices(experiment) == slice(100, 150)
    path = tmp_path / "whitening.safetensors"
    shops.whitened(experiment, path)
    photos = datasets.fashion_mnist(experiment.data.folder).test_images[:100]
    fitted = fit_whitening(experiment.plan.recipe, [Image.fromarray(photo) for photo in photos], 5)
    assert path.read_bytes() == fitted.file


def test_the_seed_deals_the_photos(experiment: Experiment) -> None:
    labels = datasets.fashion_mnist(experiment.data.folder).train_labels
    one, again, two = (shops.deal(experiment.data, seed, labels) for seed in (1, 1, 2))
    assert all(np.array_equal(one[name], again[name]) for name in one)
    assert not all(np.array_equal(one[name], two[name]) for name in one)


def test_photos_of_other_shapes_are_other_photos() -> None:
    wide, tall = np.zeros((2, 3), np.uint8), np.zeros((3, 2), np.uint8)
    assert ArrayPhoto(wide).digest != ArrayPhoto(tall).digest
