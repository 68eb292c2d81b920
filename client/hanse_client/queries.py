"""What shoppers asked for: how many photos of each class a day, kept here, for plans of mode `trends`.

    queries = QueryLog.of(config)             # None unless policy.modes allows trends
    queries.note("Sneaker")                   # one photo that a shopper searched by, once it is answered
    counts = queries.take(plan)               # (K,) int64: once the ledger is charged

**What is kept** is a number for each day and class, in state/queries.sqlite: no photo, no vector, no time of day,
nothing of who asked. Days older than `policy.trends_days` are deleted when the next query is noted or counted. Without
`trends` among `policy.modes`, which by default it is not, nothing is kept, and what was is deleted.

**What is counted** is each call that searches the products by a photo: REST's and gRPC's `search`. Asked again of the
same photo, as with another filter, it is another query. What the shop itself looks at is none: the owner's page, the
stream of a till or a conveyor, commands, `classify`, `embed`, `similar`; nor is a search by words alone.

**What may leave** is one noisy sum over the league, of these numbers for the plan's days. The unit of its ε is one
query photo: adding one adds 1 to one number. So a shopper who asks a hundred times is covered a hundred times less;
nobody here knows which queries are of one shopper. A query is counted under one plan alone: plans whose days overlap
those of another are declined. The ledger adds such a plan's cost to all others', though no query pays for two.

Nothing that others can see depends on what is in the log: whether a plan is taken follows from plan, policy and clock
alone. Very many queries of one class are cut at a number of the plan's (`hanse_common.counting`). Nor does a query
change what another is counted as: photos that are counted are recognized one at a time. In one batch they would change
each other's scores in the last bits, and a recognizer can be made for which these bits decide (`recognition.service`).
"""

import logging
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from hanse_common.errors import CatalogError
from hanse_common.modes import TrendsTraining
from hanse_common.plan import Plan

if TYPE_CHECKING:
    from hanse_client.config import ClientConfig

log = logging.getLogger(__name__)

APPLICATION_ID = 0x48616E71
"""Marks the SQLite file as ours ("Hanq")."""

_SCHEMA = (
    "CREATE TABLE query (day TEXT, class TEXT, count INTEGER NOT NULL, PRIMARY KEY (day, class)) STRICT, WITHOUT ROWID",
    "CREATE TABLE used (plan BLOB PRIMARY KEY, first TEXT NOT NULL, end TEXT NOT NULL) STRICT",
)
_TIMEOUT = 10.0  # seconds that one process waits for another's transaction


def today() -> date:
    """Return the day by UTC."""
    return datetime.now(UTC).date()


class QueryLog:
    """The log in the file `path`, made (mode 0600) when missing; days before the last `days` are forgotten.

    Threads and processes may share it. Raises `CatalogError` when the file is damaged, locked or another program's;
    so may all methods.
    """

    def __init__(self, path: Path, days: int, clock: Callable[[], date] = today) -> None:
        self._path = path
        self._days = days
        self._clock = clock
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.touch(mode=0o600)
        except OSError as error:
            raise CatalogError(f"{path}: cannot be made ({error.strerror}).") from None
        with self._transaction() as db:
            (found,) = db.execute("PRAGMA application_id").fetchone()
            if found == 0 and not db.execute("SELECT 1 FROM sqlite_schema").fetchone():
                for statement in _SCHEMA:
                    db.execute(statement)
                db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            elif found != APPLICATION_ID:
                raise CatalogError(
                    f"{path}: found another program's file, expected the query log; move it away."
                )

    @classmethod
    def of(cls, config: "ClientConfig") -> Self | None:
        """Return the shop's log, or None unless the policy allows plans of mode `trends`.

        An owner who allows it no longer gets rid of all counts. A log that can't be used is named in this machine's own
        log, and harms nothing else: no query is counted, and plans of mode `trends` are declined.
        """
        path, allowed = config.state / "queries.sqlite", "trends" in config.policy.modes
        if not allowed and not path.exists():
            return None
        try:
            queries = cls(path, config.policy.trends_days)
            if allowed:
                return queries
            queries.clear()
        except CatalogError:
            log.exception("The counts of queries can't be %s.", "kept" if allowed else "deleted")
        return None

    def clear(self) -> None:
        """Delete all counts; which days were counted under which plan stays known."""
        with self._transaction() as db:
            db.execute("DELETE FROM query")

    def note(self, label: str) -> None:
        """Count one query photo of the class `label` today."""
        with self._transaction() as db:
            self._forget(db)
            db.execute(
                "INSERT INTO query VALUES (?, ?, 1) ON CONFLICT DO UPDATE SET count = count + 1",
                (self._clock().isoformat(), label),
            )

    def open_to(self, plan: Plan) -> bool:
        """Return whether the plan's days are over, are all kept still, and are no other plan's: of no query's content.

        Raises `ValueError` for a plan of another mode.
        """
        training = _trends(plan)
        if training.end > self._clock() or training.first < self._clock() - timedelta(days=self._days):
            return False
        with self._transaction() as db:
            return not self._of_another(db, plan, training)

    def take(self, plan: Plan) -> NDArray[np.int64]:
        """Return the plan's counts, (K,), and let no other plan have them; zeros for days that another plan has."""
        training, classes = _trends(plan), plan.taxonomy.classes
        counts = np.zeros(len(classes), dtype=np.int64)
        with self._transaction() as db:
            self._forget(db)
            if self._of_another(db, plan, training):
                return counts
            days = (training.first_day, training.end.isoformat())
            db.execute("INSERT OR IGNORE INTO used VALUES (?, ?, ?)", (plan.digest, *days))
            rows = db.execute(
                "SELECT class, sum(count) FROM query WHERE day >= ? AND day < ? GROUP BY class", days
            )
            for label, count in rows:
                if label in classes:
                    counts[classes.index(label)] = count
        return counts

    def _of_another(self, db: sqlite3.Connection, plan: Plan, training: TrendsTraining) -> bool:
        """Return whether some of the plan's days were counted under another plan."""
        found = db.execute(
            "SELECT 1 FROM used WHERE plan != ? AND first < ? AND end > ?",
            (plan.digest, training.end.isoformat(), training.first_day),
        ).fetchone()
        return found is not None

    def _forget(self, db: sqlite3.Connection) -> None:
        db.execute(
            "DELETE FROM query WHERE day < ?", ((self._clock() - timedelta(days=self._days)).isoformat(),)
        )

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Yield a connection in a transaction; what is deleted in it is overwritten."""
        with self._lock:
            try:
                db = sqlite3.connect(self._path, timeout=_TIMEOUT, isolation_level=None)
                try:
                    db.execute("PRAGMA secure_delete = ON")
                    db.execute("BEGIN IMMEDIATE")
                    yield db
                    db.execute("COMMIT")
                finally:
                    db.close()
            except sqlite3.Error as error:
                raise CatalogError(
                    f"{self._path}: cannot be used ({error}); move it away, and a new one is begun."
                ) from None


def _trends(plan: Plan) -> TrendsTraining:
    if not isinstance(plan.training, TrendsTraining):
        raise ValueError(f"Expected a plan of mode trends, found {plan.training.mode}.")
    return plan.training
