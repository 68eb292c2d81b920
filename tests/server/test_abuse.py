"""Floods, slow clients and hostile members against a server in a process of its own, while an honest league trains on.

Attackers come from other addresses of the loopback network than the honest, as they would on the Internet.
"""

import json
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import hanse_common  # noqa: F401 - sets what flwr reads when it is imported

# isort: split
import httpx
import numpy as np
import psutil
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.proto.control_pb2 import ListRunsRequest
from flwr.proto.fleet_pb2 import PullMessagesRequest, PushMessagesRequest
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.message_pb2 import Metadata, ObjectTree

from hanse_client.stream import Limits, serve_block
from hanse_common import wire
from hanse_common.credentials import fingerprint
from hanse_common.flower import from_record, to_record
from hanse_common.modes import LocalTraining
from hanse_common.plan import Cohort, Plan, SignedPlan
from hanse_common.session import METHOD, Assignment, BlockReport, Challenge, Hello, record_bytes
from hanse_common.vision.recipe import Recipe
from hanse_common.vision.recipe_features import Preprocessing, Projection, Scattering
from hanse_common.vision.recipe_model import Linear
from hanse_common.vision.taxonomy import Taxonomy
from hanse_server import flower_link, listener
from hanse_server import stream as server_stream
from hanse_server.development_keys import DevelopmentKeys, make_keys
from hanse_server.listener import Bounded, Listener
from hanse_server.stream import StreamServer

from .conftest import IDENTITIES, FleetNode, MaskedMerchant

HONEST = ("alder", "birch", "cedar")
MEMBER = "damson"
WAIT = 60.0
PROTOBUF = {"content-type": "application/protobuf"}

MORE_MEMORY = 64 << 20
MORE_FILES = 200
MORE_THREADS = 48
"""What the server may hold more than before, in bytes, files and threads, however much comes in."""


def small_plan() -> Plan:
    recipe = Recipe(
        preprocessing=Preprocessing(size=8, channels=1),
        backbone=Scattering(scales=1, angles=2, groups=None, projection=Projection(dimensions=6)),
        model=Linear(),
    )
    training = LocalTraining(
        rounds=2, local_steps=2, sampling_rate=0.2, expected_batch=20.0, clipping_norm=1.0, learning_rate=5.0,
        update_bound=8.0, noise_multiplier=2.0,
    )  # fmt: skip
    return Plan(
        league="test", serial=bytes(16), recipe=recipe, taxonomy=Taxonomy(classes=("shirt", "shoe", "bag")),
        dimension=recipe.dimension(3), training=training, delta=1e-5,
        cohort=Cohort(min_merchants=3, max_merchants=5, upload_slot=0),
    )  # fmt: skip


class Shop:
    """An honest merchant: a node that hears of blocks, and streams that serve them."""

    def __init__(self, name: str, ports: Any, keys: DevelopmentKeys, plan: Plan, value: float) -> None:
        self._stop = threading.Event()
        self._node = FleetNode(ports, keys, name, self._until)
        self._key = IDENTITIES[name]
        self._authority = keys.authority.read_bytes()
        self._merchant = MaskedMerchant(plan, name, lambda start: np.full(plan.dimension, value))
        self._limits = Limits(record_bytes=record_bytes(plan.dimension), patience=20.0, deadline=WAIT)
        self.reports: Counter[str] = Counter()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _until(self, what: str, condition: Callable[[], Any]) -> Any:
        while not self._stop.wait(0.05):
            if found := condition():
                return found
        raise EOFError

    def _work(self) -> None:
        with suppress(EOFError):
            self._node.activate()
            while True:
                message = self._node.receive()
                assignment = wire.decode(Assignment, from_record(message.content, 1 << 20))
                code = serve_block(
                    assignment, self._key, self._authority, self._handle, self._stop, self._limits
                )
                self.reports[code] += 1
                with suppress(httpx.HTTPStatusError):  # the run is over
                    self._node.reply(
                        message, to_record(wire.encode(BlockReport(block=assignment.block, code=code)))
                    )

    def _handle(self, request: bytes) -> bytes:
        reply = self._merchant.handle(request)
        assert reply is not None
        return reply

    def close(self) -> None:
        self._stop.set()
        self._thread.join(WAIT)
        self._node.close()


