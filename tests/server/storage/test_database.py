"""The database: whole transactions, one writer, readers that wait for nobody, and clear words when it can't be used."""

import os
import signal
import sqlite3
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import URL, event, func, select

from hanse_common.errors import StorageError
from hanse_server.audit import verify
from hanse_server.storage import Database, State, database
from hanse_server.storage.audit_log import AuditLog, append
from hanse_server.storage.schema import MerchantRecord, PlanRecord, RunRecord


def merchant(name: str) -> MerchantRecord:
    return MerchantRecord(name=name, epsilon=1.0, said=2.0)


def merchants(database: Database) -> int:
    with database.reading() as session:
        return session.scalar(select(func.count()).select_from(MerchantRecord)) or 0


def test_a_transaction_is_all_or_nothing(url: str) -> None:
    records = Database(url)
    with pytest.raises(ZeroDivisionError), records.transaction() as session:
        session.add(merchant("alder"))
        session.flush()
        _ = 1 / 0
    assert merchants(records) == 0
    with records.transaction() as session:
        session.add(merchant("alder"))
    assert merchants(Database(url)) == 1
    records.close()


def test_what_a_reader_changes_is_not_kept(url: str) -> None:
    records = Database(url)
    try:
        with records.reading() as session:
            session.add(merchant("alder"))
            session.flush()
    except StorageError:
        pass  # PostgreSQL says so at once
    assert merchants(records) == 0
    records.close()


def test_a_reader_sees_one_moment_and_stands_in_nobodys_way(url: str) -> None:
    records, other = Database(url), Database(url)
    with records.reading() as session:
        assert session.scalar(select(func.count()).select_from(MerchantRecord)) == 0
        with other.transaction() as writer:  # would wait if readers locked
            writer.add(merchant("alder"))
        assert session.scalar(select(func.count()).select_from(MerchantRecord)) == 0
    with other.transaction() as writer:
        writer.add(merchant("birch"))
        writer.flush()
        assert merchants(records) == 1
    assert merchants(records) == 2
    records.close()
    other.close()


def test_many_threads_of_several_programs_append_to_one_chain(url: str) -> None:
    programs = [Database(url, clock=lambda: 7.0) for _ in range(2)]
    failed: list[BaseException] = []

    def write(records: Database, name: str) -> None:
        try:
            for number in range(8):
                AuditLog(records).append("test", by=name, number=number)
        except BaseException as error:
            failed.append(error)

    threads = [
        threading.Thread(target=write, args=(one, f"{index}-{thread}"))
        for index, one in enumerate(programs)
        for thread in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert verify(AuditLog(programs[0]).entries()) == 48
    for one in programs:
        one.close()


def test_a_run_can_be_asked_to_stop_while_it_ends(
    url: str, state: State, progress_of: Callable[..., object]
) -> None:
    """Each writes the run and the log, in another order: with two writers they could wait for each other."""
    progress_of(state)
    with state.database.reading() as session:
        digest = bytes.fromhex(session.scalars(select(PlanRecord.digest)).one())
    failed: list[BaseException] = []

    def keep_asking() -> None:
        try:
            while not over.is_set():
                state.history.request_stop()
        except BaseException as error:
            failed.append(error)

    over = threading.Event()
    asking = threading.Thread(target=keep_asking)
    asking.start()
    for _ in range(10):
        state.history.end_run(state.history.begin_run(digest, 0), "stopped", "asked to")
    over.set()
    asking.join()
    assert not failed
    verify(state.audit.entries())
    with state.database.reading() as session:
        assert set(session.scalars(select(RunRecord.state))) == {"stopped"}


def test_several_programs_may_make_the_database_at_once(make_url: Callable[[], str]) -> None:
    for _ in range(3):
        url = make_url()
        failed: list[BaseException] = []

        def make(url: str = url, failed: list[BaseException] = failed) -> None:
            try:
                Database(url).close()
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=make) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed


