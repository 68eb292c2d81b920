"""The database behind all records: SQLite by default, PostgreSQL by URL.

    database = Database("sqlite:////srv/hanse/state/hanse.sqlite")
    with database.transaction() as session:
        session.add(record)

A new database gets the newest schema at once. One of an earlier schema is left alone until the operator says
`hanse-server migrate`; one of a later schema is never touched. SQLite runs with a write-ahead log and full
synchronisation: what was committed is there after a crash, of the machine, too.
"""

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import URL, Connection, Engine, create_engine, event, inspect, make_url, update
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.orm import Session

from hanse_common.errors import StorageError
from hanse_server.storage.schema import TRANSITIONS, Record

MIGRATIONS = Path(__file__).parent / "migrations"
BUSY_SECONDS = 30
"""How long a writer waits for another."""

CONNECT_SECONDS = 10


class Database:
    """The records at `url`. `clock` returns seconds since 1970.

    Raises `StorageError` when the database cannot be reached or is not of this release's schema.
    """

    def __init__(self, url: str, clock: Callable[[], float] = time.time) -> None:
        self.clock = clock
        self.url, self._engine = _engine(url)
        with self._reached():
            found = _version(self._engine)
            if found is None:
                self._make()
            elif found != newest():
                raise StorageError(_other_version(self.name, found))

    @property
    def name(self) -> str:
        """The database's URL without a password, for people."""
        return self.url.render_as_string(hide_password=True)

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        """Yield a session whose changes are committed at the end, all or none. Raises `StorageError`."""
        with self._reached(), Session(self._engine, expire_on_commit=False) as session, session.begin():
            yield session

    def move(self, session: Session, record: type[Record], state: str, **key: Any) -> None:
        """Bring one record to `state`. Raises `StorageError` unless it is in a state from which that may follow."""
        kind = record.__tablename__
        before = [old for old, new in TRANSITIONS[kind].items() if state in new]
        table = Record.metadata.tables[kind]
        changed = update(table).values(state=state).where(table.c.state.in_(before))
        for name, value in key.items():
            changed = changed.where(table.c[name] == value)
        if session.execute(changed).rowcount != 1:  # type: ignore[attr-defined]
            named = ", ".join(f"{name} {value}" for name, value in key.items())
            raise StorageError(f"{kind} {named}: is not in a state that {state} may follow.")

    def close(self) -> None:
        """Let go of all connections."""
        self._engine.dispose()

    def _make(self) -> None:
        with self._engine.begin() as connection:
            Record.metadata.create_all(connection)
            command.stamp(_config(connection), "head")

    @contextmanager
    def _reached(self) -> Iterator[None]:
        with _told(self.name):
            yield


def migrate(url: str, version: str = "head") -> tuple[str | None, str | None]:
    """Bring the database at `url` to the schema `version`, forwards or back; return the version before and after.

    "head" is this release's, "base" is none: all records are then gone. Raises `StorageError`.
    """
    parsed, engine = _engine(url)
    name = parsed.render_as_string(hide_password=True)
    with _told(name):
        before = _version(engine)
        known = {script.revision for script in _scripts().walk_revisions()}
        if version not in known | {"head", "base"}:
            raise StorageError(
                f"version {version}: expected head, base or one of {', '.join(sorted(known))}."
            )
        if before is not None and before not in known:
            raise StorageError(_other_version(name, before))
        order = ["base", *reversed([script.revision for script in _scripts().walk_revisions()])]
        wanted = order[-1] if version == "head" else version
        with engine.begin() as connection:
            config = _config(connection)
            if order.index(wanted) >= order.index(before or "base"):
                command.upgrade(config, version)
            else:
                command.downgrade(config, version)
        after = _version(engine)
        engine.dispose()
    return before, after


def newest() -> str:
    """Return the version of this release's schema."""
    head = _scripts().get_current_head()
    if head is None:
        raise StorageError("This release has no schema; install it again.")
    return head


def _engine(url: str) -> tuple[URL, Engine]:
    try:
        parsed = make_url(url)
        if parsed.get_backend_name() == "sqlite":
            engine = create_engine(parsed, connect_args={"timeout": BUSY_SECONDS})
            event.listen(engine, "connect", _prepare_sqlite)
            event.listen(engine, "begin", _begin_sqlite)
        elif parsed.get_backend_name() == "postgresql":
            parsed = parsed.set(drivername="postgresql+psycopg")
            engine = create_engine(
                parsed, pool_pre_ping=True, connect_args={"connect_timeout": CONNECT_SECONDS}
            )
        else:
            raise StorageError(
                f"service.storage: found {parsed.get_backend_name()}, expected sqlite or postgresql."
            )
    except (ArgumentError, NoSuchModuleError, ImportError) as error:
        raise StorageError(
            f"service.storage: cannot be used ({type(error).__name__}); expected sqlite:///FILE or "
            "postgresql://USER@HOST/DATABASE, for which pip install 'hanse[postgresql]'."
        ) from None
    return parsed, engine


def _prepare_sqlite(connection: sqlite3.Connection, record: object) -> None:
    connection.isolation_level = None  # SQLAlchemy begins transactions, see below
    for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    # A reader that becomes a writer could not wait for another one.
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _version(engine: Engine) -> str | None:
    """Return the database's schema version, None when it is empty."""
    with engine.connect() as connection:
        found = MigrationContext.configure(connection).get_current_revision()
        tables = set(inspect(connection).get_table_names()) & set(Record.metadata.tables)
    if found is None and tables:
        raise StorageError(
            f"{engine.url.render_as_string(hide_password=True)}: holds tables of ours without a version; restore it "
            "from a backup, or name another."
        )
    return found


def _scripts() -> ScriptDirectory:
    return ScriptDirectory.from_config(_config(None))


def _config(connection: Connection | None) -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


def _other_version(name: str, found: str) -> str:
    known = {script.revision for script in _scripts().walk_revisions()}
    todo = "make a backup, then hanse-server migrate" if found in known else "use the release that made it"
    return f"{name}: found schema version {found}, this release has {newest()}; {todo}."


@contextmanager
def _told(name: str) -> Iterator[None]:
    """Turn the database's own errors into ours; theirs would quote statements and values."""
    try:
        yield
    except DBAPIError as error:
        raise StorageError(
            f"{name}: cannot be used ({type(error.orig).__name__}: {str(error.orig).splitlines()[0][:200]}). Check "
            "that it is there, writable, and has room."
        ) from None
    except SQLAlchemyError as error:
        raise StorageError(f"{name}: cannot be used ({type(error).__name__}).") from None
