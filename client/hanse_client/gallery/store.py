"""The gallery's database: one SQLite file, its tables, its transactions, and what its errors mean.

    with Store(folder / "gallery.sqlite") as store:
        with store.write() as db:
            db.execute("UPDATE terms SET revision = revision + 1")

Photos lie in the database too, as blobs: a product, its photos and their vectors then come and go in one
transaction, and a crash leaves no file without a row and no row without a file. Photos of some tens of kilobytes are
read from SQLite no slower than from files [1].

A photo has a *vector* in each embedding, and a product a *prototype*: the mean of its photos' vectors, scaled to length
one (`rows.refresh_prototypes`). It is written in the transaction that changes what it is the mean of.

*What changed* is numbered, so that whoever keeps something in memory can follow, in this process or another: a
prototype has a number that grows and is never changed but replaced, each removal is noted by number in `removal`, and a
product carries the revision at which it was last written.

*Removal removes.* SQLite overwrites what is deleted with zeros (`secure_delete`) [2], and `scrub` empties the journal,
which else keeps old pages. That is not enough: when a table's page is split or merged, rows move, and copies stay
behind in space that no row uses. So photos, vectors, and a product's words are blobs that begin with `PAD` zeros: what
comes after these never lies in a table's page, but in overflow pages, which are never moved, and zeroed when freed.
What is searched by equality is in an index only as a salted hash. A SKU, a price and a currency may stay behind in
unused space. What the file system or a drive keeps of overwritten blocks is beyond any program.

Durable when a transaction returns (`synchronous = FULL`). Who reads waits for no one who writes: there is a connection
for each, and readers see the state before a write until it is committed.

[1] sqlite.org/fasterthanfs.html
[2] sqlite.org/pragma.html#pragma_secure_delete
[3] sqlite.org/fileformat2.html, section 1.6: X = U − 35
[4] sqlite.org/c3ref/wal_checkpoint_v2.html
"""

import hashlib
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from hanse_common.errors import GalleryError

APPLICATION_ID = 0x48616E47
"""Marks a SQLite file as a gallery: the letters HanG."""

SCHEMA_VERSION = 2
"""Version of the tables, kept in the file's `user_version`."""

LOCK_SECONDS = 30.0
"""How long a transaction waits for another process's, in seconds."""

PAGE_BYTES = 512
"""Size of the database's pages."""

PAD = PAGE_BYTES - 35
"""Zeros before the content of a blob: the most of a row that lies in a page of its table [3]. All else overflows."""

_SCHEMA = (
    """CREATE TABLE terms (only INTEGER PRIMARY KEY CHECK (only = 1), revision INTEGER NOT NULL,
    salt BLOB NOT NULL) STRICT""",
    """CREATE TABLE product (id INTEGER PRIMARY KEY AUTOINCREMENT, sku TEXT NOT NULL UNIQUE, revision INTEGER NOT NULL,
    price INTEGER, currency TEXT, words BLOB NOT NULL) STRICT""",
    "CREATE INDEX product_revision ON product (revision)",
    "CREATE INDEX product_price ON product (price)",
    """CREATE TABLE tag (token INTEGER NOT NULL, product INTEGER NOT NULL REFERENCES product ON DELETE CASCADE,
    category INTEGER NOT NULL, PRIMARY KEY (token, product)) STRICT, WITHOUT ROWID""",
    "CREATE INDEX tag_product ON tag (product)",
    "CREATE TABLE photo (id INTEGER PRIMARY KEY AUTOINCREMENT, digest BLOB NOT NULL UNIQUE, jpeg BLOB NOT NULL) STRICT",
    """CREATE TABLE view (id INTEGER PRIMARY KEY AUTOINCREMENT,
    product INTEGER NOT NULL REFERENCES product ON DELETE CASCADE, photo INTEGER NOT NULL REFERENCES photo,
    UNIQUE (product, photo)) STRICT""",
    "CREATE INDEX view_photo ON view (photo)",
    """CREATE TABLE embedding (id INTEGER PRIMARY KEY AUTOINCREMENT, name BLOB NOT NULL UNIQUE,
    dimension INTEGER NOT NULL) STRICT""",
    """CREATE TABLE vector (id INTEGER PRIMARY KEY AUTOINCREMENT, embedding INTEGER NOT NULL REFERENCES embedding,
    photo INTEGER NOT NULL REFERENCES photo ON DELETE CASCADE, data BLOB NOT NULL, UNIQUE (photo, embedding)) STRICT""",
    "CREATE INDEX vector_embedding ON vector (embedding)",
    """CREATE TABLE prototype (id INTEGER PRIMARY KEY AUTOINCREMENT, embedding INTEGER NOT NULL REFERENCES embedding,
    product INTEGER NOT NULL REFERENCES product ON DELETE CASCADE, data BLOB NOT NULL,
    UNIQUE (product, embedding)) STRICT""",
    "CREATE INDEX prototype_embedding ON prototype (embedding)",
    "CREATE TABLE removal (number INTEGER PRIMARY KEY AUTOINCREMENT, product INTEGER, prototype INTEGER) STRICT",
    """CREATE TABLE rejection (embedding BLOB PRIMARY KEY, threshold REAL NOT NULL, false_accept REAL,
    genuine INTEGER NOT NULL, impostor INTEGER NOT NULL, false_reject REAL, most_false_accept REAL NOT NULL,
    most_false_reject REAL NOT NULL, photos INTEGER NOT NULL, newest INTEGER NOT NULL) STRICT, WITHOUT ROWID""",
)

