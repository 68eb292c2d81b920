"""From photos of the shop's own products to a metric of its own, on this machine alone.

    with Corrections(config.corrections_path) as corrections, Gallery.open(config.gallery_path) as gallery:
        found = learn_metric(Shop(config), recognizer, gallery, corrections)
    found.metric.record.judgement        # beside the embeddings as they are
    found.metric.save(config.personal_path)

Products come from the gallery, from the catalog's records with a SKU, and from corrections that name one. A picture
that a product has twice counts once.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from sklearn.utils import extmath

from hanse_client.compare import SIGNIFICANCE, embed_for, product_gains, sign_test
from hanse_client.embeddings import Photo, Progress
from hanse_client.personal import saved
from hanse_client.personal.corrections import Corrections
from hanse_client.personal.head import Judgement
from hanse_client.personal.metric import (
    FOLDS,
    MAX_DIRECTIONS,
    MAX_PHOTOS,
    MIN_PRODUCTS,
    SHRINKAGE,
    Directions,
    MetricRecord,
    PersonalMetric,
)
from hanse_client.personal.photos import SAME, StoredPhoto, every
from hanse_client.shop import Shop
from hanse_common.errors import CatalogError
from hanse_common.vision.recognizer import Recognizer

if TYPE_CHECKING:
    from hanse_client.gallery.gallery import Gallery


@dataclass(frozen=True)
class LearnedMetric:
    """What came out: `metric` is None with fewer than `MIN_PRODUCTS` products of two photos; `products` is how many."""

    metric: PersonalMetric | None
    products: int
    problems: tuple[str, ...] = ()


def learn_metric(
    shop: Shop,
    recognizer: Recognizer,
    gallery: "Gallery",
    corrections: Corrections,
    progress: Progress = lambda done, total: None,
) -> LearnedMetric:
    """Return a metric learned from the shop's products, for the embeddings of `recognizer`; nothing is saved.

    Raises `RecognizerError` for a recognizer without an embedding, and as `Shop.catalog`, gallery and `embed` do.
    """
    base = recognizer.embedding_digest()
    photos, skus = _of_products_with_two(_product_photos(shop, gallery, corrections))
    embedded = embed_for(shop, recognizer, photos, progress)
    names = np.array(skus, dtype=object)[embedded.kept]
    _, products = np.unique(names.astype(str), return_inverse=True)
    return learned_from(recognizer.embeddings(embedded.features), products, base, embedded.problems)


def learned_from(
    embeddings: NDArray[np.float32],
    products: NDArray[np.int64],
    base: bytes,
    problems: tuple[str, ...] = (),
) -> LearnedMetric:
    """Return the metric that `embeddings`, (n, d) of the name `base`, and each row's product, (n,), teach."""
    distinct = np.flatnonzero(~_repeated(embeddings, products))
    embeddings, products = embeddings[distinct], products[distinct]
    counts = np.bincount(products, minlength=1)
    several = counts[products] >= 2
    embeddings = embeddings[several]
    numbers, products = np.unique(products[several], return_inverse=True)
    if len(numbers) < MIN_PRODUCTS:
        return LearnedMetric(None, len(numbers), problems)
    judgement = _cross_validated(embeddings, products, len(numbers))
    learned = fitted(embeddings, products)
    record = MetricRecord(
        arrays=saved.digest_of(vars(learned)),
        embedding=base.hex(),
        products=len(numbers),
        judgement=judgement,
        created=datetime.now(UTC),
    )
    return LearnedMetric(PersonalMetric(record, learned), len(numbers), problems)


def fitted(embeddings: NDArray[np.float32], products: NDArray[np.int64]) -> Directions:
    """Return what `embeddings`, (n, d), and each row's product, (n,), teach."""
    rows = embeddings.astype(np.float64)
    _, places = np.unique(products, return_inverse=True)
    means = _sums(rows, places) / np.bincount(places)[:, None]
    scatter = rows - means[places]
    degrees = max(1, len(rows) - len(means))
    rank = min(degrees, rows.shape[1])
    least = SHRINKAGE * float(np.sum(scatter**2)) / degrees / rank
    mean = means.mean(axis=0).astype(np.float32)
    if least <= 0.0:  # all photos of each product are alike
        return Directions(mean, np.zeros((0, rows.shape[1]), np.float32), np.zeros(0, np.float32))
    _, singular, basis = extmath.randomized_svd(scatter, min(MAX_DIRECTIONS, rank), random_state=0)
    factors = np.sqrt(least / ((1.0 - SHRINKAGE) * singular**2 / degrees + least))
    return Directions(mean, basis.astype(np.float32), factors.astype(np.float32))


