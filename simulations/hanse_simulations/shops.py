"""Merchants made from a public dataset: its photos dealt out, embedded, ready to train on."""

import hashlib
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hanse_client.embeddings import EmbeddingCache, Progress, embed
from hanse_client.examples import Examples
from hanse_common.errors import ConfigError
from hanse_common.files import write_atomically
from hanse_common.vision.recipe import Recipe
from hanse_common.vision.taxonomy import Taxonomy
from hanse_server.whitening import fit_whitening
from hanse_simulations import attacks, datasets, partition
from hanse_simulations.experiment import Data, Dirichlet, Experiment
from hanse_simulations.seeded import seed_for

NAMES = ("alder", "birch", "cedar", "damson", "elder", "fir", "gorse", "hazel", "ivy", "juniper")


def merchant_names(count: int) -> tuple[str, ...]:
    """Return `count` names, in sorted order."""
    return NAMES[:count] if count <= len(NAMES) else tuple(f"merchant-{i:03}" for i in range(count))


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
class Shops:
    """Each merchant's training examples by name, and the operator's public test examples.

    With a backdoor, `triggered` are the test photos of other classes than its target, each with the trigger.
    """

    merchants: dict[str, Examples]
    test: Examples
    triggered: Examples | None = None


_Photos = tuple[NDArray[np.uint8], NDArray[np.integer[Any]]]
"""Photos, shape (n, h, w), and their labels, shape (n,)."""


def attackers(experiment: Experiment) -> tuple[str, ...]:
    """Return the names of the merchants that attack."""
    count = experiment.attack.merchants if experiment.attack else 0
    return merchant_names(experiment.data.merchants)[experiment.data.merchants - count :]


def deal(data: Data, seed: int, labels: NDArray[np.integer[Any]]) -> dict[str, NDArray[np.intp]]:
    """Return the indices of each merchant's photos: disjoint, the same for the same seed."""
    rng = np.random.default_rng(seed_for(seed, "partition"))
    if isinstance(data.partition, Dirichlet):
        parts = partition.dirichlet(
            labels, data.merchants, data.photos_per_merchant, data.partition.alpha, rng
        )
    else:
        parts = partition.iid(labels, data.merchants, data.photos_per_merchant, rng)
    return dict(zip(merchant_names(data.merchants), parts, strict=True))


def make_shops(
    experiment: Experiment, cache: Path, whitening: Path, device: str, progress: Progress
) -> Shops:
    """Deal out the dataset's photos and embed those that are used; `cache` keeps the embeddings.

    Attackers' photos are those that `experiment.attack` makes of theirs.

    Raises `ConfigError` when the league's classes are not the dataset's, `DatasetUnavailable` without data.
    """
    data = experiment.data
    require_classes(experiment.plan.taxonomy)
    source = datasets.fashion_mnist(data.folder)
    dealt = deal(data, experiment.seed, source.train_labels)
    test = test_indices(experiment)
    parts: dict[str, _Photos] = {
        name: (source.train_images[own], source.train_labels[own]) for name, own in dealt.items()
    }
    tests: list[_Photos] = [(source.test_images[test], source.test_labels[test])]
    attack, classes = experiment.attack, experiment.plan.taxonomy.classes
    copies = dict.fromkeys(parts, 1)
    if attack is not None:
        for name in attackers(experiment):
            parts[name] = attacks.poisoned(attack, *parts[name], classes)
            copies[name] = attack.copies if isinstance(attack, attacks.Photos) else 1
        if isinstance(attack, attacks.Backdoor):
            others = tests[0][1] != classes.index(attack.target)
            tests.append((attacks.triggered(tests[0][0][others], attack.size), tests[0][1][others]))
    dealt_out = [*parts.values(), *tests]
    images = np.concatenate([images for images, _ in dealt_out])
    labels = np.concatenate([labels for _, labels in dealt_out])
    examples = _embedded(images, labels, experiment.plan.recipe, cache, whitening, device, progress)
    bounds = np.cumsum([0, *(len(own) for _, own in dealt_out)])
    made = [
        Examples(examples.inputs[first:last], examples.labels[first:last])
        for first, last in itertools.pairwise(bounds)
    ]
    merchants = {
        name: Examples.pooled([own] * copies[name]) if copies[name] > 1 else own
        for name, own in zip(parts, made, strict=False)
    }
    return Shops(merchants, *made[len(parts) :])


def make_shop(experiment: Experiment, name: str, cache: Path, whitening: Path, device: str) -> Examples:
    """Return one merchant's examples: the same as `make_shops` returns, whose embeddings are in `cache`.

    Raises as `make_shops` does.
    """
    source = datasets.fashion_mnist(experiment.data.folder)
    dealt = deal(experiment.data, experiment.seed, source.train_labels)[name]
    images, labels = source.train_images[dealt], source.train_labels[dealt]
    recipe = experiment.plan.recipe
    return _embedded(images, labels, recipe, cache, whitening, device, lambda done, total: None)


def test_indices(experiment: Experiment) -> slice:
    """Return which of the public test photos an evaluation uses: those after the ones that whiten."""
    first = experiment.whiten.photos if experiment.whiten else 0
    return slice(first, first + experiment.data.test_photos)


def make_test_examples(
    experiment: Experiment, cache: Path, whitening: Path, device: str, progress: Progress
) -> Examples:
    """Return the embedded public test photos."""
    source, test = datasets.fashion_mnist(experiment.data.folder), test_indices(experiment)
    images, labels = source.test_images[test], source.test_labels[test]
    return _embedded(images, labels, experiment.plan.recipe, cache, whitening, device, progress)


def whitened(experiment: Experiment, path: Path) -> Experiment:
    """Return `experiment` with the whitening that it asks for in its recipe, after writing the file to `path`.

    Raises `RecognizerError` when the recipe has no backbone.
    """
    if experiment.whiten is None:
        return experiment
    photos = datasets.fashion_mnist(experiment.data.folder).test_images[: experiment.whiten.photos]
    images = [Image.fromarray(photo) for photo in photos]
    fitted = fit_whitening(experiment.plan.recipe, images, experiment.whiten.dimensions)
    write_atomically(path, fitted.file)
    plan = experiment.plan.model_copy(update={"recipe": fitted.recipe})
    return experiment.model_copy(update={"plan": plan})


def require_classes(taxonomy: Taxonomy) -> None:
    """Raise `ConfigError` unless the league's classes are the dataset's, in its order."""
    if taxonomy.classes != datasets.CLASSES:
        raise ConfigError(
            f"plan.taxonomy.classes: found {', '.join(taxonomy.classes)}; expected fashion-mnist's, in its "
            f"order: {', '.join(datasets.CLASSES)}."
        )


def _embedded(
    images: NDArray[np.uint8],
    labels: NDArray[np.integer[Any]],
    recipe: Recipe,
    cache: Path,
    whitening: Path,
    device: str,
    progress: Progress,
) -> Examples:
    photos = [ArrayPhoto(image) for image in images]
    with EmbeddingCache(cache) as embeddings:
        embedded = embed(photos, recipe, embeddings, device=device, whitening=whitening, progress=progress)
    return Examples.of(embedded.features, labels[embedded.kept], device)