class League:
    """The server's process and its honest merchants."""

    def __init__(self, folder: Path) -> None:
        self.keys = make_keys(folder / "keys", ("localhost", "127.0.0.1"), (*HONEST, MEMBER))
        self.plan = small_plan()
        signed = SignedPlan.sign(self.plan, Ed25519PrivateKey.generate())
        (folder / "plan").write_bytes(wire.encode(signed))
        self.rounds: list[dict[str, Any]] = []
        program = Path(__file__).with_name("abused_server.py")
        self._errors = (folder / "errors").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, str(program), str(folder / "keys"), str(folder / "plan")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        self.ports = SimpleNamespace(**json.loads(self.process.stdout.readline()))
        self.ports.fleet_port = self.ports.fleet
        threading.Thread(target=self._listen, daemon=True).start()
        self.shops = [
            Shop(name, self.ports, self.keys, self.plan, float(value)) for value, name in enumerate(HONEST, 1)
        ]

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.rounds.append(json.loads(line))

    def wait_for_rounds(self, count: int) -> None:
        """Wait for `count` rounds from now on, each with the right sum of all honest merchants."""
        begun, given_up = len(self.rounds), time.monotonic() + WAIT
        while len(self.rounds) < begun + count:
            if time.monotonic() > given_up or self.process.poll() is not None:
                self._errors.seek(0)
                pytest.fail(f"no rounds any more: {self.rounds[-3:]}\n{self._errors.read()[-3000:]}")
            time.sleep(0.02)
        for round_ in self.rounds[begun:]:
            assert round_.get("mean") == pytest.approx(2.0, abs=1e-5), round_
            assert round_["blamed"] == {}

    def works(self) -> float:
        """Return the seconds of CPU that the server took."""
        times = psutil.Process(self.process.pid).cpu_times()
        return float(times.user + times.system)

    def holds(self) -> tuple[int, int, int]:
        """Return the server's memory in bytes, its open files and its threads."""
        process = psutil.Process(self.process.pid)
        return process.memory_info().rss, process.num_fds(), process.num_threads()

    def close(self) -> None:
        for shop in self.shops:
            shop._stop.set()
        for shop in self.shops:
            shop.close()
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(WAIT)
        finally:
            self.process.kill()
            self._errors.close()


@pytest.fixture(scope="module")
def league(tmp_path_factory: pytest.TempPathFactory) -> Iterator[League]:
    made = League(tmp_path_factory.mktemp("abuse"))
    made.wait_for_rounds(2)
    yield made
    made.close()


class Flood:
    """An attack in some threads, each of which calls `once(number)` over and over; `seen` counts what it returns."""

    def __init__(self, once: Callable[[int], object], threads: int = 4) -> None:
        self.seen: Counter[object] = Counter()
        self._once = once
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._go, args=(n,), daemon=True) for n in range(threads)]

    def _go(self, number: int) -> None:
        while not self._over.is_set():
            try:
                found = self._once(number)
            except (OSError, httpx.HTTPError) as error:
                found = type(error).__name__
            self.seen[found] += 1

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(WAIT)


def survive(
    league: League,
    attack: Callable[[int], object],
    until: Callable[[Counter[object]], bool] = lambda seen: seen.total() > 4,
    rounds: int = 2,
    threads: int = 4,
) -> Counter[object]:
    """Let the league train while the attack goes on, until it has seen enough; return what the attackers saw."""
    memory, files, running = league.holds()
    started, worked = time.monotonic(), league.works()
    with Flood(attack, threads) as flood:
        league.wait_for_rounds(rounds)
        while not until(flood.seen):
            assert time.monotonic() < started + WAIT, flood.seen
            time.sleep(0.02)
        now = league.holds()
    seconds = time.monotonic() - started
    print(
        f"{sum(flood.seen.values()) / seconds:.0f} attacks/s for {seconds:.1f} s, {rounds} rounds; "
        f"CPU {league.works() - worked:.1f} s, "
        f"RSS {memory >> 20} -> {now[0] >> 20} MiB, files {files} -> {now[1]}, threads {running} -> {now[2]}; "
        f"{dict(flood.seen)}"
    )
    assert now[0] - memory < MORE_MEMORY
    assert now[1] - files < MORE_FILES
    assert now[2] - running < MORE_THREADS
    return flood.seen


