"""A week of a league, in minutes: outages, restarts, certificates, members that come and go, and nothing that grows.

Processes, TLS, ports, files and clocks are real; durations are scaled. A day is some ten rounds of less than a second,
a certificate lives for less than a day, the server's patience is seconds, and a node that held for some seconds counts
as steady, which takes a minute of a real day. Flower's minute, in which it keeps out a node that vanished, is a minute.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from PIL import Image

from hanse_client import journal, logs
from hanse_client.config import ClientConfig
from hanse_client.journal import Event, Journal
from hanse_client.markers import Markers
from hanse_common import signing, wire
from hanse_common.charter import CharterFile
from hanse_common.config import load
from hanse_common.directory import SignedDirectory
from hanse_common.files import PUBLIC, write_atomically
from hanse_common.plan import Plan
from hanse_common.vision.recognizer import Recognizer
from hanse_server.development_keys import sign_directory
from hanse_simulations import datasets
from hanse_simulations.processes import command

ROUNDS_A_DAY, ROUNDS = 6, 160
REPEATS = 30
KILLED_NIGHTS = (2, 4, 6)
FOUNDERS = ("alder", "birch", "cedar", "damson")
WAIT = 240.0

DAEMON_GROWTH, NODE_GROWTH = 10e6, 10e6
"""Bytes by which a process may be larger on the last day than on the second."""

THREADS, DESCRIPTORS = 3, 6
"""How many more of each there may be: gRPC keeps a pool of threads, and an open stream has five descriptors."""

KILOBYTE = 1 << 10
BOUNDS = {
    "journal.jsonl": journal.MAX_BYTES,
    "journal.1.jsonl": journal.MAX_BYTES,
    "daemon.log": logs.MAX_BYTES,
    **{f"daemon.log.{number}": logs.MAX_BYTES for number in range(1, logs.KEPT + 1)},
    "node.log": 64 * KILOBYTE,
    "markers.sqlite": 64 * KILOBYTE,
}
"""Bytes of the files of a state folder that have a bound of their own."""

SMALL = 4 * KILOBYTE
"""Bytes of every other file but the ledger and the caches of photos."""

CLIENT = (
    "from hanse_client import cli, node_keeper\n"
    "node_keeper.STEADY_SECONDS = 5.0\n"  # else each morning's pause would be twice the one before
    "cli.main()"
)
"""hanse-client, but for its idea of a steady node."""

BEFORE = "before"
"""The kind of the events with which a journal is filled before the week."""

UNBOUNDED = ("ledger.sqlite", "embeddings.sqlite", "photos.sqlite")


def five(experiment: dict[str, Any]) -> None:
    experiment["data"] |= {"merchants": 5}
    experiment["plan"]["cohort"] |= {
        "min_merchants": 3, "max_merchants": 5, "upload_slot": 0.6, "join_deadline": 6, "upload_deadline": 6,
    }  # fmt: skip


class Authority:
    """The league's certificate authority, whose key the test keeps, and the server's certificate in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "A week's CA")])
        made = self._builder(self._name, self._key, timedelta(days=1))
        made = made.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        self._write("ca.crt", made)

    def issue(self, lifetime: timedelta) -> float:
        """Write a certificate for localhost and its key; return when it expires, in seconds since 1970."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
        made = self._builder(name, key, lifetime)
        hosts = x509.SubjectAlternativeName([x509.DNSName("localhost")])
        expires = self._write("server.crt", made.add_extension(hosts, critical=False))
        secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        write_atomically(self._folder / "server.key", secret)
        return expires

    def _builder(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, lifetime: timedelta
    ) -> x509.CertificateBuilder:
        now = datetime.now(UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + lifetime)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False
            )
        )

    def _write(self, name: str, builder: x509.CertificateBuilder) -> float:
        made = builder.sign(self._key, hashes.SHA256())
        write_atomically(self._folder / name, made.public_bytes(Encoding.PEM), PUBLIC)
        return made.not_valid_after_utc.timestamp()


class MemberList:
    """The league's directory as the holder of its key signs it and the operator puts it."""

    def __init__(self, league: Any) -> None:
        self.path: Path = league.folder / "server" / "directory.hanse"
        self._shops = league.shops
        folder = league.folder / "league"
        self._key = signing.load_key(folder / "league.key")
        self._charter = wire.decode(CharterFile, (folder / "charter.hanse").read_bytes()).charters[0]
        self._now = datetime.now(UTC)

    def sign(self, names: Iterable[str]) -> bytes:
        """Put a later version, with these members; return the one that was there."""
        before = self.path.read_bytes()
        self._now += timedelta(seconds=1)  # versions are seconds
        states = {name: self._shops[name] / "state" for name in names}
        signed = sign_directory(self._charter, states, self._key, self._now)
        write_atomically(self.path, wire.encode(signed), PUBLIC)
        return before

    @property
    def version(self) -> int:
        return wire.decode(SignedDirectory, self.path.read_bytes()).read().version


