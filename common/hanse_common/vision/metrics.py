"""How well probabilities match labels.

    report = ClassificationReport.of(labels, probabilities)    # (n,) integers, (n, classes)
    report.accuracy, report.macro_f1, report.per_class[3].recall
    json.dumps(report.to_json())

The class predicted is the most probable one, the first of equals. Figures are scikit-learn's. A class
without an example in `labels` has no figures of its own (None) and no part in macro averages; one that has
examples but is never predicted has precision 0.
"""

from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from sklearn import metrics

_CURVE_POINTS = 101
"""Points of a ROC curve in JSON."""


@dataclass(frozen=True)
class RocCurve:
    """One class against all others: rates as the threshold falls, each (points,) float64, from 0 to 1."""

    false_positive_rate: NDArray[np.float64]
    true_positive_rate: NDArray[np.float64]


@dataclass(frozen=True)
class ClassFigures:
    """Figures of one class, all in [0, 1]; no `auc` and `roc` when it is the only class in labels either."""

    support: int
    precision: float | None
    recall: float | None
    f1: float | None
    auc: float | None
    roc: RocCurve | None


@dataclass(frozen=True)
class ClassificationReport:
    """Figures of a classifier on n labelled examples.

    `confusion` is (classes, classes) int64, a row for each true class. `log_loss` is the mean of −ln p(label)
    in nats, p no smaller than float64's resolution. Macro averages weigh every class in labels alike.
    """

    examples: int
    accuracy: float
    macro_precision: float
    macro_recall: float
    macro_f1: float
    macro_auc: float | None
    log_loss: float
    confusion: NDArray[np.int64]
    per_class: tuple[ClassFigures, ...]

    @classmethod
    def of(cls, labels: NDArray[np.integer[Any]], probabilities: NDArray[np.floating[Any]]) -> Self:
        """Return the report on `labels`, (n,) in 0 … classes − 1, and `probabilities`, (n, classes).

        Raises `ValueError` when shapes do not match, n is 0, a label is no class, or a row no distribution.
        """
        labels, probabilities = _checked(labels, probabilities)
        classes = np.arange(probabilities.shape[1])
        predicted = probabilities.argmax(axis=1)
        precision, recall, f1, support = metrics.precision_recall_fscore_support(
            labels, predicted, labels=classes, zero_division=0.0
        )
        per_class = tuple(
            _figures(labels == c, probabilities[:, c], float(precision[c]), float(recall[c]), float(f1[c]))
            for c in classes
        )
        present = support > 0
        total = probabilities.sum(axis=1, keepdims=True)
        aucs = [figures.auc for figures in per_class if figures.auc is not None]
        return cls(
            examples=len(labels),
            accuracy=float(np.mean(predicted == labels)),
            macro_precision=float(precision[present].mean()),
            macro_recall=float(recall[present].mean()),
            macro_f1=float(f1[present].mean()),
            macro_auc=float(np.mean(aucs)) if aucs else None,
            # float32 rows sum to 1 only roughly. Scaled here alone, because it would part scores that tie.
            log_loss=float(metrics.log_loss(labels, probabilities / total, labels=classes)),
            confusion=metrics.confusion_matrix(labels, predicted, labels=classes).astype(np.int64),
            per_class=per_class,
        )

    def to_json(self) -> dict[str, Any]:
        """Return the report as what `json.dumps` takes, ROC curves thinned to at most 101 points."""
        figures = [{**asdict(each), "roc": _thinned(each.roc)} for each in self.per_class]
        return {**asdict(self), "confusion": self.confusion.tolist(), "per_class": figures}


def _checked(
    labels: NDArray[np.integer[Any]], probabilities: NDArray[np.floating[Any]]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    if labels.ndim != 1 or probabilities.ndim != 2 or len(labels) != len(probabilities) or len(labels) == 0:
        raise ValueError(
            f"found labels {labels.shape} and probabilities {probabilities.shape}, "
            "expected (n,) and (n, classes) with n ≥ 1"
        )
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"found labels of type {labels.dtype}, expected integers")
    if labels.min() < 0 or labels.max() >= probabilities.shape[1]:
        raise ValueError(f"found a label outside 0 … {probabilities.shape[1] - 1}")
    wide = probabilities.astype(np.float64)
    total = wide.sum(axis=1)
    if not (np.isfinite(wide).all() and wide.min() >= 0.0 and np.allclose(total, 1.0, rtol=0.0, atol=1e-4)):
        raise ValueError(
            "found a row of probabilities that is not finite, not positive, or does not sum to 1"
        )
    return labels.astype(np.int64), wide


def _figures(
    is_class: NDArray[np.bool_], scores: NDArray[np.float64], precision: float, recall: float, f1: float
) -> ClassFigures:
    support = int(is_class.sum())
    if support == 0:
        return ClassFigures(0, None, None, None, None, None)
    if support == len(is_class):
        return ClassFigures(support, precision, recall, f1, None, None)
    false_positives, true_positives, _ = metrics.roc_curve(is_class, scores)
    area = float(metrics.auc(false_positives, true_positives))
    return ClassFigures(support, precision, recall, f1, area, RocCurve(false_positives, true_positives))


def _thinned(curve: RocCurve | None) -> dict[str, list[float]] | None:
    if curve is None:
        return None
    points = len(curve.false_positive_rate)
    kept = np.unique(np.linspace(0, points - 1, num=min(points, _CURVE_POINTS)).round().astype(np.int64))
    return {
        "false_positive_rate": curve.false_positive_rate[kept].tolist(),
        "true_positive_rate": curve.true_positive_rate[kept].tolist(),
    }
