"""Flower's SuperLink in our own process, behind two listeners.

    with SuperLink(service) as link:
        link.register(node_public_pem)
        run = link.start_run()

What listens: on loopback, Flower's Control API for the operator's own commands, which need the token; for
merchants, the Fleet API, which needs a registered node key. Flower's Runtime API, by which a ServerApp would work,
and whose task tokens could be stolen, is served nowhere: our executor works in this process.

The applications are put together from flwr's own routers, with the middlewares that these need and no others: each
costs CPU on every request. Nothing of flwr's own SuperLink process (gRPC servers, subprocesses) is started.
Everything private to flwr 1.41 that this module relies on is named in `tests/server/test_flower_link.py`, which
fails when a release moves it.
"""

import base64
import hmac
import json
import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import flwr.supercore.sql_mixin
import yaml
from fastapi import FastAPI
from flwr.common.constant import (
    ACCESS_TOKEN_KEY,
    FAB_MAX_SIZE,
    HEARTBEAT_DEFAULT_INTERVAL,
    NOOP_ACCOUNT_NAME,
    NOOP_FLWR_AID,
    TRANSPORT_TYPE_GRPC_RERE,
    Status,
)
from flwr.supercore.auth.typing import AccountInfo
from flwr.supercore.constant import (
    FLWR_IN_MEMORY_DB_NAME,
    NOOP_FEDERATION_ID,
    SQLITE_PRAGMAS,
    TaskType,
)
from flwr.supercore.error import http_error_translator
from flwr.supercore.protobuf.translation import ProtobufTranslationMiddleware
from flwr.supercore.routers import health
from flwr.superlink.auth_plugin import ControlAuthnPlugin
from flwr.superlink.config_loader import get_federation_manager, get_objectstore_linkstate_factories
from flwr.superlink.dependencies.account import AccountAccessDependency
from flwr.superlink.routers.control import router as control_router
from flwr.superlink.routers.control.middlewares import (
    CONTROL_AUTH_ROUTE_KEYS,
    ControlAuthenticationMiddleware,
    ControlSensitiveResponseMiddleware,
)
from flwr.superlink.routers.fleet.node_auth import NodeAuthMiddleware
from flwr.superlink.routers.fleet.router import router as fleet_router
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.types import Scope

from hanse_common.errors import ConfigError
from hanse_common.files import write_atomically
from hanse_server.config import Service
from hanse_server.flower_guard import FleetGuard
from hanse_server.listener import Bounded, Limits, Listener
from hanse_server.rates import Rate
from hanse_server.tokens import read_token

FLEET = Limits(
    body_bytes=16_384,
    refusals=Rate(burst=300, per_second=2.0),
    arrivals=Rate(burst=512, per_second=20.0),
)
"""A node's requests are small: reports are codes, vectors go over streams. Answers carry assignments."""

ADMIN = Limits(body_bytes=FAB_MAX_SIZE + 65_536, answer_seconds=None, refusals=Rate(burst=60, per_second=0.5))
"""The operator sends bundles, and reads logs for as long as a run lasts."""

NOT_FOR_MERCHANTS = frozenset({"/v1/fleet/register-node", "/v1/fleet/unregister-node", "/v1/fleet/get-fab"})
"""The operator registers nodes, and no merchant's node needs a bundle."""

BUSY_TIMEOUT_MS = 60_000
"""How long a writer waits for another in Flower's SQLite state."""


