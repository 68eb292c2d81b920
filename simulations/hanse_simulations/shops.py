"""Merchants made from public photos, which are dealt out, embedded, and ready to train on."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hanse_client.embeddings import EmbeddingCache, Photo, Progress, embed
from hanse_client.examples import Examples
from hanse_common.errors import CatalogError, ConfigError
from hanse_common.files import write_atomically
from hanse_common.vision.recipe import Recipe
from hanse_common.vision.taxonomy import Taxonomy
from hanse_server.whitening import fit_whitening
from hanse_simulations import attacks, datasets, partition
from hanse_simulations.experiment import Data, Dirichlet, Experiment
from hanse_simulations.photos import ArrayPhoto, public_photos
from hanse_simulations.seeded import seed_for

NAMES = ("alder", "birch", "cedar", "damson", "elder", "fir", "gorse", "hazel", "ivy", "juniper")


def merchant_names(count: int) -> tuple[str, ...]:
    """Return `count` names, in sorted order."""
    return NAMES[:count] if count <= len(NAMES) else tuple(f"merchant-{i:03}" for i in range(count))


@dataclass(frozen=True)
class Shops:
    """Each merchant's training examples by name, and the operator's public test examples.

    With a backdoor, `triggered` are the test photos of other classes than its target, each with the trigger.
    """

    merchants: dict[str, Examples]
    test: Examples
    triggered: Examples | None = None


_Photos = tuple[Sequence[Photo], NDArray[np.integer[Any]]]
"""Photos, and their labels, shape (n,)."""


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

    Raises as `public_photos` does, and `ConfigError` when no photo is left to test with.
    """
    data, source = experiment.data, public_photos(experiment.data, experiment.plan.taxonomy)
    dealt = deal(data, experiment.seed, source.train_labels)
    test = _tested(experiment, source.test, source.test_labels)
    parts: dict[str, _Photos] = {
        name: ([source.train[index] for index in own], source.train_labels[own])
        for name, own in dealt.items()
    }
    tests = [test]
    attack, classes = experiment.attack, experiment.plan.taxonomy.classes
    copies = dict.fromkeys(parts, 1)
    if attack is not None:
        for name in attackers(experiment):
            images, labels = attacks.poisoned(attack, _pixels(parts[name][0]), parts[name][1], classes)
            parts[name] = ([ArrayPhoto(image) for image in images], labels)
            copies[name] = attack.copies if isinstance(attack, attacks.Photos) else 1
        if isinstance(attack, attacks.Backdoor):
            others = test[1] != classes.index(attack.target)
            images = attacks.triggered(_pixels(test[0])[others], attack.size)
            tests.append(([ArrayPhoto(image) for image in images], test[1][others]))
    dealt_out = [*parts.values(), *tests]
    photos = [photo for part, _ in dealt_out for photo in part]
    labels = np.concatenate([labels for _, labels in dealt_out])
    examples = _embedded(photos, labels, experiment.plan.recipe, cache, whitening, device, progress)
    bounds = np.cumsum([0, *(len(labels) for _, labels in dealt_out)])
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
    source = public_photos(experiment.data, experiment.plan.taxonomy)
    dealt = deal(experiment.data, experiment.seed, source.train_labels)[name]
    photos = [source.train[index] for index in dealt]
    recipe = experiment.plan.recipe
    return _embedded(
        photos, source.train_labels[dealt], recipe, cache, whitening, device, lambda done, total: None
    )


def test_indices(experiment: Experiment) -> slice:
    """Return which of the public test photos an evaluation uses: those after the ones that whiten."""
    first = experiment.whiten.photos if experiment.whiten else 0
    return slice(first, first + experiment.data.test_photos)


def make_test_examples(
    experiment: Experiment, cache: Path, whitening: Path, device: str, progress: Progress
) -> Examples:
    """Return the embedded public test photos."""
    source = public_photos(experiment.data, experiment.plan.taxonomy)
    photos, labels = _tested(experiment, source.test, source.test_labels)
    return _embedded(photos, labels, experiment.plan.recipe, cache, whitening, device, progress)


def whitened(experiment: Experiment, path: Path) -> Experiment:
    """Return `experiment` with the whitening that it asks for in its recipe, after writing the file to `path`.

    Raises `RecognizerError` when the recipe has no backbone.
    """
    if experiment.whiten is None:
        return experiment
    source = public_photos(experiment.data, experiment.plan.taxonomy)
    images = (photo.open() for photo in source.test[: experiment.whiten.photos])
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


def _tested(experiment: Experiment, photos: Sequence[Photo], labels: NDArray[np.integer[Any]]) -> _Photos:
    """Return those of the public test photos that an evaluation uses."""
    chosen = test_indices(experiment)
    if not len(labels[chosen]):
        raise ConfigError(
            f"{experiment.data.folder}: found {len(photos)} test photos; expected more than whiten.photos, "
            f"{chosen.start}."
        )
    return photos[chosen], labels[chosen]


def _pixels(photos: Sequence[Photo]) -> NDArray[np.uint8]:
    """Return the pixels of a dataset's photos, shape (n, h, w). Raises `ConfigError` for photos in files."""
    arrays = [photo.pixels for photo in photos if isinstance(photo, ArrayPhoto)]
    if len(arrays) != len(photos):
        raise ConfigError(
            "attack: found data.dataset folder; expected fashion-mnist, whose photos it changes."
        )
    return np.stack(arrays)


def _embedded(
    photos: Sequence[Photo],
    labels: NDArray[np.integer[Any]],
    recipe: Recipe,
    cache: Path,
    whitening: Path,
    device: str,
    progress: Progress,
) -> Examples:
    with EmbeddingCache(cache) as embeddings:
        embedded = embed(photos, recipe, embeddings, device=device, whitening=whitening, progress=progress)
    if embedded.problems:  # a merchant goes on without it; here whose photo is whose is told by their order
        raise CatalogError(f"{embedded.problems[0]} Take it out of the public photos.")
    return Examples.of(embedded.features, labels[embedded.kept], device)
