"""The merchant's end of a stream at servers that cheat, stall and leave; honest ones are in tests/server."""

import itertools
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hanse_client.stream import Limits, serve_block
from hanse_common import wire
from hanse_common.plan import SignedPlan
from hanse_common.session import (
    FRAME_BYTES,
    MAX_HELLO_BYTES,
    METHOD,
    Answer,
    Ask,
    Assignment,
    Challenge,
    Hello,
    RecordReader,
    ReportCode,
    frames,
)
from hanse_server.development_keys import DevelopmentKeys, make_keys

WAIT = 30.0
RECORD_BYTES = FRAME_BYTES + 1000
KEY = Ed25519PrivateKey.generate()
CHALLENGE = Challenge(nonce=bytes(32))

Script = Callable[["Server", Any, Any], Iterator[bytes]]


class Server:
    """A server that does on each stream what `script` says, and notes what it hears."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.streams = 0
        self.heard: list[bytes] = []
        self.over = threading.Event()
        self.port = 0

    def service(self, details: Any) -> Any:
        return grpc.stream_stream_rpc_method_handler(self.serve) if details.method == METHOD else None

    def serve(self, frames_in: Iterator[bytes], context: Any) -> Iterator[bytes]:
        self.streams += 1
        yield from self.script(self, frames_in, context)

    def hear(self, frames_in: Iterator[bytes]) -> bytes:
        reader, record = RecordReader(1 << 24), None
        while record is None:
            record = reader.add(next(frames_in))
        self.heard.append(bytes(record))
        return self.heard[-1]

    def answers(self) -> list[bytes]:
        """Return the records heard besides hellos."""
        return [record for record in self.heard if record[2:3] != bytes([Hello.kind])]


def greeting(server: Server, frames_in: Any) -> Iterator[bytes]:
    yield from frames(wire.encode(CHALLENGE))
    wire.decode(Hello, server.hear(frames_in))


@contextmanager
def running(script: Script, keys: DevelopmentKeys, port: int = 0) -> Iterator[Server]:
    server = Server(script)
    handler = type(
        "Handler", (grpc.GenericRpcHandler,), {"service": lambda self, details: server.service(details)}
    )
    grpc_server = grpc.server(
        ThreadPoolExecutor(4), handlers=(handler(),), options=(("grpc.max_send_message_length", -1),)
    )
    pair = (keys.key.read_bytes(), keys.certificate.read_bytes())
    server.port = grpc_server.add_secure_port(f"127.0.0.1:{port}", grpc.ssl_server_credentials([pair]))
    grpc_server.start()
    try:
        yield server
    finally:
        server.over.set()
        grpc_server.stop(0).wait()


class Merchant:
    """A merchant in this thread, with what it was asked and what its owner was told."""

    def __init__(self, keys: DevelopmentKeys) -> None:
        self.authority = keys.authority.read_bytes()
        self.stop = threading.Event()
        self.handled: list[bytes] = []
        self.told: list[str] = []
        self.count: Callable[[int], None] = lambda moved: None

    def handle(self, request: bytes) -> bytes:
        self.handled.append(request)
        return os.urandom(8)  # never the same

    def serve(
        self, port: int, patience: float = 2.0, deadline: float = WAIT, host: str = "localhost"
    ) -> ReportCode:
        assignment = Assignment(
            block=b"b" * 16,
            signed_plan=SignedPlan(plan=b"", signature=bytes(64)),
            rounds=1,
            aggregator=f"{host}:{port}",
        )
        limits = Limits(RECORD_BYTES, patience, deadline)
        return serve_block(
            assignment, KEY, self.authority, self.handle, self.stop, limits, self.told.append, self.count
        )


@pytest.fixture
def merchant(keys: DevelopmentKeys) -> Merchant:
    return Merchant(keys)


# -- who is spoken to ---------------------------------------------------------------------------------------------


def nothing(server: Server, frames_in: Any, context: Any) -> Iterator[bytes]:
    yield from greeting(server, frames_in)


@pytest.mark.parametrize("same_authority", [True, False], ids=["another name", "another authority"])
def test_only_the_leagues_server_hears_anything(
    merchant: Merchant, tmp_path: Path, same_authority: bool
) -> None:
    host = "elsewhere.example" if same_authority else "localhost"
    other = make_keys(tmp_path / "other", (host,), ())
    if same_authority:
        merchant.authority = other.authority.read_bytes()
    with running(nothing, other) as server:
        assert merchant.serve(server.port) is ReportCode.LOST
        assert (server.streams, server.heard) == (0, [])
    assert len(merchant.told) == 1
    assert "is not to be believed" in merchant.told[0]


def test_a_certificate_that_changes_after_it_was_looked_at_is_not_spoken_to(
    merchant: Merchant, keys: DevelopmentKeys, tmp_path: Path
) -> None:
    """The channel trusts the one certificate that was seen: here every other connection goes to another server.

    This merchant's authorities would let both certificates pass.
    """
    other = make_keys(tmp_path / "other", ("localhost",), ())
    merchant.authority += other.authority.read_bytes()
    with (
        running(nothing, keys) as first,
        running(nothing, other) as second,
        socket.create_server(("127.0.0.1", 0)) as switch,
    ):
        connections = itertools.cycle((first.port, second.port))

        def accept() -> None:
            with suppress(OSError):
                while True:
                    near, _ = switch.accept()
                    far = socket.create_connection(("127.0.0.1", next(connections)))
                    for one, end in ((near, far), (far, near)):
                        threading.Thread(target=_copy, args=(one, end), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        assert merchant.serve(switch.getsockname()[1], patience=1.0) is ReportCode.LOST
        switch.shutdown(socket.SHUT_RDWR)
        assert (first.streams, second.streams) == (0, 0)


def _copy(one: socket.socket, other: socket.socket) -> None:
    with suppress(OSError):
        while data := one.recv(65536):
            other.sendall(data)
    for end in (one, other):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


# -- servers that break the protocol ------------------------------------------------------------------------------


def raw(*pieces: bytes, greet: bool = True) -> Script:
    """A server that says `pieces` as they are, to a merchant that said hello or to one that has not."""

    def script(server: Server, frames_in: Any, context: Any) -> Iterator[bytes]:
        if greet:
            yield from greeting(server, frames_in)
        yield from pieces
        server.over.wait(WAIT)

    return script


FULL = b"\1" + bytes(FRAME_BYTES - 1)


@pytest.mark.parametrize(
    ("script", "why"),
    [
        (raw(FULL, FULL), f"found over {RECORD_BYTES} bytes"),
        (raw(b""), "expected 0 or 1"),
        (raw(b"\2x"), "expected 0 or 1"),
        (raw(b"\1short"), "a short one before the last"),
        (raw(b"\0garbage"), "not MessagePack"),
        (raw(b"\0" + wire.encode(CHALLENGE)), "found a message of kind 10"),
        (raw(b"\0" + bytes(MAX_HELLO_BYTES + 1), greet=False), f"found over {MAX_HELLO_BYTES} bytes"),
        (raw(b"\0garbage", greet=False), "not MessagePack"),
        (raw(b"\0" + wire.encode(Ask(trip=1, payload=b"x")), greet=False), "found a message of kind 12"),
    ],
    ids=[
        "a large record", "an empty frame", "no frame", "a short frame", "no record", "a second challenge",
        "a large challenge", "no challenge", "a question first",
    ],
)  # fmt: skip
def test_a_server_that_breaks_the_protocol_is_left_for_good(
    merchant: Merchant, keys: DevelopmentKeys, script: Script, why: str
) -> None:
    with running(script, keys) as server:
        assert merchant.serve(server.port) is ReportCode.LOST
        assert server.streams == 1, "no second attempt"
        assert server.answers() == []
    assert merchant.handled == []
    assert len(merchant.told) == 1
    assert merchant.told[0].startswith("The server broke the protocol")
    assert why in merchant.told[0]


def test_a_frame_larger_than_a_frame_is_not_taken(merchant: Merchant, keys: DevelopmentKeys) -> None:
    with running(raw(b"\0" + bytes(FRAME_BYTES)), keys) as server:
        assert merchant.serve(server.port, patience=0.5) is ReportCode.LOST
    assert merchant.handled == []
    assert "could be kept open" in merchant.told[0], "gRPC itself refuses it, before it is in memory"


def ask(trip: int, payload: bytes) -> Iterator[bytes]:
    return frames(wire.encode(Ask(trip=trip, payload=payload)))


@pytest.mark.parametrize(
    "question",
    [(1, b"one"), (1, b"two"), (2, b"other")],
    ids=["an earlier trip", "an earlier trip with the last question", "another question"],
)
def test_an_answer_is_not_given_twice_to_different_questions_on_another_stream(
    merchant: Merchant, keys: DevelopmentKeys, question: tuple[int, bytes]
) -> None:
    def script(server: Server, frames_in: Any, context: Any) -> Iterator[bytes]:
        yield from greeting(server, frames_in)
        for trip, payload in ((1, b"one"), (2, b"two")) if server.streams == 1 else (question,):
            yield from ask(trip, payload)
            server.hear(frames_in)
        context.abort(grpc.StatusCode.UNAVAILABLE, "")

    with running(script, keys) as server:
        assert merchant.serve(server.port) is ReportCode.LOST
        assert (server.streams, len(server.answers())) == (2, 2)
    assert merchant.handled == [b"one", b"two"]
    assert "asked again with another question" in merchant.told[0]


def test_a_repeated_question_gets_the_same_bytes_without_being_handled_again(
    merchant: Merchant, keys: DevelopmentKeys
) -> None:
    def script(server: Server, frames_in: Any, context: Any) -> Iterator[bytes]:
        yield from greeting(server, frames_in)
        for _ in range(2):
            yield from ask(7, b"same")
            server.hear(frames_in)
        if server.streams < 3:
            context.abort(grpc.StatusCode.UNAVAILABLE, "")

    with running(script, keys) as server:
        assert merchant.serve(server.port) is ReportCode.DONE
        assert server.streams == 3
        answers = server.answers()
    assert merchant.handled == [b"same"]
    assert len(answers) == 6
    assert len(set(answers)) == 1
    assert wire.decode(Answer, answers[0]).trip == 7


def test_a_question_that_is_repeated_without_end_is_not_answered(
    merchant: Merchant, keys: DevelopmentKeys
) -> None:
    """Each answer may be megabytes that the merchant pays for."""
    moved: list[int] = []
    merchant.count = moved.append

    def script(server: Server, frames_in: Any, context: Any) -> Iterator[bytes]:
        yield from greeting(server, frames_in)
        for _ in range(50):
            yield from ask(7, b"same")
            server.hear(frames_in)

    with running(script, keys) as server:
        assert merchant.serve(server.port) is ReportCode.LOST
        assert len(server.answers()) == 2
    assert len(moved) == 2 and all(size > len(b"same") for size in moved)


# -- how it ends --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "streams"),
    [
        (grpc.StatusCode.NOT_FOUND, 1),
        (grpc.StatusCode.UNAUTHENTICATED, 1),
        (grpc.StatusCode.INVALID_ARGUMENT, 1),
        (grpc.StatusCode.UNAVAILABLE, 2),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, 2),
        (grpc.StatusCode.ABORTED, 2),
        (grpc.StatusCode.UNKNOWN, 2),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_what_is_final_is_not_tried_again_and_the_rest_is(
    merchant: Merchant, keys: DevelopmentKeys, status: grpc.StatusCode, streams: int
) -> None:
    def script(server: Server, frames_in: Any, context: Any) -> Iterator[bytes]:
        yield from greeting(server, frames_in)
        if server.streams == 1:
            context.abort(status, "words that the owner need not read")

    with running(script, keys) as server:
        found = merchant.serve(server.port)
        assert server.streams == streams
    assert found is (ReportCode.LOST if streams == 1 else ReportCode.DONE)
    assert "words" not in "".join(merchant.told)


def timed(serve: Callable[[], ReportCode]) -> float:
    started = time.monotonic()
    assert serve() is ReportCode.LOST
    return time.monotonic() - started


def test_an_endless_block_ends_at_its_deadline(merchant: Merchant, keys: DevelopmentKeys) -> None:
    def script(server: Server, frames_in: Any, context: Any) -> Iterator[bytes]:
        yield from greeting(server, frames_in)
        for trip in range(1, 1 << 30):
            yield from ask(trip, b"x")
            server.hear(frames_in)
            if server.over.wait(0.01):
                return

    with running(script, keys) as server:
        assert 1.5 <= timed(lambda: merchant.serve(server.port, deadline=1.5)) < 10
        assert server.streams == 1
    assert merchant.handled


def test_a_silent_server_ends_at_the_deadline(merchant: Merchant, keys: DevelopmentKeys) -> None:
    with running(raw(greet=False), keys) as server:
        assert 1 <= timed(lambda: merchant.serve(server.port, deadline=1.0)) < 10


def test_streams_that_are_opened_and_dropped_without_a_question_end_with_patience(
    merchant: Merchant, keys: DevelopmentKeys
) -> None:
    def script(server: Server, frames_in: Any, context: Any) -> Iterator[bytes]:
        yield from greeting(server, frames_in)
        context.abort(grpc.StatusCode.UNAVAILABLE, "")

    with running(script, keys) as server:
        assert 1 <= timed(lambda: merchant.serve(server.port, patience=1.0)) < 10
        assert server.streams > 1
    assert merchant.told == [f"No stream to localhost:{server.port} could be kept open."]


def test_a_port_that_takes_connections_and_says_nothing_ends_with_patience(
    merchant: Merchant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hanse_client.stream.CONNECT_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        assert timed(lambda: merchant.serve(mute.getsockname()[1], patience=0.7)) < 10


def test_no_such_host_or_port_is_a_loss_and_no_error(merchant: Merchant) -> None:
    assert merchant.serve(99999, patience=0.1) is ReportCode.LOST
    assert merchant.serve(1, patience=0.1, host="nobody.invalid") is ReportCode.LOST


@pytest.mark.parametrize("greet", [False, True])
def test_stop_ends_a_block_and_tells_nothing(merchant: Merchant, keys: DevelopmentKeys, greet: bool) -> None:
    with running(raw(greet=greet), keys) as server:
        threading.Timer(0.5, merchant.stop.set).start()
        assert timed(lambda: merchant.serve(server.port)) < 10
    assert merchant.told == []


def test_stop_ends_the_wait_for_a_server(merchant: Merchant) -> None:
    threading.Timer(0.5, merchant.stop.set).start()
    assert timed(lambda: merchant.serve(1, patience=WAIT)) < 10
    assert merchant.told == []
