"""Products and filters: every field is bounded, and a filter says the same in Python and in SQL."""

from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from hanse_client.gallery import rows
from hanse_client.gallery.product import Filter, Product
from hanse_client.gallery.store import Store


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sku", ""),
        ("sku", "x" * 65),
        ("sku", " a"),
        ("sku", "a\n"),
        ("sku", "\ud800"),
        ("sku", "a\u200db"),
        ("sku", "a\u3164"),
        ("sku", "e\u0301" * 65),
        ("sku", "e" + "\u0301\u0323" * 100_000),
        ("sku", 7),
        ("title", "x" * 301),
        ("title", "\x1b[31mred"),
        ("title", "\u202etxt.exe"),
        ("title", "a\u200c"),
        ("price", Decimal("-0.01")),
        ("price", Decimal("NaN")),
        ("price", Decimal("Infinity")),
        ("price", Decimal("0.00001")),
        ("price", Decimal(10) ** 13),
        ("price", 1.5),
        ("currency", "eur"),
        ("currency", "EURO"),
        ("category", ""),
        ("category", "x" * 129),
        ("attributes", {str(number): "x" for number in range(33)}),
        ("attributes", {"x" * 65: "x"}),
        ("attributes", {"": "x"}),
        ("attributes", {"x": "x" * 257}),
        ("attributes", {"x": 1}),
        ("attributes", {"gr\u00f6\u00dfe": "1", "gro\u0308\u00dfe": "2"}),
        ("attributes", [("x", "y")]),
        ("colour", "red"),
    ],
)
def test_a_field_out_of_bounds_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ValidationError) as caught:
        Product.model_validate({"sku": "a"} | {field: value})
    assert caught.value.errors()[0]["loc"][0] == field


def test_texts_are_composed_before_they_are_counted() -> None:
    apart = "e\u0301"  # as one keyboard writes \u00e9
    product = Product(
        sku=64 * apart, title=300 * apart, category=128 * apart, attributes={64 * apart: 256 * apart}
    )
    assert product == Product(sku="\u00e9" * 64, title="\u00e9" * 300, category="\u00e9" * 128,
                              attributes={"\u00e9" * 64: "\u00e9" * 256})  # fmt: skip
    assert product.sku == "\u00e9" * 64
    assert Filter(category=apart, attributes={apart: apart}).matches(
        Product(sku="a", category="\u00e9", attributes={"\u00e9": "\u00e9"})
    )


def test_joiners_are_in_words_and_not_in_skus() -> None:
    word = "\u06a9\u0641\u0634\u200c\u0647\u0627"
    product = Product(sku="a", title=word, category=word, attributes={word: word})
    assert (product.title, product.category, product.attributes) == (word, word, {word: word})


def test_the_largest_product_is_stored_and_comes_back_as_it_was(tmp_path) -> None:
    product = Product(
        sku="鞋" * 64,
        title="é" * 300,
        price=Decimal("999999999999.9999"),
        currency="CNY",
        category="c" * 128,
        attributes={f"{number:064}": "v" * 256 for number in range(32)},
    )
    with Store(tmp_path / "gallery.sqlite") as store, store.write() as db:
        number = rows.put_product(db, product)
        assert rows.products(db, [number]) == {number: product}


@pytest.mark.parametrize(
    ("price", "shown"), [("5", "5.00"), ("59.9", "59.90"), ("0.125", "0.125"), ("1E+3", "1000.00")]
)
def test_a_price_comes_back_with_two_digits_or_as_many_as_it_needs(tmp_path, price: str, shown: str) -> None:
    with Store(tmp_path / "gallery.sqlite") as store, store.write() as db:
        number = rows.put_product(db, Product(sku="a", price=Decimal(price)))
        assert str(rows.products(db, [number])[number].price) == shown


PRICES = st.none() | st.decimals(0, 9, places=1)
CATEGORIES = st.none() | st.sampled_from(["shoes", "Shoes", "bags"])
ATTRIBUTES = st.dictionaries(st.sampled_from(["size", "colour"]), st.sampled_from(["1", "2", ""]))
PRODUCTS = st.builds(Product, sku=st.just("a"), price=PRICES, category=CATEGORIES, attributes=ATTRIBUTES)
FILTERS = st.builds(Filter, category=CATEGORIES, price_min=PRICES, price_max=PRICES, attributes=ATTRIBUTES)


@settings(max_examples=60)
@given(products=st.lists(PRODUCTS, max_size=8), where=FILTERS)
def test_sql_finds_what_the_filter_matches(tmp_path_factory, products: list[Product], where: Filter) -> None:
    products = [one.model_copy(update={"sku": str(place)}) for place, one in enumerate(products)]
    with Store(tmp_path_factory.mktemp("store") / "gallery.sqlite") as store, store.write() as db:
        for product in products:
            rows.put_product(db, product)
        assert rows.listed(db, where, "", 100) == [one for one in products if where.matches(one)]
