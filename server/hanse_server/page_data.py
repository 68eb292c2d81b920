"""What the operator's page reads from the records: the last rounds, blocks, figures, versions, audit entries.

    reader = Reader(state)
    training = reader.training()
    rounds = reader.rounds(training.plan_digest, last=60)
    reliability(rounds)                                      # how often each merchant uploaded, dropped, declined

Every question is bounded, whatever the database holds. Nothing here is a number of one merchant's photos: there is none
in the records.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from sqlalchemy import func, select

from hanse_common import wire
from hanse_common.errors import StorageError, WireError
from hanse_common.federated_report import FederatedReport, Figure
from hanse_common.plan import MAX_PLAN_BYTES, Plan, SignedPlan
from hanse_server.audit import AuditEntry
from hanse_server.storage import State, Version
from hanse_server.storage.schema import (
    BlockRecord,
    CheckpointRecord,
    DirectoryRecord,
    EvaluationRecord,
    MerchantRecord,
    ParticipantRecord,
    PlanRecord,
    ReleaseRecord,
    RoundRecord,
    RunRecord,
    VersionRecord,
)

ROLES = ("uploaded", "dropped", "declined", "blamed")
"""What a merchant can have done in a round."""

MAX_MERCHANTS = 1000
MAX_VERSIONS = 100
MAX_EVALUATIONS = 100
REPORTS_KEPT = 8


@dataclass(frozen=True)
class TrainingView:
    """The latest run and its plan. `digest` is the plan's, "" before the first run; `plan` None if damaged."""

    run: RunRecord | None = None
    digest: str = ""
    mode: str = ""
    rounds: int = 0
    rounds_done: int = 0
    plan: Plan | None = None
    evaluation: Plan | None = None
    directory: DirectoryRecord | None = None


@dataclass(frozen=True)
class RoundView:
    """A round whose sum was opened. `number` counts from 1; `roles` holds for each role the names and details."""

    number: int
    released: float
    seconds: float
    norm: float
    bound: float | None
    roles: Mapping[str, Mapping[str, str]]

    def count(self, role: str) -> int:
        """Return how many merchants had `role`."""
        return len(self.roles[role])


@dataclass(frozen=True)
class Reliability:
    """In how many of some rounds one merchant had each role."""

    name: str
    counts: Mapping[str, int]

    @property
    def asked(self) -> int:
        """In how many rounds it was asked."""
        return sum(self.counts.values())

    @property
    def share(self) -> float:
        """In which part of them its upload came."""
        return self.counts["uploaded"] / self.asked if self.asked else 0.0


@dataclass(frozen=True)
class Tried:
    """One evaluation: its number, after how many rounds, when, and its main figures."""

    number: int
    after: int
    made: float
    accuracy: Figure | None
    loss: Figure | None


@dataclass(frozen=True)
class Releases:
    """The league's recognizers, the newest first, and the operator's statements, the newest first."""

    versions: tuple[Version, ...]
    releases: tuple[ReleaseRecord, ...]

    @property
    def released(self) -> Version | None:
        """The league's recognizer now."""
        return next((one for one in self.versions if one.state == "released"), None)

    @property
    def candidate(self) -> Version | None:
        """The newest version that waits to be released, unless a later one is released already."""
        newest = next((one for one in self.versions if one.state in ("candidate", "released")), None)
        return newest if newest is not None and newest.state == "candidate" else None