def client(league: League, source: str, **settings: Any) -> httpx.Client:
    """An HTTPS client that calls from another address."""
    context = ssl.create_default_context(cafile=str(league.keys.authority))
    return httpx.Client(
        transport=httpx.HTTPTransport(verify=context, local_address=source), timeout=WAIT, **settings
    )


def connect(port: int, source: str) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=5.0, source_address=(source, 0))


# HTTP: strangers at the merchants' port.


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def volley(league: League, source: str, request: bytes, count: int) -> list[bytes]:
    """Send a request `count` times at once over one connection; return the heads of the answers until it ends."""
    context = ssl.create_default_context(cafile=str(league.keys.authority))
    with context.wrap_socket(connect(league.ports.fleet, source), server_hostname="localhost") as caller:
        caller.sendall(request * count)
        heard = b""
        with suppress(ConnectionError):  # hung up before all of it was read
            while heard.count(b"HTTP/1.1 ") < count and (more := caller.recv(65_536)):
                heard += more
    return heard.split(b"HTTP/1.1 ")[1:]


@pytest.mark.parametrize(
    "head",
    [
        "POST /v1/fleet/pull-messages HTTP/1.1\r\ncontent-type: application/protobuf",
        pytest.param("POST /nothing HTTP/1.1", marks=pytest.mark.slow),
        pytest.param("GET /health HTTP/1.1", marks=pytest.mark.slow),
    ],
    ids=["unsigned", "nowhere", "health"],
)
def test_a_flood_of_requests_is_refused_and_told_when_to_come_back(league: League, head: str) -> None:
    source = f"127.0.2.{1 + len(head)}"
    request = f"{head}\r\nhost: localhost\r\ncontent-length: 0\r\n\r\n".encode()
    answers: Counter[bytes] = Counter()

    def attack(number: int) -> object:
        count = 50 if number else 1  # of an answer to more requests than are read, not everything arrives
        for answer in volley(league, source, request, count):
            answers[answer[:3]] += 1
            if answer[:3] == b"429":
                assert b"\r\nretry-after: 1\r\n" in answer
                return 429
        return f"{count} requests"

    survive(league, attack, lambda seen: seen[429] > 4)
    print(dict(answers))
    assert answers.total() - answers[b"429"] < 2 * flower_link.FLEET.refusals.burst  # type: ignore[union-attr]


def test_connections_that_say_nothing_are_few_for_each_address(league: League, stack: ExitStack) -> None:
    kept: list[socket.socket] = []

    def attack(number: int) -> str:
        kept.append(stack.enter_context(connect(league.ports.fleet, "127.0.3.1")))
        time.sleep(0.002)
        return "connected"

    files = league.holds()[1]
    survive(league, attack, lambda seen: seen["connected"] > 2 * flower_link.FLEET.connections)
    assert league.holds()[1] - files < flower_link.FLEET.connections + 40


def test_slow_clients_hold_their_own_places_only(league: League, stack: ExitStack) -> None:
    """A byte at a time: in the handshake, in the head, in the body; and an answer that is not read."""
    context = ssl.create_default_context(cafile=str(league.keys.authority))
    drips = {
        "head": b"POST /v1/fleet/pull-messages HTTP/1.1\r\nx: ",
        "body": b"POST /v1/fleet/pull-messages HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n",
        "answer": b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n" * 200,
    }
    slow: list[ssl.SSLSocket] = []
    for number in range(60):
        wrapped = context.wrap_socket(connect(league.ports.fleet, "127.0.4.1"), server_hostname="localhost")
        slow.append(stack.enter_context(wrapped))
        wrapped.sendall(list(drips.values())[number % 3])

    def attack(number: int) -> str:
        for one in slow[number::4]:
            with suppress(OSError):
                one.send(b"x")
        time.sleep(0.05)
        return "dripped"

    survive(league, attack)


