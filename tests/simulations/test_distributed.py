"""Mode `distributed` over ten merchants is central DP-SGD with the same randomness, to the grid's rounding."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from hanse_client.exact_sums import ExactSums
from hanse_client.examples import Examples
from hanse_common.config import load
from hanse_common.errors import ConfigError, RoundFailed
from hanse_common.plan import Plan
from hanse_common.privacy.discrete import DiscreteGaussian
from hanse_common.vision import model as models
from hanse_server.league import RoundReport
from hanse_server.optimizers import create
from hanse_simulations.central import CentralLeague
from hanse_simulations.experiment import Experiment
from hanse_simulations.seeded import RoundRandomness
from hanse_simulations.shops import merchant_names
from hanse_simulations.simulation import League, seeded_members, train_with

Write = Callable[..., Path]
FEATURES, MERCHANTS, PHOTOS = 48, 10, 60

DISTRIBUTED: dict[str, Any] = {
    "data.merchants": MERCHANTS,
    "plan.training": {
        "mode": "distributed",
        "rounds": 8,
        "repeats": 40,
        "sampling_rate": 0.3,
        "expected_batch": 180,
        "clipping_norm": 0.5,
    },
    "plan.privacy": {"epsilon": 8, "delta": 1e-5},
    "plan.cohort": {"min_merchants": 8, "max_merchants": MERCHANTS, "max_corrupt": 1},
    "optimization.optimizer": {"name": "fedavgm", "learning_rate": 4, "momentum": 0.9},
    "optimization.schedule": {"name": "linear"},
    "optimization.attempts": 20,
}


@pytest.fixture
def experiment(write_experiment: Write) -> Callable[..., Experiment]:
    return lambda **changes: load(Experiment, write_experiment(DISTRIBUTED | changes))


def shops(count: int = MERCHANTS) -> dict[str, Examples]:
    """Each shop has clouds of points with norm 1, mostly of two classes of three."""
    found = {}
    for index, name in enumerate(merchant_names(count)):
        rng = np.random.default_rng(index)
        labels = (index + rng.integers(0, 2, PHOTOS)) % 3
        inputs = (3 * np.eye(3, FEATURES)[labels] + rng.normal(size=(PHOTOS, FEATURES))).astype(np.float32)
        unit = inputs / np.linalg.norm(inputs, axis=1, keepdims=True)
        found[name] = Examples.of(unit, labels, "cpu")
    return found


def make_league(settings: Experiment, folder: Path) -> League:
    return League.assemble(settings, seeded_members(settings, shops(), folder, lambda *_: None), folder)


class Replayed:
    """Each merchant's draws of one round, in the trainer's own order: sample, noise, in grid steps."""

    def __init__(self, plan: Plan, seed: int, round_: int) -> None:
        self.mechanism = plan.mechanism(1)
        self.sampler = DiscreteGaussian(self.mechanism.noise.share)
        self.draws = {}
        for name, shop in shops().items():
            randomness = RoundRandomness(seed, f"merchant {name}")
            randomness.begin(round_)
            sample = shop.sample("photo", plan.training.sampling_rate, randomness)
            randomness.words(1)
            randomness.words(plan.dimension)  # for rounding
            self.draws[name] = sample, self.sampler.sample(plan.dimension, randomness)

    def central_sum(self, sums: ExactSums, model: NDArray[np.float32]) -> NDArray[np.float64]:
        """The pooled sum over everyone's samples plus everyone's noise, in grid steps, rounded nowhere."""
        samples = [index * PHOTOS + sample for index, (sample, _) in enumerate(self.draws.values())]
        grid = self.mechanism.grid
        fine = sums.sum(model.astype(np.float64), np.concatenate(samples), grid, 0)
        noise: NDArray[np.int64] = sum(noise for _, noise in self.draws.values())  # type: ignore[assignment]
        return -fine / grid.fine_per_step + noise


def pooled() -> Examples:
    parts = list(shops().values())
    return Examples(torch.cat([p.inputs for p in parts]), torch.cat([p.labels for p in parts]))


def test_ten_merchants_equal_one_curator_with_the_same_randomness(
    experiment: Callable[..., Experiment], tmp_path: Path
) -> None:
    settings = experiment()
    league = make_league(settings, tmp_path)
    plan = league.plan
    reports: list[RoundReport] = []
    found = league.train(reports.append)

    sums = ExactSums(plan.recipe, plan.taxonomy, pooled())
    optimizer = create(settings.optimization.optimizer)
    weights = models.initial_vector(plan.recipe, 10, 0).astype(np.float64)
    tail = []
    step = plan.mechanism(1).grid.step / plan.training.expected_batch
    for report in reports:
        replayed = Replayed(plan, settings.seed, report.round)
        central = replayed.central_sum(sums, weights.astype(np.float32)) * step
        # Each merchant rounds once, by less than one step; the models differ by as little so far.
        assert np.abs(central - report.outcome.update).max() < 1.5 * MERCHANTS * step
        weights = weights + (1 - report.round / 8) * (optimizer.step(weights, central) - weights)
        tail.append(weights)
    expected = np.mean(tail[4:], axis=0)
    assert np.linalg.norm(expected) > 5, "else nothing was learnt that could differ"
    assert np.linalg.norm(found - expected) < 2e-3 * np.linalg.norm(expected)


def test_the_sum_holds_the_noise_of_all_who_survived(
    experiment: Callable[..., Experiment], tmp_path: Path
) -> None:
    """No merchant's share is lost or counted twice: without photos the sum is that noise to the last unit."""
    settings = experiment()
    members = seeded_members(settings, {n: _none(s) for n, s in shops().items()}, tmp_path, lambda *_: None)
    league = League.assemble(settings, members, tmp_path)
    reports: list[RoundReport] = []
    league.train(reports.append)
    step = league.plan.mechanism(1).grid.step / league.plan.training.expected_batch
    for report in reports[:2]:
        total = 0
        for name in merchant_names(MERCHANTS):
            randomness = RoundRandomness(settings.seed, f"merchant {name}")
            randomness.begin(report.round)
            randomness.words(1)
            randomness.words(league.plan.dimension)
            share = league.plan.mechanism(1).noise.share
            total = total + DiscreteGaussian(share).sample(league.plan.dimension, randomness)
        np.testing.assert_allclose(report.outcome.update, total * step, rtol=1e-12)


