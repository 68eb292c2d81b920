"""Who may see the owner's page: whoever came once by the address that only the owner can read.

    address(config)                              # http://127.0.0.1:8765/?token=…
    app = Gate(app, "hanse-8765", lambda: read_token(config.state), languages, "hanse-client page")
    fields = await form(request, max_bytes=4096)

Every user of this machine can reach 127.0.0.1, so nothing is shown without the token, 32 bytes in a file that its owner
alone can read. The address is answered with a cookie: a name of the session, drawn at random, and its HMAC under the
token. So nothing is kept, and with another token all sessions end. Each form has a key of its session, another HMAC.

The cookie is the browser's for all of 127.0.0.1, whatever the port: a server of another user's that the owner's browser
visits gets to see it, and can use the page with it until there is another token. So on a machine with users you do not
trust, visit nothing else at 127.0.0.1 in the browser that has the page open.
"""

import base64
import hashlib
import hmac
import re
import secrets
from collections.abc import Awaitable, Callable, Mapping
from html import escape
from pathlib import Path

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from hanse_client.config import ClientConfig
from hanse_common.errors import ConfigError
from hanse_common.files import read_bounded, write_atomically
from hanse_common.web.forms import posted
from hanse_common.web.languages import Languages
from hanse_common.web.serving import HOST

TOKEN_FILE = "page.token"  # noqa: S105 - a name
OPENER = "open-page.html"

Endpoint = Callable[[Request], Awaitable[Response]]

_TOKEN = re.compile(r"[A-Za-z0-9_-]{43}")
_OPEN = ("/static/", "/favicon.ico")
"""What everybody may see: the theme."""


def new_token() -> str:
    """Return 32 bytes of the system's randomness, 43 characters that may stand in an address."""
    return secrets.token_urlsafe(32)


def read_token(state: Path, name: str = TOKEN_FILE) -> str | None:
    """Return the token in the file `name` of the folder `state`; None, so that nobody is let in, if none is secret."""
    path = state / name
    try:
        if path.stat().st_mode & 0o077:
            return None
        found = read_bounded(path, 100, "a token", ConfigError).decode("ascii", "replace").strip()
    except (OSError, ConfigError):
        return None
    return found if _TOKEN.fullmatch(found) else None


def make_token(state: Path, name: str = TOKEN_FILE) -> str:
    """Return the token as `read_token` does; makes it when there is none that is secret.

    Raises `ConfigError` when it can't be written.
    """
    token = read_token(state, name)
    if token is None:
        token = new_token()
        try:
            state.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_atomically(state / name, token.encode())
        except OSError as error:
            raise ConfigError(f"{state}: cannot be written ({error.strerror}).") from None
    return token


def address(config: ClientConfig) -> str:
    """Return the address that lets its visitor see the page; makes the token when there is none that is secret.

    Raises `ConfigError` when the configuration has no page, or the token can't be written.
    """
    if config.page is None:
        raise ConfigError("page: missing; expected a section with a port.")
    return entrance(config.page.port, make_token(config.state))


def entrance(port: int, token: str) -> str:
    """Return the address for those who have `token`."""
    return f"http://{HOST}:{port}/?token={token}"


def opener(folder: Path, address: str) -> Path:
    """Write a file into `folder` that leads a browser to `address`, for its owner's eyes (mode 0600); return its path.

    All users can read what a program is started with, so a browser must not be started with the address itself.
    Raises `ConfigError`.
    """
    path = folder / OPENER
    target = escape(address, quote=True)
    page = f'<!doctype html><title>Hanse</title><meta http-equiv="refresh" content="0; url={target}">\n'
    try:
        write_atomically(path, page.encode())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}).") from None
    return path


class Gate:
    """The ASGI application `app`, for those who have the token.

    `cookie` is the session's name, another one for each port. `token` is asked at each request; None lets nobody in.
    Those outside read the template `locked`, which says how `command` lets them in. Inside, `request.state.key` is the
    key of the session's forms. `secure` is whether the page is served by TLS: the cookie is then sent by nothing else.
    """

    def __init__(
        self,
        app: ASGIApp,
        cookie: str,
        token: Callable[[], str | None],
        languages: Languages,
        command: str,
        *,
        locked: str = "page-locked.html",
        secure: bool = False,
    ) -> None:
        self._app = app
        self._cookie = cookie
        self._token = token
        self._languages = languages
        self._command = command
        self._locked = locked
        self._secure = secure

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        request = Request(scope)
        app: ASGIApp = self._app
        if not request.url.path.startswith(_OPEN):
            token = self._token()
            if token is not None and self._knocks(token, request):
                app = self._let_in(token, request)
            elif token is not None and (session := self._session(token, request)):
                scope.setdefault("state", {})["key"] = _mac(token, "form", session)
            else:
                app = self._said(request, self._locked, 403, command=self._command)
        await app(scope, receive, send)

    def _knocks(self, token: str, request: Request) -> bool:
        """Return whether the request comes by the address that lets in."""
        found = request.query_params.get("token", "")
        return request.method == "GET" and request.url.path == "/" and _same(found, token)

    def _session(self, token: str, request: Request) -> str | None:
        """Return the name of the request's session, if it has one."""
        name, _, mac = request.cookies.get(self._cookie, "").partition(".")
        return name if _same(mac, _mac(token, "session", name)) else None

    def _let_in(self, token: str, request: Request) -> HTMLResponse:
        """Begin a session, and lead on to an address without the token.

        From a page of our own, not by a redirect: a browser that follows one from a link elsewhere, such as the opener,
        leaves out a cookie that is for our own pages alone.
        """
        answer = self._said(request, "page-enter.html", 200)
        name = secrets.token_urlsafe(16)
        session = f"{name}.{_mac(token, 'session', name)}"
        answer.set_cookie(
            self._cookie, session, httponly=True, samesite="strict", path="/", secure=self._secure
        )
        return answer

    def _said(self, request: Request, template: str, status: int, **values: str) -> HTMLResponse:
        return HTMLResponse(self._languages.of(request).render(template, served=True, **values), status)


async def form(request: Request, max_bytes: int) -> Mapping[str, str]:
    """Return the fields of a form that a page of this session sent. Raises `HTTPException` for any other."""
    fields = dict(await posted(request, max_bytes))
    require_session(request, fields.pop("key", ""))
    return fields


def require_session(request: Request, key: str) -> None:
    """Return if `key` is that of the forms of this request's session. Raises `HTTPException` otherwise."""
    if not _same(key, request.state.key):
        raise HTTPException(403, "This form is of another session.")


def deed(act: Callable[[Request, Mapping[str, str]], Response], max_bytes: int) -> Endpoint:
    """Return an endpoint that does `act`, in a thread, with the fields of a form of this session."""

    async def endpoint(request: Request) -> Response:
        return await run_in_threadpool(act, request, await form(request, max_bytes))

    return endpoint


def _same(found: str, secret: str) -> bool:
    """Return whether the two are equal, in a time that tells nothing of `secret`."""
    return hmac.compare_digest(found.encode("utf-8", "replace"), secret.encode())


def _mac(token: str, purpose: str, session: str) -> str:
    made = hmac.digest(token.encode(), f"{purpose} {session}".encode(), hashlib.sha256)
    return base64.urlsafe_b64encode(made).decode().rstrip("=")
