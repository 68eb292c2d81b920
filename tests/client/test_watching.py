"""Watching the photos: every change is told, a folder that vanishes is found again, and a deletion is stated."""

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hanse_client import watching
from hanse_client.catalog import Catalog, Problem, Record
from hanse_client.watching import Changes, Watcher, compare, in_words, on_network_drive
from hanse_common.vision.photo import LIMITS

WAIT = 60.0
STILL = 0.25  # seconds in which nothing must be heard


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "Shirt").mkdir(parents=True)
    (folder / "Shirt" / "1.jpg").write_bytes(b"photo")
    return folder


@pytest.fixture
def watch(request: pytest.FixtureRequest) -> Iterator[Callable[..., Watcher]]:
    """Return a function that starts a quick watcher which has told of its start, by notices unless told otherwise."""
    polling = getattr(request, "param", False)
    begun: list[Watcher] = []

    def start(source: Path, **options: Any) -> Watcher:
        quick = {"quiet_seconds": 0.05, "check_seconds": 0.1, "poll_seconds": 0.1, "polling": polling}
        watcher = Watcher(source, **(quick | options))
        begun.append(watcher.__enter__())
        assert watcher.wait(WAIT), "the first look"
        return watcher

    yield start
    for watcher in begun:
        watcher.__exit__(None, None, None)
        assert not watcher._thread.is_alive()


by_notices_and_by_looking = pytest.mark.parametrize(
    "watch", [False, True], ids=["notices", "looking"], indirect=True
)


def settle(watcher: Watcher) -> int:
    """Wait until the watcher has told all, and return how often that was."""
    for count in range(20):
        if not watcher.wait(STILL):
            return count
    raise AssertionError("it goes on telling of changes that are none")


@by_notices_and_by_looking
def test_every_kind_of_change_is_told(photos: Path, watch: Callable[..., Watcher]) -> None:
    watcher = watch(photos)
    new = photos / "Shoe" / "summer" / "2.jpg"
    changes: dict[str, Callable[[], object]] = {
        "a folder": lambda: new.parent.mkdir(parents=True),
        "a photo": lambda: new.write_bytes(b"new"),
        # Who looks from time to time compares times by the second.
        "another content": lambda: (new.write_bytes(b"edited"), os.utime(new, (time.time() + 100,) * 2)),
        "another name": lambda: new.rename(new.with_name("3.jpg")),
        "no photo": lambda: new.with_name("3.jpg").unlink(),
    }
    for name, change in changes.items():
        change()
        assert watcher.wait(WAIT), name
        settle(watcher)


def test_silence_is_not_trusted_for_ever(photos: Path, watch: Callable[..., Watcher]) -> None:
    watcher = watch(photos, look_seconds=0.2)
    assert watcher.wait(WAIT) and watcher.wait(WAIT), "though nothing changed"


def test_reading_is_no_change(photos: Path, watch: Callable[..., Watcher]) -> None:
    watcher = watch(photos)
    assert (photos / "Shirt" / "1.jpg").read_bytes() == b"photo"
    assert list(photos.iterdir())
    assert not watcher.wait(STILL)


def test_many_changes_are_told_together(photos: Path, watch: Callable[..., Watcher]) -> None:
    watcher = watch(photos, quiet_seconds=0.4)
    for number in range(200):
        (photos / "Shirt" / f"{number}.jpg").write_bytes(b"copied")
    assert watcher.wait(WAIT)
    assert settle(watcher) <= 2


@by_notices_and_by_looking
def test_a_folder_that_vanishes_and_comes_back(photos: Path, watch: Callable[..., Watcher]) -> None:
    watcher = watch(photos)
    away = photos.with_name("away")
    for _ in range(2):
        photos.rename(away)
        assert watcher.wait(WAIT), "gone"
        assert not watcher.wait(STILL)
        away.rename(photos)
        assert watcher.wait(WAIT), "back"
        (photos / "Shirt" / "new.jpg").write_bytes(b"new")
        assert watcher.wait(WAIT), "watched again"
        (photos / "Shirt" / "new.jpg").unlink()
        assert watcher.wait(WAIT)
        settle(watcher)


def test_another_folder_in_its_place(photos: Path, watch: Callable[..., Watcher]) -> None:
    watcher = watch(photos)
    other = photos.with_name("other")
    shutil.copytree(photos, other)
    photos.rename(photos.with_name("old"))
    other.rename(photos)
    assert watcher.wait(WAIT)
    settle(watcher)
    (photos / "Shirt" / "new.jpg").write_bytes(b"new")
    assert watcher.wait(WAIT)


def test_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    folder = tmp_path / "drive" / "photos"
    with Watcher(folder, quiet_seconds=0.05, check_seconds=0.1) as watcher:
        assert not watcher.wait(STILL)
        folder.mkdir(parents=True)
        assert watcher.wait(WAIT)


def test_a_csv_files_folder_is_watched_and_the_state_in_it_is_not(
    tmp_path: Path, watch: Callable[..., Watcher]
) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "shop.csv").write_text("path,label\n")
    watcher = watch(tmp_path / "shop.csv", ignored=(tmp_path / "state",))
    (tmp_path / "state" / "ledger.sqlite").write_bytes(b"entry")
    assert not watcher.wait(STILL)
    (tmp_path / "shop.csv").write_text("path,label\n1.jpg,Shirt\n")
    assert watcher.wait(WAIT)
    settle(watcher)
    (tmp_path / "1.jpg").write_bytes(b"photo")
    assert watcher.wait(WAIT)


