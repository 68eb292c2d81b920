"""Streams over real TLS on loopback: honest merchants, lost connections, and everyone who would cheat."""

import logging
import os
import queue
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hanse_client import stream as client_stream
from hanse_client.stream import Limits, serve_block
from hanse_common import signing, wire
from hanse_common.credentials import fingerprint
from hanse_common.errors import ConfigError, RunStopped
from hanse_common.plan import SignedPlan
from hanse_common.session import (
    FRAME_BYTES,
    METHOD,
    Answer,
    Ask,
    Assignment,
    Challenge,
    Hello,
    ReportCode,
    frames,
)
from hanse_server import greeting, reception
from hanse_server.development_keys import make_keys
from hanse_server.stream import StreamServer

BLOCK = b"b" * 16
RECORD_BYTES = 1 << 22
NAMES = ("alder", "birch", "cedar")
LIMITS = Limits(record_bytes=RECORD_BYTES, patience=10.0, deadline=60.0)
WAIT = 20.0
KEYS = {name: Ed25519PrivateKey.generate() for name in NAMES}
STRANGER = Ed25519PrivateKey.generate()


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    made = make_keys(tmp_path_factory.mktemp("keys") / "a", ("localhost", "127.0.0.1"), ())
    other = make_keys(tmp_path_factory.mktemp("keys") / "b", ("localhost", "127.0.0.1"), ())
    return {
        "ca": made.authority.read_bytes(),
        "crt": made.certificate.read_bytes(),
        "key": made.key.read_bytes(),
        "other ca": other.authority.read_bytes(),
        "other crt": other.certificate.read_bytes(),
        "other key": other.key.read_bytes(),
    }


def make_server(pki: dict[str, bytes], port: int = 0) -> StreamServer:
    identities = {signing.public_bytes(key): name for name, key in KEYS.items()}
    return StreamServer("127.0.0.1", port, pki["crt"], pki["key"], lambda: identities)


@pytest.fixture
def server(pki: dict[str, bytes]) -> Iterator[StreamServer]:
    with make_server(pki) as running:
        running.open_block(BLOCK, RECORD_BYTES)
        yield running


class Merchants:
    """Merchants in threads of this process, which echo what they are asked."""

    def __init__(self, authority: bytes) -> None:
        self.authority = authority
        self.stop = threading.Event()
        self.pool = ThreadPoolExecutor(max_workers=12)
        self.handled: list[bytes] = []

    def handle(self, request: bytes) -> bytes:
        self.handled.append(request)
        return b"re: " + request

    def join(self, port: int, name: str, **changes: Any) -> "Future[ReportCode]":
        settings: dict[str, Any] = {
            "assignment": assignment(port),
            "identity": KEYS[name],
            "authority": self.authority,
            "handle": self.handle,
            "stop": self.stop,
            "limits": LIMITS,
        }
        return self.pool.submit(serve_block, **(settings | changes))


def assignment(port: int, block: bytes = BLOCK) -> Assignment:
    return Assignment(
        block=block,
        signed_plan=SignedPlan(plan=b"", signature=bytes(64)),
        rounds=1,
        aggregator=f"localhost:{port}",
    )


@pytest.fixture
def merchants(pki: dict[str, bytes]) -> Iterator[Merchants]:
    made = Merchants(pki["ca"])
    yield made
    made.stop.set()
    made.pool.shutdown(wait=True, cancel_futures=True)


def everyone(names: frozenset[str]) -> bool:
    return names == frozenset(NAMES)


@contextmanager
def raw_stream(port: int, root: bytes) -> Iterator[tuple[Any, Callable[[bytes], None]]]:
    """A stream under a test's control: what is heard, frame by frame, and a way to say a frame."""
    said: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    options = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))
    with grpc.secure_channel(f"localhost:{port}", grpc.ssl_channel_credentials(root), options) as channel:
        heard = channel.stream_stream(METHOD)(iter(said.get, None), timeout=WAIT)
        try:
            yield heard, said.put
        finally:
            said.put(None)
            heard.cancel()


def challenge_of(heard: Any) -> Challenge:
    return wire.decode(Challenge, next(heard)[1:])


