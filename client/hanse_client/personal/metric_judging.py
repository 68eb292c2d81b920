"""How photos find their product, with a metric of the shop's own and without: its own photos, and those asked with.

    parts = parts_of(products=60)
    moves = [fitted(*rows_of_other_parts(part)) for part in range(FOLDS)]        # `metric_learning`
    queries = AskedPhotos.of(asked, numbers)
    judged(queries.found, queries.products, parts, moves).better

A metric never judges itself: a photo searches with the one that was learned without its product.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from hanse_client.compare import SIGNIFICANCE, product_gains, sign_test
from hanse_client.duplicates import SAME
from hanse_client.personal.head import Judgement
from hanse_client.personal.metric import FOLDS, Directions

See = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""Rows, (n, d), as they are compared."""

Found = Callable[[NDArray[np.intp], See], NDArray[np.bool_]]
"""Of some queries, by their number, whether the nearest product is their own, all photos being seen that way."""

CHUNK: Final = 512
"""Rows that are compared with all others at once."""


@dataclass(frozen=True, eq=False)
class Asked:
    """Photos that search was asked with, (q, d), and those of the gallery, (g, d), at norm 1, with each one's product.

    Products, (q,) and (g,), are numbered as those that the metric is learned from.
    """

    photos: NDArray[np.float32]
    products: NDArray[np.int64]
    gallery: NDArray[np.float32]
    gallery_products: NDArray[np.int64]

    @classmethod
    def nothing(cls, dimension: int) -> Self:
        """Return what is known where nobody asked yet."""
        rows, products = np.zeros((0, dimension), np.float32), np.zeros(0, np.int64)
        return cls(rows, products, rows, products)


@dataclass(frozen=True, eq=False)
class OwnPhotos:
    """Photos, (n, d), of products 0 to P − 1 with two or more each: each searches for its product's others."""

    photos: NDArray[np.float32]
    products: NDArray[np.int64]

    def found(self, rows: NDArray[np.intp], see: See) -> NDArray[np.bool_]:
        """Return for each of `rows`, (m,), whether the nearest product is its own."""
        return finds_its_product(see(self.photos), self.products, rows)


@dataclass(frozen=True, eq=False)
class AskedPhotos:
    """Photos that were asked with, (n, d), and the gallery's, (g, d), whose products are `places`, 0 to G − 1.

    `own[i]` is the place of the product of photo i. Where `copies`, (n, g), is 1, the gallery's photo is photo i
    itself, which does not count: owners add to a product what they asked with.
    """

    photos: NDArray[np.float32]
    products: NDArray[np.int64]
    own: NDArray[np.int64]
    gallery: NDArray[np.float32]
    places: NDArray[np.int64]
    copies: sparse.csr_array

    @classmethod
    def of(cls, asked: Asked, numbers: NDArray[np.int64]) -> Self:
        """Take each photo once, if its product is among `numbers`, and the gallery has another photo of that.

        `products` are places in `numbers`.
        """
        in_gallery, places = np.unique(asked.gallery_products, return_inverse=True)
        copies = sparse.lil_array((len(asked.products), len(places)), dtype=np.float32)
        others = np.zeros(len(asked.products), dtype=np.int64)
        for product in np.unique(asked.products):
            rows = np.flatnonzero(asked.products == product)
            shown = np.flatnonzero(asked.gallery_products == product)
            alike = asked.photos[rows] @ asked.gallery[shown].T >= SAME
            copies[np.ix_(rows, shown)] = alike
            others[rows] = (~alike).sum(axis=1)
        fit = (others > 0) & np.isin(asked.products, numbers) & ~repeated(asked.photos, asked.products)
        return cls(
            photos=asked.photos[fit],
            products=np.searchsorted(numbers, asked.products[fit]),
            own=np.searchsorted(in_gallery, asked.products[fit]),
            gallery=asked.gallery,
            places=places,
            copies=copies.tocsr()[fit],
        )

    def found(self, rows: NDArray[np.intp], see: See) -> NDArray[np.bool_]:
        """Return for each of `rows`, (m,), whether the gallery's nearest product is its own."""
        if len(rows) == 0:
            return np.zeros(0, dtype=np.bool_)
        gallery = see(self.gallery)
        itself = self.copies[rows] @ gallery
        return _nearest_is(see(self.photos[rows]), self.own[rows], sums(gallery, self.places), itself)


