"""Parsers behind what is asked of a merchant: participant and secure aggregation, the daemon, and its node.

None of these may raise, whatever comes: each answers with a code.
"""

import copy
import hashlib
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import msgpack

from hanse_common import messages, signing, wire
from hanse_common.directory import SignedDirectory
from hanse_common.plan import Plan
from hanse_common.secagg.messages import Joined, Upload
from hanse_common.session import Assignment, BlockReport, ReportCode

from . import mutate, rounds, seeds
from .target import Parse, Target, parts_of, require

# -- a round ------------------------------------------------------------------------------------------------------


def _checked_reply(request: bytes, roster: tuple[bytes, ...], reply: bytes) -> Any:
    """Return the reply, once it is a message for servers; one that declines has a code and nothing else that is new."""
    answer = rounds.answer(reply)
    if isinstance(answer, messages.Declined):
        require(
            answer.culprit in (b"", *roster) or answer.culprit in request, "a culprit that is in no roster"
        )
        digest = answer.plan_digest
        require(digest == bytes(32) or digest in request, "a digest that is not the request's")
        bare = messages.Declined(
            **answer.work, code=messages.DeclineCode(answer.code), culprit=answer.culprit
        )
        require(wire.encode(bare) == reply, "a refusal that says more than a code")
    return answer


def _round(trip: str) -> Callable[[Path], Any]:
    @contextmanager
    def opened(folder: Path) -> Iterator[Parse]:
        shop = rounds.Shop(folder)
        rounds.request_of(trip, shop)
        session = shop.participant._session
        roster = session.roster if session else ()
        # Plan and set-up never change; the state machine with its keys is copied for each input.
        kept = {} if session is None else {id(session.plan): session.plan, id(session.setup): session.setup}
        uploads = len(shop.trainer.charges_seen)

        def parse(data: bytes) -> None:
            nonlocal uploads
            shop.participant._session = copy.deepcopy(session, dict(kept))
            shop.told.clear()
            answer = _checked_reply(data, roster, shop.participant.handle(data))
            uploads += isinstance(answer, Upload)
            require(len(shop.trainer.charges_seen) == uploads, "photos were read without an upload")
            if isinstance(answer, Upload):
                require(shop.ledger.counter == uploads, "an upload without a charge")
            for line in shop.told:
                require(
                    len(line) < 5000 and line.replace("\n", "").isprintable(),
                    "what a terminal should not print",
                )

        yield parse
        require(shop.ledger.counter == uploads, "a charge without an upload")

    return opened


def _round_seeds(trip: str) -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        return [rounds.request_of(trip, rounds.Shop(Path(folder)))]


@contextmanager
def _round_signed(folder: Path) -> Iterator[Parse]:
    """Invitations that operator and league signed: [plan, directory, round, attempt, rounds]."""
    shops = [rounds.Shop(folder / "0")]
    asked, chain = 0, seeds.charters()[:1]

    def parse(data: bytes) -> None:
        nonlocal asked
        parts = parts_of(data, bytes, bytes, int, int, int)
        if parts is None:
            return
        asked += 1
        if asked % 200 == 0:  # else one directory of the last version would make all others old
            shops.append(rounds.Shop(folder / str(asked)))
        shop = shops[-1]
        plan, directory, round_, attempt, block = parts
        fields = {
            "plan_digest": hashlib.sha256(plan).digest(),
            "round": round_,
            "attempt": attempt,
            "rounds": block,
            "signed_plan": {"plan": plan, "signature": signing.sign(seeds.OPERATOR, "plan", plan)},
            "signed_directory": SignedDirectory(charters=chain, directory=directory)
            .signed_by(seeds.LEAGUE)
            .model_dump(),
        }
        try:
            request = msgpack.packb([wire.WIRE_VERSION, messages.Invitation.kind, fields])
        except (OverflowError, ValueError):
            return
        answer = _checked_reply(request, (), shop.participant.handle(request))
        require(shop.untouched(), "an invitation was charged for, or photos were read")
        if isinstance(answer, Joined):
            found = wire.decode(Plan, plan)
            require(found.league == "test" and found.taxonomy == seeds.TAXONOMY, "a plan of another league")
            require(found.epsilon() <= rounds.POLICY.epsilon, "a plan beyond the budget")
            require(not rounds.POLICY.reasons(found, seeds.TAXONOMY), "a plan beyond the policy")
            require(round_ + block <= found.training.rounds, "rounds beyond the plan")

    yield parse


