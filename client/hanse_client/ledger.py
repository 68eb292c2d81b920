"""The privacy ledger: what a merchant's photos have paid, written before they are touched.

    ledger = Ledger(Path("ledger.sqlite"), Budget(epsilon=3.0, delta=1e-5))
    spent = ledger.charge(charge)     # on disk when it returns; only now may photos be read
    print(spent.epsilon, ledger.counter)

**What is counted.** A plan's parameters and number of steps are fixed when it is first charged. From then on it
costs the whole of its ε, by privacy loss distributions over `plan_steps` steps, and its δ once, however few of
its rounds take place. Each charge, a repeated round's too, uses up some of those steps, and no charge goes
beyond them. Plans add up: Σε and Σδ, compared with the budget.

Why set aside the whole plan, when the steps done so far cost less? Whoever asks for rounds sees their results
first. A plan stopped or lengthened because of a result has not the ε of its final number of steps, and
composed privacy loss distributions are no filter for plans chosen one after the other; sums of parameters fixed
in advance are [1, Theorem 3.1 and section 4]. Steps not taken reveal nothing.

**How it is kept.** SQLite in WAL mode with synchronous=FULL: a charge is synced to disk before it is
acknowledged, and a crash leaves it there or not, never in half. Rows are only ever added (triggers refuse the
rest), and each carries the SHA-256 of its content and of the row before, so that damage and alterations inside
are found when the ledger is opened.

**What it cannot see.** A chain whose last rows are missing is a chain: a ledger that was deleted or restored from
an old backup looks sound. `counter` is there so that others can remember how long it was.

References:
[1] Rogers, Roth, Ullman, Vadhan 2016, "Privacy Odometers and Filters: Pay-as-you-Go Composition".
"""

import hashlib
import math
import os
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgpack

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
_LAST_WORK = "SELECT round, attempt FROM charge WHERE plan_digest = ? ORDER BY round DESC, attempt DESC LIMIT 1"

_DELTA_SLACK = 1e-12
"""Relative: sums of decimal fractions such as 1e-6 must not miss their total by a rounding."""


class Repeated(LedgerError):
    """This round and attempt, or a later one, is in the ledger: photos would be used twice for one charge."""


@dataclass(frozen=True)
class Budget:
    """The most that one photo may ever pay. Raises ValueError unless ε > 0 is finite and 0 < δ < 1."""

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        if not 0 < self.epsilon < math.inf:
            raise ValueError(f"Expected a finite epsilon > 0, found {self.epsilon}.")
        if not 0 < self.delta < 1:
            raise ValueError(f"Expected 0 < delta < 1, found {self.delta}.")


@dataclass(frozen=True)
class Charge:
    """One use of the photos. All of it is public: it follows from the plan.

    Attributes:
        plan_digest: names the plan, 32 bytes.
        round: counted from 0.
        attempt: counted from 0 in each round.
        mechanism: that of this round; its `steps` are this round's.
        plan_steps: how many steps the whole plan may take, repeated rounds included.
        delta: the plan's δ.

    Raises:
        ValueError: a field is out of range.
    """

    plan_digest: bytes
    round: int
    attempt: int
    mechanism: Mechanism
    plan_steps: int
    delta: float

    def __post_init__(self) -> None:
        if len(self.plan_digest) != 32:
            raise ValueError(f"Expected a plan_digest of 32 bytes, found {len(self.plan_digest)}.")
        if self.round < 0 or self.attempt < 0:
            raise ValueError(f"Expected round and attempt ≥ 0, found {self.round} and {self.attempt}.")
        if not self.mechanism.steps <= self.plan_steps:
            raise ValueError(f"Expected at most {self.plan_steps} steps, found {self.mechanism.steps}.")
        if not 0 < self.delta < 1:
            raise ValueError(f"Expected 0 < delta < 1, found {self.delta}.")

    @property
    def parameters(self) -> tuple[int, float, int, float, float, float]:
        """What stays the same for all of a plan's charges, in the order of the ledger's columns."""
        mechanism = self.mechanism
        return (
            self.plan_steps,
            float(mechanism.clipping_norm),
            mechanism.dimension,
            float(mechanism.noise_multiplier),
            float(mechanism.sampling_rate),
            float(self.delta),
        )


@dataclass(frozen=True)
class Event:
    """One row: its number from 1, its time (UTC, ISO 8601, for the owner's eyes), its charge and its hash."""

    number: int
    time: str
    charge: Charge
    hash: bytes


@dataclass(frozen=True)
class PlanSpend:
    """What one plan costs. `rounds` and `steps` have taken place; ε and δ are set aside for `plan_steps`."""

    plan_digest: bytes
    rounds: int
    steps: int
    plan_steps: int
    epsilon: float
    delta: float