def test_a_flood_of_wrong_tokens_shuts_the_operator_out_of_nothing(league: League, stack: ExitStack) -> None:
    """Guesses come from all of loopback, each with the head of a bundle of megabytes that nobody waits for."""
    token = league.keys.token.read_text().strip()
    url = f"https://localhost:{league.ports.admin}/v1/control/list-runs"
    callers = [stack.enter_context(client(league, f"127.0.5.{number + 1}")) for number in range(4)]

    def attack(number: int) -> int:
        headers = PROTOBUF | {"authorization": f"Bearer {'x' * len(token)}"}
        return callers[number].post(url, content=b"", headers=headers).status_code

    operator = stack.enter_context(client(league, "127.0.0.1"))
    with Flood(attack) as flood:
        given_up = time.monotonic() + WAIT
        while flood.seen[429] < 50 and time.monotonic() < given_up:
            time.sleep(0.02)
        right = PROTOBUF | {"authorization": f"Bearer {token}"}
        for _ in range(5):
            answer = operator.post(url, content=ListRunsRequest().SerializeToString(), headers=right)
            assert answer.status_code == 200
    assert set(flood.seen) <= {401, 429, "ConnectError", "ReadError", "RemoteProtocolError"}
    assert 0 < flood.seen[401] <= 2 * flower_link.ADMIN.refusals.burst  # type: ignore[union-attr]


def test_nobody_without_the_token_sends_a_body(league: League) -> None:
    context = ssl.create_default_context(cafile=str(league.keys.authority))
    with context.wrap_socket(connect(league.ports.admin, "127.0.5.9"), server_hostname="localhost") as caller:
        caller.sendall(b"POST /v1/control/start-run HTTP/1.1\r\nhost: x\r\ncontent-length: 9000000\r\n\r\n")
        assert caller.recv(100).split()[1] in (b"401", b"429")


# A member's node.


@pytest.fixture
def member(league: League, stack: ExitStack) -> FleetNode:
    node = FleetNode(league.ports, league.keys, MEMBER, lambda what, condition: condition())
    stack.callback(node.close)
    context = ssl.create_default_context(cafile=str(league.keys.authority))
    node.client._client._transport = httpx.HTTPTransport(verify=context, local_address="127.0.6.1")
    return node.activate()


def test_a_member_that_pushes_what_it_likes_is_refused(league: League, member: FleetNode) -> None:
    wide = ObjectTree(object_id="a" * 64, children=[ObjectTree(object_id=f"{n:064x}") for n in range(100)])
    pulled = PullMessagesRequest(node=member.node)
    forged = [
        Metadata(run_id=1, message_id="a" * 64, src_node_id=1, dst_node_id=1, ttl=1e4, message_type="train"),
        Metadata(run_id=1, message_id="a" * 64, src_node_id=1, dst_node_id=5, ttl=1e4, message_type="train"),
        Metadata(
            run_id=1,
            message_id="a" * 64,
            src_node_id=member.node_id,
            dst_node_id=1,
            reply_to_message_id="b" * 64,
        ),
    ]

    def attack(number: int) -> object:
        try:
            if number == 3:
                return bool(member.client.PullMessages(pulled).messages_list)
            push = PushMessagesRequest(
                node=member.node,
                messages_list=[MessageProto(metadata=forged[number])],
                message_object_trees=[wide],
            )
            member.client.PushMessages(push)
        except httpx.HTTPStatusError as error:
            return error.response.status_code
        return "taken"

    seen = survive(league, attack, lambda seen: seen[403] > 4 and seen[400] > 4)
    assert seen["taken"] == 0
    assert set(seen) <= {400, 403, 429, False, "ConnectError", "ReadError", "RemoteProtocolError"}


# Streams, spoken to in plain HTTP/2, which lets one say what no library does.

DATA, HEADERS, RST, SETTINGS, PING, GOAWAY, WINDOW = 0, 1, 3, 4, 6, 7, 8
END_STREAM, END_HEADERS = 1, 4
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


