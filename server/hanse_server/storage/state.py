"""Everything that one server must not forget, in one place: its folder and its database.

with State.open(folder) as state:
    progress = state.progress(signed_plan, plan)
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from sqlalchemy import URL, func, select

from hanse_common.errors import StorageError
from hanse_common.plan import Plan, SignedPlan
from hanse_server.storage.audit_log import AuditLog
from hanse_server.storage.database import Database, locked
from hanse_server.storage.history import History
from hanse_server.storage.objects import Objects
from hanse_server.storage.progress import Checkpoint, Progress, find_checkpoint
from hanse_server.storage.schema import PlanRecord, Record
from hanse_server.storage.versions import Versions

DATABASE_FILE = "hanse.sqlite"

NAMING_OBJECTS = ("checkpoint", "round", "plan", "version")
"""The tables whose rows name objects."""


@dataclass(frozen=True)
class State:
    """Records and objects of one server."""

    folder: Path
    database: Database
    objects: Objects

    @classmethod
    def open(cls, folder: Path, url: str | None = None) -> Self:
        """Return the state in `folder`, made when missing, with its records in the database at `url`.

        By default that is a SQLite file in the folder. Raises `StorageError`, also when there are objects and the
        database knows nothing of them: they would be taken for leftovers.
        """
        objects = Objects(folder / "objects")
        database = Database(storage_url(folder, url))
        with database.reading() as session:
            new = not session.scalar(select(func.count()).select_from(PlanRecord))
        if new and next(objects.present(), None) is not None:
            database.close()
            raise StorageError(
                f"{folder / 'objects'}: holds objects, of which {database.name} knows nothing. Name the database that "
                "they belong to under service.storage, or restore a backup into an empty folder."
            )
        return cls(folder, database, objects)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.database.close()

    @property
    def history(self) -> History:
        """What happened."""
        return History(self.database)

    @property
    def versions(self) -> Versions:
        """The league's recognizers."""
        return Versions(self.database, self.objects)

    @property
    def audit(self) -> AuditLog:
        """The audit log."""
        return AuditLog(self.database)

    def progress(self, signed_plan: SignedPlan, plan: Plan) -> Progress:
        """Return one plan's progress."""
        return Progress(self.database, self.objects, signed_plan, plan)

    def checkpoint(self, plan_digest: bytes) -> Checkpoint | None:
        """Return a plan's checkpoint, or None when there is none yet. Raises `StorageError` when it is damaged."""
        return find_checkpoint(self.database, self.objects, plan_digest)

    def collect(self) -> int:
        """Delete the objects that no record names; return how many. Only for whoever holds `alone`."""
        with self.database.reading() as session:
            tables = {
                table.name: [dict(row) for row in session.execute(select(table)).mappings()]
                for table in (Record.metadata.tables[name] for name in NAMING_OBJECTS)
            }
        return self.objects.collect(self.named(tables))

    def named(self, tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> set[str]:
        """Return the digests of the objects that the rows of `tables` name."""
        kept = {row["object"] for row in tables["checkpoint"]}
        kept |= {row["update"] for row in tables["round"] if row["state"] == "released"}
        for row in tables["plan"]:
            kept |= set(row["start"].values())
        for row in tables["version"]:
            kept |= set(row["files"].values())
        return kept

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Be the only process that trains on this state while entered. Raises `StorageError` when another does."""
        with locked(self.folder / "lock", str(self.folder)), self.database.alone():
            yield


def storage_url(folder: Path, url: str | None) -> str | URL:
    """Return the URL of the database of the state in `folder`: `url`, or by default a SQLite file in it."""
    return url or URL.create("sqlite", database=str(folder.resolve() / DATABASE_FILE))
