"""A full disk, a clock that jumps, damaged files: a clear word, an exit code of its own, and a way out that works.

Shown elsewhere: flipped bytes, a file cut short, altered rows and an older ledger in its place (`test_ledger`), a
locked or vanished file of marks (`test_markers`), damage anywhere in the cache of embeddings (`test_embeddings`),
faults in the configuration's values (`test_config`), crashes at every step (`tests/faults`, `test_ledger_crash`).
"""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray
from PIL import Image

from hanse_client import cli, keys
from hanse_client import ledger as ledger_module
from hanse_client.charges import Budget, Charge
from hanse_client.config import ClientConfig
from hanse_client.embeddings import EmbeddingCache
from hanse_client.ledger import Ledger, Repeated
from hanse_client.markers import Begun, Markers
from hanse_client.participant import Participant, PinnedLeague
from hanse_client.policy import Policy
from hanse_common import messages, signing, wire
from hanse_common.charter import founded
from hanse_common.config import load
from hanse_common.directory import Directory, Entry, SignedDirectory
from hanse_common.errors import CatalogError, ConfigError, LedgerError
from hanse_common.messages import DeclineCode, Declined, Invitation
from hanse_common.plan import Plan, SignedPlan
from hanse_common.privacy.mechanism import Mechanism
from hanse_common.secagg.messages import Joined
from hanse_common.vision.recognizer import Recognizer
from hanse_common.vision.taxonomy import Taxonomy
from hanse_server.development_keys import DevelopmentKeys

OPERATOR, HOLDER, OWN, OTHER = (Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32) for n in range(1, 5))
CHARTER = founded("test", HOLDER)
PLAN = b"p" * 32
BUDGET = Budget(4.0, 1e-5)
MECHANISM = Mechanism(clipping_norm=0.5, dimension=100, noise_multiplier=4.0, sampling_rate=0.1, steps=1)
YEAR = 365 * 86_400.0

CONFIG = """\
photos: photos
labels: labels.yaml
state: {state}
recognizer: recognizer
device: cpu
league:
  operator_key: {operator}
  charter: {charter}
  taxonomy: {{classes: [shirt, shoe, bag]}}
policy:
  league: test
  epsilon: 4.0
  delta: 1e-5
connection:
  server: localhost:1
  authority: ca.crt
"""

