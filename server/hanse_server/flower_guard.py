"""What one member's node may do to the SuperLink that all share: the bounds that Flower's Fleet API lacks.

    FastAPI(middleware=[..., Middleware(NodeAuthMiddleware), Middleware(FleetGuard, state=factory.state)])

It stands behind Flower's check of the node's key, and before Flower's handlers, which trust a node that is logged in:

- they store what a node sends as anybody's message to anybody; here it sends replies, in its own name, to the server;
- they take any reply again and again, with other objects each time; here a question has one reply;
- they keep trees of objects as their hashes say, and build a tree again wherever its hash comes up, so that 80 objects
  which each name the one before twice take 2⁸⁰ steps; here a tree is small, names nothing twice, and a part of it
  that is known already is as it is known.

So what a node makes Flower keep is one small reply for each question that it was asked and that is still open.
"""

import asyncio
import hashlib
import math
import re
from collections.abc import Callable
from typing import Any

from flwr.common.constant import SUPERLINK_NODE_ID, Status
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PushMessagesRequest, PushMessagesResponse, Reconnect
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.object_store import NoObjectInStoreError
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from hanse_server.rates import Rate, Rates

CALLS = Rate(burst=600, per_second=10.0)
"""Calls of a node. An honest one makes one or two a second, and twenty where it waits for its next message."""

MAX_OBJECTS = 16
"""Objects of a reply; an honest one has three."""

MAX_OPEN = 64
"""Replies of a node that wait to be fetched; there is one a block."""

RECONNECT_SECONDS = 5
"""What Flower's own answer to a reply says."""

MAX_RUNTIME_SECONDS = 1e7

_OBJECT_ID = re.compile(r"[0-9a-f]{64}")


class _Refused(Exception):
    """A request is not served; `status` says why."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class FleetGuard:
    """ASGI middleware around Flower's Fleet routes. `state` returns Flower's LinkState.

    Answers 400 for a reply of a form that no node sends, 403 for what is no reply of the sender's to the server, and
    429 with Retry-After for too many calls. A reply that nobody waits for, or a second one, is answered as Flower
    does it: nothing is to be uploaded.
    """

    def __init__(self, app: ASGIApp, state: Callable[[], Any]) -> None:
        self._app = app
        self._state = state
        self._calls = Rates(CALLS)
        self._replies: dict[int, dict[str, bytes]] = {}
        # Between the look at what is stored and the storing no other node's tree may come.
        self._pushing = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = scope.get("state", {}).get("protobuf_request")
        if request is None:
            await self._app(scope, receive, send)
            return
        wait = self._calls.take(_caller(request))
        if wait:
            await _refusal(429, {"retry-after": str(math.ceil(wait))})(scope, receive, send)
        elif isinstance(request, PushMessagesRequest):
            async with self._pushing:
                await self._push(request, scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _push(self, request: PushMessagesRequest, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            taken = await run_in_threadpool(self._judge, request)
        except _Refused as refused:
            await _refusal(refused.status)(scope, receive, send)
            return
        if taken:
            await self._app(scope, receive, send)
        else:
            # Where Flower's translation looks for what a handler returned.
            scope["state"]["protobuf_response"] = PushMessagesResponse(
                reconnect=Reconnect(reconnect=RECONNECT_SECONDS)
            )
            await Response()(scope, receive, send)

    def _judge(self, request: PushMessagesRequest) -> bool:
        """Return whether the handler is to see the reply. Raises `_Refused`."""
        if len(request.messages_list) != 1 or len(request.message_object_trees) != 1:
            raise _Refused(400)
        metadata, tree = request.messages_list[0].metadata, request.message_object_trees[0]
        node, question, run = request.node.node_id, metadata.reply_to_message_id, metadata.run_id
        if not question or metadata.src_node_id != node or metadata.dst_node_id != SUPERLINK_NODE_ID:
            raise _Refused(403)
        if not (_sane(request) and _small(tree) and tree.object_id == metadata.message_id):
            raise _Refused(400)
        state = self._state()
        status = state.get_run_status({run}).get(run)
        if status is None or status.status != Status.RUNNING:
            return True  # the handler says so, before it stores anything
        waiting = state.get_message_ids_from_run_id(run)
        if question not in waiting:
            return False
        return self._is_first(node, question, tree, waiting, state.object_store)

    def _is_first(self, node: int, question: str, tree: ObjectTree, waiting: set[str], store: Any) -> bool:
        """Return whether this is the node's one reply to the question, or the same again. Raises `_Refused`."""
        replies = self._replies.setdefault(node, {})
        digest = hashlib.sha256(tree.SerializeToString(deterministic=True)).digest()
        if question in replies:
            return replies[question] == digest
        if not all(_known_alike(part, store) for part in _parts(tree)):
            return False
        if len(replies) >= MAX_OPEN:
            replies = self._replies[node] = {
                asked: kept for asked, kept in replies.items() if asked in waiting
            }
        if len(replies) >= MAX_OPEN:
            raise _Refused(429)
        replies[question] = digest
        return True


def _refusal(status: int, headers: dict[str, str] | None = None) -> Response:
    # Flower's translation lets no other errors through than JSON.
    return JSONResponse({"detail": "refused"}, status_code=status, headers=headers)


def _caller(request: Any) -> bytes | int:
    """Return whose call it is; Flower has checked that it is theirs."""
    if isinstance(request, ActivateNodeRequest):
        return request.public_key
    node: int = request.node.node_id if hasattr(request, "node") else request.node_id
    return node


def _sane(request: PushMessagesRequest) -> bool:
    """Return whether the numbers that Flower stores, adds up and compares are numbers."""
    metadata, runtimes = request.messages_list[0].metadata, request.clientapp_runtime_list
    return (
        math.isfinite(metadata.created_at)
        and math.isfinite(metadata.ttl)
        and all(0.0 <= seconds <= MAX_RUNTIME_SECONDS for seconds in runtimes)
    )


def _parts(tree: ObjectTree) -> list[ObjectTree]:
    """Return the tree and all trees in it, as far as they are few; one more than that where they are not."""
    found: list[ObjectTree] = []
    todo = [tree]
    while todo and len(found) <= MAX_OBJECTS:
        found.append(todo.pop())
        todo.extend(found[-1].children)
    return found


def _small(tree: ObjectTree) -> bool:
    """Return whether the tree has few objects, none of them twice, under names that are hashes."""
    names = [part.object_id for part in _parts(tree)]
    return (
        len(names) <= MAX_OBJECTS and len(set(names)) == len(names) and all(map(_OBJECT_ID.fullmatch, names))
    )


def _known_alike(part: ObjectTree, store: Any) -> bool:
    """Return whether Flower would build the same tree under this name again, if it knows the name."""
    if part.object_id not in store:
        return True
    try:
        return _shape(store.get_object_tree(part.object_id)) == _shape(part)
    except NoObjectInStoreError:
        return False


def _shape(tree: ObjectTree) -> tuple[str, frozenset[Any]]:
    return tree.object_id, frozenset(_shape(child) for child in tree.children)
