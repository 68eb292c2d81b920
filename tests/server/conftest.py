"""Nodes that speak Flower's Fleet API to a SuperLink as they like, and its other clients."""

import hashlib
import os
import ssl
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hanse_common  # noqa: F401 - sets what flwr reads when it is imported

# isort: split
import httpx
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
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

from hanse_common import messages, wire
from hanse_common.charter import founded
from hanse_common.credentials import load_node_key, node_public_pem
from hanse_common.directory import Directory, Entry, SignedDirectory
from hanse_common.messages import DeclineCode, Declined, Invitation, Start
from hanse_common.plan import Plan, SignedPlan
from hanse_common.secagg import ring
from hanse_common.secagg.faults import Refusal
from hanse_common.secagg.merchant import Merchant
from hanse_common.secagg.messages import Agreement, Delivery, Roster, Survivors, Upload, Work
from hanse_common.secagg.suite import Setup
from hanse_common.signing import public_bytes
from hanse_server.coordinator import LeagueDirectory, MaskedRounds
from hanse_server.development_keys import DevelopmentKeys
from hanse_server.flower_link import SuperLink

WAIT = 60.0
"""Bound of a command, in seconds. None comes near it unless something is broken."""


class FleetNode:
    """One node: it says to the Fleet API what a test wants it to say, and never more."""

    def __init__(self, link: SuperLink, keys: DevelopmentKeys, name: str, until: Callable[..., Any]) -> None:
        self._until = until
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
        response = self._until(
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
def make_node(
    link: SuperLink, keys: DevelopmentKeys, wait_until: Callable[..., Any]
) -> Iterator[Callable[[str], FleetNode]]:
    """Return a function that makes the node of a merchant of `keys`. The link need not know it."""
    made: list[FleetNode] = []

    def make(name: str) -> FleetNode:
        made.append(FleetNode(link, keys, name, wait_until))
        return made[-1]

    yield make
    for node in made:
        node.close()


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


NAMES = ("alder", "birch", "cedar", "damson", "elder")
IDENTITIES = {
    name: Ed25519PrivateKey.from_private_bytes(hashlib.sha256(name.encode()).digest()) for name in NAMES
}
LEAGUE_KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
REQUESTS = (Invitation, Roster, Delivery, Start, Survivors, Agreement)


class MaskedMerchant:
    """An honest merchant without photos: `update` gives its update, `change` may spoil its replies."""

    def __init__(self, plan: Plan, name: str, update: Callable[[Start], Any]) -> None:
        self.plan = plan
        self.key = IDENTITIES[name]
        self.update = update
        self.change: Callable[[Work, bytes], bytes | None] = lambda asked, reply: reply
        self.asked: list[Work] = []
        self.merchant: Merchant | None = None

    def handle(self, data: bytes) -> bytes | None:
        message = wire.decode_any(REQUESTS, data, messages.MAX_MESSAGE_BYTES)
        self.asked.append(message)
        return self.change(message, wire.encode(self._answer(message)))

    def _answer(self, message: Any) -> Work:
        if isinstance(message, Invitation):
            directory = message.signed_directory.open(
                founded(self.plan.league, LEAGUE_KEY).read().digest, 0.0
            )
            setup = Setup(**message.work, rounds=message.rounds, directory_digest=directory.digest)
            parameters = self.plan.cohort.parameters
            self.merchant = Merchant(setup, parameters, self.key, directory.entities(0.0))
            return self.merchant.join()
        assert self.merchant is not None
        try:
            match message:
                case Roster():
                    return self.merchant.share(message, 0, {})
                case Delivery():
                    return self.merchant.receive(message)[1]
                case Start():
                    self.merchant.open_round(message.round, messages.model_digest(message.model))
                    residues = self.plan.encode(np.asarray(self.update(message), dtype=np.float64))
                    self.merchant.mask(residues)
                    return Upload(**message.work, vector=ring.to_bytes(residues))
                case Survivors():
                    return self.merchant.agree(message)
                case _:
                    return self.merchant.unmask(message)
        except Refusal as refusal:
            roster = self.merchant._members
            culprit = b"" if refusal.culprit is None else roster[refusal.culprit].identity
            return Declined(**message.work, code=DeclineCode.UNEXPECTED, culprit=culprit)


class MaskedLeague:
    """A transport over merchants in this process. `silent` names who does not answer which trip."""

    def __init__(self, merchants: dict[str, MaskedMerchant]) -> None:
        self.members = merchants
        self.silent: set[tuple[str, str]] = set()
        self.extra: list[tuple[str, bytes]] = []
        self.asked: list[tuple[str, tuple[str, ...], float]] = []
        self.gathered = 0

    def gather(self) -> tuple[str, ...]:
        self.gathered += 1
        return tuple(sorted(self.members))

    def merchants(self) -> tuple[str, ...]:
        return tuple(sorted(self.members))

    def exchange(self, kind: str, payloads: Any, deadline: float) -> Iterator[tuple[str, bytes]]:
        self.asked.append((kind, tuple(payloads), deadline))
        for name, payload in payloads.items():
            reply = self.members[name].handle(payload)
            if reply is not None and (name, kind) not in self.silent:
                yield name, reply
        yield from self.extra

    def trips(self) -> list[str]:
        return [kind for kind, _, _ in self.asked]


def league_directory(league: str) -> LeagueDirectory:
    entries = tuple(
        Entry(name=name, entity=name, identity=public_bytes(key), expires=1 << 39)
        for name, key in IDENTITIES.items()
    )
    charter = founded(league, LEAGUE_KEY)
    directory = Directory(
        league=league, charter=charter.read().digest, version=1, expires=1 << 39, entries=entries
    )
    return LeagueDirectory(SignedDirectory.of(directory, (charter,)).signed_by(LEAGUE_KEY), directory)


@pytest.fixture
def make_masked() -> Callable[..., tuple[MaskedLeague, MaskedRounds]]:
    """Return a function that makes a league of `count` merchants that upload 1, 2, 3, … and its rounds."""

    def make(plan: Plan, count: int = 4, **settings: Any) -> tuple[MaskedLeague, MaskedRounds]:
        league = MaskedLeague(
            {
                name: MaskedMerchant(
                    plan, name, lambda start, value=value: np.full(plan.dimension, float(value))
                )
                for value, name in enumerate(NAMES[:count], start=1)
            }
        )
        attempts = iter(range(1_000_000))
        chosen = {"setup_rounds": 3, "attempts": 1, "clock": lambda: 0.0} | settings
        listed = league_directory(plan.league)
        rounds = MaskedRounds(
            league,
            SignedPlan.sign(plan, Ed25519PrivateKey.generate()),
            plan,
            lambda: listed,
            lambda: next(attempts),
            **chosen,
        )
        return league, rounds

    return make
