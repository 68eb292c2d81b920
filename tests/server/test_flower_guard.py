"""A member's node against the SuperLink: messages in others' names, trees that explode, replies without end."""

import hashlib
import os
from collections.abc import Callable
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hanse_common import wire
from hanse_common.credentials import load_node_public, node_public_pem
from hanse_common.flower import to_record
from hanse_common.plan import Plan, SignedPlan
from hanse_common.session import Assignment, BlockReport, ReportCode
from hanse_server import flower_guard
from hanse_server.blocks import Membership
from hanse_server.config import Service
from hanse_server.development_keys import DevelopmentKeys
from hanse_server.flower_executor import RunContext
from hanse_server.flower_grid import FlowerMembership
from hanse_server.flower_guard import FleetGuard
from hanse_server.flower_link import SuperLink
from hanse_server.rates import Rate

# isort: split
import httpx
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import PullMessagesRequest, PushMessagesRequest, PushMessagesResponse
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import get_object_tree, no_object_id_recompute

BLOCK = bytes(range(16))
DONE = to_record(wire.encode(BlockReport(block=BLOCK, code=ReportCode.DONE)))
MERCHANTS = ("alder", "birch")


@pytest.fixture
def assignment(make_plan: Callable[..., Plan]) -> Assignment:
    signed = SignedPlan.sign(make_plan(), Ed25519PrivateKey.generate())
    return Assignment(block=BLOCK, signed_plan=signed, rounds=3, aggregator="localhost:9093")


@pytest.fixture
def make_service(
    make_service: Callable[..., Service], tmp_path: Any, request: pytest.FixtureRequest
) -> Callable[..., Service]:
    """The section `service` over one of Flower's two kinds of state."""
    if getattr(request, "param", "memory") == "memory":
        return make_service
    return lambda **changes: make_service(**({"database": tmp_path / "flower.sqlite"} | changes))


@pytest.fixture
def membership(running: RunContext, link: SuperLink, keys: DevelopmentKeys) -> Membership:
    pems = {
        node_public_pem(load_node_public(keys.merchants[name] / "node.key.pub")): name for name in MERCHANTS
    }
    for pem in pems:
        link.register(pem)
    return FlowerMembership(running.grid, lambda: pems)


@pytest.fixture
def alder(make_node: Callable[[str], Any], membership: object) -> Any:
    return make_node("alder").activate()


@pytest.fixture
def birch(make_node: Callable[[str], Any], membership: object) -> Any:
    return make_node("birch").activate()


BOTH = pytest.mark.parametrize("make_service", ["memory", "database"], indirect=True)


def name() -> str:
    return os.urandom(32).hex()


def pushed(
    node: Any, reply: Message, tree: ObjectTree | None = None, **metadata: Any
) -> int | PushMessagesResponse:
    """Push the envelope of `reply`, its metadata changed, and return the answer or the status of its refusal."""
    with no_object_id_recompute():
        reply.metadata.__dict__["_message_id"] = reply.object_id
        honest = get_object_tree(reply)
        envelope = message_to_proto(remove_content_from_message(reply))
    for field, value in metadata.items():
        setattr(envelope.metadata, field, value)
    tree = honest if tree is None else tree
    try:
        return node.client.PushMessages(
            PushMessagesRequest(
                node=node.node,
                messages_list=[envelope],
                message_object_trees=[tree],
                clientapp_runtime_list=[0.0],
            )
        )
    except httpx.HTTPStatusError as error:
        return error.response.status_code


def bomb(root: str, levels: int) -> ObjectTree:
    """A tree in which each object has the one before twice; written out only once, as the store knows names."""
    below = hashlib.sha256(b"0").hexdigest()
    steps = [ObjectTree(object_id=below)]
    for level in range(1, levels):
        here = hashlib.sha256(b"%d" % level).hexdigest()
        steps.append(ObjectTree(object_id=here, children=[ObjectTree(object_id=below)] * 2))
        below = here
    return ObjectTree(object_id=root, children=steps)


def stored(link: SuperLink) -> tuple[int, int, int]:
    return len(link.state.object_store), link.state.num_message_ins(), link.state.num_message_res()


def test_a_node_sends_no_messages_but_replies_of_its_own(
    link: SuperLink, membership: Membership, assignment: Assignment, alder: Any, birch: Any
) -> None:
    """Else birch could give alder orders, or answer in alder's place without a look at what it was asked."""
    membership.assign(assignment, frozenset(MERCHANTS))
    question = birch.receive()
    before = stored(link)
    reply = Message(DONE, reply_to=question)
    forged: list[dict[str, Any]] = [
        {"src_node_id": 1, "dst_node_id": alder.node_id, "reply_to_message_id": ""},
        {"src_node_id": 1, "dst_node_id": 1, "reply_to_message_id": ""},
        {"src_node_id": 1, "dst_node_id": 1},
        {"src_node_id": alder.node_id},
        {"dst_node_id": alder.node_id},
        {"reply_to_message_id": ""},
    ]
    for changes in forged:
        assert pushed(birch, reply, **changes) == 403, changes
    assert stored(link) == before
    assert membership.reports() == {}
    assert len(alder.client.PullMessages(PullMessagesRequest(node=alder.node)).messages_list) == 1


