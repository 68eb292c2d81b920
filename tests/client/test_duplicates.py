"""Duplicates and look-alikes, on real photos: what is found, what is not, and against a search of every pair."""

import gzip
import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageEnhance
from scipy.stats import pearsonr
from sklearn.datasets import load_sample_images

from hanse_client.duplicates import (
    FLAT,
    MAX_DISTANCE,
    MIN_CORRELATION,
    HammingIndex,
    exact_copies,
    look_alikes,
    perceptual_hashes,
    thumbnail,
)


@pytest.fixture(scope="module")
def products(data_folder: Path) -> list[Image.Image]:
    """3000 product photos of Fashion-MNIST."""
    data = gzip.decompress((data_folder / "t10k-images-idx3-ubyte.gz").read_bytes())
    pixels = np.frombuffer(data, np.uint8, offset=16).reshape(-1, 28, 28)[:3000]
    return [Image.fromarray(each).convert("RGB") for each in pixels]


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    """100 colour photos: parts of two large ones, of 120 pixels and more."""
    rng = np.random.default_rng(1)
    large = [Image.fromarray(image) for image in load_sample_images().images]
    found = []
    for number in range(100):
        edge = int(rng.integers(120, 300))
        x, y = int(rng.integers(0, 640 - edge)), int(rng.integers(0, 427 - edge))
        found.append(large[number % 2].crop((x, y, x + edge, y + edge)))
    return found


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def thumbnails(*images: Image.Image) -> NDArray[np.uint8]:
    return np.stack([thumbnail(image) for image in images])


def share_found(photos: list[Image.Image], changed: list[Image.Image]) -> float:
    pairs = zip(photos, changed, strict=True)
    return float(np.mean([look_alikes(thumbnails(*pair)) == [(0, 1)] for pair in pairs]))


def test_exact_copies_are_grouped_in_order() -> None:
    assert exact_copies([b"a", b"b", b"a", b"c", b"b", b"a"]) == [(0, 2, 5), (1, 4)]
    assert exact_copies([b"a", b"b"]) == exact_copies([]) == []


