"""A federated evaluation over real merchants: masked, charged before the holdout is touched, and right."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from hanse_client.charges import Spent
from hanse_client.examples import Examples
from hanse_client.ledger import Ledger
from hanse_common.config import load
from hanse_common.errors import ConfigError, RoundFailed
from hanse_common.evaluation import Layout
from hanse_common.federated_report import FederatedReport
from hanse_common.messages import DeclineCode
from hanse_common.modes import EvaluationTraining
from hanse_common.plan import SignedPlan
from hanse_common.vision.metrics import ClassificationReport
from hanse_server.evaluation import Evaluator
from hanse_server.federated_evaluation import evaluate
from hanse_simulations import simulation
from hanse_simulations.experiment import Experiment
from hanse_simulations.shops import merchant_names
from hanse_simulations.simulation import League, Member, seeded_members

Write = Callable[..., Path]
Told = list[tuple[str, str]]
FEATURES, MERCHANTS, CLASSES, HELD_OUT = 48, 5, 10, 400

EVALUATION: dict[str, Any] = {
    "data.merchants": MERCHANTS,
    "plan.training": {"mode": "evaluation", "expected_batch": MERCHANTS * HELD_OUT, "rounds": 2},
    "plan.privacy": {"epsilon": 2, "delta": 1e-6},
    "plan.cohort": {"min_merchants": 4, "max_merchants": MERCHANTS},
}


def shops() -> dict[str, Examples]:
    """Clouds of points, not far apart, and other ones to train on, which an evaluation must not touch."""
    found = {}
    for index, name in enumerate(merchant_names(MERCHANTS)):
        rng = np.random.default_rng(index)
        labels = rng.integers(CLASSES, size=HELD_OUT)
        inputs = rng.normal(size=(HELD_OUT, FEATURES)) + 2.5 * np.eye(CLASSES, FEATURES)[labels]
        held_out = Examples.of(inputs.astype(np.float32), labels, "cpu")
        noise = rng.normal(size=(60, FEATURES)).astype(np.float32)
        training = Examples.of(noise, np.zeros(60, dtype=np.int64), "cpu")
        found[name] = replace(training, holdout=held_out)
    return found


def head() -> NDArray[np.float32]:
    """A linear model that is right three times in four."""
    weights = np.eye(CLASSES, FEATURES) + 0.1 * np.random.default_rng(1).normal(size=(CLASSES, FEATURES))
    return np.concatenate([weights.ravel(), np.zeros(CLASSES)]).astype(np.float32)


def pooled(settings: Experiment) -> ClassificationReport:
    """What somebody would see who had all holdout photos."""
    all_ = Examples.pooled([shop.holdout for shop in shops().values() if shop.holdout is not None])
    plan = settings.plan
    return Evaluator(plan.recipe, plan.taxonomy, all_.inputs, all_.labels).report(head())


def assembled(
    settings: Experiment, folder: Path, told: Told | None = None
) -> tuple[League, dict[str, Member]]:
    heard: Told = [] if told is None else told
    members = seeded_members(settings, shops(), folder, lambda name, text: heard.append((name, text)))
    return League.assemble(settings, members, folder), members


@pytest.fixture
def experiment(write_experiment: Write) -> Callable[..., Experiment]:
    return lambda changes=None: load(Experiment, write_experiment(EVALUATION | (changes or {})))


def inside(report: FederatedReport, oracle: ClassificationReport) -> list[bool]:
    names = ("accuracy", "macro_precision", "macro_recall", "macro_f1", "macro_auc", "log_loss")
    pairs = [(getattr(report, name), getattr(oracle, name)) for name in names]
    for each, wanted in zip(report.per_class, oracle.per_class, strict=True):
        pairs += [(each.support, wanted.support), (each.recall, wanted.recall), (each.f1, wanted.f1)]
    pairs += [
        (report.confusion[i][j], int(oracle.confusion[i, j])) for i in range(CLASSES) for j in range(CLASSES)
    ]
    return [figure.low <= value <= figure.high for figure, value in pairs if figure is not None]


def test_a_league_finds_what_one_who_had_all_photos_would(
    experiment: Callable[..., Experiment], tmp_path: Path
) -> None:
    settings = experiment()
    league, members = assembled(settings, tmp_path)
    rounds, oracle = league.rounds(), pooled(settings)
    first, outcome = evaluate(rounds, league.plan, 0, head())
    assert first.merchants == len(outcome.uploaded) == MERCHANTS
    assert first.photos.low <= MERCHANTS * HELD_OUT <= first.photos.high
    assert np.mean(inside(first, oracle)) > 0.88
    second, _ = evaluate(rounds, league.plan, 1, np.zeros_like(head()))
    assert first.accuracy is not None and second.accuracy is not None
    assert first.accuracy.low > 0.6 and second.accuracy.high < 0.2, "another round tries another model"
    for member in members.values():
        spent = member.ledger.spent()
        assert len(spent.plans) == 1
        assert 1.9 < spent.epsilon <= 2


def test_with_little_noise_the_confusion_is_exact(
    experiment: Callable[..., Experiment], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ε of many thousands, which no policy would allow: it is the plan's arithmetic that is looked at."""
    settings = experiment()
    loud, _ = simulation.make_signed_plan(settings)
    quiet = loud.model_copy(update={"training": loud.training.model_copy(update={"noise_multiplier": 0.05})})
    signed = SignedPlan.sign(quiet, simulation.operator_key(settings))
    monkeypatch.setattr(simulation, "make_signed_plan", lambda _: (quiet, signed))
    monkeypatch.setattr("hanse_client.policy.Policy.check", lambda *_: None)
    spent = Spent(epsilon=0.0, delta=0.0, plans=())
    for name in ("check", "charge"):
        monkeypatch.setattr(Ledger, name, lambda *_: spent)
    league, _ = assembled(settings, tmp_path)
    report, _ = evaluate(league.rounds(), league.plan, 0, head())
    oracle = pooled(settings)
    found = np.array([[cell.value for cell in row] for row in report.confusion])
    np.testing.assert_array_equal(found.round(), oracle.confusion)
    assert report.accuracy is not None and report.accuracy.value == pytest.approx(oracle.accuracy, abs=2e-4)
    assert report.macro_f1 is not None and report.macro_f1.value == pytest.approx(oracle.macro_f1, abs=1e-3)
    assert report.macro_auc is not None and oracle.macro_auc is not None
    assert report.macro_auc.value == pytest.approx(oracle.macro_auc, abs=0.005)
    assert report.log_loss is not None and report.log_loss.value == pytest.approx(oracle.log_loss, abs=0.01)