@BOTH
def test_a_tree_that_explodes_is_refused(
    link: SuperLink, membership: Membership, assignment: Assignment, birch: Any
) -> None:
    membership.assign(assignment, frozenset({"birch"}))
    question, before = birch.receive(), stored(link)
    reply = Message(DONE, reply_to=question)
    root = reply.object_id
    trees = [
        bomb(root, 60),
        bomb(root, 3),
        ObjectTree(object_id=root, children=[ObjectTree(object_id=name()) for _ in range(200)]),
        ObjectTree(object_id=root, children=[ObjectTree(object_id="../x")]),
        ObjectTree(object_id=name()),
        ObjectTree(),
    ]
    deep = ObjectTree(object_id=name())
    for _ in range(40):
        deep = ObjectTree(object_id=name(), children=[deep])
    for tree in (*trees, ObjectTree(object_id=root, children=[deep])):
        assert pushed(birch, reply, tree) == 400
    for changes in ({"ttl": float("nan")}, {"created_at": float("-inf")}):
        assert pushed(birch, reply, **changes) == 400
    assert stored(link) == before
    assert birch.reply(question, DONE)


@BOTH
def test_a_question_has_one_reply_that_may_be_said_again(
    link: SuperLink,
    membership: Membership,
    assignment: Assignment,
    birch: Any,
    wait_until: Callable[..., Any],
) -> None:
    membership.assign(assignment, frozenset({"birch"}))
    question = birch.receive()
    reply = Message(DONE, reply_to=question)
    first = pushed(birch, reply)
    after = stored(link)
    assert isinstance(first, PushMessagesResponse)
    again = pushed(birch, reply)
    assert isinstance(again, PushMessagesResponse)
    assert sorted(again.objects_to_push) == sorted(first.objects_to_push) != []
    for _ in range(20):
        other = ObjectTree(object_id=reply.object_id, children=[ObjectTree(object_id=name())])
        answer = pushed(birch, reply, other)
        assert isinstance(answer, PushMessagesResponse)
        assert not (answer.objects_to_push or answer.session_id)
    assert stored(link) == after


def test_what_nobody_asked_leaves_nothing_behind(
    link: SuperLink, membership: Membership, assignment: Assignment, birch: Any
) -> None:
    membership.assign(assignment, frozenset({"birch"}))
    question, before = birch.receive(), stored(link)
    reply = Message(DONE, reply_to=question)
    for _ in range(20):
        answer = pushed(birch, reply, reply_to_message_id=name())
        assert isinstance(answer, PushMessagesResponse)
        assert not (answer.objects_to_push or answer.session_id)
    assert pushed(birch, reply, run_id=12345) in (400, 403, 404, 409, 500)
    assert stored(link) == before


@BOTH
def test_an_object_that_is_known_stays_what_it_is(
    link: SuperLink, membership: Membership, assignment: Assignment, alder: Any, birch: Any
) -> None:
    """Two replies with the same content share its objects; neither may hang others under them."""
    membership.assign(assignment, frozenset(MERCHANTS))
    questions = {node: node.receive() for node in (alder, birch)}
    assert alder.reply(questions[alder], DONE)
    before = stored(link)
    reply = Message(DONE, reply_to=questions[birch])
    with no_object_id_recompute():
        (record,) = get_object_tree(reply).children
    worse = ObjectTree(object_id=record.object_id, children=[*record.children, ObjectTree(object_id=name())])
    answer = pushed(birch, reply, ObjectTree(object_id=reply.object_id, children=[worse]))
    assert isinstance(answer, PushMessagesResponse)
    assert not answer.objects_to_push
    assert stored(link) == before
    assert birch.reply(questions[birch], DONE)
    assert membership.reports() == dict.fromkeys(MERCHANTS, ReportCode.DONE)


def test_replies_that_are_not_fetched_are_few(
    link: SuperLink,
    membership: Membership,
    assignment: Assignment,
    birch: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(flower_guard, "MAX_OPEN", 2)
    for number in range(2):
        membership.assign(assignment.model_copy(update={"block": bytes([number]) * 16}), frozenset({"birch"}))
        assert birch.reply(birch.receive(), DONE)
    membership.assign(assignment, frozenset({"birch"}))
    question = birch.receive()
    assert pushed(birch, Message(DONE, reply_to=question)) == 429
    link.state.delete_messages(link.state.get_message_ids_from_run_id(question.metadata.run_id))
    membership.assign(assignment, frozenset({"birch"}))
    assert birch.reply(birch.receive(), DONE), "what was fetched makes room"


def test_a_node_that_calls_too_often_is_told_when_to_come_back(
    monkeypatch: pytest.MonkeyPatch, make_service: Callable[..., Service], make_node: Any, keys: DevelopmentKeys,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    monkeypatch.setattr(flower_guard, "CALLS", Rate(burst=5, per_second=0.01))
    link = request.getfixturevalue("link")
    alder, birch = make_node("alder"), make_node("birch")
    for node in (alder, birch):
        link.register(node.pem)
        node.activate()
    for _ in range(5):
        alder.client.PullMessages(PullMessagesRequest(node=alder.node))
    with pytest.raises(httpx.HTTPStatusError) as error:
        alder.client.PullMessages(PullMessagesRequest(node=alder.node))
    assert error.value.response.status_code == 429
    assert 0 < int(error.value.response.headers["retry-after"]) <= 100
    birch.client.PullMessages(PullMessagesRequest(node=birch.node))


def test_the_guard_stands_before_every_handler_and_behind_the_check_of_the_key(link: SuperLink) -> None:
    app: Any = link._fleet._server.config.app
    order = [middleware.cls for middleware in app._app.user_middleware]
    assert order[-1] is FleetGuard
    assert order[-2].__name__ == "NodeAuthMiddleware"
