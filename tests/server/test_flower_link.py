"""The SuperLink between operator and merchants: who may call what, and the seams of flwr that it hangs on."""

import base64
import inspect
import re
import socket
import sqlite3
import ssl
import stat
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import hanse_common  # noqa: F401 - sets what flwr reads when it is imported

# isort: split
import flwr
import httpx
import pytest
from flwr.common.constant import Status, SubStatus
from flwr.proto.control_pb2 import GetLoginDetailsRequest, ListRunsRequest, RefreshAuthTokensRequest
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest, RegisterNodeFleetRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import AcquireTaskRequest, PullTaskInputRequest
from flwr.server.superlink.linkstate import LinkState
from flwr.supercore import sql_mixin
from flwr.supercore.constant import TaskType
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES
from flwr.supercore.routers.runtime import responses_router
from flwr.supercore.servicer.runtime import runtime_handlers as core_handlers
from flwr.superlink.config_loader import get_federation_manager, get_objectstore_linkstate_factories
from flwr.superlink.dependencies.account import AccountAccessDependency
from flwr.superlink.grid import HttpGrid
from flwr.superlink.routers.control import router as control_router
from flwr.superlink.routers.fleet.router import router as fleet_router
from flwr.superlink.servicer.runtime import runtime_handlers
from flwr.supernode import fleet_http_connection

from hanse_common.credentials import load_node_public, node_public_pem
from hanse_common.errors import ConfigError
from hanse_server import flower_link
from hanse_server.config import Admin, Fleet, Service, Tls
from hanse_server.development_keys import DevelopmentKeys, make_keys
from hanse_server.flower_executor import _InProcessRuntime
from hanse_server.flower_link import SuperLink

PROTOBUF = {"content-type": PROTOBUF_MEDIA_TYPE}
CONTROL_PATHS = sorted(route.path for route in control_router.routes)
FLEET_PATHS = sorted(route.path for route in fleet_router.routes)
RUNTIME_PATHS = sorted(
    {path for _, path in PROTOBUF_REQUEST_TYPES if path.startswith("/v1/runtime/")}
    | {route.path for route in responses_router.routes}
)
LOGIN_PATHS = [f"/v1/control/{name}-{what}" for name, what in (
    ("get-login", "details"), ("get-auth", "tokens"), ("refresh-auth", "tokens"),
)]  # fmt: skip


def pem(keys: DevelopmentKeys, name: str) -> bytes:
    return node_public_pem(load_node_public(keys.merchants[name] / "node.key.pub"))


def bearer(token: str) -> dict[str, str]:
    return PROTOBUF | {"authorization": f"Bearer {token}"}


@pytest.fixture
def admin(link: SuperLink) -> str:
    return f"https://127.0.0.1:{link.admin_port}"


@pytest.fixture
def fleet(link: SuperLink) -> str:
    return f"https://127.0.0.1:{link.fleet_port}"


@pytest.fixture
def token(keys: DevelopmentKeys) -> str:
    return keys.token.read_text().strip()


# flwr is pinned to one minor release because of these. When one fails, read what the release changed and why.


def test_this_is_the_release_whose_seams_we_know() -> None:
    assert flwr.__version__.startswith("1.41."), (
        "read DESIGN 5, then every test of this file, then change the pin"
    )


