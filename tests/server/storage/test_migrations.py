"""Schemas: a new database has the migrations' very tables, and records survive the way there and back."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import inspect, select, text

from hanse_common.errors import StorageError
from hanse_server.audit import verify
from hanse_server.storage import Database, State, scripts
from hanse_server.storage.audit_log import AuditLog
from hanse_server.storage.database import migrate
from hanse_server.storage.schema import TRANSITIONS, Record

ADDED_LATER = {"0002": {"gap"}}
"""The tables that a version added."""

THIRD = '''
"""A third schema, for a test: a column more, one renamed, one wider, and a table made anew for it on SQLite."""
import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade():
    with op.batch_alter_table("plan") as plan:
        plan.add_column(sa.Column("note", sa.String(20), nullable=False, server_default="none"))
        plan.alter_column("mode", type_=sa.String(64), existing_type=sa.String(32), existing_nullable=False)
    with op.batch_alter_table("run") as run:
        run.alter_column("after", new_column_name="rounds_before")


def downgrade():
    with op.batch_alter_table("run") as run:
        run.alter_column("rounds_before", new_column_name="after")
    with op.batch_alter_table("plan") as plan:
        plan.alter_column("mode", type_=sa.String(32), existing_type=sa.String(64), existing_nullable=False)
        plan.drop_column("note")
'''


def rows(url: str, without: frozenset[str] = frozenset()) -> dict[str, list[Any]]:
    """Return all rows by table, but those of `without`."""
    records = Database(url)
    with records.reading() as session:
        found = {
            table.name: [tuple(row) for row in session.execute(select(table).order_by(*table.primary_key))]
            for table in Record.metadata.sorted_tables
            if table.name not in without
        }
    records.close()
    return found


@pytest.fixture
def filled(url: str, tmp_path: Path, fill: Callable[[State], object]) -> str:
    """The URL of a database with records of all kinds."""
    with State.open(tmp_path / "state", url) as state:
        fill(state)
        with state.database.reading() as session:
            for table in Record.metadata.sorted_tables:
                assert session.execute(select(table).limit(1)).first() is not None, table.name
    return url


def test_a_new_database_has_the_tables_that_the_migrations_make(make_url: Callable[[], str]) -> None:
    made, migrated = make_url(), make_url()
    Database(made).close()
    assert migrate(migrated) == (None, scripts.newest())
    shapes = []
    for url in (made, migrated):
        records = Database(url)
        with records._engine.connect() as connection:
            context = MigrationContext.configure(connection, opts={"compare_type": True})
            assert compare_metadata(context, Record.metadata) == []
            shapes.append(_shape(connection))
        records.close()
    assert shapes[0] == shapes[1]


def test_records_survive_the_way_back_and_forth(filled: str) -> None:
    before = rows(filled)
    known = scripts.known_versions()
    lost: set[str] = set()
    for version in known[-2::-1]:
        lost |= ADDED_LATER[known[known.index(version) + 1]]
        assert migrate(filled, version)[1] == version
        with pytest.raises(StorageError, match=f"found schema version {version}.*hanse-server migrate"):
            Database(filled)
    assert migrate(filled) == (known[0], known[-1])
    gone = frozenset(lost)
    assert rows(filled, gone) == {name: found for name, found in before.items() if name not in gone}
    records = Database(filled)
    assert verify(AuditLog(records).entries()) == len(before["audit"])
    records.close()


def test_the_way_back_to_nothing_leaves_nothing(filled: str) -> None:
    assert migrate(filled, "base") == (scripts.newest(), None)
    assert migrate(filled) == (None, scripts.newest())
    assert all(not found for found in rows(filled).values())


def test_a_migration_that_makes_tables_anew_keeps_what_is_in_them(
    filled: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = rows(filled)
    with _with_third(tmp_path, monkeypatch):
        with pytest.raises(StorageError, match="make a backup, then hanse-server migrate"):
            Database(filled)
        assert migrate(filled) == ("0002", "0003")
        later = Database(filled)
        with later.reading() as session:
            plans = session.execute(text("SELECT digest, note FROM plan ORDER BY digest")).all()
            assert [tuple(one) for one in plans] == [(plan[0], "none") for plan in before["plan"]]
            runs = session.execute(text("SELECT rounds_before FROM run ORDER BY number")).all()
            assert [one[0] for one in runs] == [0, 1]
        later.close()
    with pytest.raises(StorageError, match=r"found schema version 0003.*use the release that made it"):
        Database(filled)
    with pytest.raises(StorageError, match=r"found schema version 0003.*use the release that made it"):
        migrate(filled)
    with _with_third(tmp_path, monkeypatch):
        assert migrate(filled, "0002") == ("0003", "0002")
    assert rows(filled) == before


def test_a_migration_that_fails_half_way_changes_nothing(
    filled: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = rows(filled)
    broken = THIRD.replace('"run") as run', '"gone") as run')
    with _with_third(tmp_path, monkeypatch, broken), pytest.raises(StorageError):
        migrate(filled)
    assert rows(filled) == before


def test_a_version_that_there_is_not_is_refused(url: str) -> None:
    Database(url).close()
    with pytest.raises(StorageError, match="expected head, base or one of 0001, 0002"):
        migrate(url, "0009")
    assert migrate(url, "head") == (scripts.newest(), scripts.newest())


def test_the_database_itself_holds_each_state_to_those_there_are(
    state: State, fill: Callable[[State], object]
) -> None:
    fill(state)
    for table in TRANSITIONS:
        with (
            pytest.raises(StorageError),
            state.database.transaction() as session,
        ):
            session.execute(text(f"UPDATE {table} SET state = 'lost in thought'"))  # noqa: S608 - our own names


class _with_third:  # noqa: N801 - it reads as what it does
    """While entered, this release has a third schema."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, source: str = THIRD) -> None:
        self._folder = folder / "migrations"
        self._patch = monkeypatch
        if not self._folder.exists():
            shutil.copytree(scripts.MIGRATIONS, self._folder)
        (self._folder / "versions" / "0003_third.py").write_text(source)

    def __enter__(self) -> None:
        self._context = self._patch.context()
        self._context.__enter__().setattr(scripts, "MIGRATIONS", self._folder)
        scripts.known_versions.cache_clear()

    def __exit__(self, *exception: Any) -> None:
        self._context.__exit__(*exception)
        scripts.known_versions.cache_clear()


def _shape(connection: Any) -> dict[str, Any]:
    """Return tables, columns, keys, checks and indexes, in no order."""
    inspector = inspect(connection)
    return {
        table: {
            "columns": sorted(
                (column["name"], str(column["type"]), column["nullable"])
                for column in inspector.get_columns(table)
            ),
            "key": inspector.get_pk_constraint(table),
            "foreign": sorted(map(str, inspector.get_foreign_keys(table))),
            "checks": sorted(
                (check["name"] or "", check["sqltext"]) for check in inspector.get_check_constraints(table)
            ),
            "unique": sorted(map(str, inspector.get_unique_constraints(table))),
            "indexes": sorted(
                (index["name"] or "", index["column_names"], index["unique"], _condition(index))
                for index in inspector.get_indexes(table)
            ),
        }
        for table in inspector.get_table_names()
    }


def _condition(index: Any) -> list[str]:
    """Return of which rows an index is."""
    return [str(value) for name, value in index["dialect_options"].items() if name.endswith("_where")]
