"""Similar products: the choice against a literal reading of the paper's formula, and on a real gallery."""

from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from sklearn.metrics.pairwise import cosine_similarity

from hanse_client.applications.similar import mean_vectors, most_relevant, price_band, similar_products
from hanse_client.gallery.gallery import Match
from hanse_client.gallery.product import Filter, Product
from hanse_client.recognition.service import Recognition
from hanse_common.errors import GalleryError


def by_the_formula(
    relevance: NDArray[np.float64], vectors: NDArray[np.float64], k: int, weight: float
) -> list[int]:
    """Arg max over what is left of λ·Sim1 − (1 − λ)·max Sim2, as Carbonell and Goldstein write it."""
    between = cosine_similarity(vectors)
    chosen: list[int] = []
    while len(chosen) < min(k, len(relevance)):
        left = [index for index in range(len(relevance)) if index not in chosen]
        marginal = [
            weight * relevance[i] - (1 - weight) * max((between[i, j] for j in chosen), default=0.0)
            for i in left
        ]
        chosen.append(left[int(np.argmax(marginal))])
    return chosen


@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 12),
    st.integers(1, 15),
    st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]),
)
def test_the_choice_is_that_of_the_formula(seed: int, count: int, k: int, diversity: float) -> None:
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(count, 5))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    relevance = rng.uniform(-1, 1, count)
    assert most_relevant(relevance, vectors, k, diversity) == by_the_formula(
        relevance, vectors, k, 1 - diversity
    )


def test_nothing_is_chosen_from_nothing_and_twice_nothing() -> None:
    assert most_relevant(np.empty(0), np.empty((0, 3)), 4, 0.3) == []
    twice = np.array([[1.0, 0.0], [1.0, 0.0]])
    assert most_relevant(np.array([0.9, 0.9]), twice, 5, 0.5) == [0, 1]
    with pytest.raises(ValueError, match=r"diversity: found 1\.5"):
        most_relevant(np.ones(2), twice, 2, 1.5)


def spread(recognition: Recognition, matches: list[Match]) -> float:
    """The mean similarity between two of the products."""
    embedding = recognition.status().embedding
    means = mean_vectors(recognition.gallery, [match.product.sku for match in matches], embedding)
    among = cosine_similarity(means)
    return float(among[np.triu_indices(len(among), 1)].mean())


def test_without_diversity_it_is_the_search_and_with_it_the_products_differ(recognition: Recognition) -> None:
    skus = [f"P-{number:02}" for number in range(0, 60, 6)]
    nearest = [similar_products(recognition, sku, k=6, diversity=0).matches for sku in skus]
    assert nearest[0] == recognition.similar(skus[0], k=6).matches
    mixed = [similar_products(recognition, sku, k=6, diversity=0.5).matches for sku in skus]
    for sku, found in zip(skus, mixed, strict=True):
        assert len({match.product.sku for match in found} - {sku}) == 6
    assert [found[0] for found in mixed] == [found[0] for found in nearest]
    before, after = (np.mean([spread(recognition, found) for found in each]) for each in (nearest, mixed))
    assert after < before - 0.05


def test_a_product_that_shows_the_very_picture_comes_first_however_its_other_photos_look(
    recognition: Recognition, pictures: list[tuple[Image.Image, str]]
) -> None:
    gallery = recognition.gallery
    looked_at = pictures[70][0]
    others = [Image.blend(looked_at, pictures[71][0], 0.75)]
    try:
        recognition.put(Product(sku="alone"), [looked_at])
        recognition.put(Product(sku="among others"), [looked_at, *others])
        found = similar_products(recognition, "alone", k=6, diversity=0).matches
        assert found[0].product.sku == "among others" and found[0].similarity < found[1].similarity
        scores = [match.score for match in found]
        assert scores == sorted(scores, reverse=True)
    finally:
        gallery.remove("alone")
        gallery.remove("among others")


def test_a_band_keeps_to_prices_and_category(recognition: Recognition) -> None:
    looked_at = recognition.gallery.get("P-20")
    assert looked_at is not None and looked_at.price == 30
    band = price_band(looked_at, share=0.2, same_category=False)
    found = similar_products(recognition, "P-20", k=20, where=band).matches
    prices = sorted(match.product.price or Decimal(0) for match in found)
    assert prices == [price for price in map(Decimal, range(24, 37)) if price != 30]
    of_a_kind = similar_products(recognition, "P-20", k=20, where=price_band(looked_at, share=1)).matches
    assert {match.product.category for match in of_a_kind} == {looked_at.category}


def test_a_band_is_rounded_outwards_and_needs_a_price() -> None:
    band = price_band(Product(sku="a", price=Decimal("9.99")), share=0.333)
    assert band == Filter(price_min=Decimal("6.6633"), price_max=Decimal("13.3167"))
    assert band.matches(Product(sku="b", price=Decimal("6.6634")))
    with pytest.raises(GalleryError, match="a: found no price"):
        price_band(Product(sku="a"))
    with pytest.raises(ValueError, match="share"):
        price_band(Product(sku="a", price=Decimal(1)), share=1.2)


def test_an_unknown_product_is_refused(recognition: Recognition) -> None:
    with pytest.raises(GalleryError, match="no-such"):
        similar_products(recognition, "no-such")
    with pytest.raises(ValueError, match="diversity: found 1"):
        similar_products(recognition, "P-20", diversity=1.5)
