import asyncio
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.types import Message
from starlette.websockets import WebSocket

from hanse_common.web.security import HEADERS, Guarded

HOSTS = ("localhost", "127.0.0.1", "[::1]")


async def page(request: Request) -> PlainTextResponse:
    return PlainTextResponse("secret", headers={"Cache-Control": "public", "X-Own": "kept"})


async def fails(request: Request) -> PlainTextResponse:
    raise RuntimeError("a fault")


async def socket(connection: WebSocket) -> None:
    await connection.accept()


ROUTES = [Route("/", page), Route("/fails", fails), WebSocketRoute("/socket", socket)]


APP = Guarded(Starlette(routes=ROUTES), HOSTS)


def get(path: str, host: str = "localhost") -> httpx.Response:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(APP, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.get(path, headers={"Host": host})

    return asyncio.run(ask())


def sent(scope: dict[str, Any]) -> list[Message]:
    """Return what is sent for a scope that no client makes."""
    found: list[Message] = []

    async def send(message: Message) -> None:
        found.append(message)

    async def receive() -> Message:
        if scope["type"] == "websocket":
            return {"type": "websocket.connect"}
        return {"type": "http.request", "body": b"", "more_body": False}

    asyncio.run(APP({"path": "/", "query_string": b"", "headers": [], **scope}, receive, send))
    return found


@pytest.mark.parametrize(("path", "status"), [("/", 200), ("/missing", 404), ("/fails", 500)])
def test_every_answer_has_every_header_once(path: str, status: int) -> None:
    answer = get(path)
    assert answer.status_code == status
    for name, value in HEADERS.items():
        assert answer.headers.get_list(name) == [value]


def test_other_headers_are_kept() -> None:
    assert get("/").headers["X-Own"] == "kept"


def test_the_policy_lets_nothing_run_but_our_own_files() -> None:
    policy = dict(part.split(" ", 1) for part in HEADERS["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert (
        policy["script-src"]
        == policy["style-src"]
        == policy["connect-src"]
        == policy["form-action"]
        == "'self'"
    )
    assert policy["img-src"] == "'self' data:"


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST:8321", "127.0.0.1", "127.0.0.1:8321", "[::1]", "[::1]:8321", "localhost:0"],
)
def test_our_own_names_are_served_with_any_port(host: str) -> None:
    assert get("/", host).text == "secret"


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "localhost.evil.example",
        "evil.example:80",
        "localhost@evil.example",
        "localhost:80@evil.example",
        "localhost:",
        "127.0.0.2",
        "::1",
        "[::1",
        "[::1]evil",
        "",
    ],
)
def test_any_other_name_is_refused_before_the_application(host: str) -> None:
    answer = get("/fails", host)
    assert answer.status_code == 421
    assert "secret" not in answer.text
    assert answer.headers["Content-Security-Policy"] == HEADERS["Content-Security-Policy"]


@pytest.mark.parametrize("hosts", [[], [b"localhost", b"localhost"], [b"localhost", b"evil.example"]])
def test_a_request_has_one_host(hosts: list[bytes]) -> None:
    scope = {"type": "http", "method": "GET", "headers": [(b"host", host) for host in hosts]}
    assert sent(scope)[0]["status"] == 421


def test_websockets_are_refused() -> None:
    scope = {"type": "websocket", "path": "/socket", "headers": [(b"host", b"localhost")]}
    assert sent(scope) == [{"type": "websocket.close", "code": 1008}]
