"""The mechanism as a whole: what it releases, and its ε against the exact divergence of its output laws."""

import dataclasses
import math
from fractions import Fraction

import numpy as np
import pytest

from hanse_common.privacy.discrete import DiscreteGaussian
from hanse_common.privacy.mechanism import Mechanism
from hanse_common.randomness import AesCtrStream


def mechanism(**change):
    fields = {
        "clipping_norm": 0.3,
        "dimension": 1000,
        "noise_multiplier": 2.0,
        "sampling_rate": 0.1,
        "steps": 10,
    }
    return Mechanism(**fields | change)


def output_law(fine_sum, one_step, sigma, reach):
    """The exact pmf, on −reach … reach, of one coordinate's rounded and noised sum."""
    k = np.arange(-reach, reach + 1, dtype=np.float64)
    whole, part = divmod(fine_sum, one_step)
    up = part / one_step

    def noise(centre):
        weights = np.exp(-((k - centre) ** 2) / (2 * sigma**2))
        return weights / weights.sum()

    return (1 - up) * noise(whole) + up * noise(whole + 1)


def hockey_stick(p, q, eps):
    return float(np.maximum(p - math.exp(eps) * q, 0).sum())


@pytest.mark.parametrize("clipping_norm", [1.0, 0.63])
@pytest.mark.parametrize("noise_multiplier", [0.5, 3.0])
@pytest.mark.parametrize(("sampling_rate", "steps"), [(1.0, 1), (0.2, 1), (1.0, 2), (0.2, 2)])
@pytest.mark.parametrize("delta", [pytest.param(1e-2, marks=pytest.mark.slow), 1e-5])
def test_exact_divergence_of_neighbours_is_within_delta(
    clipping_norm, noise_multiplier, sampling_rate, steps, delta
):
    tried = Mechanism(clipping_norm, 1, noise_multiplier, sampling_rate, steps)
    eps = tried.epsilon(delta)
    assert math.isfinite(eps)
    longest = math.floor(Fraction(clipping_norm) / Fraction(tried.grid.fine_unit))
    sigma, one_step = tried.noise.sigma, tried.grid.fine_per_step
    reach = math.ceil(10 * sigma) + 64
    worst = too_little = 0.0
    for offset in (0, 1, one_step // 3, one_step // 2, one_step - 1):
        without = output_law(offset, one_step, sigma, reach)
        for moved in (longest, -longest, longest - one_step // 2, -(longest // 3)):
            present = output_law(offset + moved, one_step, sigma, reach)
            with_it = sampling_rate * present + (1 - sampling_rate) * without
            p, q = with_it, without
            if steps == 2:
                p, q = np.outer(p, p), np.outer(q, q)
            too_little = max(too_little, hockey_stick(p, q, eps / 2))
            worst = max(worst, hockey_stick(p, q, eps), hockey_stick(q, p, eps))
    assert worst <= delta
    # And not idly so. What is lost is what the bound allows for rounding, here one step of ten to twenty.
    assert too_little > delta


def test_epsilon_is_that_of_the_noise_that_is_drawn():
    tried = mechanism()
    assert tried.noise.sigma / tried.noise.sensitivity == pytest.approx(2.0, rel=1e-12)
    assert tried.noise.sensitivity == tried.grid.sensitivity > tried.clipping_norm / tried.grid.step
    released = np.concatenate(
        [
            tried.release(np.zeros(1000, dtype=np.int64), stream)
            for stream in [AesCtrStream(b"\x07" * 32)]
            for _ in range(200)
        ]
    )
    assert released.dtype == np.float64
    # Five standard errors of a standard deviation from 200 000 samples.
    assert released.std() == pytest.approx(tried.noise_deviation, rel=5 / math.sqrt(2 * len(released)))
    assert tried.noise_deviation == pytest.approx(tried.noise.sigma * tried.grid.step)


def test_an_empty_sample_releases_noise_alone():
    tried = mechanism()
    released = tried.release(np.zeros(1000, dtype=np.int64), AesCtrStream(b"\x08" * 32))
    stream = AesCtrStream(b"\x08" * 32)
    stream.words(1000)  # drawn for rounding all the same
    noise = DiscreteGaussian(tried.noise.sigma).sample(1000, stream)
    assert np.array_equal(released, noise * tried.grid.step)


def test_a_release_is_the_rounded_sum_plus_that_same_noise():
    tried = mechanism()
    fine_sum = (AesCtrStream(bytes(32)).words(1000) >> np.uint64(20)).astype(np.int64) - 2**43
    before = fine_sum.copy()
    released = tried.release(fine_sum, AesCtrStream(b"\x09" * 32))
    noise = tried.release(np.zeros(1000, dtype=np.int64), AesCtrStream(b"\x09" * 32))
    rounded = tried.grid.round(fine_sum, AesCtrStream(b"\x09" * 32))
    assert np.array_equal(released - noise, rounded * tried.grid.step)
    assert np.array_equal(fine_sum, before)
    assert np.abs(rounded - fine_sum / tried.grid.fine_per_step).max() < 1


def test_two_releases_never_share_noise():
    tried, stream = mechanism(), AesCtrStream(bytes(32))
    zeros = np.zeros(1000, dtype=np.int64)
    first, second = tried.release(zeros, stream), tried.release(zeros, stream)
    correlation = abs(np.corrcoef(first, second)[0, 1])
    assert correlation < 5 / math.sqrt(1000)


def test_a_mechanism_cannot_be_changed_after_it_is_made():
    tried = mechanism()
    with pytest.raises(dataclasses.FrozenInstanceError):
        tried.noise_multiplier = 0.1
    assert tried == mechanism()
    assert tried != mechanism(steps=11)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"noise_multiplier": 0.0}, "noise_multiplier"),
        ({"noise_multiplier": math.nan}, "noise_multiplier"),
        ({"noise_multiplier": math.inf}, "noise_multiplier"),
        ({"noise_multiplier": 1e-3}, "sigma"),
        ({"noise_multiplier": 1e6}, "sigma"),
        ({"sampling_rate": 0.0}, "sampling_rate"),
        ({"sampling_rate": 1.5}, "sampling_rate"),
        ({"steps": 0}, "steps"),
        ({"clipping_norm": 0.0}, "clipping_norm"),
        ({"dimension": 0}, "dimension"),
    ],
)
def test_impossible_mechanisms_are_refused(change, found):
    with pytest.raises(ValueError, match=found):
        mechanism(**change)


def test_a_sum_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="fine_sum"):
        mechanism().release(np.zeros(999, dtype=np.int64), AesCtrStream(bytes(32)))
