"""Keeps the node running in a child process, and passes assignments and reports between it and the daemon.

    with NodeKeeper(config, node_key, tell) as keeper:
        node, assignment = keeper.assignments.get()
        keeper.report(node, report)

The node is started again whenever it ends, with a pause that grows and is drawn anew each time, so that a league's
merchants don't come back all at once after an outage. The node's key goes to it through the socket that they share; it
opens no file of the merchant's but its log.
"""

import logging
import queue
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Self

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from hanse_client.children import end
from hanse_client.config import ClientConfig
from hanse_client.node_protocol import CONNECTED, NodeExit
from hanse_common.errors import ConfigError
from hanse_common.wire import MAX_DOCUMENT_BYTES

log = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 20.0
"""Seconds before a node that ended is started again. Flower refuses one for a minute after it was killed."""

STEADY_SECONDS = 60.0
"""A node that held this long was well: the next outage begins with the first pause."""

END_SECONDS = 6.0

MAX_WAITING = 4
"""Assignments that may wait while a block is served; a server that sends more is heard later, or not."""

_JITTER = secrets.SystemRandom()

_REASONS = {
    NodeExit.UNREACHABLE: "it does not answer",
    NodeExit.UNTRUSTED: "its certificate is not of the authority under connection.authority, or out of date",
    NodeExit.UNKNOWN_KEY: (
        "it was started again, or it no longer knows this node's key; if this lasts, ask the operator"
    ),
    NodeExit.REFUSED: (
        "it does not let the node in yet, as happens for a minute after a crash, or until this shop is in the league's "
        "directory"
    ),
    NodeExit.LOST: "the connection was lost",
}


class NodeKeeper:
    """One node, kept while entered. `tell` hears a line when it connects, and once of each reason of an outage."""

    def __init__(
        self, config: ClientConfig, key: ec.EllipticCurvePrivateKey, tell: Callable[[str], None]
    ) -> None:
        if config.connection is None:
            raise ConfigError("connection: missing.")
        self._server = config.connection.server
        self._authority = str(config.connection.authority)
        self._key = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        self._log = config.state / "node.log"
        self._tell = tell
        self.assignments: queue.Queue[tuple[Connection, bytes]] = queue.Queue(MAX_WAITING)
        self.connected = False
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="node", daemon=True)
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self.reason = ""
        """Why there is no connection, once that is known."""
        self._told: set[str] = set()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """End the node, in order if it will, and wait until it is gone."""
        self._ending.set()
        end(self._process, END_SECONDS)
        self._thread.join(END_SECONDS)

    def report(self, node: Connection, data: bytes) -> None:
        """Send the report to the node that asked; one that was started since would take it for another block's."""
        if node is self._connection:
            with suppress(OSError):
                node.send_bytes(data)

    def _keep(self) -> None:
        """Start the node again whenever it ends."""
        pause = FIRST_PAUSE
        self._tell(f"Connecting to {self._server}.")
        while not self._ending.is_set():
            started = time.monotonic()
            try:
                reason = self._reason(self._run_once())
            except OSError as error:  # no memory for a process, no room for its log
                reason = f"the node could not be started ({error.strerror})"
            self.connected = False
            if self._ending.is_set():
                return
            self._tell_outage(reason)
            if time.monotonic() - started > STEADY_SECONDS:
                pause = FIRST_PAUSE
            self._ending.wait(pause * _JITTER.uniform(0.7, 1.3))
            pause = min(2 * pause, LONGEST_PAUSE)

    def _run_once(self) -> int:
        """Run one node to its end and return its exit code."""
        ours, theirs = socket.socketpair()
        with self._log.open("wb") as output, theirs:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "hanse_client.flower_node"),
                    *(self._server, self._authority, str(theirs.fileno())),
                ],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._process = process
        if self._ending.is_set():
            process.kill()
        self._connection = connection = Connection(ours.detach())
        try:
            connection.send_bytes(self._key)
            if connection.recv_bytes(len(CONNECTED)) == CONNECTED:
                self.connected = True
                self._told.clear()
                self.reason = ""
                self._tell("Connected. Waiting for the league.")
            while True:  # from here on whatever comes is the server's
                self._hear(connection, connection.recv_bytes(MAX_DOCUMENT_BYTES))
        except (EOFError, OSError):
            pass  # the node ended, or sent more than any node does
        finally:
            self._connection = None
            connection.close()
        try:
            return process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()

    def _hear(self, node: Connection, data: bytes) -> None:
        try:
            self.assignments.put_nowait((node, data))
        except queue.Full:
            log.warning("An assignment was dropped: %d are waiting already.", MAX_WAITING)

    def _reason(self, code: int) -> str:
        known = _REASONS.get(NodeExit(code)) if code in set(NodeExit) else None
        return known or f"the node ended with code {code}; see {self._log}"

    def _tell_outage(self, reason: str) -> None:
        """Tell each reason of one outage once, not at every attempt: the first may not be the one that lasts."""
        self.reason = reason
        if reason not in self._told:
            self._told.add(reason)
            self._tell(f"No connection to {self._server}: {reason}. Trying again until it works.")
