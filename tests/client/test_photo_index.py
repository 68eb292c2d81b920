"""The photo index: an unchanged file is not read again, a changed one is, and the catalog is the same either way."""

import io
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hanse_client import photo_index
from hanse_client.catalog import Catalog
from hanse_client.photo_index import PhotoIndex
from hanse_common.errors import CatalogError, PhotoUnreadable
from hanse_common.vision import photo
from hanse_common.vision.photo import LIMITS, PhotoLimits
from hanse_common.vision.taxonomy import LabelMap, Taxonomy

LABELS = LabelMap(Taxonomy(classes=("Shirt", "Shoe")))


def bitmap(number: int) -> bytes:
    """Return a photo file; all of them have the same size."""
    file = io.BytesIO()
    Image.fromarray(np.full((4, 4), number, dtype=np.uint8)).save(file, "BMP")
    return file.getvalue()


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    folder = tmp_path / "shop"
    for label in ("Shirt", "Shoe"):
        (folder / label).mkdir(parents=True)
        for number in range(3):
            (folder / label / f"{number}.bmp").write_bytes(bitmap(number))
    return folder


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "photos.sqlite"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files read, as they are read."""
    names: list[str] = []
    original = photo.read

    def read(path: Path, limits: PhotoLimits = LIMITS) -> bytes:
        names.append(path.name)
        return original(path, limits)

    monkeypatch.setattr(photo, "read", read)
    return names


@pytest.fixture
def at_rest(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Files count as unchanged for long, since no test can wait, nor change the time of a file's last change."""
    monkeypatch.setattr(photo_index, "FRESH", -(10**10))
    return


def load(shop: Path, path: Path | None, limits: PhotoLimits = LIMITS, **options: Any) -> Catalog:
    fixed = {"holdout_key": bytes(16), "holdout_fraction": 0.3, "limits": limits}
    if path is None:
        return Catalog.load(shop, LABELS, **fixed, **options)
    with PhotoIndex(path) as index:
        return Catalog.load(shop, LABELS, **fixed, **options, index=index)


@pytest.mark.usefixtures("at_rest")
def test_an_unchanged_file_is_not_read_again(shop: Path, path: Path, reads: list[str]) -> None:
    expected = load(shop, None)
    reads.clear()
    assert load(shop, path) == expected
    assert len(reads) == 6
    assert load(shop, path) == expected
    assert len(reads) == 6


@pytest.mark.usefixtures("at_rest")
def test_changed_added_and_deleted_files(shop: Path, path: Path, reads: list[str]) -> None:
    load(shop, path)
    reads.clear()
    (shop / "Shirt" / "1.bmp").write_bytes(bitmap(77))
    (shop / "Shoe" / "new.bmp").write_bytes(bitmap(8))
    (shop / "Shoe" / "0.bmp").unlink()
    found = load(shop, path)
    assert sorted(reads) == ["1.bmp", "new.bmp"]
    assert found == load(shop, None)