def outcome(heard: Any) -> grpc.StatusCode:
    """Hear the stream out and return its status."""
    try:
        for _ in heard:
            pass
    except grpc.RpcError as error:
        code: grpc.StatusCode = error.code()
        return code
    return grpc.StatusCode.OK


def hello_for(pki: dict[str, bytes], heard: Any, key: Ed25519PrivateKey, block: bytes = BLOCK) -> Hello:
    return Hello.sign(key, challenge_of(heard).nonce, fingerprint(pki["crt"]), block)


def say(send: Callable[[bytes], None], message: Any) -> None:
    for frame in frames(wire.encode(message)):
        send(frame)


def greet(pki: dict[str, bytes], heard: Any, send: Callable[[bytes], None], name: str = "alder") -> None:
    say(send, hello_for(pki, heard, KEYS[name]))


# -- honest merchants ---------------------------------------------------------------------------------------------


def test_many_trips_and_the_end_of_a_block(server: StreamServer, merchants: Merchants) -> None:
    reports = [merchants.join(server.port, name) for name in NAMES]
    assert server.wait(WAIT, everyone)
    assert server.connected() == NAMES
    for trip in range(20):
        payloads = {name: f"{trip} {name}".encode() for name in NAMES}
        replies = dict(server.exchange("test", payloads, WAIT))
        assert replies == {name: b"re: " + payload for name, payload in payloads.items()}
    server.close_block()
    assert [report.result(WAIT) for report in reports] == [ReportCode.DONE] * 3
    assert server.connected() == ()


def test_only_those_asked_are_asked(server: StreamServer, merchants: Merchants) -> None:
    for name in NAMES:
        merchants.join(server.port, name)
    assert server.wait(WAIT, everyone)
    assert dict(server.exchange("test", {"birch": b"x"}, WAIT)) == {"birch": b"re: x"}
    assert merchants.handled == [b"x"]


def test_one_block_after_another(server: StreamServer, merchants: Merchants) -> None:
    for number in (1, 2, 3):
        block = bytes([number]) * 16
        server.open_block(block, RECORD_BYTES)
        report = merchants.join(server.port, "alder", assignment=assignment(server.port, block))
        assert server.wait(WAIT, lambda names: "alder" in names)
        assert dict(server.exchange("test", {"alder": b"x"}, WAIT)) == {"alder": b"re: x"}
        server.close_block()
        assert report.result(WAIT) is ReportCode.DONE


def test_records_of_many_frames(server: StreamServer, merchants: Merchants) -> None:
    merchants.join(server.port, "alder")
    assert server.wait(WAIT, lambda names: "alder" in names)
    payload = os.urandom(3 * FRAME_BYTES + 17)
    assert dict(server.exchange("test", {"alder": payload}, WAIT)) == {"alder": b"re: " + payload}


def test_a_silent_merchant_is_left_out_and_its_late_answer_too(
    server: StreamServer, merchants: Merchants
) -> None:
    release = threading.Event()

    def slow(request: bytes) -> bytes:
        if request == b"first":
            release.wait(WAIT)
        return b"re: " + request

    merchants.join(server.port, "alder", handle=slow)
    merchants.join(server.port, "birch")
    assert server.wait(WAIT, lambda names: len(names) == 2)
    asked = dict.fromkeys(("alder", "birch"), b"first")
    assert dict(server.exchange("test", asked, 1.0)) == {"birch": b"re: first"}
    release.set()
    asked = dict.fromkeys(("alder", "birch"), b"second")
    assert dict(server.exchange("test", asked, WAIT)) == dict.fromkeys(asked, b"re: second")


def test_a_merchant_without_a_stream_is_waited_for_until_the_deadline(
    server: StreamServer, merchants: Merchants
) -> None:
    threading.Timer(0.3, lambda: merchants.join(server.port, "alder")).start()
    assert dict(server.exchange("test", {"alder": b"x"}, WAIT)) == {"alder": b"re: x"}
    assert dict(server.exchange("test", {"birch": b"x"}, 0.2)) == {}


def test_an_exchange_that_is_broken_off_leaves_nothing_open(
    server: StreamServer, merchants: Merchants
) -> None:
    for name in NAMES:
        merchants.join(server.port, name)
    assert server.wait(WAIT, everyone)
    replies = server.exchange("test", dict.fromkeys(NAMES, b"first"), WAIT)
    next(replies)
    replies.close()  # type: ignore[attr-defined]
    found = dict(server.exchange("test", dict.fromkeys(NAMES, b"second"), WAIT))
    assert found == dict.fromkeys(NAMES, b"re: second")


