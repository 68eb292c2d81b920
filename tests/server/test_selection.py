"""Who is asked: the draw by its formula as it is written, stragglers, replacements, and that all get their turn."""

import hashlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats

from hanse_common.errors import ConfigError
from hanse_common.plan import Cohort, Plan
from hanse_server.observed import TripObservation
from hanse_server.selection import (
    ANSWER_SECONDS,
    LATE_BLOCKS,
    REPLACE_SECONDS,
    SETTLE_SECONDS,
    AllMembers,
    Draw,
    EveryMember,
    RandomMembers,
    RandomSelection,
    Situation,
    Stragglers,
    draw,
    select,
)

SEED = "00112233445566778899aabbccddeeff"
DIGEST = bytes(range(32))
NAMES = tuple(f"shop-{number:02}" for number in range(20))
MEMBERS = {name: hashlib.sha256(name.encode()).digest() for name in NAMES}
NOBODY: frozenset[str] = frozenset()
ALPHA = 1e-6


def by_hand(seed: str, digest: bytes, block: int, members: dict[str, bytes]) -> list[str]:
    """Return the order, by RFC 2104's own formula: H((K ⊕ opad) ‖ H((K ⊕ ipad) ‖ text)), blocks of 64 bytes."""
    key = bytes.fromhex(seed) + bytes(48)
    inner, outer = bytes(byte ^ 0x36 for byte in key), bytes(byte ^ 0x5C for byte in key)
    ranks = {}
    for name, identity in members.items():
        text = b"hanse-cohort-1" + digest + bytes.fromhex(f"{block:016x}") + identity
        first = hashlib.sha256(inner + text).digest()
        ranks[hashlib.sha256(outer + first).hexdigest()] = name
    return [ranks[rank] for rank in sorted(ranks)]


def trip(asked: str, answered: str) -> TripObservation:
    seconds = dict.fromkeys(answered.split(), 1.0)
    return TripObservation("upload", tuple(asked.split()), seconds, 60.0, 60.0, 0, 0)


# The draw


@settings(deadline=None)
@given(seed=st.binary(min_size=16, max_size=16), block=st.integers(0, 2**64 - 1), count=st.integers(0, 20))
def test_anybody_can_draw_again(seed: bytes, block: int, count: int) -> None:
    members = dict(list(MEMBERS.items())[:count])
    found = draw(seed.hex(), DIGEST, block, members, NOBODY, 5)
    assert list(found.order) == by_hand(seed.hex(), DIGEST, block, members)
    assert found == Draw(block, DIGEST, seed.hex(), found.order, (), 5)


def test_a_draw_is_another_for_each_block_plan_and_seed() -> None:
    orders = {
        draw(seed, digest, block, MEMBERS, NOBODY, 5).order
        for seed in (SEED, SEED[::-1])
        for digest in (DIGEST, DIGEST[::-1])
        for block in range(3)
    }
    assert len(orders) == 12


def test_names_have_no_say_in_it() -> None:
    renamed = {f"a-{name}": identity for name, identity in MEMBERS.items()}
    found = draw(SEED, DIGEST, 7, renamed, NOBODY, 5).order
    assert [name[2:] for name in found] == list(draw(SEED, DIGEST, 7, MEMBERS, NOBODY, 5).order)


@settings(deadline=None)
@given(late=st.sets(st.sampled_from(NAMES)), block=st.integers(0, 1000))
def test_stragglers_come_last_and_nothing_else_changes(late: set[str], block: int) -> None:
    plain = draw(SEED, DIGEST, block, MEMBERS, NOBODY, 5).order
    found = draw(SEED, DIGEST, block, MEMBERS, late, 5)
    in_time = [name for name in plain if name not in late]
    assert found.late == tuple(name for name in plain if name in late)
    assert list(found.order) == in_time + list(found.late)


def test_everyone_is_asked_about_equally_often() -> None:
    counts = Counter(
        name for block in range(2000) for name in draw(SEED, DIGEST, block, MEMBERS, NOBODY, 5).order[:5]
    )
    expected = [
        500.0
    ] * 20  # draws without replacement vary less than chi-square says, so this is strict enough
    assert stats.chisquare([counts[name] for name in NAMES], expected).pvalue > ALPHA


def test_a_draw_describes_itself_for_the_log() -> None:
    members = dict(list(MEMBERS.items())[:4])
    text = draw(SEED, DIGEST, 3, members, {"shop-01"}, 2).describe()
    first, second = by_hand(
        SEED, DIGEST, 3, {name: id_ for name, id_ in members.items() if name != "shop-01"}
    )[:2]
    assert text == (
        f"Block 3 of plan 0001020304050607, drawn by the seed {SEED}, asks 2 of 4 members: {first}, {second}. "
        "Late lately, so last: shop-01."
    )


# Stragglers


def test_a_straggler_comes_last_for_some_blocks_and_no_more() -> None:
    stragglers = Stragglers()
    assert stragglers.begin(0) == NOBODY
    stragglers.observe(trip("alder birch", "alder"))
    assert [stragglers.begin(block) for block in range(1, LATE_BLOCKS + 2)] == [{"birch"}] * LATE_BLOCKS + [
        NOBODY
    ]


