"""Backups from anywhere: whatever is wrong with one, it is refused in words, and nothing is written."""

import io
import json
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select

from hanse_common.errors import StorageError
from hanse_server.storage import State
from hanse_server.storage.backup import read_backup, write_backup
from hanse_server.storage.schema import Record

Entries = dict[str, bytes]


@pytest.fixture
def honest(fill: Callable[[State], Any], tmp_path: Path) -> Path:
    """A backup with records of all kinds."""
    with State.open(tmp_path / "honest") as state:
        fill(state)
        write_backup(state, tmp_path / "honest.tar")
    return tmp_path / "honest.tar"


def entries_of(path: Path) -> Entries:
    with tarfile.open(path) as tar:
        return {entry.name: tar.extractfile(entry).read() for entry in tar}  # type: ignore[union-attr]


def written(path: Path, entries: Entries, more: tuple[tarfile.TarInfo, ...] = ()) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in entries.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
        for entry in more:
            tar.addfile(entry, io.BytesIO(bytes(entry.size)))
    return path


def refused(path: Path, folder: Path, url: str | None = None) -> str:
    with State.open(folder, url) as state:
        with pytest.raises(StorageError) as error:
            read_backup(state, path)
        assert list(state.objects.present()) == []
        with state.database.reading() as session:
            for table in Record.metadata.sorted_tables:
                assert session.scalar(select(func.count()).select_from(table)) == 0, table.name
    said = str(error.value)
    assert path.name in said
    assert len(said) < 400
    return said


def with_row(entries: Entries, table: str, change: Callable[[dict[str, Any]], Any]) -> Entries:
    """Return the entries with the first row of `table` changed."""
    name = f"tables/{table}.jsonl"
    first, _, rest = entries[name].partition(b"\n")
    row = json.loads(first)
    changed = change(row)
    return entries | {name: json.dumps(row if changed is None else changed).encode() + b"\n" + rest}


def test_the_honest_one_is_taken(honest: Path, tmp_path: Path) -> None:
    with State.open(tmp_path / "state") as state:
        read_backup(state, written(tmp_path / "same.tar", entries_of(honest)))


def test_a_backup_that_ends_early_or_is_damaged_is_refused(honest: Path, tmp_path: Path) -> None:
    whole = honest.read_bytes()
    path = tmp_path / "damaged.tar"
    end = whole.rstrip(b"\0")
    for length in (0, 1, 511, 512, 2000, len(whole) // 2, len(end) - 1):
        path.write_bytes(whole[:length])
        refused(path, tmp_path / "state")
    rng = random.Random(1)
    for _ in range(12):
        place = rng.randrange(len(end))
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << rng.randrange(8))]) + whole[place + 1 :])
        with State.open(tmp_path / f"state{place}") as state:
            try:
                read_backup(state, path)  # in padding, and in what nothing vouches for, a bit may flip
            except StorageError:
                assert list(state.objects.present()) == []
    refused(tmp_path, tmp_path / "state")
    refused(tmp_path / "missing.tar", tmp_path / "state")


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/cron.d/x", "objects/../../outside", "tables/user.jsonl", "readme"]
)
def test_other_entries_are_refused(honest: Path, tmp_path: Path, name: str) -> None:
    path = written(tmp_path / "more.tar", entries_of(honest) | {name: b"x"})
    refused(path, tmp_path / "state")
    assert not (tmp_path / "outside").exists()


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE]
)
def test_links_and_devices_are_refused(honest: Path, tmp_path: Path, kind: bytes) -> None:
    entries = entries_of(honest)
    digest = next(name for name in entries if name.startswith("objects/"))
    del entries[digest]
    entry = tarfile.TarInfo(digest)
    entry.type, entry.linkname = kind, "/etc/passwd"
    assert "no plain file" in refused(written(tmp_path / "link.tar", entries, (entry,)), tmp_path / "state")


def test_a_file_that_says_it_is_huge_is_refused(honest: Path, tmp_path: Path) -> None:
    entries = entries_of(honest)
    sparse = tarfile.TarInfo("objects/" + "ab" * 32)
    sparse.pax_headers = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.realsize": str(1 << 40),
    }
    sparse.size = 512
    refused(written(tmp_path / "sparse.tar", entries, (sparse,)), tmp_path / "state")
    for size in (1 << 40, 1 << 33, -1):
        path = written(tmp_path / "huge.tar", entries)
        entry = tarfile.TarInfo("objects/" + "ab" * 32)
        entry.size = max(size, 0)
        entry.pax_headers = {"size": str(size)}
        end = path.read_bytes().rstrip(b"\0")
        path.write_bytes(end + bytes(-len(end) % 512) + entry.tobuf(tarfile.PAX_FORMAT))
        refused(path, tmp_path / "state")
    (tmp_path / "compressed.tar").write_bytes(b"\x1f\x8b" + bytes(1000))
    refused(tmp_path / "compressed.tar", tmp_path / "state")


