"""What must outlive a crash so that nothing is answered twice: marks on the merchant's disk, synced before answers.

    markers = Markers(Path("markers.sqlite"))
    markers.begin(plan_digest, attempt)          # before this merchant joins; raises when it is not the next one
    markers.see_directory(directory, charters)   # raises when an earlier one comes back, or has strangers
    markers.remember(counters)                   # other merchants' ledgers

Secrets of a set-up are never on disk: a merchant that crashed can answer nothing of it, and joins none a second time.
That a round's photos are used once is in the ledger itself. One SQLite file, WAL, synchronous=FULL; a seal, the SHA-256
of all marks, finds what a damaged disk made of them.
"""

import hashlib
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Any

import msgpack

from hanse_common import wire
from hanse_common.charter import Charter
from hanse_common.directory import MAX_DIRECTORY_BYTES, Directory, require_admitted
from hanse_common.errors import DirectoryRefused, LedgerError
from hanse_common.secagg.witness import Witness

APPLICATION_ID = 0x48616E6D
"""Marks the SQLite file as ours ("Hanm")."""

SCHEMA_VERSION = 3

_SCHEMA = (
    "CREATE TABLE mark (kind TEXT, key BLOB, value BLOB NOT NULL, PRIMARY KEY (kind, key)) STRICT",
    "CREATE TABLE seal (digest BLOB NOT NULL) STRICT",
)


class _Kind(StrEnum):
    ATTEMPT = "attempt"
    """By plan digest: the last attempt."""
    DIRECTORY = "directory"
    """By pinned charter: the last directory."""
    GONE = "gone"
    """By identity: the pinned charter of the league that it was a member of, and left."""
    PEER = "peer"
    """By identity: the highest ledger counter and its signature."""


_Marks = dict[tuple[str, bytes], bytes]


class Begun(LedgerError):
    """This attempt, or a later one, was begun before."""


