"""What the gallery's own photos tell of its threshold, and where that is kept.

    with store.read() as db, followed.following(db) as index:
        rejection = measured(db, embedding, index, impostors=None, false_accept=0.05)

A photo of the gallery stands in for two that a shopper might take. *Leave its product out*, and it shows something that
is not in the catalog: the best similarity among the others is an impostor's. *Leave only the photo out*, and it shows
a product seen from other sides: the best similarity is then genuine, where the product has another photo to tell.
Photos from elsewhere that show nothing of the gallery are impostors as well.

Products that look the same under two SKUs make the gallery's own impostors look like its products, and the threshold
strict. Photos taken as shoppers take them tell more than catalog pictures do.
"""

import sqlite3
from typing import Final

import numpy as np
from numpy.typing import NDArray

from hanse_client.gallery import rows
from hanse_client.gallery.index import VectorIndex, spread
from hanse_client.gallery.rejection import Rejection, calibrate
from hanse_client.gallery.store import PAD

PHOTOS: Final = 1000
"""Photos of the gallery that are looked at, at most; the quantile of a thousand is near enough."""

_NEAREST = 40


def measured(
    db: sqlite3.Connection,
    embedding: bytes,
    index: VectorIndex | None,
    impostors: NDArray[np.float32] | None,
    false_accept: float,
) -> Rejection:
    """Return the rejection by at most `PHOTOS` of the gallery's photos, and vectors (m, d) of `impostors`."""
    genuine: list[float] = []
    impostor: list[float] = []
    if index is not None:
        for photo in _sampled(db, embedding):
            query, owners = _shown(db, embedding, photo)
            others = _best_other(db, embedding, index, query, owners)
            if others is None:
                continue
            impostor.append(others)
            own = max((_left_out(db, embedding, owner, photo, query) for owner in owners), default=-2.0)
            if own > -2.0:
                genuine.append(max(own, others))
        if impostors is not None:
            found = (_best_other(db, embedding, index, query, []) for query in impostors)
            impostor += [similarity for similarity in found if similarity is not None]
    return calibrate(np.array(genuine), np.array(impostor), false_accept)


def stored(db: sqlite3.Connection, embedding: bytes) -> Rejection:
    """Return the rejection that was stored last, or the default."""
    row = db.execute(
        "SELECT threshold, false_accept, genuine, impostor, false_reject FROM rejection WHERE embedding = ?",
        (embedding,),
    ).fetchone()
    return Rejection() if row is None else Rejection(*row)


def store(db: sqlite3.Connection, embedding: bytes, rejection: Rejection) -> None:
    """Keep the rejection of `embedding`, instead of the last one."""
    one = rejection
    db.execute(
        "INSERT OR REPLACE INTO rejection VALUES (?, ?, ?, ?, ?, ?)",
        (embedding, one.threshold, one.false_accept, one.genuine, one.impostor, one.false_reject),
    )


def _sampled(db: sqlite3.Connection, embedding: bytes) -> list[int]:
    found = db.execute(
        "SELECT photo FROM vector WHERE embedding = (SELECT id FROM embedding WHERE name = ?) ORDER BY photo",
        (embedding,),
    )
    photos = np.fromiter((photo for (photo,) in found), np.int64)
    return [int(photo) for photo in photos[spread(len(photos), PHOTOS)]]


def _shown(db: sqlite3.Connection, embedding: bytes, photo: int) -> tuple[NDArray[np.float32], list[int]]:
    """Return the photo's vector (d,), and the products that show it."""
    (data,) = db.execute(
        "SELECT substr(data, ?) FROM vector WHERE photo = ? AND embedding = (SELECT id FROM embedding WHERE name = ?)",
        (PAD + 1, photo, embedding),
    ).fetchone()
    owners = db.execute("SELECT product FROM view WHERE photo = ?", (photo,))
    return np.frombuffer(data, "<f4"), [owner for (owner,) in owners]


def _best_other(
    db: sqlite3.Connection,
    embedding: bytes,
    index: VectorIndex,
    query: NDArray[np.float32],
    owners: list[int],
) -> float | None:
    """Return the best similarity among all products but `owners`, or None when there is no other."""
    (ids,), _ = index.search(query[None], _NEAREST + len(owners))
    numbers, vectors = rows.prototypes(db, ids.tolist(), None, index.dimension)
    others = ~np.isin(numbers, owners)
    return float(np.max(vectors[others] @ query)) if others.any() else None


def _left_out(
    db: sqlite3.Connection, embedding: bytes, product: int, photo: int, query: NDArray[np.float32]
) -> float:
    """Return the similarity of a photo to its product without it; −2 where the product has no other."""
    found = db.execute(
        """SELECT substr(vector.data, ?) FROM view JOIN vector ON vector.photo = view.photo
        AND vector.embedding = (SELECT id FROM embedding WHERE name = ?) WHERE view.product = ? AND view.photo <> ?""",
        (PAD + 1, embedding, product, photo),
    ).fetchall()
    if not found:
        return -2.0
    mean = rows.mean([data for (data,) in found])
    return float(np.frombuffer(mean, "<f4") @ query)