# -- lost streams -------------------------------------------------------------------------------------------------


class Wire:
    """A TCP proxy that a test can cut."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._sockets: list[socket.socket] = []
        self.open = True
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
                if not self.open:
                    near.close()
                    continue
                far = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                return
            self._sockets += [near, far]
            for one, other in ((near, far), (far, near)):
                threading.Thread(target=self._copy, args=(one, other), daemon=True).start()

    def _copy(self, one: socket.socket, other: socket.socket) -> None:
        with suppress(OSError):
            while data := one.recv(65536):
                other.sendall(data)
        _hang_up(one, other)

    def cut(self) -> None:
        sockets, self._sockets = self._sockets, []
        _hang_up(*sockets)

    def close(self) -> None:
        self._listener.close()
        self.cut()


def _hang_up(*sockets: socket.socket) -> None:
    for end in sockets:
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)  # wakes a thread that reads, which close alone does not


@pytest.fixture
def line(server: StreamServer) -> Iterator[Wire]:
    made = Wire(server.port)
    yield made
    made.close()


def test_a_stream_lost_before_its_answer_resends_byte_by_byte(
    server: StreamServer, merchants: Merchants, line: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line is cut while the merchant works; the same trip is asked again, and `handle` is not."""
    asked: list[bytes] = []
    answered: list[bytes] = []
    ask, answer = client_stream._Block._answer_to, client_stream.Stream.say

    def heard(block: Any, message: Ask) -> bytes:
        asked.append(wire.encode(message))
        return ask(block, message)

    def said(out: Any, record: bytes) -> None:
        answered.append(record)
        answer(out, record)

    monkeypatch.setattr(client_stream._Block, "_answer_to", heard)
    monkeypatch.setattr(client_stream.Stream, "say", said)

    def handle(request: bytes) -> bytes:
        merchants.handled.append(request)
        if len(merchants.handled) == 2:
            line.cut()
            time.sleep(0.3)  # the answer then goes to a stream that is gone
        return os.urandom(8)  # another answer each time it is asked

    merchants.join(line.port, "alder", handle=handle)
    assert server.wait(WAIT, lambda names: "alder" in names)
    assert len(dict(server.exchange("test", {"alder": b"one"}, WAIT))) == 1
    replies = dict(server.exchange("test", {"alder": b"two"}, WAIT))
    assert merchants.handled == [b"one", b"two"]
    assert asked[1] == asked[2]
    answers = [wire.decode(Answer, record) for record in answered if record[2:3] == b"\x0d"]
    assert answers[1] == answers[2]
    assert replies == {"alder": answers[2].payload}


def test_a_stream_lost_for_too_long_is_a_dropout_and_comes_back(
    server: StreamServer, merchants: Merchants, line: Wire
) -> None:
    merchants.join(line.port, "alder")
    merchants.join(server.port, "birch")
    assert server.wait(WAIT, lambda names: len(names) == 2)
    line.open = False
    line.cut()
    assert server.wait(WAIT, lambda names: names == {"birch"})
    found = dict(server.exchange("test", dict.fromkeys(("alder", "birch"), b"x"), 0.5))
    assert found == {"birch": b"re: x"}
    line.open = True
    assert server.wait(WAIT, lambda names: len(names) == 2)
    assert dict(server.exchange("test", {"alder": b"y"}, WAIT)) == {"alder": b"re: y"}


def test_no_server_for_longer_than_patience_is_lost(pki: dict[str, bytes], merchants: Merchants) -> None:
    with make_server(pki) as server:
        port = server.port
    impatient = Limits(RECORD_BYTES, patience=0.5, deadline=60.0)
    assert merchants.join(port, "alder", limits=impatient).result(WAIT) is ReportCode.LOST


