"""The node as a process, at a real SuperLink on loopback: what passes through it, what it holds, how it ends."""

import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from hanse_client import flower_node
from hanse_client.config import ClientConfig
from hanse_client.keys import load_node
from hanse_client.ledger import Ledger
from hanse_client.node_keeper import NodeKeeper
from hanse_client.node_protocol import CONNECTED, NodeExit
from hanse_common import signing, wire
from hanse_common.credentials import create_node_key, load_node_key, load_node_public, node_public_pem
from hanse_common.flower import from_record, to_record
from hanse_common.session import BlockReport, ReportCode
from hanse_common.wire import MAX_DOCUMENT_BYTES
from hanse_server.config import Service, Tls
from hanse_server.development_keys import DevelopmentKeys, make_keys
from hanse_server.flower_executor import RunContext
from hanse_server.flower_link import SuperLink

# isort: split
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.constant import NOOP_FLWR_AID

WAIT = 60.0

Until = Callable[[str, Callable[[], Any]], Any]


class Node:
    """A node's process, and the daemon's end of its socket."""

    def __init__(self, server: str, authority: Path, key: Path, log: Path) -> None:
        self.log = log
        ours, theirs = socket.socketpair()
        with theirs, log.open("wb") as output:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "hanse_client.flower_node"),
                    *(server, str(authority), str(theirs.fileno())),
                ],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.daemon = Connection(ours.detach())
        pem = load_node_key(key).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        self.daemon.send_bytes(pem)

    def hear(self) -> bytes:
        assert self.daemon.poll(WAIT), self.log.read_text()
        return self.daemon.recv_bytes()

    def rest(self) -> list[bytes]:
        """Return what the node said before it ended."""
        said = []
        with suppress(EOFError):
            while True:
                said.append(self.hear())
        return said

    def silent(self) -> bool:
        return not self.daemon.poll(0)

    def connect(self) -> "Node":
        assert self.hear() == CONNECTED
        return self

    def end(self) -> int:
        return self.process.wait(WAIT)


@pytest.fixture
def start(link: SuperLink, keys: DevelopmentKeys, tmp_path: Path) -> Iterator[Callable[..., Node]]:
    """Return a function that starts alder's node at `link`, changed by keyword."""
    made: list[Node] = []

    def start(**changes: Any) -> Node:
        settings: dict[str, Any] = {
            "server": f"localhost:{link.fleet_port}",
            "authority": keys.authority,
            "key": keys.merchants["alder"] / "node.key",
            "log": tmp_path / f"node-{len(made)}.log",
        }
        made.append(Node(**(settings | changes)))
        return made[-1]

    yield start
    for node in made:
        node.process.kill()
        node.process.wait()
        node.daemon.close()


@pytest.fixture
def registered(link: SuperLink, keys: DevelopmentKeys) -> None:
    """The league knows alder's node."""
    link.register(node_public_pem(load_node_public(keys.merchants["alder"] / "node.key.pub")))


@pytest.fixture
def node(start: Callable[..., Node], registered: None) -> Node:
    """Alder's node, connected."""
    return start().connect()


def post(running: RunContext, content: RecordDict, kind: str = "train") -> str:
    """Send a message to the only node that is online, and return its id."""
    (there,) = running.grid.get_nodes()
    (sent,) = running.grid.push_messages([Message(content, there.node_id, kind)])
    return str(sent)


def answer(running: RunContext, until: Until, sent: str) -> Message:
    replies: list[Message] = until("a reply", lambda: list(running.grid.pull_messages([sent])))  # type: ignore[assignment]
    return replies[0]


def code(reply: Message) -> ReportCode:
    """Return the code that `reply` carries, once it is clear that it carries nothing else."""
    assert not reply.has_error(), "an error has a text"
    data = from_record(reply.content, 1024)
    report = wire.decode(BlockReport, data)
    assert report.block == bytes(16)
    return report.code


# -- what passes through ------------------------------------------------------------------------------------------


def test_assignments_go_to_the_daemon_and_reports_back_byte_by_byte(
    node: Node, running: RunContext, wait_until: Until
) -> None:
    for number in range(3):
        assignment, report = os.urandom(5000), bytes([number]) * 100
        sent = post(running, to_record(assignment))
        assert node.hear() == assignment
        node.daemon.send_bytes(report)
        assert from_record(answer(running, wait_until, sent).content, 1024) == report
    largest = os.urandom(MAX_DOCUMENT_BYTES)
    post(running, to_record(largest))
    assert node.hear() == largest


