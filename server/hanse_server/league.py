"""A whole training: rounds in order, each recorded, up to the published model.

    model = train(rounds, progress, optimizer, initial, tail_average=0.2, on_round=print)

Stopped anywhere, a second call with the same progress goes on where the last finished round left off.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hanse_common.errors import StorageError
from hanse_common.plan import Plan
from hanse_server.averaging import TailAverage
from hanse_server.coordinator import RoundOutcome
from hanse_server.optimizers import ServerOptimizer, create
from hanse_server.storage.progress import Checkpoint, Progress


@dataclass(frozen=True)
class RoundReport:
    """What is known after a round: its number from 0, its outcome, and the model to publish, shape (d,).

    `seconds` is how long it took, 0 where its sum was opened before a restart.
    """

    round: int
    outcome: RoundOutcome
    published: NDArray[np.float32]
    seconds: float = 0.0


class Rounds(Protocol):
    """Runs one round: `hanse_server.coordinator.MaskedRounds`, and in a simulation perhaps something else."""

    def run(self, round_: int, model: NDArray[np.float32]) -> RoundOutcome:
        """Run the round `round_`, from 0, from `model`, shape (d,). Raises `RoundFailed` when it fails for good."""
        ...


def train(
    rounds: Rounds,
    progress: Progress,
    optimizer: ServerOptimizer[Any],
    initial: NDArray[np.float32],
    *,
    tail_average: float,
    factor: Callable[[int], float] = lambda round_: 1.0,
    enough: Callable[[int, NDArray[np.float32]], bool] = lambda done, published: False,
    on_round: Callable[[RoundReport], None] = lambda report: None,
) -> NDArray[np.float32]:
    """Run the plan's rounds that are not done yet and return the published model, shape (d,), float32.

    The models of the last `tail_average` of the rounds are averaged. `factor` of a round, from 0, scales the
    optimizer's move, whatever the optimizer (`hanse_server.schedules`). `enough` may end the training early: it is
    asked between rounds how many are done and what would be published. In mode `distributed` the recipe's penalties
    enter here: a merchant's step knows photos alone.

    Raises `RoundFailed` when a round fails for good; the checkpoint of the round before stays.
    """
    plan = progress.plan
    total = plan.training.rounds
    average = TailAverage(total, tail_average, plan.dimension)
    model = initial.astype(np.float64)
    done = 0
    if plan.training.mode in ("mean", "trends"):
        optimizer, factor = create({"name": "fedavg"}), lambda round_: 1.0  # a sum is taken as it is
    checkpoint = progress.checkpoint()
    if checkpoint is not None:
        _require_shape(checkpoint, plan)
        model, done = checkpoint.model, checkpoint.rounds_done
        optimizer.state = dict(checkpoint.optimizer)
        average.total, average.count = checkpoint.average_total, checkpoint.average_count

    opened, first = progress.unapplied(), progress.rounds_done()
    for round_ in range(done, total):
        if opened is not None and opened[0] == round_:
            outcome, seconds = opened[1], 0.0
        elif round_ < first:
            continue  # left out after a restore
        elif round_ and enough(round_, average.value(model).astype(np.float32)):
            break
        else:
            began = time.monotonic()
            outcome = rounds.run(round_, model.astype(np.float32))
            seconds = time.monotonic() - began
            progress.release(round_, outcome, seconds)
        update = outcome.update
        if plan.training.mode == "distributed":
            update = update - plan.recipe.model.penalty_gradient(model)
        model = model + factor(round_) * (optimizer.step(model, update) - model)
        average.add(round_, model)
        progress.apply(Checkpoint(round_ + 1, model, optimizer.state, average.total, average.count))
        on_round(RoundReport(round_, outcome, average.value(model).astype(np.float32), seconds))
    return average.value(model).astype(np.float32)


def published_so_far(progress: Progress, tail_average: float) -> NDArray[np.float32] | None:
    """Return what would be published of the rounds that are done, shape (d,), float32; None when there are none."""
    checkpoint = progress.checkpoint()
    if checkpoint is None:
        return None
    _require_shape(checkpoint, progress.plan)
    average = TailAverage(progress.plan.training.rounds, tail_average, progress.plan.dimension)
    average.total, average.count = checkpoint.average_total, checkpoint.average_count
    return average.value(checkpoint.model).astype(np.float32)


def _require_shape(checkpoint: Checkpoint, plan: Plan) -> None:
    if checkpoint.model.shape != (plan.dimension,):
        raise StorageError(
            f"The checkpoint's model has shape {checkpoint.model.shape}, expected ({plan.dimension},); restore the "
            "state from a backup."
        )