def test_a_server_that_is_back_is_found_again(pki: dict[str, bytes], merchants: Merchants) -> None:
    with make_server(pki) as server:
        port = server.port
        server.open_block(BLOCK, RECORD_BYTES)
        report = merchants.join(port, "alder")
        assert server.wait(WAIT, lambda names: "alder" in names)
        server._call(server._server.stop(0))  # type: ignore[union-attr] - as if killed: nothing is said
        with make_server(pki, port) as again:
            again.open_block(BLOCK, RECORD_BYTES)
            assert again.wait(WAIT, lambda names: "alder" in names)
            again.close_block()
            assert report.result(WAIT) is ReportCode.DONE


def test_a_second_stream_of_a_merchant_takes_the_place_of_the_first(
    server: StreamServer, pki: dict[str, bytes]
) -> None:
    with raw_stream(server.port, pki["ca"]) as (first, send_first):
        greet(pki, first, send_first)
        assert server.wait(WAIT, lambda names: names == {"alder"})
        with raw_stream(server.port, pki["ca"]) as (second, send_second):
            greet(pki, second, send_second)
            assert outcome(first) is grpc.StatusCode.ABORTED
            asked = ThreadPoolExecutor(1).submit(dict, server.exchange("test", {"alder": b"x"}, WAIT))
            ask = wire.decode(Ask, next(second)[1:])
            say(send_second, Answer(trip=ask.trip, payload=b"y"))
            assert asked.result(WAIT) == {"alder": b"y"}


def test_stop_ends_a_merchant_that_waits(server: StreamServer, merchants: Merchants) -> None:
    report = merchants.join(server.port, "alder")
    assert server.wait(WAIT, lambda names: "alder" in names)
    merchants.stop.set()
    assert report.result(WAIT) is ReportCode.LOST
    assert server.wait(WAIT, lambda names: not names)


def test_abort_ends_an_exchange_and_a_wait_until_resumed(server: StreamServer, merchants: Merchants) -> None:
    for act in (
        lambda: dict(server.exchange("test", {"alder": b"x"}, WAIT)),
        lambda: server.wait(WAIT, lambda names: False),
    ):
        threading.Timer(0.2, server.abort).start()
        with pytest.raises(RunStopped):
            act()
        with pytest.raises(RunStopped):
            act()
        server.resume()
    merchants.join(server.port, "alder")
    assert dict(server.exchange("test", {"alder": b"x"}, WAIT)) == {"alder": b"re: x"}


# -- cheats -------------------------------------------------------------------------------------------------------


def refused(server: StreamServer, root: bytes, cheat: Callable[[Any, Callable[[bytes], None]], None]) -> Any:
    with raw_stream(server.port, root) as (heard, send):
        cheat(heard, send)
        found = outcome(heard)
    assert server.connected() == ()
    return found


def test_another_merchants_signature_is_refused(server: StreamServer, pki: dict[str, bytes]) -> None:
    def cheat(heard: Any, send: Callable[[bytes], None]) -> None:
        genuine = hello_for(pki, heard, KEYS["birch"])
        say(send, genuine.model_copy(update={"identity": signing.public_bytes(KEYS["alder"])}))

    assert refused(server, pki["ca"], cheat) is grpc.StatusCode.UNAUTHENTICATED


def test_a_stranger_is_refused(server: StreamServer, pki: dict[str, bytes]) -> None:
    def cheat(heard: Any, send: Callable[[bytes], None]) -> None:
        say(send, hello_for(pki, heard, STRANGER))

    assert refused(server, pki["ca"], cheat) is grpc.StatusCode.UNAUTHENTICATED


def test_a_replayed_hello_is_refused(server: StreamServer, pki: dict[str, bytes]) -> None:
    with raw_stream(server.port, pki["ca"]) as (heard, send):
        recorded = hello_for(pki, heard, KEYS["alder"])
        say(send, recorded)
        assert server.wait(WAIT, lambda names: names == {"alder"})
    assert server.wait(WAIT, lambda names: not names)

    def cheat(heard: Any, send: Callable[[bytes], None]) -> None:
        challenge_of(heard)
        say(send, recorded)

    assert refused(server, pki["ca"], cheat) is grpc.StatusCode.UNAUTHENTICATED


def test_a_hello_for_another_block_finds_none(server: StreamServer, pki: dict[str, bytes]) -> None:
    def cheat(heard: Any, send: Callable[[bytes], None]) -> None:
        say(send, hello_for(pki, heard, KEYS["alder"], b"x" * 16))

    assert refused(server, pki["ca"], cheat) is grpc.StatusCode.NOT_FOUND


