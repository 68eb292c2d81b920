"""When models are tried by the league's holdout photos, and what follows: early stop, figures, publication.

    evaluations = Evaluations(config, training, evaluation, history, conduct)
    model = training.run(rounds, on_round, evaluations.enough)
    figures = evaluations.of(model, rounds_done)

`conduct` runs one round of the evaluation's plan. Each is a release, paid by the merchants from the evaluation's own
small ε; a sum that was opened before a crash is read, not asked for again.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from hanse_common.errors import RoundFailed
from hanse_common.evaluation_estimate import estimate
from hanse_common.federated_report import FederatedReport
from hanse_common.plan import Plan
from hanse_server.config import ServerConfig
from hanse_server.coordinator import RoundOutcome
from hanse_server.early_stop import EarlyStopState
from hanse_server.storage import History, Progress
from hanse_server.training import model_digest

Conduct = Callable[[int, NDArray[np.float32]], RoundOutcome]


class Evaluations:
    """The evaluations of one training. Without an `evaluation` plan there are none.

    `on_report` hears after how many rounds a model was tried, and its figures; `on_failure` why there are none.
    """

    def __init__(
        self,
        config: ServerConfig,
        training: Progress,
        evaluation: Progress | None,
        history: History,
        conduct: Conduct,
        on_report: Callable[[int, FederatedReport], None] = lambda done, report: None,
        on_failure: Callable[[int, str], None] = lambda done, reason: None,
    ) -> None:
        self._every = config.evaluation.every if config.evaluation else 0
        self._early_stop = config.optimization.early_stop
        self._training = training
        self._evaluation = evaluation
        self._history = history
        self._conduct = conduct
        self._on_report = on_report
        self._on_failure = on_failure

    def enough(self, done: int, published: NDArray[np.float32]) -> bool:
        """Return whether the training, after `done` rounds, is to end; try `published`, shape (d,), where it is due."""
        if self._every == 0 or done % self._every != 0:
            return False
        found = self.of(published, done)
        if found is None or self._early_stop is None:
            return False
        state = EarlyStopState()
        for record in self._history.evaluations(self._training.plan.digest):
            report = FederatedReport.from_json(record.report)
            score = report.accuracy.value if report.accuracy else math.nan
            state = self._early_stop.advance(state, record.after, score)
        # A model that did not move has one record, of an earlier round, and is a miss all the same.
        state = self._early_stop.advance(state, done, found.accuracy.value if found.accuracy else math.nan)
        return self._early_stop.stops(state)

    def of(self, model: NDArray[np.float32], done: int) -> FederatedReport | None:
        """Return the figures of `model`, shape (d,), which the training had after `done` rounds.

        None when there is no evaluation plan, or its rounds are used up, or the round failed: merchants may allow a
        training and not this, and a model without figures is better than none.
        """
        evaluation = self._evaluation
        if evaluation is None:
            return None
        digest = model_digest(model)
        self._finish(evaluation)
        record = self._history.evaluation_of(digest)
        if record is not None:
            return FederatedReport.from_json(record.report)
        round_ = evaluation.rounds_released()
        if round_ >= evaluation.plan.training.rounds:
            return None
        try:
            outcome = self._conduct(round_, model)
        except RoundFailed as error:
            self._on_failure(done, str(error))
            return None
        subject = {"training": self._training.plan.digest.hex(), "after": done, "model": digest.hex()}
        evaluation.release(round_, outcome, subject=subject)
        report = self._record(evaluation, evaluation.plan, round_, outcome)
        self._on_report(done, report)
        return report

    def _finish(self, evaluation: Progress) -> None:
        """Read the sum that was opened before a crash, if there is one."""
        opened = evaluation.unapplied()
        if opened is not None:
            self._record(evaluation, evaluation.plan, *opened)

    def _record(
        self, evaluation: Progress, plan: Plan, round_: int, outcome: RoundOutcome
    ) -> FederatedReport:
        report = estimate(plan, outcome.update, len(outcome.uploaded))
        evaluation.evaluated(round_, report.to_json())
        return report


def described(report: FederatedReport) -> str:
    """Return the main figures with their intervals in a line for people."""
    figures = [
        f"{name} {100 * rate.value:.1f} % ({100 * rate.low:.1f} to {100 * rate.high:.1f})"
        for name, rate in (("accuracy", report.accuracy), ("macro F1", report.macro_f1))
        if rate is not None
    ]
    if report.log_loss is not None:
        loss = report.log_loss
        figures.append(f"log loss {loss.value:.3f} ({loss.low:.3f} to {loss.high:.3f})")
    return f"{', '.join(figures) or 'nothing that the noise left'}; on about {report.photos.value:,.0f} {report.unit}s."


def card_metrics(report: FederatedReport) -> dict[str, float | None]:
    """Return what a recognizer's card says of itself."""
    found: dict[str, float | None] = {}
    for name in ("accuracy", "macro_f1", "macro_auc", "log_loss", "expected_calibration_error"):
        figure = getattr(report, name)
        if figure is not None:
            found |= {name: figure.value, f"{name}_low": figure.low, f"{name}_high": figure.high}
    return found