def many(count: int) -> RecordDict:
    return RecordDict({f"record {number}": ConfigRecord({"x": number}) for number in range(count)})


NO_ASSIGNMENTS: list[tuple[str, RecordDict, ReportCode]] = [
    ("train", RecordDict(), ReportCode.MALFORMED),
    ("train", RecordDict({"hanse": ConfigRecord({"message": "secret words"})}), ReportCode.MALFORMED),
    ("train", RecordDict({"hanse": ConfigRecord({"message": b"", "b": b""})}), ReportCode.MALFORMED),
    ("train", many(3), ReportCode.MALFORMED),
    ("train", many(flower_node.MAX_OBJECTS), ReportCode.MALFORMED),
    ("train", to_record(bytes(MAX_DOCUMENT_BYTES + 1)), ReportCode.MALFORMED),
    ("evaluate", to_record(b"secret words"), ReportCode.UNKNOWN),
    ("query", to_record(b"secret words"), ReportCode.UNKNOWN),
    ("train.other", to_record(b"secret words"), ReportCode.UNKNOWN),
]


def test_what_is_no_assignment_is_answered_with_a_code_and_never_reaches_the_daemon(
    node: Node, running: RunContext, wait_until: Until
) -> None:
    for kind, content, found in NO_ASSIGNMENTS:
        assert code(answer(running, wait_until, post(running, content, kind))) is found, (kind, content)
        assert node.silent()
    assert "secret words" not in node.log.read_text()
    # And the next one is served.
    post(running, to_record(b"next"))
    assert node.hear() == b"next"


