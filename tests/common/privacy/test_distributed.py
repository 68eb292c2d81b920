"""The sum of several merchants' shares of noise, against exact convolutions: the law that accounting counts on."""

import itertools
import math

import mpmath
import numpy as np
import pytest
from scipy import stats

from hanse_common.privacy import accounting
from hanse_common.privacy.accounting import Noise
from hanse_common.privacy.discrete import _cumulative_table, reach, total_variation
from hanse_common.privacy.mechanism import Mechanism
from hanse_common.randomness import AesCtrStream
from hanse_common.secagg import ring

ALPHA = 1e-6
BITS = 512
"""Fraction bits of the exact laws: rounding is far below e^{−π²·4²}, the smallest distance here."""


def discrete_gaussian(variance, bound):
    """P(X = k) under N_Z(0, variance), k = −bound … bound, as integers over 2^BITS."""
    with mpmath.workprec(BITS + 64):
        doubled = 2 * mpmath.mpf(variance)
        total = mpmath.jtheta(3, 0, mpmath.exp(-1 / doubled))
        half = [
            int(mpmath.floor(mpmath.ldexp(mpmath.exp(-k * k / doubled) / total, BITS) + mpmath.mpf(0.5)))
            for k in range(bound + 1)
        ]
    return half[:0:-1] + half


def convolved(laws, bits=BITS):
    """The law of the sum of independent variables with these symmetric laws, as integers over 2^bits."""
    total = np.array([1 << bits], dtype=object)
    for law in laws:
        total = np.convolve(total, np.array(law, dtype=object)) >> bits
    return total


def largest_log_ratio(shares, share):
    """max_k |ln P(sum = k) − ln P(N_Z(0, h·s²) = k)| over the middle, where the ratio takes all of its values.

    P(sum = k) is e^{−k²/2hs²} times a theta function of the lattice {x ∈ Z^h : Σx = 0} moved by k/h in each
    coordinate, so the ratio is a function of k mod h.
    """
    bound = math.ceil(share * math.sqrt(2 * BITS * math.log(2)))  # beyond it mass rounds to 0
    summed = convolved([discrete_gaussian(share**2, bound)] * shares)
    ideal = discrete_gaussian(shares * share**2, shares)
    middle = len(summed) // 2
    with mpmath.workprec(BITS):
        return max(
            abs(mpmath.log(mpmath.mpf(int(summed[middle + k])) / ideal[shares + k]))
            for k in range(-shares, shares + 1)
        )


def theorem_9(shares, share):
    """10·Σ_{k<h} e^{−2π²s²k/(k+1)}: Kairouz, Liu, Steinke 2021."""
    return 10 * mpmath.fsum(
        mpmath.exp(-2 * mpmath.pi**2 * mpmath.mpf(share) ** 2 * k / (k + 1)) for k in range(1, shares)
    )


@pytest.mark.parametrize("shares", [2, 3, 5, 9])
@pytest.mark.parametrize("share", [0.7, 1.0, 1.5, 4.0])
def test_the_sum_of_shares_is_as_near_a_discrete_gaussian_as_is_claimed(monkeypatch, shares, share):
    # Below the smallest share the sampler gives, the distance is large enough for float64 to show.
    monkeypatch.setattr(accounting, "validate_sigma", lambda sigma: None)
    noise = Noise(sigma=share * math.sqrt(shares), sensitivity=100.0, dimension=1, shares=shares)
    found = largest_log_ratio(shares, share)
    assert found <= theorem_9(shares, share) <= noise.distance
    # And not idly so, where there is one sum of two; further shares smooth what the bound adds up.
    if shares == 2:
        assert found > theorem_9(shares, share) / 10


def test_one_share_more_or_less_shows_in_the_law():
    """The comparison above would notice a variance that is off by one share in a thousand."""
    bound = 40
    summed = convolved([discrete_gaussian(1.0, bound)] * 3)
    ideal = discrete_gaussian(3.003, 3)
    middle = len(summed) // 2
    assert max(abs(math.log(int(summed[middle + k]) / ideal[3 + k])) for k in range(-3, 4)) > 1e-4


@pytest.mark.parametrize("shares", [2, 3])
def test_shares_that_are_drawn_add_up_to_the_ideal_law_within_the_claimed_variation(shares):
    """The sampler's own table, convolved exactly: every bit of it, at its smallest σ."""
    share = 4.0
    high, low = _cumulative_table(share)
    table = [(int(h) << 64) | int(lo) for h, lo in zip(high[:-1], low, strict=True)]
    edges = [0, *table, 1 << 128]
    drawn = [(b - a) << (BITS - 128) for a, b in itertools.pairwise(edges)]
    assert len(drawn) == 2 * reach(share) + 1
    summed = convolved([drawn] * shares)
    bound = len(summed) // 2
    ideal = discrete_gaussian(shares * share**2, bound)
    beyond = (1 << BITS) - sum(ideal)
    distance = sum(abs(int(a) - b) for a, b in zip(summed, ideal, strict=True)) + beyond
    noise = Noise(sigma=share * math.sqrt(shares), sensitivity=100.0, dimension=1, shares=shares)
    assert math.ldexp(distance, -BITS - 1) <= noise.failure + noise.distance
    assert noise.failure == shares * total_variation(share)


@pytest.mark.parametrize("shares", [2, 5])
def test_what_merchants_contribute_adds_up_to_sum_and_noise(shares):
    """Residues mod 2³² of h contributions: the mean is the exact sum's, the noise is N_Z(0, σ²)."""
    dimension, rounds = 1000, 200
    mechanism = Mechanism(1.0, dimension, noise_multiplier=0.02, sampling_rate=1.0, steps=1, shares=shares)
    sources = [AesCtrStream(bytes([merchant + 1]) * 32) for merchant in range(shares)]
    step = 1 << (mechanism.grid.step_exponent - mechanism.grid.fine_exponent)
    steps = np.arange(dimension) - dimension // 2  # whole steps, so that rounding adds nothing
    noise = []
    for _ in range(rounds):
        total = np.zeros(dimension, dtype=np.uint32)
        for merchant, source in enumerate(sources):
            fine = (steps * step).astype(np.int64) * (1 if merchant == 0 else 0)
            total += ring.residues(mechanism.contribute(fine, ring.share(shares), source))
        noise.append(ring.integers(total).astype(np.int64) - steps)
    found = np.concatenate(noise)
    sigma = mechanism.noise.sigma
    edges = np.unique(np.rint(stats.norm.ppf(np.linspace(0, 1, 41)[1:-1]) * sigma).astype(int))
    k = np.arange(-20 * math.ceil(sigma), 20 * math.ceil(sigma) + 1)
    pmf = np.exp(-(k**2) / (2 * sigma**2))
    pmf /= pmf.sum()
    cells = np.searchsorted(edges, k)
    expected = np.bincount(cells, weights=pmf) * len(found)
    observed = np.bincount(np.searchsorted(edges, found), minlength=len(expected))
    assert stats.chisquare(observed, expected).pvalue > ALPHA