def test_copies_that_were_saved_again_are_found(photos: list[Image.Image]) -> None:
    for changed in (
        [jpeg(each, 75) for each in photos],
        [each.resize((each.width // 2, each.height // 2)) for each in photos],
        [jpeg(each.resize((2 * each.width, 2 * each.height)), 60) for each in photos],
        [ImageEnhance.Contrast(each).enhance(1.15) for each in photos],
    ):
        assert share_found(photos, changed) >= 0.98
    assert share_found(photos, [jpeg(each, 30) for each in photos]) >= 0.95


def test_product_photos_saved_again_are_found(products: list[Image.Image]) -> None:
    some = products[:200]
    assert share_found(some, [jpeg(each, 75) for each in some]) >= 0.97
    assert share_found(some, [each.resize((112, 112), Image.Resampling.BICUBIC) for each in some]) >= 0.98


def test_other_photos_are_not(photos: list[Image.Image]) -> None:
    mirrored = [each.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for each in photos]
    assert share_found(photos, mirrored) <= 0.02
    recoloured = [Image.merge("RGB", each.split()[::-1]) for each in photos]
    assert share_found(photos, recoloured) <= 0.1


def test_different_products_are_hardly_ever_taken_for_one_another(products: list[Image.Image]) -> None:
    """4.5 million pairs of real products, as alike as trousers are; the hash alone would name hundreds of pairs."""
    small = thumbnails(*products)
    hashes = perceptual_hashes(small)
    near = sum(
        int((np.bitwise_count(hashes[i + 1 :] ^ each) <= MAX_DISTANCE).sum()) for i, each in enumerate(hashes)
    )
    groups = look_alikes(small)
    assert near > 300
    assert sum(len(group) - 1 for group in groups) <= 5


def test_groups_are_those_of_a_search_of_every_pair(products: list[Image.Image]) -> None:
    """Another implementation: scipy's correlation, hashes as texts, no index."""
    originals = products[:60]
    images = [
        *originals,
        *(jpeg(each, 60) for each in originals[:20]),
        *(jpeg(each, 85) for each in originals[:5]),
    ]
    small = thumbnails(*images)
    texts = [f"{int(each):064b}" for each in perceptual_hashes(small)]

    def alike(i: int, j: int) -> bool:
        bits = sum(a != b for a, b in zip(texts[i], texts[j], strict=True))
        same = pearsonr(small[i].ravel().astype(float), small[j].ravel().astype(float)).statistic
        return bits <= MAX_DISTANCE and same >= MIN_CORRELATION

    expected, used = [], set()
    for i in range(len(images)):
        if i in used:
            continue
        group = [i, *(j for j in range(i + 1, len(images)) if j not in used and alike(i, j))]
        if len(group) > 1:
            expected.append(tuple(group))
            used.update(group)
    assert look_alikes(small) == expected and len(expected) >= 15 and max(map(len, expected)) == 3


def test_the_hash_says_which_low_frequencies_are_above_their_median(photos: list[Image.Image]) -> None:
    """Another implementation: the cosines by hand, without those that are constant along a side."""
    small = thumbnail(photos[0])
    brightness = small.astype(float) @ [0.299, 0.587, 0.114]
    waves = np.cos(np.pi * np.outer(np.arange(1, 9), np.arange(32) + 0.5) / 32)
    low = (waves @ brightness @ waves.T).ravel()
    bits = "".join(str(int(value > np.median(low))) for value in low)
    assert f"{int(perceptual_hashes(small[None])[0]):064b}" == bits


def test_likeness_is_not_handed_on() -> None:
    """A step from one photo to the next may be small and the way from first to last long."""
    rng = np.random.default_rng(3)
    start, end = (rng.normal(size=(32, 32, 3)).cumsum(axis=0).cumsum(axis=1) for _ in range(2))

    def blend(share: float) -> NDArray[np.uint8]:
        mixed = (1 - share) * start / start.std() + share * end / end.std()
        return np.clip(128 + 30 * mixed, 0, 255).astype(np.uint8)

    chain = np.stack([blend(share) for share in np.linspace(0, 1, 40)])
    groups = look_alikes(chain)
    assert len(groups) > 1 and all(len(group) < 30 for group in groups)
    assert len({index for group in groups for index in group}) == sum(map(len, groups))
    for first, *others in groups:
        for other in others:
            r = pearsonr(chain[first].ravel().astype(float), chain[other].ravel().astype(float)).statistic
            assert r >= MIN_CORRELATION - 1e-4


def test_flat_photos_are_like_no_other() -> None:
    flat = [Image.new("RGB", (40, 40), colour) for colour in ("white", "white", "red", "black")]
    rng = np.random.default_rng(2)
    noise = np.clip(rng.normal(250, FLAT / 2, size=(32, 32, 1)), 0, 255).astype(np.uint8).repeat(3, axis=2)
    images = thumbnails(*flat)
    assert look_alikes(images) == []
    assert look_alikes(np.stack([noise, noise])) == []
    strong = np.clip(rng.normal(128, 10 * FLAT, size=(32, 32, 1)), 0, 255).astype(np.uint8).repeat(3, axis=2)
    assert look_alikes(np.stack([strong, strong])) == [(0, 1)]


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=40),
    st.lists(st.tuples(st.integers(0, 39), st.sets(st.integers(0, 63), max_size=9)), max_size=20),
)
def test_the_index_finds_all_hashes_within_the_distance(
    values: list[int], changes: list[tuple[int, set[int]]]
) -> None:
    for place, bits in changes:
        changed = values[place % len(values)]
        for bit in bits:
            changed ^= 1 << bit
        values.append(changed)
    index = HammingIndex(np.array(values, dtype=np.uint64))
    for i, value in enumerate(values):
        expected = [j for j, other in enumerate(values) if (value ^ other).bit_count() <= MAX_DISTANCE]
        assert index.within(i).tolist() == expected


def test_progress_ends_with_all() -> None:
    seen: list[tuple[int, int]] = []
    look_alikes(np.zeros((3, 32, 32, 3), np.uint8), lambda done, total: seen.append((done, total)))
    assert seen == [(0, 3), (3, 3)]
    assert look_alikes(np.zeros((0, 32, 32, 3), np.uint8)) == []


@pytest.mark.slow
def test_fifty_thousand_product_photos(data_folder: Path) -> None:
    data = gzip.decompress((data_folder / "train-images-idx3-ubyte.gz").read_bytes())
    pixels = np.frombuffer(data, np.uint8, offset=16).reshape(-1, 28, 28)[:50_000]
    groups = look_alikes(thumbnails(*(Image.fromarray(each).convert("RGB") for each in pixels)))
    assert 50 <= len(groups) <= 200 and max(map(len, groups)) <= 6
