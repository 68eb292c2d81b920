"""Room for large records that come in: how much may be in memory at once, and whose turn it is.

    room = Room(slice_seconds=lambda: 6.0)
    place = room.line_up("alder", 45_000_000, lose=end_the_stream)
    await place.granted       # then read on, with place.progress() for each frame, and place.done = True at the end
    room.leave(place)         # once the record is dealt with, or the stream is lost

Merchants that must wait are not read from, so what they send stays on their side of the connection. A place is given
for the whole of a record, which says its length at once, so that no two records ever wait for one another.

Nobody keeps a place while others wait for it: who sends nothing for `STALL_SECONDS`, or is not done after its slice
of the time, loses it by `lose`, and comes after all who lost fewer. With slices of (time left) / (merchants left), and
room for two records or more, everybody has had a turn in half of the time, whatever the others do.
"""

import asyncio
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

ROOM_BYTES = 1 << 24
"""Bytes of large records that may always be in memory at once; where they are larger, two of them may."""

STALL_SECONDS = 10.0
"""How long a merchant may send nothing while others wait for its place."""

MIN_SLICE_SECONDS = 1.0
"""The shortest turn."""


@dataclass(eq=False)
class Place:
    """Room for one record, once `granted` is done. When all of the record is here it is `done` and can't be lost."""

    name: str
    size: int
    lose: Callable[[], None]
    number: int
    granted: "asyncio.Future[None]"
    ends: float = 0.0
    heard: float = 0.0
    done: bool = False
    lost: bool = False

    def progress(self) -> None:
        """Note that some of the record came."""
        self.heard = asyncio.get_running_loop().time()


@dataclass(eq=False)
class Room:
    """The places of one server, for the thread of its loop. `slice_seconds` returns the length of a turn as of now."""

    slice_seconds: Callable[[], float]
    held: int = 0
    _places: set[Place] = field(default_factory=set)
    _line: list[Place] = field(default_factory=list)
    _losses: "Counter[str]" = field(default_factory=Counter)
    _entered: int = 0
    _timer: asyncio.TimerHandle | None = None

    def line_up(self, name: str, size: int, lose: Callable[[], None]) -> Place:
        """Return a place for a record of `size` bytes from the merchant `name`, whose `granted` is to be awaited.

        `lose` is called, once, when the merchant loses the place before the record is here; then it must be left.
        """
        self._entered += 1
        place = Place(name, size, lose, self._entered, asyncio.get_running_loop().create_future())
        self._line.append(place)
        self._line.sort(key=lambda waiting: (self._losses[waiting.name], waiting.number))
        self._admit()
        return place

    def leave(self, place: Place) -> None:
        """Give the place back, or leave the line; a second time does nothing."""
        if place in self._places:
            self._places.remove(place)
            self.held -= place.size
            self._losses[place.name] += not place.done
        elif place in self._line:
            self._line.remove(place)
            place.granted.cancel()
        self._admit()

    def forget(self) -> None:
        """Let all merchants be equal again, for another question."""
        self._losses.clear()

    def _admit(self) -> None:
        """Give places to the first in the line while there is room, and watch those who have one if others wait."""
        now = asyncio.get_running_loop().time()
        while self._line:
            first = self._line[0]
            if self._places and self.held + first.size > max(2 * first.size, ROOM_BYTES):
                break
            del self._line[0]
            self._places.add(first)
            self.held += first.size
            first.heard, first.ends = now, now + max(self.slice_seconds(), MIN_SLICE_SECONDS)
            first.granted.set_result(None)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        due = self._overdue(math.inf)
        if due and self._wanted() > 0:
            self._timer = asyncio.get_running_loop().call_at(self._due(due[0]), self._take_back)

    def _due(self, place: Place) -> float:
        return min(place.ends, place.heard + STALL_SECONDS)

    def _overdue(self, now: float) -> list[Place]:
        """Return the places that may be taken back at `now`, those that are due first before others."""
        taken = [
            place for place in self._places if not (place.done or place.lost) and self._due(place) <= now
        ]
        return sorted(taken, key=self._due)

    def _wanted(self) -> int:
        """Return for how many in the line no place is about to be given back."""
        return len(self._line) - sum(place.lost for place in self._places)

    def _take_back(self) -> None:
        self._timer = None
        for place in self._overdue(asyncio.get_running_loop().time())[: self._wanted()]:
            place.lost = True
            place.lose()
        self._admit()