@pytest.mark.parametrize(
    ("seam", "parameters"),
    [
        (get_objectstore_linkstate_factories, "database federation_manager"),
        (get_federation_manager, "is_simulation"),
        (AccountAccessDependency, "authn_plugin"),
        (LinkState.create_run,
         ("self fab_id fab_version fab_hash override_config federation_id federation_config flwr_aid "
          "primary_task_type series_id series_description connector_ids initial_task_event user_prompt")),
        (LinkState.create_node, "self owner_aid owner_name public_key heartbeat_interval location name"),
        (LinkState.get_node_id_by_public_key, "self public_key"),
        (LinkState.stop_run, "self run_id"),
        (LinkState.get_run_status, "self run_ids"),
        (LinkState.activate_task, "self task_id"),
        (LinkState.finish_task, "self task_id sub_status details"),
        (LinkState.acknowledge_task_heartbeat, "self task_id"),
        (LinkState.add_task_log, "self task_id log_message"),
        (LinkState.get_object, "self run_id object_id"),
        (core_handlers.acquire_task, "request state"),
        (runtime_handlers.get_nodes, "request state task"),
        (runtime_handlers.push_messages, "request state task"),
        (runtime_handlers.pull_messages, "request state task"),
        (runtime_handlers.push_object, "request state task"),
        (runtime_handlers.pull_object, "request state task"),
        (runtime_handlers.confirm_message_received, "request state task"),
        (HttpGrid, "runtime_api_address insecure root_certificates token"),
        (fleet_http_connection.http_request_response,
         "server_address insecure root_certificates authentication_keys max_retries max_wait_time"),
        (fleet_http_connection.FleetHttpClient.__init__, "self base_url interceptors verify timeout retry_invoker"),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)  # fmt: skip
def test_a_private_seam_of_flwr_is_as_we_use_it(seam: Any, parameters: str) -> None:
    assert list(inspect.signature(seam).parameters) == parameters.split()


def test_the_grid_reaches_flower_only_through_its_client() -> None:
    grid = HttpGrid(token="none")  # noqa: S106
    assert grid._client is None
    grid._client = client = cast(Any, object())
    assert grid._runtime_client is client
    called = set(re.findall(r"_runtime_client\.(\w+)", inspect.getsource(HttpGrid)))
    assert called == {name for name in vars(_InProcessRuntime) if name[0].isupper()}


def test_paths_of_the_routers_are_as_we_let_them_through() -> None:
    for router in (control_router, fleet_router):
        assert all(route.methods == {"POST"} for route in router.routes)
    translated = {path for method, path in PROTOBUF_REQUEST_TYPES if method == "POST"}
    assert {path for path in translated if path.startswith("/v1/control/")} == set(CONTROL_PATHS)
    assert {path for path in translated if path.startswith("/v1/fleet/")} == set(FLEET_PATHS)
    assert set(FLEET_PATHS) > flower_link.NOT_FOR_MERCHANTS
    assert {path for _, path in flower_link.CONTROL_AUTH_ROUTE_KEYS} == set(LOGIN_PATHS) < set(CONTROL_PATHS)


# Who may call what.


def test_a_control_call_needs_the_token(https: httpx.Client, admin: str, token: str) -> None:
    path, body = f"{admin}/v1/control/list-runs", ListRunsRequest().SerializeToString()
    right = https.post(path, content=body, headers=bearer(token))
    assert right.status_code == 200
    wrong = [PROTOBUF]
    wrong += [
        bearer(t) for t in ("x" * len(token), token[:-1], token + "x", token.upper(), "none", "é".encode())
    ]
    wrong += [PROTOBUF | {"authorization": value} for value in (token, f"Basic {token}", "Bearer")]
    for headers in wrong:
        assert https.post(path, content=body, headers=headers).status_code == 401, headers
    twice = httpx.Headers([*bearer(token).items(), ("authorization", f"Bearer {token}")])
    assert https.post(path, content=body, headers=twice).status_code == 401


def test_every_control_path_needs_the_token(https: httpx.Client, admin: str, link: SuperLink) -> None:
    run = link.start_run()
    for path in CONTROL_PATHS:
        found = https.post(admin + path, content=b"", headers=PROTOBUF).status_code
        assert found == (404 if path in LOGIN_PATHS else 401), path
    assert link.state.get_run_status({run})[run].status == Status.PENDING


def test_nobody_can_log_in_for_a_token(https: httpx.Client, admin: str, token: str) -> None:
    for path, request in zip(
        LOGIN_PATHS,
        (GetLoginDetailsRequest(), GetLoginDetailsRequest(), RefreshAuthTokensRequest()),
        strict=True,
    ):
        for headers in (PROTOBUF, bearer(token)):
            response = https.post(admin + path, content=request.SerializeToString(), headers=headers)
            assert (response.status_code, response.content) == (404, b"")


def test_the_token_plugin_itself_grants_nothing_but_for_the_token(token: str) -> None:
    plugin = flower_link._Token(token.encode())
    assert plugin.get_login_details() is plugin.get_auth_tokens("code") is None
    assert plugin.refresh_tokens([("flwr-oidc-refresh-token", token)]) == (None, None)
    assert plugin.validate_tokens_in_metadata([("other-key", token)]) == (False, None)
    assert plugin.validate_tokens_in_metadata([]) == (False, None)


def test_the_merchants_port_has_the_fleet_api_and_health_alone(
    https: httpx.Client, fleet: str, token: str
) -> None:
    odd = ["/", "/docs", "/redoc", "/openapi.json", "/docs/oauth2-redirect", "/v1/fleet/", "/v1/fleet/other"]
    odd += [
        "//v1/fleet/get-run",
        "/V1/fleet/get-run",
        "/v1/fleet/get-run/",
        "/v1/fleet/%2e%2e/control/list-runs",
    ]
    for path in (*CONTROL_PATHS, *RUNTIME_PATHS, *flower_link.NOT_FOR_MERCHANTS, *odd):
        for method in ("GET", "POST"):
            response = https.request(method, fleet + path, headers=bearer(token))
            assert (response.status_code, response.content) == (404, b""), path
    for path in set(FLEET_PATHS) - flower_link.NOT_FOR_MERCHANTS:
        assert https.post(fleet + path, headers=PROTOBUF).status_code == 401, path
        assert https.get(fleet + path).status_code == 404, path


def test_the_operators_port_has_the_control_api_and_health_alone(
    https: httpx.Client, admin: str, token: str
) -> None:
    for path in (*RUNTIME_PATHS, *FLEET_PATHS, "/docs", "/openapi.json"):
        for method in ("GET", "POST"):
            response = https.request(method, admin + path, headers=bearer(token))
            assert (response.status_code, response.content) == (404, b""), path


def test_a_task_token_can_neither_be_taken_nor_used(
    https: httpx.Client, admin: str, fleet: str, token: str, link: SuperLink
) -> None:
    run = link.start_run()
    take = AcquireTaskRequest(supported_task_types=list(TaskType)).SerializeToString()
    for port in (admin, fleet):
        for headers in (PROTOBUF, bearer(token)):
            assert (
                https.post(f"{port}/v1/runtime/acquire-task", content=take, headers=headers).status_code
                == 404
            )
    (task,) = link.state.get_tasks(run_ids=[run])
    assert task.status.status == Status.PENDING
    stolen = link.state.claim_task(task.task_id)
    use = PullTaskInputRequest().SerializeToString()
    for port in (admin, fleet):
        for name in ("pull-task-input", "push-messages", "push-task-output"):
            response = https.post(f"{port}/v1/runtime/{name}", content=use, headers=bearer(stolen))
            assert response.status_code == 404
    assert link.state.get_tasks(run_ids=[run])[0].status.status == Status.STARTING


def test_health_says_nothing(https: httpx.Client, admin: str, fleet: str) -> None:
    for port in (admin, fleet):
        response = https.get(f"{port}/health")
        assert (response.status_code, response.content) == (200, b"")
        assert set(response.headers) == {"content-length", "date"}  # the date finds clocks that are wrong


def test_errors_say_nothing_of_the_server(https: httpx.Client, fleet: str) -> None:
    path = f"{fleet}/v1/fleet/activate-node"
    wrong = [({}, b""), (PROTOBUF, b"\xff"), ({"content-type": "x\ty"}, b"x"), (PROTOBUF, b"")]
    for headers, body in wrong:
        response = https.post(path, content=body, headers=headers)
        assert 400 <= response.status_code < 500
        text = response.text + str(response.headers)
        assert not any(
            word in text.lower() for word in ("uvicorn", "traceback", "python", "/work", "site-packages")
        )


# Nodes.


def refused(call: Callable[..., Any], *arguments: Any) -> int:
    with pytest.raises(httpx.HTTPStatusError) as error:
        call(*arguments)
    return error.value.response.status_code


def test_registered_nodes_and_no_others_may_activate(
    link: SuperLink, keys: DevelopmentKeys, make_node: Callable[[str], Any]
) -> None:
    alder, birch = make_node("alder"), make_node("birch")
    link.register(pem(keys, "alder"))
    assert alder.activate().node_id == link.state.get_node_id_by_public_key(alder.pem)
    refused(birch.activate)
    assert refused(birch.client.RegisterNode, RegisterNodeFleetRequest(public_key=birch.pem)) == 404
    refused(birch.activate)
    assert [node.public_key for node in link.state.get_node_info()] == [alder.pem]


def test_a_node_is_who_its_key_says(
    link: SuperLink, keys: DevelopmentKeys, make_node: Callable[[str], Any]
) -> None:
    alder, birch = make_node("alder"), make_node("birch")
    for name in ("alder", "birch"):
        link.register(pem(keys, name))
    alder.activate()
    birch.activate()
    other = PullMessagesRequest(node=Node(node_id=alder.node_id))
    assert refused(birch.client.PullMessages, other) == 401
    stolen = ActivateNodeRequest(public_key=alder.pem, heartbeat_interval=30)
    assert refused(birch.client.ActivateNode, stolen) == 401


def test_a_node_that_was_not_signed_for_is_refused(https: httpx.Client, fleet: str, link: SuperLink) -> None:
    body = PullMessagesRequest(node=Node(node_id=1)).SerializeToString()
    assert https.post(f"{fleet}/v1/fleet/pull-messages", content=body, headers=PROTOBUF).status_code == 401


def test_registering_twice_changes_nothing(link: SuperLink, keys: DevelopmentKeys) -> None:
    for _ in range(2):
        link.register(pem(keys, "alder"))
    assert len(link.state.get_node_info()) == 1


def test_an_oversized_message_of_a_node_is_refused(
    link: SuperLink, keys: DevelopmentKeys, make_node: Callable[[str], Any]
) -> None:
    alder = make_node("alder")
    link.register(alder.pem)
    alder.activate()
    huge = PullMessagesRequest(node=alder.node, message_ids=["x" * flower_link.FLEET.body_bytes])
    assert refused(alder.client.PullMessages, huge) == 413
    assert not alder.client.PullMessages(PullMessagesRequest(node=alder.node)).messages_list


def test_the_merchants_port_bears_little_and_the_operators_a_bundle() -> None:
    assert flower_link.FLEET.body_bytes <= 1 << 20
    assert flower_link.FLEET.answer_seconds is not None
    assert flower_link.ADMIN.body_bytes > 10 * 1024 * 1024


# TLS, ports and files.


@pytest.mark.parametrize("port", ["admin_port", "fleet_port"])
def test_another_authority_is_not_trusted_and_older_tls_not_spoken(
    link: SuperLink, keys: DevelopmentKeys, tmp_path: Path, port: str
) -> None:
    other = make_keys(tmp_path / "other", ("localhost", "127.0.0.1"), ()).authority
    strangers = ssl.create_default_context(cafile=str(other))
    older = ssl.create_default_context(cafile=str(keys.authority))
    older.maximum_version = ssl.TLSVersion.TLSv1_2
    for context in (strangers, older):
        with pytest.raises(httpx.ConnectError), httpx.Client(verify=context) as client:
            client.get(f"https://127.0.0.1:{getattr(link, port)}/health")


def test_the_operators_port_is_on_loopback_alone(make_service: Callable[..., Service]) -> None:
    with SuperLink(make_service(fleet=Fleet(port=0))) as link:
        hosts = {found for found, port in listening() if port == link.admin_port}
        assert hosts == {"127.0.0.1"}


def test_nothing_else_listens_and_no_process_is_started(make_service: Callable[..., Service]) -> None:
    before, children = listening(), child_processes()
    with SuperLink(make_service()) as link:
        assert {port for _, port in listening() - before} == {link.admin_port, link.fleet_port}
        assert child_processes() == children
    assert listening() <= before


def listening() -> set[tuple[str, int]]:
    """Return the addresses and ports on which this process listens, as Linux tells them."""
    own = {str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()}
    found = set()
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in own:
                address, port = fields[1].split(":")
                packed = b"".join(bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, len(address), 8))
                found.add((socket.inet_ntop(family, packed), int(port, 16)))
    return found


