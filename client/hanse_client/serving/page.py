"""The page of the recognizer at work: a photo in, what it shows out, and the products it is looked up among.

    app = build(recognition, config, cookie="hanse-shop-8766", token=lambda: read_token(config), hosts=("127.0.0.1",))

It is for the shop's owner, as `hanse_client.page` is, and let in by the same gate. It stands beside the service's other
addresses, and calls the same `Recognition`. Every page works without scripts; with them a photo can be dropped and
pasted, and what it shows comes into the page that is open.
"""

from collections.abc import Callable, Collection

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from hanse_client import templates
from hanse_client.config import ClientConfig
from hanse_client.page_access import Gate
from hanse_client.recognition.service import Recognition
from hanse_client.serving.page_catalogue import CataloguePages
from hanse_client.serving.page_context import PageContext, act
from hanse_client.serving.page_recognizing import RecognizingPages
from hanse_common.errors import Busy, HanseError
from hanse_common.web.security import Guarded
from hanse_common.web.serving import static_routes

COMMAND = "hanse-client serve"
LOCKED = "recognition-locked.html"
STATIC_FILES = ("shop.css", "recognize.js")


def build(
    recognition: Recognition,
    config: ClientConfig,
    *,
    cookie: str,
    token: Callable[[], str | None],
    hosts: Collection[str],
    secure: bool = False,
) -> ASGIApp:
    """Return the page over `recognition`, with all that guards it.

    `cookie` names its session, `token` gives what lets in, `hosts` are the names by which it may be asked for, and
    `secure` is whether TLS is spoken. Raises `CatalogError` when the owner's corrections cannot be opened.
    """
    context = PageContext(recognition, config)
    gate = Gate(_app(context), cookie, token, context.languages, COMMAND, locked=LOCKED, secure=secure)
    return Guarded(gate, hosts)


def _app(context: PageContext) -> Starlette:
    """Return the application, without what keeps strangers out."""

    def status(template: str) -> Callable[[Request], HTMLResponse]:
        return lambda request: context.render(request, template, status=context.recognition.status())

    def failed(request: Request, code: int, text: str = "") -> HTMLResponse:
        return context.render(request, "error", code, here="/", code_shown=code, lines=text.splitlines())

    return Starlette(
        routes=[
            *RecognizingPages(context).routes(),
            *CataloguePages(context).routes(),
            Route("/recognizer", status("status")),
            Route("/recognizer/now", status("now")),
            act("/language", lambda request, fields: context.chosen(fields)),
            *(_file(name) for name in STATIC_FILES),
            *static_routes(),
        ],
        exception_handlers={
            HTTPException: lambda request, error: failed(request, error.status_code),
            Busy: lambda request, error: failed(request, 503),
            HanseError: lambda request, error: failed(request, 409, str(error)),
        },
    )


def _file(name: str) -> Route:
    file = FileResponse(templates.FOLDER / name)
    return Route(f"/static/{name}", lambda request: file)
