"""Who may see the operator's page: whoever shows the admin token, in a form once, or with each request as a bearer.

    gate = Gate(app, token, "hanse-operator-9094", languages)
    # a browser:  POST /login, then a cookie       Prometheus:  Authorization: Bearer TOKEN

`/metrics` also opens to a token that is good for nothing else (`hanse_server.tokens`).

Every user of this machine can reach 127.0.0.1, so without the token there is only `OPEN`. A session is a random name in
a cookie that scripts and other sites cannot use; the server keeps its hash, so that logging out and a restart end it.
The cookie is the browser's for all of 127.0.0.1, whatever the port: a server of another user's that the operator visits
gets to see it, and could read the page, which changes nothing.

**Guessing.** Failures are counted by address and in all, over a minute; at a limit, nobody's word is judged until some
of them are a minute old. What is refused meanwhile is not counted, so that a lock always ends. A browser that was in
before has a cookie which says so, and a count of its own [1]: whoever guesses at the door cannot keep the operator out.

[1] OWASP, "Slow Down Online Guessing Attacks with Device Cookies".
"""

import hashlib
import hmac
import secrets
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from hanse_common.web.forms import posted
from hanse_common.web.languages import Languages
from hanse_server.tokens import metrics_token

METRICS_PATH = "/metrics"

OPEN = ("/health", "/ready", "/login", "/favicon.ico")
"""What everybody may ask for, beside the theme under `/static`."""

MAX_FORM_BYTES = 4096
SESSION_SECONDS = 12 * 3600.0
MAX_SESSIONS = 32
DEVICE_SECONDS = 180 * 86_400

WINDOW_SECONDS = 60.0
FAILURES_AN_ADDRESS = 10
FAILURES_IN_ALL = 30
MAX_ADDRESSES = 256

REQUESTS_A_SECOND = 20.0
MAX_BURST = 200.0
"""How many requests may come at once, from browsers that are or were in, and from all others."""

Tell = Callable[[str, str], None]


