"""FedYogi: as FedAdam, but the variance grows and shrinks by steps of a bounded size.

References:
[1] Reddi et al. 2021, "Adaptive Federated Optimization", algorithm 2.
[2] Zaheer et al. 2018, "Adaptive Methods for Nonconvex Optimization", algorithm 2 (Yogi).

The variance begins at τ², the least that [1] allows, and nothing is corrected for a bias, as in [1].
"""

from typing import Annotated

import numpy as np
from pydantic import Field

from hanse_server.optimizers.base import Params, ServerOptimizer, Vector, register


class FedYogiParams(Params):
    """Names and defaults as in [1]; `tau` is in the units of an update."""

    learning_rate: Annotated[float, Field(gt=0)] = 0.01
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    tau: Annotated[float, Field(gt=0)] = 1e-3


@register("fedyogi")
class FedYogi(ServerOptimizer[FedYogiParams]):
    """m ← β₁m + (1−β₁)u; v ← v − (1−β₂)u²·sign(v − u²); model ← model + lr·m/(√v + τ) [1]."""

    params_type = FedYogiParams

    def step(self, model: Vector, update: Vector) -> Vector:
        """Return the model after one step, shape (d,), float64."""
        params = self.params
        mean = self.state.get("mean", np.zeros_like(model))
        variance = self.state.get("variance", np.full_like(model, params.tau**2))
        square = update**2
        mean = params.beta1 * mean + (1 - params.beta1) * update
        variance = variance - (1 - params.beta2) * square * np.sign(variance - square)
        self.state.update(mean=mean, variance=variance)
        return model + params.learning_rate * mean / (np.sqrt(variance) + params.tau)
