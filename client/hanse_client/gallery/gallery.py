"""The shop's gallery: products with reference photos, found by what they look like.

    with Gallery.open(config.gallery_path) as gallery:
        jpeg = Gallery.prepare(image)
        gallery.put(Product(sku="A-17", title="Trail shoe"), [jpeg], {engine.embedding: vectors})
        [matches] = gallery.search(engine.embedding, queries, k=10)
        print(matches[0].product.title, matches[0].similarity)

The database (`hanse_client.gallery.store`) is the truth. An index in memory, and for large galleries a file beside the
database, only says where to look: similarities, products and photos of an answer are read from the database in the
transaction that answers. So nothing that was removed is ever found, in whichever process, and an index that lost a
race or a file costs time, never a wrong answer.

A product is compared by its prototype, the mean of its photos' vectors scaled to length one: on real photos this finds
better than the nearest photo or the mean of the nearest similarities (docs/search-index.md). A photo that is the very
picture of the query counts for itself.
"""

import io
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

import numpy as np
from PIL import Image

from hanse_client.gallery import followed, rows
from hanse_client.gallery.bounds import (
    MAX_TEXT,
    MAX_VIEWS,
    STORED_SIDE,
    Vectors,
    require_k,
    require_photo,
    require_rows,
)
from hanse_client.gallery.changing import Changing
from hanse_client.gallery.finding import ASKED, FEWEST, TEXT_WEIGHT, Finder
from hanse_client.gallery.finding import Match as Match
from hanse_client.gallery.followed import Followed
from hanse_client.gallery.open_set import OpenSet
from hanse_client.gallery.product import Filter, Product
from hanse_client.gallery.store import Store, damaged
from hanse_common.errors import GalleryError
from hanse_common.vision import photo as photos_

if TYPE_CHECKING:
    from hanse_client.gallery.meanings import Meanings

MAX_CATEGORIES: Final = 1000
"""Bound of the categories that are listed."""

_PAGE = 1000


class PhotoRotted(GalleryError):
    """One photo's file is not what was written: the rest of the gallery is as good as before."""


