"""What OpenAPI says beside what the routes' types say: the errors, the token, and that nothing comes back of a removal.

@routes.get("/status", responses=problems(404))
app.openapi = described(app)
"""

from collections.abc import Callable
from http import HTTPStatus
from typing import Any, Final

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.responses import Response

from hanse_client.serving.problems import MEDIA_TYPE, Problem

NO_CONTENT: Final = Response
"""The answer's class where there is nothing to say."""

Responses = dict[int | str, dict[str, Any]]

_ALWAYS: Final = (400, 401, 403, 500)


def problems(*statuses: int) -> Responses:
    """Return the errors that a route may answer with, beside those that all may."""
    schema = {"$ref": "#/components/schemas/Problem"}
    return {
        status: {
            "description": HTTPStatus(status).phrase,
            "content": {MEDIA_TYPE: {"schema": schema}},
        }
        for status in sorted({*_ALWAYS, *statuses})
    }


def described(app: FastAPI) -> Callable[[], dict[str, Any]]:
    """Return what makes the document of `app`, with the schema of a problem, and without FastAPI's own of errors."""

    def document() -> dict[str, Any]:
        if not app.openapi_schema:
            made = get_openapi(
                title=app.title, version=app.version, description=app.description, routes=app.routes
            )
            schemas = made.setdefault("components", {}).setdefault("schemas", {})
            schemas["Problem"] = Problem.model_json_schema()
            for unused in ("HTTPValidationError", "ValidationError"):
                schemas.pop(unused, None)
            app.openapi_schema = made
        return app.openapi_schema

    return document