def test_a_message_of_too_many_objects_is_not_fetched(
    node: Node, running: RunContext, link: SuperLink, wait_until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[str] = []
    store = link.state.object_store
    get = store.get
    monkeypatch.setattr(store, "get", lambda object_id: fetched.append(object_id) or get(object_id))

    def is_fetched(content: RecordDict) -> bool:
        assert code(answer(running, wait_until, post(running, content))) is ReportCode.MALFORMED
        return bool({record.object_id for record in content.values()} & set(fetched))

    assert not is_fetched(many(flower_node.MAX_OBJECTS))
    assert is_fetched(many(flower_node.MAX_OBJECTS - 2))


# -- what it holds ------------------------------------------------------------------------------------------------


def test_memory_and_files_are_bounded(node: Node) -> None:
    limits = Path(f"/proc/{node.process.pid}/limits").read_text()
    for name, bound in (("address space", 4 << 30), ("file size", 16 << 20)):
        assert re.search(rf"Max {name} +{bound} +{bound} ", limits), limits
    for kind in (resource.RLIMIT_AS, resource.RLIMIT_FSIZE):
        assert resource.getrlimit(kind)[0] == resource.RLIM_INFINITY, "not so for the daemon"


@pytest.fixture
def shop(link: SuperLink, keys: DevelopmentKeys, tmp_path: Path) -> ClientConfig:
    """A shop with a photo, ledger and keys, whose node the league knows."""
    folder = tmp_path / "shop"
    (folder / "photos").mkdir(parents=True)
    (folder / "photos" / "a.png").write_bytes(b"a photo")
    (folder / "state").mkdir()
    signing.create_key(folder / "state" / "identity.key")
    create_node_key(folder / "state" / "node.key")
    link.register(node_public_pem(load_node_public(folder / "state" / "node.key.pub")))
    return ClientConfig.model_validate(
        {
            "photos": folder / "photos",
            "state": folder / "state",
            "league": {
                "operator_key": "00" * 32,
                "charter": "11" * 32,
                "taxonomy": {"classes": ("shirt", "shoe", "bag")},
            },
            "policy": {"league": "test", "epsilon": 1.0},
            "connection": {"server": f"localhost:{link.fleet_port}", "authority": keys.authority},
        }
    )


def test_nothing_of_the_shop_is_open_in_the_node_that_a_daemon_starts(
    shop: ClientConfig, wait_until: Until
) -> None:
    told: list[str] = []
    ledger = Ledger(shop.ledger_path, shop.policy.budget)
    keeper = NodeKeeper(shop, load_node(shop), told.append)
    with (shop.photos / "a.png").open() as photo, shop.identity_path.open() as identity:
        for file in (photo, identity):
            os.set_inheritable(file.fileno(), True)  # an oversight in the daemon must not matter
        with keeper:
            wait_until("the connection", lambda: "Connected. Waiting for the league." in told)
            pid = keeper._process.pid  # type: ignore[union-attr]
            open_ = [str(fd.readlink()) for fd in Path(f"/proc/{pid}/fd").iterdir()]
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
    assert ledger.counter == 0
    folder = str(shop.state.parent)
    assert {path for path in open_ if path.startswith(folder)} == {str(shop.state / "node.log")}, open_
    assert folder.encode() not in command


# -- how it ends --------------------------------------------------------------------------------------------------


def test_a_server_that_is_not_there(start: Callable[..., Node]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
    assert start(server=f"localhost:{port}").end() == NodeExit.UNREACHABLE


def test_a_server_of_another_authority(start: Callable[..., Node], registered: None, tmp_path: Path) -> None:
    other = make_keys(tmp_path / "other", ("localhost",), ())
    node = start(authority=other.authority)
    assert node.end() == NodeExit.UNTRUSTED
    assert CONNECTED not in node.rest()


def test_a_server_of_another_name(
    start: Callable[..., Node], make_service: Callable[..., Service], tmp_path: Path
) -> None:
    """Of the right authority, with a certificate for elsewhere."""
    other = make_keys(tmp_path / "other", ("elsewhere.example",), ())
    tls = Tls(authority=other.authority, certificate=other.certificate, key=other.key)
    with SuperLink(make_service(tls=tls)) as elsewhere:
        node = start(server=f"localhost:{elsewhere.fleet_port}", authority=other.authority)
        assert node.end() == NodeExit.UNTRUSTED


def test_a_node_that_the_league_does_not_know(start: Callable[..., Node]) -> None:
    assert start().end() == NodeExit.REFUSED


def test_a_second_node_with_the_same_key(node: Node, start: Callable[..., Node]) -> None:
    assert start().end() == NodeExit.REFUSED
    assert node.process.poll() is None


def test_a_server_that_goes_away(node: Node, link: SuperLink) -> None:
    link.__exit__(None, None, None)
    assert node.end() == NodeExit.LOST


def test_a_node_that_is_struck_off(node: Node, link: SuperLink, keys: DevelopmentKeys) -> None:
    pem = node_public_pem(load_node_public(keys.merchants["alder"] / "node.key.pub"))
    link.state.delete_node(NOOP_FLWR_AID, link.state.get_node_id_by_public_key(pem))
    assert node.end() == NodeExit.UNKNOWN_KEY


def left_in_order(running: RunContext) -> bool:
    """A node that said farewell is offline at once; one that was killed counts as online for a minute."""
    return not list(running.grid.get_nodes())


@pytest.mark.parametrize("busy", [False, True])
def test_a_node_whose_daemon_is_gone_leaves_in_order(node: Node, running: RunContext, busy: bool) -> None:
    if busy:
        post(running, to_record(b"work"))
        assert node.hear() == b"work"
    assert not left_in_order(running)
    node.daemon.close()
    assert node.end() in (0, NodeExit.ORPHANED)
    assert left_in_order(running)


@pytest.mark.parametrize("busy", [False, True])
def test_a_node_that_is_asked_to_end_leaves_in_order(node: Node, running: RunContext, busy: bool) -> None:
    if busy:
        post(running, to_record(b"work"))
        assert node.hear() == b"work"
    while node.process.poll() is None:  # more words do not break the farewell off
        node.process.terminate()
        time.sleep(0.001)
    assert node.end() == 0
    assert left_in_order(running)


def test_a_daemon_that_says_too_much_is_left(node: Node, running: RunContext) -> None:
    """No report is so long: whoever writes there is not the daemon that started this node."""
    threading.Thread(target=node.daemon.send_bytes, args=(bytes(flower_node.MAX_REPORT_BYTES + 1),)).start()
    assert node.end() in (0, NodeExit.ORPHANED)
    assert left_in_order(running)


def test_a_node_whose_farewell_is_not_heard_ends_nevertheless(node: Node, link: SuperLink) -> None:
    link.__exit__(None, None, None)
    with socket.create_server(("127.0.0.1", link.fleet_port)):  # takes connections and says nothing
        asked = time.monotonic()
        node.process.terminate()
        assert node.end() == -signal.SIGALRM
    assert time.monotonic() - asked < flower_node.LEAVE_SECONDS + 15
