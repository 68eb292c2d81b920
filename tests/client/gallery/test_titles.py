"""Search by words: in languages with and without spaces, with slips, kept up with what changes."""

import sqlite3
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from hanse_client.gallery import titles
from hanse_client.gallery.gallery import Gallery
from hanse_client.gallery.product import Filter, Product
from hanse_client.gallery.titles import Titles, terms

TITLES = {
    "w1": "Wanderschuh rot, wasserdicht",
    "w2": "Wanderrucksack 40 l",
    "h1": "Handschuhe aus Wolle, grün",
    "z1": "红色跑步鞋",
    "z2": "蓝色双肩包",
    "i1": "सूती कमीज नीली",
    "p1": "کفش پیاده\u200cروی",
    "e1": "Red running shoe",
    "e2": "Blue backpack",
}


@pytest.fixture
def named(gallery: Gallery) -> Gallery:
    for sku, title in TITLES.items():
        gallery.put(Product(sku=sku, title=title, category="zh" if sku[0] == "z" else "other"))
    return gallery


@pytest.mark.parametrize(
    ("text", "best"),
    [
        ("wanderschuh", "w1"),
        ("Schuh wasserdicht", "w1"),
        ("WANDERRUKSACK", "w2"),
        ("grun", "h1"),
        ("跑步鞋", "z1"),
        ("包", "z2"),
        ("runing shoe", "e1"),
        ("कमीज", "i1"),
        ("پیادهروی", "p1"),
        ("e2", "e2"),
    ],
)
def test_words_and_their_parts_find_the_product(named: Gallery, text: str, best: str) -> None:
    matches = named.search_text(text, 3)
    assert matches[0].product.sku == best
    assert matches[0].similarity == 0.0
    assert [match.score for match in matches] == sorted((match.score for match in matches), reverse=True)


def test_a_word_that_nothing_has_finds_nothing(named: Gallery) -> None:
    assert named.search_text("xylophon", 5) == []
    assert named.search_text("", 5) == []
    assert named.search_text("!?", 5) == []


def test_what_is_added_changed_and_removed_is_followed(named: Gallery) -> None:
    assert named.search_text("zanzibar", 5) == []
    named.put(Product(sku="n1", title="Zanzibar lamp"))
    assert [match.product.sku for match in named.search_text("zanzibar", 5)] == ["n1"]
    named.put(Product(sku="n1", title="Lamp"))
    assert named.search_text("zanzibar", 5) == []
    named.put(Product(sku="e1", title="Zanzibar shoe"))
    named.remove("e1")
    assert named.search_text("zanzibar", 5) == []
    assert "e1" not in {match.product.sku for match in named.search_text("red running shoe", 5)}


def test_a_filter_holds_for_words_too(named: Gallery) -> None:
    found = named.search_text("wanderschuh 红色 shoe backpack", 9, Filter(category="zh"))
    assert [match.product.sku for match in found] == ["z1", "z2"]  # both are of a colour, 色


def test_words_decide_between_products_that_look_the_same(gallery, jpeg, unit, embedding) -> None:
    query, other = unit(2)
    twin = query + 0.05 * other
    twin /= (twin**2).sum() ** 0.5
    gallery.put(Product(sku="plain", title="Blue cup"), [jpeg(1)], {embedding: query[None]})
    gallery.put(Product(sku="wanted", title="Red cup"), [jpeg(2)], {embedding: twin[None]})
    gallery.put(Product(sku="unseen", title="Red mug"))
    ((by_picture, _),) = gallery.search(embedding, query[None], 2)
    ((by_both, *rest),) = gallery.search(embedding, query[None], 3, text="red")
    assert by_picture.product.sku == "plain"
    assert by_both.product.sku == "wanted"
    assert by_both.score == pytest.approx(
        0.7 * by_both.similarity + 0.3 * gallery.search_text("red", 1)[0].score, abs=0.1
    )
    assert {match.product.sku for match in rest} == {"plain", "unseen"}
    assert {match.product.sku: match.photo for match in rest}["unseen"] == b""


def test_terms_are_bounded_by_the_text() -> None:
    assert len(list(terms("鞋" * 300))) == 1 + 300 + 299
    assert list(terms("Ü1")) == ["u1", " u1", "u1 "]


def test_marks_belong_to_their_word_and_joiners_part_none() -> None:
    assert [term for term in terms("कमीज") if term == "कमीज"] == ["कमीज"]
    assert list(terms("می\u200cروم")) == list(terms("میروم"))
    assert list(terms("snake_case")) == [*terms("snake"), *terms("case")]


def test_products_are_taken_in_some_at_a_time(named: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(titles, "CHUNK", 2)
    for sku, title in TITLES.items():
        assert named.search_text(title, 1)[0].product.sku == sku
    for number in range(5):
        named.put(Product(sku=f"k{number}", title="Kiosk"))
    named.remove("k3")
    assert [match.product.sku for match in named.search_text("kiosk", 9)] == ["k0", "k1", "k2", "k4"]


def test_words_are_read_ahead_until_that_is_enough(named: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(titles, "CHUNK", 2)
    read: list[int] = []
    follow = Titles.follow

    def counted(self: Titles, db: sqlite3.Connection) -> bool:
        read.append(1)
        return follow(self, db)

    monkeypatch.setattr(Titles, "follow", counted)
    named.follow_words(lambda: len(read) == 1)
    assert len(read) == 1, "who closes the service need not wait for all of them"
    for sku, title in TITLES.items():
        assert named.search_text(title, 1)[0].product.sku == sku
    read.clear()
    named.follow_words()
    assert len(read) == 1, "what was read is read once"


def test_a_product_that_went_while_its_words_were_compared_is_not_found(
    named: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = Titles.scores

    def then_removed(self: Titles, text: str) -> dict[int, float]:
        scores = compared(self, text)
        named.remove("w1")
        return scores

    monkeypatch.setattr(Titles, "scores", then_removed)
    found = [match.product.sku for match in named.search_text("wanderschuh wanderrucksack", 2)]
    assert found[0] == "w2" and "w1" not in found


def test_a_search_by_photo_does_not_wait_for_words(gallery, jpeg, unit, embedding, monkeypatch) -> None:
    (query,) = unit(1)
    gallery.put(Product(sku="one", title="Red cup"), [jpeg(1)], {embedding: query[None]})
    reading, go_on = threading.Event(), threading.Event()

    def slowly(text: str) -> Iterator[str]:
        reading.set()
        assert go_on.wait(30)
        return terms(text)

    monkeypatch.setattr(titles, "terms", slowly)
    with ThreadPoolExecutor(2) as threads:
        by_words = threads.submit(gallery.search_text, "cup", 1)
        try:
            assert reading.wait(30)
            ((match,),) = threads.submit(gallery.search, embedding, query[None], 1).result(timeout=30)
            gallery.put(Product(sku="two", title="Blue cup"))
            assert not by_words.done()
        finally:
            go_on.set()
        assert match.product.sku == "one"
        assert by_words.result(timeout=30)[0].product.sku == "one"
