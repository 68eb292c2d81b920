"""What one holdout photo contributes to a federated evaluation: a vector of public layout and of norm 1 at most.

    >>> import numpy as np
    >>> layout = Layout(classes=3)
    >>> vector = layout.sum(np.array([2]), np.array([[0.1, 0.2, 0.7]]))      # one photo of class 2, recognized
    >>> layout.dimension, int(vector[layout.parts["outcome"]][0]) == layout.weights["outcome"]
    (168, True)

A vector has the parts below, for K classes. In most of them a photo sets one coordinate, in `other` K − 1, to a public
weight. The squared weights (`SHARES`) add up to 1, so that the photo's exact norm is at most 1 whatever it shows.

    part         coordinates   a photo sets
    outcome      2             right or wrong
    true         K             its class
    predicted    K             the class that was recognized
    confusion    K·K           its class and the one that was recognized
    own          K·B           its class c and the bin of the score p_c
    other        K·B           each other class c and the bin of the score p_c
    confidence   M·2           the bin of the largest score, right or wrong
    gap          M             in that bin: 1 if right, else 0, minus the largest score
    loss         1             −ln p of its own class, cut to LOSS_BOUND, over LOSS_BOUND

Several parts count the same photos: what is asked most often, such as how many are right, has a coordinate of its own,
which has less noise than a sum of K of the confusion's. `hanse_common.evaluation_estimate` brings all parts together.

Bins of scores are narrow near 0, where scores pile up. Shares and bins were chosen by measurement, so that at
ε = 0.5 and 6000 photos of ten classes the intervals of accuracy, macro F1 and macro AUC are about as short as they get
together. They are part of the protocol: merchants and server must agree on them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hanse_common.privacy.encoding import Grid

CLIPPING_NORM = 1.0
"""The largest Euclidean norm of a photo's vector: the only one that plans of mode `evaluation` have."""

MAX_CLASSES = 256
"""Bound of K: a confusion matrix of more would drown in noise, and in a database."""

_LOG_ODDS = np.concatenate([[-7.0, -5.5, -4.5], np.linspace(-3.75, 0.0, 11), [0.75, 1.5, 2.5, 4.0, 6.0]])

SCORE_EDGES: NDArray[np.float64] = 1 / (1 + np.exp(-_LOG_ODDS))
"""The inner edges of the bins of scores, closest in log odds between 0.02 and 0.5.

There even a model that is never sure tells classes apart, as one does that was trained under much noise.
"""

SCORE_BINS = len(SCORE_EDGES) + 1
CONFIDENCE_BINS = 10
"""M: bins of the largest score, all of the same width."""

LOSS_BOUND = 6.0
"""A photo's log loss counts as at most so much, in nats."""

SHARES: Mapping[str, int] = {
    "outcome": 180,
    "true": 70,
    "predicted": 50,
    "confusion": 170,
    "own": 190,
    "other": 130,
    "confidence": 30,
    "gap": 120,
    "loss": 60,
}
"""The part of the squared norm that each part of the vector has, in thousandths."""


@dataclass(frozen=True)
class Layout:
    """The vector for `classes` classes. Raises `ValueError` unless there are 2 to `MAX_CLASSES`."""

    classes: int

    def __post_init__(self) -> None:
        if not 2 <= self.classes <= MAX_CLASSES:
            raise ValueError(f"mode evaluation: found {self.classes} classes, expected 2 to {MAX_CLASSES}.")

    @cached_property
    def parts(self) -> dict[str, slice]:
        """Where each part lies in the vector."""
        k = self.classes
        lengths = {
            "outcome": 2,
            "true": k,
            "predicted": k,
            "confusion": k * k,
            "own": k * SCORE_BINS,
            "other": k * SCORE_BINS,
            "confidence": 2 * CONFIDENCE_BINS,
            "gap": CONFIDENCE_BINS,
            "loss": 1,
        }
        ends = np.cumsum(list(lengths.values())).tolist()
        return {
            name: slice(end - length, end) for (name, length), end in zip(lengths.items(), ends, strict=True)
        }

    @property
    def dimension(self) -> int:
        """d: how many coordinates the vector has."""
        return int(self.parts["loss"].stop)

    @cached_property
    def grid(self) -> Grid:
        """The grid of the vectors' sums."""
        return Grid(CLIPPING_NORM, self.dimension)

    @cached_property
    def weights(self) -> dict[str, int]:
        """What a photo adds to a coordinate of each part, in the grid's fine units: exact, the root rounded down."""
        norm = round(CLIPPING_NORM / self.grid.fine_unit)
        set_at_once = {"other": self.classes - 1}
        total = sum(SHARES.values())
        return {
            name: math.isqrt(share * norm**2 // (total * set_at_once.get(name, 1)))
            for name, share in SHARES.items()
        }

    @cached_property
    def scale(self) -> NDArray[np.float64]:
        """What a photo adds to each coordinate, shape (d,), float64: a sum over it is a number of photos."""
        scale = np.empty(self.dimension)
        for name, where in self.parts.items():
            scale[where] = self.weights[name] * self.grid.fine_unit
        return scale

    def sum(
        self, labels: NDArray[np.integer[Any]], probabilities: NDArray[np.floating[Any]]
    ) -> NDArray[np.int64]:
        """Return the exact sum of the vectors of some photos.

        Args:
            labels: shape (n,), each photo's class; n below 2¹⁶, so that nothing overflows.
            probabilities: shape (n, K), each photo's scores. A photo whose scores are not probabilities, or whose
                label is no class, counts as zero.

        Returns:
            Shape (d,), int64, in the grid's fine units.
        """
        k, parts, weights = self.classes, self.parts, self.weights
        scores = probabilities.astype(np.float64)
        usable = (labels >= 0) & (labels < k) & ((scores >= 0) & (scores <= 1)).all(axis=1)
        scores, label = scores[usable], labels[usable].astype(np.int64)
        count = len(label)
        rows, predicted = np.arange(count), scores.argmax(axis=1)
        right = predicted == label
        confidence = scores[rows, predicted]
        place = np.minimum((confidence * CONFIDENCE_BINS).astype(np.int64), CONFIDENCE_BINS - 1)
        bins = np.arange(k) * SCORE_BINS + np.searchsorted(SCORE_EDGES, scores, side="right")
        others = np.ones((count, k), dtype=np.bool_)
        others[rows, label] = False

        set_ = {
            "outcome": (~right).astype(np.int64),
            "true": label,
            "predicted": predicted,
            "confusion": label * k + predicted,
            "own": bins[rows, label],
            "other": bins[others],
            "confidence": 2 * place + ~right,
        }
        total = np.zeros(self.dimension, dtype=np.int64)
        for name, indices in set_.items():
            where = parts[name]
            total[where] = weights[name] * np.bincount(indices, minlength=where.stop - where.start)
        # Cut toward zero: rounding must not lengthen.
        gaps = np.trunc((right - confidence) * weights["gap"]).astype(np.int64)
        np.add.at(total[parts["gap"]], place, gaps)
        with np.errstate(divide="ignore"):
            losses = np.clip(-np.log(scores[rows, label]), 0.0, LOSS_BOUND) / LOSS_BOUND
        total[parts["loss"]] = np.trunc(losses * weights["loss"]).astype(np.int64).sum()
        return total
