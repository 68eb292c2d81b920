"""The merchant's daemon: keeps a node in the league, judges what it is asked, and serves one block at a time.

    with Daemon(config, tell) as daemon:
        daemon.run(stop)

Photos, ledger, identity and the rounds are in this process. Flower is in a child (`node_keeper`), the owner's page in
another (`page_keeper`); both are started again whenever they end. What the server hears of a block is a code; what the
owner hears are the lines given to `tell`, and the journal has them, too.

It takes part while the owner has not paused it and the schedule lets it. When it is to end, it finishes a round that
it has paid for, if that takes no longer than `FAREWELL_SECONDS`, and abandons what else there is.
"""

import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

from hanse_client.approvals import Approvals, Standing
from hanse_client.charges import Charge
from hanse_client.config import ClientConfig
from hanse_client.control import FOR_GOOD, Control, State, Status
from hanse_client.explanation import about
from hanse_client.journal import Journal
from hanse_client.keys import load_identity, load_node
from hanse_client.node_keeper import NodeKeeper
from hanse_client.page_keeper import PageKeeper
from hanse_client.participant import Participant, accepted_plan, printable
from hanse_client.preparation import Preparation, Ready
from hanse_client.shop import Shop
from hanse_client.stream import Limits, serve_block
from hanse_client.traffic import Traffic
from hanse_client.updates import UpdateKeeper, Updates
from hanse_common import wire
from hanse_common.credentials import fingerprint
from hanse_common.errors import (
    BudgetExceeded,
    ConfigError,
    HanseError,
    LedgerError,
    PlanRefused,
    RunStopped,
    SignatureInvalid,
    WireError,
    WireVersionUnknown,
)
from hanse_common.files import read_bounded
from hanse_common.plan import Plan
from hanse_common.session import Assignment, BlockReport, ReportCode, record_bytes
from hanse_common.wire import MAX_DOCUMENT_BYTES

log = logging.getLogger(__name__)

MAX_PEM_BYTES = 1 << 20
POLL_SECONDS = 0.2
MAX_PATIENCE = 600.0
BLOCK_SLACK = 3600.0
"""Seconds that a block may take beyond its rounds' deadlines."""

FAREWELL_SECONDS = 20.0
"""How long a round that was paid for may still take when the daemon is to end or pause."""

STATUS_SECONDS = 5.0
"""How old the published status may get while nothing changes."""


class _Later(Exception):
    """The league may ask again in a while; `reason` is for the owner."""