_CARE = "Stop what uses it, move the folder away, and import the products again; a copy from a backup will do as well."


class Store:
    """The database in the file `path` (mode 0600), made when missing. Safe to share between threads.

    Raises `GalleryError` when it is damaged, locked, of another version, or cannot be written; so do all transactions.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reading, self._writing = threading.RLock(), threading.RLock()
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.touch(mode=0o600)
        except OSError as error:
            raise GalleryError(f"{path}: cannot be made ({error.strerror}); check the folder.") from None
        self._reader, self._writer = self._connected(), self._connected()
        try:
            with self._in_words():
                self._open()
        except GalleryError:
            self._reader.close()
            self._writer.close()
            raise

    def _connected(self) -> sqlite3.Connection:
        return sqlite3.connect(self.path, timeout=LOCK_SECONDS, isolation_level=None, check_same_thread=False)

    def _open(self) -> None:
        database = self._writer
        for setting in (
            "synchronous = FULL",
            "secure_delete = ON",
            "foreign_keys = ON",
            "temp_store = MEMORY",
        ):
            database.execute(f"PRAGMA {setting}")
        database.execute(f"PRAGMA page_size = {PAGE_BYTES}")  # of a database that is made now
        if database.execute("PRAGMA journal_mode = WAL").fetchone() != ("wal",):
            raise GalleryError(f"{self.path}: cannot keep a journal beside it; put it on a local disk.")
        if self._kind() == (0, 0, 0):
            with self.write():
                if self._kind() == (0, 0, 0):  # nobody else made it meanwhile
                    for statement in _SCHEMA:
                        database.execute(statement)
                    database.execute("INSERT INTO terms VALUES (1, 0, ?)", (secrets.token_bytes(16),))
                    database.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                    database.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        with self._transaction(database, "BEGIN"):  # who opens it waits for no one who writes
            kind, version, _ = self._kind()
            if kind != APPLICATION_ID:
                raise GalleryError(
                    f"{self.path}: found another program's database, expected a gallery. {_CARE}"
                )
            if version != SCHEMA_VERSION:
                raise GalleryError(
                    f"{self.path}: found a gallery of version {version}, expected {SCHEMA_VERSION}; use the release of "
                    "hanse-client that made it, or move the folder away and import the products again."
                )
            schema = database.execute(
                "SELECT sql FROM sqlite_schema WHERE sql IS NOT NULL AND name <> 'sqlite_sequence'"
            )
            if {sql for (sql,) in schema} != set(_SCHEMA):
                raise damaged("its tables are not as they were made")
            (self._salt,) = database.execute("SELECT salt FROM terms").fetchone()
        # A crash may have left the journal full of what is removed; whoever reads it now empties it sooner or later.
        self._checkpoint()
        self._reader.execute("PRAGMA temp_store = MEMORY")
        self._reader.execute("PRAGMA query_only = ON")
        for each in (self._reader, self._writer):
            each.create_function("token", 2, self._token, deterministic=True)

    def _kind(self) -> tuple[int, int, int]:
        """Return whose database it is, its version, and how many tables and indexes it has."""
        with self._transaction(self._writer, "BEGIN") as database:
            (kind,) = database.execute("PRAGMA application_id").fetchone()
            (version,) = database.execute("PRAGMA user_version").fetchone()
            (tables,) = database.execute("SELECT count(*) FROM sqlite_schema").fetchone()
        return kind, version, tables

    def _token(self, name: str, value: str) -> int:
        """Return a number that stands for a name with a value, in this gallery; an empty name is the category."""
        text = f"{len(name)} {name}{value}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8, key=self._salt).digest(), signed=True)

    def key(self, purpose: bytes) -> bytes:
        """Return 32 secret bytes for a `purpose`, the same for as long as the gallery lives, and others elsewhere."""
        return hashlib.blake2b(purpose, digest_size=32, key=self._salt, person=b"hanse gallery").digest()

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """Yield the database at one moment: nothing changes in it meanwhile. May be nested in another of its thread."""
        with self._reading, self._transaction(self._reader, "BEGIN") as database:
            yield database

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """Yield the database for changes that come about together, durably, at the end; or not at all, on an error."""
        with self._writing, self._transaction(self._writer, "BEGIN IMMEDIATE") as database:
            yield database

    @contextmanager
    def _transaction(self, database: sqlite3.Connection, begin: str) -> Iterator[sqlite3.Connection]:
        with self._in_words():
            if database.in_transaction:
                yield database
                return
            database.execute(begin)
            try:
                yield database
                database.execute("COMMIT")
            finally:
                if database.in_transaction:
                    database.execute("ROLLBACK")

    @contextmanager
    def _in_words(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise GalleryError(f"{self.path}: {_in_words(error)}") from None

    def scrub(self) -> None:
        """Empty the journal, so that the file holds just what is in the tables. Who reads just then goes on.

        Raises `GalleryError` when somebody reads an older state for longer than `LOCK_SECONDS`.
        """
        until = time.monotonic() + LOCK_SECONDS
        while self._journal_is_in_use():
            # SQLite would wait for readers, but not for somebody else's checkpoint [4].
            if time.monotonic() > until:
                raise self._still_read()
            time.sleep(0.005)

    def _journal_is_in_use(self) -> bool:
        """Try to empty the journal, without waiting; return whether somebody hindered it."""
        with self._writing, self._in_words():
            return self._checkpoint()

    def _checkpoint(self) -> bool:
        database = self._writer
        database.execute("PRAGMA busy_timeout = 0")  # others of this process would wait, too
        try:
            busy, _, _ = database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        finally:
            database.execute(f"PRAGMA busy_timeout = {round(1000 * LOCK_SECONDS)}")
        return bool(busy)

    def _still_read(self) -> GalleryError:
        return GalleryError(
            f"{self.path}: what was removed is not found any more, but somebody still reads the journal that holds its "
            "old pages, another process or a long search. Let it end and remove the same once more, which then empties "
            "the journal."
        )

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
        """Close the database."""
        with self._reading, self._writing:
            self._reader.close()
            self._writer.close()


def damaged(what: str) -> GalleryError:
    """Return the error that says that the gallery is not as it was written, and what to do."""
    return GalleryError(f"The gallery is damaged: {what}. {_CARE}")


def sync_folder(folder: Path) -> None:
    """Make names in `folder` that came or went durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _in_words(error: sqlite3.Error) -> str:
    """Say what happened to the file and what to do, for the merchant's eyes."""
    name = getattr(error, "sqlite_errorname", "")
    texts = {
        "SQLITE_BUSY": "another process is writing to the gallery and did not finish; try again, or stop it.",
        "SQLITE_FULL": "the disk is full; make room, then try again. Nothing was changed.",
        "SQLITE_IOERR_SHMSIZE": "the disk is full; make room, then try again. Nothing was changed.",
        "SQLITE_NOTADB": f"this is no SQLite database, expected a gallery. {_CARE}",
        "SQLITE_CORRUPT": f"the gallery is damaged ({error}). {_CARE}",
        "SQLITE_CANTOPEN": f"the gallery cannot be opened ({error}); check that it and its folder are there.",
        "SQLITE_READONLY": "the gallery is read-only; give the user who runs hanse-client the right to write.",
        "SQLITE_ERROR": f"the gallery is damaged, or was changed by another program ({error}). {_CARE}",
    }
    for start, text in texts.items():
        if name.startswith(start):
            return text
    return f"the gallery cannot be read or written ({error}, {name}); check the disk."
