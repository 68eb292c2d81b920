"""FedAvg and FedAvgM: SGD on the mean client update, with momentum.

References:
[1] McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data".
[2] Hsu, Qi, Brown 2019, "Measuring the Effects of Non-Identical Data Distribution", section 4 (FedAvgM).
"""

from typing import Annotated

import numpy as np
from pydantic import Field

from hanse_server.optimizers.base import Params, ServerOptimizer, Vector, register


class SgdParams(Params):
    """`learning_rate` 1 and `momentum` 0 are FedAvg [1]."""

    learning_rate: Annotated[float, Field(gt=0)] = 1.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0


@register("sgd")
class Sgd(ServerOptimizer[SgdParams]):
    """v ← momentum·v + update; model ← model + learning_rate·v [2]."""

    params_type = SgdParams

    def step(self, model: Vector, update: Vector) -> Vector:
        """Return the model after one step, shape (d,), float64."""
        velocity = self.state.get("velocity", np.zeros_like(model))
        velocity = self.params.momentum * velocity + update
        self.state["velocity"] = velocity
        return model + self.params.learning_rate * velocity
