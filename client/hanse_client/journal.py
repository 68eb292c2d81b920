"""What happened, for the owner: the last some thousand events, in a file that never grows large.

    journal = Journal(state)
    journal.note("round", "Round 3 of 60: trained, charged, sent.", plan="7de4…", round=3)
    for event in journal.recent(50): print(event.time, event.text)

Each event is a line of JSON. It is for the owner's eyes on the owner's machine, and the ledger, not this, says what was
spent. A disk that is full loses events, not the training.
"""

import logging
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

log = logging.getLogger(__name__)

MAX_BYTES = 1 << 20
"""Size at which the file is put aside and another begun; the one put aside before goes."""

MAX_TEXT = 2000


class Event(BaseModel):
    """One event: when (UTC), a kind for programs, a text for people, and the facts in it."""

    model_config = ConfigDict(frozen=True)

    time: datetime
    kind: str
    text: str
    facts: dict[str, Any] = {}


class Journal:
    """The files `journal.jsonl` and `journal.1.jsonl` in the folder `folder`."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "journal.jsonl"
        self._before = folder / "journal.1.jsonl"
        self._lock = threading.Lock()

    def note(self, kind: str, text: str, **facts: Any) -> None:
        """Write an event down. Never raises."""
        try:
            # What a file system calls a file may be no text.
            sound = text[:MAX_TEXT].encode("utf-8", "backslashreplace").decode()
            event = Event(time=datetime.now(UTC), kind=kind, text=sound, facts=facts)
            line = event.model_dump_json().encode() + b"\n"
            with self._lock:
                if self._path.exists() and self._path.stat().st_size + len(line) > MAX_BYTES:
                    self._path.replace(self._before)
                with self._path.open("ab") as file:
                    file.write(line)
                self._path.chmod(0o600)
        except (OSError, ValueError) as error:
            log.warning("An event could not be written down (%s).", error)

    def recent(self, count: int) -> list[Event]:
        """Return the last `count` events, oldest first. Lines that were damaged are left out."""
        found: list[Event] = []
        for path in (self._path, self._before):
            if len(found) >= count:
                break
            found = _events(path) + found
        return found[-count:] if count else []


def _events(path: Path) -> list[Event]:
    try:
        data = path.read_bytes()[: 2 * MAX_BYTES]
    except OSError:
        return []
    events = []
    for line in data.splitlines():
        try:
            events.append(Event.model_validate_json(line))
        except ValidationError:
            continue
    return events
