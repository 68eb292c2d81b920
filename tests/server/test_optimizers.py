"""Server optimizers against torch's own and their papers' formulas, and iterate averaging against a plain mean."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from hanse_common.errors import ConfigError
from hanse_server import optimizers
from hanse_server.averaging import TailAverage
from hanse_server.optimizers import Params, ServerOptimizer, base, create

ALL = ("fedadagrad", "fedadam", "fedavg", "fedavgm", "fedyogi")


def updates() -> Iterator[np.ndarray[Any, np.dtype[np.float64]]]:
    rng = np.random.default_rng(5)
    for _ in range(20):
        yield rng.normal(size=7)


@pytest.mark.parametrize(
    ("config", "peer"),
    [
        ({"name": "fedavg"}, lambda p: torch.optim.SGD(p, lr=1.0)),
        ({"name": "fedavg", "learning_rate": 0.2}, lambda p: torch.optim.SGD(p, lr=0.2)),
        ({"name": "fedavgm"}, lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9)),
        (
            {"name": "fedavgm", "learning_rate": 0.3, "momentum": 0.8, "nesterov": True},
            lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.8, nesterov=True),
        ),
        (
            {"name": "fedadam", "learning_rate": 0.05, "beta1": 0.8, "beta2": 0.95, "tau": 1e-3},
            lambda p: torch.optim.Adam(p, lr=0.05, betas=(0.8, 0.95), eps=1e-3),
        ),
        (
            {"name": "fedadagrad", "learning_rate": 0.05, "tau": 0.3},
            lambda p: torch.optim.Adagrad(p, lr=0.05, initial_accumulator_value=0.3**2, eps=0.3),
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


@pytest.mark.parametrize("name", ALL)
def test_state_is_all_that_a_restart_needs(name: str) -> None:
    whole, model = create({"name": name}), np.zeros(7)
    first, resumed = create({"name": name}), np.zeros(7)
    for index, update in enumerate(updates()):
        if index == 10:
            state = {name: array.copy() for name, array in first.state.items()}
            first = create({"name": name})
            first.state = state
        model, resumed = whole.step(model, update), first.step(resumed, update)
    assert np.array_equal(model, resumed)


@pytest.mark.parametrize("name", ALL)
def test_a_step_changes_neither_model_nor_update_nor_an_older_state(name: str) -> None:
    optimizer, model = create({"name": name}), np.ones(7)
    for update in updates():
        before = model.copy(), update.copy()
        states = {key: (array, array.copy()) for key, array in optimizer.state.items()}
        after = optimizer.step(model, update)
        assert np.array_equal(model, before[0])
        assert np.array_equal(update, before[1])
        assert all(np.array_equal(array, copy) for array, copy in states.values())
        model = after


@pytest.mark.parametrize("name", ["fedadam", "fedyogi", "fedadagrad"])
def test_an_update_of_zero_moves_nothing_at_first_and_nothing_is_infinite(name: str) -> None:
    optimizer = create({"name": name})
    model = optimizer.step(np.ones(7), np.zeros(7))
    assert np.array_equal(model, np.ones(7))
    for scale in (1e-12, 1e6, 0.0):
        model = optimizer.step(model, np.full(7, scale))
        assert np.isfinite(model).all()


def test_yogi_forgets_a_large_update_slower_than_adam() -> None:
    """What Yogi is for: after a large update, its steps do not grow again at once (Zaheer et al. 2018, section 3)."""
    sizes = {}
    for name in ("fedyogi", "fedadam"):
        optimizer = create({"name": name, "learning_rate": 1.0, "beta1": 0.0, "beta2": 0.9})
        model = optimizer.step(np.zeros(1), np.full(1, 10.0))
        for _ in range(200):
            after = optimizer.step(model, np.full(1, 0.1))
            model, moved = after, after - model
        sizes[name] = float(moved[0])
    assert sizes["fedyogi"] < 0.1 * sizes["fedadam"]


def test_all_known_names() -> None:
    # Another test of the same process may have registered one of its own.
    assert set(ALL) <= set(optimizers.names())
    assert not {"sgd", "adam", "fedprox"} & set(optimizers.names())


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"name": "fedavgg"}, r"expected one of .*fedadagrad, fedadam, fedavg, fedavgm, fedyogi"),
        ({}, "optimizer.name"),
        ({"name": ["fedavg"]}, "optimizer.name"),
        ({"name": "fedavgm", "momentum": 1.0}, "optimizer.momentum: found 1.0"),
        ({"name": "fedavg", "momentum": 0.5}, "optimizer.momentum"),
        ({"name": "fedadam", "beta1": "x", "beta2": -1}, "optimizer.beta2"),
        ({"name": "fedadagrad", "beta2": 0.9}, "optimizer.beta2"),
        ({"name": "fedyogi", "tau": 0}, "optimizer.tau"),
        ({"name": "sgd", "momentum": 0.9}, "now called fedavg, and fedavgm where it has a momentum"),
        ({"name": "adam"}, "now called fedadam, and its epsilon tau"),
        ({"name": "fedprox"}, "FedProx is fedavg here, and proximal in the plan"),
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

    with pytest.raises(ValueError, match="fedavg"):
        optimizers.register("fedavg")(Other)
    assert isinstance(create({"name": "fedavg"}), optimizers.FedAvg)


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
        create({"name": "fedavg", "learning_rate": float("inf")})