def test_one_trip_missed_in_a_block_is_enough_and_one_block_in_time_makes_it_good() -> None:
    stragglers = Stragglers()
    stragglers.begin(0)
    stragglers.observe(trip("alder", ""))
    stragglers.observe(trip("alder", "alder"))
    assert stragglers.begin(1) == {"alder"}
    stragglers.observe(trip("alder", "alder"))
    assert stragglers.begin(2) == NOBODY


def test_being_late_while_one_comes_last_makes_it_no_longer() -> None:
    stragglers, found = Stragglers(), []
    for block in range(12):
        found.append(bool(stragglers.begin(block)))
        stragglers.observe(trip("alder", ""))
    assert found == ([False] + [True] * LATE_BLOCKS) * 3


@settings(deadline=None)
@given(
    blocks=st.lists(
        st.tuples(st.integers(1, 3), st.dictionaries(st.sampled_from("abcd"), st.booleans(), max_size=4)),
        max_size=40,
    )
)
def test_nobody_is_excluded_for_good(blocks: list[tuple[int, dict[str, bool]]]) -> None:
    """Whatever happens, of LATE_BLOCKS + 1 blocks in a row a member is drawn like everybody in one at the least."""
    stragglers, number, last = Stragglers(), 0, dict.fromkeys("abcd", -1)
    for step, answers in blocks:
        number += step
        late = stragglers.begin(number)
        for name in "abcd":
            if name not in late:
                last[name] = number
            assert number - last[name] <= LATE_BLOCKS + step - 1
        stragglers.observe(trip(" ".join(answers), " ".join(n for n, ok in answers.items() if ok)))


# Who is asked while a block gathers


@pytest.fixture
def make(make_plan: Callable[..., Plan]) -> Callable[..., Any]:
    def make(size: int = 5, over: float = 1.2, min_: int = 3, max_: int = 10, **more: Any) -> RandomSelection:
        blocks = iter(range(100))
        plan = make_plan(cohort=Cohort(min_merchants=min_, max_merchants=max_))
        chosen = RandomMembers(size=size, over_selection=over, seed=SEED)
        identities = {identity: name for name, identity in MEMBERS.items()}
        found = select(chosen, plan, lambda: identities, lambda: next(blocks), **more)
        assert isinstance(found, RandomSelection)
        return found

    return make


def seen(now: float = 0.0, **what: Any) -> Situation:
    everyone = frozenset(NAMES)
    known: dict[str, Any] = {"listed": everyone, "online": everyone, "assigned": {}}
    known |= {"connected": NOBODY, "declined": NOBODY, "postponed": NOBODY}
    known |= {key: value if key == "assigned" else frozenset(value) for key, value in what.items()}
    return Situation(now=now, **known)


def begun(selection: RandomSelection, listed: frozenset[str] = frozenset(NAMES)) -> list[Draw]:
    drawn: list[Draw] = []
    selection._on_draw = drawn.append
    assert selection.begin(0.0, listed) == drawn[0].describe()
    return drawn


def test_the_first_of_the_draw_are_asked_some_more_than_wanted(make: Any) -> None:
    selection = make(size=5, over=1.2)
    drawn = begun(selection)[0]
    assert drawn.asked == 6
    assert selection.wanted(seen()) == set(drawn.order[:6])


@pytest.mark.parametrize(("size", "over", "asked"), [(10, 1.1, 10), (5, 1.0, 5), (5, 1.1, 6), (8, 10.0, 10)])
def test_over_selection_is_capped_by_the_plan(make: Any, size: int, over: float, asked: int) -> None:
    assert begun(make(size=size, over=over, max_=10))[0].asked == asked


def test_a_factor_that_rounds_to_a_little_more_asks_no_more(make: Any) -> None:
    assert begun(make(size=10, over=1.1, max_=20))[0].asked == 11


def test_members_that_left_are_not_drawn_and_new_ones_come_after_all(make: Any) -> None:
    selection = make()
    few = frozenset(NAMES[:6])
    drawn = begun(selection, few)[0]
    assert set(drawn.order) == few
    later = seen(REPLACE_SECONDS, listed=(*NAMES[:6], "shop-17"), online=(*NAMES[1:6], "shop-17"))
    assert selection.wanted(later) == few | {"shop-17"}


def test_who_is_away_or_declines_is_replaced_by_the_next_after_a_pause(make: Any) -> None:
    selection = make()
    order = begun(selection)[0].order
    online = frozenset(NAMES) - {order[0], order[6]}
    assigned = dict.fromkeys(order[1:6], 0.0)
    early = seen(REPLACE_SECONDS / 2, online=online, assigned=assigned, declined=order[2:3])
    assert selection.wanted(early) == set(order[:6])
    late = seen(REPLACE_SECONDS, online=online, assigned=assigned, declined=order[2:3], connected=order[3:6])
    assert selection.wanted(late) == {*order[:6], order[7], order[8]}
    assert selection.wanted(seen(REPLACE_SECONDS * 1.5, online=NOBODY)) == {*order[:6], order[7], order[8]}