def finds_its_product(
    embeddings: NDArray[np.float32], products: NDArray[np.int64], queries: NDArray[np.intp], chunk: int = 512
) -> NDArray[np.bool_]:
    """Return for each of `queries`, rows of `embeddings`, (n, d), whether the nearest product is its own, (m,).

    A product, 0 to P − 1 in `products`, (n,), is the mean of its photos at norm 1, as in the gallery; the query itself
    does not count. Each product has two photos or more.
    """
    sums = _sums(embeddings, products)
    means = _unit(sums)
    found = np.zeros(len(queries), dtype=np.bool_)
    for start in range(0, len(queries), chunk):
        rows = queries[start : start + chunk]
        photos, own = embeddings[rows], products[rows]
        cosines = photos @ means.T
        cosines[np.arange(len(rows)), own] = np.sum(photos * _unit(sums[own] - photos), axis=1)
        found[start : start + chunk] = cosines.argmax(axis=1) == own
    return found


def _sums(rows: NDArray[Any], products: NDArray[np.int64]) -> NDArray[Any]:
    """Return the sum of the `rows` of each product, 0 to P − 1: (P, d)."""
    sums = np.zeros((int(products.max()) + 1, rows.shape[1]), dtype=rows.dtype)
    np.add.at(sums, products, rows)
    return sums


def _unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    unit: NDArray[np.float32] = rows / np.maximum(
        np.linalg.norm(rows, axis=1, keepdims=True), np.float32(1e-12)
    )
    return unit


def _cross_validated(embeddings: NDArray[np.float32], products: NDArray[np.int64], count: int) -> Judgement:
    """Return how photos find their product without a metric, and with one learned from other products."""
    before = finds_its_product(embeddings, products, np.arange(len(products)))
    after = np.zeros(len(products), dtype=np.bool_)
    parts = _parts(count)[products]
    for part in range(FOLDS):
        own = parts == part
        moved = fitted(embeddings[~own], products[~own]).apply(embeddings)
        after[own] = finds_its_product(moved, products, np.flatnonzero(own))
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


def _product_photos(shop: Shop, gallery: "Gallery", corrections: Corrections) -> Iterator[tuple[Photo, str]]:
    """Yield photos and their SKU."""
    after = ""
    while page := gallery.products(after=after):
        for product in page:
            yield from (
                (StoredPhoto(digest, gallery.photo), product.sku) for digest in gallery.photos_of(product.sku)
            )
        after = page[-1].sku
    for correction in every(corrections):
        if correction.sku is not None:
            yield StoredPhoto(correction.photo, corrections.photo), correction.sku
    try:
        records = shop.catalog().records
    except CatalogError:  # a shop may have a gallery and no catalog
        return
    yield from ((record, record.sku) for record in records if record.sku is not None)


def _of_products_with_two(found: Iterable[tuple[Photo, str]]) -> tuple[list[Photo], list[str]]:
    """Return the photos, each once for a product, of products that have two or more, up to `MAX_PHOTOS`."""
    by_sku: dict[str, dict[bytes, Photo]] = {}
    for photo, sku in found:
        by_sku.setdefault(sku, {}).setdefault(photo.digest, photo)
    photos: list[Photo] = []
    skus: list[str] = []
    for sku, own in by_sku.items():
        if len(own) >= 2 and len(photos) + len(own) <= MAX_PHOTOS:
            photos += own.values()
            skus += [sku] * len(own)
    return photos, skus


def _repeated(embeddings: NDArray[np.float32], products: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which rows are the same picture as an earlier one of the same product."""
    repeated = np.zeros(len(products), dtype=np.bool_)
    for product in np.unique(products):
        rows = np.flatnonzero(products == product)
        alike = np.tril(embeddings[rows] @ embeddings[rows].T >= SAME, -1)
        repeated[rows] = alike.any(axis=1)
    return repeated


def _parts(products: int) -> NDArray[np.int64]:
    """Return the part, 0 to `FOLDS` − 1, of each product, the same each time."""
    parts: NDArray[np.int64] = np.random.PCG64(0).random_raw(products).argsort(kind="stable") % FOLDS
    return parts
