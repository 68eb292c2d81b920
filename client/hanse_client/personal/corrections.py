"""The owner's own labels: what a photo shows, where the recognizer was wrong or not fine enough.

    with Corrections(config.corrections_path) as corrections:
        made = corrections.add(Gallery.prepare(image), label="Herrenhemd, kariert")
        corrections.labels()                     # {"Herrenhemd, kariert": 1}
        corrections.remove(made.photo)           # the photo, and all that was said of it, are gone

A photo may be corrected again: what was said last holds, and `undo` takes the last word back. A label is free text, and
may be finer than the league's classes; labels that differ in case alone are one, in the spelling that was there first.

One SQLite file (mode 0600). A correction is on the disk when `add` returns: a rollback journal, synced, and its folder
too. In a write-ahead log what was removed would lie about until the next checkpoint, so there is none, and what SQLite
frees is overwritten with zeros. Nobody else reads the file, and nothing of it is ever sent.
"""

import hashlib
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Annotated, Final, Self

from pydantic import AfterValidator, AwareDatetime, Field, StringConstraints, TypeAdapter, ValidationError

from hanse_client.gallery.product import MAX_SKU, Sku
from hanse_client.gallery.spelling import composed, printable
from hanse_common.errors import CatalogError, PhotoTooLarge
from hanse_common.vision import photo as photos
from hanse_common.vision.photo import PhotoLimits
from hanse_common.vision.taxonomy import folded
from hanse_common.wire import Bytes32, Value

MAX_CORRECTIONS: Final = 100_000
"""Bound of all that is kept; each is a word on a photo."""

MAX_LABEL: Final = 128
"""Bound of a label, in characters."""

LIMITS: Final = PhotoLimits(max_bytes=2 << 20, max_pixels=1 << 20, formats=("JPEG",))
"""Bounds of a photo as it is kept: a gallery's prepared photos are far below them."""

APPLICATION_ID: Final = 0x48616E63
"""Marks the SQLite file as ours ("Hanc")."""

SCHEMA_VERSION: Final = 1

_SCHEMA = (
    "CREATE TABLE photo (digest BLOB PRIMARY KEY, jpeg BLOB NOT NULL) STRICT, WITHOUT ROWID",
    """CREATE TABLE correction (number INTEGER PRIMARY KEY AUTOINCREMENT, digest BLOB NOT NULL REFERENCES photo,
    label TEXT, sku TEXT, time TEXT NOT NULL, CHECK ((label IS NULL) <> (sku IS NULL))) STRICT""",
    "CREATE INDEX by_photo ON correction (digest, number)",
)


def normalised(text: str) -> str:
    """Return `text` in composed form (`hanse_client.gallery.spelling`), with one space for each run of white space."""
    return " ".join(composed(text, MAX_LABEL).split())


Label = Annotated[
    str,
    AfterValidator(normalised),
    StringConstraints(min_length=1, max_length=MAX_LABEL),
    AfterValidator(printable),
]

_LABEL: TypeAdapter[str] = TypeAdapter(Label)
_SKU: TypeAdapter[str] = TypeAdapter(Sku)


class Correction(Value):
    """What the owner said: the photo of SHA-256 `photo` shows `label`, or the product `sku`; one of the two is None.

    `number` grows with each correction and is never used again.
    """

    number: Annotated[int, Field(ge=1)]
    photo: Bytes32
    label: str | None
    sku: str | None
    time: AwareDatetime


