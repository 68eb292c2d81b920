"""Prices as people type them, in a file, a form or a command.

    read_price("59,90")                   # Decimal("59.90")
    read_price("1,299")                   # MarkUnclear: it may be 1299 or 1.299
    written_price(Decimal("1.299"))       # "1.2990", which is read as it was meant

A point or a comma stands before the digits of a price that are less than one. In some countries one of the two stands
between thousands instead, so that "1,299" and "1.299" mean either: nobody is guessed for, three digits behind the mark
are asked about. Programs send prices by REST and gRPC, where the point has one meaning alone.
"""

import re
from decimal import Decimal
from typing import Final

from hanse_client.gallery.product import PRICE_DIGITS, PRICE_PLACES

WORDS: Final = f"a number such as 59.90, with at most {PRICE_PLACES} digits after the point"
"""What a price is."""

_TYPED = re.compile(rf"(\d{{1,{PRICE_DIGITS - PRICE_PLACES}}})(?:[.,](\d{{1,{PRICE_PLACES}}}))?")
_GROUP = 3  # digits between two marks of thousands


class MarkUnclear(ValueError):
    """The mark in a price may stand between thousands, or before the digits that are less than one."""


def read_price(text: str) -> Decimal:
    """Return the price in `text`. Raises `MarkUnclear`, and ValueError for what is no price, in words."""
    found = _TYPED.fullmatch(text)
    if found is None:
        raise ValueError(f"found {text[:40]!r}, expected {WORDS}")
    whole, part = found[1], found[2] or ""
    # No thousands begin with a zero.
    if len(part) == _GROUP and int(whole) > 0:
        raise MarkUnclear(
            f"found {text!r}, which may be {whole}{part} or {whole}.{part}, expected {whole}{part} or {whole}.{part}0"
        )
    return Decimal(f"{whole}.{part}" if part else whole)


def written_price(price: Decimal) -> str:
    """Return `price` as somebody would type it: `read_price` of it is the same price."""
    text = f"{price:f}"
    return text + "0" if len(text.partition(".")[2]) == _GROUP else text