def test_a_hello_whose_block_was_changed_on_the_way_is_refused(
    server: StreamServer, pki: dict[str, bytes]
) -> None:
    def cheat(heard: Any, send: Callable[[bytes], None]) -> None:
        old = hello_for(pki, heard, KEYS["alder"], b"x" * 16)
        say(send, old.model_copy(update={"block": BLOCK}))

    assert refused(server, pki["ca"], cheat) is grpc.StatusCode.UNAUTHENTICATED


def test_a_relay_with_another_certificate_of_the_same_authority_gets_nowhere(
    server: StreamServer, pki: dict[str, bytes]
) -> None:
    """The man in the middle shows the merchant a certificate of its own and passes challenge and hello on."""

    def cheat(heard: Any, send: Callable[[bytes], None]) -> None:
        nonce = challenge_of(heard).nonce
        say(send, Hello.sign(KEYS["alder"], nonce, fingerprint(pki["other crt"]), BLOCK))

    assert refused(server, pki["ca"], cheat) is grpc.StatusCode.UNAUTHENTICATED


def test_a_merchant_signs_the_certificate_that_it_sees(pki: dict[str, bytes], merchants: Merchants) -> None:
    """What the relay needs: the merchant's own hello names the certificate of whom it speaks to."""
    heard: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    class Relay(grpc.GenericRpcHandler):  # type: ignore[misc]
        def service(self, details: Any) -> Any:
            return grpc.stream_stream_rpc_method_handler(self.relay)

        def relay(self, frames_in: Iterator[bytes], context: Any) -> Iterator[bytes]:
            yield from frames(wire.encode(Challenge(nonce=bytes(32))))
            heard.put(next(frames_in)[1:])

    relay = grpc.server(ThreadPoolExecutor(2), handlers=(Relay(),))
    credentials = grpc.ssl_server_credentials([(pki["other key"], pki["other crt"])])
    port = relay.add_secure_port("127.0.0.1:0", credentials)
    relay.start()
    try:
        report = merchants.join(port, "alder", authority=pki["other ca"])
        hello = wire.decode(Hello, heard.get(timeout=WAIT))
        report.result(WAIT)
    finally:
        relay.stop(0)
    hello.verify(bytes(32), fingerprint(pki["other crt"]))
    with pytest.raises(Exception, match="does not verify"):
        hello.verify(bytes(32), fingerprint(pki["crt"]))


def test_a_server_of_another_authority_is_not_spoken_to(server: StreamServer, pki: dict[str, bytes]) -> None:
    league = Merchants(pki["other ca"])
    assert league.join(server.port, "alder").result(WAIT) is ReportCode.LOST
    assert server.connected() == ()
    assert league.handled == []


def test_a_server_of_another_name_is_not_spoken_to(pki: dict[str, bytes], tmp_path: Path) -> None:
    made = make_keys(tmp_path / "k", ("elsewhere.example",), ())
    identities = {signing.public_bytes(KEYS["alder"]): "alder"}
    certificate, key = made.certificate.read_bytes(), made.key.read_bytes()
    with StreamServer("127.0.0.1", 0, certificate, key, lambda: identities) as server:
        server.open_block(BLOCK, RECORD_BYTES)
        league = Merchants(made.authority.read_bytes())
        assert league.join(server.port, "alder").result(WAIT) is ReportCode.LOST


@pytest.mark.parametrize(
    "record",
    [
        b"",
        b"\0",
        b"\0garbage",
        b"\2garbage",
        b"\1short",
        b"\0" + wire.encode(Ask(trip=1, payload=b"")),
        b"\0" + wire.encode(Challenge(nonce=bytes(32))),
    ],
    ids=["empty", "no record", "no message", "no frame", "short frame", "another type", "our own type"],
)
def test_no_hello_at_all_is_refused(server: StreamServer, pki: dict[str, bytes], record: bytes) -> None:
    def cheat(heard: Any, send: Callable[[bytes], None]) -> None:
        send(record)

    assert refused(server, pki["ca"], cheat) is grpc.StatusCode.UNAUTHENTICATED


