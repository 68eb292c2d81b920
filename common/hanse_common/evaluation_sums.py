"""A noisy sum of evaluation vectors, its parts brought together, and what noise is left in each figure of it.

    sums = Sums(layout, found, variance, sampling_rate=1.0)       # in photos, shape (d,) each
    photos = sums.rows("outcome", np.ones((1, 2)))
    sums.numbers(photos)[0]                                       # how many there are, with an interval

**Bringing the parts together.** The same photos are counted in several parts of the vector
(`hanse_common.evaluation`), so that without noise the sum would satisfy linear equations: a row of the confusion
matrix adds up to the number of photos of that class, and so on. The sum is moved to the nearest point that satisfies
them, distances weighed by the noise: the least squares estimate, and for Gaussian noise the most likely one. It costs
no privacy, and each figure gets what all parts know of it. With D the noise's variances, diagonal, and Ax = 0 the
equations, x becomes x − DAᵀ(ADAᵀ)⁻¹Ax, and its noise has the covariance D − DAᵀ(ADAᵀ)⁻¹AD.

**Ratios.** A share of photos, a/b with noise in both, has the interval of all θ for which a − θb is not too far from
zero, noise and binomial spread together: the intervals of Fieller [1] and Wilson [2] in one, which hold for small
numbers, too.

References:
[1] Fieller 1954, "Some Problems in Interval Estimation".
[2] Wilson 1927, "Probable Inference, the Law of Succession, and Statistical Inference".
"""

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import linalg, sparse

from hanse_common.evaluation import CONFIDENCE_BINS, SCORE_BINS, Layout
from hanse_common.federated_report import Count, Rate

Vector = NDArray[np.float64]
Rows: TypeAlias = Any
"""Coefficients of linear figures: a scipy.sparse.csr_array, shape (f, length)."""

DEVIATIONS = 1.959964
"""Half of a 95 % interval, in standard deviations."""

VISIBLE = 4.0
"""A number of photos below so many deviations of its noise may well be none, and nothing is divided by it."""

_BLOCK = 1024  # rows of coefficients that are multiplied at once


@dataclass(frozen=True)
class Ratios:
    """Figures a/b with their intervals, each shape (f,), and whether b is large enough."""

    value: Vector
    low: Vector
    high: Vector
    visible: NDArray[np.bool_]

    def rates(self) -> list[Rate | None]:
        """Return the figures as rates, None where b is not visible."""
        columns = zip(self.value, self.low, self.high, self.visible, strict=True)
        return [rate(value, low, high) if visible else None for value, low, high, visible in columns]


