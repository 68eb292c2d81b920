"""Tells everyone who should know what happens: the operator, the log, the metrics, the page, the records.

    reporter = Reporter(tell, state, metrics, live)
    reporter.say("merchants", "4 of 5 merchants are there.")
    reporter.round(report)

One place, so that nothing that happens is in one of them and not in another.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hanse_common.errors import HanseError, RoundFailed, StorageError
from hanse_server import logs
from hanse_server.coordinator import LeagueDirectory
from hanse_server.league import RoundReport
from hanse_server.live import Live
from hanse_server.metrics import Failure, Metrics
from hanse_server.storage import State
from hanse_server.storage.schema import plain

log = logging.getLogger(__name__)

MAX_REASON = 1000

Tell = Callable[["Event"], None]


@dataclass(frozen=True)
class Event:
    """Something the operator hears: a kind for programs, a text for people, and the facts in it."""

    kind: str
    text: str
    facts: dict[str, Any] = field(default_factory=dict)


class Reporter:
    """Hears what happens in one server and passes it on. `tell` hears events, from several threads."""

    def __init__(self, tell: Tell, state: State, metrics: Metrics, live: Live) -> None:
        self._tell = tell
        self._state = state
        self.metrics = metrics
        self.live = live
        self._spent: dict[str, float] = {}

    def say(self, kind: str, text: str, **facts: Any) -> None:
        """Pass on an event that has no records of its own."""
        self._tell(Event(kind, text, facts))
        self.live.line(time.time(), kind, text)
        logs.emit(log, kind, text, **facts)

    def round(self, report: RoundReport, rounds: int) -> None:
        """Pass on a finished round of `rounds`."""
        outcome = report.outcome
        text = f"Round {report.round + 1} of {rounds}: {len(outcome.uploaded)} merchants."
        text += "".join(f" {name} dropped out." for name in outcome.dropped)
        text += "".join(f" {name} declined ({code})." for name, code in sorted(outcome.declined.items()))
        text += "".join(f" {name}: {reason}." for name, reason in sorted(outcome.blamed.items()))
        for failure in outcome.failures:
            self._failed(failure)
            text += f" Before: {failure}"
        self.metrics.round_done(
            uploaded=len(outcome.uploaded),
            dropped=len(outcome.dropped),
            declined=len(outcome.declined),
            blamed=len(outcome.blamed),
            seconds=report.seconds,
            norm=outcome.norm,
            norm_bound=outcome.bound,
        )
        self.live.note(round=report.round + 1, rounds=rounds)
        self.say(
            "round",
            text,
            round=report.round + 1,
            rounds=rounds,
            uploaded=list(outcome.uploaded),
            dropped=list(outcome.dropped),
            declined=dict(outcome.declined),
            blamed=sorted(outcome.blamed),
        )

    def spent(self, name: str, epsilon: float) -> None:
        """Pass on the ε that a merchant lets the operator know, which it has spent in all."""
        self._state.history.spent(name, epsilon)
        self._spent[name] = epsilon
        self.metrics.spent(len(self._spent), max(self._spent.values()))
        self.say("spent", f"{name} has spent ε = {epsilon:.3f} in all.", merchant=name, epsilon=epsilon)

    def directory(self, directory: LeagueDirectory) -> None:
        """Pass on the directory that is in use."""
        opened = directory.opened
        self._state.history.see_directory(opened)
        ends = min([opened.expires, *(entry.expires for entry in opened.entries)])
        self.metrics.directory(opened.version, ends - time.time())
        self.live.note(listed=tuple(sorted(directory.identities)))

    def ended(self, error: Exception | None) -> tuple[str, str]:
        """Return a run's last state and reason, once the metrics know."""
        self.metrics.training(False)
        self.live.note(phase="idle", trip="")
        if error is None:
            return "finished", ""
        if isinstance(error, RoundFailed):
            for attempt in error.attempts or (error,):
                self._failed(attempt)
        if isinstance(error, StorageError):
            self.metrics.round_failed(Failure.STORAGE)
        return "failed", str(error) if isinstance(error, HanseError) else type(error).__name__

    def _failed(self, failure: RoundFailed) -> None:
        """Pass on an attempt at a round that came to nothing: merchants may have paid for it."""
        self.metrics.round_failed(Failure(failure.why))
        self._state.audit.append("attempt-failed", why=failure.why, reason=plain(str(failure), MAX_REASON))