@dataclass(frozen=True)
class Sample:
    """What a process took in some looks: at most how many bytes of its own and threads, at least how many descriptors.

    A file that is open for a moment, as the ledger is at each charge, says nothing.
    """

    memory: int = 0
    threads: int = 0
    descriptors: int = 0

    def look(self, pid: int) -> "Sample":
        """Return it with one more look at the process."""
        process = psutil.Process(pid)
        descriptors = process.num_fds()
        return Sample(
            memory=max(self.memory, process.memory_full_info().uss),
            threads=max(self.threads, process.num_threads()),
            descriptors=min(self.descriptors or descriptors, descriptors),
        )


@dataclass
class Week:
    """The league, what the test does to it, and what it saw of it."""

    league: Any
    network: Any
    authority: Authority
    members: MemberList
    children: Callable[[int], list[int]]
    data: Path
    day: int = 0
    begun: int = 0
    server: Any = None
    older: bytes = b""
    mornings: list[float] = field(default_factory=list)
    daemons: dict[tuple[int, str], Sample] = field(default_factory=dict)
    nodes: dict[tuple[int, str], Sample] = field(default_factory=dict)

    def start_shop(self, name: str) -> None:
        self.league.start_shop(name, sys.executable, "-c", CLIENT)

    def morning(self) -> None:
        """Start the server, and wait for the first round."""
        started = time.monotonic()
        self.day += 1
        self.begun = self.rounds
        self.start_server()
        self.mornings.append(time.monotonic() - started)

    def start_server(self) -> None:
        self.server = self.league.start_server(verb="resume" if self.server else "run")
        self.until_more_rounds(1)

    def stop_server(self, number: signal.Signals) -> None:
        os.kill(self.server.pid, number)
        self.league.until("the server to end", lambda: self.server.poll() is not None, WAIT)
        assert self.server.returncode == (18 if number == signal.SIGTERM else -number)

    def night(self) -> None:
        """See how everyone is after a day's rounds, and stop the server: in order, or not."""
        self.until("a day's rounds", lambda: self.rounds >= self.begun + ROUNDS_A_DAY)
        self.look()
        # A round takes as long as its slot: the server is killed in the middle of the next one.
        self.until_more_rounds(1)
        self.stop_server(signal.SIGKILL if self.day in KILLED_NIGHTS else signal.SIGTERM)

    def look(self) -> None:
        """Note what the daemons take, and their nodes, during two rounds."""
        enough = self.rounds + 2
        while self.rounds < enough:
            time.sleep(0.1)
            assert self.server.poll() is None, self.league.text("server")
            for name in self.last["uploaded"]:
                pid = self.league.running[name].pid
                day = self.day, name
                self.daemons[day] = self.daemons.get(day, Sample()).look(pid)
                for node in self.children(pid):
                    with suppress(psutil.NoSuchProcess):
                        self.nodes[day] = self.nodes.get(day, Sample()).look(node)

    @property
    def rounds(self) -> int:
        return len(self.league.events("round"))

    @property
    def last(self) -> dict[str, Any]:
        events = self.league.events("round")
        return events[-1] if events else {"uploaded": [], "dropped": []}

    def until(self, what: str, true: Callable[[], object]) -> None:
        """Wait until `true()`, while server and shops run."""

        def holds() -> object:
            assert self.server.poll() is None, self.league.text("server")
            ended = [name for name, process in self.league.running.items() if process.poll() is not None]
            assert not ended, self.league.text(ended[0])
            return true()

        self.league.until(f"{what}, on day {self.day}", holds, WAIT)

    def until_more_rounds(self, count: int) -> None:
        wanted = self.rounds + count
        self.until(f"round {wanted}", lambda: self.rounds >= wanted)

    def until_rounds_of(self, *names: str) -> None:
        self.until_more_rounds(1)
        self.until(f"a round of {names}", lambda: set(names) <= set(self.last["uploaded"]))

    def until_rounds_without(self, name: str) -> None:
        self.until_more_rounds(1)
        self.until(f"a round without {name}", lambda: name not in self.last["uploaded"])

    def owner(self, name: str, *words: str) -> str:
        """Run hanse-client as the shop's owner does, and return what it prints."""
        config = str(self.league.shops[name] / "hanse-client.yaml")
        ran = subprocess.run(
            [command("hanse-client"), *words, "--config", config],
            capture_output=True, text=True, timeout=WAIT, check=True,
        )  # fmt: skip
        return ran.stdout

    def told(self, name: str) -> list[str]:
        """Return what the shop's journal has of this week."""
        return [event.text for event in Journal(self.state(name)).recent(10_000) if event.kind != BEFORE]

    def until_told(self, name: str, words: str) -> None:
        self.until(f"{name} to hear {words!r}", lambda: words in self.league.text(name))
        assert any(words in text for text in self.told(name))

    def state(self, name: str) -> Path:
        found: Path = self.league.shops[name] / "state"
        return found

    def add_photos(self, name: str, count: int) -> None:
        """Put pictures of nobody else's into the shop's folder."""
        source = datasets.fashion_mnist(self.data)
        for number in range(1000 + 10 * self.day, 1000 + 10 * self.day + count):
            label = datasets.CLASSES[source.test_labels[number]]
            path = self.league.shops[name] / "photos" / label / f"new-{number}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(source.test_images[number]).save(path)

    def delete_photos(self, name: str, count: int) -> None:
        for path in sorted((self.league.shops[name] / "photos").rglob("0*.png"))[:count]:
            path.unlink()