@dataclass(frozen=True)
class Spent:
    """What all plans cost together, and each of them, in the order in which they were first charged."""

    plans: tuple[PlanSpend, ...]

    @property
    def epsilon(self) -> float:
        """Σε."""
        return math.fsum(plan.epsilon for plan in self.plans)

    @property
    def delta(self) -> float:
        """Σδ."""
        return math.fsum(plan.delta for plan in self.plans)


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
        self._head: tuple[int, bytes] = (0, bytes(32))
        if not path.exists():
            self._create()
        self.verify()

    @property
    def counter(self) -> int:
        """How many charges there are. It only grows."""
        with self._transaction("DEFERRED") as db:
            self._read_on(db)
            return self._head[0]

    def charge(self, charge: Charge) -> Spent:
        """Write `charge`, sync it to disk, and return what is spent then. Photos may be read after that.

        Raises:
            Repeated: this plan's round and attempt, or a later one, was charged before.
            BudgetExceeded: budget or plan has no room for it. Nothing is written.
            LedgerError: the plan was charged with other parameters before, or the ledger can't be written.
        """
        _epsilon(charge.mechanism, charge.plan_steps, charge.delta)  # slow the first time: not under the lock
        with self._transaction("IMMEDIATE") as db:
            self._read_on(db)
            spent = self._spent_with(db, charge)
            number, previous = self._head[0] + 1, self._head[1]
            now = datetime.now(UTC).isoformat(timespec="seconds")
            work = (charge.plan_digest, charge.round, charge.attempt)
            row = (number, now, *work, charge.mechanism.steps, *charge.parameters)
            db.execute(_INSERT, (*row, _hash(previous, row)))
        return spent

    def check(self, charge: Charge) -> Spent:
        """Return what `charge` would return now, and raise what it would raise, without writing.

        Since a plan is paid for as a whole, this also says whether the rest of the plan fits.
        """
        with self._transaction("DEFERRED") as db:
            self._read_on(db)
            return self._spent_with(db, charge)

    def spent(self) -> Spent:
        """Return what is spent."""
        with self._transaction("DEFERRED") as db:
            self._read_on(db)
            return self._spent(db)

    def last_work(self, plan_digest: bytes) -> tuple[int, int] | None:
        """Return the plan's last charged (round, attempt), or None when nothing was charged under it."""
        with self._transaction("DEFERRED") as db:
            row = db.execute(_LAST_WORK, (plan_digest,)).fetchone()
        return None if row is None else (row[0], row[1])

    def events(self) -> Iterator[Event]:
        """Yield all rows, oldest first."""
        with self._transaction("DEFERRED") as db:
            rows = db.execute(f"{_SELECT} ORDER BY number").fetchall()
        for number, time, plan_digest, round_, attempt, steps, *parameters, hash_ in rows:
            mechanism = self._mechanism(steps, parameters)
            charge = Charge(plan_digest, round_, attempt, mechanism, parameters[0], parameters[-1])
            yield Event(number, time, charge, hash_)

    def verify(self) -> None:
        """Read the whole ledger again. Raises `LedgerError` that names the first row which is not sound."""
        self._head = (0, bytes(32))
        with self._transaction("DEFERRED") as db:
            self._read_on(db)
            (found,) = db.execute("PRAGMA integrity_check(1)").fetchone()
            if found != "ok":
                raise LedgerError(f"{self.path}: the ledger is damaged ({found}). {_RESTORE}")
            self._spent(db)

    def _read_on(self, db: sqlite3.Connection) -> None:
        """Check the rows that were added since the last call, and that those before are still there."""
        number, previous = self._head
        if number and db.execute("SELECT hash FROM charge WHERE number = ?", (number,)).fetchone() != (previous,):
            raise LedgerError(f"{self.path}: row {number} is gone or another; was an older ledger put here? {_RESTORE}")
        for *row, hash_ in db.execute(f"{_SELECT} WHERE number > ? ORDER BY number", (number,)):
            if row[0] != number + 1:
                raise LedgerError(f"{self.path}: row {number + 1} is missing, found row {row[0]}. {_RESTORE}")
            if hash_ != _hash(previous, row):
                raise LedgerError(f"{self.path}: row {number + 1} was altered or damaged. {_RESTORE}")
            number, previous = row[0], hash_
        self._head = (number, previous)

    def _spent_with(self, db: sqlite3.Connection, charge: Charge) -> Spent:
        """Return what is spent with `charge`, which is not in the ledger yet. Raises as `charge` does."""
        name = charge.plan_digest.hex()[:16]
        last = db.execute(_LAST_WORK, (charge.plan_digest,)).fetchone()
        if last is not None and (charge.round, charge.attempt) <= last:
            raise Repeated(
                f"Plan {name}, round {charge.round}, attempt {charge.attempt}: found round {last[0]}, attempt "
                f"{last[1]} charged already, expected a later one."
            )
        *others, plan = self._spent(db, charge).plans
        if plan.steps > plan.plan_steps:
            raise BudgetExceeded(
                f"Plan {name} may take {plan.plan_steps} steps, and this round would make it {plan.steps}. "
                "Its rounds were repeated too often; it goes on without this shop."
            )
        spent = Spent((*others, plan))
        budget = self.budget
        if spent.epsilon > budget.epsilon or spent.delta > budget.delta * (1 + _DELTA_SLACK):
            raise BudgetExceeded(
                f"Plan {name} would bring what is spent to ε = {spent.epsilon:.4g}, δ = {spent.delta:.4g}; the "
                f"budget is ε = {budget.epsilon:g}, δ = {budget.delta:g}. Photos stay untouched. Raise the "
                "budget in the policy only if you accept what it means."
            )
        return spent