def child_processes() -> set[str]:
    tasks = Path("/proc/self/task")
    return {child for task in tasks.iterdir() for child in (task / "children").read_text().split()}


@pytest.mark.parametrize("section", ["admin", "fleet"])
def test_a_busy_port_is_named_and_nothing_stays_open(
    make_service: Callable[..., Service], keys: DevelopmentKeys, section: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        sections = {
            "admin": Admin(port=port, token=keys.token),
            "fleet": Fleet(host="127.0.0.1", port=port),
        }
        before = listening()
        with pytest.raises(ConfigError, match=f"service.{section}: cannot listen on 127.0.0.1:{port}"):
            SuperLink(make_service(**{section: sections[section]})).__enter__()
        assert listening() == before


def test_the_same_ports_serve_again_after_the_end(
    make_service: Callable[..., Service], keys: DevelopmentKeys
) -> None:
    with SuperLink(make_service()) as first:
        ports = first.admin_port, first.fleet_port
    service = make_service(
        admin=Admin(port=ports[0], token=keys.token), fleet=Fleet(host="127.0.0.1", port=ports[1])
    )
    with SuperLink(service) as second:
        assert (second.admin_port, second.fleet_port) == ports


@pytest.mark.parametrize("text", ["", "short", "x" * 31, "x " * 20, "é" * 32, "x" * 2000])
def test_a_weak_token_is_refused(make_service: Callable[..., Service], tmp_path: Path, text: str) -> None:
    (tmp_path / "token").write_text(text)
    with pytest.raises(ConfigError, match="token"):
        SuperLink(make_service(admin=Admin(port=0, token=tmp_path / "token")))


def test_a_missing_token_or_certificate_is_named(
    make_service: Callable[..., Service], keys: DevelopmentKeys, tmp_path: Path
) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(ConfigError, match="missing"):
        SuperLink(make_service(admin=Admin(port=0, token=missing)))
    tls = Tls(authority=keys.authority, certificate=missing, key=keys.key)
    with pytest.raises(ConfigError, match=r"service.tls: .*missing"):
        SuperLink(make_service(tls=tls))


def test_a_damaged_database_is_named(make_service: Callable[..., Service], tmp_path: Path) -> None:
    damaged = tmp_path / "flower.sqlite"
    damaged.write_bytes(b"no database" * 1000)
    for database in (damaged, tmp_path / "no-folder" / "flower.sqlite"):
        with pytest.raises(ConfigError, match=r"service.database: .* cannot be used"):
            SuperLink(make_service(database=database))


# State that outlives the process.


def test_a_database_keeps_nodes_and_closes_what_was_left_open(
    make_service: Callable[..., Service], keys: DevelopmentKeys, tmp_path: Path
) -> None:
    service = make_service(database=tmp_path / "flower.sqlite")
    with SuperLink(service) as first:
        first.register(pem(keys, "alder"))
        node = first.state.get_node_id_by_public_key(pem(keys, "alder"))
        left, running = first.start_run(), first.start_run()
        (task,) = first.state.get_tasks(run_ids=[running])
        first.state.claim_task(task.task_id)
        first.state.activate_task(task.task_id)
    with SuperLink(service) as second:
        second.register(pem(keys, "alder"))
        assert second.state.get_node_id_by_public_key(pem(keys, "alder")) == node
        for run in (left, running):
            status = second.state.get_run_status({run})[run]
            assert (status.status, status.sub_status) == (Status.FINISHED, SubStatus.STOPPED)
        assert not second.state.get_tasks(statuses=[Status.PENDING])
    assert stat.S_IMODE((tmp_path / "flower.sqlite").stat().st_mode) == 0o600


def test_writers_of_the_database_wait_a_minute_for_each_other(
    make_service: Callable[..., Service], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sql_mixin, "SQLITE_PRAGMAS", sql_mixin.SQLITE_PRAGMAS)
    stock = dict(sql_mixin.SQLITE_PRAGMAS)
    link = SuperLink(make_service(database=tmp_path / "flower.sqlite"))
    for store in (link.state, link.state.object_store):
        for name, value in (stock | {"busy_timeout": "60000"}).items():
            if name in ("busy_timeout", "foreign_keys"):
                (row,) = store.query(f"PRAGMA {name}")
                assert str(*row.values()) == value.replace("ON", "1")
    with sqlite3.connect(tmp_path / "flower.sqlite") as other:
        assert other.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    other.close()


# The operator's own commands.


def test_the_flower_home_is_for_the_operator_alone(link: SuperLink, token: str) -> None:
    assert stat.S_IMODE(link.flwr_home.stat().st_mode) == 0o700
    names = {path.name: path for path in link.flwr_home.iterdir()}
    assert set(names) == {"config.toml", "credentials.yaml"}
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in names.values())
    assert base64.b64encode(token.encode()).decode() in names["credentials.yaml"].read_text()


