"""The privacy ledger: what a merchant's photos have paid, written before they are touched.

    ledger = Ledger(Path("ledger.sqlite"), Budget(epsilon=3.0, delta=1e-5))
    spent = ledger.charge(charge)     # on disk when it returns; only now may photos be read
    print(spent.epsilon, ledger.counter)

**What is counted.** A plan's parameters and number of steps are fixed when it is first charged. From then on
it costs the whole of its ε, by privacy loss distributions over `plan_steps` steps, and its δ once, however
few of its rounds take place. Each charge, a repeated round's too, uses up some of those steps, and no charge
goes beyond them. Plans add up: Σε and Σδ, compared with the budget.

Why set aside the whole plan, when the steps done so far cost less? Whoever asks for rounds has seen the
results of those before. A plan stopped or lengthened because of a result does not have the ε of its final
number of steps, and privacy loss distributions composed over plans chosen one after the other are no valid
filter. Sums of parameters that are fixed before each plan starts are one [1, section 3], for plans that run
interleaved too [2]. Within a plan, steps not taken reveal nothing, so stopping early is safe.

**How it is kept.** SQLite in WAL mode with synchronous=FULL: a charge is synced to disk before it is
acknowledged, and a crash leaves it there or not, never in half. Rows are only ever added (triggers refuse the
rest), and each carries the SHA-256 of its content and of the row before, so that damage and alterations are
found when the ledger is opened.

**What it cannot see.** A chain whose last rows are missing is still a chain: a ledger that was deleted, or
restored from an old backup, looks sound. `counter` is there so that others can remember how long it was.

References:
[1] Rogers, Roth, Ullman, Vadhan 2016, "Privacy Odometers and Filters: Pay-as-you-Go Composition".
[2] Haney, Shoemate, Tian, Vadhan, Vyrros, Xu, Zhang 2023, "Concurrent Composition for Interactive
    Differential Privacy with Adaptive Privacy-Loss Parameters".
"""

import hashlib
import math
import os
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgpack

from hanse_client.charges import Budget, Charge, Event, PlanSpend, Spent
from hanse_common.errors import BudgetExceeded, LedgerError
from hanse_common.privacy.mechanism import Mechanism

APPLICATION_ID = 0x48616E73
"""Marks the SQLite file as a ledger of Hanse ("Hans")."""

SCHEMA_VERSION = 1

_SCHEMA = (
    """CREATE TABLE charge (
    number INTEGER PRIMARY KEY,
    time TEXT NOT NULL,
    plan_digest BLOB NOT NULL,
    round INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    steps INTEGER NOT NULL,
    plan_steps INTEGER NOT NULL,
    clipping_norm REAL NOT NULL,
    dimension INTEGER NOT NULL,
    noise_multiplier REAL NOT NULL,
    sampling_rate REAL NOT NULL,
    delta REAL NOT NULL,
    hash BLOB NOT NULL
) STRICT""",
    "CREATE UNIQUE INDEX charge_once ON charge (plan_digest, round, attempt)",
    """CREATE TRIGGER charge_in_order BEFORE INSERT ON charge
WHEN NEW.number IS NOT (SELECT coalesce(max(number), 0) + 1 FROM charge)
BEGIN SELECT RAISE(ABORT, 'a ledger only grows, row by row'); END""",
    """CREATE TRIGGER charge_never_changed BEFORE UPDATE ON charge
BEGIN SELECT RAISE(ABORT, 'a ledger only grows'); END""",
    """CREATE TRIGGER charge_never_deleted BEFORE DELETE ON charge
BEGIN SELECT RAISE(ABORT, 'a ledger only grows'); END""",
)

_PARAMETERS = ("plan_steps", "clipping_norm", "dimension", "noise_multiplier", "sampling_rate", "delta")
_COLUMNS = ("number", "time", "plan_digest", "round", "attempt", "steps", *_PARAMETERS)
# The names below come from the two tuples above alone.
_SELECT = f"SELECT {', '.join(_COLUMNS)}, hash FROM charge"  # noqa: S608
_INSERT = f"INSERT INTO charge VALUES ({', '.join('?' * (len(_COLUMNS) + 1))})"  # noqa: S608
_SUMMARY = (
    f"SELECT plan_digest, {', '.join(_PARAMETERS)}, count(DISTINCT round), sum(steps) FROM charge "  # noqa: S608
    f"GROUP BY plan_digest, {', '.join(_PARAMETERS)} ORDER BY min(number)"
)
_LAST_WORK = (
    "SELECT round, attempt FROM charge WHERE plan_digest = ? ORDER BY round DESC, attempt DESC LIMIT 1"
)

