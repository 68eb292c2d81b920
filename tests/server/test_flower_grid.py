"""Membership over a real SuperLink: nodes that come, answer, lie, fall silent and go."""

import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hanse_common import wire
from hanse_common.credentials import load_node_public, node_public_pem
from hanse_common.flower import RECORD, from_record, to_record
from hanse_common.plan import Plan, SignedPlan
from hanse_common.session import Assignment, BlockReport, ReportCode
from hanse_server import flower_executor, flower_grid
from hanse_server.blocks import Membership
from hanse_server.development_keys import DevelopmentKeys
from hanse_server.flower_executor import RunContext
from hanse_server.flower_grid import FlowerMembership
from hanse_server.flower_link import SuperLink

# isort: split
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict

WAIT = 60.0
BLOCK = bytes(range(16))


@pytest.fixture
def assignment(make_plan: Callable[..., Plan]) -> Assignment:
    signed = SignedPlan.sign(make_plan(), Ed25519PrivateKey.generate())
    return Assignment(block=BLOCK, signed_plan=signed, rounds=3, aggregator="localhost:9093")


@pytest.fixture
def names(link: SuperLink, keys: DevelopmentKeys) -> dict[bytes, str]:
    """Alder and birch are of the league; cedar's node is registered and of nobody we know."""
    pems = {
        name: node_public_pem(load_node_public(folder / "node.key.pub"))
        for name, folder in keys.merchants.items()
    }
    for pem in pems.values():
        link.register(pem)
    return {pems[name]: name for name in ("alder", "birch")}


@pytest.fixture
def membership(running: RunContext, names: dict[bytes, str]) -> Membership:
    return FlowerMembership(running.grid, lambda: names)


@pytest.fixture
def alder(make_node: Callable[[str], Any], names: object) -> Any:
    return make_node("alder").activate()


@pytest.fixture
def birch(make_node: Callable[[str], Any], names: object) -> Any:
    return make_node("birch").activate()


@pytest.fixture
def reports(membership: Membership, wait_until: Callable[..., Any]) -> Callable[..., dict[str, ReportCode]]:
    """Return a function that waits for the reports of some merchants and returns all there are."""

    def wait(*merchants: str) -> dict[str, ReportCode]:
        wait_until(f"reports of {merchants}", lambda: set(merchants) <= set(membership.reports()))
        return dict(membership.reports())

    return wait


def report(code: ReportCode, block: bytes = BLOCK) -> RecordDict:
    return to_record(wire.encode(BlockReport(block=block, code=code)))


def test_merchants_are_online_while_their_nodes_are(
    membership: Membership, make_node: Callable[[str], Any]
) -> None:
    assert membership.online() == frozenset()
    alder, _, stranger = (make_node(name).activate() for name in ("alder", "birch", "cedar"))
    assert membership.online() == {"alder", "birch"}
    alder.deactivate()
    assert membership.online() == {"birch"}
    stranger.deactivate()
    assert membership.online() == {"birch"}


def test_an_assignment_arrives_as_it_was_and_its_report_too(
    membership: Membership, assignment: Assignment, alder: Any, birch: Any, reports: Callable[..., Any]
) -> None:
    membership.assign(assignment, frozenset({"alder", "birch"}))
    assert membership.reports() == {}
    messages = {name: node.receive() for name, node in (("alder", alder), ("birch", birch))}
    for message in messages.values():
        assert message.metadata.message_type == "train"
        assert 0 < message.metadata.ttl <= 24 * 3600
        assert wire.decode(Assignment, from_record(message.content, 1 << 20)) == assignment
    alder.reply(messages["alder"], report(ReportCode.DONE))
    assert reports("alder") == {"alder": ReportCode.DONE}
    birch.reply(messages["birch"], report(ReportCode.POLICY))
    assert reports("birch") == {"alder": ReportCode.DONE, "birch": ReportCode.POLICY}
    assert reports("birch") == {"alder": ReportCode.DONE, "birch": ReportCode.POLICY}, "and stay so"


