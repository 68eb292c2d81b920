"""What is known of photo files that have not changed since: their content's digest, or why they can't be used.

    with PhotoIndex(folder / "photos.sqlite") as index:
        catalog = Catalog.load(source, labels, holdout_key=key, holdout_fraction=0.1, index=index)

Reading and hashing every photo of a large shop takes minutes, asking for their sizes and times a second. An entry
holds while path, size, inode and the times of the last change (of the content, and of anything) are the same, and the
rules by which photos are judged. Times have grains: a file changed again within one looks unchanged. So a file that
changed within `FRESH` before it was read gets no entry yet, and is read again the next time ("racy git"). A wrong entry
would do no harm to privacy: a record checks its digest when it is opened.

The index holds only what can be found out again: a damaged one is thrown away. It tells of photos, so nobody else may
read the file.
"""

import hashlib
import logging
import math
import os
import sqlite3
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self, TypeVar

from PIL import __version__ as pillow_version

from hanse_common.errors import CatalogError, PhotoError, PhotoTooLarge
from hanse_common.vision import photo
from hanse_common.vision.photo import PhotoLimits

log = logging.getLogger(__name__)

FRESH = 3_000_000_000
"""Nanoseconds within which a file may change twice and keep its times. FAT counts in steps of two seconds."""

PENDING = 500
"""Entries written at once: what an interruption may lose."""

_DAMAGE = {sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
"""What SQLite reports of a file with other tables, with damaged pages, or of another kind."""

T = TypeVar("T")


class DisposableDatabase:
    """A SQLite file (mode 0600) of what can be found out again, made when missing, with its folder.

    A damaged file is made anew, whenever that is noticed. All methods raise `CatalogError` when the file can't
    be used at all: no permission, no space, another process that does not finish.
    """

    name: ClassVar[str]
    schema: ClassVar[tuple[str, ...]]

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._open()
        except OSError as error:
            raise CatalogError(
                f"{path}: cannot make the {self.name} ({error.strerror}); check the folder `state`."
            ) from None
        except sqlite3.DatabaseError as error:
            self._make_anew(error)

    def _open(self) -> None:
        self._path.touch(mode=0o600)
        self._path.chmod(0o600)
        self._database = sqlite3.connect(self._path, timeout=30, isolation_level=None)
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute("PRAGMA synchronous = NORMAL")
        for statement in self.schema:
            self._database.execute(statement)

    def _make_anew(self, error: sqlite3.DatabaseError) -> None:
        """Replace a damaged file by an empty one. Raises `CatalogError` when `error` is no damage."""
        if getattr(error, "sqlite_errorcode", 0) & 0xFF not in _DAMAGE:
            raise CatalogError(
                f"{self._path}: cannot use the {self.name} ({error}); check the folder and the disk."
            ) from None
        log.warning("The %s %s was damaged and is made anew.", self.name, self._path)
        self._database.close()
        for suffix in ("", "-wal", "-shm"):
            self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)
        self._open()

    def _run(self, action: Callable[[sqlite3.Connection], T]) -> T:
        """Return what `action` returns, on a new file when this one is damaged."""
        try:
            return action(self._database)
        except sqlite3.DatabaseError as error:
            self._make_anew(error)
        return action(self._database)

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
        """Close the file."""
        self._database.close()


class PhotoIndex(DisposableDatabase):
    """The index in the file `path`; see `DisposableDatabase`."""

    name = "photo index"
    schema = (
        """CREATE TABLE IF NOT EXISTS photo
        (path BLOB PRIMARY KEY, state TEXT, digest BLOB, reason TEXT, mark BLOB) WITHOUT ROWID""",
    )

    def __init__(self, path: Path) -> None:
        self._pending: list[tuple[bytes, str, bytes | None, str | None, bytes]] = []
        super().__init__(path)

    def digest(self, path: Path, limits: PhotoLimits) -> bytes:
        """Return the SHA-256 of the photo file at `path`, 32 bytes, after a look at its header.

        A file whose entry holds is not opened. Raises `PhotoError` when the photo can't be used.
        """
        state = _State.of(path, limits)
        name = os.fsencode(path)
        row = self._run(
            lambda database: database.execute("SELECT * FROM photo WHERE path = ?", (name,)).fetchone()
        )
        if row is not None and row[1] == state.text and row[4] == _mark(*row[:4]):
            if row[3] is not None:
                raise PhotoError(row[3])
            known: bytes = row[2]
            return known
        began, read = time.time_ns(), False
        try:
            data = photo.read(path, limits)
            read = True
            photo.check(data, limits, path)
        except PhotoError as error:
            # Other failures are the path's or the disk's, and may be over the next time.
            if read or isinstance(error, PhotoTooLarge):
                self._note(name, state, began, (None, str(error)))
            raise
        digest = photo.content_digest(data)
        self._note(name, state, began, (digest, None))
        return digest

    def keep(self, paths: Iterable[Path]) -> None:
        """Forget all files but `paths`."""
        rows = [(os.fsencode(path),) for path in paths]
        self._write()

        def delete(database: sqlite3.Connection) -> None:
            database.execute("CREATE TEMP TABLE IF NOT EXISTS kept (path BLOB PRIMARY KEY)")
            database.execute("BEGIN IMMEDIATE")
            with database:
                database.execute("DELETE FROM kept")
                database.executemany("INSERT OR IGNORE INTO kept VALUES (?)", rows)
                database.execute("DELETE FROM photo WHERE path NOT IN (SELECT path FROM kept)")

        self._run(delete)

    def _note(self, name: bytes, state: "_State", began: int, found: tuple[bytes | None, str | None]) -> None:
        """Keep what a look at the file that began at `began` found, if the file was at rest then."""
        if state.changed + FRESH < began:
            entry = (name, state.text, *found)
            self._pending.append((*entry, _mark(*entry)))
        if len(self._pending) >= PENDING:
            self._write()

    def _write(self) -> None:
        rows, self._pending = self._pending, []

        def write(database: sqlite3.Connection) -> None:
            database.execute("BEGIN IMMEDIATE")
            with database:
                database.executemany("INSERT OR REPLACE INTO photo VALUES (?, ?, ?, ?, ?)", rows)

        if rows:
            self._run(write)

    def close(self) -> None:
        """Write what is new and close the file."""
        try:
            self._write()
        finally:
            super().close()


def _mark(*entry: object) -> bytes:
    """Return what tells an entry from one that a failing disk altered."""
    return hashlib.sha256(repr(entry).encode("utf-8", "surrogatepass")).digest()


@dataclass(frozen=True, slots=True)
class _State:
    """`text` is what must be the same for an entry to hold; `changed`, in ns since 1970, when the file last changed."""

    text: str
    changed: float

    @classmethod
    def of(cls, path: Path, limits: PhotoLimits) -> Self:
        """Return the state of a file; of none, one that gets no entry."""
        try:
            found = path.stat()
        except (OSError, ValueError):
            return cls("", math.inf)
        numbers = (found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_dev, found.st_ino)
        return cls(f"{numbers} {limits} {pillow_version}", max(found.st_mtime_ns, found.st_ctime_ns))
