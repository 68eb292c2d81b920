"""A metric of the shop's own: what it leaves out of the comparison, when it serves, and to what it belongs."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import fractional_matrix_power

from hanse_client.cli.personal import metric_conclusion
from hanse_client.config import ClientConfig
from hanse_client.gallery.gallery import Gallery
from hanse_client.gallery.product import Product
from hanse_client.personal import metric as metrics
from hanse_client.personal import metric_judging, metric_learning
from hanse_client.personal.corrections import Corrections
from hanse_client.personal.head import Judgement
from hanse_client.personal.metric import FOLDS, MetricRecord, PersonalMetric
from hanse_client.personal.metric_judging import Asked, finds_its_product, parts_of
from hanse_client.personal.metric_learning import LearnedMetric, fitted, learn_metric, learned_from
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


@dataclass(frozen=True)
class Shelf:
    """A shop whose photos show products in clean coordinates, and beside them in three that its style blurs."""

    looks: np.ndarray
    rows: np.ndarray
    index: np.ndarray

    @classmethod
    def of(cls, count: int, photos: int = 4) -> "Shelf":
        source = np.random.default_rng(0)
        looks = source.normal(size=(count, DIMENSION))
        looks[:, :3] *= 3
        index = np.repeat(np.arange(count), photos)
        rows = looks[index] + source.normal(scale=0.3, size=(len(index), DIMENSION))
        rows[:, :3] += source.normal(scale=6.0, size=(len(index), 3))
        return cls(looks, unit(rows), index)

    def asked(self, products: np.ndarray, style: str, seed: int = 5) -> Asked:
        """Ask with photos in the shop's style, or in one that blurs what that keeps and keeps what it blurs."""
        source = np.random.default_rng(seed)
        photos = self.looks[products] + source.normal(scale=0.3, size=(len(products), DIMENSION))
        if style == "own":
            photos[:, :3] += source.normal(scale=6.0, size=(len(products), 3))
        else:
            photos[:, 3:] = source.normal(scale=0.8, size=(len(products), DIMENSION - 3))
        return Asked(unit(photos), products, self.rows, self.index)


def learned_on(shelf: Shelf, asked: Asked | None) -> PersonalMetric:
    rows, index = shelf.rows, shelf.index
    if asked is not None:
        rows, index = np.concatenate([rows, asked.photos]), np.concatenate([index, asked.products])
    metric = learned_from(rows, index, BASE, asked).metric
    assert metric is not None
    return metric


def test_corrections_keep_a_metric_from_serving_where_it_does_worse_on_them(tmp_path: Path) -> None:
    shelf, products = Shelf.of(60), np.arange(30)
    alone = learned_on(shelf, None).record
    assert (alone.asked.photos, alone.judgement.better, alone.serves) == (0, True, True)

    same = learned_on(shelf, shelf.asked(products, "own")).record
    assert (same.asked.photos, same.serves) == (30, True)
    assert same.asked.own_right > same.asked.shared_right

    metric = learned_on(shelf, shelf.asked(products, "another"))
    other = metric.record
    assert other.judgement.better and other.asked.photos == 30
    assert other.asked.own_right < other.asked.shared_right
    assert not other.serves
    metric.save(tmp_path)
    assert not PersonalMetric.read(tmp_path).record.serves
    assert PersonalMetric.load(tmp_path, BASE, DIMENSION) is None


def judgement(photos: int, before: int, after: int, *, clear: bool, differing: int = 0) -> Judgement:
    return Judgement(
        photos=photos,
        shared_right=before,
        own_right=after,
        differing=differing or abs(after - before),
        p_value=0.01 if clear else 0.4,
        better=clear and after > before,
    )


NEVER = judgement(0, 0, 0, clear=False)
BETTER, UNCLEAR = judgement(900, 400, 450, clear=True), judgement(900, 400, 405, clear=False)


@pytest.mark.parametrize(
    ("own", "asked", "serves"),
    [
        (BETTER, NEVER, True),
        (UNCLEAR, NEVER, False),
        (BETTER, judgement(30, 12, 12, clear=False), True),
        (BETTER, judgement(30, 12, 13, clear=False, differing=5), True),
        (BETTER, judgement(30, 12, 12, clear=False, differing=4), False),
        (BETTER, judgement(30, 12, 11, clear=False), False),
        (UNCLEAR, judgement(30, 12, 14, clear=False), False),
        (UNCLEAR, judgement(30, 2, 12, clear=True), True),
        (BETTER, judgement(30, 12, 2, clear=True), False),
    ],
)
def test_what_it_takes_to_serve(own: Judgement, asked: Judgement, serves: bool) -> None:
    record = MetricRecord(
        arrays="00" * 32,
        embedding="00" * 32,
        products=60,
        judgement=own,
        asked=asked,
        created=datetime(2026, 1, 1, tzinfo=UTC),
    )
    assert record.serves == serves
    said = metric_conclusion(record)
    assert ("is used from now on" in said, "is not used" in said) == (serves, not serves)
    assert (f"{asked.photos} photos that search was asked with" in said) == (serves and asked.photos > 0)
    assert ("alone" in said.replace("Chance alone", "")) == (serves and asked.photos == 0)


