"""A search in the gallery: where the index says to look, and what the database says is there.

    finder = Finder(store.path)
    words = finder.words("red")                           # or None
    with store.read() as db, followed.following(db) as index:
        [matches] = finder.search(db, embedding, index, queries, k=10, where=Filter(category="shoes"), words=words)

Where a filter lets only few products through, all of these are compared. Else the index is asked for more than k,
what does not match is left out, and it is asked for more again as long as too few are left; if the index can't tell of
enough, all that match are compared after all. So k products come whenever k match.

A reference photo that is the same picture as the query (`hanse_client.duplicates.SAME`) stands for its product alone,
not as one of several: else the mean of another product's photos is nearer at times. That is looked for among the
`SEEN` nearest.

With a text, products near in picture and products near in words are scored by both:
(1 − w) · looks + w · cosine of the words, w = `TEXT_WEIGHT`.
"""

import sqlite3
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from hanse_client.duplicates import SAME
from hanse_client.gallery import rows
from hanse_client.gallery.index import VectorIndex
from hanse_client.gallery.product import Filter, Product
from hanse_client.gallery.store import Store

if TYPE_CHECKING:
    from hanse_client.gallery.titles import Titles

SCANNED: Final = 2000
"""If a filter lets at most so many products through, all are compared."""

FEWEST: Final = 40
"""Products that are compared exactly at least, however few are wanted."""

SEEN: Final = 10
"""Products whose photos are compared with the query at least, however few are wanted."""

ASKED: Final = 4
"""How many times as many as are wanted the index is asked for, at first and each time again."""

MOST: Final = 1 << 14
"""The most that an index is asked for; a filter that needs more is answered by comparing all that match."""

TEXT_WEIGHT: Final = 0.3
"""Weight of the words in a search by picture and words; measured in docs/search-index.md."""

Vectors = NDArray[np.float32]
Scores = Mapping[int, float]
"""How near the words of products are to a text, by the products' numbers, best first: cosines over 0."""


@dataclass(frozen=True, slots=True)
class Match:
    """A product that was found. `similarity` is a cosine in [−1, 1]: of the query with the product's prototype.

    `photo` is the SHA-256 of the reference photo nearest to the query, empty for a product without any, and `nearest`
    is that photo's similarity. `score` is what the order of a search follows: `looks`, or these mixed with the words.
    Products that are chosen to differ, and suggestions, keep their score, and come in an order of their own.
    """

    product: Product
    similarity: float
    photo: bytes
    score: float
    nearest: float = 0.0

    @property
    def looks(self) -> float:
        """How much it looks like the query: the similarity, or `nearest` where that is the same picture."""
        return _looks(self.similarity, self.nearest)


def _looks(similarity: float, nearest: float) -> float:
    return max(similarity, nearest) if nearest >= SAME else similarity


class Finder:
    """Searches in the database `path`. Safe to share between threads.

    The products' words are in memory once a text was searched for. They are read by a connection of their own, so that
    searches by photo wait neither for that nor for one another's words.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._store: Store | None = None
        self._titles: Titles | None = None

    def close(self) -> None:
        """Close the connection."""
        with self._lock:
            if self._store is not None:
                self._store.close()

    def words(self, text: str) -> Scores:
        """Return how near the words of products are to a text: of all that are there when this is called."""
        with self._lock:
            return self._followed(lambda: False).scores(text)

    def follow(self, enough: Callable[[], bool]) -> None:
        """Read the products' words now, until `enough` says so, so that the first text does not wait for it."""
        with self._lock:
            self._followed(enough)

    def _followed(self, enough: Callable[[], bool]) -> "Titles":
        if self._titles is None or self._store is None:
            # scikit-learn takes a second to load, so only a search by words loads it.
            from hanse_client.gallery.titles import Titles

            self._titles, self._store = Titles(), Store(self._path)
        more = True
        while more and not enough():
            with self._store.read() as db:
                more = self._titles.follow(db)
        return self._titles

    def search(
        self,
        db: sqlite3.Connection,
        embedding: bytes,
        index: VectorIndex | None,
        queries: Vectors,
        k: int,
        where: Filter | None,
        words: Scores | None,
    ) -> list[list[Match]]:
        """Return the k best matches of each query (n, d), best first; see `Gallery.search`."""
        wanted = max(k, SEEN) if words is None else max(ASKED * k, FEWEST)
        if index is None:
            found: list[dict[int, float]] = [{} for _ in queries]
        else:
            found = _nearest(db, embedding, index, queries, wanted, where)
        if words is None:
            return [
                _matches(db, embedding, query, near, near, 1.0, k)
                for query, near in zip(queries, found, strict=True)
            ]
        named = _named(db, words, wanted, where)
        results = []
        for query, near in zip(queries, found, strict=True):
            others = [number for number in named if number not in near]
            if index is not None:
                near |= _compared(query, *rows.prototypes_of(db, embedding, others, index.dimension))
            near = {**dict.fromkeys(others, 0.0), **near}
            scores = {
                number: (1 - TEXT_WEIGHT) * similarity + TEXT_WEIGHT * words.get(number, 0.0)
                for number, similarity in near.items()
            }
            results.append(_matches(db, embedding, query, near, scores, 1 - TEXT_WEIGHT, k))
        return results

    def search_text(self, db: sqlite3.Connection, words: Scores, k: int, where: Filter | None) -> list[Match]:
        """Return the k products whose words are nearest, best first; see `Gallery.search_text`."""
        numbers = _named(db, words, k, where)
        products = rows.products(db, numbers)
        first = rows.first_photos(db, numbers)
        return [Match(products[number], 0.0, first.get(number, b""), words[number]) for number in numbers]