def test_only_one_trains(url: str, tmp_path: Path) -> None:
    with State.open(tmp_path / "one", url) as one, State.open(tmp_path / "other", url) as other:
        with one.alone(), pytest.raises(StorageError, match="another hanse-server works"), other.alone():
            pass
        with other.alone():
            pass
    with State.open(tmp_path / "one", url) as again, again.alone():
        pass


@pytest.mark.parametrize("name", ["with space", "50%", "a?b#c", "雪", "%s:@"])
def test_a_folder_may_have_any_name(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name / "state"
    with State.open(folder) as state, state.alone():
        state.audit.append("test")
        assert str(folder) in state.database.name
    assert sorted(path.name for path in folder.iterdir()) == [
        "hanse.sqlite",
        "hanse.sqlite.lock",
        "lock",
        "objects",
    ]


def test_nobody_else_may_read_the_records(tmp_path: Path, progress_of: Callable[..., object]) -> None:
    before = os.umask(0)
    try:
        with State.open(tmp_path / "state") as state, state.alone():
            progress_of(state)
            state.objects.put(b"data")
            made = [tmp_path / "state", *(tmp_path / "state").rglob("*")]
            for path in made:
                assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
            assert {"hanse.sqlite", "hanse.sqlite-wal", "hanse.sqlite-shm"} <= {path.name for path in made}
    finally:
        os.umask(before)


@pytest.mark.parametrize(
    "url",
    [
        "sqlite://",
        "sqlite:///:memory:",
        "sqlite:///file:x?mode=memory&uri=true",
        "mysql://root:secret@localhost/hanse",
        "postgresql://hanse:secret@localhost:port/hanse",
        "secret",
    ],
)
def test_a_url_that_cannot_be_used_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(StorageError, match=r"service\.storage") as refused:
        Database(url)
    assert "secret" not in str(refused.value)


def test_a_password_is_never_in_a_text() -> None:
    pytest.importorskip("psycopg")
    with pytest.raises(StorageError) as refused:
        Database("postgresql://hanse:secret1@127.0.0.1:9/hanse?password=secret2&connect_timeout=2")
    assert "127.0.0.1" in str(refused.value)
    assert "secret" not in str(refused.value)


def test_another_programs_database_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "other.sqlite"
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE photo (name TEXT)")
    other.close()
    before = path.read_bytes()
    for use in (Database, database.migrate):
        with pytest.raises(StorageError, match="another program's tables"):
            use(f"sqlite:///{path}")
    assert _schema(path) == ["photo"]
    assert len(path.read_bytes()) == len(before)


def test_tables_without_a_version_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "half.sqlite"
    Database(f"sqlite:///{path}").close()
    with sqlite3.connect(path) as half:
        half.execute("DELETE FROM alembic_version")
    half.close()
    for use in (Database, database.migrate):
        with pytest.raises(StorageError, match="without a version"):
            use(f"sqlite:///{path}")


@pytest.mark.parametrize("content", [b"", b"no database at all" * 100])
def test_what_is_no_database_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "hanse.sqlite"
    path.write_bytes(content)
    if not content:
        Database(f"sqlite:///{path}").close()  # as if it were not there
        return
    with pytest.raises(StorageError, match=r"hanse\.sqlite.*restore a backup"):
        Database(f"sqlite:///{path}")
    assert path.read_bytes() == content


def test_a_damaged_database_is_named_and_nothing_else_is_raised(
    tmp_path: Path, fill: Callable[[State], object]
) -> None:
    with State.open(tmp_path) as state:
        fill(state)
    path = tmp_path / "hanse.sqlite"
    whole = path.read_bytes()
    page = 4096
    for place in range(page, len(whole), 4 * page):
        path.write_bytes(whole[:place] + b"\xff" * page + whole[place + page :])
        try:
            with State.open(tmp_path) as state:
                state.versions.all()
                verify(state.audit.entries())
                state.history.request_stop()
                with state.database.reading() as session:
                    session.scalars(select(PlanRecord)).all()
        except StorageError as error:
            assert "hanse.sqlite" in str(error) or "audit log" in str(error)


def test_damaged_json_is_named(tmp_path: Path, fill: Callable[[State], object]) -> None:
    with State.open(tmp_path) as state:
        fill(state)
        with state.database.transaction() as session:
            session.connection().exec_driver_sql("UPDATE version SET files = '{half'")
        with pytest.raises(StorageError, match="damaged text"):
            state.versions.all()


def test_a_writer_that_does_not_end_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.05)
    path = tmp_path / "hanse.sqlite"
    records = Database(f"sqlite:///{path}")
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StorageError, match="Another process has been writing"):
        AuditLog(records).append("test")
    assert list(AuditLog(records).entries()) == []  # reading goes on
    other.execute("ROLLBACK")
    other.close()
    AuditLog(records).append("test")
    records.close()


