"""The filters against dp-accounting's and Opacus' Rényi accountants, and against what each of them must not forget."""

import doctest
import math
from dataclasses import replace
from types import SimpleNamespace

import dp_accounting
import mpmath
import pytest
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants.analysis.rdp import compute_rdp

from hanse_common.privacy import filters
from hanse_common.privacy.accounting import EPSILON_MAX
from hanse_common.privacy.encoding import ROUNDING_FAILURE
from hanse_common.privacy.filters import (
    FAILURE_SHARE,
    SUM,
    Renyi,
    Use,
    parse,
    step_divergence,
    to_epsilon,
)
from hanse_common.privacy.mechanism import Mechanism

DELTA = 1e-5
ORDERS = [2, 3, 8, 16, 64, 256]
STEPS = [
    # noise multiplier, sampling rate
    (4.0, 0.1),
    (1.0, 0.01),
    (0.5, 0.3),
    (50.0, 0.5),
    (2.0, 1.0),
    (3.0, 0.999),
    (8.0, 1e-4),
]


def mechanism(multiplier=4.0, rate=0.1, steps=100, dimension=1000, shares=1):
    return Mechanism(0.5, dimension, multiplier, rate, steps, shares)


def use(multiplier=4.0, rate=0.1, plan_steps=100, steps=None, delta=1e-6, **other):
    taken = plan_steps if steps is None else steps
    return Use(mechanism(multiplier, rate, plan_steps, **other), delta, taken)


def accountant(order, uses):
    found = RdpAccountant(orders=[order])
    for each in uses:
        rate, noise = each.mechanism.sampling_rate, each.mechanism.noise
        event = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise.multiplier))
        found.compose(event, each.steps)
    return found


# One step


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("multiplier", "rate"), STEPS)
def test_a_steps_divergence_is_opacus_and_dp_accountings(multiplier, rate, order):
    one = mechanism(multiplier, rate)
    ours = step_divergence(one, order)
    (opacus,) = compute_rdp(q=rate, noise_multiplier=one.noise.multiplier, steps=1, orders=[order])
    assert ours == pytest.approx(opacus, rel=1e-5, abs=1e-12)
    (theirs,) = accountant(order, [use(multiplier, rate, steps=1)])._rdp
    assert ours == pytest.approx(theirs, rel=1e-8, abs=1e-13)


@settings(max_examples=40, deadline=None)
@given(
    multiplier=st.floats(0.05, 500.0),
    rate=st.floats(1e-9, 1.0),
    order=st.integers(2, 256),
)
def test_a_steps_divergence_has_all_its_digits(multiplier, rate, order):
    """The formula of the paper, term by term, with fifty digits."""
    one = mechanism(multiplier, rate)
    with mpmath.workdps(50):
        z, q = mpmath.mpf(one.noise.multiplier), mpmath.mpf(rate)
        terms = (
            mpmath.binomial(order, k) * (1 - q) ** (order - k) * q**k * mpmath.exp(k * (k - 1) / (2 * z**2))
            for k in range(order + 1)
        )
        exact = mpmath.log(mpmath.fsum(terms)) / (order - 1)
        exact += mpmath.mpf(one.noise.distance) * (2 * order - 1) / (order - 1)
        assert abs(step_divergence(one, order) / exact - 1) < 1e-11


@pytest.mark.parametrize("order", [2, 16])
def test_a_step_pays_for_what_runs_being_discrete(order):
    """The distance η enters both neighbours: αη + (α − 1)η in the exponent. A stand-in: real ones are below 1e-20."""
    ideal, real = (
        SimpleNamespace(noise=SimpleNamespace(multiplier=4.0, distance=eta), sampling_rate=0.1)
        for eta in (0.0, 0.01)
    )
    grown = step_divergence(real, order) - step_divergence(ideal, order)
    assert (order - 1) * grown == pytest.approx(order * 0.01 + (order - 1) * 0.01)


# Many steps


@pytest.mark.parametrize("order", ORDERS)
def test_plans_that_differ_add_up_as_dp_accounting_adds_them(order):
    uses = [use(4.0, 0.1, 300, 200), use(9.0, 0.5, 50), use(2.5, 0.01, 4000, 1), use(30.0, 1.0, 7)]
    epsilon, delta = Renyi(order).spent(uses, DELTA)
    theirs = accountant(order, uses).get_epsilon((1 - FAILURE_SHARE) * DELTA)
    assert delta == DELTA
    assert epsilon == pytest.approx(theirs if theirs <= EPSILON_MAX else math.inf, rel=1e-9)
    if epsilon < EPSILON_MAX:  # setting a thousandth of δ aside costs next to nothing
        assert 0 < epsilon - accountant(order, uses).get_epsilon(DELTA) < 1.1 * FAILURE_SHARE / (order - 1)