def _round_signed_seeds() -> list[bytes]:
    """Some are beyond the policy: what is near them must be refused, too."""
    listed, plan = wire.encode(seeds.directory()), seeds.plans()[0]
    plans = seeds.plans()
    for change in (
        {"noise_multiplier": 0.9, "repeats": 0},
        {"rounds": 1001, "repeats": 0, "noise_multiplier": 60.0},
    ):
        plans.append(plan.model_copy(update={"training": plan.training.model_copy(update=change)}))
    return [msgpack.packb([wire.encode(plan), listed, 0, 1, 1]) for plan in plans]


# -- the daemon, and its node -------------------------------------------------------------------------------------


@contextmanager
def _daemon(folder: Path, make: Callable[[bytes], bytes | None]) -> Iterator[Parse]:
    from hanse_client.config import ClientConfig
    from hanse_client.daemon import Daemon
    from hanse_server.development_keys import make_keys

    keys = make_keys(folder / "keys", ("localhost",), ("alder",))
    state = folder / "state"
    state.mkdir()
    settings = {
        "photos": folder / "none",
        "state": state,
        "device": "cpu",
        "league": {
            "operator_key": signing.public_bytes(seeds.OPERATOR).hex(),
            "charter": seeds.PINNED.hex(),
            "taxonomy": {"classes": seeds.TAXONOMY.classes},
        },
        "policy": {"league": "test", "epsilon": 6.0, "delta": 2e-5},
        "connection": {
            "server": "localhost:1",
            "authority": keys.authority,
            "identity": keys.merchants["alder"] / "identity.key",
            "node_key": keys.merchants["alder"] / "node.key",
        },
    }
    told: list[str] = []
    daemon = Daemon(ClientConfig.model_validate(settings), told.append)

    def parse(data: bytes) -> None:
        request = make(data)
        if request is None:
            return
        told.clear()
        report = daemon._serve(request)
        bare = BlockReport(block=report.block, code=ReportCode(report.code), nonce=report.nonce)
        require(wire.encode(bare) == wire.encode(report), "a report that says more than a code")
        require(report.code is not ReportCode.DONE, "a block was served that is none")
        require(told or report.code is ReportCode.LATER, "the owner was not told")
        for line in told:
            require(
                len(line) < 5000 and line.replace("\n", "").isprintable(), "what a terminal should not print"
            )

    yield parse


def _assignment_seeds() -> list[bytes]:
    return [wire.encode(message) for message in seeds.messages() if isinstance(message, Assignment)]


def _assignment_signed(data: bytes) -> bytes | None:
    parts = parts_of(data, bytes, bytes, int, str)
    if parts is None:
        return None
    block, plan, rounds, aggregator = parts
    signed = {"plan": plan, "signature": signing.sign(seeds.OPERATOR, "plan", plan)}
    fields = {"block": block, "signed_plan": signed, "rounds": rounds, "aggregator": aggregator}
    try:
        return bytes(msgpack.packb([wire.WIRE_VERSION, Assignment.kind, fields]))
    except (OverflowError, ValueError):
        return None


def _assignment_signed_seeds() -> list[bytes]:
    return [msgpack.packb([bytes(16), wire.encode(plan), 1, "localhost:1"]) for plan in seeds.plans()]