def _none(shop: Examples) -> Examples:
    return Examples(shop.inputs[:0], shop.labels[:0])


def test_the_noise_is_enough_when_all_allowed_dropouts_happen(
    experiment: Callable[..., Experiment], tmp_path: Path
) -> None:
    """n_min − c shares together are the calibrated noise, so the c corrupt may know theirs."""
    plan = make_league(experiment(), tmp_path).plan
    mechanism = plan.mechanism(1)
    assert mechanism.shares == 8 - 1
    honest = (plan.cohort.min_merchants - plan.cohort.max_corrupt) * mechanism.noise.share**2
    assert honest == pytest.approx((plan.training.noise_multiplier * mechanism.grid.sensitivity) ** 2)
    assert plan.epsilon() <= 8
    assert plan.mechanism(1).noise.share >= 4


def test_below_n_min_nothing_is_released_and_above_it_training_goes_on(
    experiment: Callable[..., Experiment], tmp_path: Path
) -> None:
    settings = experiment(dropout_rate=0.1)
    survivors: list[int] = []
    make_league(settings, tmp_path / "some").train(lambda r: survivors.append(len(r.outcome.uploaded)))
    assert len(survivors) == 8
    assert min(survivors) >= 8
    assert min(survivors) < 10
    with pytest.raises(RoundFailed):
        make_league(experiment(dropout_rate=0.6, **{"optimization.attempts": 2}), tmp_path / "none").train()
    assert not (tmp_path / "none" / "server" / "checkpoint.safetensors").exists()


def test_the_yardstick_has_the_whole_noise_once(
    experiment: Callable[..., Experiment], tmp_path: Path
) -> None:
    settings = experiment()
    central = CentralLeague.assemble(settings, shops(), tmp_path)
    assert len(central.examples) == MERCHANTS * PHOTOS
    reports: list[RoundReport] = []
    model = central.train(reports.append)
    assert len(reports) == 8
    empty = replace(
        central, examples=_none(pooled()), progress=make_league(settings, tmp_path / "e").progress
    )
    quiet: list[RoundReport] = []
    empty.train(quiet.append)
    wanted = plan_deviation(central.plan)
    assert np.std([r.outcome.update for r in quiet]) == pytest.approx(wanted, rel=0.1)
    labels = pooled().labels.numpy()
    layer = models.build(central.plan.recipe, 10)
    models.load_vector(layer, model)
    assert (layer(pooled().inputs).argmax(1).numpy() == labels).mean() > 0.7


def plan_deviation(plan: Plan) -> float:
    mechanism = plan.mechanism(1)
    return mechanism.noise_deviation / plan.training.expected_batch


def test_the_yardstick_is_of_mode_distributed_alone(write_experiment: Write, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"plan\.training\.mode: found local"):
        CentralLeague.assemble(load(Experiment, write_experiment()), shops(3), tmp_path)


def test_penalties_enter_once_and_at_the_server(
    experiment: Callable[..., Experiment], tmp_path: Path
) -> None:
    settings = experiment(
        **{"plan.recipe.model": {"name": "linear", "l2": 0.5}, "optimization.schedule": {"name": "constant"}}
    )
    league = make_league(settings, tmp_path)

    class Still:
        def run(self, round_: int, model: NDArray[np.float32]) -> Any:
            from hanse_server.coordinator import RoundOutcome

            return RoundOutcome(np.full(model.size, 0.1), (), (), {}, {})

    plain = experiment(**{"optimization.schedule": {"name": "constant"}})
    with_penalty = train_with(Still(), settings, league.progress, lambda r: None)
    other = make_league(plain, tmp_path / "plain")
    without = train_with(Still(), plain, other.progress, lambda r: None)
    assert 0 < np.abs(with_penalty).max() < np.abs(without).max()
