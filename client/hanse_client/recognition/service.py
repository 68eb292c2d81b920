"""The core that REST, gRPC, the page and the commands share: classify, embed, search, and keep the products.

    with Recognition.open(config, follow=True) as recognition:
        recognition.put(Product(sku="A-17", title="Trail shoe"), [image])
        found = recognition.search(another_image, k=5)
        found.matches[0].product.sku, found.known

All calls block and are safe from any thread; photos of all of them go through the network together
(`hanse_client.recognition.batching`). With `follow` the recognizer is replaced as soon as another is released, without
a pause (`hanse_client.recognition.following`): a call ends on the engine and in the index with which it began.

A product's photos are embedded as they are stored, so that vectors that are made anew are those that were made at once.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hanse_client.config import ClientConfig
from hanse_client.gallery.bounds import MAX_RESULTS, MAX_VIEWS
from hanse_client.gallery.gallery import Gallery, Match
from hanse_client.gallery.importing import Imported, import_products
from hanse_client.gallery.product import Filter, Product
from hanse_client.queries import QueryLog
from hanse_client.recognition.answers import (
    Classification,
    Embedded,
    Found,
    RecognitionStatus,
    Recognized,
    ranked,
)
from hanse_client.recognition.batching import Batcher
from hanse_client.recognition.engines import Engines
from hanse_client.recognition.following import Follower, Tell, calibrate_when_stale, embed_missing
from hanse_client.recognition.sources import begin, version
from hanse_common.errors import CatalogError, GalleryError
from hanse_common.vision.photo import decode

if TYPE_CHECKING:  # torch takes seconds to load
    from hanse_client.recognition.engine import Engine, Seen

Progress = Callable[[int, int], None]

log = logging.getLogger(__name__)


class Recognition:
    """A shop's recognizer and gallery at work. Made by `open`."""

    def __init__(self, config: ClientConfig, gallery: Gallery, *, follow: bool, tell: Tell) -> None:
        self.gallery = gallery
        self.changing = gallery.changing
        """Held while a product is read, changed and written back."""
        self._config = config
        # What a shop's own commands look at is not what shoppers search for.
        self._queries = QueryLog.of(config) if follow else None
        first, engine = begin(config, gallery, follow=follow)
        self._engines = Engines(engine)
        self._batcher = Batcher()
        self._follower = Follower(config, first, self._engines, self._batcher, gallery, tell)
        self._follows = follow
        if follow:
            self._follower.start()

    @classmethod
    def open(cls, config: ClientConfig, *, follow: bool = False, tell: Tell = lambda line: None) -> Self:
        """Open the shop's gallery, and load the recognizer that the configuration or the league's release names.

        With `follow` a thread watches for others, and keeps the gallery's vectors complete; without, the first search
        completes them. With `follow` each `search` by a photo is counted by class, too, where the policy allows it
        (`hanse_client.queries`); no other method counts. `tell` hears a line when another recognizer serves, or can't.

        Raises `ConfigError` when there is no recognizer, or no text model where one is wanted, `RecognizerError` when
        the recognizer is damaged, `GalleryError` when the gallery is.
        """
        meanings = None
        if config.search.text_model is not None:
            from hanse_client.gallery.meanings import Meanings

            meanings = Meanings.load()
        gallery = Gallery.open(config.gallery_path, meanings)
        try:
            return cls(config, gallery, follow=follow, tell=tell)
        except BaseException:
            gallery.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Answer what is under way, then end."""
        self._follower.close()
        self._batcher.close()
        self._engines.announce(None)  # returns when nobody is between the network and the gallery
        self.gallery.close()

    def status(self) -> RecognitionStatus:
        """Return what serves now, and what comes."""
        engine = self._engines.serving
        return RecognitionStatus(
            recognizer=engine.digest,
            version=version(self._config, engine.digest),
            embedding=engine.embedding,
            dimension=engine.dimension,
            classes=engine.classes,
            personal_labels=engine.personal_labels,
            products=self.gallery.count(),
            photos=self.gallery.count_photos(),
            rejection=self.gallery.open_set.rejection(engine.embedding),
            rebuild=self._follower.rebuild,
            problem=self._follower.problem,
        )

    @contextmanager
    def held(self) -> Iterator[bytes]:
        """Yield the name of the embedding that serves; its vectors stay in the gallery meanwhile, whatever comes.

        Calls in between may answer by one that came later, whose vectors are complete and stay, too. Raises
        `RecognizerError` where the recognizer has no embedding.
        """
        with self._engines.in_use() as (engine, _):
            yield engine.require_embedding()

    # Photos

    def submit(self, image: Image.Image) -> "Future[Seen]":
        """Return the future answer of the engine that serves now. Raises `Busy` when too many photos wait."""
        return self._batcher.submit(self._engines.serving, image)

    def classify(self, image: Image.Image, top: int = 5) -> Classification:
        """Return the `top` classes of what `image` shows. Raises `Busy`."""
        engine = self._engines.serving
        return _classification(engine, self._batcher.submit(engine, image).result(), top)

    def embed(self, image: Image.Image) -> Embedded:
        """Return the vector of `image`. Raises `Busy`, and `RecognizerError` where the recognizer has no embedding."""
        engine = self._engines.serving
        embedding = engine.require_embedding()
        return Embedded(self._batcher.submit(engine, image).result().embedding, embedding)

    # Search

    def search(
        self,
        image: Image.Image | None = None,
        *,
        text: str | None = None,
        where: Filter | None = None,
        k: int = 10,
    ) -> Found:
        """Return the k products that look most like `image`, of those that match `where`.

        With `text` the order follows looks and words together; without `image`, words alone. A photo is taken for a
        shopper's: a call for it is counted once (`open`). What the shop itself looks at is for `recognize`.

        Raises `Busy`, `GalleryError`, and `RecognizerError` where the recognizer has no embedding.
        """
        with self._engines.in_use() as (engine, _):
            embedding = engine.require_embedding()
            if image is None:
                if text is None:
                    raise GalleryError("Search: found neither a photo nor a text, expected one of them.")
                named = self.gallery.search_text(text, k, where)
                return Found(
                    tuple(named), None, self.gallery.open_set.rejection(embedding).threshold, embedding
                )
            seen = self._counted(engine, image)
            return self._found(engine, seen.embedding, text, where, k)

    def recognize(
        self,
        image: Image.Image,
        *,
        top: int = 5,
        where: Filter | None = None,
        text: str | None = None,
        k: int = 10,
    ) -> Recognized:
        """Return what `classify` and `search` say of `image`, by one pass through the network. Raises as they do.

        It is for what the shop itself looks at, such as at a till or on its page, and is never counted.
        """
        with self._engines.in_use() as (engine, _):
            engine.require_embedding()
            seen = self._batcher.submit(engine, image).result()
            return Recognized(
                _classification(engine, seen, top), self._found(engine, seen.embedding, text, where, k)
            )

    def search_all(
        self, images: Sequence[Image.Image], *, where: Filter | None = None, k: int = 10
    ) -> list[Found]:
        """Return what `search` says of each of many images, all by one recognizer; requests of others go in between.

        Raises as `search` does, but waits where there is no room.
        """
        with self._engines.in_use() as (engine, _):
            engine.require_embedding()
            seen = self._batcher.see_all(engine, images)
            if not seen:
                return []
            self._complete(engine)
            vectors = np.stack([one.embedding for one in seen])
            found = self.gallery.search(engine.embedding, vectors, k, where)
            return [
                self._answer(engine, vector, matches) for vector, matches in zip(vectors, found, strict=True)
            ]

    def similar(self, sku: str, *, where: Filter | None = None, k: int = 10) -> Found:
        """Return the k other products that look most like the product `sku`, all their photos taken together.

        Raises `GalleryError` for a product that is not there or has no photo, and as `search` does.
        """
        with self._engines.in_use() as (engine, _):
            engine.require_embedding()
            product = self.gallery.get(sku)
            if product is None:
                raise GalleryError(f"Product {sku!r}: found no such product in the gallery.")
            self._complete(engine)
            views = self._views(product.sku, engine)
            mean = views.mean(axis=0, dtype=np.float32)[np.newaxis]
            mean /= max(float(np.linalg.norm(mean)), 1e-12)
            (matches,) = self.gallery.search(engine.embedding, mean, min(k + 1, MAX_RESULTS), where)
            others = [match for match in matches if match.product.sku != product.sku][:k]
            threshold = self.gallery.open_set.rejection(engine.embedding).threshold
            return Found(tuple(others), None, threshold, engine.embedding)

    # Products

    def put(self, product: Product, images: Sequence[Image.Image] = ()) -> list[bytes]:
        """Add the product or update its fields, add `images` to its photos, and return these photos' SHA-256.

        It is found by them as soon as this returns. Raises `Busy` and `GalleryError`, and then nothing was done.
        """
        if len(images) > MAX_VIEWS:
            raise GalleryError(
                f"Product {product.sku!r}: found {len(images)} photos, expected at most {MAX_VIEWS}."
            )
        photos = [Gallery.prepare(image) for image in images]
        stored = [decode(photo) for photo in photos]
        with self._engines.in_use() as engines:
            vectors = {}
            if photos:
                for engine in engines:
                    if engine is not None and engine.embedding and engine.embedding not in vectors:
                        futures = self._batcher.submit_all(engine, stored)
                        vectors[engine.embedding] = np.stack(
                            [future.result().embedding for future in futures]
                        )
            return self.gallery.put(product, photos, vectors)

    def remove(self, sku: str) -> bool:
        """Remove the product and its photos; return whether there was one. Raises `GalleryError`."""
        return self.gallery.remove(sku)

    def remove_photo(self, sku: str, digest: bytes) -> bool:
        """Take the photo with that SHA-256 from the product; return whether it had it. Raises `GalleryError`."""
        return self.gallery.remove_photo(sku, digest)

    def import_products(self, source: Path, progress: Progress = lambda done, total: None) -> Imported:
        """Put the products of a CSV file (`hanse_client.gallery.importing`) into the gallery.

        `progress` hears bytes of it (read, in all). Requests of others go in between. Raises `GalleryError`.
        """
        done = import_products(self.gallery, source, self._embedded, progress=progress)
        engine = self._engines.serving
        if engine.embedding:
            self._complete(engine)
        return done

    def complete(self, progress: Progress = lambda done, total: None) -> None:
        """Embed the gallery's photos that have no vector yet; `progress` hears (done, total).

        The threshold is then calibrated, where enough photos came or went since.
        """
        engine = self._engines.serving
        embed_missing(self.gallery, engine, self._batcher, progress=progress)
        if engine.embedding:
            calibrate_when_stale(self.gallery, engine, self._config)

    # Parts

    def _embedded(self, images: Sequence[Image.Image]) -> dict[bytes, NDArray[np.float32]]:
        """Return unit rows for each embedding that serves or comes. Held for one batch: an import may take hours.

        A switch right after it leaves photos without a vector of what serves then: the follower's next look finds them.
        """
        with self._engines.in_use() as engines:
            return {
                engine.embedding: np.stack([seen.embedding for seen in self._batcher.see_all(engine, images)])
                for engine in engines
                if engine is not None and engine.embedding
            }

    def _complete(self, engine: "Engine") -> None:
        if not self._follows:
            embed_missing(self.gallery, engine, self._batcher)
            calibrate_when_stale(self.gallery, engine, self._config)

    def _found(
        self, engine: "Engine", vector: NDArray[np.float32], text: str | None, where: Filter | None, k: int
    ) -> Found:
        self._complete(engine)
        (matches,) = self.gallery.search(engine.embedding, vector[np.newaxis], k, where, text)
        return self._answer(engine, vector, matches)

    def _answer(self, engine: "Engine", vector: NDArray[np.float32], matches: Sequence[Match]) -> Found:
        rejection = self.gallery.open_set.rejection(engine.embedding)
        # What a filter leaves out, or a text puts behind, is looked up only where it can change the answer.
        known = any(rejection.known(match.similarity) for match in matches) or self.gallery.open_set.shows(
            engine.embedding, vector
        )
        return Found(tuple(matches), known, rejection.threshold, engine.embedding)

    def _views(self, sku: str, engine: "Engine") -> NDArray[np.float32]:
        """Return the vectors of the product's photos, (m, d); computed here where they are not yet stored."""
        views = self.gallery.vectors_of(sku, engine.embedding)
        if len(views):
            return views
        photos = [self.gallery.photo(digest) for digest in self.gallery.photos_of(sku)]
        images = [decode(photo) for photo in photos if photo is not None]
        if not images:
            raise GalleryError(f"Product {sku!r}: found no photo of it, expected one or more to compare by.")
        futures = self._batcher.submit_all(engine, images)
        return np.stack([future.result().embedding for future in futures])

    def _counted(self, engine: "Engine", image: Image.Image) -> "Seen":
        """Return what a shopper's photo shows, and count it by its class, where that is allowed.

        It is then computed alone: what is counted of it must not depend on others' photos. A log that can't be written
        harms no answer.
        """
        seen = self._batcher.submit(engine, image, alone=self._queries is not None).result()
        if self._queries is not None:
            try:
                self._queries.note(engine.classes[int(seen.probabilities.argmax())])
            except CatalogError:
                log.exception("A query was not counted.")
        return seen


def _classification(engine: "Engine", seen: "Seen", top: int) -> Classification:
    personal = None if seen.personal is None else ranked(engine.personal_labels, seen.personal, top)
    return Classification(ranked(engine.classes, seen.probabilities, top), personal, engine.digest)
