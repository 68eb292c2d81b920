"""Deadlines from observed latency: never over the plan's, enough for who is usual, a chance for who is slow."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hanse_common.plan import Cohort, Plan
from hanse_server import observed
from hanse_server.deadlines import CHANCE_EVERY, FIRST, RECENT, Deadlines, ObservedDeadlines
from hanse_server.observed import ObservedTransport, TripObservation

PLANNED = 60.0
USUAL = Deadlines()


class Trips:
    """Plays trips of merchants that need so many seconds each; who needs longer than the deadline is missed."""

    def __init__(self, slot: float = 0.0, settings: Deadlines | None = USUAL) -> None:
        self.deadlines = ObservedDeadlines(settings, slot)

    def play(self, needs: dict[str, float], kind: str = "agreed", planned: float = PLANNED) -> float:
        deadline = self.deadlines.seconds(kind, planned)
        seconds = {name: need for name, need in needs.items() if need <= deadline}
        self.deadlines.observe(
            TripObservation(kind, tuple(sorted(needs)), seconds, deadline, min(deadline, PLANNED), 0, 0)
        )
        return deadline


def test_the_plans_deadline_holds_until_merchants_are_known() -> None:
    trips = Trips()
    found = [trips.play({"alder": 2.0, "birch": 3.0}) for _ in range(FIRST + 1)]
    assert found == [PLANNED] * FIRST + [9.0]


def test_a_kind_of_trip_is_known_by_its_own_answers() -> None:
    trips = Trips()
    for _ in range(FIRST):
        trips.play({"alder": 2.0})
    assert trips.play({"alder": 4.0}, "unmasked") == PLANNED
    assert trips.play({"alder": 4.0}) == 6.0


def test_a_floor_and_the_plan_bound_it() -> None:
    trips = Trips()
    for _ in range(FIRST):
        trips.play({"alder": 0.01})
    assert trips.play({"alder": 0.01}) == Deadlines().floor
    assert trips.play({"alder": 0.01}, planned=3.0) == 3.0


def test_without_settings_it_is_the_plans() -> None:
    trips = Trips(settings=None)
    assert [trips.play({"alder": 0.01}) for _ in range(20)] == [PLANNED] * 20


def test_an_upload_has_two_slots_to_spare() -> None:
    """It leaves at a multiple of the slot: one photo more in the sample may cost a whole slot, and so may the next."""
    trips = Trips(slot=10.0, settings=Deadlines(factor=1.0, floor=1.0))
    for _ in range(FIRST):
        trips.play({"alder": 10.1, "birch": 20.1}, "upload")
        trips.play({"alder": 10.1, "birch": 20.1})
    assert trips.play({"alder": 30.0, "birch": 40.0}, "upload") == 40.1
    assert trips.play({"alder": 10.1, "birch": 20.1}) == 20.1


def test_it_is_the_95th_percentile_of_merchants_not_of_answers() -> None:
    trips = Trips(settings=Deadlines(factor=1.0, floor=0.1))
    needs = {f"shop-{number:03}": float(number) for number in range(1, 41)}
    for _ in range(FIRST):
        trips.play(needs)
    assert trips.play(needs) == np.quantile(list(needs.values()), 0.95, method="higher") == 39.0


def test_a_slow_trip_counts_until_it_is_long_ago() -> None:
    trips = Trips(settings=Deadlines(factor=1.0, floor=0.1))
    trips.play({"alder": 30.0})
    found = [trips.play({"alder": 1.0}) for _ in range(RECENT + 5)]
    assert found[FIRST - 1 : RECENT - 1] == [30.0] * (RECENT - FIRST)
    assert found[RECENT:] == [1.0] * 5


def test_who_is_slow_is_missed_once_and_then_waited_for() -> None:
    """A merchant that comes into the block with a slow line."""
    trips = Trips()
    quick = {"alder": 0.1, "birch": 0.1}
    for _ in range(FIRST):
        trips.play(quick)
    slow = quick | {"cedar": 12.0}
    assert [trips.play(slow) for _ in range(4)] == [5.0, PLANNED, 36.0, 36.0]


def test_who_hangs_costs_the_plans_deadline_once_in_a_while_alone() -> None:
    trips = Trips()
    for _ in range(FIRST):
        trips.play({"alder": 0.1, "birch": 0.1})
    found = [trips.play({"alder": 0.1, "birch": 1e9}) for _ in range(3 * CHANCE_EVERY)]
    assert found[:2] == [5.0, PLANNED]
    assert found.count(PLANNED) == 3
    assert set(found) == {5.0, PLANNED}


def test_where_nobody_answers_any_more_the_plans_deadline_comes_back() -> None:
    trips = Trips()
    for _ in range(FIRST):
        trips.play({"alder": 0.1})
    found = [trips.play({"alder": 1e9}) for _ in range(RECENT + 1)]
    assert found[-1] == PLANNED


@settings(deadline=None)
@given(
    rounds=st.lists(
        st.dictionaries(st.sampled_from("abcdef"), st.floats(0, 200), max_size=6), min_size=1, max_size=60
    ),
    slot=st.floats(0, 20),
    settings=st.builds(Deadlines, factor=st.floats(1, 10), floor=st.floats(0.1, 30)),
    planned=st.floats(0.1, 100),
    kind=st.sampled_from(["upload", "agreed"]),
)
def test_what_holds_of_every_deadline(
    rounds: list[dict[str, float]], slot: float, settings: Deadlines, planned: float, kind: str
) -> None:
    trips = Trips(slot, settings)
    history: list[dict[str, float]] = []
    for needs in rounds:
        deadline = trips.play(needs, kind, planned)
        assert 0 < deadline <= planned
        assert deadline >= min(planned, settings.floor)
        if len(history) < FIRST:
            assert deadline == planned
        if kind == "upload" and deadline < planned:
            latest = [need for trip in history[-RECENT:] for need in trip.values()]
            assert deadline >= max(latest) + 2 * slot
        history.append({name: need for name, need in needs.items() if need <= deadline})


@settings(deadline=None)
@given(needs=st.dictionaries(st.sampled_from("abcdef"), st.floats(0.001, 50), min_size=1))
def test_no_merchant_that_the_plan_has_time_for_is_missed_for_ever(needs: dict[str, float]) -> None:
    trips = Trips()
    for _ in range(FIRST):
        trips.play(dict.fromkeys("abcdef", 0.0))
    missed = dict.fromkeys(needs, 0)
    for _ in range(3 * CHANCE_EVERY):
        deadline = trips.play(needs)
        for name, need in needs.items():
            missed[name] += need > deadline
    assert max(missed.values()) <= 1


@pytest.mark.parametrize("settings", [{"factor": 0.5}, {"floor": 0}, {"factor": 2, "ceiling": 3}])
def test_what_the_settings_refuse(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"factor|floor|ceiling"):
        Deadlines(**settings)


class Slow:
    """A league in which each answer takes its time, by a clock that only answers move."""

    def __init__(self, league: Any) -> None:
        self.league, self.now = league, 0.0
        self.needs: dict[str, float] = {}
        self.waited: list[float] = []

    def gather(self) -> tuple[str, ...]:
        return tuple(self.league.gather())

    def merchants(self) -> tuple[str, ...]:
        return tuple(self.league.merchants())

    def exchange(self, kind: str, payloads: Any, deadline: float) -> Iterator[tuple[str, bytes]]:
        began = self.now
        needs = {name: self.needs.get(name, 0.5) if kind == "upload" else 0.5 for name in payloads}
        for name, reply in sorted(
            self.league.exchange(kind, payloads, deadline), key=lambda one: needs[one[0]]
        ):
            if needs[name] <= deadline:
                self.now = began + needs[name]
                yield name, reply
        if kind == "upload":
            self.waited.append(deadline)


def test_a_round_goes_on_without_a_straggler_and_the_next_has_it_again(
    make_plan: Callable[..., Plan], make_masked: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan({"rounds": 8}, cohort=Cohort(min_merchants=3, max_merchants=5))
    deadlines = ObservedDeadlines(USUAL, plan.cohort.upload_slot)
    league, rounds = make_masked(plan, setup_rounds=8, deadline=deadlines.seconds)
    slow = Slow(league)
    monkeypatch.setattr(observed, "time", SimpleNamespace(monotonic=lambda: slow.now))
    rounds._transport = ObservedTransport(slow, [deadlines.observe])
    dropped = []
    for round_ in range(8):
        if round_ == 5:
            slow.needs = {"cedar": 40.0}
        dropped.append(rounds.run(round_, np.zeros(plan.dimension, dtype=np.float32)).dropped)
    assert dropped == [()] * 5 + [("cedar",)] + [()] * 2
    planned = plan.cohort.upload_deadline
    assert slow.waited == [planned] * FIRST + [5.0, 5.0, 5.0, planned, 120.0]
    assert league.gathered == 1  # one set-up served all of it
