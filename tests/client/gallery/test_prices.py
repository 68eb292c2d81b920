"""Prices that people type: read as they were meant, or asked about."""

from decimal import ROUND_DOWN, Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hanse_client.gallery.prices import WORDS, MarkUnclear, read_price, written_price


@pytest.mark.parametrize(
    ("typed", "price"),
    [
        ("59.90", "59.9"),
        ("59,90", "59.9"),
        ("7", "7"),
        ("0,299", "0.299"),
        ("1,2990", "1.299"),
        ("1299", "1299"),
    ],
)
def test_a_point_and_a_comma_are_read_alike(typed: str, price: str) -> None:
    assert read_price(typed) == Decimal(price)


@pytest.mark.parametrize("typed", ["1,299", "1.299", "12.500", "999,000"])
def test_three_digits_behind_a_mark_are_asked_about(typed: str) -> None:
    whole = typed.replace(",", "").replace(".", "")
    with pytest.raises(
        MarkUnclear, match=f"found '{typed}', which may be {whole} or .* expected {whole} or .*0$"
    ):
        read_price(typed)


@pytest.mark.parametrize(
    "typed",
    [
        "",
        "dear",
        "1e3",
        "-1",
        "+1",
        "1_000",
        "1.",
        ".5",
        "1,299,00",
        "1'299",
        "nan",
        "1\n",
        "1" * 13,
        "1.23456",
    ],
)
def test_what_is_no_price_is_told(typed: str) -> None:
    with pytest.raises(ValueError, match=f"expected {WORDS}"):
        read_price(typed)


@given(st.decimals(min_value=0, max_value=Decimal("999999999999.9999"), places=4))
def test_a_price_that_is_shown_is_read_as_it_is(price: Decimal) -> None:
    for shown in (price, price.normalize(), price.quantize(Decimal("0.001"), ROUND_DOWN)):
        assert read_price(written_price(shown)) == shown
