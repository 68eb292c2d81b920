"""The league's recognizers: versions with their lineage, and which one is released.

    versions = Versions(database, objects)
    made = versions.add(folder, plan.digest, parent=None)           # a candidate
    versions.release(made.digest, signed_release, number, reason)   # the league's now
    versions.export(made.digest, target)

A version is known by the digest of its card, which names every other file. Files are objects, so equal ones are kept
once. Which version is released says a statement with the operator's signature: `hanse_common.release`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from sqlalchemy import func, select

from hanse_common import wire
from hanse_common.errors import ConfigError, StorageError
from hanse_common.files import PUBLIC, read_bounded, write_atomically
from hanse_common.release import FILES, SignedRelease
from hanse_server.storage.audit_log import append
from hanse_server.storage.database import Database
from hanse_server.storage.objects import MAX_OBJECT_BYTES, Objects
from hanse_server.storage.schema import AuditRecord, ReleaseRecord, VersionRecord, plain

CARD = "card.json"

SKIPPED_RELEASES = 1000
"""Numbers of releases that are left out after a backup was restored."""
MAX_REASON = 500


@dataclass(frozen=True)
class Version:
    """One version: its number, its digests (hexadecimal), its state, its files' digests by name."""

    number: int
    digest: str
    plan: str
    parent: str | None
    state: str
    files: dict[str, str]
    model: str
    made: float

    @classmethod
    def of(cls, record: VersionRecord) -> "Version":
        """Return what a record says."""
        return cls(
            record.number,
            record.digest,
            record.plan,
            record.parent,
            record.state,
            dict(record.files),
            record.model,
            record.made,
        )


class Versions:
    """Writes and finds versions. Raises `StorageError` as database and objects do."""

    def __init__(self, database: Database, objects: Objects) -> None:
        self._database = database
        self._objects = objects

    def add(self, folder: Path, plan_digest: bytes, parent: str | None, model: bytes) -> Version:
        """Keep the recognizer in `folder` as a candidate; `model` is the digest of what was trained. Once only."""
        files = {
            path.name: self._objects.put(
                read_bounded(path, MAX_OBJECT_BYTES, "a recognizer's file", StorageError)
            )
            for path in sorted(folder.iterdir())
            if not path.name.startswith(".")
        }
        digest = files[CARD]
        with self._database.transaction() as session:
            record = session.get(VersionRecord, digest)
            if record is None:
                last = session.scalar(select(func.max(VersionRecord.number)))
                record = VersionRecord(
                    digest=digest,
                    number=(last or 0) + 1,
                    plan=plan_digest.hex(),
                    parent=parent,
                    state="candidate",
                    files=files,
                    model=model.hex(),
                    made=self._database.clock(),
                )
                session.add(record)
                facts = {"version": record.number, "digest": digest, "plan": record.plan, "parent": parent}
                append(session, record.made, "version", facts)
            return Version.of(record)

    def all(self) -> list[Version]:
        """Return all versions, the first one first."""
        with self._database.reading() as session:
            return [
                Version.of(one)
                for one in session.scalars(select(VersionRecord).order_by(VersionRecord.number))
            ]

    def find(self, wanted: str) -> Version:
        """Return the version that `wanted` names: its number, the start of its digest, "released", or "latest".

        Raises `ConfigError` when there is none, or more than one.
        """
        known = self.all()
        match wanted:
            case "latest":
                found = known[-1:]
            case "released":
                found = [one for one in known if one.state == "released"]
            case number if number.isdecimal() and len(number) < 8:
                found = [one for one in known if one.number == int(number)]
            case start:
                found = [one for one in known if len(start) >= 8 and one.digest.startswith(start)]
        if len(found) != 1:
            listed = ", ".join(str(one.number) for one in known) or "none yet"
            raise ConfigError(
                f"version {wanted!r}: found {len(found)}, expected one; versions: {listed}. See hanse-server versions."
            )
        return found[0]

    def of_plan(self, plan_digest: bytes) -> Version | None:
        """Return the version that a plan's training came to."""
        return next((one for one in self.all() if one.plan == plan_digest.hex()), None)

    def next_release(self) -> int:
        """Return the number of the next release: after the last one, and well after it once a backup was restored.

        What was released since the backup is forgotten here and not by merchants, who take later numbers only.
        """
        with self._database.reading() as session:
            last = session.scalar(select(ReleaseRecord).order_by(ReleaseRecord.number.desc()).limit(1))
            since = select(AuditRecord.sequence).where(AuditRecord.kind == "restored")
            if last is not None:
                since = since.where(AuditRecord.time >= last.made)
            restored = session.scalar(since.limit(1)) is not None
        return (last.number if last else 0) + 1 + (SKIPPED_RELEASES if restored else 0)

    def release(
        self,
        digest: str,
        signed: SignedRelease,
        number: int,
        reason: str,
        *,
        back: bool,
        judged: bool = True,
    ) -> None:
        """Record that `digest` is the league's recognizer from now on, by the statement `signed` of that `number`.

        The version before becomes superseded, or, when it is taken `back`, withdrawn, which is for good. `judged` is
        whether its figures passed.
        """
        with self._database.transaction() as session:
            before = session.scalar(select(VersionRecord).where(VersionRecord.state == "released"))
            if before is not None and before.digest != digest:
                state = "withdrawn" if back else "superseded"
                self._database.move(session, VersionRecord, state, digest=before.digest)
            if before is None or before.digest != digest:
                self._database.move(session, VersionRecord, "released", digest=digest)
            session.add(
                ReleaseRecord(
                    number=number,
                    version=digest,
                    signed=wire.encode(signed),
                    reason=plain(reason, MAX_REASON),
                    made=self._database.clock(),
                )
            )
            facts = {"number": number, "digest": digest, "back": back, "judged": judged}
            facts["reason"] = plain(reason, MAX_REASON)
            append(session, self._database.clock(), "release", facts)

    def releases(self) -> Sequence[ReleaseRecord]:
        """Return all statements, the first one first."""
        with self._database.reading() as session:
            return session.scalars(select(ReleaseRecord).order_by(ReleaseRecord.number)).all()

    def current(self) -> SignedRelease | None:
        """Return the latest statement."""
        releases = self.releases()
        return wire.decode(SignedRelease, releases[-1].signed) if releases else None

    def open(self, digest: str) -> BinaryIO:
        """Return a file, open to be read, by its digest."""
        return self._objects.open(digest)

    def file(self, digest: str) -> bytes:
        """Return a file's content by its digest."""
        return self._objects.get(digest)

    def export(self, digest: str, folder: Path) -> None:
        """Write a version's files to the new folder `folder`. Raises `ConfigError` when it exists or can't be made."""
        version = self.find(digest)
        try:
            folder.mkdir(parents=True)
            for name, content in version.files.items():
                if name not in FILES:
                    raise StorageError(
                        f"version {version.number}: found a file {name!r:.80}, expected {FILES}."
                    )
                write_atomically(folder / name, self._objects.get(content), PUBLIC)
        except OSError as error:
            raise ConfigError(f"{folder}: cannot be made ({error.strerror}); name a new folder.") from None