class Http2:
    """One HTTP/2 connection to the streams' port."""

    def __init__(self, league: League, source: str, settings: bytes = b"") -> None:
        context = ssl.create_default_context(cafile=str(league.keys.authority))
        context.set_alpn_protocols(["h2"])
        plain = connect(league.ports.streams, source)
        self.tls = context.wrap_socket(plain, server_hostname="localhost")
        self.tls.sendall(PREFACE + self.frame(SETTINGS, 0, 0, settings))
        self._heard = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.tls.close()

    @staticmethod
    def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
        return struct.pack("!I", len(payload))[1:] + struct.pack("!BBI", kind, flags, stream) + payload

    def call(self, stream: int, *more: tuple[bytes, bytes]) -> bytes:
        """Return the frame that opens a stream."""
        head = [
            (b":method", b"POST"), (b":scheme", b"https"), (b":path", METHOD.encode()),
            (b":authority", b"localhost"), (b"content-type", b"application/grpc"), (b"te", b"trailers"), *more,
        ]  # fmt: skip
        block = b"".join(b"\x00" + _text(name) + _text(value) for name, value in head)
        return self.frame(HEADERS, END_HEADERS, stream, block)

    def message(self, stream: int, payload: bytes) -> bytes:
        """Return the frame that says one gRPC message."""
        return self.frame(DATA, 0, stream, struct.pack("!BI", 0, len(payload)) + payload)

    def hear(self) -> tuple[int, int, bytes]:
        """Return kind, stream and payload of the next frame. Raises `OSError` at the end."""
        head = self._take(9)
        payload = self._take(int.from_bytes(head[:3], "big"))
        return head[3], int.from_bytes(head[5:9], "big"), payload

    def _take(self, size: int) -> bytes:
        while len(self._heard) < size:
            more = self.tls.recv(65_536)
            if not more:
                raise ConnectionResetError
            self._heard += more
        taken, self._heard = self._heard[:size], self._heard[size:]
        return taken

    def hear_until(self, kind: int) -> bytes:
        while True:
            found, _, payload = self.hear()
            if found == kind and payload:
                return payload


def _text(value: bytes) -> bytes:
    """A string of HPACK, as it is."""
    if len(value) < 127:
        return bytes([len(value)]) + value
    left, size = len(value) - 127, b"\x7f"
    while left >= 128:
        size, left = size + bytes([left % 128 + 128]), left // 128
    return size + bytes([left]) + value


def floods(league: League) -> dict[str, Callable[[int], object]]:
    """What a stranger may do with the streams' port, each once a call."""

    def source(number: int) -> str:
        return f"127.0.7.{number + 1}"

    def rapid_reset(number: int) -> str:
        with Http2(league, source(number)) as peer:
            for first in range(1, 2001, 200):
                burst = (
                    peer.call(stream) + peer.frame(RST, 0, stream, b"\x00\x00\x00\x08")
                    for stream in range(first, first + 200, 2)
                )
                peer.tls.sendall(b"".join(burst))
        return "1000 resets"

    def pings(number: int) -> str:
        with Http2(league, source(number)) as peer:
            peer.tls.sendall(peer.frame(PING, 0, 0, bytes(8)) * 2000)
            peer.hear_until(GOAWAY)
        return "hung up"

    def settings(number: int) -> str:
        with Http2(league, source(number)) as peer:
            peer.tls.sendall(peer.frame(SETTINGS, 0, 0, struct.pack("!HI", 4, 65_535)) * 2000)
        return "2000 settings"

    def huge_metadata(number: int) -> str:
        with Http2(league, source(number)) as peer:
            more = [(b"x-%d" % n, b"y" * 1000) for n in range(15)]
            peer.tls.sendall(peer.call(1, *more))
            while True:
                kind, _, payload = peer.hear()
                if kind == RST or (kind == HEADERS and payload):
                    return "refused"

    def no_hello(number: int) -> str:
        with Http2(league, source(number)) as peer:
            peer.tls.sendall(b"".join(peer.call(stream) for stream in (1, 3, 5, 7)))
            time.sleep(0.2)
        return "4 silent streams"

    def wrong_hello(number: int) -> str:
        with Http2(league, source(number)) as peer:
            peer.tls.sendall(peer.call(1))
            peer.hear_until(DATA)
            peer.tls.sendall(peer.message(1, b"\x00" + bytes(900)))
            peer.hear_until(HEADERS)
        return "refused"

    def handshakes(number: int) -> str:
        with connect(league.ports.streams, source(number)) as plain:
            plain.sendall(bytes.fromhex("160301020001000001"))
            time.sleep(0.005)
        return "half a handshake"

    return {
        attack.__name__: attack
        for attack in (rapid_reset, pings, settings, huge_metadata, no_hello, wrong_hello, handshakes)
    }


