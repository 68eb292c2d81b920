"""What every server optimizer is, and the registry by which a configuration names one."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from hanse_common.errors import ConfigError

Vector = NDArray[np.float64]


class Params(BaseModel):
    """Base of an optimizer's numbers: frozen, nothing unknown, nothing infinite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


P = TypeVar("P", bound=Params)


class ServerOptimizer(ABC, Generic[P]):
    """Moves the model by the mean client update of a round.

    Everything that must survive a restart is in `state`: arrays of shape (d,), float64, by name. It is empty
    until the first step.
    """

    params_type: ClassVar[type[Params]]

    def __init__(self, params: P) -> None:
        self.params = params
        self.state: dict[str, Vector] = {}

    @abstractmethod
    def step(self, model: Vector, update: Vector) -> Vector:
        """Return the model after `update`, both of shape (d,), float64, in the model's units.

        `update` points downhill: it is what the merchants' own steps added, on average.
        """


_registry: dict[str, type[ServerOptimizer[Any]]] = {}

_RENAMED = {
    "sgd": "It is now called fedavg, and fedavgm where it has a momentum.",
    "adam": "It is now called fedadam, and its epsilon tau.",
    "fedprox": "FedProx is fedavg here, and proximal in the plan, under training.",
}
"""What to write instead of names that were in use, or that somebody will look for."""

C = TypeVar("C", bound=type[ServerOptimizer[Any]])


def register(name: str) -> Callable[[C], C]:
    """Return a class decorator that makes an optimizer known as `name`.

    Raises `ValueError` when another class has that name.
    """

    def decorate(optimizer: C) -> C:
        if _registry.setdefault(name, optimizer).__qualname__ != optimizer.__qualname__:
            raise ValueError(f"Two optimizers are named {name!r}; rename one.")
        _registry[name] = optimizer
        return optimizer

    return decorate


def names() -> tuple[str, ...]:
    """Return the names of all known optimizers, sorted."""
    return tuple(sorted(_registry))


def create(config: Mapping[str, Any]) -> ServerOptimizer[Any]:
    """Return the optimizer that `config` describes: its `name` and the fields of its `Params`.

    Raises `ConfigError` for an unknown name and for each field that is wrong.
    """
    numbers = dict(config)
    name = numbers.pop("name", None)
    optimizer = _registry.get(name) if isinstance(name, str) else None
    if optimizer is None:
        hint = _RENAMED.get(name, "") if isinstance(name, str) else ""
        raise ConfigError(
            f"optimizer.name: found {name!r}, expected one of {', '.join(names())}. {hint}".strip()
        )
    try:
        params = optimizer.params_type.model_validate(numbers)
    except ValidationError as error:
        faults = [
            f"optimizer.{'.'.join(map(str, fault['loc']))}: found {fault['input']!r}, {fault['msg']}."
            for fault in error.errors(include_url=False)
        ]
        raise ConfigError("\n".join(faults)) from None
    return optimizer(params)
