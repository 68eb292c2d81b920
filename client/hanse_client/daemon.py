"""The merchant's daemon: keeps a node in the league, judges what it is asked, and serves one block at a time.

    with Daemon(config, tell) as daemon:
        daemon.run(stop)

Photos, ledger, identity and the rounds are in this process. Flower is in a child (`flower_node`), which is started
again whenever it ends; the two exchange an assignment and a report over a socket. What the server hears of a block
is a code; what the owner hears are the lines given to `tell`.
"""

import fcntl
import logging
import os
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

from hanse_client.charges import Charge
from hanse_client.config import ClientConfig
from hanse_client.node_protocol import CONNECTED, NodeExit
from hanse_client.participant import Participant, accepted_plan, printable
from hanse_client.shop import Shop
from hanse_client.stream import Limits, serve_block
from hanse_common import signing, wire
from hanse_common.credentials import fingerprint, load_node_key
from hanse_common.errors import (
    BudgetExceeded,
    ConfigError,
    HanseError,
    LedgerError,
    PlanRefused,
    SignatureInvalid,
    WireError,
)
from hanse_common.files import read_bounded
from hanse_common.plan import Plan
from hanse_common.session import Assignment, BlockReport, ReportCode, record_bytes
from hanse_common.wire import MAX_DOCUMENT_BYTES

log = logging.getLogger(__name__)

MAX_PEM_BYTES = 1 << 20
POLL_SECONDS = 0.2

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 20.0
"""Seconds before a node that ended is started again. Flower refuses one for a minute after it was killed."""

STEADY_SECONDS = 60.0
"""A node that held this long was well: the next outage begins with the first pause."""

END_SECONDS = 6.0
MAX_PATIENCE = 600.0
BLOCK_SLACK = 3600.0
"""Seconds that a block may take beyond its rounds' deadlines."""

MAX_WAITING = 4
"""Assignments that may wait while a block is served; a server that sends more is heard later, or not."""

_JITTER = secrets.SystemRandom()

_REASONS = {
    NodeExit.UNREACHABLE: "it does not answer",
    NodeExit.UNTRUSTED: "its certificate is not of the authority under connection.authority",
    NodeExit.UNKNOWN_KEY: "it no longer knows this node's key; ask the operator",
    NodeExit.REFUSED: (
        "it does not let the node in yet, as happens for a minute after a crash, or until the operator has your "
        "node.key.pub"
    ),
    NodeExit.LOST: "the connection was lost",
}


