"""Public numbers that make up for classes of which the league has many photos, and others of which it has few.

    counts = (6000, 1200, 60)                                # of the league's classes, about
    Loss(class_weights=class_weights(counts, beta=0.999))    # rare classes' photos count for more, or
    Loss(class_offsets=class_offsets(counts))                # the model is told how rare they are, or
    class_rates(counts, sampling_rate=0.1)                   # frequent classes' photos are rarer in samples

`counts` must be public: what is known of the trade, or the noisy counts of a federated evaluation
(`hanse_common.evaluation_estimate`), whose ε merchants have paid. Counting their photos otherwise would publish what no
ledger knows of. With any such numbers a photo's gradient is clipped as ever, so ε is that of the plan without them.

References: Cui, Jia, Lin, Song, Belongie 2019, "Class-Balanced Loss Based on Effective Number of Samples", equation 2;
Menon et al. 2021, "Long-tail learning via logit adjustment", equation 10; Mahajan et al. 2018, "Exploring the Limits of
Weakly Supervised Pretraining", section 2.2 (square-root sampling).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def class_weights(counts: Sequence[float], beta: float = 0.999) -> tuple[float, ...]:
    """Return a loss's weights, one over each class's effective number of photos, (1 − βⁿ)/(1 − β), of mean 1.

    `beta` 0 makes all alike, 1 is the inverse frequency. Raises `ValueError` unless 0 ≤ beta ≤ 1 and counts are over 0.
    """
    numbers = _counts(counts)
    if not 0 <= beta <= 1:
        raise ValueError(f"Expected 0 <= beta <= 1, found {beta}.")
    effective = numbers if beta == 1 else (1 - beta**numbers) / (1 - beta)
    return tuple(float(weight) for weight in (1 / effective) / np.mean(1 / effective))


def class_offsets(counts: Sequence[float], temperature: float = 1.0) -> tuple[float, ...]:
    """Return a loss's offsets: τ·log of each class's share. Raises `ValueError` unless counts are over 0."""
    numbers = _counts(counts)
    return tuple(float(offset) for offset in temperature * np.log(numbers / numbers.sum()))


def class_rates(counts: Sequence[float], sampling_rate: float, power: float = 0.5) -> tuple[float, ...]:
    """Return a plan's class rates, proportional to countˢ with s = −`power`, the rarest class's being `sampling_rate`.

    `power` 1 has as many photos of each class in a sample, 0.5 is in between. Raises `ValueError` unless counts are
    over 0.
    """
    numbers = _counts(counts)
    return tuple(float(rate) for rate in sampling_rate * (numbers.min() / numbers) ** power)


def _counts(counts: Sequence[float]) -> NDArray[np.float64]:
    numbers = np.asarray(counts, dtype=np.float64)
    if not (np.isfinite(numbers) & (numbers > 0)).all() or not len(numbers):
        raise ValueError(
            "Expected counts over 0, one for each class; a class that nobody has needs no weight."
        )
    return numbers
