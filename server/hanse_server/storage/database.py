"""The database behind all records: SQLite by default, PostgreSQL by URL.

    database = Database("sqlite:////srv/hanse/state/hanse.sqlite")
    with database.transaction() as session:         # one writer at a time; waits for another
        session.add(record)
    with database.reading() as session:             # one moment of it; waits for nobody
        session.get(PlanRecord, digest)

A new database gets the newest schema at once. One of an earlier schema is left alone until the operator says
`hanse-server migrate`; one of a later schema, or another program's, is never touched. SQLite runs with a write-ahead
log and full synchronisation: what was committed is there after a crash, of the machine, too.

One writer at a time, on PostgreSQL as well as on SQLite: who reads a number and writes the next one is never overtaken,
and no two wait for each other. A reader sees one moment, whatever is written meanwhile.
"""

import fcntl
import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from alembic import command
from alembic.migration import MigrationContext
from alembic.util import CommandError
from sqlalchemy import URL, Connection, Engine, create_engine, event, inspect, make_url, text, update
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.orm import Session

from hanse_common.errors import StorageError
from hanse_server.storage.schema import TRANSITIONS, Record
from hanse_server.storage.scripts import alembic_config, known_versions, newest

BUSY_SECONDS = 30
"""How long a writer waits for another."""

CONNECT_SECONDS = 10

_WRITING, _WORKING = 0x48616E01, 0x48616E02
"""PostgreSQL's advisory locks of who writes, and of who trains."""


class Database:
    """The records at `url`. `clock` returns seconds since 1970. Threads may share it.

    Raises `StorageError` when the database cannot be reached or is not of this release's schema.
    """

    def __init__(self, url: str | URL, clock: Callable[[], float] = time.time) -> None:
        self.clock = clock
        self._url = _checked(url)
        self._engine = _engine(self._url)
        try:
            with self._reached():
                if _version(self._engine) is None:
                    self._make()
                found = _version(self._engine)
                if found != newest():
                    raise StorageError(_other_version(self.name, found))
        except StorageError:
            self.close()
            raise

    @property
    def name(self) -> str:
        """Where the database is, for people: no password is in it."""
        return _name(self._url)

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        """Yield a session whose changes are committed at the end, all or none. Raises `StorageError`."""
        with self._reached(), Session(self._engine, expire_on_commit=False) as session, session.begin():
            yield session

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """Yield a session that sees the database as it is at one moment, and changes nothing. Raises `StorageError`."""
        with self._reached(), Session(_reader(self._engine), expire_on_commit=False) as session:
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

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Be the only one that works on this database while entered. Raises `StorageError` when another does."""
        if self._url.get_backend_name() == "sqlite":
            with locked(Path(f"{self._url.database}.lock"), self.name):
                yield
            return
        with self._reached():
            connection = _reader(self._engine).connect()
            if not connection.scalar(text(f"SELECT pg_try_advisory_lock({_WORKING})")):
                connection.close()
                raise StorageError(_taken(self.name))
            connection.rollback()  # the lock is the connection's, which else would keep an old moment alive
        try:
            yield
        finally:
            connection.invalidate()  # with it the lock goes, should it be gone already, too
            connection.close()

    def close(self) -> None:
        """Let go of all connections."""
        self._engine.dispose()

    def _make(self) -> None:
        with self._engine.begin() as connection:
            if (
                MigrationContext.configure(connection).get_current_revision() is None
            ):  # nobody else was quicker
                Record.metadata.create_all(connection)
                command.stamp(alembic_config(connection), "head")

    @contextmanager
    def _reached(self) -> Iterator[None]:
        with _told(self.name):
            yield


def migrate(url: str | URL, version: str = "head") -> tuple[str | None, str | None]:
    """Bring the database at `url` to the schema `version`, forwards or back; return the version before and after.

    "head" is this release's, "base" is none: all records are then gone. All of it happens or nothing. Raises
    `StorageError`.
    """
    parsed = _checked(url)
    name = _name(parsed)
    known = known_versions()
    if version not in (*known, "head", "base"):
        raise StorageError(f"version {version}: expected head, base or one of {', '.join(known)}.")
    engine = _engine(parsed, foreign_keys=False)
    try:
        with _told(name):
            before = _version(engine)
            if before is not None and before not in known:
                raise StorageError(_other_version(name, before))
            order = ("base", *known)
            wanted = known[-1] if version == "head" else version
            forwards = order.index(wanted) >= order.index(before or "base")
            with engine.begin() as connection:
                config = alembic_config(connection)
                (command.upgrade if forwards else command.downgrade)(config, version)
                _require_whole(connection, name)
            return before, _version(engine)
    finally:
        engine.dispose()


@contextmanager
def locked(path: Path, name: str) -> Iterator[None]:
    """Hold the lock file `path` while entered. Raises `StorageError` when another process does, or it can't be made."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StorageError(
            f"{path}: cannot be made ({error.strerror}); service.state must be writable."
        ) from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StorageError(_taken(name)) from None
        yield
    finally:
        os.close(handle)


