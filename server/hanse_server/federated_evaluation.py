"""How good a model is on the photos that merchants hold out: noisy counts over all of them, never one's alone.

    report, outcome = evaluate(rounds, plan, round_=0, model=model)
    database.write(report.to_json())

Each round of a plan of mode `evaluation` tries one model, and merchants pay for all of them.
"""

import numpy as np
from numpy.typing import NDArray

from hanse_common.evaluation_estimate import estimate
from hanse_common.federated_report import FederatedReport
from hanse_common.plan import Plan
from hanse_server.coordinator import RoundOutcome
from hanse_server.league import Rounds


def evaluate(
    rounds: Rounds, plan: Plan, round_: int, model: NDArray[np.float32]
) -> tuple[FederatedReport, RoundOutcome]:
    """Run the round `round_`, counted from 0, with `model`, shape (plan.model_dimension,), and return what it found.

    Raises:
        ValueError: the plan has another mode or fewer rounds, or the model another shape, or is not finite; no merchant
            was asked then.
        RoundFailed: the round failed in all its attempts.
    """
    if plan.training.mode != "evaluation":
        raise ValueError(f"Expected a plan of mode evaluation, found {plan.training.mode}.")
    if not 0 <= round_ < plan.training.rounds:
        raise ValueError(f"Expected a round of 0 to {plan.training.rounds - 1}, found {round_}.")
    if model.shape != (plan.model_dimension,) or not np.isfinite(model).all():
        raise ValueError(f"model: found shape {model.shape}, expected {plan.model_dimension} finite numbers.")
    outcome = rounds.run(round_, model)
    return estimate(plan, outcome.update, len(outcome.uploaded)), outcome