class Failures:
    """Counts failures by whom they come from, and in all. `clock` returns seconds, never backwards."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._all: deque[float] = deque()
        self._each: OrderedDict[str, deque[float]] = OrderedDict()

    def wait(self, who: str, known: bool) -> float:
        """Return how many seconds nobody like `who` is heard, 0 for none. One that is `known` has its own count."""
        now = self._clock()
        waits = [_wait(self._each.get(who, deque()), FAILURES_AN_ADDRESS, now)]
        if not known:
            waits.append(_wait(self._all, FAILURES_IN_ALL, now))
        return max(waits)

    def add(self, who: str, known: bool) -> None:
        """Count a failure."""
        now = self._clock()
        if not known:
            self._all.append(now)
        self._each.setdefault(who, deque()).append(now)
        self._each.move_to_end(who)
        while len(self._each) > MAX_ADDRESSES:
            self._each.popitem(last=False)


class Throttle:
    """Lets `rate` requests a second through, and `burst` at once."""

    def __init__(self, rate: float, burst: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._burst, self._clock = rate, burst, clock
        self._left, self._at = burst, clock()

    def let_through(self) -> bool:
        """Return whether one more may come now."""
        now = self._clock()
        self._left = min(self._burst, self._left + self._rate * (now - self._at))
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


class Gate:
    """The ASGI application `app`, for those who have `token`. `prefix` names its cookies, another one for each port.

    Inside, `request.state.key` is the key of the session's forms. `tell` hears, as a kind and a text, when the door is
    locked because of failures.
    """

    def __init__(
        self,
        app: ASGIApp,
        token: bytes,
        prefix: str,
        languages: Languages,
        tell: Tell = lambda kind, text: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._app = app
        self._token = token
        self._session_cookie, self._device_cookie = prefix, f"{prefix}-known"
        self._languages = languages
        self._tell = tell
        self._clock = clock
        self._failures = Failures(clock)
        self._inside = Throttle(REQUESTS_A_SECOND, MAX_BURST, clock)
        self._outside = Throttle(REQUESTS_A_SECOND, MAX_BURST, clock)
        self._sessions: OrderedDict[bytes, float] = OrderedDict()
        self._form_secret = secrets.token_bytes(32)
        self._told = -WINDOW_SECONDS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        request = Request(scope, receive)
        session = self._session(request)
        # Whoever floods the door must not keep out those who were in.
        throttle = self._inside if session is not None or self._known(request) else self._outside
        app: ASGIApp
        if not throttle.let_through():
            app = _refusal(429, "Too many requests.", 1)
        elif request.url.path == "/login":
            app = await self._login(request)
        elif request.url.path.startswith("/static/") or request.url.path in OPEN:
            app = self._app
        elif session is not None:
            scope.setdefault("state", {})["key"] = self._key(session)
            app = await self._logout(request, session) if request.url.path == "/logout" else self._app
        elif (refused := self._bearer(request)) is None:
            scope.setdefault("state", {})["key"] = ""
            app = self._app
        else:
            app = refused
        await app(scope, receive, send)

    # Sessions

    def _session(self, request: Request) -> str | None:
        """Return the name of the request's session, if it has one."""
        name = request.cookies.get(self._session_cookie, "")
        if not name:
            return None
        hashed = hashlib.sha256(name.encode("utf-8", "replace")).digest()
        ends = self._sessions.get(hashed)
        if ends is None:
            return None
        if ends <= self._clock():
            del self._sessions[hashed]
            return None
        return name

    def _begin(self) -> str:
        name = secrets.token_urlsafe(32)
        self._sessions[hashlib.sha256(name.encode()).digest()] = self._clock() + SESSION_SECONDS
        while len(self._sessions) > MAX_SESSIONS:
            self._sessions.popitem(last=False)
        return name

    def _key(self, session: str) -> str:
        """Return the key of a session's forms, which does not follow from its cookie."""
        return hmac.digest(self._form_secret, session.encode(), "sha256").hex()

    # The ways in and out

    async def _login(self, request: Request) -> Response:
        if request.method in ("GET", "HEAD"):
            if self._session(request) is not None:
                return RedirectResponse("/", 303)
            return self._said(request, 200)
        if request.method != "POST":
            return _refusal(405, "Found another method, expected GET or POST.")
        try:
            fields = await posted(request, MAX_FORM_BYTES)
        except HTTPException as error:
            return _refusal(error.status_code, str(error.detail))
        known = self._known(request)
        who = _address(request) if known is None else known
        if wait := self._failures.wait(who, known is not None):
            return self._said(request, 429, wait=wait)
        if not self._right(fields.get("token", "").strip()):
            self._failed(who, known is not None)
            return self._said(request, 403, wrong=True)
        answer = RedirectResponse("/", 303)
        answer.set_cookie(
            self._session_cookie,
            self._begin(),
            max_age=int(SESSION_SECONDS),
            httponly=True,
            samesite="strict",
            path="/",
        )
        answer.set_cookie(
            self._device_cookie,
            self._device(secrets.token_urlsafe(16)),
            max_age=DEVICE_SECONDS,
            httponly=True,
            samesite="strict",
            path="/login",
        )
        return answer

    async def _logout(self, request: Request, session: str) -> Response:
        try:
            if request.method != "POST":
                raise HTTPException(405, "Found another method, expected POST.")
            fields = await posted(request, MAX_FORM_BYTES)
            require_key(request, fields.get("key", ""))
        except HTTPException as error:
            return _refusal(error.status_code, str(error.detail))
        self._sessions.pop(hashlib.sha256(session.encode()).digest(), None)
        answer = RedirectResponse("/login", 303)
        answer.delete_cookie(self._session_cookie, path="/", httponly=True, samesite="strict")
        return answer

    def _bearer(self, request: Request) -> Response | None:
        """Return why the request is not let in, None when it shows the token."""
        scheme, _, found = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            if request.method == "GET" and "text/html" in request.headers.get("accept", ""):
                return RedirectResponse("/login", 303)
            return _refusal(401, "Log in, or show the admin token as a bearer.")
        who = f"bearer {_address(request)}"
        if wait := self._failures.wait(who, known=False):
            return _refusal(429, "Too many wrong tokens came.", wait)
        only_metrics = request.url.path == METRICS_PATH and _same(found.strip(), metrics_token(self._token))
        if not (self._right(found.strip()) or only_metrics):
            self._failed(who, known=False)
            return _refusal(401, "This is not the admin token.")
        return None

    def _right(self, found: str) -> bool:
        """Return whether that is the admin token."""
        return _same(found, self._token)

    def _failed(self, who: str, known: bool) -> None:
        self._failures.add(who, known)
        now = self._clock()
        if self._failures.wait(who, known) and now - self._told >= WINDOW_SECONDS:
            self._told = now
            self._tell(
                "page",
                "Too many wrong tokens came to your page: it takes none for up to a minute. Somebody on this machine "
                "guesses, or a program has an old token.",
            )

    # Browsers that were in before

    def _device(self, name: str) -> str:
        mac = hmac.digest(self._token, f"operator page, known browser {name}".encode(), "sha256").hex()
        return f"{name}.{mac}"

    def _known(self, request: Request) -> str | None:
        """Return the name of a browser that was in before."""
        found = request.cookies.get(self._device_cookie, "")
        name = found.partition(".")[0]
        right = self._device(name).encode()
        return f"known {name}" if hmac.compare_digest(found.encode("utf-8", "replace"), right) else None

    def _said(self, request: Request, status: int, **values: Any) -> HTMLResponse:
        shown = {"wrong": False, "wait": 0.0} | values
        page = self._languages.of(request).render("page-login.html", served=True, **shown)
        headers = {"Retry-After": str(int(shown["wait"]) + 1)} if status == 429 else None
        return HTMLResponse(page, status, headers)


