"""What must outlive a crash so that nothing is answered twice: marks on the merchant's disk, synced before answers.

    markers = Markers(Path("markers.sqlite"))
    markers.begin(plan_digest, attempt)          # before this merchant joins; raises when it is not the next one
    markers.see_directory(league_key, directory) # raises when an earlier version comes back
    markers.remember(counters)                   # other merchants' ledgers

Secrets of a set-up are never on disk: a merchant that crashed can answer nothing of it, and joins none a second time.
That a round's photos are used once is in the ledger itself. One SQLite file, WAL, synchronous=FULL.
"""

import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path

from hanse_common.directory import Directory
from hanse_common.errors import DirectoryRefused, LedgerError
from hanse_common.secagg.witness import Witness

APPLICATION_ID = 0x48616E6D
"""Marks the SQLite file as ours ("Hanm")."""

_SCHEMA = (
    "CREATE TABLE attempt (plan_digest BLOB PRIMARY KEY, attempt INTEGER NOT NULL) STRICT",
    "CREATE TABLE directory (league_key BLOB PRIMARY KEY, version INTEGER NOT NULL, digest BLOB NOT NULL) STRICT",
    "CREATE TABLE peer (identity BLOB PRIMARY KEY, counter INTEGER NOT NULL, signature BLOB NOT NULL) STRICT",
)


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
                db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            elif application != APPLICATION_ID:
                raise LedgerError(f"{path}: found another program's file; move it away.")

    def begin(self, plan_digest: bytes, attempt: int) -> None:
        """Note that `attempt` at the plan begins. Raises `Begun` unless it is a later one than any before."""
        with self._transaction() as db:
            last = db.execute("SELECT attempt FROM attempt WHERE plan_digest = ?", (plan_digest,)).fetchone()
            if last is not None and attempt <= last[0]:
                raise Begun(f"attempt {attempt + 1} was begun before; the last one was {last[0] + 1}.")
            db.execute("INSERT OR REPLACE INTO attempt VALUES (?, ?)", (plan_digest, attempt))

    def see_directory(self, league_key: bytes, directory: Directory) -> None:
        """Note the directory's version. Raises `DirectoryRefused` for an earlier one, or another of the same."""
        found = (directory.version, directory.digest)
        with self._transaction() as db:
            seen = db.execute(
                "SELECT version, digest FROM directory WHERE league_key = ?", (league_key,)
            ).fetchone()
            if seen is not None and (found[0] < seen[0] or (found[0] == seen[0] and found != seen)):
                raise DirectoryRefused(
                    f"The league's directory: found version {found[0]}, have seen version {seen[0]} before; "
                    "expected a later one, or the same."
                )
            db.execute("INSERT OR REPLACE INTO directory VALUES (?, ?, ?)", (league_key, *found))

    def remember(self, counters: Mapping[bytes, Witness]) -> None:
        """Remember other merchants' counters, by identity; one lower than remembered is left out."""
        with self._transaction() as db:
            db.executemany(
                "INSERT INTO peer VALUES (?1, ?2, ?3) ON CONFLICT (identity) DO UPDATE "
                "SET counter = ?2, signature = ?3 WHERE ?2 > counter",
                [(identity, found.counter, found.signature) for identity, found in counters.items()],
            )

    def witnesses(self) -> dict[bytes, Witness]:
        """Return the highest counter seen of each merchant, by identity."""
        with self._transaction() as db:
            rows = db.execute("SELECT identity, counter, signature FROM peer").fetchall()
        return {identity: Witness(counter, signature) for identity, counter, signature in rows}

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
            raise LedgerError(
                f"{self._path}: cannot be read or written ({error}). If it is damaged and not to be repaired, sign "
                "off from running plans before you move it away."
            ) from None
