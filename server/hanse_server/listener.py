"""HTTPS listeners that strangers may knock at: TLS 1.3, a list of paths, and a bound on everything.

    listener = Listener(bounded(app, paths, limits), "service.fleet", "0.0.0.0", 9092, tls, limits)
    with listener:
        print(listener.port)

A flood or a slow peer harms only itself: connections and requests are counted by the address they come from, and a
request must be here, head and body, in a time that does not depend on how it drips. Whatever is refused is refused
before the application behind sees any of it. Where files run out, whoever has most connections loses the oldest.
"""

import asyncio
import math
import resource
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from hanse_common.errors import ConfigError
from hanse_server.config import Tls
from hanse_server.rates import Rate, Rates, origin_of

START_SECONDS = 30.0
STOP_SECONDS = 10.0
GRACE_SECONDS = 1
MAX_HEAD_BYTES = 16_384
BUSY_SECONDS = 1.0
"""When one that has too many requests open is to try again."""


@dataclass(frozen=True)
class Limits:
    """What one listener bears: bytes and seconds of a request, and how much of it from one address at once.

    `head_seconds` is also what a TLS handshake may take. `answer_seconds` is how long an answer may take, None for
    streams that end when their reader goes. `refusals` is how often an address may be refused (4xx), or ask what needs
    no proof (GET), before all its requests are; `arrivals` how often it may connect. None is without end.
    """

    body_bytes: int
    body_seconds: float = 10.0
    head_seconds: float = 10.0
    idle_seconds: int = 60
    answer_seconds: float | None = 60.0
    requests: int = 32
    connections: int = 128
    refusals: Rate | None = None
    arrivals: Rate | None = None


class Bounded:
    """The ASGI application that lets requests for `paths` through to `app` once it has heard them out.

    `paths` gives the one method of each path; anything else does not exist. `knows`, where there is one, tells from
    a request's head whether its sender is let in. Others then get 401 before their bodies are read, GET excepted, and
    their refusals count as one flood from wherever they come; who is known is never refused for that.
    """

    def __init__(
        self,
        app: ASGIApp,
        paths: Mapping[str, str],
        limits: Limits,
        knows: Callable[[Scope], bool] | None = None,
    ) -> None:
        self._app = app
        self._paths = dict(paths)
        self._limits = limits
        self._knows = knows
        self._refusals = None if limits.refusals is None else Rates(limits.refusals)
        self._active: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        origin = origin_of(scope["client"][0] if scope["client"] else "")
        known = self._knows is not None and self._knows(scope)
        if self._refusals is not None and not known:
            payer = origin if self._knows is None else ""
            wait = self._refusals.wait(payer)
            if wait:
                await _refuse(send, 429, wait)
                return
            send = _charged(send, partial(self._refusals.charge, payer), scope["method"] == "GET")
        if self._paths.get(scope["path"]) != scope["method"]:
            await _refuse(send, 404)
        elif self._knows is not None and not known and scope["method"] != "GET":
            await _refuse(send, 401)
        elif self._active[origin] >= self._limits.requests:
            await _refuse(send, 429, BUSY_SECONDS)
        else:
            await self._serve(origin, scope, receive, send)

    async def _serve(self, origin: str, scope: Scope, receive: Receive, send: Send) -> None:
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


def _charged(send: Send, charge: Callable[[], None], always: bool) -> Send:
    """Return a `send` that calls `charge` when the answer is a refusal, or `always`."""

    async def passing(message: Message) -> None:
        if message["type"] == "http.response.start" and (always or 400 <= message["status"] < 500):
            charge()
        await send(message)

    return passing


async def _refuse(send: Send, status: int, wait: float | None = None) -> None:
    """Answer with nothing but a status, and hang up; `wait` is in how many seconds it is worth another try."""
    headers = [(b"content-length", b"0"), (b"connection", b"close")]
    if wait is not None:
        headers.append((b"retry-after", str(math.ceil(wait)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


class _Connection(socket.socket):
    """An accepted connection that says when it is closed."""

    on_close: Callable[[], None] | None = None

    def close(self) -> None:
        super().close()
        on_close, self.on_close = self.on_close, None
        if on_close is not None:
            on_close()


class _Door(socket.socket):
    """A listening socket with so many connections for each origin, and in all a quarter of this process' files.

    Counted here and not in HTTP, because a connection costs a file from the first packet on, long before its TLS
    handshake ends.
    """

    def __init__(self, host: str, port: int, limits: Limits) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__(family, socket.SOCK_STREAM)
        self._open: dict[str, dict[_Connection, None]] = {}
        self._in_all = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4
        self._connections = limits.connections
        self._arrivals = None if limits.arrivals is None else Rates(limits.arrivals)
        try:
            self.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.bind((host, port))
        except BaseException:
            self.close()
            raise

    def accept(self) -> tuple[socket.socket, Any]:
        """Return the next connection. Raises `ConnectionAbortedError` for one too many: asyncio passes over it."""
        accepted, address = super().accept()
        origin = origin_of(str(address[0]))
        if not self._admits(origin):
            accepted.close()
            raise ConnectionAbortedError
        connection = _Connection(accepted.family, accepted.type, accepted.proto, fileno=accepted.detach())
        connection.on_close = lambda: self._forget(origin, connection)
        self._open.setdefault(origin, {})[connection] = None
        return connection, address

    def _admits(self, origin: str) -> bool:
        if self._arrivals is not None and self._arrivals.take(origin):
            return False
        own = len(self._open.get(origin, ()))
        if own >= self._connections:
            return False
        return sum(map(len, self._open.values())) < self._in_all or self._make_room(own)

    def _make_room(self, own: int) -> bool:
        """Hang up on the oldest connection of the origin that has most; return whether it has more than `own` + 1."""
        crowd = max(self._open, key=lambda origin: len(self._open[origin]), default=None)
        if crowd is None or len(self._open[crowd]) <= own + 1:
            return False
        oldest = next(iter(self._open[crowd]))
        self._forget(crowd, oldest)
        with suppress(OSError):  # its peer was faster
            oldest.shutdown(socket.SHUT_RDWR)
        return True

    def _forget(self, origin: str, connection: _Connection) -> None:
        of_origin = self._open.get(origin, {})
        of_origin.pop(connection, None)
        if not of_origin:
            self._open.pop(origin, None)


class _Loop(asyncio.SelectorEventLoop):
    """An event loop whose TLS handshakes end in `seconds`, or with their connections. asyncio gives them a minute."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._seconds = seconds

    async def create_server(self, *arguments: Any, **settings: Any) -> Any:
        return await super().create_server(*arguments, ssl_handshake_timeout=self._seconds, **settings)


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
            self._door = _Door(self._host, self.port, self._limits)
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
            with asyncio.Runner(loop_factory=partial(_Loop, self._limits.head_seconds)) as runner:
                runner.run(self._server.serve(sockets=[self._door]))


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
