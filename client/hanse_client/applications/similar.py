"""Similar products that also differ from one another: what a shop shows beside a product.

    band = price_band(recognition.gallery.get("A-17"), share=0.25)
    for match in similar_products(recognition, "A-17", k=6, where=band).matches:
        print(match.product.sku, match.similarity)

The nearest neighbours of a red shoe are the same shoe five times over. So more products than asked for are found, and
chosen from one at a time: each is the one of the largest *marginal relevance* [1],

    (1 − diversity) · similarity to what is looked at − diversity · largest similarity to one that is chosen already.

Two products are as similar as their mean vectors are, each of norm 1.

[1] Carbonell, Goldstein, "The Use of MMR, Diversity-Based Reranking for Reordering Documents and Producing Summaries",
    SIGIR 1998.
"""

from dataclasses import replace
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hanse_client.gallery.bounds import MAX_RESULTS
from hanse_client.gallery.product import PRICE_PLACES, Filter, Product
from hanse_common.errors import GalleryError

if TYPE_CHECKING:  # it brings torch
    from hanse_client.gallery.gallery import Gallery
    from hanse_client.recognition.answers import Found
    from hanse_client.recognition.service import Recognition

POOL = 5
"""So many times the products asked for are found, and chosen from."""

_TINY = 1e-12


def similar_products(
    recognition: "Recognition", sku: str, *, k: int = 10, where: Filter | None = None, diversity: float = 0.3
) -> "Found":
    """Return at most `k` products similar to `sku`, the product itself left out, in the order of their choice.

    `diversity` from 0, the nearest ones, to 1, the most different ones. Raises as `Recognition.similar`
    does, and `ValueError` for a `diversity` outside of 0 to 1.
    """
    _require_share("diversity", diversity)
    pool = k if diversity == 0 else min(POOL * k, MAX_RESULTS)
    with recognition.held():
        found = recognition.similar(sku, where=where, k=pool)
        skus = [match.product.sku for match in found.matches]
        vectors = mean_vectors(recognition.gallery, skus, found.embedding)
    relevance = np.array([match.looks for match in found.matches])
    order = most_relevant(relevance, vectors, k, diversity)
    return replace(found, matches=tuple(found.matches[index] for index in order))


def most_relevant(
    relevance: NDArray[np.floating], vectors: NDArray[np.floating], k: int, diversity: float
) -> list[int]:
    """Return the indices of at most `k` items by maximal marginal relevance, the first chosen one first.

    `relevance` (n,) is each item's similarity to what is looked at, `vectors` (n, d) have norm 1. Of equals the first
    is chosen. Raises `ValueError` for a `diversity` outside of 0 to 1.
    """
    _require_share("diversity", diversity)
    left = (1 - diversity) * relevance.astype(np.float64)
    nearest = np.full(len(relevance), -np.inf)
    chosen: list[int] = []
    while len(chosen) < min(k, len(relevance)):
        index = int(np.argmax(left - diversity * nearest if chosen else left))
        chosen.append(index)
        nearest = np.maximum(nearest, vectors @ vectors[index])
        left[index] = -np.inf
    return chosen


def mean_vectors(gallery: "Gallery", skus: list[str], embedding: bytes) -> NDArray[np.float32]:
    """Return the unit mean of each product's vectors, (n, d) float32; zeros for one that has none, as just removed."""
    found = [gallery.vectors_of(sku, embedding) for sku in skus]
    dimension = max((rows.shape[1] for rows in found if len(rows)), default=0)
    means = np.zeros((len(skus), dimension), dtype=np.float32)
    for mean, rows in zip(means, found, strict=True):
        if len(rows):
            mean += rows.mean(axis=0)
    unit: NDArray[np.float32] = means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), _TINY)
    return unit


def price_band(product: Product, share: float = 0.25, same_category: bool = True) -> Filter:
    """Return the condition that a price is within `share` of that of `product`, and the category the same, if asked.

    Prices are compared as numbers: products in other currencies do not fit a band. Raises `GalleryError` when the
    product has no price, `ValueError` for a `share` outside of 0 to 1.
    """
    _require_share("share", share)
    if product.price is None:
        raise GalleryError(
            f"{product.sku}: found no price, expected one for a price band; add it to the product."
        )
    step, part = Decimal(1).scaleb(-PRICE_PLACES), Decimal(str(share))
    return Filter(
        category=product.category if same_category else None,
        price_min=(product.price * (1 - part)).quantize(step, ROUND_FLOOR),
        price_max=(product.price * (1 + part)).quantize(step, ROUND_CEILING),
    )


def _require_share(name: str, found: float) -> None:
    if not 0 <= found <= 1:
        raise ValueError(f"{name}: found {found:g}, expected 0 to 1.")
