"""A merchant's node in Flower's network, as a process of its own that has no way to run what a server pushes.

    python -m hanse_client.flower_node SERVER AUTHORITY DESCRIPTOR

A stock SuperNode fetches the operator's bundle and executes it. This one speaks the same Fleet API and never asks
for a bundle: each `train` message goes to the one ClientApp written below, which hands its bytes to the merchant's
daemon over the inherited socket and replies with the report that comes back. The first bytes on that socket are the
node key, and it holds nothing else: no photo, no ledger, no identity. Every reply is a report, which is a code; no
text leaves.

flwr ends its own process when a connection fails (`flwr_exit`), and interrupts itself when a server no longer
knows it; here that ends this process alone, and the daemon starts another. Exit codes are `NodeExit`.
"""

import os
import queue
import resource
import signal
import sys
import threading
import time
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import httpx
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPushError,
    inflate_object_from_contents,
    pull_objects,
    push_object_contents_from_iterable,
)
from flwr.supercore.run import RunNotRunningException
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode import fleet_http_connection
from flwr.supernode.fleet_http_client import FleetHttpClient

from hanse_client.node_protocol import CONNECTED, NodeExit
from hanse_common import wire
from hanse_common.errors import WireError
from hanse_common.flower import from_record, to_record
from hanse_common.session import BlockReport, ReportCode
from hanse_common.wire import MAX_DOCUMENT_BYTES

MESSAGE_TYPE = "train"
MAX_OBJECTS = 8
"""An assignment is three of Flower's objects. What has more is not fetched."""

MAX_REPORT_BYTES = 1024
MAX_KEY_BYTES = 4096
MAX_MEMORY_BYTES = 4 << 30
"""Address space of this process: no answer of a server can use up the merchant's memory."""

MAX_FILE_BYTES = 16 << 20
"""Of what this process may write: its log."""

SHORTEST_PAUSE, LONGEST_PAUSE = 0.05, 1.0
"""Seconds between two questions for a message, while something is going on and when nothing is."""

LEAVE_SECONDS = 4
"""How long the farewell may take before this process ends without it."""

RETRIES, RETRY_SECONDS = 3, 15.0


class _Daemon:
    """The merchant's daemon at the other end of the socket. When it is gone, this process ends."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._reports: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    def tell(self, data: bytes) -> None:
        self._connection.send_bytes(data)

    def ask(self, assignment: bytes) -> bytes:
        """Return the report on `assignment`, when its block is done."""
        self.tell(assignment)
        return self._reports.get()

    def _listen(self) -> None:
        try:
            while True:
                self._reports.put(self._connection.recv_bytes(MAX_REPORT_BYTES))
        except (EOFError, OSError):
            # Leave in order if that works: a node that only vanishes counts as online for a minute.
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(LEAVE_SECONDS)
            os._exit(NodeExit.ORPHANED)


def make_app(daemon: _Daemon) -> ClientApp:
    """Return the only ClientApp that runs here."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        try:
            assignment = from_record(message.content, MAX_DOCUMENT_BYTES)
        except WireError:
            return Message(_report(ReportCode.MALFORMED), reply_to=message)
        return Message(to_record(daemon.ask(assignment)), reply_to=message)

    return app


def _report(code: ReportCode) -> RecordDict:
    return to_record(wire.encode(BlockReport(block=bytes(16), code=code)))


class _PlainFleetHttpClient(FleetHttpClient):
    """Flower's client, but for answers that are more than they seem.

    It would follow a redirect to wherever only the merchant's machine gets, and unpack a compressed answer to any size.
    """

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._client.follow_redirects = False
        self._client.event_hooks = {"response": [_require_plain]}


def _require_plain(response: httpx.Response) -> None:
    """Raise `httpx.DecodingError`, before its body is read, for a compressed answer."""
    if "content-encoding" in response.headers:
        raise httpx.DecodingError("found a compressed answer", request=response.request)