class Markers:
    """The marks in the file `path`, made (mode 0600) when missing, with its folder.

    Raises `LedgerError` when the file is damaged, locked, or another program's. All methods may raise it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.touch(mode=0o600)
            path.chmod(0o600)
        except OSError as error:
            raise LedgerError(f"{path}: cannot be made ({error.strerror}).") from None
        with self._transaction() as db:
            (application,) = db.execute("PRAGMA application_id").fetchone()
            if application == 0 and not db.execute("SELECT 1 FROM sqlite_schema").fetchone():
                for statement in _SCHEMA:
                    db.execute(statement)
                db.execute("INSERT INTO seal VALUES (?)", (_seal({}),))
                db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            elif application != APPLICATION_ID:
                raise LedgerError(f"{path}: found another program's file; move it away.")
            else:
                self._require_version(db)
        with self._marks():
            pass

    def begin(self, plan_digest: bytes, attempt: int) -> None:
        """Note that `attempt` at the plan begins. Raises `Begun` unless it is a later one than any before."""
        with self._marks() as marks:
            last = _get(marks, _Kind.ATTEMPT, plan_digest)
            if last is not None and attempt <= last:
                raise Begun(f"attempt {attempt + 1} was begun before; the last one was {last + 1}.")
            marks[_Kind.ATTEMPT, plan_digest] = msgpack.packb(attempt)

    def see_directory(self, directory: Directory, charters: Sequence[Charter]) -> None:
        """Take `directory`, which the last of the league's `charters` allows; the first is the one that is pinned.

        Raises `DirectoryRefused` for an earlier version, or another of the same, for charters that do not contain the
        one seen before, and for a member whom those seen before did not admit; `SignatureInvalid` for a forged word.
        """
        pinned = charters[0].digest
        with self._marks() as marks:
            data = _get(marks, _Kind.DIRECTORY, pinned)
            before = wire.decode(Directory, data, MAX_DIRECTORY_BYTES) if data else None
            if before == directory:
                return
            if before is not None and directory.version <= before.version:
                raise DirectoryRefused(
                    f"The league's directory: found version {directory.version}, have seen version {before.version} "
                    "before; expected a later one, or the same."
                )
            gone = {key for kind, key in marks if kind == _Kind.GONE and _get(marks, kind, key) == pinned}
            require_admitted(directory, charters, before, gone)
            left = {entry.identity for entry in before.entries} if before else set()
            for identity in left - set(directory.identities().values()):
                marks[_Kind.GONE, identity] = msgpack.packb(pinned)
            marks[_Kind.DIRECTORY, pinned] = msgpack.packb(wire.encode(directory))

    def directory(self, pinned: bytes) -> Directory | None:
        """Return the last directory that was taken, None before the first."""
        with self._marks() as marks:
            seen = _get(marks, _Kind.DIRECTORY, pinned)
        return None if seen is None else wire.decode(Directory, seen, MAX_DIRECTORY_BYTES)

    def remember(self, counters: Mapping[bytes, Witness]) -> None:
        """Remember other merchants' counters, by identity; one lower than remembered is left out."""
        with self._marks() as marks:
            for identity, found in counters.items():
                known = _get(marks, _Kind.PEER, identity)
                if known is None or found.counter > known[0]:
                    marks[_Kind.PEER, identity] = msgpack.packb([found.counter, found.signature])

    def witnesses(self) -> dict[bytes, Witness]:
        """Return the highest counter seen of each merchant, by identity."""
        with self._marks() as marks:
            return {key: Witness(*_get(marks, _Kind.PEER, key)) for kind, key in marks if kind == _Kind.PEER}

    @contextmanager
    def _marks(self) -> Iterator[_Marks]:
        """Yield all marks, once the seal is found whole, and write down what the body changed of them."""
        with self._transaction() as db:
            self._require_version(db)
            found = {
                (kind, key): value for kind, key, value in db.execute("SELECT kind, key, value FROM mark")
            }
            if db.execute("SELECT digest FROM seal").fetchall() != [(_seal(found),)]:
                raise self._damaged("its marks are not those that were written")
            marks = dict(found)
            yield marks
            changed = [(*key, value) for key, value in marks.items() if found.get(key) != value]
            if changed:
                db.executemany("INSERT OR REPLACE INTO mark VALUES (?, ?, ?)", changed)
                db.execute("UPDATE seal SET digest = ?", (_seal(marks),))

    def _require_version(self, db: sqlite3.Connection) -> None:
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version != SCHEMA_VERSION:
            raise LedgerError(
                f"{self._path}: found marks of another release (version {version}), expected {SCHEMA_VERSION}. "
                "Use the release that made them, or move the file away while no training runs."
            )

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        try:
            with closing(sqlite3.connect(self._path, timeout=10.0, isolation_level=None)) as db:
                db.execute("PRAGMA journal_mode = WAL")
                db.execute("PRAGMA synchronous = FULL")
                db.execute("PRAGMA fullfsync = ON")
                db.execute("BEGIN IMMEDIATE")
                yield db
                db.execute("COMMIT")
        except sqlite3.Error as error:
            name = getattr(error, "sqlite_errorname", "")
            if name.startswith(("SQLITE_FULL", "SQLITE_IOERR")):
                raise LedgerError(
                    f"{self._path}: cannot be written ({error}); free some space on the disk and try again."
                ) from None
            if name.startswith("SQLITE_BUSY"):
                raise LedgerError(
                    f"{self._path}: locked by another process that did not finish; try again, or stop it."
                ) from None
            raise self._damaged(str(error)) from None
        except UnicodeDecodeError:  # Python's, for SQLite's message about a damaged name
            raise self._damaged("a name in it is no text") from None

    def _damaged(self, what: str) -> LedgerError:
        return LedgerError(
            f"{self._path}: cannot be used ({what}); move it away while no training runs. Then it is made anew, and "
            "other members' counters and the directory's version are learned again."
        )


def _get(marks: Mapping[tuple[str, bytes], bytes], kind: str, key: bytes) -> Any:
    """Return what the mark says, None when there is none. Its bytes are ours: the seal was whole."""
    value = marks.get((kind, key))
    return None if value is None else msgpack.unpackb(value)


def _seal(marks: Mapping[tuple[str, bytes], bytes]) -> bytes:
    """Return the SHA-256 of all marks, in order, 32 bytes."""
    return hashlib.sha256(msgpack.packb([(*key, marks[key]) for key in sorted(marks)])).digest()