def test_who_says_later_or_does_not_come_is_replaced_too(make: Any) -> None:
    selection = make()
    order = begun(selection)[0].order
    assigned = dict.fromkeys(order[:6], 0.0)
    soon = seen(REPLACE_SECONDS, assigned=assigned, postponed=order[:1], connected=order[2:6])
    assert selection.wanted(soon) == set(order[:7])
    assigned[order[6]] = REPLACE_SECONDS
    late = seen(ANSWER_SECONDS, assigned=assigned, postponed=order[:1], connected=order[2:6])
    assert selection.wanted(late) == set(order[:8])


def test_a_block_begins_at_once_when_all_are_there_and_soon_when_enough_are(make: Any) -> None:
    selection = make(size=5, over=1.4)
    order = begun(selection)[0].order
    assigned = dict.fromkeys(order[:7], 0.0)
    assert not selection.complete(seen(0.0, assigned=assigned, connected=order[:4]))
    assert not selection.complete(seen(1.0, assigned=assigned, connected=order[:5]))
    assert not selection.complete(seen(0.9 + SETTLE_SECONDS, assigned=assigned, connected=order[:5]))
    assert selection.complete(seen(1.0, assigned=assigned, connected=order[:7]))
    assert selection.complete(seen(1.0 + SETTLE_SECONDS, assigned=assigned, connected=order[:5]))


def test_where_nobody_is_left_to_ask_a_later_block_waits_for_those_that_were_asked_alone(make: Any) -> None:
    selection = make()
    order = begun(selection)[0].order
    here = seen(assigned=dict.fromkeys(order[:4], 0.0), online=order[:4], connected=order[:4])
    assert not selection.complete(here)  # in the first block, all that were drawn
    assert selection.settle(order[:4]) == tuple(sorted(order[:4]))
    order = tuple(selection._order) if selection.begin(10.0, frozenset(NAMES)) else ()
    here = seen(11.0, assigned=dict.fromkeys(order[:4], 10.0), online=order[:4], connected=order[:4])
    assert selection.complete(here)
    assert not selection.complete(seen(11.0, assigned=here.assigned, online=order[:7], connected=order[:4]))


def test_of_more_than_were_to_come_the_first_of_the_draw_take_part(make: Any) -> None:
    selection = make()
    order = begun(selection)[0].order
    assert selection.settle(reversed(order)) == tuple(sorted(order[:6]))
    assert selection.settle(["shop-99", *order[:5]]) == tuple(sorted(["shop-99", *order[:5]]))


def test_a_straggler_of_one_block_is_drawn_last_for_the_next(make: Any) -> None:
    selection = make()
    drawn = begun(selection)
    slow = drawn[0].order[0]
    selection.observe(trip(" ".join(drawn[0].order[:6]), " ".join(drawn[0].order[1:6])))
    selection.begin(100.0, frozenset(NAMES))
    assert drawn[1].late == (slow,)
    assert drawn[1].order[-1] == slow


@pytest.mark.parametrize("size", [3, 11])
def test_a_size_that_the_plan_does_not_allow_is_refused(make: Any, size: int) -> None:
    with pytest.raises(ConfigError, match=rf"cohort\.size: found {size}, expected .*\(4\) .*\(10\)"):
        make(size=size, min_=4)


@pytest.mark.parametrize(
    "found",
    [
        {"size": 5, "seed": SEED[1:]},
        {"size": 5, "seed": SEED.upper()},
        {"size": 2, "seed": SEED},
        {"size": 5},
        {"size": 5, "seed": SEED, "over_selection": 0.9},
    ],
)
def test_what_the_settings_refuse(found: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"seed|size|over_selection"):
        RandomMembers(**found)


def test_everyone_is_asked_where_nothing_else_is_said(make_plan: Callable[..., Plan]) -> None:
    found = select(AllMembers(), make_plan(), dict, lambda: 0)
    assert isinstance(found, EveryMember)
    assert found.wanted(seen()) == set(NAMES)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_through_any_comings_and_goings_the_order_is_kept_and_no_more_are_asked_than_are_missing(
    make: Any, data: st.DataObject
) -> None:
    selection = make(size=5, over=1.2)
    order = begun(selection)[0].order
    asked = selection.wanted(seen(0.0))
    assigned = dict.fromkeys(asked, 0.0)
    names = st.frozensets(st.sampled_from(NAMES))
    now = 0.0
    for _ in range(data.draw(st.integers(1, 8))):
        now += data.draw(st.floats(0, 30))
        online, connected, declined = data.draw(names), data.draw(names) & asked, data.draw(names) & asked
        situation = seen(
            now, online=online, connected=connected, declined=declined - connected, assigned=assigned
        )
        wanted = selection.wanted(situation)
        added = wanted - asked
        assert asked <= wanted
        assert added <= online
        if added:
            assert len(added) + len(connected) <= 6
            passed_over = [order.index(name) for name in online - wanted]
            assert not passed_over or max(map(order.index, added)) < min(passed_over)
        asked = wanted
        assigned |= dict.fromkeys(added, now)
        assert len(selection.settle(connected)) <= 6
