"""A frontier: accuracy against ε, with the seeds' spread. Values only; `sweep` makes them, `plots` draws them."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scipy import stats


@dataclass(frozen=True)
class Point:
    """One point of a frontier: the ε that merchants paid at most, and the accuracy of each seed."""

    epsilon: float
    accuracies: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean accuracy."""
        return statistics.fmean(self.accuracies)

    @property
    def interval(self) -> float:
        """Half the width of Student's 95 % interval of the mean; 0 for a single seed."""
        count = len(self.accuracies)
        if count < 2:
            return 0.0
        quantile = float(stats.t.ppf(0.975, count - 1))
        return quantile * statistics.stdev(self.accuracies) / math.sqrt(count)


@dataclass(frozen=True)
class Frontier:
    """An experiment's points, by growing ε."""

    name: str
    points: tuple[Point, ...]

    def to_json(self) -> dict[str, Any]:
        """Return it as a JSON object."""
        points = [
            {
                "epsilon": point.epsilon,
                "accuracy": point.mean,
                "interval": point.interval,
                "accuracies": list(point.accuracies),
            }
            for point in self.points
        ]
        return {"name": self.name, "points": points}


def summary(frontier: Frontier) -> Sequence[str]:
    """Return a line for each point, for a person."""
    return [
        f"ε ≤ {point.epsilon:.3f}: accuracy {100 * point.mean:.2f} ± {100 * point.interval:.2f} % "
        f"(mean of {len(point.accuracies)} seeds, 95 % interval)"
        for point in frontier.points
    ]
