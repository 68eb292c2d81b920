"""The privacy ledger: what a merchant's photos have paid, written before they are touched.

    ledger = Ledger(Path("ledger.sqlite"), Budget(epsilon=3.0, delta=1e-5))
    spent = ledger.charge(charge)     # on disk when it returns; only now may photos be read
    print(spent.epsilon, ledger.counter)

**What is counted.** A plan's parameters and number of steps are fixed when it is first charged. Each charge, a
repeated round's too, uses up some of those steps, and no charge goes beyond them. What all charges cost together,
compared with the budget before each of them, is for the ledger's filter to say
(`hanse_common.privacy.filters`): `sum` sets a plan's whole ε and δ aside at its first charge, however few of its
rounds take place; `rdp-ALPHA` counts the steps taken.

Why a filter? Whoever asks for rounds has seen the results of those before. A plan stopped or lengthened because of
a result does not have the ε of its final number of steps, and privacy loss distributions composed over plans
chosen one after the other are no valid filter. For the same reason a ledger has one filter from its beginning to
its end, and one unit, since ε of photos and ε of products do not add up: both are written down when the ledger is
made, and every hash depends on them.

**How it is kept.** SQLite in WAL mode with synchronous=FULL: a charge is synced to disk before it is
acknowledged, and a crash leaves it there or not, never in half. Rows are only ever added (triggers refuse the
rest), and each carries a hash of its content and of the row before, so that damage and alterations are
found when the ledger is opened. A row's hash is the SHA-256 of the hash before and of the row's columns as one
MessagePack array; before the first row is the genesis, the SHA-256 of `hanse ledger 2 FILTER UNIT`.

**What it cannot see.** A chain whose last rows are missing is still a chain: a ledger that was deleted, or
restored from an old backup, looks sound. `counter` is there so that others can remember how long it was.
"""

import hashlib
import os
import sqlite3
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgpack

from hanse_client.charges import PARAMETERS, Account, Budget, Charge, Event, Seen, Spent, since
from hanse_common.errors import BudgetExceeded, LedgerError

APPLICATION_ID = 0x48616E73
"""Marks the SQLite file as a ledger of Hanse ("Hans")."""

SCHEMA_VERSION = 2

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
    shares INTEGER NOT NULL,
    delta REAL NOT NULL,
    unit TEXT NOT NULL,
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
    "CREATE TABLE terms (filter TEXT NOT NULL, unit TEXT NOT NULL) STRICT",
    """CREATE TRIGGER terms_only_once BEFORE INSERT ON terms WHEN EXISTS (SELECT 1 FROM terms)
BEGIN SELECT RAISE(ABORT, 'a ledger has one filter and one unit'); END""",
    """CREATE TRIGGER terms_never_changed BEFORE UPDATE ON terms
BEGIN SELECT RAISE(ABORT, 'a ledger has one filter and one unit'); END""",
    """CREATE TRIGGER terms_never_deleted BEFORE DELETE ON terms
BEGIN SELECT RAISE(ABORT, 'a ledger has one filter and one unit'); END""",
)

_COLUMNS = ("number", "time", "plan_digest", "round", "attempt", "steps", *PARAMETERS)
# The names below come from these tuples alone.
_SELECT = f"SELECT {', '.join(_COLUMNS)}, hash FROM charge"  # noqa: S608
_INSERT = f"INSERT INTO charge VALUES ({', '.join('?' * (len(_COLUMNS) + 1))})"  # noqa: S608

_CARE = "Take part in nothing until this is understood: a backup lacks all that was charged after it."

_FULL = "the disk is full, so nothing was charged; free some space and try again."

_OLDER = (
    "this release does not know the filter and the units that it was kept by. Take part with the release that made "
    "it, and do not delete it: what it holds stays spent."
)

_FIXED = (
    ("accounting", "adds up by", "a way chosen after results were seen limits nothing"),
    ("unit", "keeps account of one", "what one of them paid says little about the other"),
)
_DELTA_SLACK = 1e-12
"""Relative: sums of decimal fractions such as 1e-6 must not miss their total by a rounding."""


class Repeated(LedgerError):
    """This round and attempt, or a later one, is in the ledger: photos would be used twice for one charge."""


