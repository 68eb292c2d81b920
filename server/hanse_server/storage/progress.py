"""How far one plan's training got: attempts, opened sums, and the checkpoint to go on from.

    progress = Progress(database, objects, signed_plan, plan)
    attempt = progress.next_attempt()               # before a merchant hears of it
    progress.release(round_, outcome, seconds)      # as soon as a sum is open
    progress.apply(checkpoint)                      # the model has that sum in it

A round is recorded twice. First its sum, as it was opened, which merchants have paid for; then the model that it
moved. A crash between the two is found at the next start, by `unapplied`, and the same sum is applied then: none is
lost, and none counts twice, because the second record and the checkpoint are one transaction.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from hanse_common import wire
from hanse_common.errors import StorageError
from hanse_common.messages import DeclineCode
from hanse_common.plan import Plan, SignedPlan
from hanse_server.coordinator import RoundOutcome
from hanse_server.storage.audit_log import append
from hanse_server.storage.database import Database
from hanse_server.storage.objects import Objects
from hanse_server.storage.schema import (
    AttemptRecord,
    CheckpointRecord,
    EvaluationRecord,
    GapRecord,
    ParticipantRecord,
    PlanRecord,
    RoundRecord,
    plain,
)

_OPTIMIZER = "optimizer."
MAX_DETAIL = 500


@dataclass(frozen=True)
class Checkpoint:
    """The state after `rounds_done` rounds. Arrays have shape (d,), float64, unless the optimizer says other."""

    rounds_done: int
    model: NDArray[np.float64]
    optimizer: dict[str, NDArray[np.float64]]
    average_total: NDArray[np.float64]
    average_count: int


@dataclass(frozen=True)
class Beginning:
    """A training's first model, shape (d,), float32, and the card of the recognizer that it goes on from, if any."""

    model: NDArray[np.float32]
    card: bytes | None = None


