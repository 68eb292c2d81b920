import dataclasses
import json
import warnings
from typing import Any

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hanse_common.vision.metrics import ClassificationReport


def example(n: int = 200, classes: int = 4, seed: int = 0) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Labels and probabilities that favour them somewhat, rounded so that scores tie."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, n)
    scores = generator.gamma(1.0, size=(n, classes))
    scores[np.arange(n), labels] += 0.7
    scores = np.round(scores, 1) + 0.05
    return labels, scores / scores.sum(axis=1, keepdims=True)


@pytest.fixture(autouse=True)
def _no_warnings() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("classes", [2, 4, 10])
def test_figures_by_their_definitions(classes: int) -> None:
    labels, probabilities = example(classes=classes)
    report = ClassificationReport.of(labels, probabilities)
    predicted = probabilities.argmax(axis=1)
    confusion = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(confusion, (labels, predicted), 1)
    np.testing.assert_array_equal(report.confusion, confusion)
    hits = np.diag(confusion)
    assert report.examples == 200
    assert report.accuracy == pytest.approx(hits.sum() / 200)
    precision, recall = hits / confusion.sum(axis=0), hits / confusion.sum(axis=1)
    f1 = 2 * precision * recall / (precision + recall)
    for c, figures in enumerate(report.per_class):
        assert figures.support == (labels == c).sum()
        assert figures.precision == pytest.approx(precision[c])
        assert figures.recall == pytest.approx(recall[c])
        assert figures.f1 == pytest.approx(f1[c])
    assert report.macro_precision == pytest.approx(precision.mean())
    assert report.macro_recall == pytest.approx(recall.mean())
    assert report.macro_f1 == pytest.approx(f1.mean())
    assert report.log_loss == pytest.approx(-np.log(probabilities[np.arange(200), labels]).mean())


@given(seed=st.integers(0, 2**32), classes=st.integers(2, 6))
@settings(max_examples=25, deadline=None)
def test_auc_is_the_mann_whitney_statistic(seed: int, classes: int) -> None:
    labels, probabilities = example(60, classes, seed)
    report = ClassificationReport.of(labels, probabilities)
    wanted = []
    for c, figures in enumerate(report.per_class):
        scores, is_class = probabilities[:, c], labels == c
        if not is_class.any():
            assert figures.auc is None
            continue
        u = scipy.stats.mannwhitneyu(scores[is_class], scores[~is_class]).statistic
        wanted.append(u / (is_class.sum() * (~is_class).sum()))
        assert figures.auc == pytest.approx(wanted[-1])
    assert report.macro_auc == pytest.approx(np.mean(wanted))


def test_roc_curve_passes_where_thresholds_say() -> None:
    labels, probabilities = example()
    roc = ClassificationReport.of(labels, probabilities).per_class[1].roc
    assert roc is not None
    points = set(zip(roc.false_positive_rate.round(9), roc.true_positive_rate.round(9), strict=True))
    is_class, scores = labels == 1, probabilities[:, 1]
    every = {
        (
            (scores[~is_class] >= threshold).mean().round(9),
            (scores[is_class] >= threshold).mean().round(9),
        )
        for threshold in [np.inf, *scores]
    }
    assert {(0.0, 0.0), (1.0, 1.0)} <= points <= every


def test_perfect_and_worst() -> None:
    labels = np.array([0, 1, 2, 0])
    perfect = ClassificationReport.of(labels, np.eye(3)[labels])
    assert (perfect.accuracy, perfect.macro_f1, perfect.macro_auc) == (1.0, 1.0, 1.0)
    assert perfect.log_loss == pytest.approx(0.0, abs=1e-12)
    worst = ClassificationReport.of(labels, np.eye(3)[(labels + 1) % 3])
    assert (worst.accuracy, worst.macro_f1) == (0.0, 0.0)
    assert np.isfinite(worst.log_loss)


def test_a_class_without_examples_has_no_figures() -> None:
    labels, probabilities = example(classes=4)
    keep = labels != 2
    report = ClassificationReport.of(labels[keep], probabilities[keep])
    absent = report.per_class[2]
    assert absent.support == 0
    assert dataclasses.astuple(absent)[1:] == (None,) * 5
    others = [figures for c, figures in enumerate(report.per_class) if c != 2]
    for name in ("precision", "recall", "f1", "auc"):
        wanted = np.mean([getattr(figures, name) for figures in others])
        assert getattr(report, f"macro_{name}") == pytest.approx(wanted)
    assert report.confusion[:, 2].sum() > 0


def test_a_class_never_predicted_has_precision_zero() -> None:
    report = ClassificationReport.of(np.array([0, 1]), np.array([[0.9, 0.1], [0.8, 0.2]]))
    assert (report.per_class[1].precision, report.per_class[1].recall) == (0.0, 0.0)
    assert report.per_class[1].auc == 1.0


def test_one_class_only() -> None:
    report = ClassificationReport.of(np.array([1, 1]), np.array([[0.9, 0.1], [0.2, 0.8]]))
    assert (report.accuracy, report.macro_auc) == (0.5, None)
    assert report.per_class[1].recall == 0.5


def test_the_first_of_equals_is_predicted() -> None:
    assert ClassificationReport.of(np.array([0]), np.array([[0.5, 0.5]])).accuracy == 1.0


def test_float32_rows_need_not_sum_exactly() -> None:
    labels, probabilities = example()
    report = ClassificationReport.of(labels, probabilities.astype(np.float32))
    assert report.log_loss == pytest.approx(ClassificationReport.of(labels, probabilities).log_loss, rel=1e-5)


@pytest.mark.parametrize(
    ("labels", "probabilities", "reason"),
    [
        (np.array([], dtype=np.int64), np.zeros((0, 3)), "n ≥ 1"),
        (np.array([0, 1]), np.full((3, 2), 0.5), "expected"),
        (np.array([0, 2]), np.full((2, 2), 0.5), "outside 0 … 1"),
        (np.array([0, -1]), np.full((2, 2), 0.5), "outside 0 … 1"),
        (np.array([0.0, 1.0]), np.full((2, 2), 0.5), "integers"),
        (np.array([0, 1]), np.array([[0.5, 0.5], [np.nan, 0.5]]), "not finite"),
        (np.array([0, 1]), np.array([[0.5, 0.5], [1.5, -0.5]]), "not finite"),
        (np.array([0, 1]), np.array([[0.5, 0.5], [0.5, 0.6]]), "sum to 1"),
    ],
)
def test_what_is_no_classification(labels: Any, probabilities: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        ClassificationReport.of(labels, probabilities)


def test_json() -> None:
    labels, probabilities = example(5000, 3)
    probabilities = np.random.default_rng(1).dirichlet(np.ones(3), 5000)
    report = ClassificationReport.of(labels, probabilities)
    found = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert found["accuracy"] == report.accuracy
    assert found["confusion"] == report.confusion.tolist()
    assert found["per_class"][2]["f1"] == report.per_class[2].f1
    roc = found["per_class"][0]["roc"]
    assert len(roc["true_positive_rate"]) == len(roc["false_positive_rate"]) == 101
    assert (roc["true_positive_rate"][0], roc["true_positive_rate"][-1]) == (0.0, 1.0)
    assert set(found) == {field.name for field in dataclasses.fields(report)}
