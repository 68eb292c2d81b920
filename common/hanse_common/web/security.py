"""Safety of pages that are served: headers that let a browser do little, and a check of whom it thinks it asks.

    app = Guarded(app, hosts=("localhost", "127.0.0.1", "[::1]"))

Every answer gets `HEADERS`, an error's, too. A request whose `Host` is none of `hosts` is answered 421 and goes no
further: a page elsewhere whose name was pointed at this machine (DNS rebinding) would else be taken for one of ours by
the browser, and could read what we answer. The port does not matter: it is part of a browser's origin already.
"""

from collections.abc import Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}
"""What every answer says, whatever the application says of the same."""


class Guarded:
    """The ASGI application `app`, behind a check of the request's host and with `HEADERS` on every answer.

    `hosts` are names as in a URL, without a port, IPv6 in brackets. WebSockets are refused. `refusal` answers where the
    host is another; it reads nothing of the request.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str], refusal: ASGIApp | None = None) -> None:
        self._app = app
        self._refusal = refusal or PlainTextResponse("This address is not served here.\n", status_code=421)
        self._hosts = frozenset(host.lower() for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(message)

        asked = Headers(scope=scope).getlist("host")
        app: ASGIApp = self._app
        if len(asked) != 1 or _without_port(asked[0]) not in self._hosts:
            app = self._refusal
        await app(scope, receive, send_guarded)


def _without_port(host: str) -> str:
    """Return the name in a `Host` header, in lower case."""
    end = host.find("]") + 1 if host.startswith("[") else host.find(":")
    name, rest = (host, "") if end < 0 else (host[:end], host[end:])
    if rest and not (rest.startswith(":") and rest[1:].isdecimal()):
        return ""
    return name.lower()
