"""Backups: one moment of a server that runs, restored under any database, from which the training goes on."""

import json
import os
import signal
import stat
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from hanse_common.errors import StorageError
from hanse_server.audit import verify
from hanse_server.storage import Progress, State, backup
from hanse_server.storage.backup import SKIPPED_ATTEMPTS, read_backup, write_backup
from hanse_server.storage.objects import Objects
from hanse_server.storage.schema import AttemptRecord, CheckpointRecord, Record, RoundRecord

Make = Callable[..., Any]
MakeUrl = Callable[[], str]


def rows(state: State) -> dict[str, list[Any]]:
    with state.database.reading() as session:
        return {
            table.name: [tuple(row) for row in session.execute(select(table).order_by(*table.primary_key))]
            for table in Record.metadata.sorted_tables
        }


def at(state: State, seconds: float) -> State:
    state.database.clock = lambda: seconds
    return state


def test_all_records_and_objects_come_back(
    state: State, fill: Make, make_url: MakeUrl, tmp_path: Path
) -> None:
    fill(state)
    count = write_backup(state, tmp_path / "backup.tar")
    before = rows(state)
    assert count == sum(map(len, before.values()))
    with State.open(tmp_path / "restored", make_url()) as restored:
        assert read_backup(at(restored, 5.0), tmp_path / "backup.tar") == count
        after = rows(restored)
        for name, found in before.items():
            if name not in ("attempt", "audit"):
                assert after[name] == found, name
        assert after["audit"][:-1] == before["audit"]
        verify(restored.audit.entries())
        assert set(restored.objects.present()) == set(state.objects.present())
        for digest in restored.objects.present():
            restored.objects.get(digest)
        # Numbers that the database gives go on from those that came back.
        plan = bytes.fromhex(before["run"][0][1])
        assert restored.history.begin_run(plan, 1) == len(before["run"]) + 1


def test_equal_states_give_equal_backups_whatever_the_database(
    state: State, fill: Make, make_url: MakeUrl, tmp_path: Path
) -> None:
    fill(state)
    write_backup(state, tmp_path / "first.tar")
    with (
        State.open(tmp_path / "one") as one,
        State.open(tmp_path / "other", make_url()) as other,
    ):
        for number, restored in enumerate((one, other)):
            read_backup(at(restored, 5.0), tmp_path / "first.tar")
            write_backup(restored, tmp_path / f"again{number}.tar")
    assert (tmp_path / "again0.tar").read_bytes() == (tmp_path / "again1.tar").read_bytes()


def test_a_restored_server_uses_no_attempt_again(
    state: State, progress_of: Make, make_url: MakeUrl, tmp_path: Path
) -> None:
    begun, fresh = progress_of(state), progress_of(state, league="other")
    for _ in range(3):
        begun.next_attempt()
    write_backup(state, tmp_path / "backup.tar")
    with State.open(tmp_path / "restored", make_url()) as restored:
        read_backup(restored, tmp_path / "backup.tar")
        assert progress_of(restored).next_attempt() == 2 + SKIPPED_ATTEMPTS + 1
        assert progress_of(restored, league="other").next_attempt() > SKIPPED_ATTEMPTS
        with restored.database.reading() as session:
            states = list(session.scalars(select(AttemptRecord.state).order_by(AttemptRecord.number)))
        assert states.count("begun") == 2  # the two that were begun just now
    assert fresh.next_attempt() == 0


def test_a_restored_training_goes_on_to_the_same_model(
    state: State, progress_of: Make, make_rounds: Make, train_all: Make, make_url: MakeUrl, tmp_path: Path
) -> None:
    progress: Progress = progress_of(state)

    def back_up(report: Any) -> None:
        write_backup(state, tmp_path / f"after{report.round}.tar")

    model = train_all(progress, on_round=back_up)
    for round_ in range(4):
        with State.open(tmp_path / f"restored{round_}", make_url()) as restored:
            read_backup(restored, tmp_path / f"after{round_}.tar")
            again = progress_of(restored)
            rounds = make_rounds(again)
            assert train_all(again, rounds).tobytes() == model.tobytes()
            assert rounds.seen == list(range(round_ + 1, 4))
            verify(restored.audit.entries())


