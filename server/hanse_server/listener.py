"""HTTPS listeners that strangers may knock at: TLS 1.3, a list of paths, and a bound on everything.

    listener = Listener(bounded(app, paths, limits), "service.fleet", "0.0.0.0", 9092, tls, limits)
    with listener:
        print(listener.port)

A flood or a slow peer harms only itself: connections and requests are counted by the address they come from, and a
request must be here, head and body, in a time that does not depend on how it drips. Whatever is refused is refused
before the application behind sees any of it.
"""

import asyncio
import ipaddress
import resource
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from hanse_common.errors import ConfigError
from hanse_server.config import Tls

START_SECONDS = 30.0
STOP_SECONDS = 10.0
GRACE_SECONDS = 1
MAX_HEAD_BYTES = 16_384


@dataclass(frozen=True)
class Limits:
    """What one listener bears: bytes and seconds of a request, and how much of it from one address at once.

    `answer_seconds` is how long an answer may take, None for streams that end when their reader goes.
    """

    body_bytes: int
    body_seconds: float = 10.0
    head_seconds: float = 10.0
    idle_seconds: int = 60
    answer_seconds: float | None = 60.0
    requests: int = 32
    connections: int = 128


class Bounded:
    """The ASGI application that lets requests for `paths` through to `app` once it has heard them out.

    `paths` gives the one method of each path; anything else does not exist.
    """

    def __init__(self, app: ASGIApp, paths: Mapping[str, str], limits: Limits) -> None:
        self._app = app
        self._paths = dict(paths)
        self._limits = limits
        self._active: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        if self._paths.get(scope["path"]) != scope["method"]:
            await _refuse(send, 404)
            return
        origin = _origin(scope["client"][0] if scope["client"] else "")
        if self._active[origin] >= self._limits.requests:
            await _refuse(send, 429)
            return
        self._active[origin] += 1
        try:
            await self._hear_and_answer(scope, receive, send)
        finally:
            self._active[origin] -= 1
            if not self._active[origin]:
                del self._active[origin]

    async def _hear_and_answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                body = await self._body(scope, receive)
        except TimeoutError:
            await _refuse(send, 408)
        except OverflowError:
            await _refuse(send, 413)
        else:
            if body is not None:
                async with asyncio.timeout(self._limits.answer_seconds):
                    await self._app(scope, _replayed(body, receive), send)

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """Return the body, None when its sender is gone. Raises `OverflowError` over the bound."""
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        # h11 has checked that the number is one.
        if int(announced) > self._limits.body_bytes:
            raise OverflowError
        body = bytearray()
        while True:
            event = await receive()
            if event["type"] == "http.disconnect":
                return None
            body += event.get("body", b"")
            if len(body) > self._limits.body_bytes:
                raise OverflowError
            if not event.get("more_body", False):
                return bytes(body)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives `body` first, then what comes after it."""
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return first.pop() if first else await receive()

    return again


async def _refuse(send: Send, status: int) -> None:
    headers = [(b"content-length", b"0"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


def _origin(address: str) -> str:
    """Return whose requests those from `address` are: whoever has one IPv6 address has all of its /64."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(ip, ipaddress.IPv4Address):
        return str(ip)
    return str(ip.ipv4_mapped or ipaddress.IPv6Network((ip, 64), strict=False))


class _Connection(socket.socket):
    """An accepted connection that says when it is closed."""

    on_close: Callable[[], None] | None = None

    def close(self) -> None:
        super().close()
        on_close, self.on_close = self.on_close, None
        if on_close is not None:
            on_close()


class _Door(socket.socket):
    """A listening socket with so many connections for each origin, and in all half of this process' files.

    Counted here and not in HTTP, because a connection costs a file from the first packet on, long before its TLS
    handshake ends.
    """

    def __init__(self, host: str, port: int, connections: int) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__(family, socket.SOCK_STREAM)
        self._from: Counter[str] = Counter()
        self._connections = connections
        self._in_all = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2
        try:
            self.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.bind((host, port))
        except BaseException:
            self.close()
            raise

    def accept(self) -> tuple[socket.socket, Any]:
        """Return the next connection. Raises `ConnectionAbortedError` for one too many: asyncio passes over it."""
        accepted, address = super().accept()
        origin = _origin(str(address[0]))
        if self._from[origin] >= self._connections or self._from.total() >= self._in_all:
            accepted.close()
            raise ConnectionAbortedError
        connection = _Connection(accepted.family, accepted.type, accepted.proto, fileno=accepted.detach())
        connection.on_close = lambda: self._forget(origin)
        self._from[origin] += 1
        return connection, address

    def _forget(self, origin: str) -> None:
        self._from[origin] -= 1
        if not self._from[origin]:
            del self._from[origin]