def monday(week: Week) -> None:
    """Birch is cut off in the middle of a block; alder has new photos."""
    week.morning()
    week.until_rounds_of(*FOUNDERS)
    week.network.reset("birch")
    week.until_rounds_without("birch")
    assert set(week.last["uploaded"]) == {"alder", "cedar", "damson"}
    week.network.mend()
    week.add_photos("alder", 3)
    week.until_told("alder", "Your photos changed: 3 photos are new.")
    week.until_rounds_of("alder")
    week.night()


def tuesday(week: Week) -> None:
    """Cedar is no member any more; then nobody reaches the server, in the middle of a block."""
    week.morning()
    week.until_rounds_of(*FOUNDERS)  # birch, too
    week.members.sign({"alder", "birch", "damson"})
    week.until("the news", lambda: "now version" in week.league.text("server"))
    week.until_rounds_of("alder", "birch", "damson")
    before = week.rounds
    week.until_more_rounds(1)
    week.network.swallow()
    time.sleep(8.0)  # longer than an upload may take
    lost = week.rounds
    week.network.mend()
    week.until_rounds_of("alder", "birch", "damson")
    assert lost - before <= 2, "no round can end while nobody is heard"
    assert "cedar" not in {
        name for event in week.league.events("round")[before:] for name in event["uploaded"]
    }
    week.night()


