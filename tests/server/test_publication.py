"""The gate before a release: figures that are too low, or missing where there should be some, keep it shut."""

from collections.abc import Callable

import numpy as np
import pytest

from hanse_common.errors import ReleaseRefused
from hanse_common.evaluation import Layout
from hanse_common.evaluation_estimate import estimate
from hanse_common.federated_report import FederatedReport
from hanse_common.modes import EvaluationTraining
from hanse_common.plan import Cohort, Plan
from hanse_server.config import Publication
from hanse_server.publication import judge

MakePlan = Callable[..., Plan]


@pytest.fixture
def reported(make_plan: MakePlan) -> Callable[..., FederatedReport]:
    """Return figures of a recognizer that is right so often, on photos of three classes."""
    training = EvaluationTraining(rounds=1, expected_batch=3000.0, noise_multiplier=4.0)
    plan = make_plan(cohort=Cohort(min_merchants=5, max_merchants=7)).model_copy(
        update={"training": training}
    )
    plan = plan.model_copy(update={"dimension": plan.expected_dimension})

    def report(right: float, photos: int = 3000) -> FederatedReport:
        labels = np.arange(photos) % 3
        said = np.where(np.arange(photos) < right * photos, labels, (labels + 1) % 3)
        layout = Layout(3)
        total = layout.sum(labels, np.full((photos, 3), 0.1) + 0.7 * np.eye(3)[said])
        return estimate(plan, np.float64(layout.grid.fine_unit) * total, 5)

    return report


def test_figures_must_reach_the_minimum_and_those_of_the_recognizer_before(
    reported: Callable[..., FederatedReport],
) -> None:
    asked = Publication(minimum=0.7, tolerance=0.02)
    assert "accuracy: 0.7" in judge(asked, reported(0.75), None)[0]
    with pytest.raises(ReleaseRefused, match=r"expected at least 0\.7"):
        judge(asked, reported(0.65), None)
    judge(asked, reported(0.79), reported(0.8))
    with pytest.raises(ReleaseRefused, match=r"at most 0\.02 less"):
        judge(asked, reported(0.75), reported(0.8))


def test_the_lower_end_counts_where_certainty_is_asked_for(reported: Callable[..., FederatedReport]) -> None:
    found = reported(0.72, photos=300)
    judge(Publication(minimum=0.7), found, None)
    with pytest.raises(ReleaseRefused):
        judge(Publication(minimum=0.7, certain=True), found, None)


def test_figures_that_are_missing_keep_it_shut_where_there_should_be_some(
    reported: Callable[..., FederatedReport],
) -> None:
    """One merchant can make an evaluation fail: its sum is then implausible, and the model has no figures."""
    assert "no figures" in judge(Publication(), None, None)[0]
    for released, tried in ((reported(0.8), False), (None, True)):
        with pytest.raises(ReleaseRefused, match="without-figures"):
            judge(Publication(), None, released, tried=tried)
    with pytest.raises(ReleaseRefused, match="none, expected"):  # all of it is noise
        judge(Publication(), reported(0.8, photos=3), None)
