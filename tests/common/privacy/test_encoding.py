"""The grid: exactness, unbiasedness over every possible rounding, and the sensitivity bound."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hanse_common.privacy.encoding import NORM_BITS, ROUNDING_FAILURE, FineSum, Grid, rounded_norm
from hanse_common.randomness import AesCtrStream

FEW_BITS = 20
ONE_STEP = 2**FEW_BITS

norms = st.floats(1e-6, 1e6)
dimensions = st.integers(1, 40_000_000)


class EveryRounding:
    """A Randomness whose words run once through all 2^20 values of u."""

    def words(self, count):
        assert count == ONE_STEP
        return np.arange(count, dtype=np.uint64) << np.uint64(64 - FEW_BITS)


EVERY_ROUNDING = Grid(1.0, ONE_STEP)
# Fewer fine units a step than a grid has by itself, so that all of them can be tried.
EVERY_ROUNDING.__dict__["fine_exponent"] = EVERY_ROUNDING.step_exponent - FEW_BITS


def round_every_way(fine):
    return EVERY_ROUNDING.round(np.full(ONE_STEP, fine, dtype=np.int64), EveryRounding())


@given(norms, dimensions)
def test_step_is_the_largest_power_of_two_that_is_fine_enough(norm, dimension):
    grid = Grid(norm, dimension)
    assert math.frexp(grid.step)[0] == 0.5
    ratio = norm / grid.step / math.sqrt(dimension)
    assert 10 * (1 - 1e-12) <= ratio < 20 * (1 + 1e-12)
    assert grid.step / grid.fine_unit >= 2**28
    assert 2 ** (NORM_BITS - 1) <= norm / grid.fine_unit < 2**NORM_BITS


limb_edges = st.sampled_from(
    [0, 1, -1, 2**31, -(2**31), 2**31 - 1, 2**46, -(2**46), 2**61, -(2**61), 2**62 - 1, -(2**62)]
)


@given(st.lists(limb_edges | st.integers(-(2**62), 2**62), min_size=1, max_size=12))
def test_a_fine_sum_is_exact_and_cut_at_the_end_alone(parts):
    total = FineSum(1)
    for part in parts:
        total.add(np.array([part], dtype=np.int64))
    wanted = max(-(2**62), min(2**62, sum(parts)))
    assert int(total.value()[0]) == wanted
    assert total.value().dtype == np.int64


@given(st.lists(st.integers(-(2**62), 2**62), max_size=8), st.integers(-(2**46), 2**46))
def test_one_example_more_moves_a_cut_sum_by_no_more_than_itself(parts, example):
    def value(terms):
        total = FineSum(1)
        for term in terms:
            total.add(np.array([term], dtype=np.int64))
        return int(total.value()[0])

    moved = value([*parts, example]) - value(parts)
    assert abs(moved) <= abs(example)
    assert moved * example >= 0


@settings(max_examples=20, deadline=None)
@given(st.integers(-(2**62) + 1, 2**62 - 1))
def test_rounding_is_exactly_unbiased(fine):
    rounded = round_every_way(fine)
    assert int(rounded.sum()) == fine
    assert set(np.unique(rounded)) <= {fine // ONE_STEP, fine // ONE_STEP + 1}


@settings(max_examples=20, deadline=None)
@given(st.integers(-(2**50), 2**50), st.integers(-(2**33), 2**33))
def test_neighbours_rounded_together_differ_by_a_rounding_of_the_difference(fine, difference):
    moved = round_every_way(fine + difference) - round_every_way(fine)
    assert np.array_equal(np.sort(moved), np.sort(round_every_way(difference)))


@given(st.lists(st.integers(-(2**20), 2**20), min_size=1, max_size=50), st.binary(min_size=32, max_size=32))
def test_whole_steps_are_never_moved(steps, key):
    grid = Grid(0.3, len(steps))
    exact = np.array(steps, dtype=np.int64)
    assert np.array_equal(grid.round(exact * grid.fine_per_step, AesCtrStream(key)), exact)
    back = grid.dequantise(exact)
    assert back.dtype == np.float64
    assert [Fraction(b) for b in back] == [s * Fraction(grid.step) for s in steps]


@pytest.mark.parametrize(
    ("step", "dimension", "failure", "expected"),
    [
        # TensorFlow Federated, discretization_test.py, InflatedNormTest.
        (1e-9, 10**9, 0.01, 1.000000001642451),
        (1e-2, 10**9, 0.01, 158.13231445360802),
        (1e-9, 10**9, 0.5, 1.0000000007137142),
        (1e-2, 10**9, 0.5, 158.12296930808552),
        (1e-9, 10**9, 1.0, 1.000000000125),
        (1e-2, 10**9, 1.0, 158.11704525445697),
    ],
)
def test_rounded_norm_matches_tensorflow_federated(step, dimension, failure, expected):
    assert rounded_norm(1.0, step, dimension, failure) == pytest.approx(expected, rel=1e-14)


def test_sensitivity_of_a_head_costs_a_quarter_of_a_percent():
    grid = Grid(0.3, 35_800)
    assert grid.sensitivity * grid.step / 0.3 == pytest.approx(1.00266, abs=1e-5)
    assert ROUNDING_FAILURE == 2.0**-60


def adversarial_differences(norm, dimension):
    """Vectors (in steps, exact norm at most `norm`) that rounding lengthens most, and others."""
    spread = np.full(dimension, norm / math.sqrt(dimension))
    halves = np.zeros(dimension)
    halves[: min(dimension, int(4 * norm**2))] = 0.5
    one = np.zeros(dimension)
    one[0] = norm
    rest = np.arange(1.0, dimension + 1)
    return {
        "spread": spread,
        "halves": halves,
        "one": one,
        "negative": -spread,
        "ramp": rest * (norm / np.linalg.norm(rest)),
    }


@pytest.mark.parametrize("kind", ["spread", "halves", "one", "negative", "ramp"])
@pytest.mark.parametrize("steps_per_norm", [10.0, 0.5])
def test_rounded_norm_holds_for_adversarial_vectors(kind, steps_per_norm):
    dimension, trials, failure = 4000, 1000, 1e-2
    norm = steps_per_norm * math.sqrt(dimension)
    grid = Grid(1.0, dimension)
    scaled = adversarial_differences(norm, dimension)[kind] * grid.fine_per_step
    difference = np.trunc(scaled).astype(np.int64)
    start = AesCtrStream(b"\x04" * 32).words(dimension).astype(np.int64) >> np.int64(24)
    stream = AesCtrStream(b"\x05" * 32)

    class Same:
        def words(self, count):
            return self.last

    same, lengths = Same(), np.empty(trials)
    for trial in range(trials):
        same.last = stream.words(dimension)
        moved = grid.round(start + difference, same) - grid.round(start, same)
        lengths[trial] = np.linalg.norm(moved)
    # 35 of 1000 at a true rate of at most 1 % happens with probability below 1e-9.
    assert (lengths > rounded_norm(norm, 1.0, dimension, failure)).sum() < 35
    assert lengths.max() <= rounded_norm(norm, 1.0, dimension, ROUNDING_FAILURE)


def test_rounding_really_lengthens_so_the_bound_is_not_idle():
    dimension = 10_000
    grid = Grid(1.0, dimension)
    halves = np.full(dimension, grid.fine_per_step // 2, dtype=np.int64)
    rounded = grid.round(halves, AesCtrStream(b"\x06" * 32))
    norm = math.sqrt(dimension) / 2
    assert np.linalg.norm(rounded) > 1.3 * norm
    assert np.linalg.norm(rounded) < rounded_norm(norm, 1.0, dimension, ROUNDING_FAILURE) < 1.6 * norm


@settings(deadline=None)
@given(
    st.integers(0, 2**32),
    st.integers(1, 3000),
    st.floats(1e-3, 1e3),
    st.floats(-6, 6),
)
def test_scaling_to_just_under_the_norm_leaves_room_for_float32(seed, dimension, norm, magnitude):
    grid = Grid(norm, dimension)
    words = AesCtrStream(seed.to_bytes(32, "big")).words(dimension)
    gradient = ((words / 2.0**63 - 1.0) * 10.0**magnitude).astype(np.float32)
    length = np.linalg.norm(gradient.astype(np.float64))
    factor = np.float32(min(1.0, norm * (1 - 2.0**-20) / length))
    fine = np.trunc((gradient * factor).astype(np.float64) / grid.fine_unit).astype(np.int64)
    square = sum(int(f) ** 2 for f in fine)
    assert square <= (Fraction(norm) / Fraction(grid.fine_unit)) ** 2


@pytest.mark.parametrize(
    ("bad", "found"),
    [
        (np.zeros(3, dtype=np.int64), r"shape \(3,\)"),
        (np.zeros((4, 1), dtype=np.int64), r"shape \(4, 1\)"),
        (np.zeros(4, dtype=np.float64), "float64"),
        (np.zeros(4, dtype=np.int32), "int32"),
        (np.array([0, 0, 0, 2**62 + 1]), r"2\^62"),
        (np.array([0, 0, 0, -(2**62) - 1]), r"2\^62"),
        (np.array([0, 0, 0, -(2**63)]), r"2\^62"),
    ],
)
def test_sums_of_another_shape_type_or_magnitude_are_refused(bad, found):
    with pytest.raises(ValueError, match=found):
        Grid(1.0, 4).round(bad, AesCtrStream(bytes(32)))


@pytest.mark.parametrize(
    ("norm", "dimension", "field"),
    [
        (0.0, 1, "clipping_norm"),
        (-1.0, 1, "clipping_norm"),
        (math.inf, 1, "clipping_norm"),
        (math.nan, 1, "clipping_norm"),
        (1.0, 0, "dimension"),
        (1.0, 2**30 + 1, "dimension"),
    ],
)
def test_impossible_grids_are_refused(norm, dimension, field):
    with pytest.raises(ValueError, match=field):
        Grid(norm, dimension)
