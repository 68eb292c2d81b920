"""A linear head's exact sums: against `ClippedSum`, against single examples, and as integers."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from hanse_client import head_gradients
from hanse_client.gradients import ClippedSum
from hanse_client.head_gradients import HeadSum
from hanse_common.vision.loss import Objective

NORM = 0.3
FINE = -47  # C is 2⁴⁵·1.2 units
CLASSES = 5
WIDTH = 37
UNIT = Fraction(2) ** FINE

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def make(count: int, seed: int = 1) -> tuple[Tensor, Tensor, NDArray[np.float64]]:
    """Features of which some are clipped and some are not, labels, and a head."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10.0 ** torch.linspace(-3, 0.5, count)
    features = torch.randn(count, WIDTH, generator=generator) * sizes[:, None]
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    weights = np.random.default_rng(seed).normal(size=CLASSES * (WIDTH + 1)).astype(np.float32)
    return features, labels, 0.05 * weights.astype(np.float64)


def head_sum(features: Tensor, labels: Tensor, norm: float = NORM, fine: int = FINE) -> HeadSum:
    return HeadSum(features, labels, CLASSES, norm, fine)


def everything(summed: HeadSum, weights: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    return summed.sum(weights, np.arange(count))


def single(features: Tensor, label: int, weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """One example's clipped gradient in float64."""
    row = np.append(features.double().numpy(), 1.0)
    split = CLASSES * WIDTH
    head = np.column_stack([weights[:split].reshape(CLASSES, WIDTH), weights[split:]])
    logits = head @ row
    residual = np.exp(logits - logits.max())
    residual /= residual.sum()
    residual[label] -= 1.0
    gradient = np.outer(residual, row)
    gradient *= min(1.0, NORM / np.linalg.norm(gradient))
    return np.concatenate([gradient[:, :-1].ravel(), gradient[:, -1]])


def length(integers: NDArray[np.int64]) -> Fraction:
    """The exact square of the norm, in the gradient's own units."""
    return sum((Fraction(int(value)) ** 2 for value in integers), Fraction(0)) * UNIT**2


@pytest.mark.parametrize("count", [1, 127, 128, 129, 300])
def test_sums_equal_clipped_sum_and_a_loop_over_single_examples(count: int) -> None:
    features, labels, weights = make(count)
    found = everything(head_sum(features, labels), weights, count) * 2.0**FINE
    expected = np.sum(
        [single(*each, weights) for each in zip(features, labels.tolist(), strict=True)], axis=0
    )
    assert np.abs(found - expected).max() <= 1e-6 * NORM * count
    model = nn.Linear(WIDTH, CLASSES)
    vector = torch.from_numpy(weights.astype(np.float32))
    with torch.no_grad():
        model.weight.copy_(vector[: CLASSES * WIDTH].view(CLASSES, WIDTH))
        model.bias.copy_(vector[CLASSES * WIDTH :])
    with ClippedSum(model, NORM, FINE) as clipped:
        other = clipped.sum(features, labels) * 2.0**FINE
    assert np.abs(found - other).max() <= 2e-6 * NORM * count


def test_every_example_is_near_its_own_gradient_and_clipped_ones_nearly_as_long_as_allowed() -> None:
    features, labels, weights = make(60)
    summed = head_sum(features, labels)
    for i in range(60):
        own = summed.sum(weights, np.array([i]))
        expected = single(features[i], int(labels[i]), weights)
        largest = max(1.0, float(features[i].abs().max()))  # residuals are rounded, so large features tell
        assert np.abs(own * 2.0**FINE - expected).max() <= 1e-6 * NORM * largest
        assert length(own) <= Fraction(NORM) ** 2
        if np.linalg.norm(expected) > 0.999999 * NORM:
            assert length(own) > (Fraction(NORM) * Fraction("0.9999")) ** 2


hostile = st.floats(width=32) | st.sampled_from([0.0, 1e-30, 2.0**-26, 1.0, 1e6, 3e38, math.inf, math.nan])


@settings(max_examples=300, deadline=None)
@given(
    row=st.lists(hostile, min_size=6, max_size=6),
    others=st.lists(hostile, min_size=6, max_size=6),
    head=st.lists(hostile, min_size=21, max_size=21),
    label=st.integers(0, 2),
    norm=st.floats(1e-3, 1e3),
)
def test_no_example_is_longer_than_c_whatever_features_and_weights_are(
    row: list[float], others: list[float], head: list[float], label: int, norm: float
) -> None:
    fine = math.frexp(norm)[1] - 46
    features = torch.tensor([row, others], dtype=torch.float32)
    summed = HeadSum(features, torch.tensor([label, 0]), 3, norm, fine)
    weights = np.array(head, dtype=np.float64)
    alone = [summed.sum(weights, np.array([i])) for i in (0, 1)]
    for integers in alone:
        squares = sum(int(value) ** 2 for value in integers)
        assert squares * Fraction(2) ** (2 * fine) <= Fraction(norm) ** 2
    np.testing.assert_array_equal(summed.sum(weights, np.array([1, 0])), alone[0] + alone[1])
    if not np.isfinite(row).all():
        assert not alone[0].any()


@pytest.mark.parametrize("size", [1e-4, 0.03, 1.0, 30.0, 1e4, 1e8])
def test_clipped_norms_stay_within_c_for_many_rows(size: float) -> None:
    """Rounding to nearest is longer than C for about half of the rows that are clipped: those are cut."""
    generator = torch.Generator().manual_seed(2)
    features = size * torch.randn(150, WIDTH, generator=generator)
    labels = torch.randint(0, CLASSES, (150,), generator=generator)
    weights = np.random.default_rng(3).normal(size=CLASSES * (WIDTH + 1))
    summed = head_sum(features, labels)
    norms = [length(summed.sum(weights, np.array([i]))) for i in range(150)]
    assert max(norms) <= Fraction(NORM) ** 2


def test_features_that_are_not_finite_contribute_zero_and_move_nobody() -> None:
    features, labels, weights = make(140)
    expected = everything(head_sum(features, labels), weights, 140)
    poison = torch.zeros(3, WIDTH)
    poison[0, 3], poison[1, 0], poison[2, 5] = torch.nan, torch.inf, -torch.inf
    summed = head_sum(torch.cat([poison, features]), torch.cat([labels[:3], labels]))
    np.testing.assert_array_equal(everything(summed, weights, 143), expected)
    assert not summed.sum(weights, np.arange(3)).any()


def test_a_head_that_is_not_finite_gives_zero_where_residuals_are_not() -> None:
    features, labels, weights = make(9)
    for bad in (np.nan, np.inf, 1e300):
        weights[0] = bad
        with np.errstate(over="ignore"):
            found = [head_sum(features, labels).sum(weights, np.array([i])) for i in range(9)]
        for row, integers in zip(features, found, strict=True):
            # An infinite weight times a negative feature is a class of probability zero, and the rest is finite.
            assert integers.any() == (bad > 0 and bool(row[0] < 0))
            assert length(integers) <= Fraction(NORM) ** 2


def test_an_example_adds_exactly_its_own_contribution_in_any_order_and_place() -> None:
    features, labels, weights = make(270)
    summed = head_sum(features, labels)
    own = [summed.sum(weights, np.array([i])) for i in range(270)]
    order = np.random.default_rng(4).permutation(270)
    for count in (1, 2, 127, 128, 129, 255, 257, 270):
        expected = np.sum([own[i] for i in order[:count]], axis=0)
        np.testing.assert_array_equal(summed.sum(weights, order[:count]), expected)
        np.testing.assert_array_equal(summed.sum(weights, order[:count][::-1].copy()), expected)
    twice = summed.sum(weights, np.array([7, 7, 9]))  # a photo may stand for its product twice over steps
    np.testing.assert_array_equal(twice, 2 * own[7] + own[9])


@pytest.mark.parametrize("count", [511, 2047, 4095])
def test_sums_that_float64_cannot_hold_are_exact(count: int) -> None:
    """Odd numbers beyond 2⁵³: whoever adds so many rows in one float64 product rounds, in whatever order it adds."""
    features = torch.zeros(count, WIDTH)
    features[:, 0] = 0.5 - 2.0**-25
    summed = head_sum(features, torch.zeros(count, dtype=torch.int64), norm=0.4999999)
    weights = np.zeros(CLASSES * (WIDTH + 1))
    own = [int(value) for value in summed.sum(weights, np.array([0]))]
    expected = [count * value for value in own]
    # Nearly as large as an odd coordinate gets, as odd features are below 0.5 and a bias of 1 is beside them:
    # 256 rows would still be exact, and 512 are not.
    assert own[0] % 2 == 1
    assert abs(own[0]) > 2**44
    assert abs(expected[0]) > 2**53
    assert everything(summed, weights, count).tolist() == expected


def test_positions_are_tried_before_the_first_sum_only(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels, weights = make(5)
    summed = head_sum(features, labels)
    everything(summed, weights, 5)
    monkeypatch.setattr(head_gradients, "_random", None)
    everything(summed, weights, 5)


def test_where_kernels_depend_on_position_rows_are_computed_one_at_a_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain = Objective.residuals
    heights = []

    def by_position(self: Objective, logits: Tensor, labels: Tensor) -> Tensor:
        heights.append(len(logits))
        return (
            plain(self, logits, labels) * (1 + 1e-9 * torch.arange(len(logits), dtype=torch.float64))[:, None]
        )

    features, labels, weights = make(20)
    expected = everything(head_sum(features, labels), weights, 20)
    monkeypatch.setattr(Objective, "residuals", by_position)
    summed = head_sum(features, labels)
    np.testing.assert_array_equal(everything(summed, weights, 20), expected)
    assert "one at a time" in caplog.text
    assert heights[0] > 1
    assert set(heights[1:]) == {1}
    everything(summed, weights, 20)
    assert heights.count(heights[0]) == 1  # tried once


def test_an_empty_sample_is_zero_and_the_features_are_left_alone() -> None:
    features, labels, weights = make(5)
    before, vector = features.clone(), weights.copy()
    summed = head_sum(features, labels)
    found = summed.sum(weights, np.array([], dtype=np.intp))
    assert found.dtype == np.int64
    assert found.shape == weights.shape
    assert not found.any()
    everything(summed, weights, 5)
    assert torch.equal(features, before)
    assert np.array_equal(weights, vector)
    none = head_sum(features[:0], labels[:0])
    assert not none.sum(weights, np.array([], dtype=np.intp)).any()


def test_weights_may_change_between_sums() -> None:
    features, labels, weights = make(30)
    summed = head_sum(features, labels)
    everything(summed, weights, 30)
    np.testing.assert_array_equal(
        everything(summed, 2 * weights, 30), everything(head_sum(features, labels), 2 * weights, 30)
    )


def test_arguments_are_checked() -> None:
    features, labels, weights = make(6)
    for bad in (features.double(), features[0], features.long()):
        with pytest.raises(ValueError, match="features: expected float32"):
            head_sum(bad, labels)
    for bad in (labels.int(), labels[:-1], labels[:, None]):
        with pytest.raises(ValueError, match="labels: expected int64"):
            head_sum(features, bad)
    for bad in (torch.full_like(labels, CLASSES), torch.full_like(labels, -1)):
        with pytest.raises(ValueError, match="classes 0 to 4"):
            head_sum(features, bad)
    for norm in (0.0, -1.0, math.nan, math.inf, 0.6):  # 0.6 is over 2⁴⁶ units
        with pytest.raises(ValueError, match="fine units"):
            head_sum(features, labels, norm)
    summed = head_sum(features, labels)
    for wrong in (weights[:-1], weights[:, None]):
        with pytest.raises(ValueError, match="weights: expected shape"):
            summed.sum(wrong, np.arange(6))
    with pytest.raises(ValueError, match="at most 65536 photos"):
        summed.sum(weights, np.zeros(2**16 + 1, dtype=np.intp))


class TestGpu:
    """What only a GPU can show."""

    pytestmark = gpu

    def test_sums_equal_the_cpus(self) -> None:
        features, labels, weights = make(1500)
        expected = everything(head_sum(features, labels), weights, 1500) * 2.0**FINE
        found = everything(head_sum(features.cuda(), labels.cuda()), weights, 1500) * 2.0**FINE
        assert np.abs(found - expected).max() <= 1e-6 * NORM * 1500

    @pytest.mark.parametrize("count", [2, 129, 1025, 1500])
    def test_an_example_adds_its_own_vector_to_the_bit(self, count: int) -> None:
        features, labels, weights = make(count)
        summed = head_sum(features.cuda(), labels.cuda())
        assert summed._rows == 1024, "many at once, not one at a time"
        whole = everything(summed, weights, count)
        for own in (0, count // 2, count - 1):
            others = np.delete(np.arange(count), own)
            alone = summed.sum(weights, np.array([own]))
            assert np.array_equal(whole - alone, summed.sum(weights, others))
            assert length(alone) <= Fraction(NORM) ** 2
