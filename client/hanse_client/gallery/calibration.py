"""What the gallery's own photos tell of its threshold, and where that is kept.

    with store.read() as db:
        pieces = sampled(db, embedding)
    with store.read() as db, followed.following(db) as index:
        found = of_own(db, embedding, index, pieces[0])    # found.genuine, found.impostor, found.twins

A photo of the gallery stands in for two that a shopper might take. *Leave its product out*, and it shows something that
is not in the catalog: the best similarity among the others is an impostor's. *Leave only the photo out*, and it shows
a product seen from other sides: the best similarity is then genuine, where the product has another picture to tell.
Photos from elsewhere that show nothing of the gallery are impostors as well.

Each piece of the photos is looked at in a transaction of its own, so that searches need not wait for all of it.

*Twins* show one picture under several SKUs (`hanse_client.duplicates.SAME`). A photo of one is no impostor to the other
and would push the threshold up, so it is left out with its twins: what is promised is of photos that show nothing of
the gallery. Products that look alike in different pictures still count. Photos taken as shoppers take them tell more
than catalog pictures do.

A photo that is the *same picture* as one of the gallery needs no threshold: it shows a product (`shown`).
"""

import sqlite3
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hanse_client.duplicates import SAME
from hanse_client.gallery import rows
from hanse_client.gallery.index import VectorIndex, spread
from hanse_client.gallery.rejection import Rejection, Targets
from hanse_client.gallery.store import PAD

PHOTOS: Final = 1000
"""Photos of the gallery that are looked at, at most; the quantile of a thousand is near enough."""

CHANGED: Final = 0.1
"""The threshold is to be calibrated anew when the photos that came or went are more than this part of those before."""

PIECE: Final = 16
"""Photos that are looked at in one transaction."""

_NEAREST = 40


class Extent(NamedTuple):
    """How many of the gallery's photos have a vector, and the number of the newest, 0 without any."""

    photos: int
    newest: int


@dataclass(slots=True)
class OwnPhotos:
    """Similarities that the gallery's own photos reach, and the numbers of products that have a twin among others."""

    genuine: list[float] = field(default_factory=list)
    impostor: list[float] = field(default_factory=list)
    twins: set[int] = field(default_factory=set)


def sampled(db: sqlite3.Connection, embedding: bytes) -> list[list[int]]:
    """Return at most `PHOTOS` of the gallery's photos that have a vector, spread evenly, in pieces of `PIECE`."""
    found = db.execute(
        "SELECT photo FROM vector WHERE embedding = (SELECT id FROM embedding WHERE name = ?) ORDER BY photo",
        (embedding,),
    )
    photos = np.fromiter((photo for (photo,) in found), np.int64)
    chosen = [int(photo) for photo in photos[spread(len(photos), PHOTOS)]]
    return [chosen[start : start + PIECE] for start in range(0, len(chosen), PIECE)]


def of_own(db: sqlite3.Connection, embedding: bytes, index: VectorIndex, photos: list[int]) -> OwnPhotos:
    """Return what the gallery's own `photos` tell."""
    found = OwnPhotos()
    shown_by = [(photo, *_shown(db, embedding, photo)) for photo in photos]
    there = [(photo, query, owners) for photo, query, owners in shown_by if query is not None]
    if not there:
        return found
    asked = _NEAREST + max(len(owners) for _, _, owners in there)
    ids, _ = index.search(np.stack([query for _, query, _ in there]), asked)
    for (photo, query, owners), near in zip(there, ids, strict=True):
        others, twins = _best_other(db, embedding, index, near, query, owners)
        if len(owners) + len(twins) > 1:
            found.twins |= {*owners, *twins}
        if others is None:
            continue
        found.impostor.append(others)
        own = max((_left_out(db, embedding, owner, photo, query) for owner in owners), default=-2.0)
        if own > -2.0:
            found.genuine.append(max(own, others))
    return found


def of_others(
    db: sqlite3.Connection, embedding: bytes, index: VectorIndex, impostors: NDArray[np.float32]
) -> list[float]:
    """Return the similarities that vectors (m, d) of photos which show nothing of the gallery reach.

    A photo that is a product's own picture does show it; what it reaches is with that product left out.
    """
    found = []
    for start in range(0, len(impostors), PIECE):
        queries = impostors[start : start + PIECE]
        ids, _ = index.search(queries, _NEAREST)
        found += [
            _best_other(db, embedding, index, near, query, [])[0]
            for near, query in zip(ids, queries, strict=True)
        ]
    return [similarity for similarity in found if similarity is not None]


def stored(db: sqlite3.Connection, embedding: bytes) -> Rejection:
    """Return the rejection that was stored last, or the default."""
    row = db.execute(
        """SELECT threshold, false_accept, genuine, impostor, false_reject, most_false_accept, most_false_reject
        FROM rejection WHERE embedding = ?""",
        (embedding,),
    ).fetchone()
    if row is None:
        return Rejection()
    threshold, false_accept, genuine, impostor, false_reject, *most = row
    return Rejection(threshold, false_accept, genuine, impostor, false_reject, Targets(*most))


