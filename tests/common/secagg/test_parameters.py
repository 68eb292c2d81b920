"""n_min, c, q, t: what follows from what, for every roster that fits a page."""

from collections.abc import Iterator
from itertools import combinations
from typing import Any

import numpy as np
import pytest

from hanse_common.secagg.faults import SumLost
from hanse_common.secagg.parameters import MAX_ROSTER, Parameters


def accepted(largest: int) -> Iterator[tuple[Parameters, int]]:
    """Yield all parameters that are not refused, each with every roster size up to `largest`."""
    for n_min in range(1, largest + 1):
        for c in range(largest + 1):
            try:
                parameters = Parameters(n_min, c)
            except ValueError:
                continue
            for n in range(n_min, largest + 1):
                yield parameters, n


def test_all_settings_up_to_40_merchants() -> None:
    count = 0
    for parameters, n in accepted(40):
        c, q, t, required = (
            parameters.c,
            parameters.quorum(n),
            parameters.threshold(n),
            parameters.required(n),
        )
        count += 1
        # Two sets of q of n have 2q − n members in common at least: an honest one among them, and for no smaller q.
        assert 2 * q - n > c >= 2 * (q - 1) - n
        assert t > c  # the corrupt ones alone recover nothing
        assert t <= q <= required <= n
        assert required >= parameters.n_min
        assert required - c >= 2  # honest updates in every sum
        assert parameters.dropouts(n) == n - required >= 0
        parameters.check_roster(n)
    assert count > 5000


def test_all_pairs_of_quorums_of_a_small_roster_share_an_honest_merchant() -> None:
    seen = set()
    for parameters, n in accepted(7):
        q, c = parameters.quorum(n), parameters.c
        if (n, c) in seen:
            continue
        seen.add((n, c))
        quorums = [set(who) for who in combinations(range(n), q)]
        for corrupt in (set(who) for who in combinations(range(n), c)):
            assert all(one & other - corrupt for one, other in combinations(quorums, 2))
            if q - 1 > c:
                smaller = [set(who) for who in combinations(range(n), q - 1)]
                assert any(not one & other - corrupt for one in smaller for other in smaller)
    assert len(seen) >= 10


def test_whatever_is_possible_is_accepted() -> None:
    found = {(parameters.n_min, parameters.c) for parameters, _ in accepted(40)}
    possible = {
        (n_min, c) for n_min in range(1, 41) for c in range(1, 41) if n_min - c >= 2 and n_min // 2 + 1 > c
    }
    assert found == possible


def test_the_examples() -> None:
    five = Parameters(n_min=4, c=1)
    assert (five.quorum(5), five.threshold(5), five.required(5), five.dropouts(5)) == (4, 3, 4, 1)
    twenty = Parameters(n_min=9, c=2)
    assert (twenty.threshold(20), twenty.quorum(20), twenty.required(20)) == (11, 12, 12)
    least = Parameters(n_min=3, c=1)
    assert (least.quorum(3), least.threshold(3), least.required(3), least.dropouts(3)) == (3, 2, 3, 0)


def test_the_least_survivors_count_where_they_are_more_than_a_quorum() -> None:
    parameters = Parameters(n_min=9, c=1)
    assert parameters.quorum(10) == 6
    assert parameters.required(10) == 9
    assert parameters.dropouts(10) == 1


def test_five_merchants_survive_one_dropout_and_no_second(league: Any) -> None:
    for uploads in (5, 4, 3):
        round_ = league.of(5, n_min=4).start().open(0, 2)
        round_.upload({place: np.array([1, place], dtype=np.uint32) for place in range(uploads)})
        if uploads == 3:
            with pytest.raises(SumLost, match="3 of 5 uploaded, 4 are needed"):
                round_.agree(range(uploads))
            continue
        round_.agree(range(uploads))
        round_.unmask(range(uploads))
        assert round_.total().tolist() == [uploads, sum(range(uploads))]


@pytest.mark.parametrize(
    ("n_min", "c", "text"),
    [
        (5, 0, "c ≥ 1"),
        (5, -1, "c ≥ 1"),
        (2, 1, "would be that update"),
        (6, 5, "n_min − c ≥ 2, found n_min = 6 and c = 5"),
        (0, 1, "would be that update"),
        (MAX_ROSTER + 1, 1, f"n_min ≤ n_max ≤ {MAX_ROSTER}"),
        (5, 3, "more than c = 3 shares to be needed, found 3 of 5; raise n_min to 6"),
        (21, 11, "raise n_min to 22"),
    ],
)
def test_what_no_roster_can_meet_is_refused(n_min: int, c: int, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Parameters(n_min, c)


def test_what_a_refusal_advises_is_accepted() -> None:
    for c in range(3, 30):
        assert Parameters(2 * c, c)
        with pytest.raises(ValueError, match=f"raise n_min to {2 * c} or more"):
            Parameters(2 * c - 1, c)


def test_a_roster_of_the_wrong_size_is_refused() -> None:
    parameters = Parameters(n_min=4, c=1)
    for n in (4, 5, MAX_ROSTER):
        parameters.check_roster(n)
    for n in (0, 3, MAX_ROSTER + 1):
        with pytest.raises(ValueError, match=f"4 to {MAX_ROSTER} merchants, found {n}"):
            parameters.check_roster(n)


def test_a_roster_larger_than_the_plans_largest_is_refused() -> None:
    parameters = Parameters(n_min=4, c=1, n_max=6)
    for n in (4, 5, 6):
        parameters.check_roster(n)
    with pytest.raises(ValueError, match="4 to 6 merchants, found 7"):
        parameters.check_roster(7)
    assert Parameters(n_min=4, c=1, n_max=4)
    for n_max in (3, 0, MAX_ROSTER + 1):
        with pytest.raises(
            ValueError, match=f"n_min ≤ n_max ≤ {MAX_ROSTER}, found n_min = 4 and n_max = {n_max}"
        ):
            Parameters(n_min=4, c=1, n_max=n_max)
