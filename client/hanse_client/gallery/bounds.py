"""What a gallery takes: photos as it stores them, vectors of length one, and how much at once.

    digest = require_photo("A-17", jpeg)
    require_rows(embedding, vectors, count=3)

Everything else is refused before the database is opened.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from hanse_common.errors import GalleryError, PhotoError
from hanse_common.vision import photo as photos_
from hanse_common.vision.photo import PhotoLimits

MAX_VIEWS: Final = 64
"""Bound of a product's photos."""

STORED_SIDE: Final = 512
"""Longest side of a stored photo, in pixels."""

MAX_DIMENSION: Final = 4096
"""Bound of an embedding's dimension."""

MAX_RESULTS: Final = 1000
"""Bound of the products that one query asks for."""

MAX_TEXT: Final = 300
"""Bound of a text that is searched for, in characters; what is longer is cut."""

_STORED = PhotoLimits(max_bytes=1 << 20, max_pixels=STORED_SIDE**2, formats=("JPEG",))
_UNIT_SLACK = 1e-3

Vectors = NDArray[np.float32]


def require_photo(sku: str, jpeg: bytes) -> bytes:
    """Return the SHA-256 of a photo as `Gallery.prepare` makes it. Raises `GalleryError` for any other."""
    try:
        photos_.check(jpeg, _STORED)
    except PhotoError as error:
        raise GalleryError(f"Product {sku!r}: {error} Prepare photos with Gallery.prepare.") from None
    if len(jpeg) > _STORED.max_bytes:
        raise GalleryError(
            f"Product {sku!r}: found a photo of {len(jpeg)} bytes, expected at most {_STORED.max_bytes}. "
            "Prepare photos with Gallery.prepare."
        )
    return photos_.content_digest(jpeg)


def require_k(k: int) -> None:
    """Raise `GalleryError` unless a query may ask for `k` products."""
    if not 1 <= k <= MAX_RESULTS:
        raise GalleryError(f"Search: found k = {k}, expected 1 to {MAX_RESULTS}.")


def require_rows(embedding: bytes, vectors: Vectors, count: int) -> None:
    """Raise `GalleryError` unless `vectors` are (`count`, d) float32, rows of length one or zero, named by 32 bytes."""
    if len(embedding) != 32:
        raise GalleryError(f"Embedding: found a name of {len(embedding)} bytes, expected 32.")
    if vectors.ndim != 2 or vectors.dtype != np.float32 or len(vectors) != count:
        raise GalleryError(
            f"Vectors: found {vectors.dtype} of shape {vectors.shape}, expected float32 of ({count}, d)."
        )
    if not 1 <= vectors.shape[1] <= MAX_DIMENSION:
        raise GalleryError(f"Vectors: found {vectors.shape[1]} numbers a row, expected 1 to {MAX_DIMENSION}.")
    lengths = np.linalg.norm(vectors, axis=1)
    if not np.all((np.abs(lengths - 1) <= _UNIT_SLACK) | (lengths == 0)):  # nor is NaN either of them
        raise GalleryError("Vectors: found a row whose length is neither 1 nor 0, expected unit rows.")
