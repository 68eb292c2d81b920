from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hanse_client.catalog import Catalog
from hanse_common.errors import ConfigError
from hanse_common.vision.photo import decode
from hanse_common.vision.taxonomy import LabelMap, Taxonomy
from hanse_simulations.datasets import CLASSES
from hanse_simulations.partition import dirichlet, iid, write_shop

LABELS = np.repeat(np.arange(10, dtype=np.uint8), 600)


def skew(shares: list[np.ndarray]) -> float:
    """Mean over merchants of the largest class's proportion."""
    return float(np.mean([np.bincount(LABELS[share], minlength=10).max() / len(share) for share in shares]))


@settings(max_examples=60, deadline=None)
@given(
    labels=st.lists(st.integers(0, 5), min_size=1, max_size=80),
    merchants=st.integers(1, 8),
    alpha=st.sampled_from([1e-300, 1e-3, 0.3, 1.0, 1e6, None]),
    seed=st.integers(0, 2**32),
)
def test_shares_are_disjoint_of_equal_size_and_repeat_with_the_seed(labels, merchants, alpha, seed):
    per_merchant = len(labels) // merchants

    def split():
        rng = np.random.default_rng(seed)
        if alpha is None:
            return iid(labels, merchants, per_merchant, rng)
        return dirichlet(labels, merchants, per_merchant, alpha, rng)

    if per_merchant == 0:
        with pytest.raises(ConfigError):
            split()
        return
    shares = split()
    assert [share.shape for share in shares] == [(per_merchant,)] * merchants
    together = np.concatenate(shares)
    assert len(set(together.tolist())) == len(together)
    assert together.min() >= 0 and together.max() < len(labels)
    assert all(np.array_equal(a, b) for a, b in zip(shares, split(), strict=True))


def test_iid_shares_have_the_pools_classes():
    counts = np.array(
        [np.bincount(LABELS[s], minlength=10) for s in iid(LABELS, 5, 1000, np.random.default_rng(1))]
    )
    assert stats.chi2_contingency(counts).pvalue > 1e-4


def test_a_smaller_alpha_skews_more():
    rng = np.random.default_rng(2)
    few, some, many = (skew(dirichlet(LABELS, 5, 500, alpha, rng)) for alpha in (0.05, 0.5, 100.0))
    assert few > 0.55 > some > 0.2 > many
    assert skew(iid(LABELS, 5, 500, rng)) < 0.15


def test_class_proportions_are_dirichlet():
    # Marginals of a symmetric Dirichlet are Beta(α, (K − 1)·α). First merchants only: no class has run out.
    rng = np.random.default_rng(3)
    firsts = [np.mean(LABELS[dirichlet(LABELS, 1, 500, 2.0, rng)[0]] == 4) for _ in range(400)]
    assert stats.kstest(firsts, stats.beta(2.0, 18.0).cdf).pvalue > 1e-4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((5, 1201, 0.3), "5 × 1201 = 6005 photos, expected at most the pool's 6000"),
        ((0, 10, 0.3), "expected at least 1 of each"),
        ((5, 0, 0.3), "expected at least 1 of each"),
        ((5, 10, 0.0), "alpha: found 0.0"),
        ((5, 10, float("nan")), "alpha: found nan"),
        ((5, 10, float("inf")), "alpha: found inf"),
    ],
)
def test_impossible_partitions_are_refused(arguments, words):
    with pytest.raises(ConfigError, match=words):
        dirichlet(LABELS, *arguments, np.random.default_rng(0))


@pytest.mark.parametrize("channels", [(), (3,)])
def test_a_shop_is_a_catalog_of_the_same_pixels(tmp_path, channels):
    rng = np.random.default_rng(4)
    images = rng.integers(0, 256, (60, 28, 28, *channels), dtype=np.uint8)
    labels = np.arange(60) % 10
    indices = rng.permutation(60)[:25]
    write_shop(tmp_path / "shop", images, labels, indices, CLASSES)
    catalog = Catalog.load(
        tmp_path / "shop", LabelMap(Taxonomy(classes=CLASSES)), holdout_key=bytes(16), holdout_fraction=0.1
    )
    assert {int(r.path.stem): r.label for r in catalog.records} == {i: labels[i] for i in indices}
    for record in catalog.records:
        pixels = np.asarray(decode(Path(record.path)))
        original = images[int(record.path.stem)]
        assert np.array_equal(pixels, original if channels else np.repeat(original[..., None], 3, axis=2))


@pytest.mark.parametrize("name", ["T-shirt/top", "..", ".hidden", "", "/srv"])
def test_class_names_that_are_no_folder_names_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="class name"):
        write_shop(tmp_path / "shop", np.zeros((1, 4, 4), dtype=np.uint8), [0], np.array([0]), [name])
    assert not (tmp_path / "shop").exists()