class Ledger:
    """The ledger in the file `path`, made (mode 0600) when missing, with its folder.

    Every method opens the file anew, so one object may serve several threads, and a file that was replaced is
    noticed. `timeout` is how long to wait for another process that is writing, in seconds; `now` is the clock, UTC.

    Raises:
        LedgerError: the file is damaged, locked, no ledger, of another version, or was made with another filter
            or unit than the budget's. All methods may raise it.
    """

    def __init__(
        self,
        path: Path,
        budget: Budget,
        timeout: float = 10.0,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.path = path
        self.budget = budget
        self._timeout = timeout
        self._now = now
        try:
            if not path.exists():
                _create(path, budget)
            elif path.stat().st_mode & 0o777 != 0o600:
                path.chmod(0o600)
        except sqlite3.Error as error:
            raise LedgerError(f"{path}: cannot make the ledger: {_in_words(error)}") from None
        except OSError as error:
            raise LedgerError(
                f"{path}: cannot make or protect the ledger ({error.strerror}); check its folder, and whether the disk "
                "is full."
            ) from None
        self.verify()

    @property
    def counter(self) -> int:
        """How many charges there are. It only grows."""
        return self.head[0]

    @property
    def head(self) -> tuple[int, bytes]:
        """The last charge's number and hash, 32 bytes; 0 and the genesis while there is none."""
        with self._transaction("DEFERRED") as (_, seen):
            return seen.number, seen.hash

    def charge(self, charge: Charge) -> Spent:
        """Write `charge`, sync it to disk, and return what is spent then. Photos may be read after that.

        Raises:
            Repeated: this plan's round and attempt, or a later one, was charged before.
            BudgetExceeded: budget or plan has no room for it. Nothing is written.
            LedgerError: its unit is not the ledger's, its plan's parameters changed, or nothing can be written.
        """
        # What is slow is slow once, and not under the lock.
        Spent.of([Account(charge.plan_digest, charge.parameters)], self.budget)
        with self._transaction("IMMEDIATE") as (db, seen):
            accounts = {**seen.accounts, charge.plan_digest: self._account_with(seen, charge)}
            now = self._now().isoformat(timespec="seconds")
            spent = self._within_budget(charge, accounts, seen.monthly(now))
            work = (charge.plan_digest, charge.round, charge.attempt)
            row = (seen.number + 1, now, *work, charge.mechanism.steps, *charge.parameters)
            seen = seen.after(_hash(seen.hash, row), now, accounts)
            db.execute(_INSERT, (*row, seen.hash))
        self._seen = seen
        return spent

    def check(self, charge: Charge) -> Spent:
        """Return what will be spent once all of the charge's plan has been, without writing.

        Raises what `charge` would raise now, or for the rest of the plan later.
        """
        with self._transaction("DEFERRED") as (_, seen):
            account = replace(self._account_with(seen, charge), steps=charge.plan_steps)
            now = self._now().isoformat(timespec="seconds")
            accounts = {**seen.accounts, charge.plan_digest: account}
            return self._within_budget(charge, accounts, seen.monthly(now))

    def spent(self) -> Spent:
        """Return what is spent."""
        with self._transaction("DEFERRED") as (_, seen):
            return Spent.of(seen.accounts.values(), self.budget)

    def last_work(self, plan_digest: bytes) -> tuple[int, int] | None:
        """Return the plan's last charged (round, attempt), or None when nothing was charged under it."""
        with self._transaction("DEFERRED") as (_, seen):
            account = seen.accounts.get(plan_digest)
            return None if account is None else account.last

    def events(self) -> Iterator[Event]:
        """Yield all rows, oldest first."""
        with self._transaction("DEFERRED") as (db, _):
            rows = db.execute(f"{_SELECT} ORDER BY number").fetchall()
        previous = genesis(self.budget)
        for number, time, *columns, hash_ in rows:
            yield Event(number, time, Charge.from_columns(*columns), previous, hash_)
            previous = hash_

    def verify(self) -> None:
        """Read the whole ledger again. Raises `LedgerError` that names the first row which is not sound."""
        self._seen = Seen(0, genesis(self.budget), {}, "", {})
        with self._transaction("DEFERRED") as (db, _):
            (found,) = db.execute("PRAGMA integrity_check(1)").fetchone()
            if found != "ok":
                raise self._damaged(f"SQLite finds: {found}")

    @contextmanager
    def _transaction(self, kind: str) -> Iterator[tuple[sqlite3.Connection, Seen]]:
        """Open the file, check what is new in it, and commit unless the body raises."""
        try:
            uri = f"{self.path.absolute().as_uri()}?mode=rw"
            with closing(sqlite3.connect(uri, uri=True, timeout=self._timeout, isolation_level=None)) as db:
                db.text_factory = _text
                self._require_ours(db)
                db.execute("PRAGMA synchronous = FULL")
                db.execute("PRAGMA fullfsync = ON")  # macOS: fsync alone does not reach the disk
                db.execute(f"BEGIN {kind}")
                yield db, self._read_on(db)
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
                + (_OLDER if version < SCHEMA_VERSION else "update hanse-client to a release that reads it.")
            )
        schema = db.execute("SELECT sql FROM sqlite_schema WHERE sql IS NOT NULL").fetchall()
        (journal,) = db.execute("PRAGMA journal_mode").fetchone()
        if {sql for (sql,) in schema} != set(_SCHEMA) or journal != "wal":
            raise self._damaged("its tables, triggers or journal are not as they were made")
        # In a damaged file there may be anything, NULL too.
        self._require_terms([list(map(str, row)) for row in db.execute("SELECT filter, unit FROM terms")])

    def _require_terms(self, rows: Sequence[Sequence[Any]]) -> None:
        try:
            ((accounting, unit),) = rows
            replace(self.budget, accounting=accounting, unit=unit)
        except ValueError:
            names = ", ".join(map(" ".join, rows)) or "nothing"
            raise self._damaged(f"found {names} where its filter and unit are") from None
        for (key, what, why), found in zip(_FIXED, rows[0], strict=True):
            wanted = getattr(self.budget, key)
            if found != wanted:
                raise LedgerError(
                    f"{self.path}: this ledger {what} {found}, but the policy says {wanted}. This is fixed "
                    f"when a ledger is made, since {why}. Put `{key}: {found}` back into the policy."
                )

    def _read_on(self, db: sqlite3.Connection) -> Seen:
        """Check the rows added since the last look, and that the last one then seen is still there."""
        known = self._seen
        seen, accounts = known, dict(known.accounts)
        number, previous = known.number, known.hash
        last = db.execute("SELECT hash FROM charge WHERE number = ?", (number,)).fetchone()
        if number and last != (previous,):
            raise self._damaged(f"row {number} is gone or another; perhaps an older ledger was put here")
        for *row, hash_ in db.execute(f"{_SELECT} WHERE number > ? ORDER BY number", (number,)):
            if row[0] != number + 1:
                raise self._damaged(f"row {number + 1} is missing, the next one found is {row[0]}")
            if hash_ != _hash(previous, row):
                raise self._damaged(f"row {row[0]} is not what was written")
            number, previous = row[0], hash_
            digest = row[2]
            before, accounts = accounts, {**accounts, digest: self._account_after(accounts.get(digest), row)}
            seen = replace(seen, accounts=before).after(previous, row[1], accounts)
        self._seen = seen
        return seen

    def _account_after(self, account: Account | None, row: Sequence[Any]) -> Account:
        """Return the plan's account with `row`, whose hash is right already."""
        number, _, digest, round_, attempt, steps, *parameters = row
        if account is None:
            account = Account(digest, tuple(parameters))
            try:
                account.use()
            except ValueError as error:
                raise self._damaged(f"row {number} has parameters that no plan has: {error}") from None
            if account.unit != self.budget.unit:
                raise self._damaged(f"row {number} is of another unit, {account.unit}")
        if account.parameters != tuple(parameters) or account.last >= (round_, attempt):
            raise self._damaged(f"row {number} does not go with its plan's rows before")
        return account.after(round_, attempt, steps)

    def _account_with(self, seen: Seen, charge: Charge) -> Account:
        """Return the plan's account with `charge`, which is not in the ledger yet. Raises as `charge` does."""
        name, unit = _name(charge), self.budget.unit
        if charge.unit != unit:
            raise LedgerError(
                f"{name}: its ε is said of one {charge.unit}, expected {unit}, of which this ledger keeps account; the "
                "two do not add up. Nothing was charged; take part in plans of the ledger's unit alone."
            )
        new = Account(charge.plan_digest, charge.parameters)
        account = seen.accounts.get(charge.plan_digest, new)
        if (charge.round, charge.attempt) <= account.last:
            raise Repeated(
                f"{name}: round {account.last[0] + 1}, attempt {account.last[1] + 1} is charged already; expected a "
                f"later one, found round {charge.round + 1}, attempt {charge.attempt + 1}."
            )
        for field, found, kept in zip(PARAMETERS, new.parameters, account.parameters, strict=True):
            if found != kept:
                raise LedgerError(f"{name}: found {field} {found}, but it was charged with {kept} before.")
        account = account.after(charge.round, charge.attempt, charge.mechanism.steps)
        if account.steps > charge.plan_steps:
            raise BudgetExceeded(
                f"{name}: its {charge.plan_steps} steps are used up; this round would make {account.steps}. "
                "Rounds were repeated too often, and the plan goes on without this shop."
            )
        return account

    def _within_budget(
        self, charge: Charge, accounts: Mapping[bytes, Account], before: Mapping[bytes, Account]
    ) -> Spent:
        """Return what `accounts` cost, `charge` among them, or raise `BudgetExceeded`.

        `before` are the accounts as this month began.
        """
        spent, budget = Spent.of(accounts.values(), self.budget), self.budget
        if spent.epsilon > budget.epsilon or spent.delta > budget.delta * (1 + _DELTA_SLACK):
            raise BudgetExceeded(
                f"{_name(charge)}: with it ε = {spent.epsilon:.4g} and δ = {spent.delta:.4g} would be spent, of a "
                f"budget of ε = {budget.epsilon:g} and δ = {budget.delta:g}. No photo was touched. Taking "
                "part needs a larger budget in the policy."
            )
        if budget.monthly is not None or budget.monthly_delta is not None:
            new = Spent.of(since(before, accounts, budget.filter), budget)
            for letter, found, most, key in (
                ("ε", new.epsilon, budget.monthly, "monthly_epsilon"),
                ("δ", new.delta, budget.monthly_delta, "monthly_delta"),
            ):
                if key == "monthly_delta" and not budget.filter.whole_plans:
                    continue  # steps share one δ, however many months they take
                if most is not None and found > most * (1 + _DELTA_SLACK):
                    raise BudgetExceeded(
                        f"{_name(charge)}: with it {letter} = {found:.4g} would be spent this month, of {most:g} "
                        f"({key}). No photo was touched. The next month has room again; a clock that was once set "
                        "forward makes this month longer."
                    )
        return spent

    def _damaged(self, what: str) -> LedgerError:
        return LedgerError(f"{self.path}: the ledger is damaged: {what}. {_CARE}")


