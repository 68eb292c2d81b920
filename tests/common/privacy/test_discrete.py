"""The discrete Gaussian against mpmath's, and every branch of the table look-up against exact integers."""

import itertools
import math
from bisect import bisect_right

import mpmath
import numpy as np
import pytest
from scipy import stats

from hanse_common.privacy.discrete import (
    SIGMA_MAX,
    DiscreteGaussian,
    _cumulative_table,
    total_variation,
)
from hanse_common.randomness import AesCtrStream

ALPHA = 1e-6


class Scripted:
    """A Randomness that hands out the given words and counts them."""

    def __init__(self, words):
        self.script = np.array(words, dtype=np.uint64)
        self.used = 0

    def words(self, count):
        self.used += count
        assert self.used <= len(self.script), "more words drawn than scripted"
        return self.script[self.used - count : self.used].copy()


def table_as_integers(sigma):
    high, low = _cumulative_table(sigma)
    assert len(high) == len(low) + 1
    return [(int(h) << 64) | int(lo) for h, lo in zip(high[:-1], low, strict=True)]


def exact_pmf(sigma, reach):
    """P(X = k) for k = −reach … reach, to 60 digits, normalised by Jacobi's theta function."""
    doubled = 2 * mpmath.mpf(sigma) ** 2
    total = mpmath.jtheta(3, 0, mpmath.exp(-1 / doubled))
    half = [mpmath.exp(-(mpmath.mpf(k) ** 2) / doubled) / total for k in range(reach + 1)]
    return half[:0:-1] + half


@pytest.mark.parametrize("sigma", [4.0, 17.3, 250.7])
def test_table_matches_mpmath_to_the_last_bit(sigma):
    with mpmath.workdps(70):
        table = table_as_integers(sigma)
        reach = len(table) // 2
        assert reach == math.ceil(13.5 * sigma)
        pmf = exact_pmf(sigma, reach)
        beyond = (1 - mpmath.fsum(pmf)) / 2
        cumulative = beyond
        for entry, mass in zip(table, pmf, strict=False):
            cumulative += mass
            assert abs(entry - cumulative * 2**128) < 1.001
        edges = [0, *table, 2**128]
        sampled = [mpmath.mpf(b - a) / 2**128 for a, b in itertools.pairwise(edges)]
        distance = sum(abs(a - b) for a, b in zip(sampled, pmf, strict=True)) / 2 + beyond
        assert distance <= total_variation(sigma)
        assert total_variation(sigma) < 16 * sigma * 2.0**-128
        assert beyond < mpmath.mpf(2) ** -129


@pytest.mark.parametrize("sigma", [4.0, 31.25, 1000.0])
def test_table_is_exactly_symmetric_and_never_decreases(sigma):
    table = table_as_integers(sigma)
    assert all(a + b == 2**128 for a, b in zip(table, reversed(table), strict=True))
    assert table == sorted(table)
    assert table[0] >= 1


def test_a_large_table_is_still_exact_at_a_few_points():
    sigma = 20_000.0
    high, low = _cumulative_table(sigma)
    reach = len(low) // 2
    with mpmath.workdps(70):
        total = mpmath.sqrt(2 * mpmath.pi) * sigma  # by Poisson summation, to thousands of digits
        for k in (0, 1, 20_000, 100_000):
            step = (int(high[reach + k]) << 64 | int(low[reach + k])) - (
                int(high[reach + k - 1]) << 64 | int(low[reach + k - 1])
            )
            exact = mpmath.exp(-(mpmath.mpf(k) ** 2) / (2 * mpmath.mpf(sigma) ** 2)) / total * 2**128
            assert abs(step - exact) < 2.001


def test_ties_of_the_high_word_are_broken_by_the_low_word():
    sigma = 4.0
    table = table_as_integers(sigma)
    numbers = sorted({min(u, 2**128 - 1) for f in table for u in (f - 1, f, f + 1)} | {0})
    highs = {f >> 64 for f in table}
    words = [u >> 64 for u in numbers]
    lows = [u & (2**64 - 1) for u in numbers if u >> 64 in highs]
    randomness = Scripted(words + lows)
    samples = DiscreteGaussian(sigma).sample(len(numbers), randomness)
    reach = len(table) // 2
    assert samples.tolist() == [bisect_right(table, u) - reach for u in numbers]
    assert samples[0] == -reach
    assert samples[-1] == reach
    assert len(lows) > len(numbers) / 2
    assert randomness.used == len(numbers) + len(lows)


def test_low_words_are_drawn_for_ties_alone():
    sigma, count = 300.0, 100_000
    words = AesCtrStream(bytes(32)).words(count)
    randomness = Scripted(words)
    samples = DiscreteGaussian(sigma).sample(count, randomness)
    table = table_as_integers(sigma)
    reach = len(table) // 2
    assert randomness.used == count
    # No high word here equals a table entry's, so any low word gives the same answer.
    assert samples.tolist() == [bisect_right(table, int(w) << 64) - reach for w in words]


@pytest.mark.parametrize("sigma", [4.0, 9.5, 1000.0])
def test_samples_follow_the_exact_distribution(sigma):
    count = 1_000_000
    samples = DiscreteGaussian(sigma).sample(count, AesCtrStream(b"\x01" * 32))
    assert samples.dtype == np.int64
    reach = math.ceil(13.5 * sigma)
    k = np.arange(-reach, reach + 1)
    pmf = np.exp(-(k**2) / (2 * sigma**2))
    pmf /= pmf.sum()
    observed = np.bincount(samples + reach, minlength=len(k))
    # Merge neighbours until every cell expects at least 20.
    edges, mass = [0], 0.0
    for i, p in enumerate(pmf):
        mass += p * count
        if mass >= 20:
            edges.append(i + 1)
            mass = 0.0
    edges = edges[:-1]
    expected = count * np.add.reduceat(pmf, edges)
    p_value = stats.chisquare(np.add.reduceat(observed, edges), expected).pvalue
    assert p_value > ALPHA


@pytest.mark.parametrize("sigma", [4.0, 1000.0])
def test_moments(sigma):
    count = 1_000_000
    x = DiscreteGaussian(sigma).sample(count, AesCtrStream(b"\x02" * 32)) / sigma
    bound = stats.norm.isf(ALPHA / 2) / math.sqrt(count)
    assert abs(x.mean()) < bound
    assert abs((x**2).mean() - 1) < bound * math.sqrt(2)
    assert abs((x**3).mean()) < bound * math.sqrt(15)
    assert abs((x**4).mean() - 3) < bound * math.sqrt(96)


def test_samples_do_not_depend_on_how_they_are_split():
    whole = DiscreteGaussian(50.0).sample(100_000, AesCtrStream(b"\x03" * 32))
    stream, sampler = AesCtrStream(b"\x03" * 32), DiscreteGaussian(50.0)
    parts = [sampler.sample(n, stream) for n in (0, 1, 40_000, 59_999)]
    assert np.array_equal(whole, np.concatenate(parts))


@pytest.mark.parametrize("sigma", [0.0, -5.0, 3.999, SIGMA_MAX * 1.01, math.inf, math.nan])
def test_sigma_out_of_range_is_refused(sigma):
    with pytest.raises(ValueError, match=r"Expected 4 ≤ sigma ≤ 262144 grid units"):
        DiscreteGaussian(sigma)