class Progress:
    """One plan's progress. The plan is recorded when it is new."""

    def __init__(self, database: Database, objects: Objects, signed_plan: SignedPlan, plan: Plan) -> None:
        self._database = database
        self._objects = objects
        self.signed_plan = signed_plan
        self.plan = plan
        self._digest = plan.digest.hex()
        with database.transaction() as session:
            if session.get(PlanRecord, self._digest) is None:
                session.add(
                    PlanRecord(
                        digest=self._digest,
                        league=plan.league,
                        mode=plan.training.mode,
                        rounds=plan.training.rounds,
                        signed=wire.encode(signed_plan),
                        start={},
                        seen=database.clock(),
                    )
                )
                append(session, database.clock(), "plan", {"plan": self._digest, "mode": plan.training.mode})

    def start_from(self, made: Callable[[], "Beginning"]) -> "Beginning":
        """Return where this training began; where it did not yet, what `made` returns, once that is recorded."""
        with self._database.reading() as session:
            start = session.get_one(PlanRecord, self._digest).start
        if start:
            card = start.get("card")
            return Beginning(
                self._array(start["model"], "model").astype(np.float32),
                self._objects.get(card) if card else None,
            )
        beginning = made()
        found = {"model": self._objects.put(save({"model": np.ascontiguousarray(beginning.model)}))}
        if beginning.card is not None:
            found["card"] = self._objects.put(beginning.card)
        with self._database.transaction() as session:
            session.get_one(PlanRecord, self._digest).start = found
        return beginning

    def begun(self) -> bool:
        """Return whether any merchant may have heard of a round."""
        with self._database.reading() as session:
            return self._last_attempt(session) is not None

    def next_attempt(self) -> int:
        """Return a number that was never used for this plan, recorded before it is returned. They only grow."""
        now = self._database.clock()
        with self._database.transaction() as session:
            before = self._last_attempt(session)
            number = 0 if before is None else before.number + 1
            if before is not None:
                self._end_attempt(session, before, now)
            session.add(AttemptRecord(plan=self._digest, number=number, state="begun", begun=now, ended=None))
        return number

    def leave_out(self, rounds: int) -> None:
        """Go on with the round `rounds`, from 0, at the earliest: merchants may have paid for those before it.

        For a state that was restored from a backup older than what merchants did. Raises `StorageError` for rounds
        that the plan has not.
        """
        if not 0 <= rounds <= self.plan.training.rounds:
            raise StorageError(
                f"plan {self._digest[:16]}: found {rounds} rounds to leave out, it has {self.plan.training.rounds}."
            )
        now = self._database.clock()
        with self._database.transaction() as session:
            session.merge(GapRecord(plan=self._digest, until=rounds, noted=now))
            append(session, now, "rounds-left-out", {"plan": self._digest, "until": rounds})

    def release(
        self,
        round_: int,
        outcome: RoundOutcome,
        seconds: float = 0.0,
        subject: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Record the sum of the round `round_`, from 0, which took `seconds`, before anything is made of it.

        `subject` says of which model it is, where that is not the plan's own. Raises `StorageError` when the round has
        one already.
        """
        update = self._put(round_, {"update": outcome.update})
        with self._database.transaction() as session:
            last = self._last_attempt(session)
            attempt = None if last is None else last.number
            session.add(
                RoundRecord(
                    plan=self._digest,
                    number=round_,
                    state="released",
                    attempt=-1 if attempt is None else attempt,
                    update=update,
                    survivors=len(outcome.uploaded),
                    subject=dict(subject),
                    norm=outcome.norm,
                    bound=outcome.bound if math.isfinite(outcome.bound) else None,
                    seconds=seconds,
                    released=self._database.clock(),
                    applied=None,
                )
            )
            session.flush()
            participants = tuple(self._participants(round_, outcome))
            session.add_all(participants)
            facts = {
                "plan": self._digest,
                "round": round_,
                "attempt": attempt,
                "update": update,
                "survivors": len(outcome.uploaded),
                "participants": _digest_of(participants),
            }
            append(session, self._database.clock(), "sum-opened", facts)
            if last is not None and last.state == "begun":
                self._database.move(session, AttemptRecord, "released", plan=self._digest, number=attempt)

    def unapplied(self) -> tuple[int, RoundOutcome] | None:
        """Return the round, from 0, whose sum was opened and is not in the checkpoint, and its outcome."""
        with self._database.reading() as session:
            record = session.scalar(
                select(RoundRecord).where(RoundRecord.plan == self._digest, RoundRecord.state == "released")
            )
            if record is None:
                return None
            roles: dict[str, dict[str, str]] = {
                role: {} for role in ("uploaded", "dropped", "declined", "blamed")
            }
            for one in session.scalars(
                select(ParticipantRecord)
                .where(ParticipantRecord.plan == self._digest, ParticipantRecord.round == record.number)
                .order_by(ParticipantRecord.name)
            ):
                roles[one.role][one.name] = one.detail
        return record.number, RoundOutcome(
            update=self._array(record.update, "update"),
            uploaded=tuple(roles["uploaded"]),
            dropped=tuple(roles["dropped"]),
            declined={name: DeclineCode(code) for name, code in roles["declined"].items()},
            blamed=roles["blamed"],
            norm=record.norm,
            bound=math.inf if record.bound is None else record.bound,
        )

    def subject(self, round_: int) -> dict[str, Any]:
        """Return of which model the sum of the round `round_` is; empty for the plan's own."""
        with self._database.reading() as session:
            return session.get_one(RoundRecord, (self._digest, round_)).subject

    def evaluated(self, round_: int, report: str) -> None:
        """Record the figures, JSON, that the released sum of an evaluation's round came to. Raises `StorageError`."""
        now = self._database.clock()
        with self._database.transaction() as session:
            self._database.move(session, RoundRecord, "applied", plan=self._digest, number=round_)
            record = session.get_one(RoundRecord, (self._digest, round_), populate_existing=True)
            record.applied = now
            session.add(
                EvaluationRecord(
                    training=record.subject["training"],
                    after=record.subject["after"],
                    model=record.subject["model"],
                    plan=self._digest,
                    round=round_,
                    report=report,
                    made=now,
                )
            )
            append(session, now, "evaluation", {"plan": self._digest, "round": round_} | record.subject)
        self._objects.drop({record.update})

    def rounds_released(self) -> int:
        """Return how many rounds are used up: their sums were opened, applied or not, or they are left out."""
        with self._database.reading() as session:
            wanted = select(func.max(RoundRecord.number)).where(RoundRecord.plan == self._digest)
            last = session.scalar(wanted)
            return max(0 if last is None else last + 1, self._left_out(session))

    def apply(self, checkpoint: Checkpoint) -> None:
        """Record the checkpoint that holds the last released sum. Raises `StorageError` when none is released."""
        arrays = {_OPTIMIZER + name: array for name, array in checkpoint.optimizer.items()}
        arrays["model"] = checkpoint.model
        arrays["average"] = checkpoint.average_total
        arrays["average_count"] = np.array([checkpoint.average_count])
        round_ = checkpoint.rounds_done - 1
        made = self._put(round_, arrays)
        now = self._database.clock()
        with self._database.transaction() as session:
            self._database.move(session, RoundRecord, "applied", plan=self._digest, number=round_)
            record = session.get_one(RoundRecord, (self._digest, round_), populate_existing=True)
            record.applied = now
            facts = {"plan": self._digest, "round": round_, "checkpoint": made}
            append(session, now, "sum-applied", facts)
            before = session.get(CheckpointRecord, self._digest)
            needless = {record.update} | ({before.object} if before else set())
            session.merge(
                CheckpointRecord(
                    plan=self._digest,
                    rounds_done=checkpoint.rounds_done,
                    object=made,
                    saved=now,
                )
            )
        self._objects.drop(needless - {made})

    def checkpoint(self) -> Checkpoint | None:
        """Return the checkpoint, or None when there is none yet. Raises `StorageError` when it is damaged."""
        return find_checkpoint(self._database, self._objects, self.plan.digest)

    def rounds_done(self) -> int:
        """Return with which round the training goes on, from 0: those before are in the checkpoint, or left out."""
        with self._database.reading() as session:
            record = session.get(CheckpointRecord, self._digest)
            return max(record.rounds_done if record else 0, self._left_out(session))

    def _left_out(self, session: Session) -> int:
        gap = session.get(GapRecord, self._digest)
        return gap.until if gap else 0

    def _last_attempt(self, session: Session) -> AttemptRecord | None:
        wanted = select(AttemptRecord).where(AttemptRecord.plan == self._digest)
        return session.scalar(wanted.order_by(AttemptRecord.number.desc()).limit(1))

    def _end_attempt(self, session: Session, attempt: AttemptRecord, now: float) -> None:
        """Record that no more comes of an attempt; of one that a backup left out nothing is known anyway."""
        after = {"begun": "lost", "released": "spent"}.get(attempt.state)
        if after is not None:
            self._database.move(session, AttemptRecord, after, plan=self._digest, number=attempt.number)
            session.refresh(attempt)
            attempt.ended = now

    def _participants(self, round_: int, outcome: RoundOutcome) -> Iterator[ParticipantRecord]:
        """Yield what each merchant did; who was blamed may also have dropped out, and is recorded once."""
        roles: dict[str, tuple[str, str]] = dict.fromkeys(outcome.dropped, ("dropped", ""))
        roles |= {name: ("declined", code.value) for name, code in outcome.declined.items()}
        roles |= {name: ("blamed", plain(reason, MAX_DETAIL)) for name, reason in outcome.blamed.items()}
        # Whose upload is in the sum took part, whatever else was noted.
        roles |= {
            name: ("uploaded", plain(outcome.blamed.get(name, ""), MAX_DETAIL)) for name in outcome.uploaded
        }
        for name, (role, detail) in sorted(roles.items()):
            yield ParticipantRecord(plan=self._digest, round=round_, name=name, role=role, detail=detail)

    def _put(self, round_: int, arrays: Mapping[str, NDArray[Any]]) -> str:
        """Keep arrays as one object of this plan and round alone: an equal one of another must not go with it."""
        named = {
            "of": f"plan {self._digest} round {round_}"
        }  # one field: safetensors writes several in any order
        return self._objects.put(
            save({name: np.ascontiguousarray(array) for name, array in arrays.items()}, named)
        )

    def _array(self, digest: str, name: str) -> NDArray[Any]:
        try:
            return load(self._objects.get(digest))[name]
        except (SafetensorError, KeyError) as error:
            raise StorageError(
                f"object {digest}: found no {name} ({type(error).__name__}); restore the state from a backup."
            ) from None


def _digest_of(participants: Sequence[ParticipantRecord]) -> str:
    """Return the SHA-256 of who did what, so that the audit log vouches for the records."""
    lines = "".join(f"{one.name} {one.role} {one.detail}\n" for one in participants)
    return hashlib.sha256(lines.encode()).hexdigest()


def find_checkpoint(database: Database, objects: Objects, plan_digest: bytes) -> Checkpoint | None:
    """Return a plan's checkpoint, or None when there is none yet. Raises `StorageError` when it is damaged."""
    with database.reading() as session:
        record = session.get(CheckpointRecord, plan_digest.hex())
    if record is None:
        return None
    data = objects.get(record.object)
    try:
        arrays = load(data)
        count = int(arrays.pop("average_count")[0])
        return Checkpoint(
            rounds_done=record.rounds_done,
            model=arrays.pop("model"),
            average_total=arrays.pop("average"),
            average_count=count,
            optimizer={name.removeprefix(_OPTIMIZER): array for name, array in arrays.items()},
        )
    except (SafetensorError, KeyError, ValueError) as error:
        raise StorageError(
            f"object {record.object}: found no checkpoint ({error}); restore the state from a backup."
        ) from None
