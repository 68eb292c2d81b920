"""Numbers against imbalance, from public counts."""

import numpy as np
import pytest

from hanse_common.vision.fusion import fused
from hanse_common.vision.imbalance import class_offsets, class_rates, class_weights
from hanse_common.vision.recipe_model import Loss

COUNTS = (6000, 1200, 60)


def test_weights_are_one_over_the_effective_number() -> None:
    """Cui et al. 2019, equation 2: E = Σ_{j<n} βʲ."""
    weights = class_weights(COUNTS, 0.999)
    effective = [sum(0.999**j for j in range(n)) for n in COUNTS]
    np.testing.assert_allclose(np.array(weights) * effective, weights[0] * effective[0], rtol=1e-9)
    assert np.mean(weights) == pytest.approx(1.0)
    assert class_weights(COUNTS, 0.0) == pytest.approx((1.0, 1.0, 1.0))
    inverse = class_weights(COUNTS, 1.0)
    np.testing.assert_allclose(np.array(inverse) * COUNTS, inverse[0] * 6000)
    Loss(class_weights=weights, class_offsets=class_offsets(COUNTS))  # in range


def test_offsets_are_logarithms_of_shares() -> None:
    assert np.exp(class_offsets(COUNTS)).sum() == pytest.approx(1.0)
    np.testing.assert_allclose(class_offsets(COUNTS, 2.0), 2 * np.array(class_offsets(COUNTS)))


def test_rates_are_highest_for_the_rarest_and_none_over_the_sampling_rate() -> None:
    assert max(class_rates(COUNTS, 0.3)) == class_rates(COUNTS, 0.3)[2] == 0.3
    np.testing.assert_allclose(np.array(class_rates(COUNTS, 0.3, power=1.0)) * COUNTS, 18.0)
    np.testing.assert_allclose(class_rates(COUNTS, 0.3, power=0.0), 0.3)


@pytest.mark.parametrize("counts", [(), (3.0, 0.0), (3.0, -1.0), (3.0, float("nan"))])
def test_impossible_counts_are_refused(counts: tuple[float, ...]) -> None:
    for function in (class_weights, class_offsets, lambda found: class_rates(found, 0.1)):
        with pytest.raises(ValueError, match="counts over 0"):
            function(counts)
    with pytest.raises(ValueError, match="beta"):
        class_weights(COUNTS, 1.5)


def test_fused_photos_are_the_softmax_of_their_mean_logits() -> None:
    logits = np.random.default_rng(1).normal(scale=3, size=(4, 5))
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    mean = np.exp(logits.mean(0))
    np.testing.assert_allclose(fused(shares), mean / mean.sum(), rtol=1e-12)
    np.testing.assert_allclose(fused(shares[:1]), shares[0], rtol=1e-12)
    assert fused(np.array([[1.0, 0.0], [0.4, 0.6]])).argmax() == 0
    assert np.isfinite(fused(np.array([[1.0, 0.0], [0.0, 1.0]]))).all()
    with pytest.raises(ValueError, match="m >= 1"):
        fused(np.empty((0, 3)))