MakePlan = Callable[..., Plan]


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def shop(tmp_path: Path, make_plan: MakePlan) -> Path:
    """A shop's folder, with photos, a recognizer and a configuration."""
    folder = tmp_path / "shop"
    for number in range(12):
        path = folder / "photos" / ("Hemden", "shoe", "bag")[number % 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(256, size=(8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    (folder / "labels.yaml").write_text("Hemden: shirt\n")
    configure(folder, "state")
    plan = make_plan()
    vector = np.random.default_rng(1).normal(size=plan.dimension).astype(np.float32)
    made = Recognizer.create(plan.recipe, plan.taxonomy, vector, created=datetime.now(UTC))
    made.save(folder / "recognizer")
    return folder


def configure(shop: Path, state: str) -> None:
    text = CONFIG.format(
        state=state, operator=signing.public_bytes(OPERATOR).hex(), charter=CHARTER.read().digest.hex()
    )
    (shop / "hanse-client.yaml").write_text(text)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], shop: Path) -> Run:
    """Return a function that calls the command in the shop's folder."""
    monkeypatch.chdir(shop)

    def run(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["hanse-client", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capfd.readouterr()
        assert "Traceback" not in captured.err
        return Result(int(caught.value.code or 0), captured.out, captured.err)

    return run


def charge(round_: int, attempt: int = 0) -> Charge:
    return Charge(PLAN, round_, attempt, MECHANISM, 1000, 1e-5)


# A full disk


class Disk:
    """A file system of 512 kB."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._filler = folder / "filler"

    def fill(self, leave: int = 0) -> None:
        """Leave so many bytes free."""
        with self._filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                file.truncate(max(0, file.tell() - leave))

    def free(self) -> None:
        self._filler.unlink()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A small disk, where the system lets us have one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("only root mounts a small disk")
    command = ["mount", "-t", "tmpfs", "-o", "size=512k,mode=700", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("no file system can be mounted here")
    try:
        yield Disk(folder)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("leave", [0, 32_768])  # no room for the journal's index, or for the journal
def test_a_full_disk_at_a_charge(disk: Disk, leave: int) -> None:
    ledger = Ledger(disk.folder / "state" / "ledger.sqlite", BUDGET)
    ledger.charge(charge(0))
    disk.fill(leave)
    said = r"ledger\.sqlite: the disk is full, so nothing was charged; free some space"
    with pytest.raises(LedgerError, match=said):
        ledger.charge(charge(1))
    disk.free()
    assert ledger.counter == 1
    ledger.charge(charge(1))
    assert Ledger(ledger.path, BUDGET).counter == 2


def test_a_full_disk_where_a_ledger_is_made(disk: Disk) -> None:
    path = disk.folder / "state" / "ledger.sqlite"
    path.parent.mkdir()
    disk.fill()
    with pytest.raises(LedgerError, match=r"ledger\.sqlite: cannot make .*full"):
        Ledger(path, BUDGET)
    assert list(path.parent.iterdir()) == []
    disk.free()
    Ledger(path, BUDGET).charge(charge(0))


@pytest.mark.parametrize("leave", [0, 32_768])
def test_a_full_disk_at_the_marks(disk: Disk, leave: int) -> None:
    path = disk.folder / "state" / "markers.sqlite"
    markers = Markers(path)
    markers.begin(PLAN, 0)
    disk.fill(leave)
    with pytest.raises(LedgerError, match=r"markers\.sqlite: .*disk"):
        markers.begin(PLAN, 1)
    disk.free()
    Markers(path).begin(PLAN, 1)
    with pytest.raises(Begun):
        Markers(path).begin(PLAN, 1)


def test_a_full_disk_at_the_cache(disk: Disk) -> None:
    path, rows = disk.folder / "embeddings.sqlite", [(bytes(32), np.ones(90_000, dtype=np.float32))]
    with EmbeddingCache(path) as cache:
        disk.fill(65_536)
        with pytest.raises(CatalogError, match=r"embeddings\.sqlite: .*full.*check the folder and the disk"):
            cache.put(b"r" * 32, rows)
    disk.fill()
    with pytest.raises(CatalogError, match=r"other\.sqlite: .*check the folder"):
        EmbeddingCache(disk.folder / "other.sqlite")
    disk.free()
    with EmbeddingCache(path) as cache:
        assert cache.get(b"r" * 32, [bytes(32)], 90_000) == {}
        cache.put(b"r" * 32, [(bytes(32), np.ones(9, dtype=np.float32))])
        assert len(cache.get(b"r" * 32, [bytes(32)], 9)) == 1


def test_a_full_disk_at_an_export(disk: Disk, run: Run, shop: Path) -> None:
    Ledger(shop / "state" / "ledger.sqlite", BUDGET).charge(charge(0))
    out = disk.folder / "out.jsonl"
    disk.fill()
    result = run("ledger", "--export", str(out))
    assert result.code == 10
    assert f"{out}: cannot be written (No space left on device); choose another place" in result.err
    assert [file.name for file in disk.folder.iterdir()] == ["filler"]
    disk.free()
    assert run("ledger", "--export", str(out)).code == 0
    assert len(out.read_text().splitlines()) == 1


def test_a_full_disk_at_the_holdout_key(disk: Disk, run: Run, shop: Path) -> None:
    state = disk.folder / "state"
    state.mkdir()
    configure(shop, str(state))
    disk.fill()
    result = run("catalog")
    assert result.code in (10, 14)
    assert str(state) in result.err and ("No space left" in result.err or "full" in result.err)
    assert not (state / "holdout.key").exists()
    disk.free()
    assert run("catalog").code == 0
    assert run("catalog").out == run("catalog").out
    assert len((state / "holdout.key").read_bytes()) == 32


def test_a_full_disk_at_a_key(disk: Disk) -> None:
    path = disk.folder / "identity.key"
    disk.fill()
    with pytest.raises(
        ConfigError, match=r"identity\.key: cannot write a key here \(No space left on device\)"
    ):
        signing.create_key(path)
    assert [file.name for file in disk.folder.iterdir()] == ["filler"]
    disk.free()
    made = signing.create_key(path)
    assert signing.public_bytes(signing.load_key(path)) == signing.public_bytes(made)


# A clock that jumps


class Stub:
    """A trainer without photos."""

    def accepts(self, plan: Plan) -> bool:
        return True

    def contribution(self, plan: Plan, round_: int, model: NDArray[np.float32]) -> NDArray[np.uint32]:
        return plan.encode(np.zeros(plan.dimension))


def test_an_expired_list_of_members_is_refused_until_the_clock_is_right(
    tmp_path: Path, make_plan: MakePlan
) -> None:
    plan, now, told = make_plan(), [1_800_000_000.0], list[str]()
    entries = tuple(
        Entry(name=f"m{n}", entity=f"e{n}", identity=signing.public_bytes(key), expires=int(now[0] + YEAR))
        for n, key in enumerate((OWN, OTHER))
    )
    pinned = CHARTER.read().digest
    listed = Directory(league="test", charter=pinned, version=1, expires=int(now[0] + YEAR), entries=entries)
    ledger = Ledger(tmp_path / "ledger.sqlite", BUDGET)
    participant = Participant(
        PinnedLeague(signing.public_bytes(OPERATOR), pinned, Taxonomy(classes=("shirt", "shoe", "bag"))),
        Policy(league="test", epsilon=4.0),
        OWN,
        ledger,
        Markers(tmp_path / "markers.sqlite"),
        Stub(),
        tell=told.append,
        clock=lambda: now[0],
    )

    def invited(attempt: int) -> Any:
        invitation = Invitation(
            plan_digest=plan.digest,
            round=0,
            attempt=attempt,
            rounds=1,
            signed_plan=SignedPlan.sign(plan, OPERATOR),
            signed_directory=SignedDirectory.of(listed, (CHARTER,)).signed_by(HOLDER),
        )
        answer = participant.handle(wire.encode(invitation))
        return wire.decode_any((Joined, Declined), answer, messages.MAX_MESSAGE_BYTES)

    assert isinstance(invited(0), Joined)
    now[0] += 10 * YEAR
    refused = invited(1)
    assert (refused.code, ledger.counter) == (DeclineCode.DIRECTORY, 0)
    assert "has expired; whoever holds the league's key must sign a new one" in told[-1]
    now[0] -= 11 * YEAR  # a clock that went back believes the list, as it knows no better
    assert isinstance(invited(1), Joined)
    assert invited(1).code == DeclineCode.REPEATED  # the clock has no say in what was begun
    now[0] += YEAR
    assert isinstance(invited(2), Joined)


def test_a_clock_that_jumps_changes_no_account(
    tmp_path: Path, run: Run, shop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Ledger(shop / "state" / "ledger.sqlite", BUDGET)
    steady = Ledger(tmp_path / "steady.sqlite", BUDGET)
    for round_, years in enumerate((0, -1, 10, -30, 0)):

        class Clock(datetime):
            @classmethod
            def now(cls, zone: Any = None, years: int = years) -> datetime:
                return datetime.now(zone) + timedelta(days=365 * years)

        monkeypatch.setattr(ledger_module, "datetime", Clock)
        kept.charge(charge(round_))
        monkeypatch.undo()
        monkeypatch.chdir(shop)
        steady.charge(charge(round_))
    years_told = [int(event.time[:4]) for event in kept.events()]
    assert years_told != sorted(years_told)
    assert kept.spent() == steady.spent()
    assert Ledger(kept.path, BUDGET).counter == 5
    with pytest.raises(Repeated):
        kept.charge(charge(3))
    assert "is sound. Entries: 5" in run("ledger", "--verify").out
    shown = run("ledger", "--entries")
    assert shown.code == 0 and all(str(year) in shown.out for year in years_told)


# Damaged files


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 0xFF]) + data[middle + 1 :]


def garbage(data: bytes) -> bytes:
    return b"\xff\xfe\x00" + os.urandom(len(data))


def gone(data: bytes) -> bytes:
    return b""


@pytest.mark.parametrize("harm", [cut, garbage, gone])
@pytest.mark.parametrize("name", ["hanse-client.yaml", "labels.yaml"])
def test_a_damaged_configuration(run: Run, shop: Path, name: str, harm: Callable[[bytes], bytes]) -> None:
    path = shop / name
    before, well = path.read_bytes(), run("catalog").out
    assert "shirt" in well
    path.write_bytes(harm(before) if (name, harm) != ("labels.yaml", cut) else b"Hemden: [shi")
    result = run("catalog")
    if (name, harm) == ("labels.yaml", gone):  # an empty map is one: the catalog says what it lacks
        assert (result.code, "'Hemden': 4 photos" in result.out) == (0, True)
    else:
        assert (result.code, result.out) == (10, "")
        assert all(line.startswith("error: ") and name in line for line in result.err.splitlines())
        assert result.err
    path.write_bytes(before)
    assert run("catalog").out == well


@pytest.mark.parametrize("harm", [cut, flipped, garbage, gone])
def test_a_damaged_recognizer(run: Run, shop: Path, harm: Callable[[bytes], bytes]) -> None:
    well = run("classify", "photos/shoe/1.png")
    assert well.code == 0
    parts = sorted((shop / "recognizer").iterdir())
    assert len(parts) >= 2
    for path in parts:
        before = path.read_bytes()
        path.write_bytes(harm(before))
        result = run("classify", "photos/shoe/1.png")
        assert (result.code, result.out) == (15, ""), path
        assert path.name in result.err
        path.write_bytes(before)
    assert run("classify", "photos/shoe/1.png") == well


@pytest.mark.parametrize("harm", [cut, garbage, gone])
def test_a_damaged_holdout_key(run: Run, shop: Path, harm: Callable[[bytes], bytes]) -> None:
    well = run("catalog").out
    path = shop / "state" / "holdout.key"
    before = path.read_bytes()
    path.write_bytes(harm(before))
    result = run("catalog")
    assert (result.code, result.out) == (10, "")
    assert "holdout.key: found" in result.err and "restore it from a backup" in result.err
    path.write_bytes(before)
    assert run("catalog").out == well


@pytest.fixture
def identity(shop: Path, keys_of_a_league: DevelopmentKeys) -> Path:
    """The shop's identity, with all else that a daemon needs."""
    state = shop / "state"
    state.mkdir(mode=0o700)
    shutil.copy(keys_of_a_league.authority, shop / "ca.crt")
    keys.make_keys(load(ClientConfig, shop / "hanse-client.yaml"))
    return state / "identity.key"


@pytest.fixture
def keys_of_a_league(request: pytest.FixtureRequest) -> DevelopmentKeys:
    return request.getfixturevalue("keys")


@pytest.mark.parametrize("harm", [cut, garbage, gone])
def test_a_damaged_identity(run: Run, identity: Path, harm: Callable[[bytes], bytes]) -> None:
    before = identity.read_bytes()
    identity.write_bytes(harm(before))
    result = run("run")
    assert result.code == 10
    assert "identity.key: found no PEM private key" in result.err and "backup" in result.err
    identity.write_bytes(before)
    assert (
        signing.public_bytes(signing.load_key(identity)).hex()
        == identity.with_name("identity.key.pub").read_text().strip()
    )


@pytest.mark.parametrize("name", ["identity.key", "node.key"])
def test_a_key_that_others_can_read(shop: Path, identity: Path, name: str) -> None:
    config = load(ClientConfig, shop / "hanse-client.yaml")
    path = identity.with_name(name)
    read = keys.load_identity if name == "identity.key" else keys.load_node
    read(config)
    for mode in (0o640, 0o604, 0o660):
        path.chmod(mode)
        with pytest.raises(ConfigError, match=rf"{name}: other users.*Run chmod 600 .*{name}"):
            read(config)
    path.chmod(0o600)  # as it says
    read(config)


# A damaged ledger, and damaged marks

PAGE = 4096


@pytest.fixture(scope="module")
def ledgers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a closed ledger, and one whose last charges are in the journal still, as a kill leaves them."""
    folder = tmp_path_factory.mktemp("ledgers")
    closed = Ledger(folder / "closed.sqlite", BUDGET)
    for round_ in range(60):
        closed.charge(charge(round_))
    shutil.copy(closed.path, folder / "open.sqlite")
    child = os.fork()
    if child == 0:
        ledger = Ledger(folder / "open.sqlite", BUDGET)
        other = sqlite3.connect(ledger.path)  # while it reads, the journal stays
        other.execute("SELECT * FROM charge").fetchone()
        for round_ in range(60, 70):
            ledger.charge(charge(round_))
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert (folder / "open.sqlite-wal").stat().st_size > 10 * PAGE
    return folder


def rounds(path: Path) -> list[int]:
    return [event.charge.round for event in Ledger(path, BUDGET).events()]


@pytest.mark.parametrize("harm", [garbage, flipped, lambda data: bytes(len(data))])
def test_a_damaged_page_of_the_ledger(
    run: Run, shop: Path, ledgers: Path, harm: Callable[[bytes], bytes]
) -> None:
    path = shop / "state" / "ledger.sqlite"
    path.parent.mkdir()
    before = (ledgers / "closed.sqlite").read_bytes()
    shutil.copy(ledgers / "closed.sqlite", path)
    well = run("ledger").out
    noticed = 0
    for start in range(0, len(before), PAGE):
        data = before[:start] + harm(before[start : start + PAGE])[:PAGE] + before[start + PAGE :]
        path.write_bytes(data)
        result = run("ledger")
        if result.code == 0:  # the place held nothing
            assert result.out == well
            continue
        noticed += 1
        assert (result.code, result.out) == (13, "")
        assert "ledger.sqlite: " in result.err and "Take part in nothing" in result.err
        assert path.read_bytes() == data, "what is damaged is left alone"
    assert noticed >= 3
    for file in path.parent.iterdir():
        file.unlink()
    path.write_bytes(before)
    assert run("ledger").out == well


@pytest.fixture
def killed(tmp_path: Path, ledgers: Path) -> Path:
    """A ledger as a kill left it, with its journal and the journal's index."""
    for end in ("", "-wal", "-shm"):
        shutil.copy(ledgers / f"open.sqlite{end}", tmp_path / f"open.sqlite{end}")
    return tmp_path / "open.sqlite"


@pytest.mark.parametrize("harm", [None, cut, flipped, garbage, gone])
def test_the_journals_index_may_be_lost(killed: Path, harm: Callable[[bytes], bytes] | None) -> None:
    index = killed.with_name("open.sqlite-shm")
    if harm is None:
        index.unlink()
    else:
        index.write_bytes(harm(index.read_bytes()))
    assert rounds(killed) == list(range(70))


@pytest.mark.parametrize("share", [0, 0.001, 0.3, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("how", ["cut", "garbage"])
def test_a_damaged_journal_gives_whole_charges_or_none(killed: Path, how: str, share: float) -> None:
    """A loss can't be seen in the file: peers remember the counter (`Fault.LEDGER`), as does a running shop."""
    kept = {end: killed.with_name(f"open.sqlite{end}").read_bytes() for end in ("", "-wal")}
    running = Ledger(killed, BUDGET)
    assert running.counter == 70
    data = kept["-wal"]
    start = int(share * len(data))
    killed.write_bytes(kept[""])
    end = b"" if how == "cut" else os.urandom(len(data) - start)
    killed.with_name("open.sqlite-wal").write_bytes(data[:start] + end)
    found = rounds(killed)
    assert found == list(range(len(found))) and len(found) >= 60
    if len(found) < 70:
        with pytest.raises(LedgerError, match="row 70 is gone or another"):
            running.charge(charge(70))
    Ledger(killed, BUDGET).charge(charge(70))  # it is sound, and goes on


@pytest.mark.parametrize("harm", [garbage, lambda data: bytes(len(data))])
def test_damaged_marks(tmp_path: Path, harm: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "markers.sqlite"
    Markers(path).begin(PLAN, 7)
    before = path.read_bytes()
    noticed = 0
    for start in range(0, len(before), PAGE):
        path.write_bytes(before[:start] + harm(before[start : start + PAGE])[:PAGE] + before[start + PAGE :])
        try:
            with pytest.raises(Begun):
                Markers(path).begin(PLAN, 7)
        except LedgerError as error:
            noticed += 1
            assert "markers.sqlite: " in str(error) and "move" in str(error)
    assert noticed >= 2
    path.rename(tmp_path / "away.sqlite")
    for end in ("-wal", "-shm"):
        path.with_name(path.name + end).unlink(missing_ok=True)
    Markers(path).begin(PLAN, 7)  # as it says; the ledger still counts each round once
