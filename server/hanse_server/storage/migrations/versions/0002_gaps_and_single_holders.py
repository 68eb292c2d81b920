"""Rounds that are left out after a restore; at most one running run and one released version."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

ONLY_ONE = (("run", "running"), ("version", "released"))


def upgrade() -> None:
    op.create_table(
        "gap",
        sa.Column("plan", sa.String(64), nullable=False),
        sa.Column("until", sa.Integer, nullable=False),
        sa.Column("noted", sa.Double, nullable=False),
        sa.ForeignKeyConstraint(["plan"], ["plan.digest"], name="fk_gap_plan"),
        sa.PrimaryKeyConstraint("plan", name="pk_gap"),
    )
    for table, state in ONLY_ONE:
        where = sa.text(f"state = '{state}'")
        op.create_index(
            f"uq_{table}_{state}",
            table,
            ["state"],
            unique=True,
            sqlite_where=where,
            postgresql_where=where,
        )


def downgrade() -> None:
    for table, state in ONLY_ONE:
        op.drop_index(f"uq_{table}_{state}", table)
    op.drop_table("gap")
