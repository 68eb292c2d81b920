"""What is wrong with a product, in words that a shop owner knows."""

from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from hanse_client.gallery.faults import EXPECTED, in_words
from hanse_client.gallery.product import Filter, Product
from hanse_client.serving.schemas import Conditions, ProductFields

JARGON = (
    "Input should",
    "String should",
    "Value error",
    "pattern",
    "valid dict",
    "Decimal input",
    "Dictionary",
)
"""Parts of pydantic's own texts."""

TEXTS = ["x" * 400, "a\nb", " a", "\ud800", "\u200b"]
NUMBERS = [True, 5, -1.5, Decimal("1e99"), Decimal("1.23456"), float("nan"), 10**5000]
MANY = [[], {}, ["x"], {"a": 1}, {"": "b"}, {"a": "b" * 257}, {str(number): "1" for number in range(33)}]
WRONG = [None, *TEXTS, *NUMBERS, *MANY]


def faults(model: type[BaseModel], fields: dict[str, Any]) -> str:
    with pytest.raises(ValidationError) as caught:
        model(**fields)
    return in_words(caught.value.errors(include_url=False))


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        (
            {"sku": "A", "currency": "EURO"},
            "currency: found 'EURO', expected three capital letters, such as EUR",
        ),
        ({"sku": ""}, f"sku: found '', expected {EXPECTED['sku']}"),
        ({}, f"sku: is missing, expected {EXPECTED['sku']}"),
        ({"sku": "A\u200b"}, "sku: found 'A\\u200b', expected one line of printable characters"),
        ({"sku": "A", "price": "dear"}, f"price: found 'dear', expected {EXPECTED['price']}"),
        ({"sku": "A", "price": Decimal(-1)}, f"price: found -1, expected {EXPECTED['price']}"),
        (
            {"sku": "A", "price": Decimal("1.23456")},
            "price: found 1.23456, expected at most 4 digits after the point",
        ),
        (
            {"sku": "A", "price": Decimal(10**12)},
            "price: found 1000000000000, expected at most 12 digits before the point",
        ),
        ({"sku": "A", "titel": "x"}, "titel: there is no such field, check how it is spelt"),
        (
            {"sku": "A", "attributes": {"size": "x" * 257}},
            f"attributes.size: found '{'x' * 40}', expected a value of at most 256 characters in one line",
        ),
        (
            {"sku": "A", "attributes": {str(n): "" for n in range(33)}},
            "attributes: found 33, expected at most 32 names, each with a value",
        ),
    ],
)
def test_each_field_has_its_words(fields: dict[str, Any], told: str) -> None:
    assert faults(Product, fields) == told


@given(st.data())
def test_no_field_is_told_in_pydantics_words(data: st.DataObject) -> None:
    models: list[type[BaseModel]] = [Product, Filter, Conditions, ProductFields]
    model = data.draw(st.sampled_from(models))
    fields = {name: data.draw(st.sampled_from(WRONG)) for name in model.model_fields}
    try:
        model(**fields)
    except ValidationError as error:
        told = in_words(error.errors(include_url=False))
        assert not any(word in told for word in JARGON), told
        assert told.isprintable() and len(told) < 2000


def test_many_faults_are_counted() -> None:
    told = faults(Product, {f"field{number}": 1 for number in range(8)} | {"sku": "A"})
    assert told.count("no such field") == 5 and told.endswith("; and 3 more")