_CARE = "Take part in nothing until this is understood: a backup lacks all that was charged after it."

_GENESIS = (0, bytes(32))

_DELTA_SLACK = 1e-12
"""Relative: sums of decimal fractions such as 1e-6 must not miss their total by a rounding."""


class Repeated(LedgerError):
    """This round and attempt, or a later one, is in the ledger: photos would be used twice for one charge."""


class Ledger:
    """The ledger in the file `path`, made (mode 0600) when missing, with its folder.

    Every method opens the file anew, so one object may serve several threads, and a file that was replaced is
    noticed. `timeout` is how long to wait for another process that is writing, in seconds.

    Raises:
        LedgerError: the file is damaged, locked, no ledger, or of a newer version. All methods may raise it.
    """

    def __init__(self, path: Path, budget: Budget, timeout: float = 10.0) -> None:
        self.path = path
        self.budget = budget
        self._timeout = timeout
        self._head = _GENESIS
        try:
            if not path.exists():
                _create(path)
            elif path.stat().st_mode & 0o777 != 0o600:
                path.chmod(0o600)
        except (OSError, sqlite3.Error) as error:
            raise LedgerError(f"{path}: cannot make or protect the ledger ({error}).") from None
        self.verify()

    @property
    def counter(self) -> int:
        """How many charges there are. It only grows."""
        with self._transaction("DEFERRED"):
            return self._head[0]

    def charge(self, charge: Charge) -> Spent:
        """Write `charge`, sync it to disk, and return what is spent then. Photos may be read after that.

        Raises:
            Repeated: this plan's round and attempt, or a later one, was charged before.
            BudgetExceeded: budget or plan has no room for it. Nothing is written.
            LedgerError: the plan was charged with other parameters before, or the ledger can't be written.
        """
        _epsilon(
            replace(charge.mechanism, steps=charge.plan_steps), charge.delta
        )  # slow once: not under the lock
        with self._transaction("IMMEDIATE") as db:
            spent = self._spent_with(db, charge)
            number, previous = self._head[0] + 1, self._head[1]
            now = datetime.now(UTC).isoformat(timespec="seconds")
            work = (charge.plan_digest, charge.round, charge.attempt)
            row = (number, now, *work, charge.mechanism.steps, *charge.parameters)
            head = (number, _hash(previous, row))
            db.execute(_INSERT, (*row, head[1]))
        self._head = head
        return spent

    def check(self, charge: Charge) -> Spent:
        """Return what `charge` would return now, and raise what it would raise, without writing.

        Since a plan is paid for as a whole, this also says whether the rest of the plan fits.
        """
        with self._transaction("DEFERRED") as db:
            return self._spent_with(db, charge)

    def spent(self) -> Spent:
        """Return what is spent."""
        with self._transaction("DEFERRED") as db:
            return Spent(tuple(account.spend() for account in self._accounts(db)))

    def last_work(self, plan_digest: bytes) -> tuple[int, int] | None:
        """Return the plan's last charged (round, attempt), or None when nothing was charged under it."""
        with self._transaction("DEFERRED") as db:
            return _last_work(db, plan_digest)

    def events(self) -> Iterator[Event]:
        """Yield all rows, oldest first."""
        with self._transaction("DEFERRED") as db:
            rows = db.execute(f"{_SELECT} ORDER BY number").fetchall()
        for number, time, plan_digest, round_, attempt, steps, *parameters, hash_ in rows:
            plan_steps, mechanism, delta = _from_columns(parameters, steps)
            yield Event(
                number, time, Charge(plan_digest, round_, attempt, mechanism, plan_steps, delta), hash_
            )

    def verify(self) -> None:
        """Read the whole ledger again. Raises `LedgerError` that names the first row which is not sound."""
        self._head = _GENESIS
        with self._transaction("DEFERRED") as db:
            self._accounts(db)
            (found,) = db.execute("PRAGMA integrity_check(1)").fetchone()
            if found != "ok":
                raise self._damaged(f"SQLite finds: {found}")

    @contextmanager
    def _transaction(self, kind: str) -> Iterator[sqlite3.Connection]:
        """Open the file, check what is new in it, and commit unless the body raises."""
        try:
            uri = f"{self.path.absolute().as_uri()}?mode=rw"
            with closing(sqlite3.connect(uri, uri=True, timeout=self._timeout, isolation_level=None)) as db:
                db.text_factory = _text
                self._require_ours(db)
                db.execute("PRAGMA synchronous = FULL")
                db.execute("PRAGMA fullfsync = ON")  # macOS: fsync alone does not reach the disk
                db.execute(f"BEGIN {kind}")
                self._read_on(db)
                yield db
                db.execute("COMMIT")
        except sqlite3.Error as error:
            raise LedgerError(f"{self.path}: {_in_words(error)}") from None
        except UnicodeDecodeError:  # Python's, for SQLite's message about a damaged name
            raise self._damaged("a name in it is no text") from None

    def _require_ours(self, db: sqlite3.Connection) -> None:
        (application,) = db.execute("PRAGMA application_id").fetchone()
        if application != APPLICATION_ID:
            raise LedgerError(
                f"{self.path}: found another program's file or an empty one, expected a ledger. {_CARE}"
            )
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version != SCHEMA_VERSION:
            raise LedgerError(
                f"{self.path}: found a ledger of version {version}, expected {SCHEMA_VERSION}; "
                "update hanse-client to a release that reads it."
            )
        schema = db.execute("SELECT sql FROM sqlite_schema WHERE sql IS NOT NULL").fetchall()
        (journal,) = db.execute("PRAGMA journal_mode").fetchone()
        if {sql for (sql,) in schema} != set(_SCHEMA) or journal != "wal":
            raise self._damaged("its tables, triggers or journal are not as they were made")

    def _read_on(self, db: sqlite3.Connection) -> None:
        """Check the rows added since the last look, and that the last one then seen is still there."""
        number, previous = self._head
        seen = db.execute("SELECT hash FROM charge WHERE number = ?", (number,)).fetchone()
        if number and seen != (previous,):
            raise self._damaged(f"row {number} is gone or another; perhaps an older ledger was put here")
        for *row, hash_ in db.execute(f"{_SELECT} WHERE number > ? ORDER BY number", (number,)):
            if row[0] != number + 1:
                raise self._damaged(f"row {number + 1} is missing, the next one found is {row[0]}")
            if hash_ != _hash(previous, row):
                raise self._damaged(f"row {row[0]} is not what was written")
            number, previous = row[0], hash_
        self._head = (number, previous)

    def _accounts(self, db: sqlite3.Connection) -> list["_Account"]:
        accounts = [
            _Account(digest, tuple(rest), rounds, steps)
            for digest, *rest, rounds, steps in db.execute(_SUMMARY)
        ]
        if len({account.plan_digest for account in accounts}) != len(accounts):
            raise self._damaged("a plan has rows with different parameters")
        return accounts

    def _spent_with(self, db: sqlite3.Connection, charge: Charge) -> Spent:
        """Return what is spent with `charge`, which is not in the ledger yet. Raises as `charge` does."""
        name = f"Plan {charge.plan_digest.hex()[:16]}"
        last = _last_work(db, charge.plan_digest)
        if last is not None and (charge.round, charge.attempt) <= last:
            raise Repeated(
                f"{name}: round {last[0] + 1}, attempt {last[1] + 1} is charged already; expected a "
                f"later one, found round {charge.round + 1}, attempt {charge.attempt + 1}."
            )
        accounts = {account.plan_digest: account for account in self._accounts(db)}
        account = accounts.get(charge.plan_digest, _Account(charge.plan_digest, charge.parameters, 0, 0))
        for field, found, kept in zip(_PARAMETERS, charge.parameters, account.parameters, strict=True):
            if found != kept:
                raise LedgerError(f"{name}: found {field} {found}, but it was charged with {kept} before.")
        new_round = last is None or charge.round > last[0]
        account = replace(
            account, rounds=account.rounds + new_round, steps=account.steps + charge.mechanism.steps
        )
        if account.steps > charge.plan_steps:
            raise BudgetExceeded(
                f"{name}: its {charge.plan_steps} steps are used up; this round would make {account.steps}. "
                "Rounds were repeated too often, and the plan goes on without this shop."
            )
        accounts[charge.plan_digest] = account
        spent = Spent(tuple(account.spend() for account in accounts.values()))
        budget = self.budget
        if spent.epsilon > budget.epsilon or spent.delta > budget.delta * (1 + _DELTA_SLACK):
            raise BudgetExceeded(
                f"{name}: with it ε = {spent.epsilon:.4g} and δ = {spent.delta:.4g} would be spent, of a "
                f"budget of ε = {budget.epsilon:g} and δ = {budget.delta:g}. No photo was touched. Taking "
                "part needs a larger budget in the policy."
            )
        return spent

    def _damaged(self, what: str) -> LedgerError:
        return LedgerError(f"{self.path}: the ledger is damaged: {what}. {_CARE}")


