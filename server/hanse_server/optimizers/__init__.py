"""Server optimizers: how the mean client update moves the shared model.

    optimizer = create({"name": "sgd", "momentum": 0.9})
    model = optimizer.step(model, update)

An algorithm is one file: a frozen `Params` for its numbers, and a class with one overridden method, registered
under the name by which a YAML file asks for it. `hanse-sim new-algorithm` writes a documented template. The
mean update is already differentially private, so whatever an optimizer does with it is post-processing.
"""

from hanse_server.optimizers.adam import Adam
from hanse_server.optimizers.base import Params, ServerOptimizer, create, names, register
from hanse_server.optimizers.sgd import Sgd

__all__ = ["Adam", "Params", "ServerOptimizer", "Sgd", "create", "names", "register"]
