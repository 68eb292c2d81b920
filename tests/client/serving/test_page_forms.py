"""A product's fields as somebody types them into the page."""

import html
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import pytest

from hanse_client.serving.page_forms import read_product

from .page_visitor import Shop, Visitor, a_shop, make_recognizer, product

ASKED = "Is the mark between thousands, or before the decimals?"


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    make_recognizer(tmp_path)
    with a_shop(tmp_path) as shop:
        yield shop


@pytest.fixture
def visit(shop: Shop) -> Visitor:
    visitor = Visitor(shop.app())
    assert visitor.get(shop.address()).status_code == 200
    return visitor


@pytest.mark.parametrize(
    ("typed", "price", "error"),
    [
        ("59,90", "59.90", None),
        (" 59.9 ", "59.9", None),
        ("1,299", None, "mark"),
        ("1.299", None, "mark"),
        ("1e3", None, "form"),
        ("1_000", None, "form"),
    ],
)
def test_a_price_is_read_or_asked_about(typed: str, price: str | None, error: str | None) -> None:
    read, errors = read_product({"sku": "A", "price": typed})
    assert errors.get("price") == error
    assert (read and read.price) == (price and Decimal(price))


def test_a_mark_that_may_divide_thousands_is_asked_about(shop: Shop, visit: Visitor) -> None:
    answer = visit.send("/product/new", [], "photos", sku="A", price="1,299")
    assert answer.status_code == 422 and ASKED in html.unescape(answer.text)
    assert 'value="1,299"' in answer.text and shop.recognition.gallery.count() == 0
    assert ASKED not in html.unescape(visit.send("/product/new", [], "photos", sku="A", price="x").text)
    assert visit.send("/product/new", [], "photos", sku="A", price="1,2990").status_code == 303
    made = shop.recognition.gallery.get("A")
    assert made and made.price == Decimal("1.299")


def test_a_form_that_is_sent_back_as_it_came_changes_nothing(shop: Shop, visit: Visitor) -> None:
    before = product(1, price=Decimal("1.299"))
    shop.recognition.put(before)
    assert 'value="1.2990"' in visit.get(f"/product/change?sku={before.sku}").text
    answer = visit.post(
        "/product/change",
        sku=before.sku,
        title=before.title,
        price="1.2990",
        currency="EUR",
        category=before.category or "",
        attributes="size: M",
    )
    assert answer.status_code == 303
    assert shop.recognition.gallery.get(before.sku) == before
