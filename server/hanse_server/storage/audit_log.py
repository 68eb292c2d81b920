"""The audit log in the database: entries are added beside what they are about, in the same transaction.

    with database.transaction() as session:
        session.add(release)
        append(session, database.clock(), "release", {"number": 3})
    verify(AuditLog(database).entries())

The chain itself is in `hanse_server.audit`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from hanse_server.audit import AuditEntry, link
from hanse_server.storage.database import Database
from hanse_server.storage.schema import AuditRecord


def append(session: Session, time: float, kind: str, facts: Mapping[str, Any]) -> None:
    """Add an entry within the session's transaction, in which nobody else writes.

    Raises `ValueError` as `hanse_server.audit.link` does.
    """
    session.flush()
    last = session.scalar(select(AuditRecord).order_by(AuditRecord.sequence.desc()).limit(1))
    session.add(AuditRecord(**asdict(link(None if last is None else _entry(last), kind, facts, time))))
    session.flush()


class AuditLog:
    """The log as a whole. Raises `StorageError` as the database does."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def append(self, kind: str, **facts: Any) -> None:
        """Add an entry of its own."""
        with self._database.transaction() as session:
            append(session, self._database.clock(), kind, facts)

    def entries(self) -> Iterator[AuditEntry]:
        """Yield all entries in order."""
        with self._database.reading() as session:
            for record in session.scalars(select(AuditRecord).order_by(AuditRecord.sequence)).yield_per(1000):
                yield _entry(record)

    def latest(self, count: int) -> list[AuditEntry]:
        """Return the last `count` entries, the newest first."""
        with self._database.reading() as session:
            wanted = select(AuditRecord).order_by(AuditRecord.sequence.desc()).limit(count)
            return [_entry(record) for record in session.scalars(wanted)]


def _entry(record: AuditRecord) -> AuditEntry:
    return AuditEntry(record.sequence, record.time, record.kind, record.facts, record.previous, record.hash)
