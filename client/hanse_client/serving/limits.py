"""What one request may take, and all of them together: how many at once, how many bytes, how long to arrive.

    app = Bounded(app, requests=32, seconds=30, max_bytes=lambda scope: 20 << 20)
    uvicorn.Config(app, http=BoundedProtocol)

Threads and memory are there for the requests that are worked on, so there is a bound of them, and who comes beyond it
is told at once to try again. A client that sends slowly holds a place: a request's content may take `seconds`, and a
second more for each `BYTES_A_SECOND` that came; its head, `HEAD_SECONDS`, before which it takes no place. Connections
that say nothing are closed, and so are those of clients that do not read what they asked for.

Where `MAX_CONNECTIONS` are open, a new one takes the place of the one that has been idle for longest: so whoever opens
connections without a request, as many and as often as they like, keeps nobody out who has one.
"""

import asyncio
from collections.abc import Callable
from typing import Any, Final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from hanse_client.serving.problems import RETRY_SECONDS, Refused, problem_response

BYTES_A_SECOND: Final = 256 << 10
"""How slowly a large content may come: 2 Mbit/s."""

HEAD_SECONDS: Final = 10.0
"""How long a request's head may take to arrive."""

READ_SECONDS: Final = 30.0
"""How long a client may leave an answer unread: it takes a place until it is sent."""

MAX_CONNECTIONS: Final = 256
"""How many connections are open at once, busy or not: at least twice the largest `requests`, which bounds the busy."""

ALWAYS: Final = ("/health", "/ready")
"""What is answered however many requests there are."""


class Bounded:
    """The ASGI application `app`, for at most `requests` at once.

    `max_bytes` returns the bound of a request's content, None where the application sets one of its own. What is
    beyond the bounds is refused where the content is read, by `Refused` (413, 408).
    """

    def __init__(
        self, app: ASGIApp, requests: int, seconds: float, max_bytes: Callable[[Scope], int | None]
    ) -> None:
        self._app = app
        self._free = requests
        self._seconds = seconds
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http" or scope["path"] in ALWAYS:
            await self._app(scope, receive, send)
            return
        limit = self._max_bytes(scope)
        announced = Headers(scope=scope).get("content-length", "")
        if limit is not None and announced.isdecimal() and int(announced) > limit:
            await problem_response(413, "too_large", _beyond(limit))(scope, receive, send)
            return
        if self._free < 1:
            busy = problem_response(
                503, "busy", "Too many requests at once.", {"Retry-After": str(RETRY_SECONDS)}
            )
            await busy(scope, receive, send)
            return
        self._free -= 1
        try:
            await self._app(scope, self._bounded(receive, limit), send)
        finally:
            self._free += 1

    def _bounded(self, receive: Receive, limit: int | None) -> Receive:
        """Return `receive` under the bounds of bytes and time."""
        clock = asyncio.get_running_loop().time
        began, came, whole = clock(), 0, False

        async def bounded() -> Message:
            nonlocal came, whole
            if whole:  # from now on it tells when the client has gone
                return await receive()
            left = began + self._seconds + came / BYTES_A_SECOND - clock()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, left))
            except TimeoutError:
                raise Refused(
                    408,
                    "too_slow",
                    f"Found {came} bytes so far; expected the whole content sooner.",
                    {"Connection": "close"},
                ) from None
            came += len(message.get("body", b""))
            if limit is not None and came > limit:
                raise Refused(413, "too_large", _beyond(limit))
            whole = not message.get("more_body", False)
            return message

        return bounded


def _beyond(limit: int) -> str:
    return f"Found more than {limit} bytes, expected at most that."


class BoundedProtocol(H11Protocol):
    """uvicorn's HTTP over a connection that is closed when a request's head does not come, or an answer go, in time.

    Beyond `MAX_CONNECTIONS` the one is closed that has waited for a head longest; if none does, the one whose answer
    has gone unread longest; else the new one. A request that is worked on is never given up for a new connection.
    """

    _waiting: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None
    _given_up = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection, in the place of an idle one if there is no other."""
        super().connection_made(transport)
        self._await_head()
        # Those that were given up are among the connections until the event loop has closed them.
        here = [one for one in self.connections if isinstance(one, BoundedProtocol) and not one._given_up]
        if len(here) > MAX_CONNECTIONS:
            idle = {one: place for one in here if one is not self and (place := one._place())}
            (min(idle, key=idle.__getitem__) if idle else self)._give_up()

    def data_received(self, data: bytes) -> None:
        """Take what came, and wait no longer for a head that is whole."""
        super().data_received(data)
        if self._is_answering():
            self._stop_waiting()
        elif self._waiting is None:
            self._await_head()

    def on_response_complete(self) -> None:
        """Wait for the next request's head, as long as uvicorn keeps the connection or it has begun to come."""
        super().on_response_complete()
        if not self._is_answering():
            self._await_head()

    def pause_writing(self) -> None:
        """Wait until the client has read what is sent."""
        super().pause_writing()
        self._unread = self.loop.call_later(READ_SECONDS, self._give_up)

    def resume_writing(self) -> None:
        """Go on: the client has read."""
        self._stop_waiting_for_reader()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._stop_waiting()
        self._stop_waiting_for_reader()
        super().connection_lost(exc)

    def _is_answering(self) -> bool:
        cycle: Any = self.cycle
        return cycle is not None and not cycle.response_complete

    def _place(self) -> tuple[int, float] | None:
        """Return in which place this connection makes room for a new one; None while it is answered."""
        for kind, timer in enumerate((self._waiting, self._unread)):
            if timer is not None:
                return kind, timer.when()  # each kind waits equally long, so the oldest ends first
        return None

    def _give_up(self) -> None:
        self._given_up = True
        self.transport.abort()

    def _await_head(self) -> None:
        self._stop_waiting()
        self._waiting = self.loop.call_later(HEAD_SECONDS, self._give_up)

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _stop_waiting_for_reader(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None
