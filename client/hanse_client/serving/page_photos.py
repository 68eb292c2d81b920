"""The photos that somebody looks at just now, in memory: found again by their digest, the oldest forgotten first.

    photos = Photos()
    digest = photos.keep(Gallery.prepare(image))
    photos.get(digest)                               # the JPEG; None once it is forgotten

A photo that is only looked at is never written to a disk. Kept for good are photos of products and of corrections.
"""

import hashlib
import threading
from collections import OrderedDict

MOST_PHOTOS = 64
"""Photos that are kept; one takes some 50 kB."""


class Photos:
    """At most `most` photos. Threads may share it."""

    def __init__(self, most: int = MOST_PHOTOS) -> None:
        self._most = most
        self._photos: OrderedDict[bytes, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def keep(self, jpeg: bytes) -> bytes:
        """Keep a photo, and return its SHA-256."""
        digest = hashlib.sha256(jpeg).digest()
        with self._lock:
            self._photos[digest] = jpeg
            self._photos.move_to_end(digest)
            while len(self._photos) > self._most:
                self._photos.popitem(last=False)
        return digest

    def get(self, digest: bytes) -> bytes | None:
        """Return the photo of that SHA-256, which is then the newest; None when it is not kept."""
        with self._lock:
            if digest not in self._photos:
                return None
            self._photos.move_to_end(digest)
            return self._photos[digest]
