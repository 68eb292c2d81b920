"""FedAdam: Adam on the mean client update.

References:
[1] Reddi et al. 2021, "Adaptive Federated Optimization", algorithm 2.
[2] Kingma, Ba 2015, "Adam: A Method for Stochastic Optimization", algorithm 1.

Mean and variance begin at zero and are corrected for that, as in [2]: so it is Adam itself, step by step. [1] leaves
the correction out, and begins the variance at τ² or more instead.
"""

from typing import Annotated

import numpy as np
from pydantic import Field

from hanse_server.optimizers.base import Params, ServerOptimizer, Vector, register


class FedAdamParams(Params):
    """`beta1` and `beta2` as in [2]; `tau` is the adaptivity τ of [1], ε of [2], in the units of an update."""

    learning_rate: Annotated[float, Field(gt=0)] = 0.1
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    tau: Annotated[float, Field(gt=0)] = 1e-3


@register("fedadam")
class FedAdam(ServerOptimizer[FedAdamParams]):
    """m ← β₁m + (1−β₁)u; v ← β₂v + (1−β₂)u²; model ← model + lr·m̂/(√v̂ + τ) [1], m̂ = m/(1−β₁ᵗ), v̂ = v/(1−β₂ᵗ) [2]."""

    params_type = FedAdamParams

    def step(self, model: Vector, update: Vector) -> Vector:
        """Return the model after one step, shape (d,), float64."""
        params = self.params
        steps = self.state.get("steps", np.zeros(1)) + 1
        mean = self.state.get("mean", np.zeros_like(model))
        variance = self.state.get("variance", np.zeros_like(model))
        mean = params.beta1 * mean + (1 - params.beta1) * update
        variance = params.beta2 * variance + (1 - params.beta2) * update**2
        self.state.update(steps=steps, mean=mean, variance=variance)
        unbiased_mean = mean / (1 - params.beta1 ** steps[0])
        unbiased_variance = variance / (1 - params.beta2 ** steps[0])
        step: Vector = unbiased_mean / (np.sqrt(unbiased_variance) + params.tau)
        return model + params.learning_rate * step
