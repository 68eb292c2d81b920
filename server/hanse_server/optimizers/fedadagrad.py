"""FedAdagrad: each number's step shrinks with the sum of the squares of its updates.

References:
[1] Reddi et al. 2021, "Adaptive Federated Optimization", algorithm 2.
[2] Duchi, Hazan, Singer 2011, "Adaptive Subgradient Methods for Online Learning and Stochastic Optimization".

The sum begins at τ², the least that [1] allows. It has no β₂, since nothing of the sum is forgotten.
"""

from typing import Annotated

import numpy as np
from pydantic import Field

from hanse_server.optimizers.base import Params, ServerOptimizer, Vector, register


class FedAdagradParams(Params):
    """Names as in [1], whose experiments have `beta1` 0; `tau` is in the units of an update."""

    learning_rate: Annotated[float, Field(gt=0)] = 0.1
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.0
    tau: Annotated[float, Field(gt=0)] = 1e-3


@register("fedadagrad")
class FedAdagrad(ServerOptimizer[FedAdagradParams]):
    """m ← β₁m + (1−β₁)u; v ← v + u²; model ← model + lr·m/(√v + τ) [1]."""

    params_type = FedAdagradParams

    def step(self, model: Vector, update: Vector) -> Vector:
        """Return the model after one step, shape (d,), float64."""
        params = self.params
        mean = self.state.get("mean", np.zeros_like(model))
        squares = self.state.get("squares", np.full_like(model, params.tau**2))
        mean = params.beta1 * mean + (1 - params.beta1) * update
        squares = squares + update**2
        self.state.update(mean=mean, squares=squares)
        return model + params.learning_rate * mean / (np.sqrt(squares) + params.tau)
