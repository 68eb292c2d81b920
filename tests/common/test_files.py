"""Files are replaced whole or not at all."""

import os
import signal
import stat
from pathlib import Path

import pytest

from hanse_common.errors import ConfigError
from hanse_common.files import PUBLIC, read_bounded, write_atomically


def test_a_file_is_made_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_atomically(path, b"one")
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two"
    assert [child.name for child in tmp_path.iterdir()] == ["a"]


def test_a_failure_leaves_the_old_content_and_no_litter(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "a").mkdir(parents=True)  # a folder cannot be replaced by a file
    with pytest.raises(OSError, match="a"):
        write_atomically(folder / "a", b"new")
    assert [child.name for child in folder.iterdir()] == ["a"]
    with pytest.raises(OSError, match="missing"):
        write_atomically(tmp_path / "missing" / "a", b"new")


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_kill_at_any_step_leaves_the_old_or_the_new(
    tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def die(*args: object, **kwargs: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        if call == "write":
            monkeypatch.setattr(os, "fdopen", die)
        elif call == "fsync":
            monkeypatch.setattr(os, "fsync", die)
        else:
            monkeypatch.setattr(Path, "replace", die)
        write_atomically(path, b"new")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert path.read_bytes() == b"old"


def test_reading_stops_at_the_bound_and_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"12345")
    assert read_bounded(path, 5, "five bytes", ConfigError) == b"12345"
    with pytest.raises(ConfigError, match="a: found more than 4 bytes, expected four bytes"):
        read_bounded(path, 4, "four bytes", ConfigError)
    with pytest.raises(ConfigError, match=r"b: cannot be read \(No such file.*expected a thing"):
        read_bounded(tmp_path / "b", 4, "a thing", ConfigError)


def test_no_more_than_the_bound_is_read(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    path.touch()
    os.truncate(path, 1 << 40)
    with pytest.raises(ConfigError, match="more than 4 bytes"):
        read_bounded(path, 4, "four bytes", ConfigError)


def test_file_and_folder_are_synced_and_the_rename_stays_in_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, moved = [], []
    fsync, replace = os.fsync, Path.replace

    def spy_fsync(handle: int) -> None:
        synced.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        fsync(handle)

    def spy_replace(self: Path, target: Path) -> Path:
        moved.append(self.parent)
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(Path, "replace", spy_replace)
    write_atomically(tmp_path / "a", b"1")
    assert synced == ["file", "folder"]
    assert moved == [tmp_path]


def test_nobody_else_may_read_a_file_unless_told_otherwise(tmp_path: Path) -> None:
    write_atomically(tmp_path / "secret", b"1")
    write_atomically(tmp_path / "public", b"1", PUBLIC)
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "public").stat().st_mode) == 0o644
