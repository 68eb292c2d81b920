"""Server optimizers against torch's own, and iterate averaging against a plain mean."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from hanse_common.errors import ConfigError
from hanse_server import optimizers
from hanse_server.averaging import TailAverage
from hanse_server.optimizers import Params, ServerOptimizer, base, create


def updates() -> Iterator[np.ndarray[Any, np.dtype[np.float64]]]:
    rng = np.random.default_rng(5)
    for _ in range(20):
        yield rng.normal(size=7)


@pytest.mark.parametrize(
    ("config", "peer"),
    [
        ({"name": "sgd"}, lambda p: torch.optim.SGD(p, lr=1.0)),
        (
            {"name": "sgd", "learning_rate": 0.3, "momentum": 0.9},
            lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9),
        ),
        (
            {"name": "adam", "learning_rate": 0.05, "beta1": 0.8, "beta2": 0.95, "epsilon": 1e-3},
            lambda p: torch.optim.Adam(p, lr=0.05, betas=(0.8, 0.95), eps=1e-3),
        ),
    ],
)
def test_steps_are_those_of_torch(config: dict[str, Any], peer: Any) -> None:
    ours = create(config)
    model = np.linspace(-1, 1, 7)
    parameter = torch.nn.Parameter(torch.from_numpy(model.copy()))
    theirs = peer([parameter])
    for update in updates():
        model = ours.step(model, update)
        parameter.grad = torch.from_numpy(-update)
        theirs.step()
        assert np.allclose(model, parameter.detach().numpy(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("config", [{"name": "sgd", "momentum": 0.9}, {"name": "adam"}])
def test_state_is_all_that_a_restart_needs(config: dict[str, Any]) -> None:
    whole, model = create(config), np.zeros(7)
    first, resumed = create(config), np.zeros(7)
    for index, update in enumerate(updates()):
        if index == 10:
            state = {name: array.copy() for name, array in first.state.items()}
            first = create(config)
            first.state = state
        model, resumed = whole.step(model, update), first.step(resumed, update)
    assert np.array_equal(model, resumed)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"name": "sdg"}, "expected one of adam, sgd"),
        ({}, "optimizer.name"),
        ({"name": ["sgd"]}, "optimizer.name"),
        ({"name": "sgd", "momentum": 1.0}, "optimizer.momentum: found 1.0"),
        ({"name": "sgd", "speed": 3}, "optimizer.speed"),
        ({"name": "adam", "beta1": "x", "beta2": -1}, "optimizer.beta2"),
    ],
)
def test_a_wrong_configuration_is_named(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        create(config)


def test_two_optimizers_of_one_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_registry", dict(base._registry))

    class Other(ServerOptimizer[Params]):
        params_type = Params

        def step(self, model: base.Vector, update: base.Vector) -> base.Vector:
            return model

    with pytest.raises(ValueError, match="sgd"):
        optimizers.register("sgd")(Other)
    assert isinstance(create({"name": "sgd"}), optimizers.Sgd)


@pytest.mark.parametrize(
    ("fraction", "averaged"),
    [(0.0, [9]), (0.2, [8, 9]), (0.25, [7, 8, 9]), (0.9, list(range(1, 10))), (1.0, list(range(10)))],
)
def test_the_tail_is_averaged(fraction: float, averaged: list[int]) -> None:
    models = [np.full(3, float(index**2)) for index in range(10)]
    average = TailAverage(10, fraction, 3)
    for round_, model in enumerate(models):
        average.add(round_, model)
        if round_ < averaged[0]:
            assert np.array_equal(average.value(model), model)
    assert np.allclose(average.value(models[-1]), np.mean([models[i] for i in averaged], axis=0))


def test_an_infinite_number_is_refused() -> None:
    with pytest.raises(ConfigError, match="learning_rate"):
        create({"name": "sgd", "learning_rate": float("inf")})