@pytest.mark.slow
def test_a_writer_that_does_not_end_is_named_on_postgresql(
    make_postgresql: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = make_postgresql()
    records, other = Database(url), Database(url)
    monkeypatch.setattr(database, "BUSY_SECONDS", 1)
    with (
        other.transaction() as session,
        pytest.raises(StorageError, match="Another process has been writing"),
    ):
        session.connection()
        AuditLog(records).append("test")
    AuditLog(records).append("test")
    records.close()
    other.close()


def test_a_full_disk_is_named_and_what_was_there_stays(tmp_path: Path) -> None:
    records = Database(f"sqlite:///{tmp_path / 'hanse.sqlite'}")
    AuditLog(records).append("test")

    @event.listens_for(records._engine, "begin")
    def bound(connection: object) -> None:
        connection.exec_driver_sql("PRAGMA max_page_count = 1")  # type: ignore[attr-defined]

    with pytest.raises(StorageError, match="Make room"):
        for _ in range(1000):
            AuditLog(records).append("test", filler="x" * 4000)
    verify(AuditLog(records).entries())
    records.close()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match=r"service\.state must be writable"):
        State.open(tmp_path / "file" / "state")
    with pytest.raises(StorageError, match="cannot be used"):
        Database(URL.create("sqlite", database=str(tmp_path / "missing" / "hanse.sqlite")))


def test_a_record_that_is_there_already_is_said_to_be(url: str) -> None:
    records = Database(url)
    for _ in range(2):
        try:
            with records.transaction() as session:
                session.add(merchant("alder"))
        except StorageError as error:
            said = str(error)
    assert "there already" in said
    records.close()


def test_what_was_committed_outlives_a_kill_and_nothing_else_does(
    url: str, in_child: Callable[[Callable[[], object]], int]
) -> None:
    def write() -> None:
        records = Database(url)
        AuditLog(records).append("kept")
        with records.transaction() as session:
            append(session, 1.0, "lost", {})
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(write) == signal.SIGKILL
    records = Database(url)
    assert [entry.kind for entry in AuditLog(records).entries()] == ["kept"]
    AuditLog(records).append("after")
    records.close()


def test_objects_that_no_database_knows_are_not_taken_for_leftovers(
    tmp_path: Path, fill: Callable[[State], object]
) -> None:
    with State.open(tmp_path / "state") as state:
        fill(state)
        kept = set(state.objects.present())
    with pytest.raises(StorageError, match="knows nothing"):
        State.open(tmp_path / "state", f"sqlite:///{tmp_path / 'new.sqlite'}")
    with State.open(tmp_path / "state") as state:
        state.collect()
        assert set(state.objects.present()) == kept


def _schema(path: Path) -> list[str]:
    connection = sqlite3.connect(path)
    names = [name for (name,) in connection.execute("SELECT name FROM sqlite_schema")]
    connection.close()
    return names