def wednesday(week: Week) -> None:
    """The certificate expires. Those who are in stay, until they have to come in again; then it is renewed."""
    lifetime = timedelta(seconds=2 * week.mornings[-1] + 5)
    expires = week.authority.issue(lifetime)
    # One block lasts the day, so that nobody has to come in before the network makes them.
    week.league.edit_server(lambda service: service["blocks"].update(rounds=60))
    week.morning()
    assert time.time() < expires, "the morning took too long for this certificate"
    week.until("the certificate to expire", lambda: time.time() > expires + 1)
    week.until_more_rounds(2)
    there = ("alder", "birch", "damson")
    week.network.reset()
    week.network.mend()
    for name in there:
        week.until_told(name, "is not to be believed: certificate has expired.")
        week.until_told(
            name, "its certificate is not of the authority under connection.authority, or out of date"
        )
    assert json.loads(week.owner("alder", "status", "--json"))["state"] == "connecting"
    before = week.rounds
    assert week.server.poll() is None
    week.authority.issue(timedelta(days=90))
    week.league.edit_server(lambda service: service["blocks"].update(rounds=3))
    week.stop_server(signal.SIGTERM)
    week.start_server()
    week.until_rounds_of(*there)
    assert week.rounds > before
    # It was out before the server knew nothing of it any more, and can tell its owner why by now.
    assert any("until this shop is in the league's directory" in text for text in week.told("cedar"))
    week.night()


def thursday(week: Week) -> None:
    """Cedar is admitted again; alder takes photos away."""
    week.morning()
    week.older = week.members.sign(FOUNDERS)
    week.delete_photos("alder", 2)
    week.until_told("alder", "Your photos changed: 2 were removed.")
    week.until_rounds_of(*FOUNDERS)
    week.night()


def friday(week: Week) -> None:
    """Elder's daemon runs before elder is a member; then it is one. Damson pauses meanwhile."""
    week.start_shop("elder")
    week.morning()
    week.until_told("elder", "until this shop is in the league's directory")
    assert week.league.ledger("elder").counter == 0
    week.members.sign((*FOUNDERS, "elder"))
    week.owner("damson", "pause")
    week.until_rounds_without("damson")
    assert json.loads(week.owner("damson", "status", "--json"))["state"] == "paused"
    paid = week.league.ledger("damson").counter
    week.until_more_rounds(2)
    assert week.league.ledger("damson").counter == paid
    week.owner("damson", "resume")
    week.until_rounds_of(*FOUNDERS, "elder")
    week.night()


def saturday(week: Week) -> None:
    """The directory's file is damaged, then an old one comes back. Nobody but the operator hears of either."""
    week.morning()
    good = week.members.path.read_bytes()
    for bad, words in ((good[:-40], "not a directory"), (week.older, "merchants refuse it")):
        write_atomically(week.members.path, bad, PUBLIC)
        week.until("a complaint", lambda words=words: words in week.league.text("server"))
        week.until_more_rounds(5)  # the file was read again by then
        said = [event["text"] for event in week.league.events("directory") if words in event["text"]]
        assert len(said) == 1 and "the one before stays" in said[0], said
    write_atomically(week.members.path, good, PUBLIC)
    week.until_rounds_of(*FOUNDERS, "elder")
    week.night()


def sunday(week: Week) -> None:
    """Alder hears nothing for a while; birch has new photos; the training ends."""
    week.morning()
    week.until_rounds_of("alder")
    week.network.swallow("alder")
    week.until_rounds_without("alder")
    week.network.mend()
    week.until_rounds_of("alder")
    week.add_photos("birch", 1)
    week.until_told("birch", "Your photos changed: 1 photo is new.")
    week.until_rounds_of(*FOUNDERS, "elder")
    week.look()
    assert week.rounds < ROUNDS, "the week was longer than its training"
    week.league.until("the server to end", lambda: week.server.poll() is not None, WAIT)


