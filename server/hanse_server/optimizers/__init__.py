"""Server optimizers: how the mean client update moves the shared model.

    optimizer = create({"name": "fedavgm", "momentum": 0.9})
    model = optimizer.step(model, update)

| name | source | state |
|---|---|---|
| `fedavg` | McMahan et al. 2017 | none |
| `fedavgm` | Hsu, Qi, Brown 2019 | a velocity |
| `fedadam`, `fedyogi`, `fedadagrad` | Reddi et al. 2021, algorithm 2 | mean and squares of the updates |

FedProx (Li et al. 2020) is `fedavg` here: its term stands in the merchants' local steps, so the plan has it, as
`training.proximal`.

An algorithm is one file: a frozen `Params` for its numbers, and a class with one overridden method, registered
under the name by which a YAML file asks for it. `hanse-sim new-algorithm` writes a documented template. The
mean update is already differentially private, so whatever an optimizer does with it is post-processing.
"""

from hanse_server.optimizers.base import Params, ServerOptimizer, create, names, register
from hanse_server.optimizers.fedadagrad import FedAdagrad
from hanse_server.optimizers.fedadam import FedAdam
from hanse_server.optimizers.fedavg import FedAvg
from hanse_server.optimizers.fedavgm import FedAvgM
from hanse_server.optimizers.fedyogi import FedYogi

__all__ = [
    "FedAdagrad",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedYogi",
    "Params",
    "ServerOptimizer",
    "create",
    "names",
    "register",
]
