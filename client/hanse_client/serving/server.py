"""The service from its start to its end: ports first, then the recognizer, then requests, and all of them to their end.

    with commands.until_stopped() as stop:
        serve(config, say_now, stop)

A port that is taken shows at once, before anything is loaded. Nobody is let in before the recognizer is loaded and
warm. At the end no new requests are taken, those under way are answered within `END_SECONDS`, and the recognizer closes
last.
"""

import os
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Final

import anyio.to_thread
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from hanse_client.config import ClientConfig
from hanse_client.recognition.sources import named
from hanse_client.serving import page
from hanse_client.serving.access import make_token, read_token
from hanse_client.serving.app import build
from hanse_client.serving.limits import BoundedProtocol
from hanse_client.serving.service import Service
from hanse_client.serving.settings import Serve
from hanse_client.serving.stream import GrpcListener
from hanse_common.errors import NotServing

END_SECONDS: Final = 10.0
"""How long the end waits for requests that are under way."""

BACKLOG: Final = 128
MAX_HEAD_BYTES: Final = 16 << 10
SPARE_THREADS: Final = 4
"""Threads beyond those of requests, for what they do beside."""


def serve(
    config: ClientConfig, tell: Callable[[str], None], stop: threading.Event, *, private: bool = True
) -> None:
    """Serve until `stop`. `tell` hears what is served and where, and when that changes, a line at a time.

    The token is told only if what is told is `private`: a system's journal has more readers than its owner.

    Raises `NotServing` when a port or the certificate can't be used, and what `Service.open` raises.
    """
    settings = config.serve
    token = make_token(config)
    with ExitStack() as open_:
        bound = open_.enter_context(_bound(settings))
        listener = open_.enter_context(GrpcListener(settings)) if settings.grpc_port is not None else None
        context = _uvicorn(settings)
        tell("Loading the recognizer.")
        service = open_.enter_context(Service.open(config, tell))
        needed = (lambda: read_token(config)) if settings.token else None
        app = build(service, needed, _page(service))
        with _answering(context, _with_threads(app, settings.requests), bound):
            if listener is not None:
                listener.start(service, needed)
            for line in announcement(service, token if private else None):
                tell(line)
            stop.wait()
            service.ready = False
            tell("Ending: what is under way is answered first.")
            if listener is not None:
                listener.drain(END_SECONDS)


def announcement(service: Service, token: str | None) -> tuple[str, ...]:
    """Return what is served and where, in words; the way into the page with the token, if there is one to tell."""
    settings, status = service.config.serve, service.recognition.status()
    host = settings.address.rpartition(":")[0].partition("://")[2]
    who = "this machine alone" if settings.is_loopback else "every machine that reaches it"
    known = f"{len(status.classes)} classes, {status.products} products"
    where = f"{settings.address}/v1" + (
        f" (REST) and {host}:{settings.grpc_port} (gRPC)" if settings.grpc_port else " (REST)"
    )
    asked = (
        f"Programs need the token in {service.config.state / 'serve.token'}."
        if settings.token
        else "No token is needed (serve.token: false)."
    )
    return (
        f"The recognizer is ready: {named(service.config, status.recognizer)}, {known}.",
        f"Serving to {who}: {where}.",
        asked,
        f"Your page: {settings.address}/?token={token or 'TOKEN'}"
        + ("" if token else f", with what stands in {service.config.state / 'serve.token'}"),
    )


def _page(service: Service) -> ASGIApp:
    """Return the page, whose cookies are of this port."""
    config = service.config
    return page.build(
        service.recognition,
        config,
        cookie=f"hanse-shop-{config.serve.port}",
        token=lambda: read_token(config),
        hosts=config.serve.hosts,
        secure=config.serve.certificate is not None,
    )


@contextmanager
def _bound(settings: Serve) -> Iterator[socket.socket]:
    """Have the port while entered, without letting anybody in. Raises `NotServing`."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            # Two sockets that do not listen may be bound to one port; one that listens shows itself.
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((settings.host, settings.port))
                probe.listen(1)
            bound.bind((settings.host, settings.port))
        except OSError as error:
            raise _no_port(settings, error) from None
        yield bound


def _no_port(settings: Serve, error: OSError) -> NotServing:
    reason = os.strerror(error.errno) if error.errno else str(error)
    return NotServing(
        f"port {settings.port} of {settings.host}: cannot be used on this machine ({reason}). Choose another "
        "serve.port, or end the program that has it."
    )


def _uvicorn(settings: Serve) -> uvicorn.Config:
    """Return uvicorn's configuration, without an application. Raises `NotServing` for certificates it can't use."""
    config = uvicorn.Config(
        _nothing,
        http=BoundedProtocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        timeout_graceful_shutdown=int(END_SECONDS),
        ssl_certfile=settings.certificate,
        ssl_keyfile=settings.key,
    )
    try:
        config.load()
    except (OSError, ssl.SSLError, ValueError) as error:
        raise NotServing(
            f"certificate {settings.certificate}, key {settings.key}: cannot be used ({error}); expected two PEM files "
            "that belong together, the key without a passphrase."
        ) from None
    return config


async def _nothing(scope: object, receive: object, send: object) -> None:
    raise RuntimeError("no application")


def _with_threads(app: ASGIApp, requests: int) -> ASGIApp:
    """Return `app`, with a thread for each request that is worked on at once."""

    async def with_threads(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await app(scope, receive, send)
            return
        await receive()
        anyio.to_thread.current_default_thread_limiter().total_tokens = requests + SPARE_THREADS
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})

    return with_threads


@contextmanager
def _answering(config: uvicorn.Config, app: ASGIApp, bound: socket.socket) -> Iterator[None]:
    """Answer what comes in at `bound` while entered, in a thread; then what is under way. Raises `NotServing`."""
    try:
        bound.listen(BACKLOG)
    except OSError as error:
        host, port = bound.getsockname()[:2]
        raise NotServing(
            f"port {port} of {host}: another program has it by now ({error.strerror})."
        ) from None
    config.loaded_app = app
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([bound],), name="http", daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise NotServing("The service could not begin; see serve.log in your state folder.")
        thread.join(0.02)
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(2 * END_SECONDS)