QUICK = ("rapid_reset", "wrong_hello")
KINDS = [
    pytest.param(kind, marks=() if kind in QUICK else pytest.mark.slow)
    for kind in floods(SimpleNamespace())  # type: ignore[arg-type]
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_flood_of_the_streams_port_is_survived(league: League, kind: str) -> None:
    survive(league, floods(league)[kind])


@pytest.mark.slow
def test_a_member_with_many_streams_has_one(league: League) -> None:
    """Each newer one ends the one before; whoever does not read its questions is left out, and no one else is."""
    certificate = fingerprint(league.keys.certificate.read_bytes())

    def attack(number: int) -> str:
        with Http2(league, f"127.0.8.{number + 1}", settings=struct.pack("!HI", 4, 1000)) as peer:
            peer.tls.sendall(peer.call(1))
            challenge = peer.hear_until(DATA)
            nonce = wire.decode(Challenge, challenge[6:]).nonce
            hello = Hello.sign(IDENTITIES[MEMBER], nonce, certificate, bytes(16))
            peer.tls.sendall(peer.message(1, b"\x00" + wire.encode(hello) + b"trailing"[: 8 * (number % 2)]))
            peer.hear_until(HEADERS)
        return "ended"

    survive(league, attack, lambda seen: seen["ended"] > 4)


@pytest.mark.slow
def test_a_connection_without_a_stream_ends(league: League) -> None:
    with Http2(league, "127.0.9.1") as peer:
        peer.tls.settimeout(WAIT)
        peer.hear_until(GOAWAY)


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("ipv4:192.0.2.7:443", "192.0.2.7"),
        ("ipv6:%5B2001:db8::7%5D:443", "2001:db8::/64"),
        ("ipv6:%5B::ffff:192.0.2.7%5D:443", "192.0.2.7"),
    ],
)
def test_streams_of_one_network_count_together(peer: str, address: str) -> None:
    """Whoever has one address of IPv6 has 2⁶⁴."""
    assert server_stream._address(peer) == address


# The doors themselves.


def test_where_files_run_out_a_crowd_makes_room_for_a_newcomer(
    league: League, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener.resource, "getrlimit", lambda which: (40, 40))
    tls = SimpleNamespace(certificate=league.keys.certificate, key=league.keys.key)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    limits = listener.Limits(body_bytes=100)
    door = stack.enter_context(
        Listener(Bounded(app, {"/x": "POST"}, limits), "test", "127.0.0.1", 0, tls, limits)
    )  # type: ignore[arg-type]
    crowd = [stack.enter_context(connect(door.port, f"127.0.10.{1 + n % 2}")) for n in range(30)]
    newcomer = stack.enter_context(client(league, "127.0.0.1"))
    assert newcomer.post(f"https://localhost:{door.port}/x").status_code == 200
    crowd[0].settimeout(WAIT)
    with suppress(ConnectionResetError):
        assert crowd[0].recv(1) == b"", "the oldest of the crowd went"


def test_connections_to_the_streams_leave_files_for_the_rest(
    league: League, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_stream.resource, "getrlimit", lambda which: (40, 40))
    certificate, key = league.keys.certificate.read_bytes(), league.keys.key.read_bytes()
    server = stack.enter_context(StreamServer("127.0.0.1", 0, certificate, key, dict))
    there = SimpleNamespace(keys=league.keys, ports=SimpleNamespace(streams=server.port))
    came: list[Http2] = []
    for number in range(20):
        with suppress(OSError):
            came.append(stack.enter_context(Http2(there, f"127.0.11.{number + 1}")))  # type: ignore[arg-type]
    assert 5 < len(came) <= 10


def test_a_handshake_ends_in_the_time_of_a_head(league: League, stack: ExitStack) -> None:
    tls = SimpleNamespace(certificate=league.keys.certificate, key=league.keys.key)
    limits = listener.Limits(body_bytes=100, head_seconds=0.2)
    door = stack.enter_context(
        Listener(Bounded(lambda *_: None, {}, limits), "test", "127.0.0.1", 0, tls, limits)
    )  # type: ignore[arg-type, return-value]
    silent = connect(door.port, "127.0.0.1")
    silent.settimeout(WAIT / 3)  # asyncio's own bound is a minute
    with silent, suppress(ConnectionResetError):
        assert silent.recv(1) == b""


@pytest.mark.slow
def test_all_at_once_and_again_costs_no_memory(league: League) -> None:
    """Every flood of the streams' port at the same time, from many addresses, several times over: RSS goes nowhere."""
    attacks = list(floods(league).values())
    found = []
    for _ in range(3):
        survive(league, lambda number: attacks[number % len(attacks)](number), rounds=10, threads=14)
        found.append(league.holds()[0])
    assert found[2] - found[0] < MORE_MEMORY / 2
