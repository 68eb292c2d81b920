"""From photos of the shop's own products to a metric of its own, on this machine alone.

    with Corrections(config.corrections_path) as corrections, Gallery.open(config.gallery_path) as gallery:
        found = learn_metric(Shop(config), recognizer, gallery, corrections)
    found.metric.record.judgement        # beside the embeddings as they are, by the shop's own photos
    found.metric.record.asked            # and by photos that were asked with
    found.metric.save(config.personal_path)

Products come from the gallery, from the catalog's records with a SKU, and from corrections that name one: those are
photos that search was asked with. A picture that a product has twice counts once.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from sklearn.utils import extmath

from hanse_client.compare import embed_for
from hanse_client.embeddings import Photo, Progress
from hanse_client.personal import saved
from hanse_client.personal.corrections import Corrections
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
from hanse_client.personal.metric_judging import (
    Asked,
    AskedPhotos,
    OwnPhotos,
    judged,
    parts_of,
    repeated,
    sums,
)
from hanse_client.personal.photos import StoredPhoto, every
from hanse_client.shop import Shop
from hanse_common.errors import CatalogError
from hanse_common.vision.recognizer import Recognizer

if TYPE_CHECKING:
    from hanse_client.gallery.gallery import Gallery

_Source = Literal["gallery", "asked", "catalog"]


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
    shown = _chosen(_product_photos(shop, gallery, corrections))
    embedded = embed_for(shop, recognizer, [each.photo for each in shown], progress)
    shown = [shown[place] for place in embedded.kept]
    rows = recognizer.embeddings(embedded.features)
    _, products = np.unique(np.array([each.sku for each in shown], dtype=str), return_inverse=True)
    in_gallery, asked_with = (
        np.array([source in each.sources for each in shown], dtype=np.bool_)
        for source in ("gallery", "asked")
    )
    asked = Asked(rows[asked_with], products[asked_with], rows[in_gallery], products[in_gallery])
    return learned_from(rows, products, base, asked, embedded.problems)


def learned_from(
    embeddings: NDArray[np.float32],
    products: NDArray[np.int64],
    base: bytes,
    asked: Asked | None = None,
    problems: tuple[str, ...] = (),
) -> LearnedMetric:
    """Return the metric that `embeddings`, (n, d) of the name `base`, and each row's product, (n,), teach.

    Of `asked`, photos of products that it is not learned from do not judge it.
    """
    distinct = np.flatnonzero(~repeated(embeddings, products))
    embeddings, products = embeddings[distinct], products[distinct]
    counts = np.bincount(products, minlength=1)
    several = counts[products] >= 2
    embeddings = embeddings[several]
    numbers, products = np.unique(products[several], return_inverse=True)
    if len(numbers) < MIN_PRODUCTS:
        return LearnedMetric(None, len(numbers), problems)
    parts = parts_of(len(numbers))
    others = [parts[products] != part for part in range(FOLDS)]
    moves = [fitted(embeddings[rows], products[rows]) for rows in others]
    own = OwnPhotos(embeddings, products)
    queries = AskedPhotos.of(asked or Asked.nothing(embeddings.shape[1]), numbers)
    learned = fitted(embeddings, products)
    record = MetricRecord(
        arrays=saved.digest_of(vars(learned)),
        embedding=base.hex(),
        products=len(numbers),
        judgement=judged(own.found, own.products, parts, moves),
        asked=judged(queries.found, queries.products, parts, moves),
        created=datetime.now(UTC),
    )
    return LearnedMetric(PersonalMetric(record, learned), len(numbers), problems)


def fitted(embeddings: NDArray[np.float32], products: NDArray[np.int64]) -> Directions:
    """Return what `embeddings`, (n, d), and each row's product, (n,), teach."""
    rows = embeddings.astype(np.float64)
    _, places = np.unique(products, return_inverse=True)
    means = sums(rows, places) / np.bincount(places)[:, None]
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


@dataclass(frozen=True)
class _Shown:
    """A photo of a product, and where it is from."""

    photo: Photo
    sku: str
    sources: frozenset[_Source]


def _product_photos(shop: Shop, gallery: "Gallery", corrections: Corrections) -> Iterator[_Shown]:
    """Yield photos of products, those of two sources twice."""
    for sku in gallery.skus():
        for digest in gallery.photos_of(sku):
            yield _Shown(StoredPhoto(digest, gallery.photo), sku, frozenset({"gallery"}))
    for correction in every(corrections):
        if correction.sku is not None:
            photo = StoredPhoto(correction.photo, corrections.photo)
            yield _Shown(photo, correction.sku, frozenset({"asked"}))
    try:
        records = shop.catalog().records
    except CatalogError:  # a shop may have a gallery and no catalog
        return
    for record in records:
        if record.sku is not None:
            yield _Shown(record, record.sku, frozenset({"catalog"}))


def _chosen(found: Iterable[_Shown]) -> list[_Shown]:
    """Return the photos, each once for a product, that teach and judge, up to `MAX_PHOTOS`.

    Products with two photos or more teach, those that were asked for come first. If any was, the gallery's others are
    what search could take for it.
    """
    by_sku: dict[str, dict[bytes, _Shown]] = {}
    for each in found:
        own = by_sku.setdefault(each.sku, {})
        known = own.get(each.photo.digest)
        own[each.photo.digest] = replace(known, sources=known.sources | each.sources) if known else each
    several = [own for own in by_sku.values() if len(own) >= 2]
    asked = [own for own in several if {"gallery", "asked"} <= _sources(own)]
    single = [own for own in by_sku.values() if len(own) == 1 and "gallery" in _sources(own)]
    chosen: list[_Shown] = []
    for own in sorted(several, key=lambda own: "asked" not in _sources(own)) + (single if asked else []):
        if len(chosen) + len(own) <= MAX_PHOTOS:
            chosen += own.values()
    return chosen


def _sources(own: dict[bytes, _Shown]) -> set[str]:
    return {source for each in own.values() for source in each.sources}
