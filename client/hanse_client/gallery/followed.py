"""One embedding's index in memory, kept up with the database, and its file.

    followed = Followed(store, folder, embedding)
    with store.read() as db, followed.following(db) as index:
        found, _ = index.search(queries, 40)
    followed.maintain()

The database numbers vectors and removals, and an index knows up to which numbers it has them: to follow, it takes what
has come since, whoever wrote it. An index that has outgrown what it was made for is built anew by a thread of its own,
while the old one serves.

The file beside the database (`<embedding>.index`) only saves the building. It is written while the database is locked
for writers and the index holds just what the database does, and it is unlinked in the transaction of every removal,
before that commits: so no file ever holds a vector that is removed. It is kept under a key that only the database has,
of this embedding alone. A file that is damaged, larger than it can be, or from elsewhere, or that does not hold the
very vectors of the database once it has followed, is not used.
"""

import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import numpy as np

from hanse_client.gallery import index as indexes
from hanse_client.gallery import rows
from hanse_client.gallery.index import VectorIndex
from hanse_client.gallery.store import Store, sync_folder
from hanse_common.errors import GalleryError
from hanse_common.files import write_atomically

log = logging.getLogger(__name__)

SAVE_SECONDS: Final = 60.0
"""An index that changed is saved after so many seconds at the earliest, and when the gallery is closed."""

SUFFIX: Final = ".index"