def test_what_is_no_photo_of_the_catalog_does_not_matter(tmp_path: Path) -> None:
    folder = tmp_path / ".hidden" / "photos"
    watcher = Watcher(folder, ignored=(tmp_path / "state",))
    assert watcher._matters(folder, str(folder / "Shirt" / "1.jpg")), (
        "though the folder itself lies in a hidden one"
    )
    for name in (".trash/1.jpg", "Shirt/.1.jpg.part", "Shirt/Thumbs.db", "@eaDir/1.jpg"):
        assert not watcher._matters(folder, str(folder / name))
    assert not watcher._matters(folder, str(tmp_path / "state" / "photos.sqlite"))


def test_where_there_are_no_notices_the_folder_is_looked_through(
    photos: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    original = watching.watch

    def no_more(*paths: Path, **options: Any) -> Any:
        if not options["force_polling"]:
            raise OSError("OS file watch limit reached")
        return original(*paths, **options)

    monkeypatch.setattr(watching, "watch", no_more)
    with Watcher(photos, quiet_seconds=0.05, check_seconds=0.1, poll_seconds=0.1) as watcher:
        assert watcher.wait(WAIT)
        (photos / "Shirt" / "new.jpg").write_bytes(b"new")
        assert watcher.wait(WAIT)
    assert "gives no notices" in caplog.text


@pytest.mark.parametrize(
    ("kind", "remote"),
    [
        ("nfs4", True),
        ("cifs", True),
        ("fuse.sshfs", True),
        ("smbfs", True),
        ("ext4", False),
        ("fuseblk", False),
    ],
)
def test_network_drives_are_looked_through(
    photos: Path, monkeypatch: pytest.MonkeyPatch, kind: str, remote: bool
) -> None:
    mounts = [
        SimpleNamespace(mountpoint="/", fstype="nfs" if kind == "ext4" else "ext4"),
        SimpleNamespace(mountpoint=str(photos.resolve()), fstype=kind),
        SimpleNamespace(mountpoint=f"{photos.resolve()}-beside", fstype="nfs"),
    ]
    monkeypatch.setattr(psutil, "disk_partitions", lambda **_: mounts)
    assert on_network_drive(photos / "Shirt") is remote


# Two catalogs


def catalog(photos: dict[str, tuple[bytes, int]], problems: tuple[str, ...] = ()) -> Catalog:
    records = tuple(
        Record(Path(name), label, None, None, hashlib.sha256(content).digest(), False, LIMITS)
        for name, (content, label) in sorted(photos.items())
    )
    return Catalog(records, tuple(Problem(Path(name), "damaged") for name in problems), {})


def names(*paths: str) -> tuple[Path, ...]:
    return tuple(Path(path) for path in paths)


def test_each_kind_of_difference() -> None:
    before = catalog(
        {
            "same": (b"1", 0),
            "edited": (b"2", 0),
            "deleted": (b"3", 0),
            "old name": (b"4", 0),
            "other class": (b"5", 0),
            "broken": (b"6", 0),
            "one of two": (b"7", 0),
            "two of two": (b"7", 0),
        }
    )
    after = catalog(
        {
            "same": (b"1", 0),
            "edited": (b"22", 0),
            "new name": (b"4", 1),
            "other class": (b"5", 1),
            "two of two": (b"7", 0),
            "new": (b"8", 0),
            "copy of same": (b"1", 0),
        },
        problems=("broken", "never usable"),
    )
    assert compare(before, after) == Changes(
        added=names("copy of same", "new"),
        removed=names("deleted", "one of two"),
        replaced=names("edited"),
        moved=names("new name", "other class"),
        unusable=names("broken"),
    )
    assert not compare(before, before)


SHOPS = st.dictionaries(
    st.sampled_from("abcdef"), st.tuples(st.sampled_from([b"1", b"2", b"3"]), st.integers(0, 1)), max_size=6
)


@given(SHOPS, SHOPS)
def test_no_difference_is_left_out_or_counted_twice(
    one: dict[str, tuple[bytes, int]], two: dict[str, tuple[bytes, int]]
) -> None:
    changes = compare(catalog(one), catalog(two))
    assert len(two) - len(one) == len(changes.added) - len(changes.removed)
    assert bool(changes) == (one != two)
    told = [*changes.added, *changes.removed, *changes.replaced, *changes.moved]
    assert len(told) == len(set(told))
    back = compare(catalog(two), catalog(one))
    assert (len(back.added), len(back.removed)) == (len(changes.removed), len(changes.added))
    contents = [content for content, _ in one.values()]
    for path in changes.removed:
        assert one[str(path)][0] in contents and str(path) not in two


def test_a_deletion_is_stated_in_plain_words() -> None:
    assert in_words(Changes(added=names("a", "b", "c"), removed=names("d"))) == (
        "Your photos changed: 3 photos are new, 1 was removed. What was removed is not trained on from the next block "
        "on. What it contributed before stays contributed; its budget is not given back."
    )
    assert in_words(Changes(added=names("a"))) == "Your photos changed: 1 photo is new."
    assert in_words(Changes(moved=names("a", "b"))) == "Your photos changed: 2 were moved."
    assert in_words(Changes()) == ""
    for gone in ({"replaced": names("a")}, {"unusable": names("a")}):
        assert "is not trained on from the next block on" in in_words(Changes(**gone))