def test_the_ledger_is_charged_before_the_holdout_is_touched(
    experiment: Callable[..., Experiment], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def noted(what: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            seen.append(what)
            return original(*arguments)

        return call

    monkeypatch.setattr(Ledger, "charge", noted("charge", Ledger.charge))
    monkeypatch.setattr(Examples, "sample", noted("holdout", Examples.sample))
    league, _ = assembled(experiment(), tmp_path)
    evaluate(league.rounds(), league.plan, 0, head())
    assert seen == ["charge", "holdout"] * MERCHANTS


def test_merchants_whose_policy_does_not_allow_it_decline(
    experiment: Callable[..., Experiment], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed = simulation.simulated_policy
    monkeypatch.setattr(
        simulation,
        "simulated_policy",
        lambda *a: allowed(*a).model_copy(update={"modes": ("local", "distributed", "mean")}),
    )
    told: Told = []
    league, members = assembled(experiment(), tmp_path, told)
    with pytest.raises(RoundFailed, match=DeclineCode.POLICY):
        evaluate(league.rounds(), league.plan, 0, head())
    assert {name for name, _ in told} == set(members)
    assert all("mode: found 'evaluation', your policy allows local, distributed, mean" in t for _, t in told)
    assert all(member.ledger.counter == 0 for member in members.values())


def test_a_model_that_is_none_is_refused_before_anyone_pays(
    experiment: Callable[..., Experiment], tmp_path: Path
) -> None:
    league, members = assembled(experiment(), tmp_path)
    rounds = league.rounds()
    for model in (head()[:-1], np.full_like(head(), np.nan)):
        with pytest.raises(ValueError, match="expected 490 finite numbers"):
            evaluate(rounds, league.plan, 0, model)
    with pytest.raises(ValueError, match="round of 0 to 1, found 2"):
        evaluate(rounds, league.plan, 2, head())
    with pytest.raises(RoundFailed, match="model"):  # what a server does that leaves the checks out
        rounds.run(0, np.full_like(head(), np.inf))
    assert all(member.ledger.counter == 0 for member in members.values())


def test_a_plan_from_yaml_is_charged_for_all_its_rounds(experiment: Callable[..., Experiment]) -> None:
    plan, _ = simulation.make_signed_plan(experiment())
    assert isinstance(plan.training, EvaluationTraining)
    assert plan.training.sampling_rate == plan.training.clipping_norm == 1.0
    assert plan.dimension == plan.expected_dimension == Layout(CLASSES).dimension
    assert plan.model_dimension == head().size != plan.dimension
    assert 1.9 < plan.epsilon() <= 2
    one_round, _ = simulation.make_signed_plan(
        experiment({"plan.training": EVALUATION["plan.training"] | {"rounds": 1}})
    )
    assert one_round.training.noise_multiplier < 0.8 * plan.training.noise_multiplier


def test_nothing_is_trained_by_an_evaluation(experiment: Callable[..., Experiment], tmp_path: Path) -> None:
    league, _ = assembled(experiment(), tmp_path)
    with pytest.raises(ConfigError, match="trains nothing"):
        league.train()


def test_what_the_server_sees_of_one_merchant_is_noise(
    experiment: Callable[..., Experiment], tmp_path: Path
) -> None:
    league, _ = assembled(experiment(), tmp_path)
    evaluate(league.rounds(), league.plan, 0, head())
    upload = league.seen[min(league.members)].astype(np.float64) / 2**32
    assert abs(upload.mean() - 0.5) < 5 / (12 * upload.size) ** 0.5
