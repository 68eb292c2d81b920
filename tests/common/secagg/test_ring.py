"""The ring: exact sums, proven head room, nothing that wraps."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hanse_common.secagg import ring
from hanse_common.secagg.ring import Ring

bounds = st.floats(1e-6, 1e6)
merchants = st.integers(1, 300)


@given(bounds, merchants)
def test_the_largest_cohort_at_the_bound_does_not_wrap(bound: float, n: int) -> None:
    r = Ring(bound, n)
    for sign in (1.0, -1.0):
        one = r.encode(np.full(3, sign * bound))
        total = np.zeros(3, dtype=np.uint32)
        for _ in range(n):
            total += one
        expected = n * np.rint(sign * bound / r.step) * r.step
        assert np.array_equal(r.decode(total), np.full(3, expected))


@given(bounds, merchants)
@example(1 / 3, 24)  # where half the step would do only because the bound is rounded down
def test_the_step_is_the_smallest_with_head_room(bound: float, n: int) -> None:
    half = Ring(bound, n).step / 2
    assert Fraction(bound) / Fraction(half) > ((1 << 31) - 1) // n


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=20), st.integers(1, 9))
def test_a_sum_is_the_sum_of_the_rounded_updates(values: list[float], n: int) -> None:
    r = Ring(4.0, n)
    update = np.array(values)
    clipped = np.rint(np.clip(update, -4, 4) / r.step) * r.step
    total = np.zeros(len(values), dtype=np.uint32)
    for _ in range(n):
        total += r.encode(update)
    assert np.array_equal(r.decode(total), n * clipped)
    assert np.all(np.abs(clipped - np.clip(update, -4, 4)) <= r.step / 2)


def test_non_finite_coordinates_become_zero() -> None:
    r = Ring(1.0, 2)
    assert np.array_equal(r.decode(r.encode(np.array([np.nan, np.inf, -np.inf, 0.5]))), [0, 0, 0, 0.5])


def test_bytes_round_trip_and_wrong_lengths_are_refused() -> None:
    words = np.array([0, 1, 2**32 - 1], dtype=np.uint32)
    assert np.array_equal(ring.from_bytes(ring.to_bytes(words), 3), words)
    assert ring.to_bytes(np.array([1], dtype=np.uint32)) == b"\x01\x00\x00\x00"
    for wrong in (b"", bytes(11), bytes(13), bytes(16)):
        with pytest.raises(ValueError, match="3 words"):
            ring.from_bytes(wrong, 3)


@pytest.mark.parametrize(
    ("bound", "n"), [(0.0, 5), (-1.0, 5), (np.inf, 5), (np.nan, 5), (1.0, 0), (1.0, 1 << 16)]
)
def test_impossible_rings_are_refused(bound: float, n: int) -> None:
    with pytest.raises(ValueError, match="Expected"):
        Ring(bound, n)
