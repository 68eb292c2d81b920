"""What is said when a request can't be answered: one JSON object, for every error of the service.

    {"status": 422, "code": "photo_unreadable", "detail": "photo: found no image of an accepted format, ...",
     "help": "Send a photo file as the request's body: JPEG, PNG, WebP, GIF, BMP or TIFF."}

It is a problem detail of RFC 9457: `detail` says what was found, `help` what to do, and `code` is for programs and
never changes its meaning. Nothing of our own code, files or state is in it: what was not foreseen is "internal", and
its traceback goes to the log.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final

from fastapi import FastAPI
from fastapi.exceptions import HTTPException as FastAPIHTTPException
from fastapi.exceptions import RequestValidationError
from pydantic import Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Match, Route

from hanse_client.gallery import faults
from hanse_common.errors import (
    Busy,
    CatalogError,
    GalleryError,
    HanseError,
    PhotoError,
    PhotoTooLarge,
    RecognizerError,
)
from hanse_common.wire import Value

log = logging.getLogger(__name__)

MEDIA_TYPE: Final = "application/problem+json"
RETRY_SECONDS: Final = 1

HELP: Final[Mapping[str, str]] = {
    "bad_request": "Look at /openapi.json for what can be asked.",
    "busy": "Try again after the seconds that Retry-After says, with fewer requests at once.",
    "conflict": "Wait until the other is done, then try again.",
    "internal": "Try again. If it stays, look into serve.log in your state folder and tell the developers.",
    "invalid": "Correct what is named, and send it again.",
    "method_not_allowed": "Look at /openapi.json for the methods of this address.",
    "no_photo": "Add a photo to the product, then ask again: POST it to /v1/products/SKU/photos.",
    "not_found": "Check the address; /v1/products lists the products there are.",
    "not_kept": "Do what the text says; where it says no more, the disk may be full, or another program has the file.",
    "other_origin": "Have your own server ask, not a page in somebody's browser.",
    "photo_too_large": "Send a smaller copy: 1,000 pixels at the longer side are plenty.",
    "photo_unreadable": "Send a photo file as the request's body: JPEG, PNG, WebP, GIF, BMP or TIFF.",
    "recognizer_missing": "Wait for the league's first release, or name a recognizer in the configuration.",
    "token_needed": "Send the header Authorization: Bearer TOKEN, with what stands in serve.token in the state folder.",
    "too_large": "Send less at once.",
    "too_slow": "Send it again over a faster connection.",
    "wrong_content_type": "Name what you send: Content-Type: image/jpeg for a photo, application/json for a product.",
    "wrong_host": "Ask by a name that the configuration knows: 127.0.0.1, localhost, or one under serve.names.",
}
"""What to do, for each code."""

DETAILS: Final[Mapping[str, str]] = {
    "internal": "Something went wrong here that should not.",
    "other_origin": "A page of another website asked this.",
    "token_needed": "The token is missing or another.",
    "wrong_host": "This address is not served under the name that was asked for.",
}
"""What is said where no more is known than the code."""

_FOLDERS: Final = re.compile(r"(?<![\w./])/(?:(?!\s)(?:[^/\n:'\"]|(?<=\w)[:'\"](?=\w))+(?<!\s)/)+")
"""The folders of a path: what quotes a path, and the colon behind it, are no part of them, but one within a name is."""

_CODES = {404: "not_found", 405: "method_not_allowed", 413: "too_large", 415: "wrong_content_type"}


class Problem(Value):
    """Why a request was not answered, and what to do."""

    status: Annotated[int, Field(ge=400, le=599)]
    code: str
    detail: str
    help: str


class Refused(FastAPIHTTPException):
    """A request can't be answered, for a reason that has a code in `HELP`."""

    def __init__(
        self, status: int, code: str, detail: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(status, detail or DETAILS.get(code, ""), dict(headers or {}))
        self.code = code


def problem_response(
    status: int, code: str, detail: str = "", headers: Mapping[str, str] | None = None
) -> Response:
    """Return the answer that says so."""
    problem = Problem(status=status, code=code, detail=detail or DETAILS.get(code, ""), help=HELP[code])
    return Response(problem.model_dump_json(), status, dict(headers or {}), MEDIA_TYPE)


def explain(error: HanseError) -> tuple[int, str]:
    """Return the HTTP status and the code by which an error of Hanse is told."""
    match error:
        case PhotoTooLarge():
            return 413, "photo_too_large"
        case PhotoError():
            return 422, "photo_unreadable"
        case Busy():
            return 503, "busy"
        case GalleryError() | CatalogError():
            return 409, "not_kept"
        case RecognizerError():
            return 503, "recognizer_missing"
    return 500, "internal"


def answer_errors(app: FastAPI) -> None:
    """Have every error of `app` told as a `Problem`."""
    app.add_exception_handler(HanseError, _hanse)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(ClientDisconnect, _gone)
    app.add_exception_handler(Exception, _unforeseen)


def _hanse(request: Request, error: Exception) -> Response:
    status, code = explain(error) if isinstance(error, HanseError) else (500, "internal")
    if status == 500:
        return _unforeseen(request, error)
    headers = {"Retry-After": str(RETRY_SECONDS)} if status == 503 else {}
    return problem_response(status, code, in_words(error), headers)


def _invalid(request: Request, error: Exception) -> Response:
    found = error.errors() if isinstance(error, RequestValidationError) else []
    return problem_response(422, "invalid", faults_in_words(found))


def faults_in_words(found: Sequence[Any]) -> str:
    """Return pydantic's errors in one line; of a product's fields with their values (`hanse_client.gallery.faults`)."""
    return one_line(f"{faults.in_words(found)}.")


def _http(request: Request, error: Exception) -> Response:
    if isinstance(error, Refused):
        return problem_response(error.status_code, error.code, str(error.detail), error.headers)
    status = error.status_code if isinstance(error, HTTPException) else 500
    headers = error.headers if isinstance(error, HTTPException) else None
    if status == 405:
        headers = {"Allow": ", ".join(sorted(_methods(request)))}
    detail = str(error.detail) if isinstance(error, HTTPException) else ""
    return problem_response(status, _CODES.get(status, "bad_request"), one_line(detail), headers)


def _methods(request: Request) -> set[str]:
    """Return the methods that the request's address answers to: each route of it knows its own alone."""
    routes: list[BaseRoute] = request.app.routes
    return {
        method
        for route in routes
        if isinstance(route, Route) and route.matches(request.scope)[0] is not Match.NONE
        for method in route.methods or ()
    }


def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=400)  # nobody hears it


def _unforeseen(request: Request, error: Exception) -> Response:
    log.error("%s failed", request.method, exc_info=error)
    return problem_response(500, "internal")


def in_words(error: Exception) -> str:
    """Return an error's text in one line, with the names of files but not of the folders that they are in."""
    return one_line(without_folders(str(error)))


def without_folders(text: str) -> str:
    """Return `text` with the names of files, but not of the folders that they are in."""
    return _FOLDERS.sub("", text)


def one_line(text: str) -> str:
    """Return `text` without line breaks and what no terminal prints, at most 1,000 characters of it."""
    return "".join(letter if letter.isprintable() else " " for letter in text)[:1000]
