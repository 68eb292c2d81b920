"""Server optimizers against Flower's own strategies, number by number, and where the two are meant to differ."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedYogi
from flwr.supercore.task_identity import TaskIdentity

from hanse_server.optimizers import create

Vector = np.ndarray[Any, np.dtype[np.float64]]

TAU = 0.05


@pytest.fixture(autouse=True)
def _a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower makes messages inside a task only."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def strategy(kind: Callable[..., Any], **settings: Any) -> Any:
    return kind(min_train_nodes=1, min_evaluate_nodes=1, min_available_nodes=1, **settings)


def their_step(theirs: Any, round_: int, model: Vector, update: Vector) -> Vector:
    """Return what a Flower strategy makes of one client, whose model is `model + update`."""
    record = ArrayRecord({"w": Array(model)})
    sent = Message(RecordDict(), dst_node_id=1, message_type="train")
    theirs.current_arrays = record if isinstance(theirs, FedAvgM) else {"w": model}
    trained = ArrayRecord({"w": Array(model + update)})
    content = RecordDict({"arrays": trained, "metrics": MetricRecord({"num-examples": 1})})
    arrays, _ = theirs.aggregate_train(round_, [Message(content, reply_to=sent)])
    return np.asarray(arrays["w"].numpy())


def squares_from(theirs: Any, start: float) -> Any:
    """Begin the second moment as Reddi et al. 2021 say, at τ²; Flower begins it at 0."""
    theirs.v_t = {"w": np.full(7, start)}
    return theirs


@pytest.mark.parametrize(
    ("config", "theirs", "first_round"),
    [
        ({"name": "fedavg"}, strategy(FedAvg), 1),
        (
            {"name": "fedavgm", "learning_rate": 0.5, "momentum": 0.8},
            strategy(FedAvgM, server_learning_rate=0.5, server_momentum=0.8),
            1,
        ),
        # Flower corrects Adam's bias by the next round's number; so its round 0 is the first. What it leaves out
        # of the correction, τ, must be small for the two to be one.
        (
            {"name": "fedadam", "learning_rate": 0.1, "beta1": 0.8, "beta2": 0.95, "tau": 1e-14},
            strategy(FedAdam, eta=0.1, beta_1=0.8, beta_2=0.95, tau=1e-14),
            0,
        ),
        (
            {"name": "fedyogi", "learning_rate": 0.1, "beta1": 0.8, "beta2": 0.95, "tau": TAU},
            squares_from(strategy(FedYogi, eta=0.1, beta_1=0.8, beta_2=0.95, tau=TAU), TAU**2),
            1,
        ),
        (
            {"name": "fedadagrad", "learning_rate": 0.1, "tau": TAU},
            squares_from(strategy(FedAdagrad, eta=0.1, tau=TAU), TAU**2),
            1,
        ),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else None,
)
def test_steps_are_those_of_flower(config: dict[str, Any], theirs: Any, first_round: int) -> None:
    ours, rng = create(config), np.random.default_rng(3)
    model = mine = np.linspace(-1, 1, 7)
    for round_ in range(first_round, first_round + 20):
        update = rng.normal(size=7)
        model = their_step(theirs, round_, model, update)
        mine = ours.step(mine, update)
        np.testing.assert_allclose(mine, model, rtol=1e-9, atol=1e-9)


def test_the_oracle_can_disagree() -> None:
    theirs = squares_from(strategy(FedYogi, eta=0.1, beta_1=0.8, beta_2=0.95, tau=TAU), 0.0)
    ours = create({"name": "fedyogi", "learning_rate": 0.1, "beta1": 0.8, "beta2": 0.95, "tau": TAU})
    model, update = np.zeros(7), np.full(7, 0.01)
    assert not np.allclose(ours.step(model, update), their_step(theirs, 1, model, update))
