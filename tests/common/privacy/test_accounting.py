"""ε against dp-accounting, Opacus and RDP, and each correction from continuous to discrete noise."""

import math

import dp_accounting
import mpmath
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from opacus.accountants import PRVAccountant

from hanse_common.privacy import accounting
from hanse_common.privacy.accounting import EPSILON_MAX, Noise, epsilon

DELTA = 1e-5
SETTINGS = [
    # noise multiplier, sampling rate, steps
    (4.29, 0.1365, 400),
    (9.77, 0.1365, 100),
    (1.4, 0.1365, 200),
    (1.0, 0.01, 2000),
    (2.0, 1.0, 3),
    (1.0, 1.0, 1),
    (0.7, 0.004, 500),
]


def noise(multiplier, sensitivity=500.0, dimension=10_000):
    return Noise(sigma=multiplier * sensitivity, sensitivity=sensitivity, dimension=dimension)


def ours(multiplier, rate, steps, delta=DELTA, **kwargs):
    return epsilon(noise(multiplier, **kwargs), sampling_rate=rate, steps=steps, delta=delta)


def composed(accountant, multiplier, rate, steps):
    event = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(multiplier))
    return accountant.compose(event, steps)


@pytest.mark.parametrize(("multiplier", "rate", "steps"), SETTINGS)
def test_at_least_the_continuous_pld_and_hardly_more(multiplier, rate, steps):
    continuous = composed(PLDAccountant(), multiplier, rate, steps).get_epsilon(DELTA)
    # Two pessimistic estimates on unlike grids may differ by their own discretization.
    assert continuous - 2e-4 <= ours(multiplier, rate, steps) <= 1.02 * continuous


@pytest.mark.parametrize(("multiplier", "rate", "steps"), SETTINGS)
def test_agrees_with_opacus_prv(multiplier, rate, steps):
    accountant = PRVAccountant()
    accountant.history = [(multiplier, rate, steps)]
    assert ours(multiplier, rate, steps) == pytest.approx(accountant.get_epsilon(DELTA), rel=0.02)


@pytest.mark.parametrize(("multiplier", "rate", "steps"), SETTINGS)
def test_rdp_is_looser(multiplier, rate, steps):
    loose = composed(RdpAccountant(), multiplier, rate, steps).get_epsilon(DELTA)
    assert ours(multiplier, rate, steps) < loose < 2 * ours(multiplier, rate, steps)


@pytest.mark.parametrize("multiplier", [0.5, 1.0, 3.0])
def test_one_unsampled_step_matches_the_closed_form(multiplier):
    """Balle, Wang 2018, Theorem 8: the Gaussian mechanism's δ(ε) in closed form."""
    found = ours(multiplier, 1.0, 1)

    def delta_of(eps):
        a, b = 1 / (2 * multiplier), eps * multiplier
        return mpmath.ncdf(a - b) - mpmath.exp(eps) * mpmath.ncdf(-a - b)

    assert delta_of(found) <= DELTA
    assert delta_of(found * 0.999) > DELTA


def test_epsilon_falls_with_noise_and_delta_and_grows_with_steps_and_rate():
    assert ours(1.0, 0.01, 500) > ours(1.05, 0.01, 500) > ours(2.0, 0.01, 500)
    assert ours(1.0, 0.01, 500) < ours(1.0, 0.01, 510) < ours(1.0, 0.01, 1000)
    assert ours(1.0, 0.01, 500) < ours(1.0, 0.011, 500) < ours(1.0, 0.1, 500)
    assert ours(1.0, 0.01, 500, delta=1e-4) < ours(1.0, 0.01, 500) < ours(1.0, 0.01, 500, delta=1e-6)


def test_small_sigma_pays_for_smoothing():
    """At σ = 4 the noise accounted for has variance σ² − 4: the multiplier is √12/4 of the nominal one."""
    small = ours(1.0, 0.05, 100, sensitivity=4.0)
    assert small == pytest.approx(ours(math.sqrt(12) / 4, 0.05, 100, sensitivity=1e4), rel=1e-4)
    assert small > 1.1 * ours(1.0, 0.05, 100, sensitivity=1e4)