def test_who_asks_searches_the_gallery_with_a_metric_that_does_not_know_the_product() -> None:
    shelf = Shelf.of(40, photos=2)
    products = np.tile(np.arange(30), 2)
    asked = shelf.asked(products, "own", seed=1)
    # The gallery: one photo of products 0 to 9, which is the first that was asked with; two of 10 to 34, and of 10 to
    # 19 what was asked with as well; none of the others.
    rows = np.concatenate([np.flatnonzero((shelf.index >= 10) & (shelf.index < 35))])
    gallery = np.concatenate([asked.photos[:10], shelf.rows[rows], asked.photos[10:20]])
    of_gallery = np.concatenate([np.arange(10), shelf.index[rows], np.arange(10, 20)])
    again = np.concatenate([asked.photos, asked.photos[:30]])  # copies of what was asked count once
    searched = Asked(again, np.tile(np.arange(30), 3), gallery, of_gallery)
    metric = learned_on(shelf, searched)
    found = metric.record.asked

    taught, index = np.concatenate([shelf.rows, asked.photos]), np.concatenate([shelf.index, products])
    parts, right = parts_of(40), np.zeros(3, dtype=int)
    moves = [fitted(taught[parts[index] != part], index[parts[index] != part]) for part in range(FOLDS)]
    counted = 0
    for photo, product in zip(asked.photos, products, strict=True):
        others = (gallery @ photo < 0.99) | (of_gallery != product)
        if not (others & (of_gallery == product)).any():
            continue
        counted += 1
        for way, see in enumerate((lambda seen: seen, moves[parts[product]].apply, metric.apply)):
            known = {int(p): see(gallery)[others & (of_gallery == p)].sum(axis=0) for p in set(of_gallery)}
            cosine = {p: see(photo[None])[0] @ (total / np.linalg.norm(total)) for p, total in known.items()}
            right[way] += max(cosine, key=lambda p: cosine[p]) == product
    assert (found.photos, found.shared_right, found.own_right) == (counted, *right[:2].tolist())
    assert counted == 50
    assert right[1] != right[2]  # what one finds that knows the product


def test_a_metric_of_an_earlier_release_is_learned_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    metric = learned_from(*products(60), BASE).metric
    assert metric is not None
    metric.save(tmp_path)
    file = tmp_path / "metric.json"
    record = json.loads(file.read_text())
    assert record.pop("asked")["photos"] == 0
    file.write_text(json.dumps(record | {"format_version": 1}))
    assert PersonalMetric.load(tmp_path, BASE, DIMENSION) is None
    assert "Learn it again with `hanse-client personalize`" in caplog.text


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
@settings(deadline=None)
def test_a_photo_is_not_its_own_evidence(count: int, photos: int, seed: int) -> None:
    rows, index = products(count, photos, seed=seed)
    found = finds_its_product(rows, index, np.arange(len(rows)))
    for row in range(len(rows)):
        others = np.delete(np.arange(len(rows)), row)
        means = unit(
            np.stack([rows[others][index[others] == product].sum(axis=0) for product in range(count)])
        )
        assert found[row] == (int((means @ rows[row]).argmax()) == index[row])


@pytest.fixture
def none_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no two pictures be copies: these small ones all but are."""
    monkeypatch.setattr(metric_judging, "SAME", 2.0)


def asked_in(learned: LearnedMetric) -> Judgement:
    assert learned.metric is not None
    return learned.metric.record.asked


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
        marked = picture(1, 7001)
        marked.putpixel((0, 0), (0, 0, 0))
        gallery.put(Product(sku="G-single"), [Gallery.prepare(marked)])
        corrections.add(Gallery.prepare(picture(1, 7001)), sku="G-single")
        corrections.add(Gallery.prepare(picture(1, 7002)), sku="nothing else of it")
        learned = learn_metric(Shop(config), league(), gallery, corrections)
        # Of a product that the gallery knows by another photo; the catalog's and unknown ones cannot be searched for.
        assert asked_in(learned).photos == 1
        finds = asked_in(learned).shared_right
        added = Gallery.prepare(picture(1, 7003))
        gallery.put(Product(sku="G-added"), [added])
        corrections.add(added, sku="G-added")
        assert asked_in(learn_metric(Shop(config), league(), gallery, corrections)).photos == 1
        # All of the gallery is searched: one product more, of one photo, may be taken for it.
        gallery.put(Product(sku="H"), [Gallery.prepare(picture(1, 7001))])
        disturbed = learn_metric(Shop(config), league(), gallery, corrections)
        assert (finds, asked_in(disturbed).shared_right) == (1, 0)
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
    assert "Search: of 36 photos of 12 products" in (said := personalize())
    assert "asked with, as you corrected them" not in said
    with Corrections(config.corrections_path) as corrections:
        for number in range(3):
            corrections.add(Gallery.prepare(picture(number % 4, 8000 + number)), sku=f"G-{number}")
    assert json.loads(personalize("--json"))["metric"]["asked"]["photos"] == 3
    assert "Of 3 photos that search was asked with, as you corrected them" in personalize()
    assert PersonalMetric.read(config.personal_path).record.products == 12