def require_key(request: Request, found: str) -> None:
    """Return if `found` is the key of this session's forms. Raises `HTTPException` otherwise."""
    key: str = request.state.key
    if not key or not hmac.compare_digest(found.encode("utf-8", "replace"), key.encode()):
        raise HTTPException(403, "This form is of another session.")


def deed(act: Callable[[Request, dict[str, str]], Response]) -> Callable[[Request], Any]:
    """Return an endpoint that does `act`, in a thread, with the fields of a form of this session."""

    async def endpoint(request: Request) -> Response:
        fields = dict(await posted(request, MAX_FORM_BYTES))
        require_key(request, fields.pop("key", ""))
        return await run_in_threadpool(act, request, fields)

    return endpoint


def _address(request: Request) -> str:
    return request.client.host if request.client else ""


def _wait(times: deque[float], limit: int, now: float) -> float:
    """Return in how many seconds fewer than `limit` of `times` are in the window, and forget the older ones."""
    while times and times[0] <= now - WINDOW_SECONDS:
        times.popleft()
    return times[-limit] + WINDOW_SECONDS - now if len(times) >= limit else 0.0


def _same(found: str, token: bytes) -> bool:
    """Return whether `found` is `token`, in a time that tells nothing of it."""
    given = hashlib.sha256(found.encode("utf-8", "replace")).digest()
    return hmac.compare_digest(given, hashlib.sha256(token).digest())


def _refusal(status: int, text: str, wait: float | None = None) -> PlainTextResponse:
    headers = Headers({"WWW-Authenticate": "Bearer"} if status == 401 else {}).mutablecopy()
    if wait is not None:
        headers["Retry-After"] = str(int(wait) + 1)
    return PlainTextResponse(f"{text}\n", status, headers)