class SuperLink:
    """The SuperLink of one league. `state` is Flower's LinkState, for the executor in this process."""

    def __init__(self, service: Service) -> None:
        """Open Flower's state. Raises `ConfigError` when token, TLS files or database can't be used."""
        _quiet()
        self._authority = service.tls.authority.resolve()
        self._token = read_token(service.admin.token)
        self.flwr_home = service.state / "flwr"
        factory = _open_state(service.database)
        self.state = factory.state()
        self._admin = Listener(
            _control_application(factory, self._token), "service.admin", "127.0.0.1", service.admin.port,
            service.tls, ADMIN,
        )  # fmt: skip
        self._fleet = Listener(
            _fleet_application(factory), "service.fleet", service.fleet.host, service.fleet.port,
            service.tls, FLEET,
        )  # fmt: skip
        self._open = ExitStack()

    @property
    def admin_port(self) -> int:
        """The bound port of the operator's listener."""
        return self._admin.port

    @property
    def fleet_port(self) -> int:
        """The bound port of the merchants' listener."""
        return self._fleet.port

    def __enter__(self) -> Self:
        """Listen, and write `flwr_home`. Raises `ConfigError` when a port is taken.

        Runs that an earlier process left unfinished are closed: nobody works on them any more.
        """
        for run in self.state.get_run_info(statuses=[Status.PENDING, Status.STARTING, Status.RUNNING]):
            self.state.stop_run(run.run_id)
        with self._open as stack:
            stack.enter_context(self._admin)
            stack.enter_context(self._fleet)
            write_flwr_home(self.flwr_home, f"127.0.0.1:{self.admin_port}", self._authority, self._token)
            self._open = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        """Stop listening, within a bounded time."""
        self._open.close()

    def register(self, public_pem: bytes) -> None:
        """Let the node with this public key (PEM) in, as `flwr supernode register` does; known ones stay."""
        if self.state.get_node_id_by_public_key(public_pem) is None:
            self.state.create_node(
                owner_aid=NOOP_FLWR_AID,
                owner_name=NOOP_ACCOUNT_NAME,
                public_key=public_pem,
                heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL,
            )

    def start_run(self) -> int:
        """Begin a Flower run, as `flwr run` does but without a bundle, and return its number."""
        run: int = self.state.create_run(
            fab_id="hanse/hanse",
            fab_version=version("hanse"),
            fab_hash=None,
            override_config={},
            federation_id=NOOP_FEDERATION_ID,
            federation_config=None,
            flwr_aid=NOOP_FLWR_AID,
            primary_task_type=TaskType.SERVER_APP,
        )
        return run

    def stop_run(self, run: int) -> None:
        """End a Flower run, as `flwr stop` does; one that has ended stays as it is."""
        self.state.stop_run(run)


def write_flwr_home(folder: Path, address: str, authority: Path, token: bytes) -> None:
    """Write what `FLWR_HOME=folder flwr …` needs to find and enter the SuperLink at `address`, host:port.

    Only the user can read it. Raises `ConfigError` when it can't be written.
    """
    # A JSON string is a TOML string, too.
    config = (
        f'[superlink]\ndefault = "hanse"\n\n[superlink.hanse]\naddress = "{address}"\n'
        f"root-certificates = {json.dumps(str(authority))}\n"
    )
    # Flower knows tokens as those of OpenID Connect. Ours is never refreshed.
    values = {"authn-type": b"oidc", "oidc-access-token": token, "oidc-refresh-token": b"none"}
    credentials = {
        f"flower.account-auth.{address}.{key}": base64.b64encode(value).decode()
        for key, value in values.items()
    }
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomically(folder / "config.toml", config.encode())
        write_atomically(folder / "credentials.yaml", yaml.safe_dump(credentials).encode())
    except OSError as error:
        raise ConfigError(
            f"{folder}: cannot be written ({error.strerror}); the folder named under service.state must be "
            "writable."
        ) from None


class _Token(ControlAuthnPlugin):
    """Lets those who hold the operator's token call the Control API; nobody can log in for one."""

    def __init__(self, token: bytes) -> None:
        self._token = token

    def validate_tokens_in_metadata(
        self, metadata: Sequence[tuple[str, str | bytes]]
    ) -> tuple[bool, AccountInfo | None]:
        for key, value in metadata:
            given = value.encode() if isinstance(value, str) else value
            if key == ACCESS_TOKEN_KEY and hmac.compare_digest(given, self._token):
                return True, AccountInfo(flwr_aid=NOOP_FLWR_AID, account_name=NOOP_ACCOUNT_NAME)
        return False, None

    def get_login_details(self) -> None:
        return None

    def get_auth_tokens(self, device_code: str) -> None:
        return None

    def refresh_tokens(self, metadata: Sequence[tuple[str, str | bytes]]) -> tuple[None, None]:
        return None, None


