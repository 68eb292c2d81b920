"""From the noisy sum of a federated evaluation to its report: every figure with a 95 % interval.

    report = estimate(plan, total, survivors=9)        # total: what Plan.decode returns, shape (d,)
    report.accuracy

Intervals are for the noise, whose size is public, and for the choice of photos. Those of ratios are in
`hanse_common.evaluation_sums`. AUC and macro averages have theirs by linearization (the delta method); the variance of
an AUC is DeLong's [1], for scores in bins. The photos' part in that of a macro AUC, where a photo counts once for each
class, is bounded by adding up deviations. The expected calibration error is a sum of magnitudes, each of them raised
by noise and by chance: the report has the size of the true gaps that would make a sum such as was found, in the
proportions that were found, and its interval is by the same comparison.

References:
[1] DeLong, DeLong, Clarke-Pearson 1988, "Comparing the Areas under Two or More Correlated Receiver Operating
    Characteristic Curves: A Nonparametric Approach".
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse, special

from hanse_common.evaluation import CONFIDENCE_BINS, LOSS_BOUND, SCORE_BINS, SCORE_EDGES, Layout
from hanse_common.evaluation_sums import DEVIATIONS, VISIBLE, Ratios, Rows, Sums, Vector, rate
from hanse_common.federated_report import (
    ClassReport,
    FederatedReport,
    Figure,
    Rate,
    ReliabilityBin,
    RocPoint,
)
from hanse_common.modes import EvaluationTraining
from hanse_common.plan import Plan

_SIZES = np.linspace(0.0, 5.0, 2001)
"""Sizes of the true gaps that are tried, the size of those found being 1."""


def estimate(plan: Plan, total: Vector, survivors: int) -> FederatedReport:
    """Return the report on what `survivors` merchants added up.

    Args:
        plan: of mode `evaluation`.
        total: the noisy sum, shape (d,), float64: what `Plan.decode` returns.
        survivors: how many merchants, and so shares of noise, are in it.

    Raises:
        ValueError: the plan has another mode, or `total` another shape, or is not finite.
    """
    training = plan.training
    if not isinstance(training, EvaluationTraining):
        raise ValueError(f"Expected a plan of mode evaluation, found {training.mode}.")
    if total.shape != (plan.dimension,) or not np.isfinite(total).all():
        raise ValueError(f"total: expected {plan.dimension} finite numbers, found shape {total.shape}.")
    mechanism = plan.mechanism(1)
    shares = max(survivors, mechanism.shares)
    # Each merchant rounds to the grid, which adds a quarter of a step's square at most.
    variance = shares * (mechanism.noise.share**2 + 0.25) * mechanism.grid.step**2
    layout = Layout(len(plan.taxonomy.classes))
    sums = Sums(layout, total / layout.scale, variance / layout.scale**2, training.sampling_rate)
    return FederatedReport(unit=training.unit, merchants=survivors, **_figures(sums))


def _figures(sums: Sums) -> dict[str, Any]:
    """Return the fields of the report but for `unit` and `merchants`."""
    classes = _Classes.of(sums)
    areas = _Areas.of(sums)
    right = sums.rows("outcome", np.array([[1.0, 0.0]]))
    photos = sums.rows("outcome", np.ones((1, 2)))
    accuracy = sums.ratios(right, photos)
    seen = bool(accuracy.visible[0])
    cells = sums.numbers(sums.rows("confusion", sparse.eye_array(sums.layout.classes**2)))
    k = sums.layout.classes
    return {
        "photos": sums.numbers(photos)[0],
        "accuracy": accuracy.rates()[0],
        "macro_precision": classes.precision.mean,
        "macro_recall": classes.recall.mean,
        "macro_f1": classes.f1.mean,
        "macro_auc": areas.mean(sums),
        "log_loss": _log_loss(sums) if seen else None,
        "expected_calibration_error": _calibration_error(sums) if seen else None,
        "overconfidence": _overconfidence(sums) if seen else None,
        "confusion": tuple(tuple(cells[row * k : (row + 1) * k]) for row in range(k)),
        "per_class": tuple(_per_class(sums, classes, areas)),
        "reliability": tuple(_reliability(sums)),
    }


@dataclass(frozen=True)
class _Shares:
    """One figure of each class from the confusion matrix, and their mean."""

    rates: list[Rate | None]
    mean: Rate | None

    @classmethod
    def of(cls, sums: Sums, above: Rows, below: Rows, spread: float | Vector = 1.0) -> "_Shares":
        """Return the ratios of numbers of photos given by coefficients of the matrix, shape (K, K·K) each."""
        found = sums.ratios(sums.rows("confusion", above), sums.rows("confusion", below), spread)
        seen = found.visible
        if not seen.any():
            return cls(found.rates(), None)
        cells = sums.part("confusion")
        value, above, below = found.value[seen], above[seen], below[seen]
        weights = 1 / (below @ cells) / len(value)
        slopes = above.T @ weights - below.T @ (value * weights)
        (noise,) = sums.deviation(sums.rows("confusion", slopes[None]))
        deviation = math.sqrt(noise**2 + max(float(slopes**2 @ cells), 0.0))
        return cls(found.rates(), _around(float(value.mean()), deviation))


@dataclass(frozen=True)
class _Classes:
    """What the confusion matrix says of each class."""

    recall: _Shares
    precision: _Shares
    f1: _Shares

    @classmethod
    def of(cls, sums: Sums) -> "_Classes":
        k = sums.layout.classes
        each, all_ = sparse.eye_array(k), np.ones((1, k))
        true, predicted = sparse.kron(each, all_).tocsr(), sparse.kron(all_, each).tocsr()
        hits = true.multiply(predicted).tocsr()
        both = true + predicted
        raw = sums.ratios(sums.rows("confusion", 2 * hits), sums.rows("confusion", both))
        # In 2·hits − θ·both the photos' part is both·θ(1 − θ)(2 − θ); the last factor is taken at the figure.
        return cls(
            _Shares.of(sums, hits, true),
            _Shares.of(sums, hits, predicted),
            _Shares.of(sums, 2 * hits, both, 2 - np.clip(raw.value, 0.0, 1.0)),
        )


@dataclass(frozen=True)
class _Areas:
    """The area under each class's ROC curve, (K,), and its derivatives by both histograms, (K, B).

    `own_spread` and `other_spread` are what the choice of photos adds to its variance.
    """

    value: Vector
    by_own: Vector
    by_other: Vector
    own_spread: Vector
    other_spread: Vector
    visible: NDArray[np.bool_]

    @classmethod
    def of(cls, sums: Sums) -> "_Areas":
        own, other = (sums.part(name).reshape(-1, SCORE_BINS) for name in ("own", "other"))
        positives, negatives = own.sum(axis=1), other.sum(axis=1)
        each = sparse.kron(sparse.eye_array(sums.layout.classes), np.ones((1, SCORE_BINS)))
        noise = [sums.deviation(sums.rows(name, each)) for name in ("own", "other")]
        visible = (positives > np.maximum(VISIBLE * noise[0], 0.5)) & (
            negatives > np.maximum(VISIBLE * noise[1], 0.5)
        )
        positives, negatives = (np.where(visible, x, 1.0)[:, None] for x in (positives, negatives))
        # The share of the others below each bin, and of the class's own above it; equal bins count half.
        below = (np.cumsum(other, axis=1) - other / 2) / negatives
        above = 1 - (np.cumsum(own, axis=1) - own / 2) / positives
        value = (own * below).sum(axis=1) / positives[:, 0]
        by_own, by_other = (below - value[:, None]) / positives, (above - value[:, None]) / negatives
        own_spread, other_spread = (
            np.maximum((histogram * slopes**2).sum(axis=1), 0.0)
            for histogram, slopes in ((own, by_own), (other, by_other))
        )
        return cls(value, by_own, by_other, own_spread, other_spread, visible)

    def rates(self, sums: Sums) -> list[Rate | None]:
        """Return the area of each class."""
        noise = sums.deviation(self._rows(sums, np.eye(len(self.value))))
        deviations = np.sqrt(noise**2 + self.own_spread + self.other_spread)
        columns = zip(self.value, deviations, self.visible, strict=True)
        return [_around(value, deviation) if visible else None for value, deviation, visible in columns]

    def mean(self, sums: Sums) -> Rate | None:
        """Return the mean of the classes' areas."""
        seen = self.visible
        if not seen.any():
            return None
        (noise,) = sums.deviation(self._rows(sums, (seen / seen.sum())[None]))
        photos = math.sqrt(self.own_spread[seen].sum()) + np.sqrt(self.other_spread[seen]).sum()
        return _around(float(self.value[seen].mean()), math.hypot(noise, photos / seen.sum()))

    def _rows(self, sums: Sums, shares: Vector) -> Rows:
        """Return the derivatives of sums of areas, each class's with its share, (f, K), as rows of coefficients."""
        own, other = (
            (shares[:, :, None] * slopes).reshape(len(shares), -1) for slopes in (self.by_own, self.by_other)
        )
        return sums.rows("own", own) + sums.rows("other", other)