def test_a_flower_home_survives_odd_folder_names(tmp_path: Path) -> None:
    authority = tmp_path / 'a "quoted" \\ näme' / "ca.crt"
    flower_link.write_flwr_home(tmp_path / "home", "127.0.0.1:1", authority, b"token")
    config = tomllib.loads((tmp_path / "home" / "config.toml").read_text())
    assert config["superlink"]["hanse"]["root-certificates"] == str(authority)


def test_a_flower_home_that_cannot_be_written_is_named(
    make_service: Callable[..., Service], tmp_path: Path
) -> None:
    (tmp_path / "state").write_bytes(b"a file")
    with pytest.raises(ConfigError, match="flwr: cannot be written"):
        SuperLink(make_service()).__enter__()


def test_stock_commands_list_register_and_unregister_nodes(
    link: SuperLink, keys: DevelopmentKeys, flwr: Callable[..., Any], make_node: Callable[[str], Any]
) -> None:
    registered = flwr(link.flwr_home, "supernode", "register", str(keys.merchants["birch"] / "node.key.pub"))
    assert registered.returncode == 0, registered.stderr
    birch = make_node("birch").activate()
    listed = flwr(link.flwr_home, "supernode", "list", "--format", "json")
    assert f'"node-id": "{birch.node_id}"' in listed.stdout
    assert '"status": "online"' in listed.stdout
    gone = flwr(link.flwr_home, "supernode", "unregister", str(birch.node_id))
    assert gone.returncode == 0, gone.stderr
    refused(birch.client.PullMessages, PullMessagesRequest(node=birch.node))


def test_a_stock_command_with_another_token_is_refused(
    link: SuperLink, keys: DevelopmentKeys, flwr: Callable[..., Any], tmp_path: Path
) -> None:
    run, home = link.start_run(), tmp_path / "home"
    flower_link.write_flwr_home(home, f"127.0.0.1:{link.admin_port}", keys.authority, b"x" * 43)
    listed = flwr(home, "ls")
    assert listed.returncode != 0
    assert str(run) not in listed.stdout + listed.stderr
