"""Addresses whose parts may hold a slash: /v1/products/A%2F17 is the product A/17.

    app = Segments(app)
    sku = unquoted(part)               # in the route

Servers decode an address before it is taken apart, so that the product would be looked for in a folder. Here a slash,
and the sign by which it is written, stay encoded until each part is on its own.
"""

from urllib.parse import quote, unquote

from starlette.types import ASGIApp, Receive, Scope, Send


class Segments:
    """The ASGI application `app`, whose routes see `%2F` and `%25` as they were sent."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "http" and "raw_path" in scope:
            parts = scope["raw_path"].decode("ascii", "replace").split("/")
            scope = {**scope, "path": "/".join(_kept(part) for part in parts)}
        await self._app(scope, receive, send)


def unquoted(part: str) -> str:
    """Return what a part of an address says."""
    return part.replace("%2F", "/").replace("%25", "%")


def quoted(text: str) -> str:
    """Return `text` as a part of an address."""
    return quote(text, safe="")


def _kept(part: str) -> str:
    return unquote(part).replace("%", "%25").replace("/", "%2F")
