"""A holdout photo's vector: of norm 1 at most, to the bit, whatever the scores, and nothing but its own."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from hanse_common.evaluation import CONFIDENCE_BINS, LOSS_BOUND, SCORE_BINS, SCORE_EDGES, SHARES, Layout

CLASSES = (2, 3, 10, 47)


def scores_of(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    found: NDArray[np.float64] = shifted / shifted.sum(axis=1, keepdims=True)
    return found


def photos(count: int, classes: int, seed: int = 1) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=count)
    return labels, scores_of(rng.normal(size=(count, classes)) * 4)


def squared(vector: NDArray[np.int64]) -> int:
    return sum(int(x) ** 2 for x in vector)


def norm_squared(layout: Layout) -> int:
    return int(1 / layout.grid.fine_unit) ** 2


@given(st.data())
def test_the_exact_norm_is_at_most_one_whatever_the_scores(data: Any) -> None:
    """Also of scores that are no distribution: nobody checks that they add up."""
    classes = data.draw(st.sampled_from(CLASSES))
    score = st.floats(-0.1, 1.1) | st.sampled_from([0.0, 1.0, 0.5, 5e-324, 1 - 2**-53, np.nan, np.inf])
    scores = np.array([data.draw(st.lists(score, min_size=classes, max_size=classes))])
    label = data.draw(st.integers(-1, classes))
    layout = Layout(classes)
    vector = layout.sum(np.array([label]), scores)
    assert vector.shape == (layout.dimension,) and vector.dtype == np.int64
    assert squared(vector) <= norm_squared(layout)


@pytest.mark.parametrize("classes", [*CLASSES, 256])
def test_hardly_anything_of_the_norm_is_left_unused(classes: int) -> None:
    layout = Layout(classes)
    surely_wrong = np.zeros((1, classes))
    surely_wrong[0, 1] = 1.0
    vector = layout.sum(np.array([0]), surely_wrong)
    assert 0.999999 * norm_squared(layout) < squared(vector) <= norm_squared(layout)
    assert sum(SHARES.values()) == 1000


def test_neighbouring_catalogs_differ_by_one_photos_vector() -> None:
    layout = Layout(10)
    labels, scores = photos(200, 10)
    with_all = layout.sum(labels, scores)
    for left_out in (0, 57, 199):
        without = layout.sum(np.delete(labels, left_out), np.delete(scores, left_out, axis=0))
        alone = layout.sum(labels[left_out : left_out + 1], scores[left_out : left_out + 1])
        assert np.array_equal(with_all - without, alone)
        assert 0 < squared(alone) <= norm_squared(layout)


@pytest.mark.parametrize("fault", [np.nan, np.inf, -np.inf, -0.5, 1.5])
def test_a_photo_without_sane_scores_counts_as_zero(fault: float) -> None:
    layout = Layout(3)
    labels, scores = photos(20, 3)
    scores[4, 1] = fault
    rest = layout.sum(np.delete(labels, 4), np.delete(scores, 4, axis=0))
    assert np.array_equal(layout.sum(labels, scores), rest)


@pytest.mark.parametrize("label", [-1, 3, 2**31])
def test_a_photo_of_no_class_counts_as_zero(label: int) -> None:
    layout = Layout(3)
    assert not layout.sum(np.array([label]), np.array([[0.2, 0.3, 0.5]])).any()
    assert not layout.sum(np.zeros(0, dtype=np.int64), np.zeros((0, 3))).any()


def test_each_part_counts_what_it_says() -> None:
    layout = Layout(3)
    labels, scores = photos(500, 3)
    total = layout.sum(labels, scores)
    counts = total * layout.grid.fine_unit / layout.scale
    part = {name: counts[where] for name, where in layout.parts.items()}
    predicted, confidence = scores.argmax(axis=1), scores.max(axis=1)
    right = predicted == labels
    assert part["outcome"] == pytest.approx([right.sum(), (~right).sum()])
    assert part["true"] == pytest.approx(np.bincount(labels, minlength=3))
    assert part["predicted"] == pytest.approx(np.bincount(predicted, minlength=3))
    assert part["confusion"].reshape(3, 3)[1, 2] == pytest.approx(((labels == 1) & (predicted == 2)).sum())
    for name, rows in (("own", labels == 2), ("other", labels != 2)):
        histogram = part[name].reshape(3, SCORE_BINS)[2]
        assert histogram.sum() == pytest.approx(rows.sum())
        over = histogram[np.flatnonzero(SCORE_EDGES == 0.5)[0] + 1 :].sum()
        assert over == pytest.approx((scores[rows, 2] >= 0.5).sum())
    tenths = part["confidence"].reshape(CONFIDENCE_BINS, 2)
    assert tenths[9] == pytest.approx(
        [(right & (confidence >= 0.9)).sum(), (~right & (confidence >= 0.9)).sum()]
    )
    assert part["gap"].sum() == pytest.approx((right - confidence).sum(), abs=1e-6)
    losses = np.minimum(-np.log(scores[np.arange(500), labels]), LOSS_BOUND)
    assert part["loss"][0] * LOSS_BOUND == pytest.approx(losses.sum(), abs=1e-6)


@pytest.mark.parametrize("classes", [0, 1, 257])
def test_an_evaluation_is_of_a_bounded_number_of_classes(classes: int) -> None:
    with pytest.raises(ValueError, match=f"found {classes} classes, expected 2 to 256"):
        Layout(classes)
