"""A metric of the shop's own: what it leaves out of the comparison, when it serves, and to what it belongs."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import fractional_matrix_power

from hanse_client.config import ClientConfig
from hanse_client.gallery.gallery import Gallery
from hanse_client.gallery.product import Product
from hanse_client.personal import metric as metrics
from hanse_client.personal import metric_learning
from hanse_client.personal.corrections import Corrections
from hanse_client.personal.metric import PersonalMetric
from hanse_client.personal.metric_learning import finds_its_product, fitted, learn_metric, learned_from
from hanse_client.shop import Shop
from hanse_common.config import load
from hanse_common.errors import RecognizerError

from .shelf import league, picture

DIMENSION = 24
BASE = bytes(range(32))


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def products(count: int, photos: int = 4, style: float = 2.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Photos whose product is in all but three coordinates, and whose style, in these three, is larger."""
    source = np.random.default_rng(seed)
    index = np.repeat(np.arange(count), photos)
    rows = source.normal(size=(count, DIMENSION))[index]
    rows += source.normal(scale=0.3, size=rows.shape)
    rows[:, :3] = source.normal(scale=style * 3, size=(len(rows), 3))
    return unit(rows), index


def test_photos_find_their_product_better_and_it_serves(tmp_path: Path) -> None:
    rows, index = products(60)
    metric = learned_from(rows, index, BASE).metric
    assert metric is not None
    judged = metric.record.judgement
    assert (judged.photos, judged.better) == (240, True)
    assert judged.own_right > judged.shared_right + 30
    metric.save(tmp_path)
    again = PersonalMetric.load(tmp_path, BASE, DIMENSION)
    assert again is not None
    assert again.embedding == metric.embedding != BASE
    # Products that were never seen gain, too.
    others, named = products(60, seed=1)
    plain = finds_its_product(others, named, np.arange(240)).mean()
    moved = finds_its_product(again.apply(others), named, np.arange(240)).mean()
    assert moved > plain + 0.1


def test_it_is_the_root_of_the_inverse_covariance_within_products() -> None:
    rows, index = products(40)
    learned = fitted(rows, index)
    means = np.stack([rows[index == product].mean(axis=0) for product in range(40)])
    scatter = (rows - means[index]).astype(np.float64)
    covariance = scatter.T @ scatter / (len(rows) - 40)
    s, identity = metric_learning.SHRINKAGE, np.eye(DIMENSION)
    shrunk = (1 - s) * covariance + s * np.trace(covariance) / DIMENSION * identity
    expected = unit((rows - means.mean(axis=0)) @ fractional_matrix_power(shrunk, -0.5))
    np.testing.assert_allclose(learned.apply(rows), expected, atol=1e-4)


def test_rows_have_norm_one_and_zeros_stay_zero() -> None:
    learned = fitted(*products(20))
    rows = np.vstack([products(3, seed=2)[0], np.zeros((1, DIMENSION), np.float32)])
    moved = learned.apply(rows)
    assert moved.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(moved[:-1], axis=1), 1.0, rtol=1e-5)
    assert not moved[-1].any()


def test_a_metric_that_does_not_help_does_not_serve(tmp_path: Path) -> None:
    source = np.random.default_rng(0)
    rows = unit(
        source.normal(size=(30, DIMENSION))[np.repeat(np.arange(30), 3)] + 0.1 * source.normal(size=(90, 24))
    )
    metric = learned_from(rows, np.repeat(np.arange(30), 3), BASE).metric
    assert metric is not None
    assert not metric.record.judgement.better
    metric.save(tmp_path)
    assert PersonalMetric.load(tmp_path, BASE, DIMENSION) is None


def test_nobody_learns_from_few_products_or_from_copies() -> None:
    assert learned_from(*products(9), BASE).metric is None
    assert learned_from(*products(9), BASE).products == 9
    assert learned_from(*products(30, photos=1), BASE).products == 0
    rows, index = products(30, photos=1)
    copied = np.vstack([rows, unit(rows + 1e-4)])
    assert learned_from(copied, np.tile(index, 2), BASE).products == 0
    # All photos of a product alike, though no copies by their cosine: nothing to leave out.
    same = fitted(np.repeat(rows, 2, axis=0), np.repeat(index, 2))
    assert len(same.factors) == 0
    np.testing.assert_allclose(same.apply(rows), unit(rows - rows.mean(axis=0)), atol=1e-6)