@contextmanager
def _node(_: Path) -> Iterator[Parse]:
    """What a Fleet server answers: [PullMessagesResponse, [an object's content, …]], objects in the tree's order."""
    from flwr.common.serde import message_from_proto
    from flwr.proto.fleet_pb2 import PullMessagesResponse
    from flwr.supercore.inflatable.inflatable_object import iterate_object_tree

    from hanse_client import flower_node
    from hanse_common.flower import from_record

    asked: list[bytes] = []
    sent: list[Any] = []
    contents: dict[str, bytes] = {}

    class Daemon:
        def ask(self, assignment: bytes) -> bytes:
            asked.append(assignment)
            return wire.encode(BlockReport(block=bytes(16), code=ReportCode.POLICY))

    def send(reply: Any, tree: Any, seconds: float) -> tuple[set[str], str]:
        sent.append(reply)
        return set(), ""

    def pull(run_id: int, object_id: str) -> bytes:
        return contents[object_id]

    callbacks = (1, None, send, None, None, pull, lambda *_: None, lambda run_id, message_id: None)
    node = flower_node._Node(callbacks, flower_node.make_app(Daemon()))

    def parse(data: bytes) -> None:
        parts = parts_of(data, bytes, list)
        if parts is None or not all(type(content) is bytes for content in parts[1]):
            return
        asked.clear()
        sent.clear()
        try:
            response = PullMessagesResponse.FromString(parts[0])
            received = message_from_proto(response.messages_list[0]), response.message_object_trees[0]
            names = [branch.object_id for branch in iterate_object_tree(received[1])]
        except Exception:  # flwr's, in the process whose end is what the daemon expects
            return
        contents.clear()
        contents.update(zip(names, parts[1], strict=False))
        node._handle(*received)
        (reply,) = sent
        require(not reply.has_error(), "an error, which has a text")
        wire.decode(BlockReport, from_record(reply.content, 1024))
        require(len(asked) <= 1 and all(type(one) is bytes for one in asked), "the daemon was asked twice")
        require(not asked or len(asked[0]) <= wire.MAX_DOCUMENT_BYTES, "more than an assignment has")

    yield parse


def _node_seeds() -> list[bytes]:
    from flwr.app import ConfigRecord, RecordDict
    from flwr.app import Message as FlowerMessage
    from flwr.app.message import remove_content_from_message
    from flwr.common.serde import message_to_proto
    from flwr.proto.fleet_pb2 import PullMessagesResponse
    from flwr.supercore.inflatable.inflatable_object import (
        get_all_nested_objects,
        get_object_tree,
        iterate_object_tree,
    )
    from flwr.supercore.task_identity import TaskIdentity

    from hanse_common.flower import to_record

    identity = {name: value for name, value in vars(TaskIdentity).items() if name.endswith("_id")}
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = (
        1  # flwr wants to know who speaks before a message is made
    )
    made = []
    contents = (
        to_record(b"an assignment"),
        RecordDict({"hanse": ConfigRecord({"message": "text"})}),
        RecordDict({"a": ConfigRecord({"x": [1, 2]}), "b": ConfigRecord({"y": 2.0})}),
    )
    for content, kind in (
        (contents[0], "train"),
        (contents[0], "query"),
        (contents[1], "train"),
        (contents[2], "train"),
    ):
        message = FlowerMessage(content, 7, kind)
        message.metadata.__dict__.update(_message_id="id", _run_id=3, _src_node_id=1)
        tree, objects = get_object_tree(message), get_all_nested_objects(message)
        bodies = [objects[node.object_id].deflate() for node in iterate_object_tree(tree)]
        bare = message_to_proto(remove_content_from_message(message))
        response = PullMessagesResponse(messages_list=[bare], message_object_trees=[tree])
        made.append(msgpack.packb([response.SerializeToString(), bodies]))
    for name, value in identity.items():
        setattr(TaskIdentity, name, value)
    return made


def targets() -> list[Target]:
    """Return the targets of this module."""
    pack = mutate.messagepack
    signed = partial(_daemon, make=_assignment_signed)
    return [
        *(
            Target(f"round-{trip}", 6_000, pack, partial(_round_seeds, trip), _round(trip), ())
            for trip in rounds.TRIPS
        ),
        Target("round-signed", 6_000, pack, _round_signed_seeds, _round_signed, ()),
        Target("assignment", 6_000, pack, _assignment_seeds, partial(_daemon, make=lambda data: data), ()),
        Target("assignment-signed", 6_000, pack, _assignment_signed_seeds, signed, ()),
        Target("node", 10_000, pack, _node_seeds, _node, ()),
    ]
