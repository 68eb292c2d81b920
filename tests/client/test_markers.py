"""Marks that outlive a crash: attempts, the directory's version, and other merchants' ledgers."""

import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hanse_client.markers import Begun, Markers
from hanse_common import signing
from hanse_common.charter import Charter, founded
from hanse_common.directory import Directory, Entry
from hanse_common.errors import DirectoryRefused, LedgerError
from hanse_common.secagg.witness import Witness

PLAN, OTHER = b"p" * 32, b"o" * 32
CHARTER = founded("test", Ed25519PrivateKey.from_private_bytes(bytes(range(32)))).read()
ANOTHER = founded("test", Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))).read()


def directory(version: int, expires: int = 9, charter: Charter = CHARTER) -> Directory:
    entries = (Entry(name="alder", entity="Alder", identity=bytes(32), expires=9),)
    return Directory(league="test", charter=charter.digest, version=version, expires=expires, entries=entries)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "markers.sqlite"


def test_attempts_only_grow_also_in_another_process(path: Path) -> None:
    Markers(path).begin(PLAN, 3)
    for attempt in (0, 2, 3):
        with pytest.raises(Begun, match="the last one was 4"):
            Markers(path).begin(PLAN, attempt)
    Markers(path).begin(OTHER, 0)  # of another plan
    Markers(path).begin(PLAN, 4)


CRASHING = """
import os, signal, sys
from pathlib import Path
from hanse_client.markers import Markers
Markers(Path(sys.argv[1])).begin(b"p" * 32, 7)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_an_attempt_is_there_after_a_kill(path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", CRASHING, path], check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    with pytest.raises(Begun):
        Markers(path).begin(PLAN, 7)


def test_a_directory_never_goes_back_nor_changes_within_a_version(path: Path) -> None:
    Markers(path).see_directory(directory(2), (CHARTER,))
    Markers(path).see_directory(directory(2), (CHARTER,))
    for earlier in (directory(1), directory(2, expires=8)):
        with pytest.raises(DirectoryRefused, match="have seen version 2"):
            Markers(path).see_directory(earlier, (CHARTER,))
    Markers(path).see_directory(directory(1, charter=ANOTHER), (ANOTHER,))  # of another league
    Markers(path).see_directory(directory(3), (CHARTER,))
    with pytest.raises(DirectoryRefused):
        Markers(path).see_directory(directory(2), (CHARTER,))


def test_counters_are_remembered_and_never_lowered(path: Path) -> None:
    key = Ed25519PrivateKey.generate()
    owner, stranger = signing.public_bytes(key), b"s" * 32
    Markers(path).remember({owner: Witness.sign(key, 5)})
    Markers(path).remember({owner: Witness.sign(key, 4), stranger: Witness(1, bytes(64))})
    found = Markers(path).witnesses()
    assert found == {owner: Witness.sign(key, 5), stranger: Witness(1, bytes(64))}
    Markers(path).remember({owner: Witness.sign(key, 6)})
    assert Markers(path).witnesses()[owner].counter == 6


def test_nobody_else_may_read_it(path: Path) -> None:
    Markers(path).begin(PLAN, 0)
    for file in (path, *path.parent.iterdir()):  # SQLite's own files beside it, too
        assert file.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    path.chmod(0o644)  # as a backup may have left it
    Markers(path)
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_file_that_another_process_keeps_locked(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    markers = Markers(path)
    connect = sqlite3.connect
    with closing(connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        monkeypatch.setattr(
            sqlite3, "connect", lambda *where, **how: connect(*where, **how | {"timeout": 0.01})
        )
        for use in (
            lambda: Markers(path),
            lambda: markers.begin(PLAN, 0),
            lambda: markers.see_directory(directory(1), (CHARTER,)),
            lambda: markers.remember({OTHER: Witness(1, bytes(64))}),
            markers.witnesses,
        ):
            with pytest.raises(LedgerError, match=r"markers\.sqlite.*locked"):
                use()
    markers.begin(PLAN, 0)


def test_a_file_that_vanishes_is_not_made_anew_behind_a_running_shop(path: Path) -> None:
    markers = Markers(path)
    markers.begin(PLAN, 7)
    for file in list(path.parent.iterdir()):
        file.unlink()
    with pytest.raises(LedgerError, match=r"markers\.sqlite"):
        markers.begin(PLAN, 7)


def test_what_cannot_be_used_is_said_and_left_alone(path: Path, tmp_path: Path) -> None:
    markers = Markers(path)
    path.write_bytes(b"no database at all" * 300)
    for use in (lambda: Markers(path), lambda: markers.begin(PLAN, 0), markers.witnesses):
        with pytest.raises(LedgerError, match=r"markers\.sqlite"):
            use()
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as db:
        db.execute("CREATE TABLE theirs (x)")
    with pytest.raises(LedgerError, match="another program's"):
        Markers(other)
    with pytest.raises(LedgerError, match="cannot be made"):
        Markers(other / "below" / "markers.sqlite")
    assert os.listdir(tmp_path / "state") == ["markers.sqlite"]  # noqa: PTH208
