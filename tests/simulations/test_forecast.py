"""What stands for an operator's league in a forecast, and that the pooled engine has a league's noise."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hanse_client.examples import Examples
from hanse_common.errors import ConfigError
from hanse_common.modes import DistributedSchedule
from hanse_common.randomness import OsRandomness
from hanse_server.config import ServerConfig, make_plan
from hanse_simulations.central import CentralRounds
from hanse_simulations.datasets import CLASSES
from hanse_simulations.forecast import compose, photo_seconds, photos_of, round_seconds
from hanse_simulations.seeded import RoundRandomness

PLAN: dict[str, Any] = {
    "league": "shoes",
    "taxonomy": {"classes": ["Sneaker", "Sandal", "Bag"]},
    "recipe": {
        "preprocessing": {"size": 8, "channels": 1},
        "backbone": {"name": "scattering", "scales": 1, "angles": 2, "groups": None},
    },
    "training": {
        "mode": "distributed",
        "rounds": 6,
        "sampling_rate": 0.5,
        "expected_batch": 90,
        "clipping_norm": 1,
    },
    "privacy": {"epsilon": 1},
    "cohort": {"min_merchants": 4, "max_merchants": 6},
}


def config(**changes: Any) -> ServerConfig:
    tree = {"signing_key": "operator.key", "plan": PLAN | changes}
    return ServerConfig.model_validate_json(json.dumps(tree), context={"folder": Path()})


def test_the_plan_is_taken_word_for_word(data_folder: Path) -> None:
    settings = config()
    found = compose(settings, None, None, None, quick=False)
    assert found.experiment.plan == settings.plan
    assert found.experiment.data.folder == data_folder
    assert (found.experiment.data.merchants, found.experiment.data.photos_per_merchant) == (6, 30)
    assert (found.engine, found.notes, found.seeds) == ("pooled", (), (1, 2, 3))


def test_other_classes_stand_for_the_leagues_and_it_says_so() -> None:
    found = compose(config(taxonomy={"classes": ["Hat", "Tie"]}), None, None, None, quick=False)
    assert found.experiment.plan.taxonomy.classes == CLASSES[:2]
    assert found.notes == ("Classes of Fashion-MNIST stand for the league's: T-shirt, Trouser.",)
    many = config(taxonomy={"classes": [f"class {number}" for number in range(11)]})
    with pytest.raises(ConfigError, match="has 10 classes and the league 11; name with --proxy a folder"):
        compose(many, None, None, None, quick=False)


def test_a_smaller_league_keeps_its_step_and_it_says_so() -> None:
    found = compose(config(), None, None, None, quick=True)
    assert found.experiment.data.photos_per_merchant == 7
    training = found.experiment.plan.training
    assert isinstance(training, DistributedSchedule)
    assert training.expected_batch == 90 * 7 / 30
    assert "7 photos each here, not 30" in found.notes[0]
    # Three classes have 18 000 photos.
    large = config(training=PLAN["training"] | {"expected_batch": 18_000})
    assert compose(large, None, None, None, quick=False).experiment.data.photos_per_merchant == 3000
    # How many the operator says there are is taken as it is.
    said = compose(config(), None, 4, 15, quick=False)
    assert said.experiment.plan == config().plan
    assert (said.experiment.data.merchants, said.experiment.data.photos_per_merchant) == (4, 15)


def test_whitening_and_centre_are_learnt_anew() -> None:
    backbone = PLAN["recipe"]["backbone"] | {"whitening": {"dimensions": 5, "weights": "ab" * 32}}
    recipe = PLAN["recipe"] | {"backbone": backbone, "centre": "cd" * 32}
    settings = config(recipe=recipe)
    found = compose(settings, None, None, None, quick=True)
    whiten, centring = found.experiment.whiten, found.experiment.centring
    assert whiten is not None
    assert centring is not None
    assert (whiten.dimensions, whiten.photos, found.experiment.data.test_photos) == (5, 1000, 1000)
    left = found.experiment.plan.privacy.epsilon - centring.epsilon
    assert left == pytest.approx(settings.plan.privacy.epsilon)
    assert sum("learnt" in note or "fitted" in note for note in found.notes) == 2


def test_photos_follow_from_the_plans_own_numbers() -> None:
    assert photos_of(config().plan, 6) == 30
    local = {"mode": "local", "rounds": 2, "local_steps": 1, "learning_rate": 1, "clipping_norm": 1}
    assert photos_of(config(training=local | {"sampling_rate": 0.1, "expected_batch": 20}).plan, 6) == 200
    mean = config(training={"mode": "mean", "expected_batch": 100})
    with pytest.raises(ConfigError, match="found mean, which trains nothing"):
        photos_of(mean.plan, 6)


def test_the_pooled_noise_is_that_of_as_many_shares() -> None:
    plan = make_plan(
        config(recipe=PLAN["recipe"] | {"preprocessing": {"size": 32, "channels": 1}}).plan, bytes(16)
    )
    assert plan.dimension > 2000
    examples = Examples.of(
        np.zeros((1, *plan.recipe.example_shape), dtype=np.float32), np.zeros(1, dtype=np.int64), "cpu"
    )
    shares = plan.mechanism(1)
    nothing, randomness = np.zeros(plan.dimension, dtype=np.int64), OsRandomness()
    league = sum(shares.contribute(nothing, plan.limit, randomness) for _ in range(6)) * shares.grid.step
    rounds = CentralRounds(plan, examples, RoundRandomness(1, "curator"), uploads=6)
    pooled = rounds._mechanism.release(nothing, randomness)
    assert np.std(pooled) == pytest.approx(np.std(league), rel=0.08)
    curator = CentralRounds(plan, examples, RoundRandomness(1, "curator"))._mechanism
    assert np.std(league) > 1.2 * curator.noise_deviation


def test_a_merchants_time_is_measured() -> None:
    plan = make_plan(config().plan, bytes(16))
    assert 0 < round_seconds(plan, 50) < 60
    seconds = photo_seconds(plan.recipe)
    assert seconds is not None
    assert seconds > 0