class _Node:
    """One connection to the Fleet API: what flwr's `http_request_response` yields, by name."""

    def __init__(self, callbacks: tuple[Any, ...], app: ClientApp) -> None:
        # The callbacks for run and bundle are dropped here: nothing can call them.
        self._node_id, self._receive, self._send, _, _, self._pull, self._push, self._confirm = callbacks
        self._app = app

    def serve(self) -> None:
        """Handle messages one at a time, in order, until the connection is lost."""
        pause = SHORTEST_PAUSE
        while True:
            received = self._receive()
            if received is None:
                time.sleep(pause)
                pause = min(1.3 * pause, LONGEST_PAUSE)
                continue
            pause = SHORTEST_PAUSE
            self._handle(*received)

    def _handle(self, envelope: Message, tree: Any) -> None:
        started = time.monotonic()
        run_id = envelope.metadata.run_id
        reply = self._reply(envelope, tree)
        try:
            self._answer(reply, run_id, time.monotonic() - started)
        except (ObjectPushError, RunNotRunningException) as error:
            # The run is over, or Flower dropped the reply's objects: nobody waits for it any more.
            print(f"A reply was not taken: {type(error).__name__}", file=sys.stderr)

    def _answer(self, reply: Message, run_id: int, seconds: float) -> None:
        with no_object_id_recompute():
            reply.metadata.__dict__["_message_id"] = reply.object_id
            objects = get_all_nested_objects(reply)
            wanted, session = self._send(reply, get_object_tree(reply), seconds)
            push_object_contents_from_iterable(
                ((object_id, objects[object_id].deflate()) for object_id in wanted if object_id in objects),
                push_object_fn=partial(self._push, run_id, session),
            )

    def _reply(self, envelope: Message, tree: Any) -> Message:
        """Return the reply, whatever came. Nothing that goes wrong here shows outside but as a code."""
        if envelope.metadata.message_type != MESSAGE_TYPE:
            return Message(_report(ReportCode.UNKNOWN), reply_to=envelope)
        try:
            object_ids = [node.object_id for node in iterate_object_tree(tree)]
            if len(object_ids) > MAX_OBJECTS:
                return Message(_report(ReportCode.MALFORMED), reply_to=envelope)
            run_id, message_id = envelope.metadata.run_id, envelope.metadata.message_id
            contents = pull_objects(
                object_ids, pull_object_fn=lambda object_id: self._pull(run_id, object_id)
            )
            message: Any = inflate_object_from_contents(tree.object_id, contents)
            message.metadata.__dict__["_message_id"] = message_id
            self._confirm(run_id, message_id)
            # Global in flwr: one run at a time, which is how they are handled.
            TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run_id, self._node_id, 1
            context = Context(
                run_id=run_id, node_id=self._node_id, node_config={}, state=RecordDict(), run_config={}
            )
            return self._app(message, context)
        except httpx.HTTPError:
            raise
        except Exception as error:
            print(f"A message could not be handled: {type(error).__name__}", file=sys.stderr)
            return Message(_report(ReportCode.MALFORMED), reply_to=envelope)


def _why(error: BaseException | None) -> NodeExit:
    """Return what an error of the first contact means."""
    seen = 0
    while error is not None and seen < 8:
        if isinstance(error, httpx.HTTPStatusError):
            known = error.response.status_code not in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN)
            return NodeExit.REFUSED if known else NodeExit.UNKNOWN_KEY
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            return NodeExit.UNTRUSTED
        error, seen = error.__cause__ or error.__context__, seen + 1
    return NodeExit.UNREACHABLE


def _leave(number: int, frame: Any) -> None:
    """End this process in order, once: a second signal must not break the farewell off."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit()


def main(server: str, authority: str, descriptor: str) -> NodeExit:
    """Connect, serve, and return why it ended."""
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_FILE_BYTES, MAX_FILE_BYTES))
    # The node sits in a session of its own, so an interrupt is flwr's way to say that it is no longer welcome.
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(NodeExit.UNKNOWN_KEY))
    socket_ = Connection(int(descriptor))
    key: Any = load_pem_private_key(socket_.recv_bytes(MAX_KEY_BYTES), None)
    daemon = _Daemon(socket_)
    fleet_http_connection.FleetHttpClient = _PlainFleetHttpClient  # type: ignore[attr-defined]
    connection = fleet_http_connection.http_request_response(
        server,
        insecure=False,
        root_certificates=Path(authority).read_bytes(),
        authentication_keys=(key, key.public_key()),
        max_retries=RETRIES,
        max_wait_time=RETRY_SECONDS,
    )
    try:
        callbacks = connection.__enter__()
    except SystemExit as ended:
        return _why(ended.__context__)
    # Leave in order when asked to: a node that is only killed counts as online for a minute.
    signal.signal(signal.SIGTERM, _leave)
    try:
        daemon.tell(CONNECTED)
        _Node(callbacks, make_app(daemon)).serve()
    except Exception as error:
        print(f"The connection was lost: {type(error).__name__}: {error}", file=sys.stderr)
    finally:
        signal.alarm(LEAVE_SECONDS)
        connection.__exit__(None, None, None)
    return NodeExit.LOST


if __name__ == "__main__":
    # os._exit: flwr's threads, heartbeats among them, must not keep a node alive that nobody asked for.
    try:
        code: int = main(*sys.argv[1:])
    except SystemExit:
        code = 0
    os._exit(code)
