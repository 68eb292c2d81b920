"""Poisson subsampling: each example is in the sample by a coin of its own.

References: Abadi et al. 2016, "Deep Learning with Differential Privacy", section 3.1; the amplification that the
accountant counts on holds for this sampler and for no shuffled or fixed-size batch.
"""

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