class Daemon:
    """One shop in one league.

    Raises `ConfigError` when the configuration has no connection, or keys or the authority are missing.
    """

    def __init__(self, config: ClientConfig, tell: Callable[[str], None]) -> None:
        if config.connection is None:
            raise ConfigError(
                "connection: missing; expected a section with the league's server and authority. "
                "The sample file explains it."
            )
        for path in (config.identity_path, config.node_key_path):
            if not path.exists():
                raise ConfigError(f"{path}: no such key; make your keys with hanse-client keygen.")
        self._config = config
        self._shop = Shop(config)
        self._tell = tell
        self._identity = signing.load_key(config.identity_path)
        load_node_key(config.node_key_path)
        self._authority = read_bounded(
            config.connection.authority, MAX_PEM_BYTES, "the league's certificate authority", ConfigError
        )
        fingerprint(self._authority)
        self._node = NodeKeeper(config, tell)
        self._participants: dict[bytes, Participant] = {}
        self._stop = threading.Event()
        self._lock: int | None = None

    def __enter__(self) -> Self:
        """Take the state folder. Raises `ConfigError` when another daemon has it."""
        path = self._config.state / "daemon.lock"
        self._config.state.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise ConfigError(
                f"{path}: another hanse-client runs on this state folder; stop it first, or it would count twice."
            ) from None
        self._node.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._node.stop()
        if self._lock is not None:
            os.close(self._lock)

    def run(self, stop: threading.Event) -> None:
        """Serve blocks as they come, in order, until `stop` is set."""
        self._stop = stop
        while not stop.is_set():
            try:
                node, assignment = self._node.assignments.get(timeout=POLL_SECONDS)
            except queue.Empty:
                continue
            report = self._serve(assignment)
            self._node.report(node, wire.encode(report))

    def _serve(self, data: bytes) -> BlockReport:
        """Serve the block that `data`, untrusted bytes, assigns, and return how it ended."""
        try:
            assignment = wire.decode(Assignment, data, MAX_DOCUMENT_BYTES)
        except WireError as error:
            self._tell(f"The server sent what is no assignment: {printable(str(error))}")
            return BlockReport(block=bytes(16), code=ReportCode.MALFORMED)
        try:
            code = self._take_part(assignment)
        except WireError as error:
            code, reason = ReportCode.MALFORMED, str(error)
        except SignatureInvalid as error:
            code, reason = ReportCode.SIGNATURE, str(error)
        except PlanRefused as error:
            code, reason = ReportCode.POLICY, str(error)
        except BudgetExceeded as error:
            code, reason = ReportCode.BUDGET, str(error)
        except LedgerError as error:
            code, reason = ReportCode.UNAVAILABLE, str(error)
        except Exception as error:  # nothing of what went wrong may show outside
            log.debug("A block could not be served.", exc_info=True)
            shown = str(error) if isinstance(error, HanseError) else f"{type(error).__name__}: {error}"
            code, reason = ReportCode.UNAVAILABLE, shown
        else:
            reason = ""  # of a block that was lost, the stream has told
        if reason:
            self._tell(f"Not taking part now ({code}): {printable(reason)}")
        return BlockReport(block=assignment.block, code=code)

    def _take_part(self, assignment: Assignment) -> ReportCode:
        """Judge the plan, get ready, and serve the block. Raises what speaks against it."""
        league = self._config.league
        plan = accepted_plan(
            assignment.signed_plan, bytes.fromhex(league.operator_key), self._config.policy, league.taxonomy
        )
        ledger = self._shop.ledger()
        if ledger.last_work(plan.digest) is None:
            ledger.check(Charge.of(plan))
        participant = self._participant(plan)
        cohort = plan.cohort
        name = plan.digest.hex()[:16]
        self._tell(
            f"Ready for a training: plan {name}, each {plan.training.unit} pays ε = {plan.epsilon():.3f} for all of it."
        )
        limits = Limits(
            record_bytes=record_bytes(plan.dimension),
            patience=min(max(cohort.join_deadline, cohort.upload_deadline), MAX_PATIENCE),
            deadline=assignment.rounds * (2 * cohort.join_deadline + cohort.upload_deadline) + BLOCK_SLACK,
        )
        return serve_block(
            assignment,
            self._identity,
            self._authority,
            participant.handle,
            self._stop,
            limits,
            lambda reason: self._tell(f"Out of this block: {printable(reason)}"),
        )

    def _participant(self, plan: Plan) -> Participant:
        """Return the participant for the plan's recipe; photos are looked through once for each recipe."""
        digest = plan.recipe.digest()
        if digest not in self._participants:
            self._tell("Looking through your photos; nothing leaves this machine meanwhile.")
            examples, problems = self._shop.examples(self._shop.catalog(), plan.recipe)
            self._tell(f"{len(examples)} photos are ready to train on, {len(problems)} can't be used.")
            self._participants.clear()  # one recipe at a time: examples may fill the memory
            self._participants[digest] = self._shop.participant(
                plan.recipe, examples, self._tell, on_upload=self._on_upload
            )
        return self._participants[digest]

    def _on_upload(self, plan: Plan, round_: int) -> None:
        self._tell(f"Round {round_ + 1} of {plan.training.rounds}: trained, charged, sent.")


class NodeKeeper:
    """Keeps a node running in a child process, and passes assignments and reports between it and the daemon."""

    def __init__(self, config: ClientConfig, tell: Callable[[str], None]) -> None:
        if config.connection is None:
            raise ConfigError("connection: missing.")
        self._server = config.connection.server
        self._arguments = (
            self._server,
            str(config.connection.authority),
            str(config.node_key_path),
        )
        self._log = config.state / "node.log"
        self._tell = tell
        self.assignments: queue.Queue[tuple[Connection, bytes]] = queue.Queue(MAX_WAITING)
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="node", daemon=True)
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._well = True

    def start(self) -> None:
        """Start the first node."""
        self._thread.start()

    def stop(self) -> None:
        """End the node, in order if it will, and wait until it is gone."""
        self._ending.set()
        process = self._process
        if process is not None:
            with suppress(ProcessLookupError):
                process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(END_SECONDS)
            process.kill()
            process.wait()
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
                [sys.executable, "-m", "hanse_client.flower_node", *self._arguments, str(theirs.fileno())],
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
            if connection.recv_bytes(len(CONNECTED)) == CONNECTED:
                self._well = True
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
        """Tell the owner of an outage once, not at every attempt."""
        if self._well:
            self._tell(f"No connection to {self._server}: {reason}. Trying again until it works.")
        self._well = False