def judged(
    found: Found, products: NDArray[np.int64], parts: NDArray[np.int64], moves: Sequence[Directions]
) -> Judgement:
    """Return how queries of `products`, (n,), find their product without a metric, and with one that was not taught it.

    Of `moves`, k was learned without the products p whose `parts[p]` is k.
    """
    before = found(np.arange(len(products)), lambda rows: rows)
    after = np.zeros(len(products), dtype=np.bool_)
    for part, move in enumerate(moves):
        own = np.flatnonzero(parts[products] == part)
        after[own] = found(own, move.apply)
    gains = product_gains(after.astype(np.int64) - before, [str(product) for product in products])
    p_value = sign_test(gains)
    return Judgement(
        photos=len(products),
        shared_right=int(before.sum()),
        own_right=int(after.sum()),
        differing=sum(gain != 0 for gain in gains),
        p_value=p_value,
        better=p_value < SIGNIFICANCE and bool(after.sum() > before.sum()),
    )


def parts_of(products: int) -> NDArray[np.int64]:
    """Return the part, 0 to `FOLDS` − 1, of each product, the same each time."""
    parts: NDArray[np.int64] = np.random.PCG64(0).random_raw(products).argsort(kind="stable") % FOLDS
    return parts


def finds_its_product(
    embeddings: NDArray[np.float32], products: NDArray[np.int64], queries: NDArray[np.intp]
) -> NDArray[np.bool_]:
    """Return for each of `queries`, rows of `embeddings`, (n, d), whether the nearest product is its own, (m,).

    A product, 0 to P − 1 in `products`, (n,), is the mean of its photos at norm 1, as in the gallery; the query itself
    does not count. Each product has two photos or more.
    """
    photos = embeddings[queries]
    return _nearest_is(photos, products[queries], sums(embeddings, products), photos)


def repeated(embeddings: NDArray[np.float32], products: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which rows of `embeddings`, (n, d), are the same picture as an earlier one of the same product, (n,)."""
    found = np.zeros(len(products), dtype=np.bool_)
    for product in np.unique(products):
        rows = np.flatnonzero(products == product)
        for start in range(0, len(rows), CHUNK):
            part = rows[start : start + CHUNK]
            earlier = rows[: start + len(part)]
            alike = np.tril(embeddings[part] @ embeddings[earlier].T >= SAME, start - 1)
            found[part] = alike.any(axis=1)
    return found


def sums(rows: NDArray[Any], products: NDArray[np.int64]) -> NDArray[Any]:
    """Return the sum of the `rows`, (n, d), of each product, 0 to P − 1: (P, d)."""
    found = np.zeros((int(products.max()) + 1, rows.shape[1]), dtype=rows.dtype)
    np.add.at(found, products, rows)
    return found


def _nearest_is(
    photos: NDArray[np.float32],
    own: NDArray[np.int64],
    of_products: NDArray[np.float32],
    itself: NDArray[np.float32],
    chunk: int = CHUNK,
) -> NDArray[np.bool_]:
    """Return for each of `photos`, (n, d), whether of products with sums `of_products`, (P, d), `own` is the nearest.

    `itself`, (n, d), is not counted in the sum of a photo's own product.
    """
    means = _unit(of_products)
    found = np.zeros(len(photos), dtype=np.bool_)
    for start in range(0, len(photos), chunk):
        part = slice(start, start + chunk)
        cosines = photos[part] @ means.T
        rest = _unit(of_products[own[part]] - itself[part])
        cosines[np.arange(len(cosines)), own[part]] = np.sum(photos[part] * rest, axis=1)
        found[part] = cosines.argmax(axis=1) == own[part]
    return found


def _unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    unit: NDArray[np.float32] = rows / np.maximum(
        np.linalg.norm(rows, axis=1, keepdims=True), np.float32(1e-12)
    )
    return unit
