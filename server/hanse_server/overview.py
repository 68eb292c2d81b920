"""What the records say of the league now: for `hanse-server status` and the operator's page.

    found = overview(state)
    print(found.rounds_done, "of", found.rounds)

Only what was recorded is known here; what goes on at this moment is in `hanse_server.live`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select

from hanse_common.federated_report import FederatedReport
from hanse_server.audit import Head
from hanse_server.storage import State, Version
from hanse_server.storage.schema import (
    CheckpointRecord,
    DirectoryRecord,
    EvaluationRecord,
    MerchantRecord,
    ParticipantRecord,
    PlanRecord,
    RoundRecord,
    RunRecord,
)


@dataclass(frozen=True)
class Overview:
    """The latest run, its plan, and the league around it. Times are seconds since 1970.

    `last_round` holds each merchant's role in it. `figures` are the evaluations of the run's training: after how many
    rounds, and what they found.
    """

    run: RunRecord | None
    mode: str
    rounds: int
    rounds_done: int
    last_round: Mapping[str, str] | None
    last_round_at: float | None
    directory: DirectoryRecord | None
    spent: Mapping[str, float]
    figures: tuple[tuple[int, FederatedReport], ...]
    versions: tuple[Version, ...]
    audit_head: str

    @property
    def released(self) -> Version | None:
        """The league's recognizer now."""
        return next((one for one in self.versions if one.state == "released"), None)

    def to_json(self) -> dict[str, Any]:
        """Return it as what `json.dumps` takes."""
        run = self.run
        return {
            "run": None
            if run is None
            else {
                "number": run.number,
                "state": run.state,
                "plan": run.plan,
                "begun": run.begun,
                "reason": run.reason,
            },
            "mode": self.mode,
            "rounds": self.rounds,
            "rounds_done": self.rounds_done,
            "last_round": self.last_round and dict(self.last_round),
            "last_round_at": self.last_round_at,
            "directory": self.directory
            and {
                "version": self.directory.version,
                "members": self.directory.members,
                "expires": self.directory.expires,
            },
            "spent": dict(self.spent),
            "figures": [
                {"after": after, "report": report.model_dump(mode="json")} for after, report in self.figures
            ],
            "versions": [
                {"number": one.number, "digest": one.digest, "state": one.state} for one in self.versions
            ],
            "audit_head": self.audit_head,
        }


def overview(state: State) -> Overview:
    """Return what the records of `state` say. Raises `StorageError`."""
    with state.database.reading() as session:
        run = session.scalar(select(RunRecord).order_by(RunRecord.number.desc()).limit(1))
        plan = session.get(PlanRecord, run.plan) if run else None
        checkpoint = session.get(CheckpointRecord, run.plan) if run else None
        last = None
        roles: dict[str, str] | None = None
        figures: list[EvaluationRecord] = []
        if run is not None:
            of_plan = RoundRecord.plan == run.plan
            last = session.scalar(
                select(RoundRecord).where(of_plan).order_by(RoundRecord.number.desc()).limit(1)
            )
            wanted = select(EvaluationRecord).where(EvaluationRecord.training == run.plan)
            figures = list(session.scalars(wanted.order_by(EvaluationRecord.after, EvaluationRecord.number)))
        if run is not None and last is not None:
            of_round = (ParticipantRecord.plan == run.plan, ParticipantRecord.round == last.number)
            roles = {
                one.name: one.role for one in session.scalars(select(ParticipantRecord).where(*of_round))
            }
        directory = session.scalar(select(DirectoryRecord).order_by(DirectoryRecord.version.desc()).limit(1))
        spent = {
            one.name: one.epsilon
            for one in session.scalars(select(MerchantRecord).order_by(MerchantRecord.name))
        }
    newest = state.audit.latest(1)
    return Overview(
        run=run,
        mode=plan.mode if plan else "",
        rounds=plan.rounds if plan else 0,
        rounds_done=checkpoint.rounds_done if checkpoint else 0,
        last_round=roles,
        last_round_at=last.released if last else None,
        directory=directory,
        spent=spent,
        figures=tuple((one.after, FederatedReport.from_json(one.report)) for one in figures),
        versions=tuple(state.versions.all()),
        audit_head=str(Head.of(newest[0])) if newest else "",
    )
