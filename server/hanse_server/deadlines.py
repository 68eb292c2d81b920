"""Deadlines from observed latency: how long a trip waits, once it is known how fast merchants are.

    deadlines = ObservedDeadlines(settings.deadlines, upload_slot=plan.cohort.upload_slot)
    transport = ObservedTransport(streams, observers=[deadlines.observe])
    MaskedRounds(transport, ..., deadline=deadlines.seconds)

A trip of some kind waits for

    min(planned, max(floor, factor · p95))

seconds: `planned` is the plan's own deadline for it, p95 the 95th percentile, over merchants, of each one's slowest
answer in the last `RECENT` trips of that kind. Of up to 20 merchants that is the slowest one's. An upload leaves at a
whole multiple of the plan's slot, so uploads have p95 and two slots at least.

The plan's deadline is never exceeded, and it holds until `FIRST` trips of a kind were seen. Whoever does not answer in
time is a dropout of that round, and is asked again in the next one. A merchant that is only slow would never be
measured under a deadline that it misses, so a trip that missed somebody under a shortened deadline is followed by one
with the plan's: at most one in `CHANCE_EVERY` of its kind, since who hangs costs all of it.
"""

from collections import defaultdict, deque
from collections.abc import Mapping
from typing import Annotated

import numpy as np
from pydantic import Field

from hanse_common.config import Section
from hanse_server.observed import TripObservation

RECENT = 20
"""Trips of one kind whose answers count."""

FIRST = 3
"""Trips of one kind that wait as long as the plan says, before anything is known."""

CHANCE_EVERY = 10
"""Of so many trips of a kind at most one waits for those that missed the one before."""

UPLOAD = "upload"


class Deadlines(Section):
    """A trip waits for `factor` times what merchants need, at least `floor` seconds, at most the plan's deadline."""

    factor: Annotated[float, Field(ge=1, le=1000)] = 3.0
    floor: Annotated[float, Field(gt=0, le=86_400)] = 5.0


class _Kind:
    """What is known of one kind of trip."""

    def __init__(self) -> None:
        self.trips: deque[Mapping[str, float]] = deque(maxlen=RECENT)
        self.seen = 0
        self.missed = False
        self.next_chance = 0
        self.shortened = False

    def slowest(self) -> float:
        """Return p95 over merchants of each one's slowest recent answer, in seconds; 0 without any."""
        by_merchant: dict[str, float] = {}
        for trip in self.trips:
            for name, seconds in trip.items():
                by_merchant[name] = max(seconds, by_merchant.get(name, 0.0))
        if not by_merchant:
            return 0.0
        return float(np.quantile(list(by_merchant.values()), 0.95, method="higher"))


class ObservedDeadlines:
    """Deadlines by `settings`; without them, the plan's. `upload_slot` is the plan's, in seconds."""

    def __init__(self, settings: Deadlines | None, upload_slot: float) -> None:
        self._settings = settings
        self._slot = upload_slot
        self._kinds: defaultdict[str, _Kind] = defaultdict(_Kind)

    def observe(self, observation: TripObservation) -> None:
        """Take in how a trip went."""
        kind = self._kinds[observation.kind]
        kind.trips.append(dict(observation.seconds))
        kind.seen += 1
        kind.missed = kind.shortened and not observation.seconds.keys() >= set(observation.asked)

    def seconds(self, kind: str, planned: float) -> float:
        """Return how long the trip of `kind` that begins now waits, in seconds, where the plan says `planned`.

        To be asked once a trip.
        """
        settings, known = self._settings, self._kinds[kind]
        known.shortened = False
        if settings is None or known.seen < FIRST or not any(known.trips):
            return planned
        if known.missed and known.seen >= known.next_chance:
            known.next_chance = known.seen + CHANCE_EVERY
            return planned
        slowest = known.slowest()
        found = max(settings.floor, settings.factor * slowest)
        if kind == UPLOAD:
            found = max(found, slowest + 2 * self._slot)
        known.shortened = found < planned
        return min(planned, found)
