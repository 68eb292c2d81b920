"""FedAvg: the model plus the mean client update.

References: McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data",
algorithm 1; the learning rate is η of Reddi et al. 2021, "Adaptive Federated Optimization", algorithm 1.
"""

from typing import Annotated

from pydantic import Field

from hanse_server.optimizers.base import Params, ServerOptimizer, Vector, register


class FedAvgParams(Params):
    """`learning_rate` 1 takes an update as it is."""

    learning_rate: Annotated[float, Field(gt=0)] = 1.0


@register("fedavg")
class FedAvg(ServerOptimizer[FedAvgParams]):
    """model ← model + learning_rate·update. It has no state."""

    params_type = FedAvgParams

    def step(self, model: Vector, update: Vector) -> Vector:
        """Return the model after one step, shape (d,), float64."""
        return model + self.params.learning_rate * update