def genesis(budget: Budget) -> bytes:
    """Return what stands in for the hash before the first row's, 32 bytes. Filter and unit are in it."""
    text = f"hanse ledger {SCHEMA_VERSION} {budget.accounting} {budget.unit}"
    return hashlib.sha256(text.encode()).digest()


def _name(charge: Charge) -> str:
    return f"Plan {charge.plan_digest.hex()[:16]}"


def _hash(previous: bytes, row: Sequence[object]) -> bytes:
    """SHA-256 of the previous row's hash and this row's columns, in order, as a MessagePack array."""
    return hashlib.sha256(previous + msgpack.packb(list(row), use_bin_type=True)).digest()


def _text(data: bytes) -> str:
    """Read damaged text too, so that the check of the row finds it and names the row."""
    return data.decode("utf-8", "replace")


def _create(path: Path, budget: Budget) -> None:
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
            db.execute("INSERT INTO terms VALUES (?, ?)", (budget.accounting, budget.unit))
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
        "SQLITE_FULL": _FULL,
        "SQLITE_IOERR_SHMSIZE": _FULL,  # even a reader needs 32 kB for the index of the journal
        "SQLITE_NOTADB": f"this is no SQLite database, expected a ledger. {_CARE}",
        "SQLITE_CORRUPT": f"the ledger is damaged ({error}). {_CARE}",
        "SQLITE_CANTOPEN": f"the ledger cannot be opened ({error}); check that it and its folder are there.",
        "SQLITE_READONLY": "the ledger is read-only; give the user who runs hanse-client the right to write.",
    }
    for start, text in texts.items():
        if name.startswith(start):
            return text
    return f"the ledger cannot be read or written ({error}, {name}); check the disk."
