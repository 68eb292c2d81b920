"""Who is asked for a block: everyone, or members drawn at random by a public seed.

    selection = select(settings.cohort, plan, lambda: {identity: name}, next_block, on_draw=audit)
    transport = BlockTransport(..., selection)
    observed = ObservedTransport(transport, observers=[selection.observe])

A draw orders all members by

    HMAC-SHA256(key = seed, message = "hanse-cohort-1" ‖ plan digest ‖ block as 8 bytes, big-endian ‖ identity)

as bytes, the least first; `seed` is 16 bytes, plan digest and identity 32 each. Whoever knows the seed and the
directory can draw again, and see that nobody was preferred: a seed that was published before the league was has no
favourites. The first of the order are asked, and the next in order for each that is not there, or declines.

A straggler is a member that did not answer a trip of a block in time. For the next `LATE_BLOCKS` blocks it comes after
all others, in the order of the draw among its like; then, or once it answers every trip of a block, it is drawn as
anyone. Being late while it comes last makes that no longer. So of `LATE_BLOCKS` + 1 blocks it is drawn like everybody
in one at the least, however late it is, and it is asked before that where others are missing.

That only some are asked protects nobody: ε counts each merchant as if it were asked in every round.

References: Bonawitz et al. 2019, "Towards Federated Learning at Scale: System Design" (over-selection);
RFC 2104 (HMAC).
"""

import hashlib
import hmac
import math
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol

from pydantic import Field

from hanse_common.config import Section
from hanse_common.errors import ConfigError
from hanse_common.plan import Plan
from hanse_common.secagg.parameters import MAX_ROSTER
from hanse_server.observed import TripObservation

CONTEXT = b"hanse-cohort-1"

LATE_BLOCKS = 3
"""For so many blocks a straggler comes last."""

REPLACE_SECONDS = 5.0
"""How often those who are not there, or declined, are replaced by the next in order, in seconds."""

ANSWER_SECONDS = 20.0
"""How long a member that is online may take from being asked to opening its stream before another is asked, too."""

SETTLE_SECONDS = 2.0
"""How long a block whose `size` is there waits for the others that were asked, in seconds."""


class AllMembers(Section):
    """Everyone who is online is asked."""

    name: Literal["all"] = "all"


class RandomMembers(Section):
    """Members drawn by `seed`, 32 hexadecimal digits, public.

    `size` is how many are wanted; `over_selection` times as many are asked, since some will not come, though never
    more than the plan's max_merchants.
    """

    name: Literal["random"] = "random"
    size: Annotated[int, Field(ge=3, le=MAX_ROSTER)]
    over_selection: Annotated[float, Field(ge=1, le=10)] = 1.2
    seed: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


CohortSelection = Annotated[AllMembers | RandomMembers, Field(discriminator="name")]
"""Either of them, as a configuration names it."""


@dataclass(frozen=True)
class Draw:
    """A block's draw: all that is needed to draw again, and what came of it.

    `order` holds all members at that time by name, those in `late`, the stragglers, last. The first `asked` of them
    are asked.
    """

    block: int
    plan_digest: bytes
    seed: str
    order: tuple[str, ...]
    late: tuple[str, ...]
    asked: int

    def describe(self) -> str:
        """Return all of it in a line for the operator."""
        first = ", ".join(self.order[: self.asked])
        last = f" Late lately, so last: {', '.join(self.late)}." if self.late else ""
        return (
            f"Block {self.block} of plan {self.plan_digest.hex()[:16]}, drawn by the seed {self.seed}, asks "
            f"{min(self.asked, len(self.order))} of {len(self.order)} members: {first}.{last}"
        )


