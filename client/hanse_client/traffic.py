"""How many bytes the trainings and new recognizers moved this month, for those who pay for each.

    traffic = Traffic(state / "traffic.json", Network(monthly_megabytes=500))
    traffic.require_room(plan, rounds)          # raises before a block that would not fit
    traffic.add(len(request) + len(reply))

It is a limit on cost, not on privacy: a count that was lost begins anew.
"""

import json
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from pydantic import Field

from hanse_common.config import Section
from hanse_common.errors import PlanRefused
from hanse_common.files import write_atomically
from hanse_common.plan import Plan
from hanse_common.secagg.messages import MAX_SETUP_BYTES

MAX_FILE_BYTES = 1024
SAVED_EVERY = 1 << 20
"""Bytes between two writes of the file."""


class Network(Section):
    """The section `network`: `monthly_megabytes`, the most that may be moved in a calendar month (UTC)."""

    monthly_megabytes: Annotated[int, Field(ge=1, le=1 << 30)] | None = None


class Traffic:
    """The count of this month, kept in the file `path`. Threads may share it."""

    def __init__(self, path: Path, network: Network) -> None:
        self._path = path
        self._limit = network.monthly_megabytes
        self._month, self._bytes = self._load()
        self._saved = self._bytes
        self._lock = threading.Lock()

    @property
    def megabytes(self) -> float:
        """What was moved this month, in units of 10⁶ bytes."""
        with self._lock:
            self._turn()
            return self._bytes / 1e6

    def require_room(self, plan: Plan, rounds: int) -> None:
        """Raise `PlanRefused` unless `rounds` rounds of the plan surely fit into this month."""
        expected = rounds * 4 * (plan.dimension + plan.model_dimension) + 2 * MAX_SETUP_BYTES
        reason = self.exceeded_by(expected, "these rounds may move")
        if reason is not None:
            raise PlanRefused(reason)

    def exceeded_by(self, expected: int, what: str) -> str | None:
        """Return why `expected` bytes, of which `what` tells, are not allowed in this month; None when they are."""
        if self._limit is None or self.megabytes + expected / 1e6 <= self._limit:
            return None
        return (
            f"traffic: {self.megabytes:.0f} MB were moved this month and {what} {expected / 1e6:.0f}; you allow "
            f"{self._limit} (network.monthly_megabytes)."
        )

    def add(self, count: int) -> None:
        """Count bytes that were moved."""
        with self._lock:
            self._turn()
            self._bytes += count
            due = self._bytes - self._saved >= SAVED_EVERY
        if due:
            self.save()

    def save(self) -> None:
        """Write the file. One that can't be written is left: training does not depend on it."""
        try:
            write_atomically(
                self._path, json.dumps({"month": self._month, "bytes": self._bytes}).encode() + b"\n"
            )
            self._saved = self._bytes
        except OSError:
            pass

    def _turn(self) -> None:
        """Begin anew in a new month."""
        month = _month()
        if month != self._month:
            self._month, self._bytes, self._saved = month, 0, 0

    def _load(self) -> tuple[str, int]:
        try:
            found = json.loads(self._path.read_bytes()[:MAX_FILE_BYTES])
            month, count = found["month"], found["bytes"]
        except (OSError, ValueError, KeyError, TypeError):
            return _month(), 0
        sound = isinstance(month, str) and type(count) is int and 0 <= count < 1 << 62
        return (month, count) if sound else (_month(), 0)


def _month() -> str:
    return datetime.now(UTC).strftime("%Y-%m")
