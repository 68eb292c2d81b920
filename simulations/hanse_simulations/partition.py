"""A pool of labelled photos divided among merchants, and written out as their shops.

    shares = dirichlet(data.train_labels, merchants=5, per_merchant=5000, alpha=0.3, rng=rng)
    write_shop(Path("demo/anna"), data.train_images, data.train_labels, shares[0], CLASSES)

Shares are disjoint and all of the same size, so that experiments about skew are not about size too. The
generator is the experiment's, seeded on purpose: nothing here protects anyone.

Reference: Hsu, Qi, Brown, Measuring the effects of non-identical data distribution for federated visual
classification, arXiv:1909.06335, section 3 (a Dirichlet draw of class proportions for each client).
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from hanse_common.errors import ConfigError

Share = NDArray[np.intp]


def iid(labels: ArrayLike, merchants: int, per_merchant: int, rng: np.random.Generator) -> list[Share]:
    """Return each merchant's indices into `labels`, shape (per_merchant,), drawn without replacement.

    Raises `ConfigError` when the pool is too small.
    """
    pool = _pool(labels, merchants, per_merchant)
    drawn = rng.permutation(len(pool))[: merchants * per_merchant]
    return list(drawn.reshape(merchants, per_merchant))


def dirichlet(
    labels: ArrayLike, merchants: int, per_merchant: int, alpha: float, rng: np.random.Generator
) -> list[Share]:
    """Return each merchant's indices into `labels`, shape (per_merchant,), with classes skewed.

    Each merchant's class proportions are drawn from Dirichlet(α · K · p), K classes of proportions p in the
    pool, and its photos by these. What it wants of a class that has run out goes to the classes left, so the
    last merchants may be less skewed than drawn. A small α means few classes for each.

    Raises `ConfigError` when the pool is too small or `alpha` is not a positive finite number.
    """
    pool = _pool(labels, merchants, per_merchant)
    if not 0 < alpha < np.inf:
        raise ConfigError(f"alpha: found {alpha}, expected a finite number > 0, for example 0.3")
    classes, counts = np.unique(pool, return_counts=True)
    piles = [list(rng.permutation(np.flatnonzero(pool == name))) for name in classes]
    concentration = alpha * len(classes) * counts / counts.sum()
    shares = []
    for _ in range(merchants):
        wanted = rng.dirichlet(concentration)
        taken = _counts(wanted, np.array([len(pile) for pile in piles]), per_merchant, rng)
        share = [pile.pop() for pile, count in zip(piles, taken, strict=True) for _ in range(count)]
        shares.append(rng.permutation(np.array(share, dtype=np.intp)))
    return shares


def write_shop(
    folder: Path, images: NDArray[np.uint8], labels: ArrayLike, indices: Share, class_names: Sequence[str]
) -> None:
    """Write `images[indices]` as PNG files `folder/class name/index.png`; images (n, h, w) or (n, h, w, 3).

    Files that are there already are written again; others stay. Raises ValueError for a class name that no
    folder can have.
    """
    codes = np.asarray(labels)
    for code in np.unique(codes[indices]):
        name = class_names[code]
        if not name or Path(name).name != name or name.startswith("."):
            raise ValueError(f"Found the class name {name!r}, expected one that a folder can have.")
        (folder / name).mkdir(parents=True, exist_ok=True)
    for index in indices:
        path = folder / class_names[codes[index]] / f"{index:06}.png"
        Image.fromarray(images[index]).save(path, "PNG", compress_level=1)


def _pool(labels: ArrayLike, merchants: int, per_merchant: int) -> NDArray[np.generic]:
    pool = np.asarray(labels)
    if merchants < 1 or per_merchant < 1:
        raise ConfigError(
            f"merchants, per_merchant: found {merchants} and {per_merchant}, expected at least 1 of each"
        )
    if merchants * per_merchant > len(pool):
        raise ConfigError(
            f"merchants, per_merchant: found {merchants} × {per_merchant} = {merchants * per_merchant} "
            f"photos, expected at most the pool's {len(pool)}"
        )
    return pool


def _counts(
    wanted: NDArray[np.float64], left: NDArray[np.intp], total: int, rng: np.random.Generator
) -> NDArray[np.intp]:
    """Return how many of each class to take: `total` in all, at most `left`, by `wanted` where it can be."""
    taken = np.zeros_like(left)
    while (missing := total - taken.sum()) > 0:
        weights = np.where(taken < left, wanted, 0.0)
        if weights.sum() == 0:  # all that was wanted has run out: whatever is left
            weights = (left - taken).astype(float)
        draw = rng.multinomial(missing, weights / weights.sum())
        taken = np.minimum(taken + draw, left)
    return taken