def draw(
    seed: str, plan_digest: bytes, block: int, members: Mapping[str, bytes], late: Set[str], asked: int
) -> Draw:
    """Return the draw of `block` among `members`, identities (32 bytes) by name; those in `late` come last."""
    key = bytes.fromhex(seed)

    def place(name: str) -> tuple[bool, bytes]:
        message = CONTEXT + plan_digest + block.to_bytes(8, "big") + members[name]
        return name in late, hmac.digest(key, message, hashlib.sha256)

    order = tuple(sorted(members, key=place))
    return Draw(block, plan_digest, seed, order, tuple(name for name in order if name in late), asked)


class Stragglers:
    """Who was late in recent blocks. It sees trips (`observe`) and is told when a block begins."""

    def __init__(self) -> None:
        self._block = 0
        self._missed: dict[str, int] = {}
        self._asked: set[str] = set()
        self._failed: set[str] = set()

    def observe(self, observation: TripObservation) -> None:
        """Take in a trip of the present block."""
        self._asked |= set(observation.asked)
        self._failed |= set(observation.asked) - observation.seconds.keys()

    def begin(self, block: int) -> frozenset[str]:
        """End the block before, and return who comes last in `block`. Block numbers only grow."""
        for name in self._asked - self._failed:
            self._missed.pop(name, None)
        self._missed = dict.fromkeys(self._failed, self._block) | self._missed
        self._asked, self._failed, self._block = set(), set(), block
        self._missed = {name: last for name, last in self._missed.items() if block - last <= LATE_BLOCKS}
        return frozenset(self._missed)


@dataclass(frozen=True)
class Situation:
    """What is known while a block gathers: names by what they do, and the clock, in seconds.

    `listed` are the league's members, `assigned` says when each was asked for this block. `declined` are those that are
    done with it; one that ever said "later" is in `postponed`.
    """

    now: float
    listed: frozenset[str]
    online: frozenset[str]
    connected: frozenset[str]
    declined: frozenset[str]
    postponed: frozenset[str]
    assigned: Mapping[str, float]


class Selection(Protocol):
    """Who is asked in a block."""

    def begin(self, now: float, listed: frozenset[str]) -> str:
        """Begin a block among the members `listed` and return what the operator should hear, or ""."""
        ...

    def wanted(self, seen: Situation) -> frozenset[str]:
        """Return everyone who should be asked by now."""
        ...

    def complete(self, seen: Situation) -> bool:
        """Return whether a block that has its minimum need not wait for more."""
        ...

    def settle(self, connected: Iterable[str]) -> tuple[str, ...]:
        """End the gathering and return who of those that came takes part, sorted."""
        ...

    def observe(self, observation: TripObservation) -> None:
        """Take in a trip of the present block."""
        ...


def select(
    settings: CohortSelection,
    plan: Plan,
    identities: Callable[[], Mapping[bytes, str]],
    next_block: Callable[[], int],
    on_draw: Callable[[Draw], None] = lambda draw: None,
) -> "EveryMember | RandomSelection":
    """Return the selection that `settings` describe.

    `identities` returns the members' names by identity, as of now. `next_block` returns a number that no block of this
    plan had, larger than all before, once it is recorded. `on_draw` hears each draw. Raises `ConfigError` when the
    plan does not allow the size.
    """
    if isinstance(settings, AllMembers):
        return EveryMember()
    return RandomSelection(settings, plan, identities, next_block, on_draw)


class EveryMember:
    """Asks all who are online. The first block waits for all members, the others for those that are online."""

    def __init__(self) -> None:
        self._first = True

    def begin(self, now: float, listed: frozenset[str]) -> str:
        """As `Selection.begin`."""
        return ""

    def wanted(self, seen: Situation) -> frozenset[str]:
        """As `Selection.wanted`."""
        return seen.online

    def complete(self, seen: Situation) -> bool:
        """As `Selection.complete`."""
        expected = seen.listed if self._first else seen.assigned.keys()
        return expected <= seen.connected | seen.declined

    def settle(self, connected: Iterable[str]) -> tuple[str, ...]:
        """As `Selection.settle`: all of them."""
        self._first = False
        return tuple(sorted(connected))

    def observe(self, observation: TripObservation) -> None:
        """As `Selection.observe`: everyone is asked again, whatever happened."""


