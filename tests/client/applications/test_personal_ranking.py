"""Recent views: what is remembered, how it fades, and that it orders real products by a shopper's interests."""

import json
from datetime import UTC, datetime, timedelta, timezone

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hanse_client.applications.personal_ranking import MAX_VIEWS, RecentViews
from hanse_client.applications.similar import mean_vectors
from hanse_client.gallery.product import Filter
from hanse_client.recognition.service import Recognition
from hanse_common.errors import GalleryError

NOW = datetime(2026, 6, 1, tzinfo=UTC)


def of_kind(recognition: Recognition, kind: str) -> list[str]:
    return [product.sku for product in recognition.gallery.products(Filter(category=kind))]


def test_suggestions_are_of_the_kinds_that_were_seen_and_not_what_was(recognition: Recognition) -> None:
    """Two interests at once: both come, though trousers look more alike than boots do."""
    boots, trousers = of_kind(recognition, "Ankle boot"), of_kind(recognition, "Trouser")
    assert len(boots) >= 4 and len(trousers) >= 4
    views = RecentViews()
    for sku in (boots[0], trousers[0]):
        views.add(sku, NOW)
    found = views.suggest(recognition, k=6, now=NOW)
    kinds = [match.product.category for match in found]
    assert {boots[0], trousers[0]}.isdisjoint(match.product.sku for match in found) and len(found) == 6
    assert (
        kinds.count("Trouser") >= 2
        and sum(kind in ("Ankle boot", "Sneaker", "Sandal") for kind in kinds) >= 2
    )
    assert not views.suggest(recognition, k=6, now=NOW, where=Filter(category="none such"))


def test_interest_is_the_fusion_of_the_orders(recognition: Recognition) -> None:
    """Against the formula written out, for one product after the other."""
    views = RecentViews(half_life=timedelta(days=2))
    ages = {"P-01": 0, "P-05": 1, "P-11": 6}
    for sku, days in ages.items():
        views.add(sku, NOW - timedelta(days=days))
    embedding = recognition.status().embedding
    matches = list(recognition.similar("P-40", k=30).matches)
    skus = [match.product.sku for match in matches]
    mean = {one: mean_vectors(recognition.gallery, [one], embedding)[0] for one in (*skus, *ages)}
    orders = {seen: sorted(skus, key=lambda one: -float(mean[one] @ mean[seen])) for seen in ages}
    interest = {
        sku: sum(0.5 ** (days / 2) / (61 + orders[seen].index(sku)) for seen, days in ages.items())
        for sku in skus
    }
    ordered = [match.product.sku for match in views.rank(recognition, matches, NOW)]
    assert sorted(ordered) == sorted(skus)
    assert np.all(np.diff([interest[sku] for sku in ordered]) <= 1e-12)


def test_what_was_seen_long_ago_counts_less(recognition: Recognition) -> None:
    boots, trousers = of_kind(recognition, "Ankle boot"), of_kind(recognition, "Trouser")
    matches = list(recognition.similar(boots[1], k=59).matches)
    for late, early, kind in ((boots[0], trousers[0], "Ankle boot"), (trousers[0], boots[0], "Trouser")):
        views = RecentViews(half_life=timedelta(days=3))
        views.add(early, NOW - timedelta(days=30))
        views.add(late, NOW)
        others = [
            match for match in views.rank(recognition, matches, NOW) if match.product.sku not in (late, early)
        ]
        assert others[0].product.category == kind


def test_without_views_or_with_views_of_removed_products_the_order_stays(recognition: Recognition) -> None:
    matches = list(recognition.similar("P-10", k=9).matches)
    views = RecentViews()
    assert views.rank(recognition, matches, NOW) == matches and views.rank(recognition, [], NOW) == []
    views.add("removed", NOW)
    assert views.rank(recognition, matches, NOW) == matches and views.suggest(recognition, now=NOW) == []
    views.add("P-10", NOW)
    assert len(views.suggest(recognition, k=3, now=NOW)) == 3


@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(0, 1000)), max_size=30), st.integers(1, 6))
def test_the_latest_views_are_remembered_and_no_more(seen: list[tuple[str, int]], limit: int) -> None:
    seen = sorted(seen, key=lambda one: one[1])
    views = RecentViews(limit=limit)
    for sku, minute in seen:
        views.add(sku, NOW + timedelta(minutes=minute))
    latest = dict(seen)
    assert len(views.skus) == min(limit, len(latest))
    forgotten = latest.keys() - set(views.skus)
    assert all(latest[one] <= latest[kept] for one in forgotten for kept in views.skus)
    assert RecentViews.from_json(views.to_json(), limit).skus == views.skus
    views.forget()
    assert views.skus == () and views.to_json() == "{}"


def test_only_skus_and_times_are_kept_and_written() -> None:
    views = RecentViews()
    views.add("A", datetime(2026, 6, 1, 2, tzinfo=timezone(timedelta(hours=2))))
    views.add("A", NOW - timedelta(days=1))  # an earlier view that is told of later
    assert json.loads(views.to_json()) == {"A": "2026-06-01T00:00:00Z"}
    assert set(vars(views)) == {"_limit", "_half_life", "_seen"}


def test_a_product_is_remembered_once_however_its_sku_is_spelt() -> None:
    views = RecentViews()
    views.add("Cafe\u0301", NOW)
    views.add("Caf\u00e9", NOW)
    assert views.skus == ("Caf\u00e9",)


def test_bad_input_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match="without a zone"):
        RecentViews().add("A", datetime(2026, 6, 1))
    for limit, half_life in ((0, 1), (MAX_VIEWS + 1, 1), (5, 0)):
        with pytest.raises(ValueError, match=r"limit|half_life"):
            RecentViews(limit, timedelta(days=half_life))
    for text in (
        "",
        "[]",
        '{"A": 3}',
        '{"A": "2026-06-01T00:00:00"}',
        '{"": "2026-06-01T00:00:00Z"}',
        "x" * 2_000_000,
    ):
        with pytest.raises(GalleryError, match="Recent views"):
            RecentViews.from_json(text)
