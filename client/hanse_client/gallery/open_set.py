"""Whether what a photo shows is in the catalog at all: how alike must the most similar product be.

    gallery.open_set.calibrate(engine.embedding)
    threshold = gallery.open_set.rejection(engine.embedding).threshold

A threshold is kept with the embedding that it was calibrated for; `hanse_client.gallery.calibration` measures it on the
gallery's own photos, and `hanse_client.gallery.rejection` chooses it.
"""

import logging
from collections.abc import Callable

import numpy as np

from hanse_client.gallery import calibration
from hanse_client.gallery.bounds import Vectors, require_rows
from hanse_client.gallery.followed import Followed
from hanse_client.gallery.rejection import DEFAULT_TARGETS, Rejection, Targets, calibrate
from hanse_client.gallery.store import Store

log = logging.getLogger(__name__)


class OpenSet:
    """The rejections of a gallery, by embedding. Safe to share between threads.

    `follower` returns the index of an embedding. Every method raises `GalleryError` when the database is damaged,
    locked or full.
    """

    def __init__(self, store: Store, follower: Callable[[bytes], Followed]) -> None:
        self._store = store
        self._follower = follower
        self._fresh: dict[bytes, tuple[int, int, Targets]] = {}

    def rejection(self, embedding: bytes) -> Rejection:
        """Return the rejection of `embedding` that was calibrated last, or the default."""
        with self._store.read() as db:
            return calibration.stored(db, embedding)

    def shows(self, embedding: bytes, query: Vectors) -> bool:
        """Return whether a photo with the vector `query` (d,) shows any product of the gallery.

        So it is when the most similar product is above the threshold, or a photo of the most similar ones is the same
        picture (`hanse_client.duplicates.SAME`).
        """
        require_rows(embedding, query[np.newaxis], 1)
        with self._store.read() as db, self._follower(embedding).following(db) as index:
            rejection = calibration.stored(db, embedding)
            return index is not None and calibration.shown(db, embedding, index, query, rejection)

    def calibrate(
        self, embedding: bytes, impostors: Vectors | None = None, targets: Targets = DEFAULT_TARGETS
    ) -> Rejection:
        """Calibrate the rejection of `embedding`, keep it, and return it.

        `impostors` (m, d) are vectors of photos that show nothing of the gallery; `hanse_client.gallery.calibration`
        says what the gallery's own photos tell.
        """
        if impostors is not None:
            require_rows(embedding, impostors, len(impostors))
        follower = self._follower(embedding)
        genuine: list[float] = []
        impostor: list[float] = []
        twins: set[int] = set()
        with self._store.read() as db:
            extent, pieces = calibration.extent(db, embedding), calibration.sampled(db, embedding)
        for piece in pieces:
            with self._store.read() as db, follower.following(db) as index:
                if index is not None:
                    own = calibration.of_own(db, embedding, index, piece)
                    genuine += own.genuine
                    impostor += own.impostor
                    twins |= own.twins
        if impostors is not None:
            with self._store.read() as db, follower.following(db) as index:
                if index is not None:
                    impostor += calibration.of_others(db, embedding, index, impostors)
        if twins:
            log.warning(
                "%d products look the same as another under a SKU of its own: hanse-client products check names them.",
                len(twins),
            )
        found = calibrate(np.array(genuine), np.array(impostor), targets)
        with self._store.write() as db:
            calibration.store(db, embedding, found, extent)
        self._fresh.pop(embedding, None)
        return found

    def is_stale(self, embedding: bytes, targets: Targets = DEFAULT_TARGETS) -> bool:
        """Return whether the rejection of `embedding` is to be calibrated: for other targets, or for other photos.

        So it is when those that came or went since are more than a tenth of what it was calibrated on.
        """
        with self._store.read() as db:
            now = (*calibration.mark(db), targets)
            if self._fresh.get(embedding) == now:
                return False
            stale = calibration.stale(db, embedding, targets)
        if not stale:
            self._fresh[embedding] = now
        return stale
