"""Iterate averaging: the published model is the mean of the last rounds' models.

Each round's model carries fresh noise; their mean carries less, at no cost in privacy (post-processing).
References: Polyak, Juditsky 1992, "Acceleration of Stochastic Approximation by Averaging".
"""

import math

import numpy as np
from numpy.typing import NDArray


class TailAverage:
    """The running mean of the models of the last `fraction` of `rounds` rounds.

    `total`, shape (d,), float64, and `count` are all of its state.
    """

    def __init__(self, rounds: int, fraction: float, dimension: int) -> None:
        self._first = rounds - math.ceil(rounds * fraction - 1e-9)  # 10 · 0.9 is a little more than 9
        self.total = np.zeros(dimension)
        self.count = 0

    def add(self, round_: int, model: NDArray[np.float64]) -> None:
        """Take in the model, shape (d,), that the round `round_`, counted from 0, ended with."""
        if round_ >= self._first:
            self.total = self.total + model
            self.count += 1

    def value(self, latest: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the mean, shape (d,); before the tail begins, `latest`."""
        return self.total / self.count if self.count else latest
