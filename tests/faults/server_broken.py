"""Servers with a fault of the kind that the harness is there to find. Each must be found, or the harness is blind."""

from pathlib import Path
from typing import Any

import numpy as np
from server_setting import ServerVariant

from hanse_server.storage import Checkpoint, Progress, State, Version
from hanse_server.storage.audit_log import append
from hanse_server.storage.schema import AttemptRecord, CheckpointRecord, EvaluationRecord, RoundRecord
from hanse_server.training import Training

_HERE = (Path(__file__),)


class DropsEarly(Progress):
    """Deletes what a checkpoint replaces before the records name the new one."""

    def apply(self, checkpoint: Checkpoint) -> None:
        with self._database.reading() as session:
            before = session.get(CheckpointRecord, self._digest)
        if before is not None:
            self._objects.drop({before.object})
        super().apply(checkpoint)


class AppliesInTwoSteps(Progress):
    """Keeps the checkpoint, and then records that the sum is in it."""

    def apply(self, checkpoint: Checkpoint) -> None:
        arrays = {f"optimizer.{name}": array for name, array in checkpoint.optimizer.items()}
        arrays |= {"model": checkpoint.model, "average": checkpoint.average_total}
        arrays["average_count"] = np.array([checkpoint.average_count])
        round_ = checkpoint.rounds_done - 1
        made = self._put(round_, arrays)
        with self._database.transaction() as session:
            before = session.get(CheckpointRecord, self._digest)
            needless = {before.object} if before else set()
            session.merge(CheckpointRecord(plan=self._digest, rounds_done=round_ + 1, object=made, saved=0.0))
        with self._database.transaction() as session:
            self._database.move(session, RoundRecord, "applied", plan=self._digest, number=round_)
            needless.add(session.get_one(RoundRecord, (self._digest, round_)).update)
        self._objects.drop(needless)


class ForgetfulAttempts(Progress):
    """Records an attempt when its sum is open, and not before merchants hear of it."""

    def next_attempt(self) -> int:
        with self._database.reading() as session:
            last = self._last_attempt(session)
        self._late = 0 if last is None else last.number + 1
        return self._late

    def release(self, *arguments: Any, **options: Any) -> None:
        with self._database.transaction() as session:
            session.merge(
                AttemptRecord(plan=self._digest, number=self._late, state="begun", begun=0.0, ended=None)
            )
        super().release(*arguments, **options)


class CountsTwice(Progress):
    """Records an evaluation's figures, and then that its sum is done with."""

    def evaluated(self, round_: int, report: str) -> None:
        subject = self.subject(round_)
        with self._database.transaction() as session:
            session.add(EvaluationRecord(**subject, plan=self._digest, round=round_, report=report, made=0.0))
        with self._database.transaction() as session:
            self._database.move(session, RoundRecord, "applied", plan=self._digest, number=round_)
            append(session, 0.0, "evaluation", {"round": round_})
            update = session.get_one(RoundRecord, (self._digest, round_)).update
        self._objects.drop({update})


class PublishesOnce(Training):
    """Writes the recognizer's folder after its version is recorded, and never again."""

    def publish(self, *arguments: Any, **options: Any) -> Version:
        made = self.state.versions.of_plan(self.plan.digest)
        return super().publish(*arguments, **options) if made is None else made


def _with(kind: type[Progress]) -> ServerVariant:
    class Broken(State):
        def progress(self, *arguments: Any) -> Progress:
            return kind(self.database, self.objects, *arguments)

    return ServerVariant(state=Broken.open, source=_HERE)


BROKEN = {
    "deletes what its records still name": ("after round 1", _with(DropsEarly)),
    "applies a sum in two steps": ("after round 1", _with(AppliesInTwoSteps)),
    "does not record attempts before it asks": ("after round 0", _with(ForgetfulAttempts)),
    "counts an evaluation in two steps": ("after round 2", _with(CountsTwice)),
    "writes the recognizer's folder once": ("tried after round 3", ServerVariant(training=PublishesOnce)),
}
"""By what is wrong: in which phase a crash shows it, and the server."""