def test_nothing_of_a_block_stays_in_flower(
    link: SuperLink, membership: Membership, assignment: Assignment, alder: Any, reports: Callable[..., Any]
) -> None:
    membership.assign(assignment, frozenset({"alder"}))
    alder.reply(alder.receive(), report(ReportCode.DONE))
    reports("alder")
    assert (link.state.num_message_ins(), link.state.num_message_res()) == (0, 0)


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (report(ReportCode.UNKNOWN, bytes(16)), ReportCode.UNKNOWN),
        (report(ReportCode.DONE, b"another block 16"), ReportCode.MALFORMED),
        (to_record(b""), ReportCode.MALFORMED),
        (to_record(b"\xc1"), ReportCode.MALFORMED),
        (to_record(wire.encode(BlockReport(block=BLOCK, code=ReportCode.DONE)) + b"\x00"), ReportCode.MALFORMED),
        (to_record(bytes(10_000)), ReportCode.MALFORMED),
        (RecordDict(), ReportCode.MALFORMED),
        (RecordDict({RECORD: ConfigRecord({"message": "text"})}), ReportCode.MALFORMED),
        (RecordDict({f"r{i}": ConfigRecord({"x": i}) for i in range(10)}), ReportCode.MALFORMED),
        (RecordDict({"a": ArrayRecord({"w": Array("float32", (1,), "x", b"x")})}), ReportCode.MALFORMED),
        (Error(code=0, reason="private text"), ReportCode.MALFORMED),
        (Error(code=2, reason="private text"), ReportCode.MALFORMED),
    ],
    ids=["block-zero", "other-block", "empty", "garbage", "trailing", "long", "nothing", "text", "many", "array",
         "error-0", "error-2"],
)  # fmt: skip
def test_what_is_no_report_of_the_block_counts_as_malformed(
    membership: Membership,
    assignment: Assignment,
    alder: Any,
    reports: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
    content: Any,
    code: ReportCode,
) -> None:
    caplog.set_level(logging.DEBUG)
    membership.assign(assignment, frozenset({"alder"}))
    assert alder.reply(alder.receive(), content)
    assert reports("alder") == {"alder": code}
    assert "private text" not in caplog.text


def test_objects_that_make_no_message_count_as_malformed(
    membership: Membership, assignment: Assignment, alder: Any, reports: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The envelope is right; what it promises was never a message."""
    membership.assign(assignment, frozenset({"alder"}))
    message = alder.receive()
    stray = ConfigRecord({"x": 1})
    monkeypatch.setattr(Message, "object_id", property(lambda self: stray.object_id))
    monkeypatch.setattr(Message, "deflate", lambda self: stray.deflate())
    monkeypatch.setattr(Message, "children", property(lambda self: {}))
    assert alder.reply(message, report(ReportCode.DONE))
    monkeypatch.undo()
    assert reports("alder") == {"alder": ReportCode.MALFORMED}


def test_a_reply_that_never_arrives_whole_holds_up_nobody(
    membership: Membership, assignment: Assignment, alder: Any, birch: Any, reports: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(flower_executor, "ARRIVAL_SECONDS", 0.5)
    membership.assign(assignment, frozenset({"alder", "birch"}))
    assert alder.reply(alder.receive(), report(ReportCode.DONE), upload=False)
    look = threading.Thread(target=membership.reports, daemon=True)
    look.start()
    look.join(WAIT)
    assert not look.is_alive(), "half a reply is waited for"
    birch.reply(birch.receive(), report(ReportCode.DONE))
    assert reports("birch")["birch"] == ReportCode.DONE
    assert reports("alder") == {"alder": ReportCode.LOST, "birch": ReportCode.DONE}


def test_a_reply_may_arrive_in_pieces(
    membership: Membership, assignment: Assignment, alder: Any, reports: Callable[..., Any]
) -> None:
    membership.assign(assignment, frozenset({"alder"}))
    upload, held = alder.client.PushObject, []
    alder.client.PushObject = held.append
    alder.reply(alder.receive(), report(ReportCode.DONE))
    assert len(held) == 3
    for piece in held:
        assert membership.reports() == {}
        upload(piece)
    assert reports("alder") == {"alder": ReportCode.DONE}


def test_a_node_that_goes_before_it_answers_is_lost_and_may_be_asked_again(
    membership: Membership, assignment: Assignment, alder: Any, reports: Callable[..., Any]
) -> None:
    membership.assign(assignment, frozenset({"alder"}))
    first = alder.receive()
    alder.deactivate()
    assert reports("alder") == {"alder": ReportCode.LOST}
    alder.activate()
    membership.assign(assignment, frozenset({"alder"}))
    assert membership.reports() == {}
    assert not alder.reply(first, report(ReportCode.POLICY)), "the question before is forgotten"
    alder.reply(alder.receive(), report(ReportCode.DONE))
    assert reports("alder") == {"alder": ReportCode.DONE}


def test_a_merchant_whose_node_is_gone_when_it_is_asked_is_lost(
    membership: Membership, assignment: Assignment, alder: Any
) -> None:
    membership.assign(assignment, frozenset({"alder", "birch"}))
    assert membership.reports() == {"birch": ReportCode.LOST}
    assert alder.receive()


def test_a_new_block_forgets_the_one_before(
    membership: Membership, assignment: Assignment, alder: Any, reports: Callable[..., Any]
) -> None:
    membership.assign(assignment, frozenset({"alder"}))
    late = alder.receive()
    other = assignment.model_copy(update={"block": b"another block 16"})
    membership.assign(other, frozenset({"alder"}))
    alder.reply(late, report(ReportCode.DONE))
    assert membership.reports() == {}
    alder.reply(alder.receive(), report(ReportCode.DONE, other.block))
    assert reports("alder") == {"alder": ReportCode.DONE}


def test_a_merchant_cannot_answer_in_anothers_place(
    membership: Membership, assignment: Assignment, alder: Any, birch: Any, reports: Callable[..., Any]
) -> None:
    membership.assign(assignment, frozenset({"alder", "birch"}))
    to_alder, to_birch = alder.receive(), birch.receive()
    assert not birch.reply(to_alder, report(ReportCode.POLICY), source=birch.node_id)
    # Flower would let birch name alder as the sender. It cannot know which message to answer.
    assert to_alder.metadata.group_id != to_birch.metadata.group_id
    assert min(len(message.metadata.group_id) for message in (to_alder, to_birch)) == 32
    alder.reply(to_alder, report(ReportCode.DONE))
    birch.reply(to_birch, report(ReportCode.DONE))
    assert reports("alder", "birch") == dict.fromkeys(("alder", "birch"), ReportCode.DONE)


def test_one_answer_counts(
    membership: Membership, assignment: Assignment, alder: Any, reports: Callable[..., Any]
) -> None:
    membership.assign(assignment, frozenset({"alder"}))
    message = alder.receive()
    assert alder.reply(message, report(ReportCode.DONE))
    assert not alder.reply(message, report(ReportCode.POLICY))
    assert reports("alder") == {"alder": ReportCode.DONE}


def test_after_a_stop_nobody_is_waited_for(
    link: SuperLink, running: RunContext, membership: Membership, assignment: Assignment, alder: Any
) -> None:
    membership.assign(assignment, frozenset({"alder"}))
    link.stop_run(running.run_id)
    assert membership.reports() == {"alder": ReportCode.LOST}
    membership.assign(assignment.model_copy(update={"block": b"another block 16"}), frozenset({"alder"}))
    assert membership.reports() == {"alder": ReportCode.LOST}


STOCK_NODE = """
import sys, time
from functools import partial
import hanse_common
from flwr.app import Message
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects, get_object_tree, iterate_object_tree, no_object_id_recompute)
from flwr.supercore.inflatable.inflatable_utils import (
    inflate_object_from_contents, pull_objects, push_object_contents_from_iterable)
