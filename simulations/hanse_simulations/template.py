"""A server optimizer of your own, in one file: `hanse-sim new-algorithm` copies this one.

Name the file under `extensions:` in an experiment, and the optimizer under `optimization:`:

    extensions: [my_algorithm.py]
    optimization:
      optimizer: {name: my-algorithm, learning_rate: 1.0, ceiling: 0.5}

This one is FedAvg that shortens an update whose norm is over a ceiling. Change three things: the name, the
numbers, the step. What you are given is public by then: the mean of differentially private updates. So nothing
you do with it can cost a merchant any privacy, and nothing you do can get it back either.
"""

from typing import Annotated

import numpy as np
from pydantic import Field

from hanse_server.optimizers import Params, ServerOptimizer, register
from hanse_server.optimizers.base import Vector


class MyParams(Params):
    """The algorithm's numbers, as they stand in YAML: typed, bounded, with defaults."""

    learning_rate: Annotated[float, Field(gt=0)] = 1.0
    ceiling: Annotated[float, Field(gt=0)] = 1.0


@register("my-algorithm")
class MyAlgorithm(ServerOptimizer[MyParams]):
    """model ← model + learning_rate · update · min(1, ceiling/‖update‖)."""

    params_type = MyParams

    def step(self, model: Vector, update: Vector) -> Vector:
        """Return the model after one step; both arguments have shape (d,), float64.

        Whatever must survive a restart goes into `self.state`, float64 arrays by name; this one needs none.
        """
        norm = float(np.linalg.norm(update))
        return model + self.params.learning_rate * min(1.0, self.params.ceiling / max(norm, 1e-12)) * update
