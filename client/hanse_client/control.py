"""What the daemon and its owner's commands say to each other, through files in the state folder.

    control = Control(config.state)
    control.pause(None)                      # hanse-client pause
    control.paused_until(datetime.now(UTC))  # the daemon looks
    control.publish(status)                  # the daemon says how it is
    control.status()                         # hanse-client status

Files outlive both sides: a pause holds over a restart, and a status that nobody keeps up any more can be told from one
that somebody does, as a running daemon holds a lock.
"""

import fcntl
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from hanse_common.errors import ConfigError
from hanse_common.files import write_atomically

FOR_GOOD = datetime.max.replace(tzinfo=UTC)
MAX_STATUS_BYTES = 1 << 16
LOCK_TRIES, LOCK_SECONDS = 20, 0.05
"""Who looks whether a daemon runs holds the lock for a moment, too."""

_ADDRESS = re.compile(r"^[][A-Za-z0-9.:-]{1,300}$")


class State(StrEnum):
    """What a daemon does."""

    CONNECTING = "connecting"
    WAITING = "waiting"
    TRAINING = "training"
    PAUSED = "paused"
    CLOSED = "closed"
    """Outside the days and hours of the policy."""
    STOPPED = "stopped"


class Status(BaseModel):
    """How the daemon is, as of `updated` (UTC).

    Attributes:
        since: since when it is in `state`.
        note: a sentence for the owner.
        plan, round, rounds: the training that it is in, or was last; rounds count from 1.
        photos, problems: how many photos are ready to train on, and how many can't be used; None before a first look.
        preparing: how many photos are embedded of how many that must be, while that goes on.
        waiting_plans: how many plans wait for the owner's word.
        megabytes: what was moved this month.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: str
    pid: int
    started: datetime
    updated: datetime
    state: State
    since: datetime
    note: str
    server: str
    plan: str | None = None
    round: int = 0
    rounds: int = 0
    photos: int | None = None
    problems: int | None = None
    preparing: tuple[int, int] | None = None
    waiting_plans: int = 0
    megabytes: float = 0.0
    paused_until: datetime | None = None


class Control:
    """The files `daemon.lock`, `paused`, `status.json` and `aggregator` in the folder `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = folder / "daemon.lock"
        self._paused = folder / "paused"
        self._status = folder / "status.json"
        self._aggregator = folder / "aggregator"

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Be the one daemon of this folder. Raises `ConfigError` when there is another."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if not any(_locked(descriptor) for _ in range(LOCK_TRIES)):
                raise ConfigError(
                    f"{self._lock}: another hanse-client runs on this state folder; stop it first, or it would count "
                    "twice."
                )
            yield
        finally:
            os.close(descriptor)

    def is_held(self) -> bool:
        """Return whether a daemon runs on this folder."""
        try:
            descriptor = os.open(self._lock, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
        finally:
            os.close(descriptor)
        return False

    def pause(self, length: timedelta | None) -> datetime:
        """Have the daemon take part in nothing for `length`, or until `resume`; return until when.

        Raises `ConfigError` when that can't be written down.
        """
        until = FOR_GOOD if length is None else datetime.now(UTC) + length
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_atomically(self._paused, until.isoformat().encode())
        except OSError as error:
            raise ConfigError(f"{self._paused}: cannot be written ({error.strerror}).") from None
        return until

    def resume(self) -> None:
        """End the pause, if there is one."""
        self._paused.unlink(missing_ok=True)

    def paused_until(self, now: datetime) -> datetime | None:
        """Return until when the owner has paused the daemon, None when it is not paused at `now` (UTC).

        A file that can't be understood pauses for good: whoever wrote it meant to.
        """
        try:
            until = datetime.fromisoformat(self._paused.read_text(encoding="ascii").strip())
            until = until if until.tzinfo else until.replace(tzinfo=UTC)
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            return FOR_GOOD
        return until if now < until else None

    def note_aggregator(self, address: str) -> None:
        """Remember where the rounds are, for the doctor and for updates. A disk that is full forgets it."""
        with suppress(OSError):
            write_atomically(self._aggregator, address.encode())

    def aggregator(self) -> str | None:
        """Return where the rounds were last, host:port; None before the first."""
        try:
            found = self._aggregator.read_text(encoding="ascii")
        except (OSError, ValueError):
            return None
        return found if _ADDRESS.fullmatch(found) else None

    def publish(self, status: Status) -> None:
        """Write the status. A disk that is full keeps the one before."""
        with suppress(OSError):
            write_atomically(self._status, status.model_dump_json().encode())

    def status(self) -> Status | None:
        """Return the last status, `STOPPED` where no daemon runs any more; None when there was none."""
        try:
            status = Status.model_validate_json(self._status.read_bytes()[:MAX_STATUS_BYTES])
        except (OSError, ValidationError):
            return None
        if self.is_held():
            return status
        return status.model_copy(update={"state": State.STOPPED, "note": "The daemon does not run."})


def _locked(descriptor: int) -> bool:
    """Return whether the lock was taken; if not, wait a moment."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        time.sleep(LOCK_SECONDS)
        return False
    return True
