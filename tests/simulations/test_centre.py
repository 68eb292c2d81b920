"""A private mean: learnt by the league in a plan of its own, charged to the same ledgers, and right."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hanse_client.examples import Examples
from hanse_common.config import load
from hanse_common.errors import ConfigError
from hanse_common.vision.centring import Centre
from hanse_common.vision.recognizer import CENTRE_FILE
from hanse_simulations.centre import with_centre
from hanse_simulations.experiment import Experiment
from hanse_simulations.shops import Shops, merchant_names
from hanse_simulations.simulation import League, seeded_members

Write = Callable[..., Path]
FEATURES, MERCHANTS, PHOTOS = 48, 4, 400

CENTRED: dict[str, Any] = {
    "data.merchants": MERCHANTS,
    "data.photos_per_merchant": PHOTOS,
    "plan.training": {
        "mode": "distributed",
        "rounds": 3,
        "repeats": 2,
        "sampling_rate": 0.3,
        "expected_batch": 480,
        "clipping_norm": 0.5,
    },
    "plan.privacy": {"epsilon": 4, "delta": 1e-5},
    "plan.cohort": {"min_merchants": 3, "max_merchants": MERCHANTS},
    "centring": {"epsilon": 2, "delta": 1e-6},
}


def make_shops() -> Shops:
    made = {}
    for index, name in enumerate((*merchant_names(MERCHANTS), "test")):
        rng = np.random.default_rng(index)
        inputs = (rng.normal(size=(PHOTOS, FEATURES)) / 4 + 1).astype(np.float32)
        made[name] = Examples.of(inputs, rng.integers(0, 10, PHOTOS), "cpu")
    test = made.pop("test")
    return Shops(made, test)


def mean_of(shops: Shops) -> np.ndarray[Any, Any]:
    inputs = torch.cat([shop.inputs for shop in shops.merchants.values()]).double()
    return (inputs / inputs.norm(dim=1, keepdim=True)).mean(dim=0).numpy()


@pytest.mark.parametrize("central", [False, True])
def test_the_centre_is_the_mean_but_for_its_noise(
    write_experiment: Write, tmp_path: Path, central: bool
) -> None:
    experiment, shops = load(Experiment, write_experiment(CENTRED)), make_shops()
    rest, seen = with_centre(experiment, shops, tmp_path, lambda *_: None, central=central)
    centre = Centre.read(tmp_path / CENTRE_FILE, FEATURES)
    error = np.linalg.norm(centre.mean - mean_of(shops))
    assert 1e-4 < error < 0.1
    assert rest.plan.recipe.centre == centre.digest
    assert rest.plan.privacy.epsilon == 2
    assert rest.plan.privacy.delta == pytest.approx(9e-6)
    before, after = (
        float(torch.cat([s.inputs for s in x.merchants.values()]).mean(0).norm()) for x in (shops, seen)
    )
    assert after < 0.1 * before
    torch.testing.assert_close(seen.test.inputs.norm(dim=1), torch.ones(PHOTOS))
    again, _ = with_centre(
        experiment, shops, tmp_path, lambda *_: pytest.fail("asked again"), central=central
    )
    assert again == rest


def test_both_plans_are_paid_from_one_ledger(write_experiment: Write, tmp_path: Path) -> None:
    experiment, shops = load(Experiment, write_experiment(CENTRED)), make_shops()
    rest, seen = with_centre(experiment, shops, tmp_path, lambda *_: None, central=False)
    members = seeded_members(rest, seen.merchants, tmp_path, lambda *_: None, experiment.plan.privacy)
    League.assemble(rest, members, tmp_path).train()
    centre = Centre.read(tmp_path / CENTRE_FILE, FEATURES)
    assert 1.9 < centre.epsilon <= 2
    assert centre.delta == 1e-6
    for member in members.values():
        spent = member.ledger.spent()
        assert len(spent.plans) == 2
        first, second = (plan.epsilon for plan in spent.plans)
        assert 1.9 < first <= 2
        assert 1.9 < second <= 2
        assert spent.epsilon <= 4
        assert spent.delta == pytest.approx(1e-5)


def test_a_photo_counts_once_whatever_its_features_length(write_experiment: Write, tmp_path: Path) -> None:
    shops = make_shops()
    first = next(iter(shops.merchants.values()))
    first.inputs[0] *= 1e6
    first.inputs[1] = torch.nan
    first.inputs[2] = 0
    experiment = load(Experiment, write_experiment(CENTRED))
    with_centre(experiment, shops, tmp_path, lambda *_: None, central=False)
    found = Centre.read(tmp_path / CENTRE_FILE, FEATURES).mean
    assert np.linalg.norm(found - mean_of(make_shops())) < 0.1


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"centring": {"epsilon": 4}}, r"centring: found epsilon 4"),
        ({"centring": {"epsilon": 1, "delta": 1e-4}}, r"delta 0\.0001"),
        ({"plan.recipe.centre": "ab" * 32}, "without a centre"),
    ],
)
def test_a_centre_that_cannot_be_learnt_is_refused(
    write_experiment: Write, changes: dict[str, Any], match: str
) -> None:
    with pytest.raises(ConfigError, match=match):
        load(Experiment, write_experiment(CENTRED | changes))


def test_the_plans_noise_is_not_drawn_twice(
    write_experiment: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hanse_simulations import simulation

    named: list[str] = []
    original = simulation.RoundRandomness
    monkeypatch.setattr(
        simulation, "RoundRandomness", lambda seed, name: named.append(name) or original(seed, name)
    )
    experiment, shops = load(Experiment, write_experiment(CENTRED)), make_shops()
    rest, seen = with_centre(experiment, shops, tmp_path, lambda *_: None, central=False)
    seeded_members(rest, seen.merchants, tmp_path, lambda *_: None, experiment.plan.privacy)
    assert len(named) == len(set(named)) == 2 * MERCHANTS