class Daemon:
    """One shop in one league. `tell` hears the owner's lines; `source` is the configuration's file, for the page.

    Raises `ConfigError` when the configuration has no connection, or keys or the authority are missing.
    """

    def __init__(self, config: ClientConfig, tell: Callable[[str], None], source: Path | None = None) -> None:
        if config.connection is None:
            raise ConfigError(
                "connection: missing; expected a section with the league's server and authority. "
                "The sample file explains it."
            )
        self._config = config
        self._server = config.connection.server
        self._tell = tell
        self._source = source
        self._identity = load_identity(config)
        self._node_key = load_node(config)
        self._authority = read_bounded(
            config.connection.authority, MAX_PEM_BYTES, "the league's certificate authority", ConfigError
        )
        fingerprint(self._authority)
        self._shop = Shop(config)
        self._control = Control(config.state)
        self._journal = Journal(config.state)
        self._approvals = Approvals(config.plans_path)
        self._traffic = Traffic(config.state / "traffic.json", config.network)
        self._preparation = Preparation(self._shop, self._note)
        updates = Updates(config, self._identity, self._authority, self._traffic)
        self._updates = UpdateKeeper(updates, self._may_update, self._note)
        self._node: NodeKeeper | None = None
        self._participant: tuple[Ready, Participant] | None = None
        self._stop = threading.Event()
        self._open = ExitStack()
        self._started = self._since = datetime.now(UTC)
        self._state, self._text = State.CONNECTING, ""
        self._plan, self._round, self._rounds = "", 0, 0
        self._published = 0.0

    def __enter__(self) -> Self:
        """Take the state folder and start what runs beside. Raises `ConfigError` when another daemon has it."""
        with self._open as stack:
            stack.enter_context(self._control.hold())
            stack.enter_context(self._preparation)
            stack.enter_context(self._updates)
            if self._config.page is not None and self._source is not None:
                stack.enter_context(PageKeeper(self._source, self._config, self._note))
            self._open = stack.pop_all()
        self._journal.note("started", "The daemon was started.", version=version("hanse"))
        return self

    def __exit__(self, *exception: object) -> None:
        self._set_node(False)
        self._traffic.save()
        self._journal.note("stopped", "The daemon was stopped.")
        self._publish(State.STOPPED, "The daemon does not run.")
        self._open.close()

    def run(self, stop: threading.Event) -> None:
        """Serve blocks as they come, in order, until `stop` is set."""
        self._stop = stop
        while not stop.is_set():
            closed = self._closed()
            self._set_node(closed is None)
            if closed is not None or self._node is None:
                self._publish(*(closed or (State.CONNECTING, "")))
                stop.wait(POLL_SECONDS)
                continue
            reason = self._node.reason
            connecting = f"No connection to {self._server}{f': {reason}' if reason else ' yet'}."
            waiting = (State.WAITING, "Connected. Waiting for the league.")
            self._publish(*(waiting if self._node.connected else (State.CONNECTING, connecting)))
            try:
                node, assignment = self._node.assignments.get(timeout=POLL_SECONDS)
            except queue.Empty:
                continue
            self._answer(node, assignment)

    def _answer(self, node: Connection, assignment: bytes) -> None:
        report = self._serve(assignment)
        if self._node is not None:
            self._node.report(node, wire.encode(report))
        self._updates.nudge()

    def _may_update(self) -> bool:
        """Return whether a released recognizer may be looked for now. For any thread."""
        node = self._node
        return node is not None and node.connected and self._closed() is None

    def _set_node(self, wanted: bool) -> None:
        """Have a node or none: outside its hours the daemon keeps no connection."""
        if wanted and self._node is None:
            self._node = NodeKeeper(
                self._config, self._node_key, lambda text: self._note("connection", text)
            ).__enter__()
        elif not wanted and self._node is not None:
            self._node.__exit__(None, None, None)
            self._node = None

    def _closed(self) -> tuple[State, str] | None:
        """Return why the daemon takes part in nothing now, or None."""
        until = self._control.paused_until(datetime.now(UTC))
        if until is not None:
            when = "until you say resume" if until == FOR_GOOD else f"until {until.astimezone():%d %B, %H:%M}"
            return State.PAUSED, f"Paused {when}."
        if not self._config.schedule.open_at(datetime.now()):
            return State.CLOSED, f"Outside its hours ({self._config.schedule.describe()})."
        return None

    def _serve(self, data: bytes) -> BlockReport:
        """Serve the block that `data`, untrusted bytes, assigns, and return how it ended."""
        try:
            assignment = wire.decode(Assignment, data, MAX_DOCUMENT_BYTES)
        except WireError as error:
            self._note("declined", f"The server sent what is no assignment: {printable(str(error))}")
            unknown = isinstance(error, WireVersionUnknown)
            return BlockReport(block=bytes(16), code=ReportCode.VERSION if unknown else ReportCode.MALFORMED)
        try:
            code = self._take_part(assignment)
        except _Later as later:
            code, reason = ReportCode.LATER, str(later)
        except WireVersionUnknown as error:
            code, reason = ReportCode.VERSION, f"{error} Install it here: pip install --upgrade hanse"
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
        if reason and code is not ReportCode.LATER:
            self._note("declined", f"Not taking part now ({code}): {printable(reason)}", code=code)
        return BlockReport(block=assignment.block, code=code, epsilon=self._reported_epsilon())

    def _take_part(self, assignment: Assignment) -> ReportCode:
        """Judge the plan, get ready, and serve the block. Raises what speaks against it."""
        league, config = self._config.league, self._config
        plan = accepted_plan(
            assignment.signed_plan, bytes.fromhex(league.operator_key), config.policy, league.taxonomy
        )
        self._traffic.require_room(plan, assignment.rounds)
        ledger = self._shop.ledger()
        if ledger.last_work(plan.digest) is None:
            ledger.check(Charge.of(plan))
        self._require_approval(plan, assignment)
        ready = self._preparation.ready(plan.recipe)
        if ready is None:
            raise _Later("the photos are being prepared.")
        participant = self._participant_of(ready)
        cohort = plan.cohort
        self._plan, self._rounds, self._round = plan.digest.hex(), plan.training.rounds, 0
        self._note(
            "ready",
            f"Ready for a training: plan {self._plan[:16]}, each {about(plan.training)} pays ε = {plan.epsilon():.3f} "
            "for all of it.",
            plan=self._plan,
        )
        self._control.note_aggregator(assignment.aggregator)
        self._publish(State.TRAINING, "In a training.")
        limits = Limits(
            record_bytes=record_bytes(max(plan.dimension, plan.model_dimension)),
            patience=min(max(cohort.join_deadline, cohort.upload_deadline), MAX_PATIENCE),
            deadline=assignment.rounds * (2 * cohort.join_deadline + cohort.upload_deadline) + BLOCK_SLACK,
        )

        def handle(request: bytes) -> bytes:
            reply = participant.handle(request)
            self._publish(State.TRAINING, f"In a training: round {self._round} of {self._rounds}.")
            return reply

        try:
            return serve_block(
                assignment,
                self._identity,
                self._authority,
                handle,
                _Farewell(lambda: self._stop.is_set() or self._closed() is not None, participant),
                limits,
                lambda reason: self._note("lost", f"Out of this block: {printable(reason)}"),
                self._traffic.add,
            )
        finally:
            self._traffic.save()

    def _require_approval(self, plan: Plan, assignment: Assignment) -> None:
        """Raise `_Later` while the owner is to be asked, `PlanRefused` when the owner said no."""
        known = self._approvals.list().get(plan.digest.hex())
        if known is Standing.REFUSED:
            raise PlanRefused("you refused this plan (hanse-client refuse).")
        if self._config.policy.approval == "automatic":
            return
        standing = self._approvals.standing(plan.digest, assignment.signed_plan)
        if standing is Standing.WAITING:
            if known is None:
                name = plan.digest.hex()[:16]
                self._note(
                    "approval",
                    f"Plan {name} waits for your word: hanse-client explain {name}, then approve or refuse.",
                    plan=plan.digest.hex(),
                )
            raise _Later("the plan waits for its owner's word.")

    def _participant_of(self, ready: Ready) -> Participant:
        """Return the participant over these photos."""
        if self._participant is None or self._participant[0] is not ready:
            participant = self._shop.participant(
                ready.recipe,
                ready.examples,
                lambda text: self._note("declined", text),
                on_upload=self._on_upload,
                identity=self._identity,
                wait=self._wait,
            )
            self._participant = ready, participant
        return self._participant[1]

    def _on_upload(self, plan: Plan, round_: int) -> None:
        self._round = round_ + 1
        self._note(
            "round",
            f"Round {round_ + 1} of {plan.training.rounds}: trained, charged, sent.",
            plan=plan.digest.hex(),
            round=round_ + 1,
        )

    def _wait(self, seconds: float) -> None:
        """Wait for an upload's slot. Raises `RunStopped` when it is far and the daemon is to end: none leaves early."""
        if seconds > FAREWELL_SECONDS and self._stop.wait(seconds - FAREWELL_SECONDS):
            raise RunStopped("the upload's slot is too far to be waited for.")
        time.sleep(min(seconds, FAREWELL_SECONDS))

    def _reported_epsilon(self) -> float | None:
        if "epsilon" not in self._config.policy.report:
            return None
        try:
            return min(self._shop.ledger().spent().epsilon, 1e6)
        except HanseError:
            return None

    def _note(self, kind: str, text: str, **facts: Any) -> None:
        """Write an event down and tell it. Never raises: threads that must go on call it."""
        self._journal.note(kind, text, **facts)
        try:
            self._tell(text)
        except (Exception, SystemExit):  # nobody reads the lines any more, and rich then ends the thread
            log.info("A line could not be told.")

    def _publish(self, state: State, note: str) -> None:
        """Let the owner's commands and page see how things are, when they changed and from time to time."""
        now = datetime.now(UTC)
        if (state, note) == (self._state, self._text) and time.monotonic() - self._published < STATUS_SECONDS:
            return
        if state is not self._state:
            self._since = now
        self._state, self._text, self._published = state, note, time.monotonic()
        counts = self._preparation.counts or (None, None)
        waiting = sum(standing is Standing.WAITING for standing in self._approvals.list().values())
        paused = self._control.paused_until(now)
        self._control.publish(
            Status(
                version=version("hanse"),
                pid=os.getpid(),
                started=self._started,
                updated=now,
                state=state,
                since=self._since,
                note=note,
                server=self._server,
                plan=self._plan or None,
                round=self._round,
                rounds=self._rounds,
                photos=counts[0],
                problems=counts[1],
                preparing=self._preparation.progress,
                waiting_plans=waiting,
                megabytes=round(self._traffic.megabytes, 1),
                paused_until=paused,
            )
        )


class _Farewell(threading.Event):
    """Set once `wanted` says so, but for a round that is paid for and not over, for which it waits a while."""

    def __init__(self, wanted: Callable[[], bool], participant: Participant) -> None:
        super().__init__()
        self._wanted = wanted
        self._participant = participant
        self._since: float | None = None

    def is_set(self) -> bool:
        if not super().is_set() and self._wanted():
            now = time.monotonic()
            self._since = self._since or now
            if not self._participant.owes or now - self._since > FAREWELL_SECONDS:
                self.set()
        return super().is_set()
