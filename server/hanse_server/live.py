"""What goes on at this moment, in memory: for the page, which may look at any time, from another thread.

    live = Live()
    live.trip("upload", answered=3, asked=5)
    live.snapshot().trip

Nothing of it lasts: what must is in the records.
"""

import threading
from collections import deque
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

MAX_LINES = 200
SEEN_NUMBERS = 64 * 64
"""How many numbers of an upload and of a sum are kept to be shown."""

TRIPS = ("joined", "shares", "ready", "upload", "agreed", "unmasked")
"""In the order of a round; the first three are of a set-up."""


@dataclass(frozen=True)
class Seen:
    """The first numbers of one merchant's masked upload, as they came, and of the sum of all, (≤ 4096,) uint32."""

    merchant: str = ""
    upload: NDArray[np.uint32] | None = None
    total: NDArray[np.uint32] | None = None


@dataclass(frozen=True)
class Snapshot:
    """One moment. `phase` is idle, gathering, training or evaluating; rounds count from 1, 0 is none yet.

    `trips` holds for each trip of the present round how many answered and how many were asked.
    """

    phase: str = "idle"
    run: int | None = None
    round: int = 0
    rounds: int = 0
    listed: tuple[str, ...] = ()
    online: tuple[str, ...] = ()
    connected: tuple[str, ...] = ()
    needed: int = 0
    trip: str = ""
    trips: tuple[tuple[str, int, int], ...] = ()
    seen: Seen = Seen()
    lines: tuple[tuple[float, str, str], ...] = ()


class Live:
    """Takes in what happens and gives out snapshots."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._now = Snapshot()
        self._lines: deque[tuple[float, str, str]] = deque(maxlen=MAX_LINES)
        self._upload: tuple[str, NDArray[np.uint32]] | None = None

    def snapshot(self) -> Snapshot:
        """Return this moment."""
        with self._lock:
            return replace(self._now, lines=tuple(self._lines))

    def note(self, **changes: object) -> None:
        """Change fields of the snapshot."""
        with self._lock:
            self._now = replace(self._now, **changes)  # type: ignore[arg-type]

    def line(self, time: float, kind: str, text: str) -> None:
        """Add a line of what happened, at `time`, in seconds since 1970."""
        with self._lock:
            self._lines.append((time, kind, text))

    def trip(self, kind: str, answered: int, asked: int) -> None:
        """Note how far a trip is; a round's first trip forgets those of the round before."""
        with self._lock:
            before = self._now.trips
            if kind == TRIPS[0] and answered == 0:
                before = ()
            elif kind == "upload" and answered == 0:
                before = tuple(one for one in before if one[0] in TRIPS[:3])
            others = tuple(one for one in before if one[0] != kind)
            self._now = replace(self._now, trip=kind, trips=(*others, (kind, answered, asked)))

    def watch(self, merchant: str, residues: NDArray[np.uint32]) -> None:
        """See a masked upload, or with the name "" the sum; the first of each round is kept, in part."""
        if merchant and self._upload is None:
            self._upload = merchant, residues[:SEEN_NUMBERS].copy()
        elif not merchant and self._upload is not None:
            name, upload = self._upload
            self.note(seen=Seen(name, upload, residues[:SEEN_NUMBERS].copy()))
            self._upload = None
