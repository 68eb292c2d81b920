"""The first schema: plans and what became of them, recognizers and releases, the audit log."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

DIGEST = sa.String(64)
NAME = sa.String(63)
STATE = sa.String(16)


def upgrade() -> None:
    op.create_table(
        "plan",
        sa.Column("digest", DIGEST, nullable=False),
        sa.Column("league", NAME, nullable=False),
        sa.Column("mode", sa.String(32), nullable=False),
        sa.Column("rounds", sa.Integer, nullable=False),
        sa.Column("signed", sa.LargeBinary, nullable=False),
        sa.Column("start", sa.JSON, nullable=False),
        sa.Column("seen", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("digest", name="pk_plan"),
    )
    op.create_table(
        "run",
        sa.Column("number", sa.Integer, autoincrement=True, nullable=False),
        sa.Column("plan", DIGEST, nullable=False),
        sa.Column("state", STATE, nullable=False),
        sa.Column("begun", sa.Double, nullable=False),
        sa.Column("ended", sa.Double),
        sa.Column("after", sa.Integer, nullable=False),
        sa.Column("reason", sa.String(2000), nullable=False),
        sa.Column("stop_requested", sa.Boolean, nullable=False),
        _states("run", "failed", "finished", "lost", "running", "stopped"),
        _of_plan("run"),
        sa.PrimaryKeyConstraint("number", name="pk_run"),
    )
    op.create_index("ix_run_plan", "run", ["plan"])
    op.create_table(
        "block",
        sa.Column("id", sa.String(32), nullable=False),
        sa.Column("run", sa.Integer, nullable=False),
        sa.Column("plan", DIGEST, nullable=False),
        sa.Column("state", STATE, nullable=False),
        sa.Column("opened", sa.Double, nullable=False),
        sa.Column("closed", sa.Double),
        sa.Column("draw", sa.JSON, nullable=False),
        sa.Column("connected", sa.JSON, nullable=False),
        _states("block", "closed", "failed", "gathering", "lost", "open"),
        sa.ForeignKeyConstraint(["run"], ["run.number"], name="fk_block_run"),
        _of_plan("block"),
        sa.PrimaryKeyConstraint("id", name="pk_block"),
    )
    op.create_index("ix_block_run", "block", ["run"])
    op.create_table(
        "attempt",
        sa.Column("plan", DIGEST, nullable=False),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("state", STATE, nullable=False),
        sa.Column("begun", sa.Double, nullable=False),
        sa.Column("ended", sa.Double),
        _states("attempt", "begun", "lost", "released", "spent"),
        _of_plan("attempt"),
        sa.PrimaryKeyConstraint("plan", "number", name="pk_attempt"),
    )
    op.create_table(
        "round",
        sa.Column("plan", DIGEST, nullable=False),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("state", STATE, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("update", DIGEST, nullable=False),
        sa.Column("survivors", sa.Integer, nullable=False),
        sa.Column("subject", sa.JSON, nullable=False),
        sa.Column("norm", sa.Double, nullable=False),
        sa.Column("bound", sa.Double),
        sa.Column("seconds", sa.Double, nullable=False),
        sa.Column("released", sa.Double, nullable=False),
        sa.Column("applied", sa.Double),
        _states("round", "applied", "released"),
        _of_plan("round"),
        sa.PrimaryKeyConstraint("plan", "number", name="pk_round"),
    )
    op.create_table(
        "participant",
        sa.Column("plan", DIGEST, nullable=False),
        sa.Column("round", sa.Integer, nullable=False),
        sa.Column("name", NAME, nullable=False),
        sa.Column("role", STATE, nullable=False),
        sa.Column("detail", sa.String(500), nullable=False),
        sa.CheckConstraint(
            "role IN ('blamed', 'declined', 'dropped', 'uploaded')", name=op.f("ck_participant_role")
        ),
        _of_plan("participant"),
        sa.PrimaryKeyConstraint("plan", "round", "name", name="pk_participant"),
    )
    op.create_index("ix_participant_name", "participant", ["name"])
    op.create_table(
        "merchant",
        sa.Column("name", NAME, nullable=False),
        sa.Column("epsilon", sa.Double, nullable=False),
        sa.Column("said", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_merchant"),
    )
    op.create_table(
        "checkpoint",
        sa.Column("plan", DIGEST, nullable=False),
        sa.Column("rounds_done", sa.Integer, nullable=False),
        sa.Column("object", DIGEST, nullable=False),
        sa.Column("saved", sa.Double, nullable=False),
        _of_plan("checkpoint"),
        sa.PrimaryKeyConstraint("plan", name="pk_checkpoint"),
    )
    op.create_table(
        "evaluation",
        sa.Column("number", sa.Integer, autoincrement=True, nullable=False),
        sa.Column("training", DIGEST, nullable=False),
        sa.Column("after", sa.Integer, nullable=False),
        sa.Column("model", DIGEST, nullable=False),
        sa.Column("plan", DIGEST, nullable=False),
        sa.Column("round", sa.Integer, nullable=False),
        sa.Column("report", sa.Text, nullable=False),
        sa.Column("made", sa.Double, nullable=False),
        sa.ForeignKeyConstraint(["training"], ["plan.digest"], name="fk_evaluation_training"),
        _of_plan("evaluation"),
        sa.PrimaryKeyConstraint("number", name="pk_evaluation"),
    )
    op.create_index("ix_evaluation_subject", "evaluation", ["training", "after"])
    op.create_table(
        "version",
        sa.Column("digest", DIGEST, nullable=False),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("plan", DIGEST, nullable=False),
        sa.Column("parent", DIGEST),
        sa.Column("state", STATE, nullable=False),
        sa.Column("files", sa.JSON, nullable=False),
        sa.Column("model", DIGEST, nullable=False),
        sa.Column("made", sa.Double, nullable=False),
        _states("version", "candidate", "released", "superseded", "withdrawn"),
        _of_plan("version"),
        sa.PrimaryKeyConstraint("digest", name="pk_version"),
        sa.UniqueConstraint("number", name="uq_version_number"),
    )
    op.create_table(
        "release",
        sa.Column("number", sa.Integer, autoincrement=False, nullable=False),
        sa.Column("version", DIGEST, nullable=False),
        sa.Column("signed", sa.LargeBinary, nullable=False),
        sa.Column("reason", sa.String(500), nullable=False),
        sa.Column("made", sa.Double, nullable=False),
        sa.ForeignKeyConstraint(["version"], ["version.digest"], name="fk_release_version"),
        sa.PrimaryKeyConstraint("number", name="pk_release"),
    )
    op.create_table(
        "directory",
        sa.Column("digest", DIGEST, nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("members", sa.JSON, nullable=False),
        sa.Column("expires", sa.Double, nullable=False),
        sa.Column("seen", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("digest", name="pk_directory"),
    )
    op.create_table(
        "audit",
        sa.Column("sequence", sa.Integer, autoincrement=False, nullable=False),
        sa.Column("time", sa.Double, nullable=False),
        sa.Column("kind", NAME, nullable=False),
        sa.Column("facts", sa.String(20_000), nullable=False),
        sa.Column("previous", DIGEST, nullable=False),
        sa.Column("hash", DIGEST, nullable=False),
        sa.PrimaryKeyConstraint("sequence", name="pk_audit"),
    )


def downgrade() -> None:
    for table in (
        "audit",
        "directory",
        "release",
        "version",
        "evaluation",
        "checkpoint",
        "merchant",
        "participant",
        "round",
        "attempt",
        "block",
        "run",
        "plan",
    ):
        op.drop_table(table)


def _of_plan(table: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint(["plan"], ["plan.digest"], name=f"fk_{table}_plan")


def _states(table: str, *states: str) -> sa.CheckConstraint:
    listed = ", ".join(f"'{state}'" for state in states)
    return sa.CheckConstraint(f"state IN ({listed})", name=op.f(f"ck_{table}_state"))
