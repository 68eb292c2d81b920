"""Blocks: who is asked for the next rounds, and when there are enough of them.

    with BlockTransport(streams, membership, signed_plan, plan, address, settings) as transport:
        train(MaskedRounds(transport, ...), ...)

A block is some rounds in a row with the same assignment and the same set-up of secure aggregation. At its start every
merchant that is online, or a part of them (`hanse_server.selection`), gets one `Assignment` over Flower; those that
allow the plan open a stream, and all trips of the block go over it. Merchants that come later take part in the next
block. This module knows neither Flower nor gRPC: it holds the two together for a coordinator that sees only
`Transport`.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, Self

from hanse_common.errors import RoundFailed
from hanse_common.plan import Plan, SignedPlan
from hanse_common.session import Assignment, ReportCode, record_bytes
from hanse_common.wire import Buffer
from hanse_server.config import Blocks
from hanse_server.selection import EveryMember, Selection, Situation

log = logging.getLogger(__name__)

POLL_SECONDS = 0.25
"""How often Flower is asked who is online and who has reported, while a block gathers or ends."""

RETURN_SECONDS = 2.0
"""How long a round waits for merchants whose stream was lost since the round before, in seconds."""

LOOK_SECONDS = 5.0
"""How often it is asked, while a block gathers, who is a member."""

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0
"""Seconds after which a merchant that said "later" is asked again, at first and at most; each pause is twice as long
as the one before. So a merchant that is not ready for an hour is sent some 65 assignments, of 20 ms CPU each."""

STOP_SECONDS = 2.0
"""How long a stop may take to reach the streams, in seconds. Until then Flower drops messages, as if all declined."""

FAREWELL_SECONDS = 5.0
"""How long the last block waits for its reports, in seconds."""


class Streams(Protocol):
    """Merchants' streams, one block at a time; see `hanse_server.stream`."""

    def open_block(self, block: bytes, max_record_bytes: int) -> None:
        """Let merchants open streams for `block`, with records of at most `max_record_bytes` bytes."""
        ...

    def close_block(self) -> None:
        """End the block's streams."""
        ...

    def connected(self) -> tuple[str, ...]:
        """Return the merchants that have a stream now, sorted."""
        ...

    def wait(self, seconds: float, until: Callable[[frozenset[str]], bool]) -> bool:
        """Wait until the connected merchants satisfy `until`; return whether they did within `seconds`.

        Raises `RunStopped` when the run was stopped.
        """
        ...

    def exchange(
        self, kind: str, payloads: Mapping[str, bytes], deadline: float
    ) -> Iterator[tuple[str, Buffer]]:
        """As `Transport.exchange`. Raises `RunStopped` when the run was stopped."""
        ...


class Membership(Protocol):
    """Who is there and takes part, by Flower; see `hanse_server.flower_grid`."""

    def online(self) -> frozenset[str]:
        """Return the league's merchants whose nodes are online."""
        ...

    def assign(self, assignment: Assignment, names: frozenset[str]) -> None:
        """Send the assignment to each of `names`, once. Another block's assignment forgets the one before."""
        ...

    def reports(self) -> Mapping[str, ReportCode]:
        """Return how the present block ended for those that said so."""
        ...


class BlockJournal(Protocol):
    """Hears of blocks, for the records; see `hanse_server.records`."""

    def opened(self, block: bytes) -> None:
        """A block is drawn, and nobody has been asked yet."""
        ...

    def gathering(self, online: frozenset[str], connected: frozenset[str]) -> None:
        """Somebody came or went."""
        ...

    def gathered(self, block: bytes, asked: int, connected: frozenset[str]) -> None:
        """Enough have come of those that were asked."""
        ...

    def closed(self, block: bytes, *, failed: bool) -> None:
        """The block is over."""
        ...


class _Unrecorded:
    """A journal that nobody reads."""

    def opened(self, block: bytes) -> None: ...

    def gathering(self, online: frozenset[str], connected: frozenset[str]) -> None: ...

    def gathered(self, block: bytes, asked: int, connected: frozenset[str]) -> None: ...

    def closed(self, block: bytes, *, failed: bool) -> None: ...


@dataclass(frozen=True)
class _Again:
    """When to ask a merchant again, and how long the pause before was, both in seconds."""

    due: float
    pause: float