def _per_class(sums: Sums, classes: _Classes, areas: _Areas) -> list[ClassReport]:
    k = sums.layout.classes
    support = sums.numbers(sums.rows("true", sparse.eye_array(k)))
    columns = zip(
        support,
        classes.precision.rates,
        classes.recall.rates,
        classes.f1.rates,
        areas.rates(sums),
        _curves(sums),
        strict=True,
    )
    return [
        ClassReport(
            support=support, precision=precision, recall=recall, f1=f1, auc=auc, roc=roc if auc else ()
        )
        for support, precision, recall, f1, auc, roc in columns
    ]


def _curves(sums: Sums) -> list[tuple[RocPoint, ...]]:
    """Return each class's ROC curve; empty when its ends are not visible."""
    k = sums.layout.classes
    over = np.tril(np.ones((SCORE_BINS - 1, SCORE_BINS)))[:, ::-1]  # the bins over each edge, edges falling
    found = [
        _Rising.of(
            sums.ratios(
                sums.rows(name, sparse.kron(sparse.eye_array(k), over)),
                sums.rows(name, sparse.kron(sparse.eye_array(k), np.ones_like(over))),
            ),
            k,
        )
        for name in ("other", "own")
    ]
    edges = SCORE_EDGES[::-1]
    return [
        tuple(
            RocPoint(threshold=float(edge), false_positive_rate=false, true_positive_rate=true)
            for edge, false, true in zip(edges, falses, trues, strict=True)
        )
        if falses and trues
        else ()
        for falses, trues in zip(*found, strict=True)
    ]


