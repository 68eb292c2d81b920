"""Poisson subsampling: each example is in the sample by a coin of its own.

References: Abadi et al. 2016, "Deep Learning with Differential Privacy", section 3.1; the amplification that the
accountant counts on holds for this sampler and for no shuffled or fixed-size batch.

**Rarer for some.** `thinned` leaves out some of a sample, each example by a coin of its own whose bias depends on that
example alone. Let x be an example whose thinned rate is p ≤ q, and let P and Q be what is released without x, and with
x certainly in the sample. With x released is (1 − p)·P + p·Q. For each ε ≥ 0 the divergences sup_S [M(S) − e^ε·P(S)] of
M = (1 − p)·P + p·Q from P, and of P from it, are convex in p (a supremum of linear functions) and 0 at p = 0, so they
do not fall as p grows: x is protected at least as well as at the rate q, and ε for q holds for everybody. Not so where
rates follow from how many examples there are of a kind, or where draws are weighted and then of a fixed number: one
example more then changes the others' rates, and neither sensitivity nor amplification holds.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hanse_common.randomness import Randomness


def poisson_sample(count: int, sampling_rate: float, randomness: Randomness) -> NDArray[np.intp]:
    """Return the indices, ascending, of a Poisson sample of `count` examples at `sampling_rate`.

    Each coin compares a 64-bit word with ⌊sampling_rate·2⁶⁴⌋, so an example is never in the sample with more
    than the stated probability. Raises `ValueError` unless 0 < sampling_rate ≤ 1.
    """
    if not 0 < sampling_rate <= 1:
        raise ValueError(f"Expected 0 < sampling_rate <= 1, found {sampling_rate}.")
    if sampling_rate == 1:
        return np.arange(count)
    threshold = np.uint64(int(sampling_rate * 2.0**64))  # exact: a float times a power of two
    return np.flatnonzero(randomness.words(count) < threshold)


def thinned(
    sample: NDArray[np.intp],
    kinds: NDArray[np.int64],
    rates: Sequence[float],
    sampling_rate: float,
    randomness: Randomness,
) -> NDArray[np.intp]:
    """Return what is left of `sample`, drawn at `sampling_rate`, when those of kind k are to be rarer, at `rates[k]`.

    Args:
        sample: indices.
        kinds: shape (len(sample),): each one's kind; one that has no rate is left out.
        rates: for each kind, over 0 and at most `sampling_rate`. Public: no function of the examples.
        sampling_rate: that of `sample`.
        randomness: gives a word to each of `sample`.

    Raises:
        ValueError: a rate is out of range.
    """
    if not 0 < min(rates) <= max(rates) <= sampling_rate:
        raise ValueError(
            f"Expected class rates over 0 and at most the sampling rate, {sampling_rate:g}, found "
            f"{min(rates):g} to {max(rates):g}."
        )
    known = (kinds >= 0) & (kinds < len(rates))
    # A kind's share of the words there are: at most 2⁶⁴ − 1 of 2⁶⁴, so one at the whole rate is left out once in 2⁶⁴.
    words = [min(int(rate / sampling_rate * 2.0**64), (1 << 64) - 1) for rate in rates]
    thresholds = np.array(words, dtype=np.uint64)[np.where(known, kinds, 0)]
    left: NDArray[np.intp] = sample[known & (randomness.words(len(sample)) < thresholds)]
    return left
