"""Open set: the threshold keeps its promises, and figures agree with scikit-learn's."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from hanse_client.gallery import calibration
from hanse_client.gallery.product import Product
from hanse_client.gallery.rejection import DEFAULT_THRESHOLD, Rejection, Targets, auroc, calibrate

FIFTH = Targets(false_reject=0.2)


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
        rejection = calibrate(np.ones(50), scores[:200], Targets(false_accept=false_accept))
        shares.append(np.mean([rejection.known(one) for one in scores[200:]]))
    # E = ⌊α(n + 1)⌋/(n + 1), here just under α; four standard errors of the mean either way.
    error = 4 * np.std(shares) / np.sqrt(len(shares))
    promised = np.floor(false_accept * 201 + 1e-9) / 201
    assert abs(np.mean(shares) - promised) <= error
    assert promised <= false_accept


@pytest.mark.parametrize("false_reject", [0.05, 0.1, 0.3])
@pytest.mark.parametrize("digits", [1, 8])
def test_new_genuine_photos_are_turned_away_no_more_often_than_promised_though_the_two_overlap(
    false_reject: float, digits: int
) -> None:
    """With ties, too: of photos that are all alike, none is turned away."""
    chance = np.random.default_rng(1)
    turned_away, let_in, told = [], [], []
    for _ in range(400):
        genuine = np.round(np.tanh(chance.normal(0.9, 0.3, 160)), digits)
        impostor = np.round(np.tanh(chance.normal(0.8, 0.3, 320)), digits)
        rejection = calibrate(genuine[:80], impostor[:160], Targets(0.05, false_reject))
        turned_away.append(np.mean([not rejection.known(one) for one in genuine[80:]]))
        let_in.append(np.mean([rejection.known(one) for one in impostor[160:]]))
        told.append(rejection.false_accept)
    error = 4 * np.std(turned_away) / np.sqrt(len(turned_away))
    promised = np.floor(false_reject * 81 + 1e-9) / 81
    assert np.mean(turned_away) <= promised + error
    if digits == 8:
        assert np.mean(turned_away) >= promised - error
    assert np.mean(let_in) > 0.3
    assert np.mean(told) == pytest.approx(np.mean(let_in), abs=0.02)


def test_where_the_two_are_apart_the_impostors_set_the_threshold() -> None:
    genuine, impostor = np.linspace(0.7, 1, 50), np.linspace(0, 0.6, 99)
    rejection = calibrate(genuine, impostor)
    assert rejection.threshold == np.sort(impostor)[94]
    assert (rejection.false_accept, rejection.false_reject) == (4 / 99, 0.0)
    overlapping = calibrate(np.linspace(0.3, 0.9, 49), impostor, FIFTH)
    assert overlapping.threshold == pytest.approx(np.linspace(0.3, 0.9, 49)[9])
    assert overlapping.false_reject == 9 / 49 <= overlapping.targets.false_reject
    assert overlapping.false_accept == np.mean(impostor > overlapping.threshold) > 0.2


def test_the_default_stands_in_for_the_quantile_of_which_there_are_too_few_photos() -> None:
    few = calibrate(np.ones(5), np.linspace(0, 0.4, 18), FIFTH)
    assert (few.threshold, few.false_accept, few.false_reject) == (DEFAULT_THRESHOLD, 0.0, 0.0)
    assert (few.genuine, few.impostor, few.calibrated) == (5, 18, False)
    strict = calibrate(np.ones(99), np.linspace(0, 0.9, 60), Targets(false_accept=0.002))
    assert (strict.threshold, strict.false_accept, strict.calibrated) == (0.9, 0.0, False)
    enough = calibrate(np.ones(5), np.zeros(19), FIFTH)
    assert enough.calibrated and enough.threshold == 0.0
    assert calibrate(np.full(4, 0.3), np.ones(18), FIFTH).threshold == pytest.approx(0.3)
    assert calibrate(np.empty(0), np.full(3, 0.2)).threshold == DEFAULT_THRESHOLD
    assert calibrate(np.empty(0), np.empty(0)) == Rejection()


def test_impostors_stand_in_for_genuine_photos_where_there_are_none() -> None:
    """A photo is at least as similar to the best product as to the best other one: no more are turned away."""
    chance = np.random.default_rng(3)
    turned_away = []
    for _ in range(300):
        other = np.tanh(chance.normal(0.6, 0.3, 200))
        best = np.maximum(other, np.tanh(chance.normal(0.6, 0.3, 200)))
        rejection = calibrate(best[:3], other[:100], FIFTH)
        turned_away.append(np.mean([not rejection.known(one) for one in best[100:]]))
        assert rejection.false_accept == pytest.approx(0.81, abs=0.011)
    assert 0 < np.mean(turned_away) <= 0.2
    few, enough = calibrate(best[:3], other[:100], FIFTH), calibrate(best[:4], other[:100], FIFTH)
    assert few.threshold != enough.threshold


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0, float("nan")])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="false accepts"):
        Targets(false_accept=share)
    with pytest.raises(ValueError, match="false rejects"):
        Targets(false_reject=share)


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
    assert gallery.open_set.rejection(embedding) == Rejection()
    found = gallery.open_set.calibrate(embedding, unit(200, seed=3))
    assert (found.genuine, found.impostor) == (120, 120 + 200)
    assert found.false_reject < 0.1 and found.false_accept <= 0.05
    strangers = gallery.search(embedding, unit(500, seed=4), 1)
    assert np.mean([found.known(matches[0].similarity) for matches in strangers]) < 0.1
    with type(gallery).open(folder) as again:
        assert again.open_set.rejection(embedding) == found
    gallery.forget(embedding)
    assert gallery.open_set.rejection(embedding).threshold == DEFAULT_THRESHOLD


def test_leaving_a_photo_out_leaves_it_out(gallery, jpeg, unit, embedding) -> None:
    """Products of one photo each have no genuine similarities: a photo is never compared with itself."""
    vectors = unit(30)
    for number in range(30):
        gallery.put(Product(sku=str(number)), [jpeg(number)], {embedding: vectors[number : number + 1]})
    found = gallery.open_set.calibrate(embedding, None, FIFTH)
    others = np.sort((vectors @ vectors.T - 3 * np.eye(30)).max(axis=1))
    assert (found.genuine, found.impostor, found.false_reject) == (0, 30, None)
    assert found.threshold == pytest.approx(others[5], abs=1e-6)
    assert found.false_accept == np.mean(others > others[5] - 1e-6)


def alike(gallery, jpeg, embedding, products: int = 40, views: int = 6):
    """Products that are hardly farther from each other than their photos are; returns as many other photos of each."""
    chance = np.random.default_rng(5)
    common = 2.4 * chance.standard_normal(16)
    others = []
    for product in range(products):
        vectors = common + chance.standard_normal(16) + 1.1 * chance.standard_normal((2 * views, 16))
        vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
        photos = [jpeg(product * views + view) for view in range(views)]
        gallery.put(Product(sku=f"{product:03}"), photos, {embedding: vectors[:views]})
        others.append(vectors[views:])
    return np.concatenate(others)


def test_products_that_look_alike_are_not_turned_away(gallery, jpeg, embedding) -> None:
    others = alike(gallery, jpeg, embedding)
    found = gallery.open_set.calibrate(embedding)
    similarities = np.array([match.similarity for [match] in gallery.search(embedding, others, 1)])
    turned_away = np.mean([not found.known(one) for one in similarities])
    assert 0.05 < turned_away < 0.3 and found.false_reject == pytest.approx(turned_away, abs=0.1)
    assert found.false_accept > 0.05
    strict = gallery.open_set.calibrate(embedding, None, Targets(false_reject=0.99))
    assert strict.false_accept <= 0.05 and strict.false_reject > 0.4
    assert gallery.open_set.rejection(embedding) == strict
    lenient = gallery.open_set.calibrate(embedding, None, Targets(false_reject=0.01))
    assert lenient.threshold < found.threshold < strict.threshold and lenient.false_reject <= 0.01


def test_a_photo_of_the_gallery_shows_a_product_whatever_the_threshold(
    gallery, jpeg, unit, embedding
) -> None:
    """Each product has two photos that are nothing like each other."""
    vectors = unit(60)
    for number in range(30):
        pair = slice(2 * number, 2 * number + 2)
        gallery.put(
            Product(sku=f"{number}"), [jpeg(2 * number), jpeg(2 * number + 1)], {embedding: vectors[pair]}
        )
    with gallery._store.write() as db:
        calibration.store(db, embedding, Rejection(threshold=0.95), calibration.extent(db, embedding))
    best = [match.similarity for [match] in gallery.search(embedding, vectors, 1)]
    assert max(best) < 0.95
    copies = vectors + 0.01 * unit(60, seed=1)
    copies = (copies / np.linalg.norm(copies, axis=1, keepdims=True)).astype(np.float32)
    assert all(gallery.open_set.shows(embedding, one) for one in (*vectors, *copies))
    assert not any(gallery.open_set.shows(embedding, one) for one in unit(60, seed=2))


def test_a_match_tells_how_near_its_nearest_photo_is(gallery, jpeg, unit, embedding) -> None:
    vectors = unit(6)
    for number in range(2):
        part = slice(3 * number, 3 * number + 3)
        photos = [jpeg(one) for one in range(3 * number, 3 * number + 3)]
        gallery.put(Product(sku=f"{number}"), photos, {embedding: vectors[part]})
    gallery.put(Product(sku="bare", title="red"))
    (query,) = unit(1, seed=1)
    [matches] = gallery.search(embedding, query[np.newaxis], 3, text="red")
    found = {match.product.sku: match for match in matches}
    for number in range(2):
        similarities = vectors[3 * number : 3 * number + 3] @ query
        match = found[f"{number}"]
        assert match.nearest == pytest.approx(similarities.max(), abs=1e-6)
        assert match.photo == gallery.photos_of(match.product.sku)[similarities.argmax()]
    assert (found["bare"].nearest, found["bare"].photo) == (0.0, b"")


def test_an_empty_gallery_shows_nothing(gallery, unit, embedding) -> None:
    assert not gallery.open_set.shows(embedding, unit(1)[0])


def test_one_picture_twice_at_a_product_tells_nothing_of_other_photos_of_it(
    gallery, jpeg, unit, embedding
) -> None:
    vectors = unit(30)
    for number in range(30):
        photos = [jpeg(number), jpeg(100 + number)]
        gallery.put(Product(sku=str(number)), photos, {embedding: vectors[[number, number]]})
    assert gallery.open_set.calibrate(embedding).genuine == 0


def test_a_threshold_is_stale_when_a_tenth_of_its_photos_came_or_went_or_other_shares_are_wanted(
    gallery, jpeg, unit, embedding
) -> None:
    assert not gallery.open_set.is_stale(embedding)

    def put(numbers) -> None:
        for number in numbers:
            gallery.put(Product(sku=f"{number}"), [jpeg(number)], {embedding: unit(1, seed=number)})

    put(range(40))
    assert gallery.open_set.is_stale(embedding)
    gallery.open_set.calibrate(embedding)
    more = Targets(false_reject=0.3)
    assert not gallery.open_set.is_stale(embedding) and gallery.open_set.is_stale(embedding, more)
    gallery.open_set.calibrate(embedding, None, more)
    assert gallery.open_set.is_stale(embedding) and not gallery.open_set.is_stale(embedding, more)
    gallery.open_set.calibrate(embedding)
    put(range(40, 44))
    assert not gallery.open_set.is_stale(embedding)
    put([44])
    assert gallery.open_set.is_stale(embedding)
    gallery.open_set.calibrate(embedding)
    for number in (0, 1):
        gallery.remove(str(number))
    put([45, 46])
    assert not gallery.open_set.is_stale(embedding)
    gallery.remove("2")  # as many as before, and five others
    assert gallery.open_set.is_stale(embedding)
    gallery.open_set.calibrate(embedding)
    for number in range(3, 47):
        gallery.remove(str(number))
    assert gallery.open_set.is_stale(embedding) and gallery.open_set.calibrate(embedding) == Rejection()
    assert not gallery.open_set.is_stale(embedding)


def test_products_under_two_skus_do_not_make_the_threshold_strict(
    gallery, jpeg, unit, embedding, caplog
) -> None:
    """With as many twins as there are products, the threshold is that of the products without."""
    vectors = unit(60)
    for number in range(60):
        gallery.put(Product(sku=f"{number:02}"), [jpeg(number)], {embedding: vectors[number : number + 1]})
    alone = gallery.open_set.calibrate(embedding)
    assert "look the same" not in caplog.text
    copies = vectors + 0.004 * unit(60, seed=1)
    copies = (copies / np.linalg.norm(copies, axis=1, keepdims=True)).astype(np.float32)
    for number in range(60):
        photo = {embedding: copies[number : number + 1]}
        gallery.put(Product(sku=f"{number:02} again"), [jpeg(100 + number)], photo)
    found = gallery.open_set.calibrate(embedding)
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
    assert gallery.open_set.calibrate(embedding).impostor == 30
    assert "2 products look the same" in caplog.text


def test_products_that_are_all_one_leave_nothing_to_calibrate_on(gallery, jpeg, unit, embedding) -> None:
    for number in range(30):
        gallery.put(Product(sku=f"{number:02}"), [jpeg(number)], {embedding: unit(1)})
    assert gallery.open_set.calibrate(embedding) == Rejection()


def test_an_empty_gallery_keeps_the_default(gallery, embedding) -> None:
    assert gallery.open_set.calibrate(embedding) == Rejection()