class _Rising:
    """Rates of each class that rise along a curve; noise must not make them fall."""

    @staticmethod
    def of(found: Ratios, classes: int) -> list[list[Rate]]:
        """Return the rates of each class, none where they are not visible."""
        value, low, high = (
            np.maximum.accumulate(x.reshape(classes, -1), axis=1)
            for x in (found.value, found.low, found.high)
        )
        visible = np.asarray(found.visible.reshape(classes, -1).all(axis=1))
        return [
            [rate(*point) for point in zip(value[c], low[c], high[c], strict=True)] if visible[c] else []
            for c in range(classes)
        ]


def _log_loss(sums: Sums) -> Figure:
    """Return the mean log loss. How far photos' losses lie apart is known from their own scores' bins."""
    middles = np.concatenate([SCORE_EDGES[:1], np.sqrt(SCORE_EDGES[1:] * SCORE_EDGES[:-1]), [1.0]])
    losses = np.minimum(-np.log(middles), LOSS_BOUND)
    own = sums.part("own").reshape(-1, SCORE_BINS).sum(axis=0)
    mean = float(own @ losses) / own.sum()
    spread = max(float(own @ (losses - mean) ** 2) / own.sum(), 0.0)
    found = sums.ratios(
        sums.rows("loss", np.array([[LOSS_BOUND]])),
        sums.rows("outcome", np.ones((1, 2))),
        spread=0.0,
        own_spread=spread,
    )
    return _within(found, 0.0, LOSS_BOUND)


