"""Listeners under attack: what is let through, and who is harmed by a flood, a drip or a slow reader."""

import asyncio
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from hanse_common.errors import ConfigError
from hanse_server import listener, rates
from hanse_server.config import Service, Tls
from hanse_server.development_keys import DevelopmentKeys
from hanse_server.listener import Bounded, Limits, Listener

WAIT = 60.0
BIG = 16 << 20
"""More bytes than the sockets between two processes of one machine hold."""


class App:
    """Answers /echo with the body it got, /big with many bytes, and keeps /wait until `released`."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.waiting = 0
        self.ended: list[str] = []
        self.big = [BIG]
        self.released = threading.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        event = await receive()
        assert not event.get("more_body", False)
        self.bodies.append(event["body"])
        if scope["path"] == "/wait":
            self.waiting += 1
            while not self.released.is_set():
                await asyncio.sleep(0.01)
        try:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            if scope["path"] == "/big":
                for size in self.big:
                    await send({"type": "http.response.body", "body": bytes(size), "more_body": True})
            await send({"type": "http.response.body", "body": event["body"]})
        finally:
            self.ended.append(scope["path"])


PATHS = {"/echo": "POST", "/wait": "POST", "/big": "GET"}


@pytest.fixture
def app() -> Iterator[App]:
    app = App()
    yield app
    app.released.set()


@pytest.fixture
def listen(app: App, make_service: Callable[..., Service]) -> Iterator[Callable[..., Listener]]:
    """Return a function that starts a listener with `Limits` changed by keyword."""
    with ExitStack() as stack:

        def start(host: str = "127.0.0.1", **changes: Any) -> Listener:
            limits = Limits(**({"body_bytes": 1000} | changes))
            bounded = Bounded(app, PATHS, limits)
            return stack.enter_context(Listener(bounded, "test", host, 0, make_service().tls, limits))

        yield start


@pytest.fixture
def connect(keys: DevelopmentKeys) -> Iterator[Callable[..., ssl.SSLSocket]]:
    """Return a function that opens a TLS connection to a listener."""
    context = ssl.create_default_context(cafile=str(keys.authority))
    with ExitStack() as stack:

        def open_one(to: Listener) -> ssl.SSLSocket:
            raw = stack.enter_context(socket.create_connection(("127.0.0.1", to.port), timeout=WAIT))
            return stack.enter_context(context.wrap_socket(raw, server_hostname="localhost"))

        yield open_one


def post(path: str, headers: str, body: bytes = b"") -> bytes:
    return f"POST {path} HTTP/1.1\r\nhost: localhost\r\n{headers}\r\n".encode() + body


def answer(connection: ssl.SSLSocket) -> bytes:
    """Return all that is sent until the other end hangs up."""
    parts = []
    try:
        while part := connection.recv(65_536):
            parts.append(part)
    except (ConnectionError, ssl.SSLError):
        pass
    return b"".join(parts)


def status(connection: ssl.SSLSocket) -> int:
    line = answer(connection).split(b"\r\n")[0]
    return int(line.split()[1]) if line else 0


def url(to: Listener, path: str) -> str:
    return f"https://localhost:{to.port}{path}"


def test_a_request_within_bounds_is_answered(listen: Any, https: httpx.Client, app: App) -> None:
    door = listen()
    response = https.post(url(door, "/echo"), content=b"x" * 1000)
    assert (response.status_code, response.content) == (200, b"x" * 1000)
    chunks = (b"y" * 100 for _ in range(10))
    assert https.post(url(door, "/echo"), content=chunks).content == b"y" * 1000
    assert set(response.headers) <= {"transfer-encoding", "date"}, "an answer says nothing of its server"


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/"), ("POST", "/other"), ("POST", "/echo/"), ("POST", "//echo"), ("POST", "/echo/../wait"),
     ("GET", "/echo"), ("PUT", "/echo"), ("HEAD", "/big"), ("OPTIONS", "/echo"), ("POST", "/big")],
)  # fmt: skip
def test_what_is_not_listed_does_not_exist(
    listen: Any, connect: Any, app: App, method: str, path: str
) -> None:
    connection = connect(listen())
    connection.sendall(f"{method} {path} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode())
    assert status(connection) == 404
    assert not app.bodies


def test_a_websocket_is_not_opened(listen: Any, connect: Any, app: App) -> None:
    upgrade = b"GET /echo HTTP/1.1\r\nhost: localhost\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
    upgrade += b"sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    connection = connect(listen())
    connection.sendall(upgrade)
    assert status(connection) == 404


def test_a_body_announced_too_long_is_refused_before_it_comes(listen: Any, connect: Any, app: App) -> None:
    connection = connect(listen())
    connection.sendall(post("/echo", "content-length: 1001\r\n"))
    assert status(connection) == 413
    assert not app.bodies


def test_a_body_that_grows_too_long_is_refused_when_it_does(listen: Any, connect: Any, app: App) -> None:
    connection = connect(listen())
    connection.sendall(post("/echo", "transfer-encoding: chunked\r\n", b"3e8\r\n" + b"x" * 1000 + b"\r\n"))
    connection.sendall(b"1\r\ny\r\n")
    assert status(connection) == 413
    assert not app.bodies


def test_a_body_that_drips_is_cut_off(listen: Any, connect: Any, app: App) -> None:
    connection = connect(listen(body_seconds=0.3))
    connection.sendall(post("/echo", "content-length: 1000\r\n", b"x"))
    assert status(connection) == 408
    assert not app.bodies


@pytest.mark.parametrize("sent", [b"", b"POST /echo HTTP/1.1\r\nhost:"], ids=["nothing", "half-a-head"])
def test_a_head_that_does_not_come_is_not_waited_for(listen: Any, connect: Any, sent: bytes) -> None:
    connection = connect(listen(head_seconds=0.3))
    connection.sendall(sent)
    assert answer(connection) == b""


def test_a_second_head_that_drips_is_not_waited_for(listen: Any, connect: Any) -> None:
    connection = connect(listen(head_seconds=0.3))
    connection.sendall(post("/echo", "content-length: 1\r\n", b"x"))
    assert connection.recv(65_536).startswith(b"HTTP/1.1 200")
    connection.sendall(b"POST /ec")
    assert b"HTTP" not in answer(connection)


def test_the_head_has_time_of_its_own_and_the_answer_too(listen: Any, connect: Any, app: App) -> None:
    connection = connect(listen(head_seconds=0.3))
    connection.sendall(post("/wait", "content-length: 1\r\nconnection: close\r\n", b"x"))
    threading.Timer(1.0, app.released.set).start()
    assert status(connection) == 200


def test_an_idle_connection_is_closed(listen: Any, connect: Any) -> None:
    connection = connect(listen(idle_seconds=1))
    connection.sendall(post("/echo", "content-length: 1\r\n", b"x"))
    assert answer(connection).endswith(b"0\r\n\r\n")


def test_a_head_too_long_is_refused(listen: Any, connect: Any, app: App) -> None:
    connection = connect(listen())
    connection.sendall(post("/echo", "x: " + "y" * (listener.MAX_HEAD_BYTES + 1)))
    assert status(connection) == 400
    assert not app.bodies


def test_a_reader_too_slow_is_given_up(
    listen: Any, connect: Any, app: App, wait_until: Callable[[str, Any], Any]
) -> None:
    app.big = [65_536] * (BIG // 65_536)
    connection = connect(listen(answer_seconds=0.3))
    connection.sendall(b"GET /big HTTP/1.1\r\nhost: localhost\r\n\r\n")
    wait_until("the answer to be given up", lambda: app.ended)
    assert len(answer(connection)) < BIG


def test_a_reader_of_an_answer_sent_at_once_is_given_up_too(
    listen: Any, connect: Any, app: App, wait_until: Callable[[str, Any], Any]
) -> None:
    door = listen(idle_seconds=1)
    connection = connect(door)
    connection.sendall(b"GET /big HTTP/1.1\r\nhost: localhost\r\n\r\n")
    wait_until("the answer to be given up", lambda: app.ended and not door._server.server_state.connections)
    assert len(answer(connection)) < BIG


def test_too_many_requests_of_one_address_are_refused_and_harm_no_later_one(
    listen: Any, https: httpx.Client, connect: Any, app: App, wait_until: Callable[[str, Any], Any]
) -> None:
    door = listen(requests=3)
    flood = [connect(door) for _ in range(3)]
    for connection in flood:
        # It helps nobody to name another address.
        connection.sendall(post("/wait", "x-forwarded-for: 10.1.2.3\r\nconnection: close\r\n"))
    wait_until("the flood", lambda: app.waiting == 3)
    refused = https.post(url(door, "/echo"), headers={"x-forwarded-for": "10.1.2.4"})
    assert refused.status_code == 429
    app.released.set()
    assert [status(connection) for connection in flood] == [200] * 3
    wait_until("room", lambda: https.post(url(door, "/echo")).status_code == 200)


def test_a_flood_from_one_address_leaves_others_alone(
    listen: Any, https: httpx.Client, app: App, keys: DevelopmentKeys, wait_until: Callable[[str, Any], Any]
) -> None:
    door = listen(requests=2, connections=2)
    context = ssl.create_default_context(cafile=str(keys.authority))
    with ExitStack() as stack:
        for _ in range(2):
            raw = socket.create_connection(
                ("127.0.0.1", door.port), timeout=WAIT, source_address=("127.0.0.2", 0)
            )
            connection = stack.enter_context(context.wrap_socket(raw, server_hostname="localhost"))
            connection.sendall(post("/wait", "content-length: 0\r\n"))
        wait_until("the flood", lambda: app.waiting == 2)
        assert https.post(url(door, "/echo"), content=b"z").content == b"z"


def test_too_many_connections_of_one_address_are_hung_up_on_even_before_tls(
    listen: Any, https: httpx.Client
) -> None:
    door = listen(connections=3)
    with ExitStack() as stack:
        open_ones = [
            stack.enter_context(socket.create_connection(("127.0.0.1", door.port), timeout=WAIT))
            for _ in range(3)
        ]
        with socket.create_connection(("127.0.0.1", door.port), timeout=WAIT) as one_too_many:
            assert hung_up_on(one_too_many)
        # None of those before it was.
        for connection in open_ones:
            connection.setblocking(False)
            with pytest.raises(BlockingIOError):
                connection.recv(1)
    # They are closed now, and count no more.
    for _ in range(1000):
        try:
            assert https.post(url(door, "/echo"), content=b"z").content == b"z"
            return
        except httpx.TransportError:
            threading.Event().wait(0.02)
    pytest.fail("closed connections still count")


def hung_up_on(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ConnectionError:
        return True


def test_connections_of_all_take_a_quarter_of_what_the_process_may_open(
    listen: Any, https: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener.resource, "getrlimit", lambda which: (8, 8))
    door = listen(connections=100)
    with ExitStack() as stack:
        for last in range(2, 4):
            source = (f"127.0.0.{last}", 0)
            stack.enter_context(
                socket.create_connection(("127.0.0.1", door.port), timeout=WAIT, source_address=source)
            )
        with socket.create_connection(("127.0.0.1", door.port), timeout=WAIT) as one_too_many:
            assert hung_up_on(one_too_many)


@pytest.mark.parametrize(
    ("address", "origin"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::9", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", ""),
    ],
)
def test_an_origin_is_an_address_or_the_network_somebody_has_all_of(address: str, origin: str) -> None:
    assert rates.origin_of(address) == origin


def test_older_tls_is_refused(listen: Any, keys: DevelopmentKeys) -> None:
    door = listen()
    context = ssl.create_default_context(cafile=str(keys.authority))
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with (
        socket.create_connection(("127.0.0.1", door.port), timeout=WAIT) as raw,
        pytest.raises((ssl.SSLError, ConnectionError)),
    ):
        context.wrap_socket(raw, server_hostname="localhost")


def test_plain_http_is_refused(listen: Any) -> None:
    door = listen()
    with socket.create_connection(("127.0.0.1", door.port), timeout=WAIT) as raw:
        raw.sendall(post("/echo", "content-length: 0\r\n"))
        assert b"HTTP" not in raw.recv(1000)


def test_a_busy_port_is_named(listen: Any, app: App, make_service: Callable[..., Service]) -> None:
    busy = listen().port
    limits = Limits(body_bytes=1)
    with pytest.raises(ConfigError, match=f"service.x: cannot listen on 127.0.0.1:{busy} .*in use"):
        Listener(app, "service.x", "127.0.0.1", busy, make_service().tls, limits).__enter__()


def test_unusable_tls_files_are_named(app: App, keys: DevelopmentKeys, tmp_path: Path) -> None:
    locked, junk = tmp_path / "locked.key", tmp_path / "junk"
    junk.write_bytes(b"junk")
    subprocess.run(
        ["openssl", "ec", "-in", keys.key, "-aes256", "-passout", "pass:secret", "-out", locked],
        check=True,
        capture_output=True,
    )
    for certificate, key in (
        (tmp_path / "missing", keys.key),
        (junk, keys.key),
        (keys.certificate, junk),
        (keys.authority, keys.key),
        (keys.certificate, locked),
    ):
        tls = Tls(authority=keys.authority, certificate=certificate, key=key)
        with pytest.raises(ConfigError, match=r"service.tls: .* cannot be used"):
            Listener(app, "test", "127.0.0.1", 0, tls, Limits(body_bytes=1))


def test_a_listener_ends_though_peers_stay(listen: Any, connect: Any, app: App) -> None:
    door = listen(answer_seconds=None)
    connection = connect(door)
    connection.sendall(post("/wait", "content-length: 0\r\n"))
    door.__exit__()
    assert not door._thread.is_alive()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", door.port), timeout=WAIT)