def fill_logs(state: Path) -> None:
    """Leave a journal and a log that are almost as large as they get, as after a long time."""
    event = Event(time=datetime.now(UTC), kind=BEFORE, text="x" * 900).model_dump_json() + "\n"
    (state / "journal.jsonl").write_text(event * ((journal.MAX_BYTES - KILOBYTE) // len(event)))
    (state / "daemon.log").write_text(("x" * 99 + "\n") * (logs.MAX_BYTES // 100))


def require_bounded_files(state: Path) -> None:
    for path in sorted(state.rglob("*")):
        name = str(path.relative_to(state))
        assert not path.name.startswith("."), f"{path} was left behind"
        if path.is_file() and not name.startswith(UNBOUNDED):
            assert path.stat().st_size <= BOUNDS.get(name, SMALL), f"{path} has grown"


def require_flat(samples: dict[tuple[int, str], Sample], growth: float) -> None:
    """Require that the last day's processes are no larger than the second day's, of those that were there on both."""
    compared = [name for day, name in samples if day == 2 and (7, name) in samples]
    assert len(compared) >= 2, samples.keys()
    for name in compared:
        early, late = samples[2, name], samples[7, name]
        assert late.memory <= early.memory + growth, (name, samples)
        assert late.threads <= early.threads + THREADS, (name, samples)
        assert late.descriptors <= early.descriptors + DESCRIPTORS, (name, samples)


def require_sound_ledger(week: Week, name: str, plan: Plan) -> None:
    """Require a charge for each upload and at most one for each attempt, within the plan's ε."""
    ledger = week.league.ledger(name)  # reads and checks all of it
    works = [(event.charge.round, event.charge.attempt) for event in ledger.events()]
    assert works == sorted(set(works)), "each round's photos were used once in an attempt"
    charges = Counter(round_ for round_, _ in works)
    uploaded = {event["round"] - 1 for event in week.league.events("round") if name in event["uploaded"]}
    assert uploaded <= charges.keys(), f"{name} uploaded without a charge"
    for round_ in range(ROUNDS):
        sent = week.league.text(name).count(f"Round {round_ + 1} of {ROUNDS}: trained, charged, sent.")
        assert sent <= charges[round_], f"{name} sent more of round {round_ + 1} than it paid for"
    assert ledger.spent().epsilon <= plan.epsilon()


@pytest.mark.slow
def test_a_week(
    make_league: Callable[..., Any], make_network: Callable[..., Any], helpers: Any, data_folder: Path
) -> None:
    league = make_league(rounds=ROUNDS, repeats=REPEATS, attempts=REPEATS, change=five)
    league.edit_server(lambda service: service["blocks"].update(rounds=3, patience=180, gather=2))
    authority = Authority(league.folder / "server" / "keys")
    authority.issue(timedelta(days=90))
    members = MemberList(league)
    members.sign(FOUNDERS)
    week = Week(league, make_network(league), authority, members, helpers.children, data_folder)
    for name in league.shops:
        fill_logs(week.state(name))
    for name in FOUNDERS:
        week.start_shop(name)
    for day in (monday, tuesday, wednesday, thursday, friday, saturday, sunday):
        began = time.monotonic()
        day(week)
        print(f"{day.__name__}: {time.monotonic() - began:.0f} s, {week.rounds} rounds", flush=True)

    assert week.server.returncode == 0, league.text("server")
    done = [event["round"] for event in league.events("round")]
    assert done == sorted(set(done)) and done[-1] == ROUNDS
    # What is killed between a checkpoint and its line says nothing of that round.
    assert len(done) >= ROUNDS - len(KILLED_NIGHTS)
    plan = wire.decode(Plan, league.signed_plan.plan)
    recognizer = Recognizer.load(league.folder / "server" / "state" / "recognizer")
    assert recognizer.card.plan_digest == plan.digest.hex()
    assert all(event["blamed"] == [] for event in league.events("round"))
    for name in league.shops:
        require_sound_ledger(week, name, plan)
        assert not any("expected a later one" in text for text in week.told(name)), (
            "an old directory reached it"
        )
        config = load(ClientConfig, league.shops[name] / "hanse-client.yaml")
        seen = Markers(config.markers_path).directory(bytes.fromhex(config.league.charter))
        assert seen is not None and seen.version == members.version
    for what, samples in (("daemon", week.daemons), ("node", week.nodes)):
        for (day, name), sample in samples.items():
            print(
                f"{name}'s {what} on day {day}: {sample.memory / 1e6:.1f} MB, {sample.threads} threads, "
                f"{sample.descriptors} descriptors"
            )
    require_flat(week.daemons, DAEMON_GROWTH)
    require_flat(week.nodes, NODE_GROWTH)

    league.processes.stop()
    assert all(league.running[name].returncode == 0 for name in league.shops)
    for name in league.shops:
        require_bounded_files(week.state(name))
        assert (week.state(name) / "journal.1.jsonl").exists(), "the journal was put aside"
    for name in FOUNDERS:
        assert (week.state(name) / "daemon.log.1").exists(), "the log was put aside"
    assert not list((league.folder / "server").rglob(".*"))