@dataclass(frozen=True)
class _Account:
    """What the rows of one plan add up to."""

    plan_digest: bytes
    parameters: tuple[Any, ...]
    rounds: int
    steps: int

    def spend(self) -> PlanSpend:
        plan_steps, mechanism, delta = _from_columns(self.parameters, steps=self.parameters[0])
        epsilon = _epsilon(mechanism, delta)
        return PlanSpend(self.plan_digest, self.rounds, self.steps, plan_steps, epsilon, delta)


def _from_columns(parameters: Sequence[Any], steps: int) -> tuple[int, Mechanism, float]:
    """Return plan_steps, the mechanism of `steps` steps, and δ, from `_PARAMETERS` in their order."""
    plan_steps, clipping_norm, dimension, noise_multiplier, sampling_rate, delta = parameters
    return plan_steps, Mechanism(clipping_norm, dimension, noise_multiplier, sampling_rate, steps), delta


@lru_cache(maxsize=1024)
def _epsilon(mechanism: Mechanism, delta: float) -> float:
    try:
        return mechanism.epsilon(delta)
    except ValueError:  # out of the accountant's range: no ε can be claimed
        return math.inf


def _last_work(db: sqlite3.Connection, plan_digest: bytes) -> tuple[int, int] | None:
    row = db.execute(_LAST_WORK, (plan_digest,)).fetchone()
    return None if row is None else (row[0], row[1])