def _nearest(
    db: sqlite3.Connection,
    embedding: bytes,
    index: VectorIndex,
    queries: Vectors,
    k: int,
    where: Filter | None,
) -> list[dict[int, float]]:
    """Return for each query at least the k nearest of the products that match, with their similarities."""
    if where is not None:
        numbers = rows.matching_numbers(db, where, SCANNED + 1)
        if len(numbers) <= SCANNED:
            numbers, vectors = rows.prototypes_of(db, embedding, numbers, index.dimension)
            return [_compared(query, numbers, vectors) for query in queries]
    asked = max(ASKED * k, FEWEST)
    ids, _ = index.search(queries, asked)
    return [
        _more(db, embedding, index, query, k, where, asked, near)
        for query, near in zip(queries, ids, strict=True)
    ]


def _more(
    db: sqlite3.Connection,
    embedding: bytes,
    index: VectorIndex,
    query: Vectors,
    k: int,
    where: Filter | None,
    asked: int,
    ids: NDArray[np.int64],
) -> dict[int, float]:
    """Return the nearest of what matches among the `ids` that the index found, asking it for more until k do."""
    while True:
        found = _compared(query, *rows.prototypes(db, ids.tolist(), where, index.dimension))
        if len(found) >= k or (asked >= len(index) and not index.approximate):
            return found
        asked *= ASKED
        if asked > MOST or asked > ASKED * len(index):
            return _scanned(db, embedding, query, k, where, index.dimension)
        (ids,), _ = index.search(query[None], asked)


def _scanned(
    db: sqlite3.Connection, embedding: bytes, query: Vectors, k: int, where: Filter | None, dimension: int
) -> dict[int, float]:
    """Return the k nearest of all products that match, compared one chunk after the other."""
    best: dict[int, float] = {}
    for numbers, vectors in rows.matching_prototypes(db, embedding, where, dimension):
        best |= _compared(query, numbers, vectors)
        best = dict(_ordered(best)[:k])
    return best


def _compared(query: Vectors, numbers: list[int], vectors: Vectors) -> dict[int, float]:
    similarities = np.clip(vectors @ query, -1.0, 1.0)
    return dict(zip(numbers, similarities.tolist(), strict=True))


def _ordered(scores: dict[int, float]) -> list[tuple[int, float]]:
    """Return products and scores, best first; of equal ones the product that was added first."""
    return sorted(scores.items(), key=lambda one: (-one[1], one[0]))


def _named(db: sqlite3.Connection, words: Scores, k: int, where: Filter | None) -> list[int]:
    """Return the k products that match, and are still there, whose words are nearest, best first."""
    ordered = iter(words)
    found: list[int] = []
    asked = ASKED * k
    while len(found) < k and (part := list(islice(ordered, asked))):
        match = rows.matching_among(db, part, where)
        found += [number for number in part if number in match]
        asked = min(ASKED * asked, rows.CHUNK)
    return found[:k]


def _matches(
    db: sqlite3.Connection,
    embedding: bytes,
    query: Vectors,
    similarities: dict[int, float],
    scores: dict[int, float],
    weight: float,
    k: int,
) -> list[Match]:
    """Return the k best by their scores, in which the similarity has `weight`."""
    seen = dict(_ordered(scores)[: max(k, SEEN)])
    nearest: dict[int, tuple[float, bytes]] = {}
    for number, digest, vector in rows.views(db, embedding, seen):
        similarity = float(np.clip(vector @ query, -1.0, 1.0))
        if number not in nearest or similarity > nearest[number][0]:
            nearest[number] = similarity, digest
    for number, (similarity, _) in nearest.items():
        seen[number] += weight * (_looks(similarities[number], similarity) - similarities[number])
    best = _ordered(seen)[:k]
    products = rows.products(db, [number for number, _ in best])
    photos = rows.first_photos(db, [number for number in products if number not in nearest])
    photos |= {number: digest for number, (_, digest) in nearest.items()}
    return [
        Match(
            products[number],
            similarities[number],
            photos.get(number, b""),
            score,
            nearest[number][0] if number in nearest else 0.0,
        )
        for number, score in best
    ]
