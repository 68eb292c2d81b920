"""A SuperLink on loopback, and nodes that speak Flower's Fleet API to it as they like."""

import os
import ssl
import subprocess
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hanse_common  # noqa: F401 - sets what flwr reads when it is imported

# isort: split
import httpx
import pytest
from flwr.app import Error, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.message_pb2 import PullObjectRequest, PushObjectRequest
from flwr.proto.node_pb2 import Node as NodeProto
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from hanse_common.credentials import load_node_key, node_public_pem
from hanse_server.config import Admin, AggregatorListener, Fleet, Merchant, Service, Tls
from hanse_server.development_keys import DevelopmentKeys, make_keys
from hanse_server.flower_executor import Executor, RunContext
from hanse_server.flower_link import SuperLink

WAIT = 60.0
"""Bound of every wait in these tests, in seconds. None comes near it unless something is broken."""

MERCHANTS = ("alder", "birch", "cedar")


def until(what: str, condition: Callable[[], Any]) -> Any:
    """Return what `condition` gives as soon as that is true; fail after `WAIT`."""
    given_up = time.monotonic() + WAIT
    while time.monotonic() < given_up:
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError(f"waited {WAIT} s for {what}")


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> DevelopmentKeys:
    """Authority, certificate, token and three merchants' keys."""
    return make_keys(tmp_path_factory.mktemp("league") / "keys", ("localhost", "127.0.0.1"), MERCHANTS)


@pytest.fixture
def make_service(keys: DevelopmentKeys, tmp_path: Path) -> Callable[..., Service]:
    """Return a function that makes the section `service`, on free ports, changed by keyword."""

    def make(**changes: Any) -> Service:
        fields: dict[str, Any] = {
            "plan": tmp_path / "plan",
            "state": tmp_path / "state",
            "tls": Tls(authority=keys.authority, certificate=keys.certificate, key=keys.key),
            "admin": Admin(port=0, token=keys.token),
            "fleet": Fleet(host="127.0.0.1", port=0),
            "aggregator": AggregatorListener(address="localhost:1"),
            "merchants": {
                name: Merchant(identity="00" * 32, node_key=folder / "node.key.pub")
                for name, folder in keys.merchants.items()
            },
        }
        return Service(**(fields | changes))

    return make


@pytest.fixture
def link(make_service: Callable[..., Service]) -> Iterator[SuperLink]:
    """A SuperLink that listens, and knows no node."""
    with SuperLink(make_service()) as link:
        yield link


class FleetNode:
    """One node: it says to the Fleet API what a test wants it to say, and never more."""

    def __init__(self, link: SuperLink, keys: DevelopmentKeys, name: str) -> None:
        private = load_node_key(keys.merchants[name] / "node.key")
        self.pem = node_public_pem(private.public_key())
        self.client = FleetHttpClient.from_server_address(
            f"127.0.0.1:{link.fleet_port}",
            False,
            keys.authority.read_bytes(),
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="SuperNode"),
                NodeAuthHttpInterceptor(private, private.public_key()),
            ],
        )
        self.node_id = 0

    @property
    def node(self) -> NodeProto:
        return NodeProto(node_id=self.node_id)

    def activate(self, heartbeat: float = 30.0) -> "FleetNode":
        request = ActivateNodeRequest(public_key=self.pem, heartbeat_interval=heartbeat)
        self.node_id = self.client.ActivateNode(request).node_id
        return self

    def deactivate(self) -> None:
        self.client.DeactivateNode(DeactivateNodeRequest(node_id=self.node_id))

    def receive(self) -> Message:
        """Return the next message, with its content."""
        response = until(
            "a message",
            lambda: (
                (found := self.client.PullMessages(PullMessagesRequest(node=self.node))).messages_list
                and found
            ),
        )
        envelope, tree = message_from_proto(response.messages_list[0]), response.message_object_trees[0]
        contents = {
            item.object_id: self.client.PullObject(
                PullObjectRequest(node=self.node, run_id=envelope.metadata.run_id, object_id=item.object_id)
            ).object_content
            for item in iterate_object_tree(tree)
        }
        message: Any = inflate_object_from_contents(tree.object_id, contents)
        message.metadata.__dict__["_message_id"] = envelope.metadata.message_id
        return message  # type: ignore[no-any-return]

    def reply(
        self, message: Message, content: RecordDict | Error, *, upload: bool = True, source: int | None = None
    ) -> bool:
        """Reply to `message`; return whether Flower took it. Without `upload` only the envelope is sent."""
        reply = Message(content, reply_to=message)  # type: ignore[arg-type]
        if source is not None:
            reply.metadata.__dict__["_src_node_id"] = source
        with no_object_id_recompute():
            reply.metadata.__dict__["_message_id"] = reply.object_id
            objects, tree = get_all_nested_objects(reply), get_object_tree(reply)
            envelope = remove_content_from_message(reply) if reply.has_content() else reply
            answer = self.client.PushMessages(
                PushMessagesRequest(
                    node=self.node,
                    messages_list=[message_to_proto(envelope)],
                    message_object_trees=[tree],
                    clientapp_runtime_list=[0.0],
                )
            )
            for object_id in answer.objects_to_push if upload else ():
                self.client.PushObject(
                    PushObjectRequest(
                        node=self.node,
                        run_id=reply.metadata.run_id,
                        object_id=object_id,
                        object_content=objects[object_id].deflate(),
                        session_id=answer.session_id,
                    )
                )
        return bool(answer.objects_to_push)

    def close(self) -> None:
        self.client.close()


@pytest.fixture
def make_node(link: SuperLink, keys: DevelopmentKeys) -> Iterator[Callable[[str], FleetNode]]:
    """Return a function that makes the node of a merchant of `keys`. The link need not know it."""
    made: list[FleetNode] = []

    def make(name: str) -> FleetNode:
        made.append(FleetNode(link, keys, name))
        return made[-1]

    yield make
    for node in made:
        node.close()


@pytest.fixture
def running(link: SuperLink) -> Iterator[RunContext]:
    """The context of a Flower run that goes on until the test ends."""
    contexts: list[RunContext] = []
    over = threading.Event()

    def run(context: RunContext) -> None:
        contexts.append(context)
        over.wait(WAIT)

    with Executor(link.state, run, over.set):
        link.start_run()
        yield until("the run to begin", lambda: contexts)[0]


@pytest.fixture
def https(keys: DevelopmentKeys) -> Iterator[httpx.Client]:
    """An HTTPS client that trusts the league's authority."""
    with httpx.Client(verify=ssl.create_default_context(cafile=str(keys.authority)), timeout=WAIT) as client:
        yield client


@pytest.fixture
def flwr(root: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs a stock `flwr` command with a Flower home, in the folder `cwd`."""

    def call(home: Path, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        program = Path(sysconfig.get_path("scripts")) / "flwr"
        return subprocess.run(
            [program, *arguments],
            env=os.environ | {"FLWR_HOME": str(home), "COLUMNS": "300", "NO_COLOR": "1"},
            cwd=cwd or root,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=2 * WAIT,
            check=False,
        )

    return call


@pytest.fixture(scope="session")
def wait_until() -> Callable[[str, Callable[[], Any]], Any]:
    """The function `until`."""
    return until