class Corrections:
    """The corrections in the file `path`, made when missing, with its folder. Threads and processes may share it.

    Raises `CatalogError` when the file is damaged, locked, or another program's. All methods may raise it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.touch(mode=0o600)
            path.chmod(0o600)
        except OSError as error:
            raise CatalogError(
                f"{path}: cannot be made ({error.strerror}); check the folder `state`."
            ) from None
        self._database = sqlite3.connect(path, timeout=30.0, isolation_level=None, check_same_thread=False)
        try:
            with self._transaction(begin=False) as db:
                db.execute("PRAGMA journal_mode = DELETE")
                db.execute("PRAGMA synchronous = EXTRA")
                db.execute("PRAGMA fullfsync = ON")
                db.execute("PRAGMA secure_delete = ON")
                db.execute("PRAGMA foreign_keys = ON")
            with self._transaction() as db:
                self._prepare(db)
        except CatalogError:
            self._database.close()
            raise

    def _prepare(self, db: sqlite3.Connection) -> None:
        (application,) = db.execute("PRAGMA application_id").fetchone()
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if application == 0 and not db.execute("SELECT 1 FROM sqlite_schema").fetchone():
            for statement in _SCHEMA:
                db.execute(statement)
            db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        elif application != APPLICATION_ID:
            raise CatalogError(f"{self._path}: found another program's file; move it away.")
        elif version != SCHEMA_VERSION:
            raise CatalogError(
                f"{self._path}: found corrections of another release (version {version}), expected {SCHEMA_VERSION}. "
                "Use the release that made them."
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._database.close()

    def add(self, photo: bytes, *, label: str | None = None, sku: str | None = None) -> Correction:
        """Write down, durably, that `photo`, a prepared JPEG, shows `label` or the product `sku`, and return it.

        Said again of the same photo, nothing is added. Raises `CatalogError` unless one of the two is given, of 1 to
        `MAX_LABEL` and to 64 printable characters, and when `MAX_CORRECTIONS` are kept already; `PhotoError` when
        `photo` is no JPEG within `LIMITS`.
        """
        if (label is None) == (sku is None):
            raise CatalogError("A correction says what a photo shows: expected either a label or a SKU.")
        said = None if label is None else _checked("label", _LABEL, label)
        product = None if sku is None else _checked("SKU", _SKU, sku)
        if len(photo) > LIMITS.max_bytes:
            raise PhotoTooLarge(
                f"Photo of a correction: found {len(photo)} bytes, expected at most {LIMITS.max_bytes}: it is kept in "
                "its prepared form."
            )
        photos.check(photo, LIMITS)
        digest = hashlib.sha256(photo).digest()
        with self._transaction() as db:
            if said is not None:
                known = {
                    folded(text): text
                    for (text,) in db.execute(
                        "SELECT label FROM correction WHERE label IS NOT NULL GROUP BY label ORDER BY min(number) DESC"
                    )
                }
                said = known.get(folded(said), said)
            last = self._last(db, digest)
            if last is not None and (last.label, last.sku) == (said, product):
                return last
            (count,) = db.execute("SELECT count(*) FROM correction").fetchone()
            if count >= MAX_CORRECTIONS:
                raise CatalogError(
                    f"{self._path}: found {count} corrections, the most that are kept; remove some first."
                )
            db.execute("INSERT OR IGNORE INTO photo VALUES (?, ?)", (digest, photo))
            time = datetime.now(UTC).isoformat()
            db.execute(
                "INSERT INTO correction (digest, label, sku, time) VALUES (?, ?, ?, ?)",
                (digest, said, product, time),
            )
            made = self._last(db, digest)
        if made is None:
            raise self._damaged("a correction vanished")
        return made

    def undo(self) -> Correction | None:
        """Take the last correction back, and return it; None when there is none. What was said before holds again."""
        with self._transaction() as db:
            row = db.execute(f"{_SELECT} ORDER BY number DESC LIMIT 1").fetchone()
            if row is None:
                return None
            gone = self._correction(row)
            db.execute("DELETE FROM correction WHERE number = ?", (gone.number,))
            db.execute("DELETE FROM photo WHERE digest NOT IN (SELECT digest FROM correction)")
        return gone

    def remove(self, photo: bytes) -> bool:
        """Remove the photo of SHA-256 `photo` and all that was said of it; return whether it was there."""
        with self._transaction() as db:
            db.execute("DELETE FROM correction WHERE digest = ?", (photo,))
            return db.execute("DELETE FROM photo WHERE digest = ?", (photo,)).rowcount > 0

    def forget(self, sku: str) -> int:
        """Remove the photos that, by the last word, show the product `sku`, and all that was said of them.

        Return how many there were.
        """
        product = composed(sku, MAX_SKU)
        if not product.isprintable():
            return 0  # as no SKU is: nor could SQLite be asked for half a letter
        with self._transaction() as db:
            found = db.execute(
                "SELECT digest FROM correction AS last WHERE sku = ? AND number = "
                "(SELECT max(number) FROM correction WHERE digest = last.digest)",
                (product,),
            ).fetchall()
            db.executemany("DELETE FROM correction WHERE digest = ?", found)
            db.executemany("DELETE FROM photo WHERE digest = ?", found)
            return len(found)

    def clear(self) -> int:
        """Remove everything, and return how many photos there were."""
        with self._transaction() as db:
            db.execute("DELETE FROM correction")
            return db.execute("DELETE FROM photo").rowcount

    def list(self, after: int = 0, limit: int = 1000) -> "list[Correction]":
        """Return what holds, one correction a photo, in the order of `number`, from the first after `after` on."""
        with self._transaction() as db:
            rows = db.execute(
                "SELECT max(number), digest, label, sku, time FROM correction GROUP BY digest "
                "HAVING max(number) > ? ORDER BY max(number) LIMIT ?",
                (after, limit),
            ).fetchall()
            return [self._correction(row) for row in rows]

    def of(self, photo: bytes) -> Correction | None:
        """Return what holds of the photo of SHA-256 `photo`, None when nothing was said."""
        with self._transaction() as db:
            return self._last(db, photo)

    def photo(self, digest: bytes) -> bytes | None:
        """Return the JPEG of that SHA-256, None when it is not here."""
        with self._transaction() as db:
            row = db.execute("SELECT jpeg FROM photo WHERE digest = ?", (digest,)).fetchone()
        if row is not None and hashlib.sha256(row[0]).digest() != digest:
            raise self._damaged("a photo is not the one that was kept")
        return None if row is None else bytes(row[0])

    def count(self) -> int:
        """Return how many photos have a correction."""
        with self._transaction() as db:
            return int(db.execute("SELECT count(*) FROM photo").fetchone()[0])

    def labels(self) -> dict[str, int]:
        """Return the labels that hold, and of how many photos each, the most frequent first."""
        with self._transaction() as db:
            return dict(
                db.execute(
                    "SELECT label, count(*) FROM correction WHERE label IS NOT NULL AND number IN "
                    "(SELECT max(number) FROM correction GROUP BY digest) GROUP BY label ORDER BY count(*) DESC, label"
                )
            )

    def _last(self, db: sqlite3.Connection, digest: bytes) -> Correction | None:
        row = db.execute(f"{_SELECT} WHERE digest = ? ORDER BY number DESC LIMIT 1", (digest,)).fetchone()
        return None if row is None else self._correction(row)

    def _correction(self, row: tuple[int, bytes, str | None, str | None, str]) -> Correction:
        number, digest, label, sku, time = row
        try:
            return Correction(
                number=number, photo=digest, label=label, sku=sku, time=datetime.fromisoformat(time)
            )
        except ValueError:
            raise self._damaged(f"correction {number} is none") from None

    @contextmanager
    def _transaction(self, *, begin: bool = True) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                if begin:
                    self._database.execute("BEGIN IMMEDIATE")
                yield self._database
                if begin:
                    self._database.execute("COMMIT")
            except BaseException as error:
                if self._still_open():
                    self._database.execute("ROLLBACK")
                if not isinstance(error, sqlite3.Error):
                    raise
                name = getattr(error, "sqlite_errorname", "")
                if name.startswith(("SQLITE_FULL", "SQLITE_IOERR", "SQLITE_READONLY")):
                    reason = f"cannot be written ({error}); free some space on the disk and try again"
                elif name.startswith("SQLITE_BUSY"):
                    reason = "locked by another process that did not finish; try again, or stop it"
                else:
                    raise self._damaged(str(error)) from None
                raise CatalogError(f"{self._path}: {reason}.") from None

    def _still_open(self) -> bool:
        try:
            return self._database.in_transaction
        except sqlite3.ProgrammingError:  # closed meanwhile
            return False

    def _damaged(self, what: str) -> CatalogError:
        return CatalogError(
            f"{self._path}: cannot be used ({what}); put a backup of it back, or move it away and begin anew."
        )


_SELECT = "SELECT number, digest, label, sku, time FROM correction"


def _checked(name: str, kind: TypeAdapter[str], text: str) -> str:
    try:
        return kind.validate_python(text, strict=True)
    except ValidationError as error:
        fault = error.errors(include_input=False, include_url=False)[0]["msg"]
        raise CatalogError(f"A correction's {name}: {fault}. Say it in a few words, in one line.") from None