def _taken(name: str) -> str:
    return f"{name}: another hanse-server works on this state; stop it first (hanse-server stop)."


def _checked(url: str | URL) -> URL:
    """Return `url`, once it is one of a SQLite file or a PostgreSQL database. Raises `StorageError`."""
    expected = "expected sqlite:///FILE or postgresql://USER@HOST/DATABASE, for which pip install 'hanse[postgresql]'."
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError) as error:
        raise StorageError(f"service.storage: found no URL ({type(error).__name__}); {expected}") from None
    match parsed.get_backend_name():
        case "sqlite":
            if parsed.database in (None, "", ":memory:") or parsed.query or parsed.host:
                raise StorageError(
                    "service.storage: found a SQLite database that is no plain file; expected sqlite:///FILE."
                )
            return parsed.set(drivername="sqlite")
        case "postgresql":
            return parsed.set(drivername="postgresql+psycopg")
        case other:
            raise StorageError(f"service.storage: found {other}, {expected}")


def _name(url: URL) -> str:
    """Return where the database is, for people. A query may hold a password, too."""
    if url.get_backend_name() == "sqlite":
        return str(url.database)
    return url.set(drivername="postgresql", query={}).render_as_string(hide_password=True)


def _engine(url: URL, *, foreign_keys: bool = True) -> Engine:
    """Return what connects to the database. Without `foreign_keys`, SQLite lets tables be made anew."""
    if url.get_backend_name() == "sqlite":
        engine = create_engine(url, connect_args={"timeout": BUSY_SECONDS})

        @event.listens_for(engine, "connect")
        def prepare(connection: sqlite3.Connection, record: object) -> None:
            connection.isolation_level = None  # SQLAlchemy begins transactions, see below
            _write_ahead(connection)
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA fullfsync = ON")  # macOS: fsync alone does not reach the disk
            connection.execute(f"PRAGMA foreign_keys = {'ON' if foreign_keys else 'OFF'}")

        @event.listens_for(engine, "begin")
        def begin_sqlite(connection: Connection) -> None:
            # A reader that becomes a writer could not wait for another one.
            connection.exec_driver_sql("BEGIN" if _reads(connection) else "BEGIN IMMEDIATE")

        _make_private(Path(str(url.database)))
        return engine
    try:
        engine = create_engine(url, pool_pre_ping=True, connect_args={"connect_timeout": CONNECT_SECONDS})
    except (NoSuchModuleError, ImportError):
        raise StorageError(
            "service.storage: PostgreSQL needs a package more: pip install 'hanse[postgresql]'."
        ) from None

    @event.listens_for(engine, "begin")
    def begin_postgresql(connection: Connection) -> None:
        if not _reads(connection):
            connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{BUSY_SECONDS}s'")
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_WRITING})")

    return engine


