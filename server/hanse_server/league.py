"""A whole training: rounds in order, each checkpointed, up to the published model.

    model = train(
        transport, signed_plan, plan, optimizer, store, initial, attempts=3, tail_average=0.2, on_round=print
    )

Stopped anywhere, a second call with the same store goes on where the last finished round left off.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hanse_common.errors import RoundFailed
from hanse_common.plan import Plan, SignedPlan
from hanse_server.averaging import TailAverage
from hanse_server.coordinator import RoundOutcome, run_round
from hanse_server.optimizers import ServerOptimizer
from hanse_server.store import Checkpoint, Store
from hanse_server.transport import Transport


@dataclass(frozen=True)
class RoundReport:
    """What is known after a round: its number from 0, its outcome, and the model to publish, shape (d,)."""

    round: int
    outcome: RoundOutcome
    published: NDArray[np.float32]


def train(
    transport: Transport,
    signed_plan: SignedPlan,
    plan: Plan,
    optimizer: ServerOptimizer,  # type: ignore[type-arg]
    store: Store,
    initial: NDArray[np.float32],
    *,
    attempts: int,
    tail_average: float,
    on_round: Callable[[RoundReport], None] = lambda report: None,
) -> NDArray[np.float32]:
    """Run the plan's rounds that are not done yet and return the published model, shape (d,), float32.

    A round is tried `attempts` times at most; the models of the last `tail_average` of the rounds are averaged.

    Raises `RoundFailed` when a round fails in all its attempts; the checkpoint of the round before stays.
    """
    store.save_plan(signed_plan)
    rounds = plan.training.rounds
    average = TailAverage(rounds, tail_average, plan.dimension)
    model = initial.astype(np.float64)
    done = 0
    checkpoint = store.load(plan.digest, plan.dimension)
    if checkpoint is not None:
        model, done = checkpoint.model, checkpoint.rounds_done
        optimizer.state = dict(checkpoint.optimizer)
        average.total, average.count = checkpoint.average_total, checkpoint.average_count

    for round_ in range(done, rounds):
        outcome = _stubborn_round(transport, signed_plan, plan, round_, model, attempts, store)
        model = optimizer.step(model, outcome.update)
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


def _stubborn_round(
    transport: Transport,
    signed_plan: SignedPlan,
    plan: Plan,
    round_: int,
    model: NDArray[np.float64],
    attempts: int,
    store: Store,
) -> RoundOutcome:
    failures = []
    for _ in range(attempts):
        attempt = store.next_attempt(round_)
        try:
            return run_round(transport, signed_plan, plan, round_, attempt, model.astype(np.float32))
        except RoundFailed as failure:
            failures.append(f"attempt {attempt}: {failure}")
    raise RoundFailed(f"Round {round_ + 1} of {plan.training.rounds} failed. " + " ".join(failures))
