"""Serving pages to this machine alone.

with listen(8765) as listening, serving(app, listening):
    stop.wait()
"""

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.responses import FileResponse
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from hanse_common.errors import ConfigError
from hanse_common.web.pages import STATIC

HOST = "127.0.0.1"
MAX_CONNECTIONS = 64
END_SECONDS = 3


def listen(port: int) -> socket.socket:
    """Return a socket that listens on `port` of the loopback interface, any free one for 0.

    Raises `ConfigError` when it can't, as when another program has the port.
    """
    try:
        return socket.create_server((HOST, port))
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise ConfigError(
            f"port {port}: cannot be used on this machine ({reason}). Choose another, or end the program that has it."
        ) from None


def static_routes() -> list[BaseRoute]:
    """Return the routes of what every page needs: the theme, the scripts, the sign."""
    sign = FileResponse(STATIC / "mark.svg")
    return [Route("/favicon.ico", lambda request: sign), Mount("/static", StaticFiles(directory=STATIC))]


@contextmanager
def serving(app: ASGIApp, listening: socket.socket) -> Iterator[None]:
    """Answer what comes in on `listening` while entered, in a thread.

    Addresses that were asked for are not logged: they may hold secrets.
    """
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=MAX_CONNECTIONS,
            timeout_graceful_shutdown=END_SECONDS,
        )
    )
    thread = threading.Thread(target=server.run, args=([listening],), name="pages", daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(2 * END_SECONDS)