def _reader(engine: Engine) -> Engine:
    if engine.dialect.name == "postgresql":
        return engine.execution_options(
            hanse_reads=True, isolation_level="REPEATABLE READ", postgresql_readonly=True
        )
    return engine.execution_options(hanse_reads=True)


def _reads(connection: Connection) -> bool:
    return bool(connection.get_execution_options().get("hanse_reads"))


def _make_private(path: Path) -> None:
    """Make the file, empty, so that only its owner reads it; SQLite gives its own mode to the files beside it."""
    with suppress(OSError):  # the database says what is wrong with the place
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))


def _write_ahead(connection: sqlite3.Connection) -> None:
    """Switch a new file to a write-ahead log. Here SQLite itself does not wait for another that does the same."""
    given_up = time.monotonic() + BUSY_SECONDS
    while connection.execute("PRAGMA journal_mode").fetchone() != ("wal",):
        try:
            connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorname != "SQLITE_BUSY" or time.monotonic() > given_up:
                raise
            time.sleep(0.02)


def _version(engine: Engine) -> str | None:
    """Return the database's schema version, None when it is empty. Raises `StorageError` when it is not ours."""
    with _reader(engine).connect() as connection:
        found = MigrationContext.configure(connection).get_current_revision()
        tables = set(inspect(connection).get_table_names()) - {"alembic_version"}
    ours = tables & set(Record.metadata.tables)
    if found is None and ours:
        raise StorageError(
            f"{_name(engine.url)}: holds tables of ours without a version; restore it from a backup, or name another."
        )
    if tables and not ours:
        raise StorageError(
            f"{_name(engine.url)}: holds another program's tables; name a database of its own under service.storage."
        )
    return found


def _require_whole(connection: Connection, name: str) -> None:
    """Raise `StorageError` when a record names one that is not there; a migration does not look after it itself."""
    if connection.dialect.name == "sqlite":
        broken = connection.exec_driver_sql("PRAGMA foreign_key_check").first()
        if broken is not None:
            raise StorageError(
                f"{name}: a row of {broken[0]} would name no row of {broken[2]}; not migrated."
            )


def _other_version(name: str, found: str | None) -> str:
    todo = (
        "make a backup, then hanse-server migrate"
        if found in known_versions()
        else "use the release that made it"
    )
    return f"{name}: found schema version {found}, this release has {newest()}; {todo}."


@contextmanager
def _told(name: str) -> Iterator[None]:
    """Turn the database's own errors into ours; theirs would quote statements and values."""
    try:
        yield
    except IntegrityError as error:
        raise StorageError(
            f"{name}: a record is there already, or names one that is not ({_first_line(error.orig)}). Perhaps two "
            "did the same at once; look at what is there and try again."
        ) from None
    except DBAPIError as error:
        raise StorageError(
            f"{name}: cannot be used ({type(error.orig).__name__}: {_first_line(error.orig)}). {_todo(error.orig)}"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise StorageError(f"{name}: holds damaged text ({type(error).__name__}). {_DAMAGED}") from None
    except (SQLAlchemyError, CommandError) as error:
        raise StorageError(f"{name}: cannot be used ({type(error).__name__}).") from None


_DAMAGED = "Keep the damaged database, and restore a backup into an empty one."


def _first_line(error: BaseException | None) -> str:
    return (str(error).splitlines() or [""])[0][:200]


def _todo(error: BaseException | None) -> str:
    """Return what to do next, where the database says what is wrong."""
    name = getattr(error, "sqlite_errorname", "")
    if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
        return _DAMAGED
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")) or getattr(error, "sqlstate", None) == "55P03":
        return "Another process has been writing for long; try again, or stop it."
    if name.startswith("SQLITE_FULL"):
        return "Make room, then go on with hanse-server resume."
    return "Check that it is there, writable, and has room."