class Reader:
    """Asks the records of `state`. Every method raises `StorageError`, and may be called from any thread."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._plan = lru_cache(maxsize=16)(_plan_of)
        self._report = lru_cache(maxsize=REPORTS_KEPT)(self._load_report)
        self._tried = lru_cache(maxsize=2 * MAX_EVALUATIONS)(self._load_tried)

    def reachable(self) -> bool:
        """Return whether the database answers."""
        with self._state.database.reading() as session:
            return session.scalar(select(1)) == 1

    def training(self) -> TrainingView:
        """Return the latest run, its plan, and what belongs to it."""
        with self._state.database.reading() as session:
            directory = session.scalar(
                select(DirectoryRecord).order_by(DirectoryRecord.version.desc()).limit(1)
            )
            run = session.scalar(select(RunRecord).order_by(RunRecord.number.desc()).limit(1))
            if run is None:
                return TrainingView(directory=directory)
            plan = session.get_one(PlanRecord, run.plan)
            checkpoint = session.get(CheckpointRecord, run.plan)
            wanted = select(PlanRecord).where(
                PlanRecord.mode == "evaluation", PlanRecord.league == plan.league
            )
            evaluation = session.scalar(wanted.order_by(PlanRecord.seen.desc()).limit(1))
        return TrainingView(
            run=run,
            digest=run.plan,
            mode=plan.mode,
            rounds=plan.rounds,
            rounds_done=checkpoint.rounds_done if checkpoint else 0,
            plan=self._plan(plan.signed),
            evaluation=None if evaluation is None else self._plan(evaluation.signed),
            directory=directory,
        )

    def rounds(self, plan: str, last: int) -> list[RoundView]:
        """Return the `last` rounds of the plan with this digest, the earliest first."""
        with self._state.database.reading() as session:
            wanted = select(RoundRecord).where(RoundRecord.plan == plan)
            found = list(session.scalars(wanted.order_by(RoundRecord.number.desc()).limit(last)))[::-1]
            if not found:
                return []
            of_them = (ParticipantRecord.plan == plan, ParticipantRecord.round >= found[0].number)
            roles: dict[int, dict[str, dict[str, str]]] = {
                one.number: {role: {} for role in ROLES} for one in found
            }
            named = select(ParticipantRecord).where(*of_them).order_by(ParticipantRecord.name)
            for one in session.scalars(named.limit(last * MAX_MERCHANTS)):
                if one.round in roles:  # else of a round that was opened just now
                    roles[one.round][one.role][one.name] = one.detail
        return [
            RoundView(one.number + 1, one.released, one.seconds, one.norm, one.bound, roles[one.number])
            for one in found
        ]

    def blocks(self, plan: str, last: int) -> list[BlockRecord]:
        """Return the `last` blocks of the plan with this digest, the newest first."""
        with self._state.database.reading() as session:
            wanted = select(BlockRecord).where(BlockRecord.plan == plan)
            return list(session.scalars(wanted.order_by(BlockRecord.opened.desc()).limit(last)))

    def spent(self) -> list[MerchantRecord]:
        """Return what merchants say that they spent in all, by name."""
        with self._state.database.reading() as session:
            return list(
                session.scalars(select(MerchantRecord).order_by(MerchantRecord.name).limit(MAX_MERCHANTS))
            )

    def evaluations(self, plan: str, last: int = MAX_EVALUATIONS) -> list[Tried]:
        """Return the `last` evaluations of the training with this plan, the earliest first."""
        with self._state.database.reading() as session:
            wanted = select(EvaluationRecord.number).where(EvaluationRecord.training == plan)
            newest = wanted.order_by(EvaluationRecord.after.desc(), EvaluationRecord.number.desc())
            numbers = list(session.scalars(newest.limit(last)))[::-1]
        return [self._tried(number) for number in numbers]

    def report(self, number: int) -> FederatedReport:
        """Return all figures of the evaluation with this number."""
        return self._report(number)

    def accuracies(self, versions: Sequence[Version]) -> dict[str, Figure]:
        """Return the accuracy of each version that was tried and has one, by its digest."""
        found: dict[str, Figure] = {}
        for version in versions:
            with self._state.database.reading() as session:
                wanted = select(func.max(EvaluationRecord.number))
                number = session.scalar(wanted.where(EvaluationRecord.model == version.model))
            accuracy = None if number is None else self._tried(number).accuracy
            if accuracy is not None:
                found[version.digest] = accuracy
        return found

    def releases(self) -> Releases:
        """Return the last versions and releases."""
        with self._state.database.reading() as session:
            versions = session.scalars(
                select(VersionRecord).order_by(VersionRecord.number.desc()).limit(MAX_VERSIONS)
            ).all()
            releases = session.scalars(
                select(ReleaseRecord).order_by(ReleaseRecord.number.desc()).limit(MAX_VERSIONS)
            ).all()
        return Releases(tuple(Version.of(one) for one in versions), tuple(releases))

    def audit(self, last: int) -> list[AuditEntry]:
        """Return the `last` entries of the audit log, the newest first."""
        return self._state.audit.latest(last)

    def _load_report(self, number: int) -> FederatedReport:
        with self._state.database.reading() as session:
            return FederatedReport.from_json(session.get_one(EvaluationRecord, number).report)

    def _load_tried(self, number: int) -> Tried:
        with self._state.database.reading() as session:
            record = session.get_one(EvaluationRecord, number)
        try:
            found = json.loads(
                record.report
            )  # a report of many classes takes long to be validated as a whole
            figures = {
                name: None if found[name] is None else Figure.model_validate(found[name])
                for name in ("accuracy", "log_loss")
            }
        except (ValueError, TypeError, KeyError):
            raise StorageError(
                f"evaluation {number}: found no report in its record; restore the state from a backup."
            ) from None
        return Tried(number, record.after, record.made, figures["accuracy"], figures["log_loss"])


def reliability(rounds: Sequence[RoundView]) -> list[Reliability]:
    """Return how often each merchant had each role in `rounds`, by name."""
    counts: dict[str, Counter[str]] = {}
    for one in rounds:
        for role in ROLES:
            for name in one.roles[role]:
                counts.setdefault(name, Counter())[role] += 1
    return [Reliability(name, counts[name]) for name in sorted(counts)]


def _plan_of(signed: bytes) -> Plan | None:
    """Return the plan in a record, which was verified before it was written; None when it can't be read."""
    try:
        return wire.decode(Plan, wire.decode(SignedPlan, signed).plan, MAX_PLAN_BYTES)
    except WireError:
        return None