class Sums:
    """The parts of a noisy sum, brought together, and the noise that is left in them.

    Linear figures of the sum are given by rows of coefficients, a sparse matrix of shape (f, d).
    """

    def __init__(self, layout: Layout, found: Vector, variance: Vector, sampling_rate: float) -> None:
        self.layout = layout
        self.sampling_rate = sampling_rate
        self._variance = variance
        equations = _equations(layout)
        self._scaled: Rows = (equations * variance).T.tocsr()
        self._inverse: Vector = linalg.inv((equations @ self._scaled).toarray())
        self.counts: Vector = found - self._scaled @ (self._inverse @ (equations @ found))

    def part(self, name: str) -> Vector:
        """Return a part of the sum."""
        return self.counts[self.layout.parts[name]]

    def rows(self, name: str, coefficients: Vector | Rows) -> Rows:
        """Return coefficients of one part alone, shape (f, length of the part), as rows of coefficients."""
        where = self.layout.parts[name]
        inner = sparse.coo_array(coefficients)
        rows, columns = inner.coords
        shape = (coefficients.shape[0], self.layout.dimension)
        return sparse.csr_array((inner.data, (rows, columns + where.start)), shape=shape)

    def covariance(self, one: Rows, other: Rows) -> Vector:
        """Return the noise's covariance of each figure of `one` with that of `other` in the same row, shape (f,)."""
        found: Vector = one.multiply(other) @ self._variance
        for start in range(0, one.shape[0], _BLOCK):
            rows = slice(start, start + _BLOCK)
            left = one[rows] @ self._scaled
            right = left if other is one else other[rows] @ self._scaled
            found[rows] -= right.multiply(left @ self._inverse).sum(axis=1)
        return found

    def ratios(
        self,
        above: Rows,
        below: Rows,
        spread: float | Vector = 1.0,
        own_spread: float | Vector = 0.0,
    ) -> Ratios:
        """Return the ratio of two linear figures in each row.

        A photo in b is in a, or not, and so adds θ(1 − θ)·`spread` to the variance of a − θb; `own_spread` is added in
        any case.
        """
        a, b = above @ self.counts, below @ self.counts
        var_a, var_b = self.covariance(above, above), self.covariance(below, below)
        both = self.covariance(above, below)
        visible = b > np.maximum(VISIBLE * np.sqrt(np.maximum(var_b, 0.0)), 0.5)
        a, b = np.where(visible, a, 0.0), np.where(visible, b, 1.0)
        # (a − θb)² = z²·(var_a − 2θ·both + θ²·var_b + b·(spread·θ(1 − θ) + own_spread)) has two roots.
        z = np.where(visible, DEVIATIONS**2, 0.0)
        square = b**2 + z * (b * spread - var_b)
        linear = a * b + z * (b * spread / 2 - both)
        constant = a**2 - z * (var_a + b * own_spread)
        root = np.sqrt(np.maximum(linear**2 - square * constant, 0.0))
        value = a / b
        low, high = (linear - root) / square, (linear + root) / square
        return Ratios(value, np.minimum(low, value), np.maximum(high, value), visible)

    def numbers(self, rows: Rows) -> list[Count]:
        """Return linear figures as numbers of photos."""
        found, variance = rows @ self.counts, np.maximum(self.covariance(rows, rows), 0.0)
        q = self.sampling_rate
        # Each photo was counted with probability q, by a coin of its own.
        deviations = np.sqrt(variance + np.maximum(found, 0.0) * (1 - q)) / q
        return [count(*both) for both in zip(found / q, deviations, strict=True)]

    def deviation(self, rows: Rows) -> Vector:
        """Return the standard deviation of the noise in each linear figure, shape (f,)."""
        return np.sqrt(np.maximum(self.covariance(rows, rows), 0.0))


def _equations(layout: Layout) -> Rows:
    """Return A: what a sum without noise satisfies, Ax = 0. Its rows are linearly independent."""
    k, parts = layout.classes, layout.parts
    places = {name: np.arange(where.start, where.stop) for name, where in parts.items()}
    confusion = places["confusion"].reshape(k, k)
    own, other = (places[name].reshape(k, SCORE_BINS) for name in ("own", "other"))
    confidence = places["confidence"].reshape(CONFIDENCE_BINS, 2)
    right, wrong = places["outcome"].reshape(2, 1)
    diagonal = np.eye(k, dtype=np.bool_)
    # What each equation adds up, and what it takes off.
    equations = [
        (confusion[diagonal], right),
        (confusion[~diagonal], wrong),
        (confidence[:, 0], right),
        (confidence[:, 1], wrong),
    ]
    for c in range(k):
        true, predicted = places["true"][c : c + 1], places["predicted"][c : c + 1]
        equations += [
            (confusion[c], true),
            (confusion[:, c], predicted),
            (own[c], true),
            (np.concatenate([other[c], true]), places["outcome"]),
        ]
    columns = np.concatenate([np.concatenate(sides) for sides in equations])
    rows = np.repeat(np.arange(len(equations)), [len(plus) + len(minus) for plus, minus in equations])
    values = np.concatenate([np.repeat([1.0, -1.0], [len(plus), len(minus)]) for plus, minus in equations])
    return sparse.csr_array((values, (rows, columns)), shape=(len(equations), layout.dimension))


def rate(value: float, spread_low: float, spread_high: float) -> Rate:
    """Return a figure between 0 and 1 from numbers that noise may have brought beyond."""
    low, middle, high = (float(min(max(x, 0.0), 1.0)) for x in (spread_low, value, spread_high))
    return Rate(value=middle, low=low, high=high)


def count(value: float, deviation: float) -> Count:
    """Return a number of photos from one that noise may have brought below zero."""
    half = DEVIATIONS * deviation
    low, middle, high = (float(max(x, 0.0)) for x in (value - half, value, value + half))
    return Count(value=middle, low=low, high=high)
