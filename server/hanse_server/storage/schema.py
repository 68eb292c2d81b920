"""The tables, and the states that a record may go through. server/DATA_MODEL.md says what each means.

Times are seconds since 1970, digests and identities hexadecimal digits. A record never goes back to a state that it
left, but for a version that is released again: `TRANSITIONS` names all steps there are, and
`hanse_server.storage.database.Database.move` takes no other.
"""

from collections.abc import Mapping
from typing import Any

from sqlalchemy import JSON, CheckConstraint, ForeignKey, Index, LargeBinary, MetaData, String, Text, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

TRANSITIONS: Mapping[str, Mapping[str, frozenset[str]]] = {
    "run": {"running": frozenset({"finished", "stopped", "failed", "lost"})},
    "block": {
        "gathering": frozenset({"open", "failed", "lost"}),
        "open": frozenset({"closed", "failed", "lost"}),
    },
    "attempt": {
        "begun": frozenset({"released", "lost"}),
        "released": frozenset({"spent"}),
    },
    "round": {"released": frozenset({"applied"})},
    "version": {
        "candidate": frozenset({"released"}),
        "released": frozenset({"superseded", "withdrawn"}),
        "superseded": frozenset({"released"}),
        "withdrawn": frozenset(),
    },
}
"""For each record, the states that may follow a state. What is left out is final."""

NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "pk": "pk_%(table_name)s",
    "uq": "uq_%(table_name)s_%(column_0_name)s",
}


class Record(DeclarativeBase):
    """Base of all records."""

    metadata = MetaData(naming_convention=NAMING)
    type_annotation_map = {dict[str, Any]: JSON, list[str]: JSON, bytes: LargeBinary}  # noqa: RUF012 - SQLAlchemy's


def _states(record: str) -> CheckConstraint:
    follow = TRANSITIONS[record]
    states = sorted(set(follow) | {state for after in follow.values() for state in after})
    return CheckConstraint(f"state IN ({', '.join(repr(state) for state in states)})", name="state")


def _only_one(record: str, state: str) -> Index:
    """Return the index by which at most one record is in `state`."""
    where = text(f"state = '{state}'")
    return Index(f"uq_{record}_{state}", "state", unique=True, sqlite_where=where, postgresql_where=where)


def plain(words: str, length: int) -> str:
    """Return `words` as a column of `length` characters takes them: cut, and without what PostgreSQL can't keep."""
    return words.encode("utf-8", "replace").decode().replace("\0", "?")[:length]


class PlanRecord(Record):
    """A signed plan, once the server has worked with it. It never changes.

    `start` is where its training began: the object of the first model, and of the card of the recognizer that it goes
    on from, if any; empty before.
    """

    __tablename__ = "plan"

    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    league: Mapped[str] = mapped_column(String(63))
    mode: Mapped[str] = mapped_column(String(32))
    rounds: Mapped[int]
    signed: Mapped[bytes]
    start: Mapped[dict[str, Any]]
    seen: Mapped[float]


class RunRecord(Record):
    """One time that the server worked on a plan, from its start to its end or loss."""

    __tablename__ = "run"
    __table_args__ = (_states("run"), _only_one("run", "running"))

    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    plan: Mapped[str] = mapped_column(ForeignKey("plan.digest"), index=True)
    state: Mapped[str] = mapped_column(String(16))
    begun: Mapped[float]
    ended: Mapped[float | None]
    after: Mapped[int]
    reason: Mapped[str] = mapped_column(String(2000), default="")
    stop_requested: Mapped[bool] = mapped_column(default=False)


class BlockRecord(Record):
    """Rounds in a row for which the same merchants were asked. `draw` says who was, in which order, and why."""

    __tablename__ = "block"
    __table_args__ = (_states("block"),)

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    run: Mapped[int] = mapped_column(ForeignKey("run.number"), index=True)
    plan: Mapped[str] = mapped_column(ForeignKey("plan.digest"))
    state: Mapped[str] = mapped_column(String(16))
    opened: Mapped[float]
    closed: Mapped[float | None]
    draw: Mapped[dict[str, Any]]
    connected: Mapped[list[str]]