from flwr.supernode.fleet_http_connection import http_request_response
from hanse_common import wire
from hanse_common.credentials import load_node_key
from hanse_common.flower import from_record, to_record
from hanse_common.session import Assignment, BlockReport, ReportCode
from pathlib import Path

address, key, authority = sys.argv[1:]
private = load_node_key(Path(key))
with http_request_response(
    address, False, Path(authority).read_bytes(), (private, private.public_key()), max_wait_time=30
) as (node_id, receive, send, _, _, pull, push, confirm):
    while True:
        received = receive()
        if received is None:
            time.sleep(0.05)
            continue
        envelope, tree = received
        run = envelope.metadata.run_id
        ids = [node.object_id for node in iterate_object_tree(tree)]
        message = inflate_object_from_contents(tree.object_id, pull_objects(ids, lambda oid: pull(run, oid)))
        message.metadata.__dict__["_message_id"] = envelope.metadata.message_id
        confirm(run, envelope.metadata.message_id)
        block = wire.decode(Assignment, from_record(message.content, 1 << 20)).block
        answer = to_record(wire.encode(BlockReport(block=block, code=ReportCode.DONE)))
        reply = Message(answer, reply_to=message)
        with no_object_id_recompute():
            reply.metadata.__dict__["_message_id"] = reply.object_id
            objects = get_all_nested_objects(reply)
            wanted, session = send(reply, get_object_tree(reply), 0.0)
            push_object_contents_from_iterable(
                ((oid, objects[oid].deflate()) for oid in wanted), partial(push, run, session))
"""


@pytest.fixture
def stock_node(link: SuperLink, keys: DevelopmentKeys, names: object) -> Iterator[subprocess.Popen[bytes]]:
    """Alder's node as a process that speaks through flwr's own `http_request_response`."""
    arguments = [f"127.0.0.1:{link.fleet_port}", keys.merchants["alder"] / "node.key", keys.authority]
    process = subprocess.Popen([sys.executable, "-c", STOCK_NODE, *map(str, arguments)])
    try:
        yield process
    finally:
        process.kill()
        process.wait(WAIT)


def test_flwrs_own_connection_serves_block_after_block(
    membership: Membership, assignment: Assignment, stock_node: Any, reports: Callable[..., Any],
    wait_until: Callable[..., Any],
) -> None:  # fmt: skip
    wait_until("alder to be online", lambda: membership.online() == {"alder"})
    for number in range(3):
        membership.assign(assignment.model_copy(update={"block": bytes([number]) * 16}), frozenset({"alder"}))
        assert reports("alder") == {"alder": ReportCode.DONE}


def test_the_message_type_is_the_one_that_merchants_serve(root: Path) -> None:
    node = (root / "client" / "hanse_client" / "flower_node.py").read_text()
    assert f'MESSAGE_TYPE = "{flower_grid.MESSAGE_TYPE}"' in node