class Gallery:
    """A gallery in a folder. Safe to share between threads; several processes may have one folder open.

    Every method raises `GalleryError` when the database is damaged, locked or full. Vectors are float32 rows of length
    one, or all zeros where an embedding sees nothing; an embedding is named by 32 bytes. With `meanings`, texts that
    are searched for are also compared by meaning. `open_set` says whether a photo shows any product at all;
    `changing` is held by whoever reads a product, changes it and writes it back.
    """

    def __init__(self, folder: Path, meanings: "Meanings | None" = None) -> None:
        self._folder = folder
        self._store = Store(folder / "gallery.sqlite")
        self._followed: dict[bytes, Followed] = {}
        self._lock = threading.Lock()
        self._finder = Finder(self._store.path)
        self._meanings = meanings
        self.open_set = OpenSet(self._store, self._follower)
        self.changing = Changing(folder)

    @classmethod
    def open(cls, folder: Path, meanings: "Meanings | None" = None) -> Self:
        """Open the gallery in `folder`, which is made when missing."""
        return cls(folder, meanings)

    @staticmethod
    def prepare(image: Image.Image) -> bytes:
        """Return the stored form of a reference photo: JPEG, longest side at most 512, without metadata."""
        data = io.BytesIO()
        Gallery.reduced(image).save(data, "JPEG", quality=90)
        return data.getvalue()

    @staticmethod
    def reduced(image: Image.Image) -> Image.Image:
        """Return a reference photo in RGB as small as it is stored, of which `prepare` makes the very same file."""
        small = image.convert("RGB")
        small.thumbnail((STORED_SIDE, STORED_SIDE), Image.Resampling.LANCZOS)
        return Image.fromarray(np.asarray(small))

    # Products and photos.

    def put(
        self,
        product: Product,
        photos: Sequence[bytes] = (),
        vectors: Mapping[bytes, Vectors] | None = None,
    ) -> list[bytes]:
        """Add the product or update its fields, add photos to it, and return the photos' SHA-256.

        `photos` are as `prepare` makes them; `vectors` has for each embedding rows (len(photos), d). All is durable
        when this returns, or nothing is done. Photos that the product has already stay, named or not.

        Raises `GalleryError` for a photo that is none, more than `MAX_VIEWS`, or vectors that do not fit.
        """
        digests = [require_photo(product.sku, jpeg) for jpeg in photos]
        given = vectors or {}
        for name, matrix in given.items():
            require_rows(name, matrix, len(digests))
        with self._store.write() as db:
            number = rows.put_product(db, product)
            for digest, jpeg in zip(digests, photos, strict=True):
                rows.put_photo(db, number, digest, jpeg)
            (views,) = db.execute("SELECT count(*) FROM view WHERE product = ?", (number,)).fetchone()
            if views > MAX_VIEWS:
                raise GalleryError(
                    f"Product {product.sku!r}: it would have {views} photos, expected at most {MAX_VIEWS}. Remove some "
                    "first, or leave out those that show nothing new."
                )
            if digests:
                for name, matrix in given.items():
                    rows.put_vectors(db, name, zip(digests, matrix, strict=True), matrix.shape[1])
                touched = rows.products_showing(db, digests)
                for (embedding,) in db.execute("SELECT id FROM embedding").fetchall():
                    rows.refresh_prototypes(db, embedding, touched)
        return digests

    def remove(self, sku: str) -> bool:
        """Remove the product, and photos that no other product shows; return whether there was such a product.

        When this returns, no file of the folder holds its photos, vectors, title, category or attributes.
        """

        def work(db: sqlite3.Connection) -> bool:
            number = rows.product_number(db, sku)
            if number is not None:
                rows.remove_product(db, number)
            return number is not None

        return self._remove(work)

    def remove_photo(self, sku: str, digest: bytes) -> bool:
        """Take a photo from the product, and remove it when no other shows it; return whether the product had it."""

        def work(db: sqlite3.Connection) -> bool:
            number = rows.product_number(db, sku)
            row = db.execute(
                "SELECT photo FROM view JOIN photo ON photo.id = view.photo WHERE product = ? AND digest = ?",
                (number, digest),
            ).fetchone()
            if number is not None and row is not None:
                rows.remove_photos(db, number, [row[0]])
            return row is not None

        return self._remove(work)

    def _remove(self, work: Callable[[sqlite3.Connection], bool]) -> bool:
        # An index in memory is saved again when the gallery is closed; of one that is not, nothing would be left.
        with self._store.read() as db:
            for name in followed.kept(self._folder):
                with self._follower(name).following(db):
                    pass
        with self._store.write() as db:
            if found := work(db):
                self._unlink_kept()
        self._store.scrub()
        return found

    def _unlink_kept(self, embedding: bytes | None = None) -> None:
        try:
            followed.unlink_kept(self._folder, embedding)
        except OSError as error:
            raise GalleryError(
                f"{error.filename}: the kept index cannot be deleted ({error.strerror}), so no product was removed. "
                "Delete it, then try again."
            ) from None

    def get(self, sku: str) -> Product | None:
        """Return the product, or None when there is none."""
        with self._store.read() as db:
            number = rows.product_number(db, sku)
            return None if number is None else rows.products(db, [number])[number]

    def photos_of(self, sku: str) -> list[bytes]:
        """Return the SHA-256 of the product's photos, the first added first; of an unknown product, none."""
        with self._store.read() as db:
            found = db.execute(
                "SELECT digest FROM view JOIN photo ON photo.id = view.photo WHERE product = ? ORDER BY +view.id",
                (rows.product_number(db, sku),),
            )
            return [digest for (digest,) in found]

    def showing(self, digest: bytes) -> list[Product]:
        """Return the products that have the photo with this SHA-256, the first added first."""
        with self._store.read() as db:
            numbers = rows.products_showing(db, [digest])
            found = rows.products(db, numbers)
            return [found[number] for number in sorted(numbers)]

    def photo(self, digest: bytes) -> bytes | None:
        """Return the JPEG file with this SHA-256, or None when there is none. Raises `PhotoRotted`."""
        with self._store.read() as db:
            jpeg = rows.photo(db, digest)
        if jpeg is not None and photos_.content_digest(jpeg) != digest:
            raise PhotoRotted(str(damaged(f"photo {digest.hex()} is not what was written")))
        return jpeg

    def products(self, where: Filter | None = None, after: str = "", limit: int = 100) -> list[Product]:
        """Return at most `limit` products that match, in the order of their SKUs, the first one later than `after`."""
        with self._store.read() as db:
            return rows.listed(db, where, after, limit)

    def skus(self) -> Iterator[str]:
        """Yield all SKUs, in order, some at a time: products may come and go meanwhile."""
        after = ""
        while page := self.products(after=after, limit=_PAGE):
            yield from (product.sku for product in page)
            after = page[-1].sku

    def categories(self) -> list[str]:
        """Return the categories that products have, in order, at most `MAX_CATEGORIES`."""
        with self._store.read() as db:
            return rows.categories(db, MAX_CATEGORIES)

    def count(self) -> int:
        """Return the number of products."""
        return self._number("SELECT count(*) FROM product")

    def count_photos(self) -> int:
        """Return the number of photos; one that several products show counts once."""
        return self._number("SELECT count(*) FROM photo")

    def count_vectors(self, embedding: bytes) -> int:
        """Return how many photos have a vector of `embedding`."""
        return self._number(
            "SELECT count(*) FROM vector WHERE embedding = (SELECT id FROM embedding WHERE name = ?)",
            embedding,
        )

    def _number(self, query: str, *values: bytes) -> int:
        with self._store.read() as db:
            return int(db.execute(query, values).fetchone()[0])

    # Embeddings.

    def embeddings(self) -> list[bytes]:
        """Return the embeddings of which there are vectors, the oldest first."""
        with self._store.read() as db:
            return [name for (name,) in db.execute("SELECT name FROM embedding ORDER BY id")]

    def vectors_of(self, sku: str, embedding: bytes) -> Vectors:
        """Return the vectors (m, d) of the product's photos that have one, in order; (0, 0) when none has."""
        with self._store.read() as db:
            number = rows.product_number(db, sku)
            views = rows.views(db, embedding, [] if number is None else [number])
        return np.stack([vector for _, _, vector in views]) if views else np.empty((0, 0), np.float32)

    def missing(self, embedding: bytes, limit: int) -> list[bytes]:
        """Return the SHA-256 of at most `limit` photos that have no vector of `embedding`."""
        with self._store.read() as db:
            found = db.execute(
                """SELECT digest FROM photo WHERE NOT EXISTS (SELECT 1 FROM vector WHERE vector.photo = photo.id
                AND vector.embedding = (SELECT id FROM embedding WHERE name = ?)) ORDER BY id LIMIT ?""",
                (embedding, limit),
            )
            return [digest for (digest,) in found]

    def put_vectors(self, embedding: bytes, vectors: Mapping[bytes, Vectors]) -> None:
        """Store vectors (d,) by the SHA-256 of their photos; photos that are gone are passed over.

        What has other vectors meanwhile is found as before: a new embedding is filled while the old one serves.
        """
        if not vectors:
            return
        matrix = np.stack(list(vectors.values()))
        require_rows(embedding, matrix, len(vectors))
        with self._store.write() as db:
            number = rows.put_vectors(db, embedding, zip(vectors, matrix, strict=True), matrix.shape[1])
            rows.refresh_prototypes(db, number, rows.products_showing(db, vectors))

    def forget(self, embedding: bytes) -> None:
        """Remove all vectors of an embedding that is no longer used, its index, and its rejection."""
        with self._lock:
            old = self._followed.pop(embedding, None)
        if old is not None:
            old.abandon()
        with self._store.write() as db:
            rows.forget(db, embedding)
            self._unlink_kept(embedding)
        self._store.scrub()

    def settle(self) -> None:
        """Wait for indexes that are being built or saved in the background."""
        with self._lock:
            found = list(self._followed.values())
        for one in found:
            one.settle()

    def _follower(self, embedding: bytes) -> Followed:
        with self._lock:
            if embedding not in self._followed:
                self._followed[embedding] = Followed(self._store, self._folder, embedding)
            return self._followed[embedding]

    # Search.

    def search(
        self,
        embedding: bytes,
        queries: Vectors,
        k: int,
        where: Filter | None = None,
        text: str | None = None,
    ) -> list[list[Match]]:
        """Return for each query, a row of (n, d), the k best products that match `where`, best first.

        With `text`, the order follows similarity and title together. Fewer than k come only when fewer match.
        """
        require_rows(embedding, queries, len(queries))
        require_k(k)
        follower = self._follower(embedding)
        words = None if text is None else self._finder.words(text)
        with self._store.read() as db, follower.following(db) as index:
            if index is not None and queries.shape[1] != index.dimension:
                raise GalleryError(
                    f"Search: found queries of {queries.shape[1]} numbers, expected {index.dimension}. Embed them with "
                    "the recognizer that serves."
                )
            found = self._finder.search(db, embedding, index, queries, self._most(k, text), where, words)
        follower.maintain()
        return [self._by_meaning(text, matches, k, TEXT_WEIGHT) for matches in found]

    def search_text(self, text: str, k: int, where: Filter | None = None) -> list[Match]:
        """Return the k products that match `where` whose words are nearest to `text`, best first; none without any.

        Their similarity is 0, their score that of the words, and their photo the product's first, or empty.
        """
        require_k(k)
        words = self._finder.words(text)
        with self._store.read() as db:
            found = self._finder.search_text(db, words, self._most(k, text), where)
        return self._by_meaning(text, found, k, 1.0)

    def _most(self, k: int, text: str | None) -> int:
        """Return how many are looked for where k are wanted."""
        return k if text is None or self._meanings is None else max(ASKED * k, FEWEST)

    def _by_meaning(self, text: str | None, found: list[Match], k: int, weight: float) -> list[Match]:
        """Return the k best of what was found. Not in a transaction: a text model takes its time."""
        if text is None or self._meanings is None:
            return found
        return self._meanings.ranked(text[:MAX_TEXT], found, weight)[:k]

    def follow_words(self, enough: Callable[[], bool] = lambda: False) -> None:
        """Read the products' words now, until `enough` says so, so that the first text does not wait for it."""
        self._finder.follow(enough)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Save indexes that changed, and close the gallery; it cannot be used afterwards."""
        with self._lock:
            found, self._followed = list(self._followed.values()), {}
        for one in found:
            one.close()
        self._finder.close()
        self._store.close()