def test_only_its_owner_may_read_a_backup_and_none_is_replaced(
    state: State, fill: Make, tmp_path: Path
) -> None:
    fill(state)
    path = tmp_path / "backup.tar"
    write_backup(state, path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    before = path.read_bytes()
    with pytest.raises(StorageError, match="there is a file already"):
        write_backup(state, path)
    assert path.read_bytes() == before
    with pytest.raises(StorageError, match="cannot be written"):
        write_backup(state, tmp_path / "missing" / "backup.tar")


def test_a_checkpoint_that_is_gone_is_named_and_not_waited_for(
    state: State, fill: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(state)
    with state.database.reading() as session:
        digest = session.scalars(select(CheckpointRecord.object)).first()
    assert digest is not None
    (tmp_path / "state" / "objects" / digest[:2] / digest).unlink()
    looks: list[str] = []
    opened = Objects.open
    monkeypatch.setattr(Objects, "open", lambda self, digest: looks.append(digest) or opened(self, digest))
    with pytest.raises(StorageError, match=r"cannot be read \(No such file or directory\); restore it"):
        write_backup(state, tmp_path / "backup.tar")
    assert looks.count(digest) == 2, "once more, in case that a training had just replaced it"


def test_a_damaged_state_is_not_backed_up_and_leaves_no_file(
    state: State, fill: Make, tmp_path: Path
) -> None:
    fill(state)
    digest = next(iter(state.versions.all()[0].files.values()))
    (tmp_path / "state" / "objects" / digest[:2] / digest).write_bytes(b"damaged")
    (tmp_path / "backups").mkdir()
    with pytest.raises(StorageError, match="damaged"):
        write_backup(state, tmp_path / "backups" / "backup.tar")
    assert not list((tmp_path / "backups").iterdir())


def test_a_state_that_is_not_empty_takes_no_backup(state: State, fill: Make, tmp_path: Path) -> None:
    fill(state)
    write_backup(state, tmp_path / "backup.tar")
    before = rows(state)
    with pytest.raises(StorageError, match="holds records already"):
        read_backup(state, tmp_path / "backup.tar")
    assert rows(state) == before


def test_a_backup_while_training_is_one_moment(
    state: State, progress_of: Make, make_rounds: Make, train_all: Make, tmp_path: Path
) -> None:
    backups = _train_and_back_up(state, progress_of, make_rounds, train_all, tmp_path, rounds=30, backups=2)
    _all_are_moments(backups, progress_of, tmp_path, rounds=30)


@pytest.mark.slow
def test_many_backups_while_training_are_moments(
    state: State, progress_of: Make, make_rounds: Make, train_all: Make, tmp_path: Path
) -> None:
    backups = _train_and_back_up(state, progress_of, make_rounds, train_all, tmp_path, rounds=400, backups=10)
    _all_are_moments(backups, progress_of, tmp_path, rounds=400)


def _train_and_back_up(
    state: State,
    progress_of: Make,
    make_rounds: Make,
    train_all: Make,
    folder: Path,
    rounds: int,
    backups: int,
) -> list[Path]:
    """Return `backups` backups that were made while a training of `rounds` rounds went on."""
    progress: Progress = progress_of(state, training={"rounds": rounds})
    failed: list[BaseException] = []
    reached = threading.Semaphore(0)

    def work() -> None:
        try:
            run = state.history.begin_run(progress.plan.digest, 0)
            train_all(progress, make_rounds(progress), on_round=lambda report: reached.release())
            state.history.end_run(run, "finished")
        except BaseException as error:
            failed.append(error)

    training = threading.Thread(target=work)
    training.start()
    made = []
    for number in range(backups):
        for _ in range(rounds // (backups + 1)):
            reached.acquire(timeout=60)
        made.append(folder / f"moment{number}.tar")
        write_backup(state, made[-1])
    training.join()
    assert not failed
    return made


def _all_are_moments(backups: list[Path], progress_of: Make, folder: Path, rounds: int) -> None:
    found = []
    for path in backups:
        with State.open(folder / f"of-{path.stem}") as restored:
            read_backup(restored, path)
            verify(restored.audit.entries())
            progress: Progress = progress_of(restored, training={"rounds": rounds})
            checkpoint = progress.checkpoint()
            with restored.database.reading() as session:
                states = list(session.scalars(select(RoundRecord.state).order_by(RoundRecord.number)))
                done = session.scalar(select(CheckpointRecord.rounds_done)) or 0
            assert states[:done] == ["applied"] * done
            assert states[done:] in ([], ["released"])
            opened = progress.unapplied()
            assert (opened is not None) == (len(states) > done)
            if opened is not None:
                assert opened[0] == done
            assert (checkpoint.rounds_done if checkpoint else 0) == done
            found.append(done)
    assert found == sorted(found)
    assert found[0] < rounds  # it was going on


def test_objects_that_a_training_replaces_meanwhile_are_in_the_backup(
    state: State, progress_of: Make, train_all: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training goes on between the moment and the writing of its objects, however long that takes."""
    progress: Progress = progress_of(state)
    with pytest.raises(ZeroDivisionError):
        train_all(progress, on_round=lambda report: 1 // (1 - report.round))
    header = backup._header

    def slow(tables: Any, objects: list[str]) -> bytes:
        train_all(progress)
        return header(tables, objects)

    with monkeypatch.context() as patched:
        patched.setattr(backup, "_header", slow)
        write_backup(state, tmp_path / "backup.tar")
    with State.open(tmp_path / "restored") as restored:
        read_backup(restored, tmp_path / "backup.tar")
        assert progress_of(restored).rounds_done() == 2


def test_a_kill_while_a_backup_is_read_leaves_an_empty_database(
    state: State, fill: Make, tmp_path: Path, in_child: Make
) -> None:
    fill(state)
    write_backup(state, tmp_path / "backup.tar")

    def killed() -> None:
        backup._go_on_counting = lambda session: os.kill(os.getpid(), signal.SIGKILL)
        with State.open(tmp_path / "restored") as restored:
            read_backup(restored, tmp_path / "backup.tar")

    assert in_child(killed) == signal.SIGKILL
    with pytest.raises(StorageError, match="restore a backup into an empty folder"):
        State.open(tmp_path / "restored")


def test_a_backup_is_an_ordinary_tar_file(state: State, fill: Make, tmp_path: Path) -> None:
    fill(state)
    write_backup(state, tmp_path / "backup.tar")
    with tarfile.open(tmp_path / "backup.tar") as tar:
        names = tar.getnames()
        header = json.load(tar.extractfile("backup.json"))  # type: ignore[arg-type]
    assert names[0] == "backup.json"
    assert (
        sum(name.startswith("tables/") for name in names)
        == len(Record.metadata.tables)
        == len(header["tables"])
    )
    assert (
        sum(name.startswith("objects/") for name in names)
        == header["objects"]
        == len(list(state.objects.present()))
    )
