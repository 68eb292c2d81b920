"""Open set: the threshold keeps its promise, and figures agree with scikit-learn's."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from hanse_client.gallery import calibration
from hanse_client.gallery.product import Product
from hanse_client.gallery.rejection import DEFAULT_THRESHOLD, FALSE_ACCEPT, Rejection, auroc, calibrate


def test_the_area_under_the_curve_is_that_of_scikit_learn_with_ties_too() -> None:
    chance = np.random.default_rng(0)
    for digits in (1, 2, 8):
        genuine = np.round(chance.normal(0.6, 0.2, 83), digits)
        impostor = np.round(chance.normal(0.4, 0.2, 57), digits)
        truth = roc_auc_score([1] * 83 + [0] * 57, np.concatenate([genuine, impostor]))
        assert auroc(genuine, impostor) == pytest.approx(truth, abs=1e-12)
    with pytest.raises(ValueError, match="found 0 and 57"):
        auroc(np.empty(0), impostor)


@pytest.mark.parametrize("false_accept", [0.01, 0.05, 0.2])
def test_new_impostors_are_accepted_as_often_as_promised(false_accept: float) -> None:
    chance = np.random.default_rng(1)
    shares = []
    for _ in range(400):
        scores = np.tanh(chance.normal(0.3, 0.3, 400))
        rejection = calibrate(np.empty(0), scores[:200], false_accept)
        shares.append(np.mean([rejection.known(one) for one in scores[200:]]))
    # E = ⌊α(n + 1)⌋/(n + 1), here just under α; four standard errors of the mean either way.
    error = 4 * np.std(shares) / np.sqrt(len(shares))
    promised = np.floor(false_accept * 201 + 1e-9) / 201
    assert abs(np.mean(shares) - promised) <= error
    assert promised <= false_accept


def test_too_few_impostors_leave_the_default() -> None:
    assert calibrate(np.ones(5), np.zeros(18)) == Rejection()
    assert not Rejection().calibrated
    assert calibrate(np.ones(5), np.zeros(19)).calibrated


def test_a_constant_similarity_is_not_known() -> None:
    rejection = calibrate(np.full(10, 0.5), np.full(100, 0.5))
    assert not rejection.known(0.5)
    assert rejection.known(np.nextafter(0.5, 1))
    assert rejection.false_reject == 1.0


@pytest.mark.parametrize("false_accept", [0.0, 1.0, -1.0, float("nan")])
def test_a_share_that_is_none_is_refused(false_accept: float) -> None:
    with pytest.raises(ValueError, match="false accepts"):
        calibrate(np.zeros(3), np.zeros(3), false_accept)


def test_similarities_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="impostor"):
        calibrate(np.zeros(3), np.array([np.nan]))


def filled(gallery, jpeg, embedding, products: int = 40, views: int = 3):
    """Products that are far from each other, with photos that are near."""
    chance = np.random.default_rng(2)
    for product in range(products):
        centre = chance.standard_normal(16)
        vectors = centre + 0.4 * chance.standard_normal((views, 16))
        vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
        photos = [jpeg(product * views + view) for view in range(views)]
        gallery.put(Product(sku=f"{product:03}"), photos, {embedding: vectors})


def test_the_gallery_calibrates_on_its_own_photos_and_remembers(
    gallery, folder, jpeg, unit, embedding
) -> None:
    filled(gallery, jpeg, embedding)
    assert gallery.rejection(embedding) == Rejection()
    found = gallery.calibrate(embedding, unit(200, seed=3))
    assert (found.genuine, found.impostor) == (120, 120 + 200)
    assert found.false_reject < 0.1
    strangers = gallery.search(embedding, unit(500, seed=4), 1)
    assert np.mean([found.known(matches[0].similarity) for matches in strangers]) < 2 * FALSE_ACCEPT
    with type(gallery).open(folder) as again:
        assert again.rejection(embedding) == found
    gallery.forget(embedding)
    assert gallery.rejection(embedding).threshold == DEFAULT_THRESHOLD


def test_leaving_a_photo_out_leaves_it_out(gallery, jpeg, unit, embedding) -> None:
    """Products of one photo each have no genuine similarities: a photo is never compared with itself."""
    vectors = unit(30)
    for number in range(30):
        gallery.put(Product(sku=str(number)), [jpeg(number)], {embedding: vectors[number : number + 1]})
    found = gallery.calibrate(embedding)
    others = np.sort((vectors @ vectors.T - 3 * np.eye(30)).max(axis=1))
    assert (found.genuine, found.impostor, found.false_reject) == (0, 30, None)
    assert found.threshold == pytest.approx(others[int(np.ceil(31 * 0.95)) - 1], abs=1e-6)


def test_products_under_two_skus_do_not_make_the_threshold_strict(
    gallery, jpeg, unit, embedding, caplog
) -> None:
    """With as many twins as there are products, the threshold is that of the products without."""
    vectors = unit(60)
    for number in range(60):
        gallery.put(Product(sku=f"{number:02}"), [jpeg(number)], {embedding: vectors[number : number + 1]})
    alone = gallery.calibrate(embedding)
    assert "look the same" not in caplog.text
    copies = vectors + 0.004 * unit(60, seed=1)
    copies = (copies / np.linalg.norm(copies, axis=1, keepdims=True)).astype(np.float32)
    for number in range(60):
        photo = {embedding: copies[number : number + 1]}
        gallery.put(Product(sku=f"{number:02} again"), [jpeg(100 + number)], photo)
    found = gallery.calibrate(embedding)
    assert (alone.impostor, found.impostor) == (60, 120)
    assert found.threshold == pytest.approx(alone.threshold, abs=0.02)
    assert "120 products look the same as another under a SKU of its own" in caplog.text


def test_a_twin_is_told_by_one_picture_among_others_and_left_out_with_all_of_its_photos(
    gallery, jpeg, unit, embedding
) -> None:
    """The same picture at a product whose other photo shows something else, so that its mean is less alike."""
    vectors = unit(31)
    for number in range(30):
        gallery.put(Product(sku=f"{number:02}"), [jpeg(number)], {embedding: vectors[number : number + 1]})
    near = (vectors[0] + 0.6 * vectors[30]) / np.linalg.norm(vectors[0] + 0.6 * vectors[30])
    gallery.put(
        Product(sku="twin"),
        [jpeg(30), jpeg(31)],
        {embedding: np.stack([vectors[0], near]).astype(np.float32)},
    )
    with gallery._store.read() as db, gallery._follower(embedding).following(db) as index:
        (photo,) = db.execute("SELECT id FROM photo ORDER BY id LIMIT 1").fetchone()
        own = calibration.of_own(db, embedding, index, [photo])
    assert own.impostor == [pytest.approx((vectors[1:30] @ vectors[0]).max(), abs=1e-6)]
    assert (own.genuine, len(own.twins)) == ([], 2)


def test_one_photo_of_two_products_makes_them_twins(gallery, jpeg, unit, embedding, caplog) -> None:
    for number in range(30):
        gallery.put(Product(sku=f"{number:02}"), [jpeg(number)], {embedding: unit(1, seed=number)})
    gallery.put(Product(sku="again"), [jpeg(7)], {embedding: unit(1, seed=7)})
    assert gallery.calibrate(embedding).impostor == 30
    assert "2 products look the same" in caplog.text


def test_products_that_are_all_one_leave_nothing_to_calibrate_on(gallery, jpeg, unit, embedding) -> None:
    for number in range(30):
        gallery.put(Product(sku=f"{number:02}"), [jpeg(number)], {embedding: unit(1)})
    assert gallery.calibrate(embedding) == Rejection()


def test_an_empty_gallery_keeps_the_default(gallery, embedding) -> None:
    assert gallery.calibrate(embedding) == Rejection()