@pytest.mark.usefixtures("at_rest")
@pytest.mark.parametrize("how", ["in place", "another file"])
def test_a_change_that_hides_its_time_and_size_is_seen(shop: Path, path: Path, how: str) -> None:
    """As of tools that keep the time of a photo they edit, and of copies that keep it."""
    file = shop / "Shirt" / "1.bmp"
    load(shop, path)
    before = file.stat()
    if how == "in place":
        file.write_bytes(bitmap(78))
    else:
        (shop / "other").write_bytes(bitmap(78))
        (shop / "other").replace(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert load(shop, path) == load(shop, None)


def test_a_file_changed_just_now_is_read_again(
    shop: Path, path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    load(shop, path)
    load(shop, path)
    assert len(reads) == 12, "it might change again and look the same"
    later = photo_index.time.time_ns() + 2 * photo_index.FRESH
    monkeypatch.setattr(photo_index.time, "time_ns", lambda: later)
    load(shop, path)
    load(shop, path)
    assert len(reads) == 18


@pytest.mark.usefixtures("at_rest")
def test_a_file_that_changes_while_it_is_read_is_read_again(
    shop: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = photo.read

    def read(file: Path, limits: PhotoLimits = LIMITS) -> bytes:
        data = original(file, limits)
        if file.name == "2.bmp":
            file.write_bytes(bitmap(99))
        return data

    with monkeypatch.context() as patch:
        patch.setattr(photo, "read", read)
        load(shop, path)
    assert load(shop, path) == load(shop, None)


@pytest.mark.usefixtures("at_rest")
def test_why_a_photo_cannot_be_used_is_remembered(shop: Path, path: Path, reads: list[str]) -> None:
    (shop / "Shirt" / "note.txt").write_text("no photo")
    (shop / "Shirt" / "wide.png").write_bytes(b"")
    Image.new("L", (200, 200)).save(shop / "Shirt" / "wide.png")
    (shop / "Shirt" / "long.bmp").write_bytes(bitmap(1) + bytes(4000))
    limits = PhotoLimits(max_pixels=10_000, max_bytes=3000)
    expected = load(shop, None, limits)
    assert len(expected.problems) == 3
    assert load(shop, path, limits) == expected
    reads.clear()
    assert load(shop, path, limits) == expected
    assert reads == []
    assert load(shop, path, PhotoLimits()) == load(shop, None, PhotoLimits()), "other limits, other verdicts"


@pytest.mark.usefixtures("at_rest")
def test_what_may_pass_is_not_remembered(shop: Path, path: Path) -> None:
    (shop.parent / "drive").mkdir()
    (shop / "Shirt" / "late.bmp").symlink_to(shop.parent / "drive" / "late.bmp")
    (shop / "Shoe" / "empty.bmp").touch()
    assert len(load(shop, path).problems) == 2
    (shop.parent / "drive" / "late.bmp").write_bytes(bitmap(5))
    found = load(shop, path)
    assert [problem.path.name for problem in found.problems] == ["empty.bmp"]
    assert found == load(shop, None)


@pytest.mark.usefixtures("at_rest")
def test_a_disk_that_fails_once_is_asked_again(
    shop: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(file: Path, limits: PhotoLimits) -> bytes:
        raise PhotoUnreadable(f"{file}: cannot be opened (Input/output error)")

    with monkeypatch.context() as patch, PhotoIndex(path) as index:
        patch.setattr(photo, "read", fails)
        with pytest.raises(PhotoUnreadable):
            index.digest(shop / "Shirt" / "1.bmp", LIMITS)
    assert load(shop, path) == load(shop, None)


@pytest.mark.usefixtures("at_rest")
@pytest.mark.parametrize("column", ["state", "digest", "reason", "mark"])
@pytest.mark.parametrize("value", [bytes(32), "text", 5, None])
def test_an_entry_that_was_altered_is_found_out_again(
    shop: Path, path: Path, column: str, value: object
) -> None:
    load(shop, path)
    with sqlite3.connect(path) as database:
        database.execute(f"UPDATE photo SET {column} = ?", (value,))  # noqa: S608
    database.close()
    assert load(shop, path) == load(shop, None)


@pytest.mark.usefixtures("at_rest")
def test_a_record_checks_its_content_whatever_the_index_says(
    shop: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(photo, "content_digest", lambda data: bytes(32))
        load(shop, path)
    record = load(shop, path).records[0]
    assert record.digest == bytes(32)
    with pytest.raises(PhotoUnreadable, match="other content"):
        record.open()


@pytest.mark.usefixtures("at_rest")
def test_deleted_photos_are_forgotten(shop: Path, path: Path) -> None:
    load(shop, path)
    (shop / "Shirt" / "0.bmp").unlink()
    load(shop, path)
    with sqlite3.connect(path) as database:
        paths = [
            Path(os.fsdecode(row[0])) for row in database.execute("SELECT path FROM photo ORDER BY path")
        ]
    database.close()
    assert paths == sorted(shop.glob("*/*.bmp"))


@pytest.mark.usefixtures("at_rest")
def test_an_interruption_loses_nothing(shop: Path, path: Path, reads: list[str]) -> None:
    def progress(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load(shop, path, progress=progress)
    reads.clear()
    load(shop, path)
    assert len(reads) == 1


@pytest.mark.usefixtures("at_rest")
def test_a_crash_loses_little(
    shop: Path, path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(photo_index, "PENDING", 2)
    crashed = PhotoIndex(path)
    for file in sorted(shop.glob("*/*.bmp"))[:5]:
        crashed.digest(file, LIMITS)
    reads.clear()
    load(shop, path)
    assert len(reads) == 2, "one of the five, and the sixth"


@pytest.mark.usefixtures("at_rest")
def test_names_that_are_no_text(shop: Path, path: Path, reads: list[str]) -> None:
    file = shop / "Shirt" / os.fsdecode(b"caf\xe9 \n.bmp")
    file.write_bytes(bitmap(3))
    load(shop, path)
    reads.clear()
    assert load(shop, path) == load(shop, None)
    assert len(reads) == 7, "of the comparison"


# The file


@pytest.mark.usefixtures("at_rest")
def test_nobody_else_may_read_the_file(shop: Path, path: Path) -> None:
    path.parent.mkdir()
    path.touch(mode=0o644)
    with PhotoIndex(path) as index:
        index.digest(shop / "Shirt" / "0.bmp", LIMITS)
        index.keep([shop / "Shirt" / "0.bmp"])
        assert {file.stat().st_mode & 0o777 for file in path.parent.iterdir()} == {0o600}


@pytest.mark.usefixtures("at_rest")
@pytest.mark.parametrize("content", [b"", b"no database at all, but long enough to be one" * 99])
def test_a_file_that_is_no_index_is_made_anew(
    shop: Path, path: Path, content: bytes, reads: list[str]
) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    load(shop, path)
    reads.clear()
    load(shop, path)
    assert reads == []


@pytest.mark.usefixtures("at_rest")
def test_an_index_of_another_release_is_made_anew(shop: Path, path: Path) -> None:
    path.parent.mkdir()
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE photo (path BLOB)")
    database.close()
    assert load(shop, path) == load(shop, path) == load(shop, None)


@pytest.mark.usefixtures("at_rest")
def test_damage_anywhere_costs_time_only(shop: Path, path: Path) -> None:
    for number in range(200):
        (shop / "Shirt" / f"more{number}.bmp").write_bytes(bitmap(number))
    load(shop, path)
    data = path.read_bytes()
    for begin in range(0, len(data), len(data) // 7):
        path.write_bytes(data[:begin] + b"\xa5" * 6000 + data[begin + 6000 :])
        assert load(shop, path) == load(shop, path) == load(shop, None)


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CatalogError, match=r"photos\.sqlite: cannot make the photo index"):
        PhotoIndex(tmp_path / "file" / "photos.sqlite")
    (tmp_path / "folder").mkdir()
    with pytest.raises(CatalogError, match="check the folder and the disk"):
        PhotoIndex(tmp_path / "folder")
