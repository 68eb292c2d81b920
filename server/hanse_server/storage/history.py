"""What happened, for the operator's page, commands and questions later: runs, blocks, directories, figures, spend.

    history = History(database)
    run = history.begin_run(plan.digest, after=20)
    history.open_block(run, plan.digest, block, draw)
    history.end_run(run, "finished")

Nothing here decides what is trained: that is `hanse_server.storage.progress`.
"""

import hashlib
import itertools
import json
from collections.abc import Collection, Mapping
from typing import Any

from sqlalchemy import func, select

from hanse_common.directory import Directory
from hanse_server.storage.audit_log import append
from hanse_server.storage.database import Database
from hanse_server.storage.schema import (
    BlockRecord,
    DirectoryRecord,
    EvaluationRecord,
    MerchantRecord,
    PlanRecord,
    RoundRecord,
    RunRecord,
    plain,
)

MAX_REASON = 1000
"""In characters: in the audit log, each may take twelve."""


class History:
    """Writes and finds records of what happened. Raises `StorageError` as the database does."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def begin_run(self, plan_digest: bytes, after: int) -> int:
        """Record that work on a plan goes on after `after` rounds, and return the run's number.

        What an earlier process left unfinished is then lost: only one works on a state at a time.
        """
        now = self._database.clock()
        with self._database.transaction() as session:
            for lost in session.scalars(select(RunRecord).where(RunRecord.state == "running")).all():
                self._database.move(session, RunRecord, "lost", number=lost.number)
                session.refresh(lost)
                lost.ended = now
            unfinished = BlockRecord.state.in_(("gathering", "open"))
            for block in session.scalars(select(BlockRecord).where(unfinished)).all():
                self._database.move(session, BlockRecord, "lost", id=block.id)
                session.refresh(block)
                block.closed = now
            run = RunRecord(plan=plan_digest.hex(), state="running", begun=now, ended=None, after=after)
            session.add(run)
            session.flush()
            append(session, now, "run-begun", {"run": run.number, "plan": run.plan, "after": after})
            return run.number

    def end_run(self, number: int, state: str, reason: str = "") -> None:
        """Record how a run ended: finished, stopped or failed."""
        with self._database.transaction() as session:
            self._database.move(session, RunRecord, state, number=number)
            run = session.get_one(RunRecord, number, populate_existing=True)
            run.ended, run.reason = self._database.clock(), plain(reason, MAX_REASON)
            append(session, run.ended, "run-ended", {"run": number, "state": state, "reason": run.reason})

    def request_stop(self) -> int | None:
        """Ask the run that is going on, if any, to stop; return its number."""
        with self._database.transaction() as session:
            run = session.scalar(select(RunRecord).where(RunRecord.state == "running"))
            if run is None:
                return None
            run.stop_requested = True
            append(session, self._database.clock(), "stop-requested", {"run": run.number})
            return run.number

    def stop_requested(self, number: int) -> bool:
        """Return whether somebody asked that run to stop."""
        with self._database.reading() as session:
            return session.get_one(RunRecord, number).stop_requested

    def last_run(self) -> RunRecord | None:
        """Return the latest run, going on or not."""
        with self._database.reading() as session:
            return session.scalar(select(RunRecord).order_by(RunRecord.number.desc()).limit(1))

    def lost_in_a_row(self, plan_digest: bytes, after: int) -> int:
        """Return how many of the latest runs of a plan were lost, or are going on, with no round done in them.

        `after` is how many rounds are done now. A run that is going on counts when its process is gone.
        """
        wanted = select(RunRecord).where(RunRecord.plan == plan_digest.hex())
        with self._database.reading() as session:
            runs = session.scalars(wanted.order_by(RunRecord.number.desc()).limit(100)).all()
        fruitless = itertools.takewhile(
            lambda run: run.state in ("running", "lost") and run.after == after, runs
        )
        return sum(1 for _ in fruitless)

    def blocks(self, plan_digest: bytes) -> int:
        """Return how many blocks were opened for a plan: the index of the next one."""
        with self._database.reading() as session:
            count = select(func.count()).select_from(BlockRecord).where(BlockRecord.plan == plan_digest.hex())
            return session.scalar(count) or 0

    def open_block(self, run: int, plan_digest: bytes, block: bytes, draw: Mapping[str, Any]) -> None:
        """Record a block before anybody is asked; `draw` says who is, and why in that order."""
        with self._database.transaction() as session:
            session.add(
                BlockRecord(
                    id=block.hex(),
                    run=run,
                    plan=plan_digest.hex(),
                    state="gathering",
                    opened=self._database.clock(),
                    closed=None,
                    draw=dict(draw),
                    connected=[],
                )
            )
            drawn = hashlib.sha256(json.dumps(dict(draw), sort_keys=True).encode()).hexdigest()
            facts = {"block": block.hex(), "run": run, "plan": plan_digest.hex(), "draw": drawn}
            append(session, self._database.clock(), "block", facts)

    def move_block(self, block: bytes, state: str, connected: Collection[str] | None = None) -> None:
        """Record that a block is open, closed or failed, and who is there when it opens."""
        with self._database.transaction() as session:
            self._database.move(session, BlockRecord, state, id=block.hex())
            record = session.get_one(BlockRecord, block.hex(), populate_existing=True)
            if connected is not None:
                record.connected = sorted(connected)
            if state != "open":
                record.closed = self._database.clock()

    def spent(self, name: str, epsilon: float) -> None:
        """Record the ε that a merchant says it spent in all."""
        with self._database.transaction() as session:
            session.merge(MerchantRecord(name=name, epsilon=epsilon, said=self._database.clock()))

    def see_directory(self, directory: Directory) -> None:
        """Record a version of the directory, once."""
        with self._database.transaction() as session:
            if session.get(DirectoryRecord, directory.digest.hex()) is None:
                session.add(
                    DirectoryRecord(
                        digest=directory.digest.hex(),
                        version=directory.version,
                        members=sorted(entry.name for entry in directory.entries),
                        expires=float(directory.expires),
                        seen=self._database.clock(),
                    )
                )
                facts = {"directory": directory.digest.hex(), "version": directory.version}
                append(session, self._database.clock(), "directory", facts)

    def evaluations(self, training: bytes) -> list[EvaluationRecord]:
        """Return all figures of a training's models, in order."""
        with self._database.reading() as session:
            wanted = select(EvaluationRecord).where(EvaluationRecord.training == training.hex())
            return list(session.scalars(wanted.order_by(EvaluationRecord.after, EvaluationRecord.number)))

    def sums(self, mode: str) -> list[tuple[bytes, int]]:
        """Return the signed plans of a mode whose first round has a sum, and how many merchants are in it, in order."""
        with self._database.reading() as session:
            wanted = (
                select(PlanRecord.signed, RoundRecord.survivors)
                .join(RoundRecord, RoundRecord.plan == PlanRecord.digest)
                .where(PlanRecord.mode == mode, RoundRecord.number == 0)
            )
            return [(row[0], row[1]) for row in session.execute(wanted.order_by(RoundRecord.released))]

    def evaluation_of(self, model: bytes) -> EvaluationRecord | None:
        """Return the latest figures of the model with this digest."""
        with self._database.reading() as session:
            wanted = select(EvaluationRecord).where(EvaluationRecord.model == model.hex())
            return session.scalar(wanted.order_by(EvaluationRecord.number.desc()).limit(1))
