"""Who may ask the recognizer's service: whoever has the token, and no page of another website.

    token = make_token(config)                       # state/serve.token, for its owner alone (mode 0600)
    app = TokenNeeded(app, lambda: read_token(config))

The loopback interface is no wall: every user and every program of this machine reaches it, and so does every website
that is open in a browser here. So the token is needed there, too, unless the configuration says `token: false`; then a
browser's request is still answered only when it is from no other page:

- the `Host` must be a name of ours (`hanse_common.web.security`), so that no name pointed at this machine (DNS
  rebinding) makes a page elsewhere one of our own;
- a request that says it is of another origin, by `Origin` or `Sec-Fetch-Site` [1], which no script can forge or leave
  out, is refused, whatever its method. No answer ever allows another origin to read it (no CORS).

[1] W3C, Fetch Metadata Request Headers, section 2.4. https://www.w3.org/TR/fetch-metadata/
"""

import hmac
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from hanse_client import page_access
from hanse_client.config import ClientConfig
from hanse_client.serving.problems import problem_response

TOKEN_FILE = "serve.token"  # noqa: S105 - a name

PROTECTED = "/v1/"


def make_token(config: ClientConfig) -> str:
    """Return the service's token; makes it when there is none that is secret. Raises `ConfigError`."""
    return page_access.make_token(config.state, TOKEN_FILE)


def read_token(config: ClientConfig) -> str | None:
    """Return the service's token, None when there is none that is secret."""
    return page_access.read_token(config.state, TOKEN_FILE)


def is_bearer(header: str, token: str | None) -> bool:
    """Return whether an `Authorization` header brings `token`, in a time that tells nothing of it."""
    scheme, _, found = header.partition(" ")
    if token is None or scheme.lower() != "bearer":
        return False
    return hmac.compare_digest(found.strip().encode("utf-8", "replace"), token.encode())


class TokenNeeded:
    """The ASGI application `app`, whose paths under /v1 are for those who have the token, and for no other origin.

    `token` is asked at each request; where it returns None nobody is let in. Without `token` origins alone count.
    """

    def __init__(self, app: ASGIApp, token: Callable[[], str | None] | None) -> None:
        self._app = app
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        app: ASGIApp = self._app
        if scope["type"] == "http" and f"{scope['path']}/".startswith(PROTECTED):
            headers = Headers(scope=scope)
            if _is_of_another_origin(scope, headers):
                app = problem_response(403, "other_origin")
            elif self._token is not None and not is_bearer(headers.get("authorization", ""), self._token()):
                app = problem_response(401, "token_needed", headers={"WWW-Authenticate": "Bearer"})
        await app(scope, receive, send)


def _is_of_another_origin(scope: Scope, headers: Headers) -> bool:
    own = f"{scope['scheme']}://{headers.get('host', '')}"
    origins, sites = headers.getlist("origin"), headers.getlist("sec-fetch-site")
    return any(origin != own for origin in origins) or any(
        site not in ("same-origin", "none") for site in sites
    )