def test_before_the_hello_a_record_is_small(server: StreamServer, pki: dict[str, bytes]) -> None:
    def cheat(heard: Any, send: Callable[[bytes], None]) -> None:
        send(b"\1" + bytes(FRAME_BYTES - 1))

    assert refused(server, pki["ca"], cheat) is grpc.StatusCode.UNAUTHENTICATED


def test_no_frame_is_larger_than_a_frame(server: StreamServer, pki: dict[str, bytes]) -> None:
    def cheat(heard: Any, send: Callable[[bytes], None]) -> None:
        greet(pki, heard, send)
        assert server.wait(WAIT, lambda names: names == {"alder"})
        asked = ThreadPoolExecutor(1).submit(dict, server.exchange("test", {"alder": b"x"}, 0.7))
        next(heard)
        send(b"\1" + bytes(8 * FRAME_BYTES))
        assert asked.result(WAIT) == {}

    assert refused(server, pki["ca"], cheat) in {
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.UNKNOWN,
    }


@pytest.mark.parametrize(
    "answer",
    [
        b"\0" + wire.encode(Answer(trip=2, payload=b"x")),
        b"\0" + wire.encode(Ask(trip=1, payload=b"x")),
        b"\0garbage",
        b"\0" + wire.encode(Answer(trip=1, payload=b"x")) + b"!",
    ],
    ids=["another trip", "another type", "no message", "not canonical"],
)
def test_a_wrong_answer_ends_its_senders_stream_and_no_other(
    server: StreamServer,
    merchants: Merchants,
    pki: dict[str, bytes],
    answer: bytes,
    caplog: pytest.LogCaptureFixture,
) -> None:
    merchants.join(server.port, "birch")
    with (
        caplog.at_level(logging.WARNING),
        raw_stream(server.port, pki["ca"]) as (heard, send),
        ThreadPoolExecutor(1) as pool,
    ):
        greet(pki, heard, send)
        assert server.wait(WAIT, lambda names: len(names) == 2)
        asked = pool.submit(dict, server.exchange("test", dict.fromkeys(("alder", "birch"), b"x"), 0.7))
        next(heard)
        send(answer)
        assert outcome(heard) is grpc.StatusCode.INVALID_ARGUMENT
        assert asked.result(WAIT) == {"birch": b"re: x"}
    assert "alder" in caplog.text
    assert "garbage" not in caplog.text


def test_an_oversized_record_ends_its_senders_stream(server: StreamServer, pki: dict[str, bytes]) -> None:
    server.open_block(BLOCK, 1000)
    with raw_stream(server.port, pki["ca"]) as (heard, send), ThreadPoolExecutor(1) as pool:
        greet(pki, heard, send)
        assert server.wait(WAIT, lambda names: names == {"alder"})
        asked = pool.submit(dict, server.exchange("test", {"alder": b"x"}, 0.7))
        next(heard)
        say(send, Answer(trip=1, payload=bytes(1000)))
        assert outcome(heard) is grpc.StatusCode.INVALID_ARGUMENT
        assert asked.result(WAIT) == {}


