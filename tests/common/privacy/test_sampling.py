"""The Poisson sampler against exact binomial laws and exact integers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from hanse_common.privacy.sampling import poisson_sample
from hanse_common.randomness import AesCtrStream

ALPHA = 1e-6


class Scripted:
    """A Randomness that hands out the given words and counts them."""

    def __init__(self, *words: int) -> None:
        self.script = np.array(words, dtype=np.uint64)
        self.used = 0

    def words(self, count: int) -> NDArray[np.uint64]:
        self.used += count
        assert self.used <= len(self.script), "more words drawn than scripted"
        return self.script[self.used - count : self.used].copy()


def stream(number: int) -> AesCtrStream:
    return AesCtrStream(bytes([number]) * 32)


@pytest.mark.parametrize("rate", [0.003, 0.2, 0.5, 0.9])
def test_sample_sizes_follow_the_binomial_law(rate: float) -> None:
    """One coin an example: sizes of samples of 40, over 20 000 samples, against the exact probabilities."""
    draws = 20_000
    randomness = stream(1)
    sizes = np.array([len(poisson_sample(40, rate, randomness)) for _ in range(draws)])
    law = stats.binom(40, rate)
    low, high = int(law.ppf(20 / draws)), int(law.isf(20 / draws))
    inner = np.arange(low + 1, high)
    expected = draws * np.array([law.cdf(low), *law.pmf(inner), law.sf(high - 1)])
    observed = np.array([(sizes <= low).sum(), *((sizes == k).sum() for k in inner), (sizes >= high).sum()])
    assert observed.sum() == draws
    assert stats.chisquare(observed, expected * (draws / expected.sum())).pvalue > ALPHA


def test_every_example_has_the_same_chance_and_a_coin_of_its_own() -> None:
    draws, count, rate = 8000, 25, 0.3
    randomness = stream(2)
    chosen = np.zeros((draws, count), dtype=bool)
    for row in chosen:
        row[poisson_sample(count, rate, randomness)] = True
    bound = ALPHA / count**2
    for total in chosen.sum(axis=0):
        assert stats.binomtest(int(total), draws, rate).pvalue > bound
    pairs = chosen.T.astype(np.int64) @ chosen
    for i in range(count):
        for j in range(i):
            assert stats.binomtest(int(pairs[i, j]), draws, rate**2).pvalue > bound
    assert stats.binomtest(int((chosen[1:] & chosen[:-1])[:, 0].sum()), draws - 1, rate**2).pvalue > bound


def test_a_coin_is_one_comparison_with_all_64_bits() -> None:
    threshold = 3 << 61  # 0.375 · 2⁶⁴
    words = Scripted(threshold - 1, threshold, 0, 2**64 - 1, threshold + 1)
    assert poisson_sample(5, 0.375, words).tolist() == [0, 2]
    assert words.used == 5


@given(st.floats(5e-324, 1, exclude_max=True))
def test_no_rate_is_exceeded(rate: float) -> None:
    """The chance is threshold/2⁶⁴ ≤ rate; near 1 nothing wraps around."""
    threshold = int(rate * 2**64)
    assert threshold / 2**64 <= rate
    if threshold:
        assert poisson_sample(1, rate, Scripted(threshold - 1)).tolist() == [0]
    assert poisson_sample(1, rate, Scripted(threshold)).tolist() == []


def test_rate_1_takes_every_example_and_draws_nothing() -> None:
    words = Scripted()
    assert poisson_sample(4, 1.0, words).tolist() == [0, 1, 2, 3]
    assert words.used == 0


def test_a_tiny_rate_takes_none_or_hardly_any() -> None:
    assert len(poisson_sample(100_000, 5e-324, stream(3))) == 0
    assert len(poisson_sample(100_000, 1e-12, stream(4))) == 0
    assert poisson_sample(3, 2.0**-64, Scripted(0, 1, 0)).tolist() == [0, 2]


def test_an_empty_catalog_gives_an_empty_sample() -> None:
    for rate in (0.5, 1.0):
        assert len(poisson_sample(0, rate, stream(5))) == 0


def test_samples_are_sorted_indices_and_never_repeat_themselves() -> None:
    randomness = stream(6)
    first, second = (poisson_sample(1000, 0.1, randomness) for _ in range(2))
    assert first.dtype == np.intp and (np.diff(first) > 0).all() and first[0] >= 0 and first[-1] < 1000
    assert not np.array_equal(first, second)
    assert np.array_equal(first, poisson_sample(1000, 0.1, stream(6)))


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.0000001, float("nan"), float("inf")])
def test_rates_out_of_range(rate: float) -> None:
    with pytest.raises(ValueError, match="sampling_rate"):
        poisson_sample(3, rate, stream(7))