class RandomSelection:
    """Asks the first of a draw, and the next in order for those that are not there or decline.

    Members that are admitted while a block gathers come after all that were drawn. Made by `select`.
    """

    def __init__(
        self,
        settings: RandomMembers,
        plan: Plan,
        identities: Callable[[], Mapping[bytes, str]],
        next_block: Callable[[], int],
        on_draw: Callable[[Draw], None],
    ) -> None:
        cohort = plan.cohort
        if not cohort.min_merchants <= settings.size <= cohort.max_merchants:
            raise ConfigError(
                f"service.blocks.cohort.size: found {settings.size}, expected a number from the plan's "
                f"min_merchants ({cohort.min_merchants}) to its max_merchants ({cohort.max_merchants})."
            )
        self._settings = settings
        # 10 · 1.1 is a little more than 11.
        self._full = min(math.ceil(settings.size * settings.over_selection - 1e-9), cohort.max_merchants)
        self._plan_digest = plan.digest
        self._identities = identities
        self._next_block = next_block
        self._on_draw = on_draw
        self._stragglers = Stragglers()
        self._first = True
        self._order: tuple[str, ...] = ()
        self._selected: list[str] = []
        self._replace_at = 0.0
        self._settles_at: float | None = None

    def begin(self, now: float, listed: frozenset[str]) -> str:
        """As `Selection.begin`."""
        block = self._next_block()
        members = {name: identity for identity, name in self._identities().items() if name in listed}
        drawn = draw(
            self._settings.seed, self._plan_digest, block, members, self._stragglers.begin(block), self._full
        )
        self._order = drawn.order
        self._selected = list(drawn.order[: self._full])
        self._replace_at, self._settles_at = now + REPLACE_SECONDS, None
        self._on_draw(drawn)
        return drawn.describe()

    def wanted(self, seen: Situation) -> frozenset[str]:
        """As `Selection.wanted`."""
        if seen.now >= self._replace_at:
            self._replace_at = seen.now + REPLACE_SECONDS
            standing = sum(self._stands(name, seen) for name in self._selected)
            self._selected += self._reserve(seen)[: max(self._full - standing, 0)]
        return frozenset(self._selected)

    def complete(self, seen: Situation) -> bool:
        """As `Selection.complete`."""
        if len(seen.connected) < self._settings.size:
            self._settles_at = None
            expected = self._selected if self._first else seen.assigned
            return set(expected) <= seen.connected | seen.declined and not self._reserve(seen)
        if self._settles_at is None:
            self._settles_at = seen.now + SETTLE_SECONDS
        return len(seen.connected) >= self._full or seen.now >= self._settles_at

    def settle(self, connected: Iterable[str]) -> tuple[str, ...]:
        """As `Selection.settle`: no more than are asked, the first of the draw before the others."""
        self._first = False
        places = {name: place for place, name in enumerate(self._order)}
        ranked = sorted(connected, key=lambda name: (places.get(name, len(places)), name))
        return tuple(sorted(ranked[: self._full]))

    def observe(self, observation: TripObservation) -> None:
        """As `Selection.observe`."""
        self._stragglers.observe(observation)

    def _stands(self, name: str, seen: Situation) -> bool:
        """Return whether the member has come, or may be expected to at any moment."""
        if name in seen.connected:
            return True
        if name in seen.declined | seen.postponed or name not in seen.online:
            return False
        return seen.now - seen.assigned.get(name, seen.now) < ANSWER_SECONDS

    def _reserve(self, seen: Situation) -> list[str]:
        """Return who could be asked instead of others, in order."""
        newcomers = sorted(seen.listed - set(self._order))
        candidates = seen.online & seen.listed - set(self._selected)
        return [name for name in (*self._order, *newcomers) if name in candidates]