def _overconfidence(sums: Sums) -> Figure:
    """Return the mean largest score minus the accuracy."""
    found = sums.ratios(
        sums.rows("gap", -np.ones((1, CONFIDENCE_BINS))),
        sums.rows("outcome", np.ones((1, 2))),
        spread=0.0,
        own_spread=float(_gap_spreads(sums).sum() / sums.part("outcome").sum()),
    )
    return _within(found, -1.0, 1.0)


def _gap_spreads(sums: Sums) -> Vector:
    """Return what the choice of photos adds to the variance of each bin's gap, shape (M,)."""
    score = (np.arange(CONFIDENCE_BINS) + 0.5) / CONFIDENCE_BINS
    right, wrong = sums.part("confidence").reshape(CONFIDENCE_BINS, 2).T
    return np.maximum(right * (1 - score) ** 2 + wrong * score**2, 0.0)


def _calibration_error(sums: Sums) -> Rate:
    """Return the expected calibration error: the sum of the bins' gaps, in magnitude, over the number of photos."""
    gaps = sums.part("gap")
    noise = sums.deviation(sums.rows("gap", np.eye(CONFIDENCE_BINS)))
    deviation = np.sqrt(noise**2 + _gap_spreads(sums))
    found = np.abs(gaps)
    # The mean and the variance of each |gap + noise| (a folded normal), for each size of the true gaps.
    true = _SIZES[:, None] * found
    ratio = true / deviation
    folded = deviation * math.sqrt(2 / math.pi) * np.exp(-(ratio**2) / 2) + true * special.erf(
        ratio / math.sqrt(2)
    )
    mean = folded.sum(axis=1)
    spread = DEVIATIONS * np.sqrt((true**2 + deviation**2 - folded**2).sum(axis=1))
    sizes = [
        float(np.interp(found.sum(), expected, _SIZES))
        for expected in (np.maximum.accumulate(mean + spread), mean, np.maximum.accumulate(mean - spread))
    ]
    photos = float(sums.part("outcome").sum())
    low, value, high = (size * float(found.sum()) / photos for size in sizes)
    return rate(value, low, high)


def _reliability(sums: Sums) -> list[ReliabilityBin]:
    edges = np.linspace(0.0, 1.0, CONFIDENCE_BINS + 1)
    right = np.kron(np.eye(CONFIDENCE_BINS), [1.0, 0.0])
    photos = sums.rows("confidence", np.kron(np.eye(CONFIDENCE_BINS), [1.0, 1.0]))
    accuracy = sums.ratios(sums.rows("confidence", right), photos)
    scores = sums.rows("confidence", right) - sums.rows("gap", np.eye(CONFIDENCE_BINS))
    confidence = sums.ratios(scores, photos, spread=0.0, own_spread=1 / CONFIDENCE_BINS**2 / 12)
    columns = zip(edges, edges[1:], sums.numbers(photos), accuracy.rates(), confidence.rates(), strict=False)
    return [
        ReliabilityBin(low=float(low), high=float(high), photos=number, accuracy=share, confidence=score)
        for low, high, number, share, score in columns
    ]


def _around(value: float, deviation: float) -> Rate:
    return rate(value, value - DEVIATIONS * deviation, value + DEVIATIONS * deviation)


def _within(found: Ratios, least: float, most: float) -> Figure:
    """Return the only ratio, cut to what it may be."""
    low, value, high = (float(np.clip(x[0], least, most)) for x in (found.low, found.value, found.high))
    return Figure(value=value, low=low, high=high)
