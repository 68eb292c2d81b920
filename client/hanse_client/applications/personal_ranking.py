"""An order of products for one shopper, by what that shopper looked at lately. It stays where it was made.

    views = RecentViews(half_life=timedelta(days=7))
    views.add("A-17", datetime.now(UTC))
    suggestions = views.suggest(recognition, k=10, now=datetime.now(UTC))    # products like those seen lately
    matches = views.rank(recognition, found.matches, now=datetime.now(UTC))  # an answer to a search, in that order

**What is kept.** At most `limit` SKUs with the time each was looked at last: no photo, no vector, nothing of who the
shopper is. It is in memory alone and ends with the object; nothing here writes a file or sends anything. A shop that
wants it to last stores `to_json()` itself, where it keeps that shopper's other data.

**How products are ordered.** Each view orders the products by similarity to what was viewed, and these orders are
fused: a product's interest is the sum over the views of weight / (60 + its place) [1], and a view weighs
2^(−age/half-life). Places count and not similarities, as all trousers look more alike than any two bags do: by the
largest similarity, or by that to the mean of all views, a shopper who looked at both would see trousers alone.

[1] Cormack, Clarke, Büttcher, "Reciprocal Rank Fusion outperforms Condorcet and individual Rank Learning Methods",
    SIGIR 2009.
"""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import AwareDatetime, Field, TypeAdapter, ValidationError

from hanse_client.applications.similar import mean_vectors
from hanse_client.gallery.bounds import MAX_RESULTS
from hanse_client.gallery.product import MAX_SKU, Filter, Sku
from hanse_client.gallery.spelling import composed
from hanse_common.errors import GalleryError

if TYPE_CHECKING:  # it brings torch
    from hanse_client.gallery.gallery import Match
    from hanse_client.recognition.service import Recognition

FUSION = 60
"""The constant of reciprocal rank fusion: the larger, the less the first places stand out."""

MAX_VIEWS = 1000
MAX_JSON_BYTES = 1 << 20

_SAVED = TypeAdapter(Annotated[dict[Sku, AwareDatetime], Field(max_length=MAX_VIEWS)])


class RecentViews:
    """What one shopper looked at lately: the last `limit` products. Not thread-safe.

    Raises `ValueError` for a `limit` outside of 1 to `MAX_VIEWS`, or a `half_life` that is not over 0.
    """

    def __init__(self, limit: int = 50, half_life: timedelta = timedelta(days=7)) -> None:
        if not 1 <= limit <= MAX_VIEWS:
            raise ValueError(f"limit: found {limit}, expected 1 to {MAX_VIEWS}.")
        if half_life <= timedelta(0):
            raise ValueError(f"half_life: found {half_life}, expected more than 0.")
        self._limit = limit
        self._half_life = half_life
        self._seen: dict[str, datetime] = {}

    def add(self, sku: str, when: datetime) -> None:
        """Note that `sku` was looked at; `when` has a time zone. The product seen longest ago makes room."""
        if when.tzinfo is None:
            raise ValueError("when: found a time without a zone, expected one, such as datetime.now(UTC).")
        sku = composed(sku, MAX_SKU)
        self._seen[sku] = max(when.astimezone(UTC), self._seen.get(sku, when))
        if len(self._seen) > self._limit:
            del self._seen[min(self._seen, key=lambda one: self._seen[one])]

    def forget(self) -> None:
        """Forget everything."""
        self._seen.clear()

    @property
    def skus(self) -> tuple[str, ...]:
        """What was looked at, the latest first."""
        return tuple(sorted(self._seen, key=lambda sku: self._seen[sku], reverse=True))

    def rank(self, recognition: "Recognition", matches: "Sequence[Match]", now: datetime) -> "list[Match]":
        """Return `matches` with what interests the shopper most first; in their own order where nothing is known."""
        with recognition.held() as embedding:
            vectors = mean_vectors(recognition.gallery, [match.product.sku for match in matches], embedding)
            interest = self._interest(recognition, embedding, vectors, now)
        return [matches[index] for index in np.argsort(-interest, kind="stable")]

    def suggest(
        self, recognition: "Recognition", *, k: int = 10, now: datetime, where: Filter | None = None
    ) -> "list[Match]":
        """Return at most `k` products that the shopper did not look at, the most interesting first."""
        gallery, most = recognition.gallery, min(k + len(self._seen), MAX_RESULTS)
        with recognition.held() as embedding:
            seen = mean_vectors(gallery, list(self.skus), embedding)
            seen = seen[seen.any(axis=1)]  # of products that are still there
            near = gallery.search(embedding, seen, most, where) if seen.size else []
            found = {match.product.sku: match for matches in near for match in matches}
            return self.rank(recognition, [found[sku] for sku in found if sku not in self._seen], now)[:k]

    def to_json(self) -> str:
        """Return what is remembered, and nothing else."""
        return _SAVED.dump_json(self._seen).decode()

    @classmethod
    def from_json(cls, text: str, limit: int = 50, half_life: timedelta = timedelta(days=7)) -> Self:
        """Return the views in `text`, untrusted. Raises `GalleryError` unless `to_json` can have written it."""
        if len(text) > MAX_JSON_BYTES:
            raise GalleryError(
                f"Recent views: found {len(text)} characters, expected at most {MAX_JSON_BYTES}."
            )
        try:
            seen = _SAVED.validate_json(text, strict=True)
        except ValidationError as error:
            fault = error.errors(include_input=False, include_url=False)[0]
            raise GalleryError(f"Recent views: {fault['msg']}; expected what to_json wrote.") from None
        views = cls(limit, half_life)
        for sku, when in seen.items():
            views.add(sku, when)
        return views

    def _interest(
        self, recognition: "Recognition", embedding: bytes, vectors: NDArray[np.float32], now: datetime
    ) -> NDArray[np.float64]:
        """Return the interest in products of the mean vectors `vectors`, (n, d), as (n,) float64."""
        seen = mean_vectors(recognition.gallery, list(self.skus), embedding)
        if not seen.size or not vectors.size:
            return np.zeros(len(vectors))
        ages = np.array([max(now - self._seen[sku], timedelta(0)) / self._half_life for sku in self.skus])
        weights = np.where(seen.any(axis=1), 2.0**-ages, 0.0)  # none of a product that is gone
        order = np.argsort(-(vectors @ seen.T), axis=0, kind="stable")
        places = np.argsort(order, axis=0) + 1
        interest: NDArray[np.float64] = (weights / (FUSION + places)).sum(axis=1)
        return interest