def _hash(previous: bytes, row: Sequence[object]) -> bytes:
    """SHA-256 of the previous row's hash and this row's columns, in order, as a MessagePack array."""
    return hashlib.sha256(previous + msgpack.packb(list(row), use_bin_type=True)).digest()


def _text(data: bytes) -> str:
    """Read damaged text too, so that the check of the row finds it and names the row."""
    return data.decode("utf-8", "replace")


def _create(path: Path) -> None:
    """Make an empty ledger beside `path` and link it there when it is whole; one made meanwhile stays."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        new = Path(folder) / "ledger"
        new.touch(mode=0o600)
        with closing(sqlite3.connect(new, isolation_level=None)) as db:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
            db.execute("BEGIN")
            for statement in _SCHEMA:
                db.execute(statement)
            db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            db.execute("COMMIT")
        with suppress(FileExistsError):
            path.hardlink_to(new)
    for parent in (path.parent, path.parent.parent):  # the folder may be new, too
        handle = os.open(parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _in_words(error: sqlite3.Error) -> str:
    """Say what happened to the file and what to do, for the merchant's eyes."""
    name = getattr(error, "sqlite_errorname", "")
    texts = {
        "SQLITE_BUSY": "another process is writing to the ledger and did not finish; try again, or stop it.",
        "SQLITE_FULL": "the disk is full, so nothing was charged; free some space and try again.",
        "SQLITE_NOTADB": f"this is no SQLite database, expected a ledger. {_CARE}",
        "SQLITE_CORRUPT": f"the ledger is damaged ({error}). {_CARE}",
        "SQLITE_CANTOPEN": f"the ledger cannot be opened ({error}); check that it and its folder are there.",
        "SQLITE_READONLY": "the ledger is read-only; give the user who runs hanse-client the right to write.",
    }
    for start, text in texts.items():
        if name.startswith(start):
            return text
    return f"the ledger cannot be read or written ({error}, {name}); check the disk."
