"""A whole training: rounds in order, each checkpointed, up to the published model.

    model = train(rounds, signed_plan, plan, optimizer, store, initial, tail_average=0.2, on_round=print)

Stopped anywhere, a second call with the same store goes on where the last finished round left off.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hanse_common.plan import Plan, SignedPlan
from hanse_server.averaging import TailAverage
from hanse_server.coordinator import RoundOutcome
from hanse_server.optimizers import ServerOptimizer, create
from hanse_server.store import Checkpoint, Store


@dataclass(frozen=True)
class RoundReport:
    """What is known after a round: its number from 0, its outcome, and the model to publish, shape (d,)."""

    round: int
    outcome: RoundOutcome
    published: NDArray[np.float32]


class Rounds(Protocol):
    """Runs one round: `hanse_server.coordinator.MaskedRounds`, and in a simulation perhaps something else."""

    def run(self, round_: int, model: NDArray[np.float32]) -> RoundOutcome:
        """Run the round `round_`, from 0, from `model`, shape (d,). Raises `RoundFailed` when it fails for good."""
        ...


def train(
    rounds: Rounds,
    signed_plan: SignedPlan,
    plan: Plan,
    optimizer: ServerOptimizer,  # type: ignore[type-arg]
    store: Store,
    initial: NDArray[np.float32],
    *,
    tail_average: float,
    decay: bool = False,
    on_round: Callable[[RoundReport], None] = lambda report: None,
) -> NDArray[np.float32]:
    """Run the plan's rounds that are not done yet and return the published model, shape (d,), float32.

    The models of the last `tail_average` of the rounds are averaged. With `decay` the optimizer's move shrinks
    linearly to zero over the rounds, whatever the optimizer. In mode `distributed` the recipe's penalties enter here: a
    merchant's step knows photos alone.

    Raises `RoundFailed` when a round fails for good; the checkpoint of the round before stays.
    """
    store.save_plan(signed_plan)
    total = plan.training.rounds
    average = TailAverage(total, tail_average, plan.dimension)
    model = initial.astype(np.float64)
    done = 0
    if plan.training.mode == "mean":
        optimizer = create({"name": "sgd"})  # a mean is taken as it is
    checkpoint = store.load(plan.digest, plan.dimension)
    if checkpoint is not None:
        model, done = checkpoint.model, checkpoint.rounds_done
        optimizer.state = dict(checkpoint.optimizer)
        average.total, average.count = checkpoint.average_total, checkpoint.average_count

    for round_ in range(done, total):
        outcome = rounds.run(round_, model.astype(np.float32))
        update = outcome.update
        if plan.training.mode == "distributed":
            update = update - plan.recipe.model.penalty_gradient(model)
        share = 1 - round_ / total if decay else 1.0
        model = model + share * (optimizer.step(model, update) - model)
        average.add(round_, model)
        store.save(
            Checkpoint(
                plan_digest=plan.digest,
                rounds_done=round_ + 1,
                model=model,
                optimizer=optimizer.state,
                average_total=average.total,
                average_count=average.count,
            )
        )
        on_round(RoundReport(round_, outcome, average.value(model).astype(np.float32)))
    return average.value(model).astype(np.float32)
