"""FedAvgM: SGD with momentum on the mean client update.

References:
[1] Hsu, Qi, Brown 2019, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
    Classification", section 4.3: v ← βv + Δw; w ← w − v.
[2] Sutskever et al. 2013, "On the importance of initialization and momentum in deep learning", section 2
    (Nesterov's momentum, in the form that torch.optim.SGD has).
"""

from typing import Annotated

import numpy as np
from pydantic import Field

from hanse_server.optimizers.base import Params, ServerOptimizer, Vector, register


class FedAvgMParams(Params):
    """`momentum` is β of [1]. With `nesterov` a step looks ahead by the velocity's next one [2]."""

    learning_rate: Annotated[float, Field(gt=0)] = 1.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = False


@register("fedavgm")
class FedAvgM(ServerOptimizer[FedAvgMParams]):
    """v ← momentum·v + update; model ← model + learning_rate·v [1], or + learning_rate·(update + momentum·v) [2]."""

    params_type = FedAvgMParams

    def step(self, model: Vector, update: Vector) -> Vector:
        """Return the model after one step, shape (d,), float64."""
        params = self.params
        velocity = self.state.get("velocity", np.zeros_like(model))
        velocity = params.momentum * velocity + update
        self.state["velocity"] = velocity
        move = update + params.momentum * velocity if params.nesterov else velocity
        return model + params.learning_rate * move