def test_only_steps_taken_count_by_rdp_and_whole_plans_by_sum():
    begun, half, done = (use(plan_steps=400, steps=steps) for steps in (1, 200, 400))
    costs = [parse("rdp-16").spent([each], DELTA)[0] for each in (begun, half, done)]
    assert costs == sorted(set(costs))
    assert len({SUM.spent([each], DELTA) for each in (begun, half, done)}) == 1
    assert SUM.whole_plans and not parse("rdp-16").whole_plans


def test_sum_is_the_sum_of_what_each_plans_mechanism_says():
    uses = [use(4.0, 0.1, 40, 3), use(8.0, 0.2, 90, 1, delta=3e-6), use(4.0, 0.1, 40, 40)]
    epsilon, delta = SUM.spent(uses, DELTA)
    assert epsilon == math.fsum(each.mechanism.epsilon(each.delta) for each in uses)
    assert delta == math.fsum([1e-6, 3e-6, 1e-6])
    assert SUM.spent(uses, 0.5) == (epsilon, delta)


def test_sum_claims_nothing_where_the_accountant_does_not():
    for hopeless in (use(delta=1e-30), use(0.2, 1.0, 10_000)):
        assert SUM.spent([use(), hopeless], DELTA)[0] == math.inf


def test_nothing_used_costs_nothing():
    for name in ("sum", "rdp-2", "rdp-256"):
        assert parse(name).spent([], DELTA) == (0.0, 0.0)


def test_rdp_has_room_for_many_more_small_plans_than_sum():
    small = use(6.0, 0.05, 50, delta=2e-7)
    many = [small] * 50
    by_sum, by_rdp = (parse(name).spent(many, DELTA) for name in ("sum", "rdp-8"))
    assert by_sum[1] == pytest.approx(DELTA)
    assert by_rdp[0] < by_sum[0] / 3
    assert (
        SUM.spent([small], DELTA)[0] < parse("rdp-8").spent([small], DELTA)[0]
    )  # for one plan sum is better


def test_the_orders_that_the_text_recommends_have_the_most_room():
    def room(order, epsilon):
        return (epsilon - to_epsilon(0.0, order, DELTA)) / order  # ρ grows about as α does

    for epsilon, best in ((1.0, 18), (3.0, 8)):
        assert max(range(2, 257), key=lambda order: room(order, epsilon)) == best


# δ, and what is taken out of it


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("divergence", [1e-3, 0.1, 1.0, 5.0])
def test_the_conversion_is_dp_accountings(divergence, order):
    theirs, _ = dp_accounting.rdp.compute_epsilon([order], [divergence], DELTA)
    assert to_epsilon(divergence, order, DELTA) == pytest.approx(theirs, rel=1e-12)


def test_the_conversion_holds_for_a_gaussian():
    """(α, α/2z²)-RDP of the Gaussian mechanism: its exact δ at the ε found is below the δ asked for."""
    for order in (2, 8, 64):
        for z in (1.0, 4.0):
            epsilon = to_epsilon(order / (2 * z**2), order, DELTA)
            a, b = 1 / (2 * z) - epsilon * z, -1 / (2 * z) - epsilon * z
            exact = mpmath.ncdf(a) - mpmath.exp(epsilon) * mpmath.ncdf(b)
            assert exact <= DELTA


def test_no_epsilon_is_negative():
    assert to_epsilon(0.0, 256, 0.5) == 0.0


def test_failures_have_a_fixed_share_of_delta_and_never_more():
    one = use(6.0, 1e-4, 10**6, steps=1, dimension=10**7)
    failure = ROUNDING_FAILURE + one.mechanism.noise.failure * (1 + math.exp(EPSILON_MAX))
    assert failure > 1.1 * ROUNDING_FAILURE
    steps = 1000
    just_enough = steps * failure / FAILURE_SHARE * (1 + 1e-9)
    finite, _ = Renyi(16).spent([replace(one, steps=steps)], just_enough)
    assert finite < EPSILON_MAX
    for uses in ([replace(one, steps=steps + 1)], [replace(one, steps=steps), one]):
        assert Renyi(16).spent(uses, just_enough) == (math.inf, just_enough)


def test_no_epsilon_over_the_bound_is_claimed():
    steps = 1
    while (found := Renyi(8).spent([use(1.0, 0.5, 10**6, steps)], DELTA)[0]) < math.inf:
        assert found <= EPSILON_MAX
        steps += 1
    assert accountant(8, [use(1.0, 0.5, 10**6, steps)]).get_epsilon(DELTA) > 0.99 * EPSILON_MAX


# Names


@pytest.mark.parametrize("name", ["sum", "rdp-2", "rdp-16", "rdp-256"])
def test_a_filter_is_what_it_is_called(name):
    assert parse(name).name == name


@pytest.mark.parametrize(
    "name",
    ["", "Sum", "rdp", "rdp-", "rdp-1", "rdp-257", "rdp-016", "rdp-2.5", "rdp-16 ", "rdp-１６", "rdp--2"],
)
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match="expected sum, or rdp-ALPHA with a whole ALPHA from 2 to 256"):
        parse(name)


def test_the_example_in_the_text_is_right():
    assert doctest.testmod(filters).failed == 0