def test_a_flood_and_a_slow_reader_harm_only_themselves(
    server: StreamServer, merchants: Merchants, pki: dict[str, bytes]
) -> None:
    """alder sends without being asked and never reads; the others' trips go on, and nothing piles up here."""
    merchants.join(server.port, "birch")
    merchants.join(server.port, "cedar")
    with raw_stream(server.port, pki["ca"]) as (heard, send):
        greet(pki, heard, send)
        assert server.wait(WAIT, everyone)
        for _ in range(400):  # 100 MB, of which flow control lets a window through
            send(b"\1" + bytes(FRAME_BYTES - 1))
        large = bytes(RECORD_BYTES // 2)
        before = _resident_bytes()
        for _ in range(3):
            found = dict(server.exchange("test", dict.fromkeys(NAMES, large), 1.5))
            assert set(found) >= {"birch", "cedar"}
        assert _resident_bytes() - before < 200e6


@contextmanager
def greeted(server: StreamServer, pki: dict[str, bytes], names: tuple[str, ...]) -> Iterator[list[Any]]:
    """A raw stream of each merchant, greeted: what is heard and how to say."""
    with ExitStack() as stack:
        streams = []
        for name in names:
            heard, send = stack.enter_context(raw_stream(server.port, pki["ca"]))
            greet(pki, heard, send, name)
            streams.append((heard, send))
        assert server.wait(WAIT, lambda found: found >= set(names))
        yield streams


@pytest.mark.parametrize(("pause", "deadline"), [(60.0, WAIT), (0.1, 1.5)], ids=["silent", "dripping"])
def test_who_holds_the_room_and_does_not_finish_starves_nobody(
    server: StreamServer,
    merchants: Merchants,
    pki: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    pause: float,
    deadline: float,
) -> None:
    """Two have all the room there is. Silence costs it soon, and a drip when the turn is over: a third of the time."""
    large = bytes(RECORD_BYTES // 2)
    monkeypatch.setattr(reception, "ROOM_BYTES", len(large))
    monkeypatch.setattr(reception, "STALL_SECONDS", 0.3)
    monkeypatch.setattr(reception, "MIN_SLICE_SECONDS", 0.1)
    over = threading.Event()

    def drip(send: Callable[[bytes], None]) -> None:
        for frame in list(frames(wire.encode(Answer(trip=1, payload=large))))[:-1]:
            send(frame)
            if over.wait(pause):
                return

    with greeted(server, pki, ("alder", "birch")) as cheats, ThreadPoolExecutor(3) as pool:
        full = partial(_soon, lambda: len(server._room._places) == 2)
        merchants.join(server.port, "cedar", handle=lambda request: large if full() else b"")
        assert server.wait(WAIT, everyone)
        replies = server.exchange("test", dict.fromkeys(NAMES, b"x"), deadline)
        first = pool.submit(next, replies)
        for heard, send in cheats:
            next(heard)
            pool.submit(drip, send)
        name, reply = first.result(WAIT)
        assert (name, len(reply)) == ("cedar", len(large))
        over.set()
        replies.close()  # type: ignore[attr-defined]
    assert _soon(lambda: server._room.held == 0)


def test_room_is_given_back_whatever_becomes_of_an_upload(
    server: StreamServer, pki: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers of several frames that end as garbage, as another trip's, too long, too short, or not at all."""
    monkeypatch.setattr(reception, "ROOM_BYTES", 1)
    size = 2 * FRAME_BYTES
    good = list(frames(wire.encode(Answer(trip=1, payload=bytes(size)))))
    other = list(frames(wire.encode(Answer(trip=2, payload=bytes(size)))))
    garbage = list(frames(bytes(size)))
    cheats = (garbage, other, [*good[:-1], b"\1" + bytes(FRAME_BYTES - 1)], [good[0], b"\0short"], good[:2])
    for number, said in enumerate(cheats, start=1):
        block = bytes([number]) * 16
        server.open_block(block, RECORD_BYTES)
        with raw_stream(server.port, pki["ca"]) as (heard, send), ThreadPoolExecutor(1) as pool:
            say(send, hello_for(pki, heard, KEYS["alder"], block))
            assert server.wait(WAIT, lambda names: names == {"alder"})
            asked = pool.submit(lambda: dict(server.exchange("test", {"alder": b"x"}, 0.3)))
            next(heard)
            for frame in said:
                send(frame)
            if said != good[:2]:
                assert outcome(heard) is grpc.StatusCode.INVALID_ARGUMENT
            assert asked.result(WAIT) == {}
        assert server.wait(WAIT, lambda names: not names)
    assert _soon(lambda: server._room.held == 0)


def test_a_reply_that_is_dealt_with_makes_room_for_the_next(
    server: StreamServer, merchants: Merchants, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody takes the replies: two are here, and the third waits at its merchant's."""
    large = bytes(RECORD_BYTES // 2)
    monkeypatch.setattr(reception, "ROOM_BYTES", 1)
    for name in NAMES:
        merchants.join(server.port, name)
    assert server.wait(WAIT, everyone)
    replies = server.exchange("test", dict.fromkeys(NAMES, large), WAIT)
    found = [next(replies)]
    room = server._room
    assert _soon(lambda: len(room._places) == 2 and all(place.done for place in room._places))
    assert _soon(lambda: len(room._line) == 1)
    time.sleep(0.2)
    assert len(room._places) == 2
    found += replies
    assert sorted(name for name, _ in found) == list(NAMES)
    assert _soon(lambda: room.held == 0)


def _soon(true: Callable[[], bool]) -> bool:
    until = time.monotonic() + WAIT
    while not true() and time.monotonic() < until:
        time.sleep(0.01)
    return true()


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_one_address_cannot_have_all_places_before_the_hello(
    pki: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(greeting, "MAX_PENDING_PER_ADDRESS", 3)
    monkeypatch.setattr(greeting, "HELLO_SECONDS", 4.0)
    with make_server(pki) as server:
        server.open_block(BLOCK, RECORD_BYTES)
        with ExitStack() as stack:
            streams = [stack.enter_context(raw_stream(server.port, pki["ca"]))[0] for _ in range(3)]
            for heard in streams:
                challenge_of(heard)
            one_more = stack.enter_context(raw_stream(server.port, pki["ca"]))[0]
            assert outcome(one_more) is grpc.StatusCode.RESOURCE_EXHAUSTED
            # Those who say nothing are shut out, and their places are free again.
            assert outcome(streams[0]) is grpc.StatusCode.UNAUTHENTICATED
            with raw_stream(server.port, pki["ca"]) as (heard, send):
                greet(pki, heard, send)
                assert server.wait(WAIT, lambda names: names == {"alder"})


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_tls_1_3_only(server: StreamServer, pki: dict[str, bytes], version: ssl.TLSVersion) -> None:
    context = ssl.create_default_context(cadata=pki["ca"].decode())
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.minimum_version = context.maximum_version = version
    context.set_alpn_protocols(["h2"])
    with socket.create_connection(("127.0.0.1", server.port), timeout=WAIT) as plain:
        if version is ssl.TLSVersion.TLSv1_3:
            with context.wrap_socket(plain, server_hostname="localhost") as secured:
                assert secured.version() == "TLSv1.3"
        else:
            with pytest.raises((ssl.SSLError, OSError)):
                context.wrap_socket(plain, server_hostname="localhost")


def test_another_method_is_not_served(server: StreamServer, pki: dict[str, bytes]) -> None:
    target = f"localhost:{server.port}"
    with grpc.secure_channel(target, grpc.ssl_channel_credentials(pki["ca"])) as channel:
        heard = channel.stream_stream("/hanse.Aggregator/Other")(iter(()), timeout=WAIT)
        assert outcome(heard) is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize(
    ("asks", "served"),
    [
        ([Ask(trip=2, payload=b"a"), Ask(trip=1, payload=b"b")], 1),
        ([Ask(trip=1, payload=b"a"), Ask(trip=1, payload=b"b")], 1),
        ([Challenge(nonce=bytes(32))], 0),
    ],
    ids=["an earlier trip", "another question", "another type"],
)
def test_a_merchant_leaves_a_server_that_breaks_the_protocol(
    pki: dict[str, bytes], merchants: Merchants, asks: list[Any], served: int
) -> None:
    class Cheat(grpc.GenericRpcHandler):  # type: ignore[misc]
        def service(self, details: Any) -> Any:
            return grpc.stream_stream_rpc_method_handler(self.cheat)

        def cheat(self, frames_in: Iterator[bytes], context: Any) -> Iterator[bytes]:
            for message in (Challenge(nonce=bytes(32)), *asks):
                yield from frames(wire.encode(message))
                next(frames_in, None)

    cheat = grpc.server(ThreadPoolExecutor(2), handlers=(Cheat(),))
    port = cheat.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(pki["key"], pki["crt"])]))
    cheat.start()
    try:
        assert merchants.join(port, "alder").result(WAIT) is ReportCode.LOST
    finally:
        cheat.stop(0)
    assert len(merchants.handled) == served


def test_a_busy_port_is_named(server: StreamServer, pki: dict[str, bytes]) -> None:
    with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{server.port}"):
        make_server(pki, server.port).__enter__()


def test_a_certificate_that_is_none_is_refused(pki: dict[str, bytes]) -> None:
    with pytest.raises(ConfigError, match="no PEM certificate"):
        StreamServer("127.0.0.1", 0, b"nothing", pki["key"], dict)


def test_certificates_are_x509(pki: dict[str, bytes]) -> None:
    assert (
        x509.load_pem_x509_certificate(pki["crt"]).issuer == x509.load_pem_x509_certificate(pki["ca"]).subject
    )