@pytest.mark.parametrize("sigma", [4.0, 4.5])
@pytest.mark.parametrize("smoothing", [1.0, 2.0])
def test_smoothed_continuous_noise_is_discrete_gaussian_within_eta(sigma, smoothing):
    """The lemma itself, to 60 digits: rounding N(0, σ² − r²) by a discrete Gaussian of variance r²."""
    with mpmath.workdps(60):
        r2, s2 = mpmath.mpf(smoothing) ** 2, mpmath.mpf(sigma) ** 2
        per_unit = 32  # the trapezoidal rule on a smooth, fast falling integrand: exact to these digits
        theta = [
            mpmath.fsum(mpmath.exp(-((j - mpmath.mpf(i) / per_unit) ** 2) / (2 * r2)) for j in range(-30, 31))
            for i in range(per_unit)
        ]
        total = mpmath.fsum(mpmath.exp(-(mpmath.mpf(k) ** 2) / (2 * s2)) for k in range(-90, 91))
        eta = 3 * mpmath.exp(-2 * mpmath.pi**2 * r2)
        worst = 0
        for k in (0, 1, 2, 7, 20):
            smoothed = mpmath.fsum(
                mpmath.exp(-(w**2) / (2 * (s2 - r2)) - (k - w) ** 2 / (2 * r2)) / theta[i % per_unit]
                for i in range(-60 * per_unit, 60 * per_unit)
                for w in [mpmath.mpf(i) / per_unit]
            ) / (per_unit * mpmath.sqrt(2 * mpmath.pi * (s2 - r2)))
            exact = mpmath.exp(-(mpmath.mpf(k) ** 2) / (2 * s2)) / total
            worst = max(worst, abs(mpmath.log(smoothed / exact)))
        assert worst <= eta


def test_rounding_failures_are_charged_to_delta(monkeypatch):
    plain = ours(1.0, 0.01, 1000, delta=DELTA - 1000 * 5e-9)
    monkeypatch.setattr(accounting, "ROUNDING_FAILURE", 5e-9)
    assert ours(1.0, 0.01, 1000) == pytest.approx(plain, rel=1e-9)
    assert plain > ours(1.0, 0.01, 1000, delta=1.5e-5)


def test_the_samplers_distance_is_charged_to_delta(monkeypatch):
    distance = 4e-6 / (1000 * 10_000 * (1 + math.exp(EPSILON_MAX)))
    plain = ours(1.0, 0.01, 1000, delta=DELTA - 4e-6)
    monkeypatch.setattr(accounting, "total_variation", lambda sigma: distance)
    assert ours(1.0, 0.01, 1000) == pytest.approx(plain, rel=1e-9)
    monkeypatch.setattr(accounting, "total_variation", lambda sigma: 3 * distance)
    assert ours(1.0, 0.01, 1000) == math.inf


@pytest.mark.parametrize(
    ("multiplier", "rate", "steps"), [(0.3, 1.0, 1000), (0.05, 1e-6, 1), (0.5, 0.9, 10_000), (0.25, 1.0, 1)]
)
def test_no_finite_epsilon_is_claimed_when_noise_is_hopeless(multiplier, rate, steps):
    assert ours(multiplier, rate, steps) == math.inf


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"sampling_rate": 0.0}, "sampling_rate"),
        ({"sampling_rate": 1.1}, "sampling_rate"),
        ({"sampling_rate": math.nan}, "sampling_rate"),
        ({"steps": 0}, "steps"),
        ({"delta": 0.0}, "delta"),
        ({"delta": 1e-11}, "delta"),
        ({"delta": 1.0}, "delta"),
        ({"delta": math.nan}, "delta"),
    ],
)
def test_arguments_out_of_range_are_refused(change, field):
    with pytest.raises(ValueError, match=field):
        epsilon(noise(1.0), **{"sampling_rate": 0.1, "steps": 10, "delta": DELTA} | change)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ((3.9, 1.0, 1), "sigma"),
        ((math.nan, 1.0, 1), "sigma"),
        ((5.0, 0.0, 1), "sensitivity"),
        ((5.0, math.inf, 1), "sensitivity"),
        ((5.0, math.nan, 1), "sensitivity"),
        ((5.0, 1.0, 0), "dimension"),
    ],
)
def test_impossible_noise_is_refused(fields, field):
    with pytest.raises(ValueError, match=field):
        Noise(*fields)


@pytest.mark.parametrize("delta", [1e-10, 3e-10, 1e-9, 1e-7])
def test_rounding_errors_of_many_steps_do_not_lower_epsilon(delta):
    """At small δ the Fourier transforms alone come out below the exact ε (Balle, Wang 2018, Theorem 8)."""
    noise = accounting.Noise(sigma=150_000.0, sensitivity=1000.0, dimension=1)
    steps = 40_000
    mu = mpmath.sqrt(steps) / mpmath.mpf(noise.multiplier)

    def exact_delta(epsilon):
        return mpmath.ncdf(mu / 2 - epsilon / mu) - mpmath.exp(epsilon) * mpmath.ncdf(-mu / 2 - epsilon / mu)

    found = accounting.epsilon(noise, sampling_rate=1.0, steps=steps, delta=delta)
    assert exact_delta(mpmath.mpf(found)) <= delta