class AttemptRecord(Record):
    """A set-up of secure aggregation. Its number is recorded before a merchant hears of it, and only grows."""

    __tablename__ = "attempt"
    __table_args__ = (_states("attempt"),)

    plan: Mapped[str] = mapped_column(ForeignKey("plan.digest"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    state: Mapped[str] = mapped_column(String(16))
    begun: Mapped[float]
    ended: Mapped[float | None]


class RoundRecord(Record):
    """A round whose sum was opened. `update` is the object that holds it, `applied` when the model had it in it.

    Of an evaluation, `subject` says which model it is of: the training, after how many rounds, the model's digest.
    """

    __tablename__ = "round"
    __table_args__ = (_states("round"),)

    plan: Mapped[str] = mapped_column(ForeignKey("plan.digest"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    state: Mapped[str] = mapped_column(String(16))
    attempt: Mapped[int]
    update: Mapped[str] = mapped_column(String(64))
    survivors: Mapped[int]
    subject: Mapped[dict[str, Any]]
    norm: Mapped[float]
    bound: Mapped[float | None]
    seconds: Mapped[float]
    released: Mapped[float]
    applied: Mapped[float | None]


class ParticipantRecord(Record):
    """What one merchant did in one round: uploaded, dropped, declined, blamed. `detail` is a code or a reason."""

    __tablename__ = "participant"
    __table_args__ = (CheckConstraint("role IN ('blamed', 'declined', 'dropped', 'uploaded')", name="role"),)

    plan: Mapped[str] = mapped_column(ForeignKey("plan.digest"), primary_key=True)
    round: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(63), primary_key=True, index=True)
    role: Mapped[str] = mapped_column(String(16))
    detail: Mapped[str] = mapped_column(String(500), default="")


class MerchantRecord(Record):
    """What a merchant said last of what it has spent in all, because its policy lets it say so."""

    __tablename__ = "merchant"

    name: Mapped[str] = mapped_column(String(63), primary_key=True)
    epsilon: Mapped[float]
    said: Mapped[float]


class CheckpointRecord(Record):
    """All that is needed to go on with a plan after `rounds_done` rounds, in one object."""

    __tablename__ = "checkpoint"

    plan: Mapped[str] = mapped_column(ForeignKey("plan.digest"), primary_key=True)
    rounds_done: Mapped[int]
    object: Mapped[str] = mapped_column(String(64))
    saved: Mapped[float]


class GapRecord(Record):
    """Rounds of a plan, from 0 to before `until`, that are asked for no more: merchants may have paid for them already.

    A restored backup does not know what became of rounds that were run after it.
    """

    __tablename__ = "gap"

    plan: Mapped[str] = mapped_column(ForeignKey("plan.digest"), primary_key=True)
    until: Mapped[int]
    noted: Mapped[float]


class EvaluationRecord(Record):
    """Figures of the `model` that the plan `training` had `after` so many rounds; `round` of the evaluation `plan`."""

    __tablename__ = "evaluation"
    __table_args__ = (Index("ix_evaluation_subject", "training", "after"),)

    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    training: Mapped[str] = mapped_column(ForeignKey("plan.digest"))
    after: Mapped[int]
    model: Mapped[str] = mapped_column(String(64))
    plan: Mapped[str] = mapped_column(ForeignKey("plan.digest"))
    round: Mapped[int]
    report: Mapped[str] = mapped_column(Text)
    made: Mapped[float]


class VersionRecord(Record):
    """A recognizer, by the digest of its card. Its files are objects: `files` holds their digests by name."""

    __tablename__ = "version"
    __table_args__ = (_states("version"), _only_one("version", "released"))

    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    number: Mapped[int] = mapped_column(unique=True)
    plan: Mapped[str] = mapped_column(ForeignKey("plan.digest"))
    parent: Mapped[str | None] = mapped_column(String(64))
    state: Mapped[str] = mapped_column(String(16))
    files: Mapped[dict[str, Any]]
    model: Mapped[str] = mapped_column(String(64))
    made: Mapped[float]


class ReleaseRecord(Record):
    """A signed statement which version is the league's now. Numbers only grow; to go back is a release, too."""

    __tablename__ = "release"

    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    version: Mapped[str] = mapped_column(ForeignKey("version.digest"))
    signed: Mapped[bytes]
    reason: Mapped[str] = mapped_column(String(500))
    made: Mapped[float]


class DirectoryRecord(Record):
    """A version of the league's directory that the server worked with."""

    __tablename__ = "directory"

    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    version: Mapped[int]
    members: Mapped[list[str]]
    expires: Mapped[float]
    seen: Mapped[float]


class AuditRecord(Record):
    """One entry of the hash-chained audit log; see `hanse_server.audit`."""

    __tablename__ = "audit"

    sequence: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    time: Mapped[float]
    kind: Mapped[str] = mapped_column(String(63))
    facts: Mapped[str] = mapped_column(String(20_000))
    previous: Mapped[str] = mapped_column(String(64))
    hash: Mapped[str] = mapped_column(String(64))