def _control_application(factory: Any, token: bytes) -> Bounded:
    """Return the operator's application. Its paths for logging in, which ask for no token, are left out."""
    app = _application(
        factory,
        control_router,
        Middleware(ControlSensitiveResponseMiddleware),
        Middleware(BaseHTTPMiddleware, dispatch=http_error_translator),
        Middleware(ControlAuthenticationMiddleware),
        Middleware(ProtobufTranslationMiddleware),
    )
    app.state.account_access_dep = AccountAccessDependency(_Token(token))
    app.state.artifact_provider = None
    app.state.fleet_api_type = TRANSPORT_TYPE_GRPC_RERE
    paths = _paths(control_router, {path for _, path in CONTROL_AUTH_ROUTE_KEYS})
    return Bounded(app, paths, ADMIN, lambda scope: _has_token(scope, token))


def _has_token(scope: Scope, token: bytes) -> bool:
    """Return whether a request's head has the operator's token, once. Flower looks again, at all of the request."""
    given = [value for name, value in scope["headers"] if name == b"authorization"]
    return len(given) == 1 and hmac.compare_digest(given[0], b"Bearer " + token)


def _fleet_application(factory: Any) -> Bounded:
    """Return the merchants' application."""
    app = _application(
        factory,
        fleet_router,
        Middleware(BaseHTTPMiddleware, dispatch=http_error_translator),
        Middleware(ProtobufTranslationMiddleware),
        Middleware(NodeAuthMiddleware),
        Middleware(FleetGuard, state=factory.state),
    )
    app.state.enable_supernode_auth = True
    return Bounded(app, _paths(fleet_router, NOT_FOR_MERCHANTS), FLEET)


def _application(factory: Any, router: Any, *middleware: Middleware) -> FastAPI:
    """Return an application with `router` and health, and nothing that describes it to strangers."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, middleware=middleware)
    app.state.linkstate_factory = factory
    app.include_router(health.router)
    app.include_router(router)
    return app


def _paths(router: Any, without: set[str] | frozenset[str]) -> dict[str, str]:
    """Return the method of each path to let through."""
    return {"/health": "GET"} | {route.path: "POST" for route in router.routes if route.path not in without}


def _open_state(database: str | Path) -> Any:
    """Return flwr's factory of the one LinkState, opened. Raises `ConfigError` when the file can't be used."""
    if database == "memory":
        name = FLWR_IN_MEMORY_DB_NAME
    else:
        name = str(database)
        pragmas = dict(SQLITE_PRAGMAS) | {"busy_timeout": str(BUSY_TIMEOUT_MS)}
        flwr.supercore.sql_mixin.SQLITE_PRAGMAS = tuple(pragmas.items())  # type: ignore[assignment, attr-defined]
    _, factory = get_objectstore_linkstate_factories(name, get_federation_manager())
    try:
        if isinstance(database, Path):
            os.close(os.open(database, os.O_RDWR | os.O_CREAT, 0o600))
        factory.state()
    except Exception as error:
        raise ConfigError(
            f"service.database: {database} cannot be used ({type(error).__name__}); expected a file that Flower "
            "1.41 made, or a new one in a folder that exists."
        ) from None
    return factory


def _quiet() -> None:
    """Silence flwr's own log, whose lines quote whatever strangers send; FLWR_LOG_LEVEL brings it back."""
    if "FLWR_LOG_LEVEL" not in os.environ:
        logging.getLogger("flwr").setLevel(logging.CRITICAL)