def store(db: sqlite3.Connection, embedding: bytes, rejection: Rejection, extent: Extent) -> None:
    """Keep the rejection of `embedding` that was calibrated on photos of that `extent`, instead of the last one."""
    one, targets = rejection, rejection.targets
    rates = (one.threshold, one.false_accept, one.genuine, one.impostor, one.false_reject)
    db.execute(
        "INSERT OR REPLACE INTO rejection VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (embedding, *rates, targets.false_accept, targets.false_reject, *extent),
    )


def extent(db: sqlite3.Connection, embedding: bytes) -> Extent:
    """Return how much there is to calibrate on now."""
    found = db.execute(
        """SELECT count(*), coalesce(max(id), 0) FROM vector
        WHERE embedding = (SELECT id FROM embedding WHERE name = ?)""",
        (embedding,),
    )
    return Extent(*found.fetchone())


def mark(db: sqlite3.Connection) -> tuple[int, int]:
    """Return two numbers of which one grows whenever a photo with a vector comes or goes; found without counting."""
    found = db.execute(
        "SELECT coalesce((SELECT max(id) FROM vector), 0), coalesce((SELECT max(number) FROM removal), 0)"
    )
    vector, removal = found.fetchone()
    return vector, removal


def stale(db: sqlite3.Connection, embedding: bytes, targets: Targets) -> bool:
    """Return whether the rejection that is stored is for other targets, or its photos changed by `CHANGED`."""
    row = db.execute(
        "SELECT most_false_accept, most_false_reject, photos, newest FROM rejection WHERE embedding = ?",
        (embedding,),
    ).fetchone()
    now = extent(db, embedding)
    if row is None:
        return now.photos > 0
    before = Extent(*row[2:])
    (kept,) = db.execute(
        "SELECT count(*) FROM vector WHERE embedding = (SELECT id FROM embedding WHERE name = ?) AND id <= ?",
        (embedding, before.newest),
    ).fetchone()
    changed = before.photos + now.photos - 2 * kept
    return Targets(*row[:2]) != targets or changed > CHANGED * before.photos


def shown(
    db: sqlite3.Connection,
    embedding: bytes,
    index: VectorIndex,
    query: NDArray[np.float32],
    rejection: Rejection,
) -> bool:
    """Return whether a photo with the vector `query` (d,) shows one of the products that are most similar to it."""
    (ids,), _ = index.search(query[None], _NEAREST)
    numbers, vectors = rows.prototypes(db, ids.tolist(), None, index.dimension)
    if not numbers:
        return False
    if rejection.known(float((vectors @ query).max())):
        return True
    return any(view @ query >= SAME for _, _, view in rows.views(db, embedding, numbers))


def _shown(
    db: sqlite3.Connection, embedding: bytes, photo: int
) -> tuple[NDArray[np.float32] | None, list[int]]:
    """Return the photo's vector (d,), None when it was removed, and the products that show it."""
    row = db.execute(
        "SELECT substr(data, ?) FROM vector WHERE photo = ? AND embedding = (SELECT id FROM embedding WHERE name = ?)",
        (PAD + 1, photo, embedding),
    ).fetchone()
    owners = db.execute("SELECT product FROM view WHERE photo = ?", (photo,))
    return None if row is None else np.frombuffer(row[0], "<f4"), [owner for (owner,) in owners]


def _best_other(
    db: sqlite3.Connection,
    embedding: bytes,
    index: VectorIndex,
    near: NDArray[np.int64],
    query: NDArray[np.float32],
    owners: list[int],
) -> tuple[float | None, list[int]]:
    """Return the best similarity among `near` but `owners` and their twins, None when there is none; and the twins.

    `near` are numbers of prototypes.
    A twin has a photo that is the same picture as the query; it is looked for among what is more similar than the best.
    """
    numbers, vectors = rows.prototypes(db, near.tolist(), None, index.dimension)
    similarities = vectors @ query
    twins: list[int] = []
    for place in np.argsort(-similarities):
        number = numbers[place]
        if number in owners:
            continue
        if not any(view @ query >= SAME for _, _, view in rows.views(db, embedding, [number])):
            return float(similarities[place]), twins
        twins.append(number)
    return None, twins


def _left_out(
    db: sqlite3.Connection, embedding: bytes, product: int, photo: int, query: NDArray[np.float32]
) -> float:
    """Return the similarity of a photo to its product without that picture; −2 where the product has no other."""
    found = db.execute(
        """SELECT substr(vector.data, ?) FROM view JOIN vector ON vector.photo = view.photo
        AND vector.embedding = (SELECT id FROM embedding WHERE name = ?) WHERE view.product = ? AND view.photo <> ?""",
        (PAD + 1, embedding, product, photo),
    ).fetchall()
    others = [data for (data,) in found if np.frombuffer(data, "<f4") @ query < SAME]
    if not others:
        return -2.0
    mean = rows.mean(others)
    return float(np.frombuffer(mean, "<f4") @ query)
