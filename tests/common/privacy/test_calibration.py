"""Calibrated noise meets its promise, and a thousandth less would not."""

import math

import pytest

from hanse_common.errors import PlanRefused
from hanse_common.privacy.calibration import noise_multiplier
from hanse_common.privacy.mechanism import Mechanism

HEAD = {"clipping_norm": 0.3, "dimension": 35_800}


@pytest.mark.parametrize(
    ("epsilon", "delta", "rate", "steps"),
    [
        (2.7, 1e-5, 0.1365, 400),
        (0.5, 1e-5, 0.1365, 100),
        (1.0, 1e-6, 0.01, 1000),
        (8.0, 1e-5, 1.0, 5),
    ],
)
def test_smallest_noise_that_meets_the_promise(epsilon, delta, rate, steps):
    z = noise_multiplier(epsilon=epsilon, delta=delta, sampling_rate=rate, steps=steps, **HEAD)
    assert Mechanism(noise_multiplier=z, sampling_rate=rate, steps=steps, **HEAD).epsilon(delta) <= epsilon
    less = Mechanism(noise_multiplier=z / 1.0011, sampling_rate=rate, steps=steps, **HEAD)
    assert less.epsilon(delta) > epsilon


def test_published_figure():
    z = noise_multiplier(epsilon=2.7, delta=1e-5, sampling_rate=8192 / 60000, steps=400, **HEAD)
    assert z == pytest.approx(4.29, rel=2e-3)


def test_an_easy_promise_gets_the_least_noise_the_sampler_draws():
    easy = {"sampling_rate": 1e-6, "steps": 1, "clipping_norm": 1.0, "dimension": 1}
    z = noise_multiplier(epsilon=15.0, delta=0.1, **easy)
    assert Mechanism(noise_multiplier=z, **easy).noise.sigma == pytest.approx(4.0)


def test_an_impossible_promise_is_refused_with_the_reason():
    with pytest.raises(
        PlanRefused, match=r"epsilon 0.1 at delta 1e-06 is out of reach: 10000 .* fewer steps"
    ):
        noise_multiplier(epsilon=0.1, delta=1e-6, sampling_rate=1.0, steps=10_000, **HEAD)


@pytest.mark.parametrize("epsilon", [0.0, -1.0, math.nan])
def test_epsilon_must_be_positive(epsilon):
    with pytest.raises(ValueError, match="epsilon"):
        noise_multiplier(epsilon=epsilon, delta=1e-5, sampling_rate=0.1, steps=10, **HEAD)