class Followed:
    """The index of `embedding` over the database of `store`, its file in `folder`. Safe to share between threads."""

    def __init__(self, store: Store, folder: Path, embedding: bytes) -> None:
        self.path = folder / f"{embedding.hex()}{SUFFIX}"
        self._store, self._embedding = store, embedding
        self._key = store.key(b"index" + embedding)
        self._lock = threading.RLock()
        self._number: int | None = None  # the embedding's in the database; another after it was forgotten
        self._index: VectorIndex | None = None
        self._changed, self._saved_at = False, time.monotonic()
        self._worker: threading.Thread | None = None
        self._closed = threading.Event()

    @contextmanager
    def following(self, db: sqlite3.Connection) -> Iterator[VectorIndex | None]:
        """Yield the index as of the transaction `db`, or later; None when the embedding has no vector."""
        with self._lock:
            yield self._follow(db)

    def maintain(self) -> None:
        """Let a thread build the index anew, or save it, if one or the other is due."""
        with self._lock:
            index = self._index
            if index is None or self._closed.is_set() or (self._worker and self._worker.is_alive()):
                return
            if index.outgrown:
                work = self._build
            elif index.approximate and time.monotonic() - self._saved_at > SAVE_SECONDS and self._unsaved():
                work = self._save
            else:
                return
            self._worker = threading.Thread(target=self._with_store, args=(work,), daemon=True)
            self._worker.start()

    def settle(self) -> None:
        """Wait for the thread that `maintain` may have started."""
        if worker := self._worker:
            worker.join()

    def abandon(self) -> None:
        """Let the thread end soon, and save nothing."""
        self._closed.set()

    def close(self) -> None:
        """Save an index that changed, and let the thread end soon; a building that is under way is given up."""
        self._closed.set()
        with self._lock:
            unsaved = self._index is not None and self._index.approximate and self._unsaved()
        if unsaved:
            self._with_store(self._save)

    def _unsaved(self) -> bool:
        return self._changed or not self.path.exists()

    def _follow(self, db: sqlite3.Connection) -> VectorIndex | None:
        row = db.execute("SELECT id, dimension FROM embedding WHERE name = ?", (self._embedding,)).fetchone()
        if row is None:
            self._number = self._index = None
            return None
        number, dimension = row
        if number != self._number:
            self._number, self._index = number, self._loaded(db, number, dimension)
        index = self._index
        first, last = db.execute("SELECT min(number), max(number) FROM removal").fetchone()
        if index is None or (first is not None and index.upto[1] < first - 1):
            index = VectorIndex(dimension)
            index.upto = (0, last or 0)
        self._changed |= self._catch_up(db, number, index)
        self._index = index
        return index

    def _catch_up(self, db: sqlite3.Connection, number: int, index: VectorIndex) -> bool:
        """Take into `index` what is new in the database; return whether there was anything."""
        vector, removal = index.upto
        gone = db.execute("SELECT number, prototype FROM removal WHERE number > ?", (removal,)).fetchall()
        index.remove(id_ for _, id_ in gone if id_ is not None)
        index.upto = before = (vector, max((n for n, _ in gone), default=removal))
        while found := rows.prototypes_after(db, number, index.upto[0], index.dimension):
            index.add(*found)
            index.upto = (int(found[0][-1]), index.upto[1])
        return index.upto != before or bool(gone)

    def _loaded(self, db: sqlite3.Connection, number: int, dimension: int) -> VectorIndex | None:
        """Return the kept index, if there is one that holds just the database's vectors once it has followed."""
        ids = rows.prototype_ids(db, number)
        if len(ids) * dimension <= indexes.EXACT_NUMBERS or not self.path.exists():
            return None
        try:
            index = VectorIndex.load(self.path, self._key, indexes.most_bytes(len(ids), dimension))
            if index.dimension != dimension:
                raise ValueError("Expected an index of the embedding's dimension.")
        except (GalleryError, ValueError) as error:
            log.warning("The index %s cannot be used (%s) and is built anew.", self.path, error)
            return None
        self._changed = self._catch_up(db, number, index)
        if not np.array_equal(np.sort(index.ids()), ids):
            log.warning("The index %s is of another gallery and is built anew.", self.path)
            return None
        return index

    def _with_store(self, work: Callable[[Store], None]) -> None:
        try:
            with Store(self._store.path) as store:
                work(store)
        except (GalleryError, OSError) as error:
            log.warning("The index %s is not built or saved yet: %s", self.path, error)
        finally:
            self._saved_at = time.monotonic()

    def _build(self, store: Store) -> None:
        """Make a new index of what is in the database, a chunk at a time, and let it serve."""
        with store.read() as db:
            row = db.execute(
                "SELECT id, dimension FROM embedding WHERE name = ?", (self._embedding,)
            ).fetchone()
            if row is None:
                return
            number, dimension = row
            (removal,) = db.execute("SELECT ifnull(max(number), 0) FROM removal").fetchone()
            ids = rows.prototype_ids(db, number)
            if len(ids) * dimension > indexes.EXACT_NUMBERS:
                chosen = ids[indexes.spread(len(ids), indexes.sample_size(len(ids)))]
                sample = rows.prototypes_by_id(db, chosen, dimension)
        if len(ids) * dimension > indexes.EXACT_NUMBERS:
            index = VectorIndex.trained(sample, len(ids))
        else:
            index = VectorIndex(dimension)
        index.upto = (0, removal)
        while not self._closed.is_set():
            with store.read() as db:
                found = rows.prototypes_after(db, number, index.upto[0], dimension)
            if not found:
                break
            index.add(*found)
            index.upto = (int(found[0][-1]), removal)
        # What was in the sample may have been removed since, and then never came into a list.
        index.centre_anew()
        with self._lock:
            if self._closed.is_set() or self._number != number:
                return
            self._index, self._changed = index, True
        if index.approximate:
            self._save(store)

    def _save(self, store: Store) -> None:
        with store.write() as db:
            with self._lock:
                index = self._follow(db)
                if index is None or not index.approximate:
                    return
                data = index.to_bytes(self._key)
                self._changed = False
            # Nobody else saves while the database is locked: what lies there a crash left.
            for left in self.path.parent.glob(f".{self.path.name}.*"):
                left.unlink(missing_ok=True)
            write_atomically(self.path, data)


def unlink_kept(folder: Path, embedding: bytes | None = None) -> None:
    """Delete the kept index of `embedding`, or of all, and what an interrupted writing of one left."""
    name = "*" if embedding is None else embedding.hex()
    found = [path for pattern in (f"{name}{SUFFIX}", f".{name}{SUFFIX}.*") for path in folder.glob(pattern)]
    for path in found:
        path.unlink(missing_ok=True)
    if found:
        sync_folder(folder)


def kept(folder: Path) -> list[bytes]:
    """Return the embeddings of which an index is kept in `folder`."""
    names = []
    for path in folder.glob(f"*{SUFFIX}"):
        with suppress(ValueError):
            names.append(bytes.fromhex(path.name.removesuffix(SUFFIX)))
    return [name for name in names if len(name) == 32]
