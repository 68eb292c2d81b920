"""Photos on display: the best one, those that look the same, and those at the wrong product, on real photos."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter
from sklearn.datasets import load_sample_images
from sklearn.neighbors import NearestNeighbors

from hanse_client.applications.display import (
    best_photo,
    look_alike_photos,
    misplaced_photos,
    sharpness,
    twins,
)
from hanse_client.gallery.gallery import Gallery
from hanse_client.gallery.product import Product
from hanse_client.recognition.service import Recognition
from hanse_common.vision.photo import content_digest

Pictures = list[tuple[Image.Image, str]]
AnotherPhoto = Callable[[Image.Image, np.random.Generator], Image.Image]


@pytest.fixture
def shop(open_shop: Callable[[Path], Recognition], tmp_path: Path) -> Iterator[Recognition]:
    """An empty gallery."""
    with open_shop(tmp_path) as opened:
        yield opened


@pytest.fixture(scope="module")
def scenes() -> list[Image.Image]:
    """Eight parts of two large colour photos, 200 pixels wide."""
    large = [Image.fromarray(image) for image in load_sample_images().images]
    return [
        large[n % 2].crop((x, y, x + 200, y + 200))
        for n, (x, y) in enumerate(zip(range(0, 400, 50), range(0, 200, 25), strict=True))
    ]


def digest(image: Image.Image) -> bytes:
    return content_digest(Gallery.prepare(image))


def test_the_best_photo_is_the_typical_one_of_those_large_and_sharp(
    shop: Recognition, scenes: list[Image.Image]
) -> None:
    for scene, other in zip(scenes[:4], scenes[4:], strict=True):
        small = scene.resize((100, 100))
        blurred = scene.filter(ImageFilter.GaussianBlur(4))
        darker = ImageEnhance.Brightness(scene).enhance(0.8)
        sku = digest(scene).hex()[:8]
        shop.put(Product(sku=sku), [small, blurred, other, darker, scene])
        assert best_photo(shop, sku) in {digest(scene), digest(darker)}


def test_a_product_without_photos_has_no_best_one_and_one_photo_is_it(
    shop: Recognition, scenes: list[Image.Image]
) -> None:
    shop.put(Product(sku="bare"))
    shop.put(Product(sku="flat"), [Image.new("RGB", (90, 90))])
    assert best_photo(shop, "bare") is None and best_photo(shop, "no-such") is None
    assert best_photo(shop, "flat") == digest(Image.new("RGB", (90, 90)))


def test_sharpness_falls_with_blur_and_not_with_contrast(scenes: list[Image.Image]) -> None:
    for scene in scenes:
        blurred = [sharpness(scene.filter(ImageFilter.GaussianBlur(radius))) for radius in (0, 1, 2, 4)]
        assert blurred == sorted(blurred, reverse=True) and blurred[0] > 1.5 * blurred[2]
        assert sharpness(ImageEnhance.Contrast(scene).enhance(0.6)) == pytest.approx(
            sharpness(scene), rel=0.1
        )
    assert sharpness(Image.new("RGB", (90, 90), (9, 9, 9))) == 0


def test_look_alikes_are_found_within_a_product_and_across(
    shop: Recognition, scenes: list[Image.Image]
) -> None:
    assert look_alike_photos(shop.gallery) == []
    again = scenes[0].resize((180, 180))
    shop.put(Product(sku="a"), [scenes[0], scenes[1]])
    shop.put(Product(sku="b"), [scenes[2], again])
    shop.put(Product(sku="c"), [scenes[1]])
    found = look_alike_photos(shop.gallery)
    groups = [{(one.sku, one.photo) for one in group} for group in found]
    assert groups == [
        {("a", digest(scenes[0])), ("b", digest(again))},
        {("a", digest(scenes[1])), ("c", digest(scenes[1]))},
    ]
    assert twins(found) == [("a", "b"), ("a", "c")]
    shop.put(Product(sku="d"), [scenes[3], scenes[3].resize((180, 180))])
    assert len(look_alike_photos(shop.gallery)) == 3 and twins(look_alike_photos(shop.gallery)) == twins(
        found
    )


def test_photos_at_the_wrong_product_are_found(
    shop: Recognition, pictures: Pictures, another_photo: AnotherPhoto
) -> None:
    """40 products of four photos, five of them with a photo of another product among its own."""
    rng = np.random.default_rng(2)
    wrong: dict[str, bytes] = {}
    for number, (image, _) in enumerate(pictures[:40]):
        photos = [image, *(another_photo(image, rng) for _ in range(3))]
        if number % 8 == 0:
            photos[2] = another_photo(pictures[(number + 3) % 40][0], rng)
            wrong[f"P-{number:02}"] = digest(photos[2])
        shop.put(Product(sku=f"P-{number:02}"), photos)
    found = misplaced_photos(shop)
    assert {one.placed.sku: one.placed.photo for one in found[:5]} == wrong
    assert {one.placed.sku: one.instead for one in found[:5]} == {
        sku: f"P-{(int(sku[2:]) + 3) % 40:02}" for sku in wrong
    }
    assert len(found) <= 10
    clear = [one.other - one.own for one in found]
    assert clear == sorted(clear, reverse=True)


def test_misplaced_is_what_the_nearest_neighbours_say(recognition: Recognition) -> None:
    """Against scikit-learn's neighbours over all photos at once."""
    gallery, embedding = recognition.gallery, recognition.status().embedding
    skus = [product.sku for product in gallery.products()]
    vectors = np.concatenate([gallery.vectors_of(sku, embedding) for sku in skus])
    owners = np.repeat(skus, 3)
    distances, places = (
        NearestNeighbors(n_neighbors=len(vectors), metric="cosine").fit(vectors).kneighbors(vectors)
    )
    expected = {}
    for row, owner in enumerate(owners):
        near = 1 - distances[row][places[row] != row]
        of = owners[places[row][places[row] != row]]
        if near[of != owner].max() > near[of == owner].max() + 0.02:
            expected[gallery.photos_of(owner)[row % 3]] = of[of != owner][0]
    assert {one.placed.photo: one.instead for one in misplaced_photos(recognition)} == expected
