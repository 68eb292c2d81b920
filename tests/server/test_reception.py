"""Room for what comes in: bounded, in turn, and nobody's for ever."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hanse_server import reception
from hanse_server.reception import ROOM_BYTES, Place, Room

LARGE = ROOM_BYTES
"""A record of which two have room."""


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(test())  # type: ignore[arg-type]


def nobody() -> None:
    raise AssertionError("a place was lost")


def enter(room: Room, name: str, size: int = LARGE, lose: Callable[[], None] = nobody) -> Place:
    return room.line_up(name, size, lose)


def inside(*places: Place) -> list[bool]:
    return [place.granted.done() and not place.granted.cancelled() for place in places]


@pytest.fixture(autouse=True)
def short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reception, "MIN_SLICE_SECONDS", 0.0)


def test_two_large_records_at_once_and_the_others_in_turn() -> None:
    async def test() -> None:
        room = Room(lambda: 60.0)
        places = [enter(room, name) for name in "abcd"]
        assert inside(*places) == [True, True, False, False]
        room.leave(places[1])
        assert inside(*places) == [True, True, True, False]
        room.leave(places[1])  # once is enough
        assert inside(*places) == [True, True, True, False]
        for place in places:
            room.leave(place)
        assert room.held == 0

    run(test)


def test_small_records_share_the_room_by_their_bytes() -> None:
    async def test() -> None:
        room = Room(lambda: 60.0)
        places = [enter(room, str(number), ROOM_BYTES // 8) for number in range(9)]
        assert inside(*places) == [True] * 8 + [False]

    run(test)


def test_a_record_of_any_size_finds_room() -> None:
    async def test() -> None:
        room = Room(lambda: 60.0)
        assert inside(enter(room, "a", 100 * ROOM_BYTES)) == [True]

    run(test)


def test_a_large_record_is_not_passed_by_small_ones_for_ever() -> None:
    async def test() -> None:
        room = Room(lambda: 60.0)
        one, two = enter(room, "a"), enter(room, "b")
        large, small = enter(room, "c"), enter(room, "d", 1)
        room.leave(one)
        assert inside(two, large, small) == [True, True, False]

    run(test)


def test_who_leaves_the_line_is_not_let_in() -> None:
    async def test() -> None:
        room = Room(lambda: 60.0)
        first, _, third, fourth = (enter(room, name) for name in "abcd")
        room.leave(third)
        assert third.granted.cancelled()
        room.leave(first)
        assert inside(fourth) == [True]

    run(test)


def test_a_place_is_lost_after_its_turn_but_only_to_somebody() -> None:
    async def test() -> None:
        lost: list[str] = []
        room = Room(lambda: 0.02)
        places: dict[str, Place] = {}

        def losing(name: str) -> Callable[[], None]:
            return lambda: (lost.append(name), room.leave(places[name]))[0]  # type: ignore[func-returns-value]

        for name in "ab":
            places[name] = enter(room, name, lose=losing(name))
        await asyncio.sleep(0.06)
        assert lost == []
        waiting = enter(room, "c")
        for _ in range(20):
            for place in places.values():
                place.progress()  # drips do not help
            await asyncio.sleep(0.005)
        assert len(lost) == 1  # one is enough
        assert inside(waiting) == [True]

    run(test)


def test_who_is_silent_loses_its_place_before_its_turn_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        monkeypatch.setattr(reception, "STALL_SECONDS", 0.05)
        lost: list[str] = []
        room = Room(lambda: 60.0)
        silent = enter(room, "silent", lose=lambda: (lost.append("silent"), room.leave(silent))[0])  # type: ignore[func-returns-value]
        busy = enter(room, "busy")
        waiting = enter(room, "c")
        for _ in range(30):
            busy.progress()
            await asyncio.sleep(0.005)
        assert lost == ["silent"]
        assert inside(waiting) == [True]

    run(test)


def test_a_record_that_is_here_is_not_lost_any_more() -> None:
    async def test() -> None:
        room = Room(lambda: 0.01)
        places = [enter(room, name) for name in "abc"]
        places[0].done = places[1].done = True
        await asyncio.sleep(0.05)
        assert inside(*places) == [True, True, False]

    run(test)


def test_who_lost_a_place_comes_after_all_others_until_the_next_question() -> None:
    async def test() -> None:
        room = Room(lambda: 60.0)
        slow, other = enter(room, "slow"), enter(room, "other")
        room.leave(slow)  # not done
        held = enter(room, "held")
        again, fresh = enter(room, "slow"), enter(room, "fresh")
        room.leave(other)
        assert inside(held, again, fresh) == [True, False, True]
        room.leave(again)
        room.forget()
        again, last = enter(room, "slow"), enter(room, "last")
        room.leave(held)
        assert inside(again, last) == [True, False]

    run(test)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["enter", "leave", "done"]),
        st.integers(0, 9),
        st.sampled_from([1, 300_000, 8_000_000, LARGE, 3 * LARGE]),
    ),
    max_size=40,
)


@given(STEPS)
@settings(deadline=None)
def test_room_is_bounded_and_never_unused_while_somebody_waits(steps: list[Any]) -> None:
    async def test() -> None:
        room = Room(lambda: 60.0)
        places: list[Place] = []
        for act, which, size in steps:
            if act == "enter":
                places.append(enter(room, str(which), size))
            elif places:
                place = places[which % len(places)]
                if act == "done":
                    place.done = True
                else:
                    room.leave(places.pop(which % len(places)))
            held = [place for place in places if inside(place) == [True]]
            assert room.held == sum(place.size for place in held)
            largest = max((place.size for place in held), default=0)
            assert room.held <= max(2 * largest, ROOM_BYTES)
            assert bool(held) == bool(places)
        for place in places:
            room.leave(place)
        assert room.held == 0

    run(test)
