"""The whole of what is served over HTTP: REST, its description, health, and the page beside them.

    app = build(service, token=lambda: read_token(config))
    uvicorn.run(app)

From outside in: the host's name and the headers (`hanse_common.web.security`), token and origin (`access`), how much
and how many (`limits`), and then either REST or, at every other address, the page.
"""

from collections.abc import Callable
from importlib.metadata import version
from typing import Final

from fastapi import APIRouter, Depends, FastAPI
from fastapi.security import HTTPBearer
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from hanse_client.serving import catalogue, recognizing
from hanse_client.serving.access import TokenNeeded
from hanse_client.serving.answers import Health
from hanse_client.serving.catalogue import LINES
from hanse_client.serving.limits import Bounded
from hanse_client.serving.openapi import described
from hanse_client.serving.problems import answer_errors, problem_response
from hanse_client.serving.segments import Segments
from hanse_client.serving.service import Service
from hanse_common.web.security import Guarded

OWN: Final = ("/v1", "/openapi.json", "/health", "/ready")
"""The addresses of REST, and what begins with them; all others are the page's."""

MAX_JSON: Final = 64 << 10
"""Bytes of a product in JSON: 32 attributes and a title, whatever letters they are of."""

_DESCRIPTION = (
    "The recognizer at work in your shop, on your own machine. Photos are sent as they are, in the request's body; no "
    "photo leaves this machine. Every request under /v1 needs the token: `Authorization: Bearer TOKEN`."
)


def build(service: Service, token: Callable[[], str | None] | None, page: ASGIApp | None = None) -> ASGIApp:
    """Return the application of `service`.

    `token` returns the token at each request, and is None where none is needed; `page` answers what is not REST's.
    """
    serve = service.config.serve

    def max_bytes(scope: Scope) -> int | None:
        if not _is_own(scope):
            return None  # the page has bounds of its own
        kind = dict(scope["headers"]).get(b"content-type", b"").partition(b";")[0].strip().lower()
        if kind == LINES.encode() and scope["path"] == "/v1/imports":
            return serve.import_megabytes << 20
        return serve.photo_bytes if kind.startswith((b"image/", b"application/octet-stream")) else MAX_JSON

    async def either(scope: Scope, receive: Receive, send: Send) -> None:
        app = rest if page is None or scope["type"] != "http" or _is_own(scope) else page
        await app(scope, receive, send)

    rest = Segments(api(service))
    bounded = Bounded(either, serve.requests, serve.seconds, max_bytes)
    return Guarded(TokenNeeded(bounded, token), serve.hosts, problem_response(421, "wrong_host"))


def api(service: Service) -> FastAPI:
    """Return REST alone, without what stands before it."""
    app = FastAPI(
        title="Hanse: the recognizer at work",
        version=version("hanse"),
        description=_DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    answer_errors(app)
    bearer = HTTPBearer(auto_error=False, description="The token in state/serve.token.")
    v1 = APIRouter(prefix="/v1", dependencies=[Depends(bearer)])
    for routes in (
        recognizing.router(service),
        catalogue.router(service),
        catalogue.imports_router(service),
    ):
        v1.include_router(routes)
    app.include_router(v1)

    @app.get("/health", tags=["health"])
    async def health() -> Health:
        """Say that the service runs."""
        return Health(ready=service.ready)

    @app.get("/ready", tags=["health"], responses={503: {"description": "It does not.", "model": Health}})
    async def ready(response: Response) -> Health:
        """Say whether it takes requests: not while it starts or ends."""
        response.status_code = 200 if service.ready else 503
        return Health(ready=service.ready)

    app.openapi = described(app)  # type: ignore[method-assign]
    return app


def _is_own(scope: Scope) -> bool:
    path: str = scope["path"]
    return any(path == own or path.startswith(f"{own}/") for own in OWN)