class BlockTransport:
    """A `Transport` over streams, which begins a block whenever merchants are to gather.

    `listed` returns all merchants of the league, as of now. `tell` hears a line for the operator. `selection` says who
    is asked; without one it is everyone. `journal` hears of each block.
    """

    def __init__(
        self,
        streams: Streams,
        membership: Membership,
        signed_plan: SignedPlan,
        plan: Plan,
        address: str,
        listed: Callable[[], frozenset[str]],
        settings: Blocks,
        tell: Callable[[str], None] = log.info,
        selection: Selection | None = None,
        journal: BlockJournal | None = None,
    ) -> None:
        self._streams = streams
        self._membership = membership
        self._signed_plan = signed_plan
        self._cohort = plan.cohort
        self._record_bytes = record_bytes(max(plan.dimension, plan.model_dimension))
        self._address = address
        self._members = listed
        self._listed: frozenset[str] = frozenset()
        self._settings = settings
        self._tell = tell
        self._assignment: Assignment | None = None
        self._selection: Selection = selection or EveryMember()
        self._journal: BlockJournal = journal or _Unrecorded()
        self._assigned: dict[str, float] = {}
        self._seen: frozenset[str] = frozenset()
        self._told: set[str] = set()
        self._again: dict[str, _Again] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.end_block()

    def gather(self) -> tuple[str, ...]:
        """End the block before, begin one, and return who came, sorted.

        Raises `RoundFailed` when the plan's minimum does not gather in time, `RunStopped` when stopped.
        """
        self.end_block()
        block = self._begin()
        try:
            self._gather()
        except BaseException:
            self.end_block(failed=True)
            raise
        connected = self._selection.settle(name for name in self._streams.connected() if name in self._listed)
        self._seen = frozenset(connected)
        self._journal.gathered(block, len(self._assigned), self._seen)
        return connected

    def merchants(self) -> tuple[str, ...]:
        """Return who of the block is there now, sorted; a stream just lost gets a moment to come back.

        Raises `RunStopped` when stopped.
        """
        reported = self._reported()  # not under the streams' lock: it asks Flower
        self._streams.wait(RETURN_SECONDS, lambda connected: self._seen <= connected | reported)
        connected = self._streams.connected()
        self._seen = frozenset(connected)
        return connected

    def exchange(
        self, kind: str, payloads: Mapping[str, bytes], deadline: float
    ) -> Iterator[tuple[str, Buffer]]:
        """Carry one trip over the block's streams."""
        return self._streams.exchange(kind, payloads, deadline)

    def _begin(self) -> bytes:
        """Open a block, nobody is asked yet, and return its name."""
        self._assignment = Assignment(
            block=os.urandom(16),
            signed_plan=self._signed_plan,
            rounds=self._settings.rounds,
            aggregator=self._address,
        )
        self._listed = self._members()
        self._again.clear()
        self._assigned.clear()
        self._seen = frozenset()
        self._told.clear()
        self._streams.open_block(self._assignment.block, self._record_bytes)
        drawn = self._selection.begin(time.monotonic(), self._listed)
        if drawn:
            self._tell(drawn)
        self._journal.opened(self._assignment.block)
        return self._assignment.block

    def _gather(self) -> None:
        """Ask, and wait until those that may come have come, or, once the minimum is there, `gather` seconds more."""
        started, enough_since = time.monotonic(), None
        minimum = self._cohort.min_merchants
        shown, looked = None, started
        while True:
            seen = self._look()
            connected, declined = seen.connected, seen.declined
            if connected != shown:
                self._tell(f"{len(connected)} of {len(self._listed)} merchants are there, {minimum} needed.")
                self._journal.gathering(seen.online, connected)
                shown = connected
            now = seen.now
            if len(connected) >= minimum:
                enough_since = enough_since or now
                if self._selection.complete(seen) or now - enough_since > self._settings.gather:
                    return
            elif declined and len(self._listed - declined) < minimum:
                self._streams.wait(STOP_SECONDS, lambda found: False)
                raise RoundFailed(
                    f"The plan needs {minimum} merchants; too many decline: {self._declines()}.", "merchants"
                )
            elif now - started > self._settings.patience:
                raise RoundFailed(
                    f"Waited {self._settings.patience:g} s; {len(connected)} merchants came, the plan needs "
                    f"{minimum}. Declined: {self._declines() or 'none'}.",
                    "merchants",
                )
            if now - looked > LOOK_SECONDS:  # a member may be admitted while the league waits for it
                self._listed, looked = self._members(), now
            self._streams.wait(POLL_SECONDS, lambda found, before=connected: found != before)  # type: ignore[misc]

    def _look(self) -> Situation:
        """Ask those who should be asked by now and were not, and return who is where after that."""
        seen = self._situation()
        new = (self._selection.wanted(seen) & seen.online) - self._assigned.keys()
        if not new or self._assignment is None:
            return seen
        self._membership.assign(self._assignment, new)
        self._assigned |= dict.fromkeys(new, seen.now)
        return self._situation()

    def _situation(self) -> Situation:
        connected = frozenset(self._streams.connected()) & self._listed
        return Situation(
            now=time.monotonic(),
            listed=self._listed,
            online=self._membership.online(),
            connected=connected,
            declined=self._reported() - connected,
            postponed=frozenset(self._again),
            assigned=self._assigned,
        )

    def _reported(self) -> frozenset[str]:
        """Return who is done with the block, and tell the operator of those who declined it.

        Who said "later" is not done, and is asked again, each time after a longer pause.
        """
        if not self._assigned:
            return frozenset()  # what is reported is of the block before
        due, done = set(), set()
        for name, code in self._membership.reports().items():
            later = code is ReportCode.LATER
            if code is not ReportCode.DONE and name not in self._told:
                self._told.add(name)
                self._tell(
                    f"{name} is not ready yet."
                    if later
                    else f"{name} does not take part in this block ({code})."
                )
            if not later:
                done.add(name)
                continue
            now = time.monotonic()
            again = self._again.setdefault(name, _Again(now + FIRST_PAUSE, FIRST_PAUSE))
            if again.due <= now:
                pause = min(2 * again.pause, LONGEST_PAUSE)
                self._again[name] = _Again(now + pause, pause)
                due.add(name)
        if due and self._assignment is not None:
            self._membership.assign(self._assignment, frozenset(due))
        return frozenset(done)

    def _declines(self) -> str:
        return ", ".join(f"{name} ({code})" for name, code in sorted(self._membership.reports().items()))

    def end_block(self, *, failed: bool = False) -> None:
        """Close the block, if one is open, and hear those out who took part."""
        if self._assignment is None:
            return
        asked = frozenset(self._streams.connected())
        self._streams.close_block()
        self._journal.closed(self._assignment.block, failed=failed)
        self._assignment = None
        given_up = time.monotonic() + FAREWELL_SECONDS
        while not asked <= self._reported() and time.monotonic() < given_up:
            time.sleep(POLL_SECONDS / 4)