def test_an_entry_that_is_there_twice_is_refused(honest: Path, tmp_path: Path) -> None:
    path = written(tmp_path / "twice.tar", entries_of(honest), (tarfile.TarInfo("backup.json"),))
    assert "twice" in refused(path, tmp_path / "state")


def test_a_missing_or_another_object_is_refused(honest: Path, tmp_path: Path) -> None:
    entries = entries_of(honest)
    digest = next(name for name in entries if name.startswith("objects/"))
    without = {name: data for name, data in entries.items() if name != digest}
    refused(written(tmp_path / "without.tar", without), tmp_path / "state")
    assert "damaged" in refused(written(tmp_path / "other.tar", entries | {digest: b"x"}), tmp_path / "state")
    more = entries | {"objects/" + "ab" * 32: b"x"}
    refused(written(tmp_path / "more.tar", more), tmp_path / "state")


def test_a_missing_table_or_record_is_refused(honest: Path, tmp_path: Path) -> None:
    entries = entries_of(honest)
    for name in ("backup.json", "tables/gap.jsonl"):
        without = {other: data for other, data in entries.items() if other != name}
        refused(written(tmp_path / "without.tar", without), tmp_path / "state")
    fewer = entries["tables/audit.jsonl"].partition(b"\n")[2]
    refused(written(tmp_path / "fewer.tar", entries | {"tables/audit.jsonl": fewer}), tmp_path / "state")


def test_another_header_is_refused(honest: Path, tmp_path: Path) -> None:
    for header in (
        b"",
        b"[]",
        b"null",
        b"{}",
        b'{"format": 2}',
        b'{"format": 1, "schema": "0009", "tables": {}}',
        b"[" * 100_000,
    ):
        path = written(tmp_path / "header.tar", entries_of(honest) | {"backup.json": header})
        refused(path, tmp_path / "state")


WRONG: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
    ("plan", lambda row: row.update(rounds="4")),
    ("plan", lambda row: row.update(rounds=True)),
    ("plan", lambda row: row.update(rounds=1 << 31)),
    ("plan", lambda row: row.update(rounds=10**400)),
    ("plan", lambda row: row.update(seen=float("nan"))),
    ("plan", lambda row: row.update(seen=float("inf"))),
    ("plan", lambda row: row.update(league="x" * 64)),
    ("plan", lambda row: row.update(league=None)),
    ("plan", lambda row: row.update(league="a\0b")),
    ("plan", lambda row: row.update(league="\ud800")),
    ("plan", lambda row: row.update(signed="text")),
    ("plan", lambda row: row.update(signed={"base64": "!"})),
    ("plan", lambda row: row.update(start=["ab" * 32])),
    ("plan", lambda row: row.update(start={"model": "../../etc/passwd"})),
    ("plan", lambda row: row.update(start={"model": {}})),
    ("plan", lambda row: row.update(more=1)),
    ("plan", lambda row: row.pop("seen") and None),
    ("plan", lambda row: [1]),
    ("plan", lambda row: row.update(digest="cd" * 32)),  # others name the one that was there
    ("version", lambda row: row.update(files={"../../../tmp/x": "ab" * 32})),
    ("version", lambda row: row.update(files={".hidden": "ab" * 32})),
    ("version", lambda row: row.update(files={"card.json": 7})),
    ("version", lambda row: row.update(state="lost in thought")),
    ("checkpoint", lambda row: row.update(object="ab" * 31)),
    ("round", lambda row: row.update(update="")),
    ("directory", lambda row: row.update(members={"alder": 1})),
    ("directory", lambda row: row.update(members=[1])),
    ("run", lambda row: row.update(stop_requested=0)),
    ("run", lambda row: row.update(state="running", number=-2)),
    ("attempt", lambda row: row.update(number=(1 << 31) - 1)),
]


def test_records_of_other_types_are_refused(honest: Path, tmp_path: Path, url: str) -> None:
    entries = entries_of(honest)
    for number, (table, change) in enumerate(WRONG):
        path = written(tmp_path / f"wrong{number}.tar", with_row(entries, table, change))
        refused(path, tmp_path / "state", url)


def test_a_line_without_an_end_is_refused(honest: Path, tmp_path: Path) -> None:
    entries = entries_of(honest)
    audit = entries["tables/audit.jsonl"]
    for text in (audit[:-1], audit + b" " * (1 << 25), audit + b"[" * 100_000 + b"\n"):
        path = written(tmp_path / "lines.tar", entries | {"tables/audit.jsonl": text})
        refused(path, tmp_path / "state")
