"""Objects: whole or not there, never trusted unread, and deleted only when nothing names them."""

import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from hanse_common.errors import StorageError
from hanse_server.storage import Objects

Child = Callable[[Callable[[], object]], int]


def only_file(folder: Path) -> Path:
    (found,) = (path for path in folder.rglob("*") if path.is_file())
    return found


def test_what_is_put_can_be_got(tmp_path: Path) -> None:
    objects = Objects(tmp_path / "objects")
    digest = objects.put(b"data")
    assert objects.get(digest) == b"data"
    assert objects.put(b"data") == digest
    assert list(objects.present()) == [digest]


@pytest.mark.parametrize("damage", [b"", b"dat", b"date", b"data and more"])
def test_a_damaged_object_is_not_handed_out_and_is_healed_when_put_again(
    tmp_path: Path, damage: bytes
) -> None:
    objects = Objects(tmp_path / "objects")
    digest = objects.put(b"data")
    only_file(tmp_path).write_bytes(damage)
    with pytest.raises(StorageError, match=f"{digest}: its content is damaged"):
        objects.get(digest)
    objects.put(b"data")
    assert objects.get(digest) == b"data"


def test_an_object_that_is_open_outlives_its_end(tmp_path: Path) -> None:
    objects = Objects(tmp_path / "objects")
    digest = objects.put(b"data")
    with objects.open(digest) as file:
        objects.drop({digest})
        assert file.read() == b"data"
    with pytest.raises(StorageError, match="restore it from a backup"):
        objects.open(digest)


def test_a_full_disk_is_named_and_leaves_nothing_half_written(tmp_path: Path, in_child: Child) -> None:
    objects = Objects(tmp_path / "objects")
    kept = objects.put(b"small")

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        with pytest.raises(StorageError, match=r"cannot be written \(File too large\)\. Make room"):
            objects.put(bytes(5000))

    assert in_child(fill) == 0
    assert only_file(tmp_path).name == kept
    assert objects.get(kept) == b"small"


def test_only_digests_are_names(tmp_path: Path) -> None:
    objects = Objects(tmp_path / "objects")
    for name in ("", "../../secret", "A" * 64, "ab" * 31, "ab" * 32 + "/"):
        for use in (objects.get, objects.open, lambda digest: objects.drop({digest})):
            with pytest.raises(StorageError, match="found no digest"):
                use(name)


def test_collecting_takes_what_is_not_named_and_what_is_half_written(tmp_path: Path) -> None:
    objects = Objects(tmp_path / "objects")
    kept, gone = objects.put(b"kept"), objects.put(b"gone")
    (tmp_path / "objects" / kept[:2] / f".{gone}.x1y2").write_bytes(b"half")
    assert objects.collect({kept}) == 2
    assert list(objects.present()) == [kept]
    assert only_file(tmp_path).name == kept


@pytest.mark.parametrize("syncs", [0, 1, 2, 3])
def test_a_kill_at_any_sync_leaves_an_object_whole_or_not_there(
    tmp_path: Path, in_child: Child, syncs: int
) -> None:
    def put() -> None:
        fsync, left = os.fsync, iter(range(syncs))

        def dies(handle: int) -> None:
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            fsync(handle)

        os.fsync = dies  # type: ignore[assignment]  # in the child alone
        Objects(tmp_path / "objects").put(bytes(100_000))

    assert in_child(put) == signal.SIGKILL
    objects = Objects(tmp_path / "objects")
    for digest in objects.present():
        assert objects.get(digest) == bytes(100_000)
    objects.collect(set())
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