class _Protocol(H11Protocol):
    """uvicorn's HTTP/1.1, which also hangs up on a peer that does not finish the head of a request in time."""

    head_seconds: float
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unwatch()

    def timeout_keep_alive_handler(self) -> None:
        """Hang up on an idle peer. A polite end would wait for one that does not read its last answer."""
        self.transport.abort()

    def shutdown(self) -> None:
        """Hang up at the listener's end, on an idle peer at once."""
        if self._awaits_head():
            self.transport.abort()
        else:
            super().shutdown()

    def _awaits_head(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _watch_head(self) -> None:
        """Set the timer, once, while a head is awaited; between requests uvicorn has its own, for idleness."""
        if not self._awaits_head():
            self._unwatch()
        elif self._head_timer is None and not self.transport.is_closing():
            self._head_timer = self.loop.call_later(self.head_seconds, self.transport.abort)

    def _unwatch(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


class Listener:
    """One uvicorn server with an event loop and a thread of its own. `section` is how errors name it."""

    def __init__(self, app: ASGIApp, section: str, host: str, port: int, tls: Tls, limits: Limits) -> None:
        self.port = port
        self._section, self._host, self._tls, self._limits = section, host, tls, limits
        self._context = _tls_context(tls)
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                # h11 bounds a request's head, which httptools does not.
                http=type("_Protocol", (_Protocol,), {"head_seconds": limits.head_seconds}),
                h11_max_incomplete_event_size=MAX_HEAD_BYTES,
                ws="none",
                lifespan="off",
                # A peer may not say in a header that it is another.
                proxy_headers=False,
                server_header=False,
                date_header=True,  # by which a merchant finds that its clock is wrong
                log_config=None,
                # A stranger could write as much as it likes into a log of what it did wrong.
                log_level="critical",
                access_log=False,
                ssl_context_factory=lambda config, default: self._context,
                timeout_keep_alive=limits.idle_seconds,
                timeout_graceful_shutdown=GRACE_SECONDS,
            )
        )
        self._thread = threading.Thread(target=self._serve, name=section, daemon=True)
        self._door: _Door | None = None

    def __enter__(self) -> Self:
        """Listen; `port` is then the bound one. Raises `ConfigError` when the port is taken."""
        try:
            self._door = _Door(self._host, self.port, self._limits.connections)
        except OSError as error:
            raise ConfigError(
                f"{self._section}: cannot listen on {self._host}:{self.port} ({error.strerror}); expected a free "
                "port and an address of this machine."
            ) from None
        self.port = self._door.getsockname()[1]
        self._thread.start()
        given_up = time.monotonic() + START_SECONDS
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > given_up:
                self.__exit__()
                raise ConfigError(f"{self._section}: the listener did not start; its reason is in the log.")
            time.sleep(0.01)
        return self

    def __exit__(self, *exception: object) -> None:
        """Stop listening, in `STOP_SECONDS` at most."""
        self._server.should_exit = True
        self._thread.join(STOP_SECONDS)
        if self._door is not None:
            self._door.close()

    def _serve(self) -> None:
        if self._door is not None:
            asyncio.run(self._server.serve(sockets=[self._door]))


def _tls_context(tls: Tls) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        # A key with a passphrase would be asked for at the terminal.
        context.load_cert_chain(tls.certificate, tls.key, password=_no_passphrase)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"service.tls: {tls.certificate} and {tls.key} cannot be used ({_reason(error)}); expected a PEM "
            "certificate and its key without passphrase."
        ) from None
    return context


def _no_passphrase() -> str:
    raise ValueError("the key has a passphrase")


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return (error.reason or "no PEM").lower().replace("_", " ")
    return str(getattr(error, "strerror", None) or error)