def test_another_embedding_or_damage_drops_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    metric = learned_from(*products(60), BASE).metric
    assert metric is not None
    harms: list[Callable[[], object]] = [
        lambda: (tmp_path / "metric.safetensors").write_bytes(b"{}"),
        lambda: (tmp_path / "metric.json").write_text("no json"),
        lambda: (tmp_path / "metric.safetensors").unlink(),
    ]
    metric.save(tmp_path)
    assert PersonalMetric.load(tmp_path, bytes(32), DIMENSION) is None
    assert PersonalMetric.load(tmp_path, BASE, DIMENSION + 1) is None
    assert "another embedding" in caplog.text
    for harm in harms:
        metric.save(tmp_path)
        assert PersonalMetric.load(tmp_path, BASE, DIMENSION) is not None
        harm()
        assert PersonalMetric.load(tmp_path, BASE, DIMENSION) is None
        with pytest.raises(RecognizerError):
            PersonalMetric.read(tmp_path)
    assert metrics.forget(tmp_path)
    assert list(tmp_path.iterdir()) == []


@given(st.integers(2, 12), st.integers(2, 4), st.integers(0, 1000))
def test_a_photo_is_not_its_own_evidence(count: int, photos: int, seed: int) -> None:
    rows, index = products(count, photos, seed=seed)
    found = finds_its_product(rows, index, np.arange(len(rows)), chunk=5)
    for row in range(len(rows)):
        others = np.delete(np.arange(len(rows)), row)
        means = unit(
            np.stack([rows[others][index[others] == product].sum(axis=0) for product in range(count)])
        )
        assert found[row] == (int((means @ rows[row]).argmax()) == index[row])


@pytest.fixture
def none_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no two pictures be copies: these small ones all but are."""
    monkeypatch.setattr(metric_learning, "SAME", 2.0)


@pytest.mark.usefixtures("none_alike")
def test_products_come_from_gallery_catalog_and_corrections(shop: Path) -> None:
    rows = [f"fine stripes/{4 * number:03}.png,fine stripes,C-{number % 8}\n" for number in range(24)]
    (shop / "photos" / "catalog.csv").write_text("path,label,sku\n" + "".join(rows))
    text = (shop / "hanse-client.yaml").read_text().replace("photos: photos", "photos: photos/catalog.csv")
    (shop / "hanse-client.yaml").write_text(text)
    config = load(ClientConfig, shop / "hanse-client.yaml")
    with Corrections(config.corrections_path) as corrections, Gallery.open(config.gallery_path) as gallery:
        for number in range(5):
            photos = [Gallery.prepare(picture(number % 4, 5000 + 2 * number + view)) for view in range(2)]
            gallery.put(Product(sku=f"G-{number}"), photos)
        gallery.put(Product(sku="G-single"), [Gallery.prepare(picture(1, 7000))])
        corrections.add(Gallery.prepare(picture(1, 7001)), sku="G-single")
        corrections.add(Gallery.prepare(picture(1, 7002)), sku="nothing else of it")
        learned = learn_metric(Shop(config), league(), gallery, corrections)
    assert learned.products == 8 + 5 + 1
    assert learned.metric is not None
    assert learned.metric.record.judgement.photos == 24 + 10 + 2
    assert learned.metric.record.embedding == league().embedding_digest().hex()


@pytest.mark.usefixtures("none_alike")
def test_personalize_tells_of_search(shop: Path, personalize: Callable[..., str]) -> None:
    config = load(ClientConfig, shop / "hanse-client.yaml")
    with Gallery.open(config.gallery_path) as gallery:
        for number in range(12):
            photos = [Gallery.prepare(picture(number % 4, 5000 + 3 * number + view)) for view in range(3)]
            gallery.put(Product(sku=f"G-{number}"), photos)
    found = json.loads(personalize("--json"))["metric"]
    assert found["products"] == 12
    assert found["used"] == found["judgement"]["better"]
    assert "Search: of 36 photos of 12 products" in personalize()
    assert PersonalMetric.read(config.personal_path).record.products == 12
