"""A product of the shop, and a condition on products.

    shoe = Product(sku="A-17", title="Trail shoe", price=Decimal("59.90"), currency="EUR", attributes={"size": "42"})
    assert Filter(price_max=Decimal(60), attributes={"size": "42"}).matches(shoe)

All fields are bounded, since they come from files and requests. A text is one line of printable characters: what
is stored is later shown in terminals and pages.
"""

from decimal import Decimal
from typing import Annotated, Final

from pydantic import AfterValidator, Field

from hanse_common.wire import Value

MAX_ATTRIBUTES: Final = 32
"""Bound of the attributes of one product, and of one filter."""

PRICE_PLACES: Final = 4
"""Digits of a price after the point."""

PRICE_DIGITS: Final = 16
"""Digits of a price in all: such a price in ten-thousandths fits 64 bits."""


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("expected one line of printable characters")
    if text != text.strip():
        raise ValueError("expected no space at either end")
    return text


Sku = Annotated[str, Field(min_length=1, max_length=64), AfterValidator(_printable)]
Price = Annotated[Decimal, Field(ge=0, max_digits=PRICE_DIGITS, decimal_places=PRICE_PLACES)]
Currency = Annotated[str, Field(pattern=r"^[A-Z]{3}$")]
Category = Annotated[str, Field(min_length=1, max_length=128), AfterValidator(_printable)]
Attributes = Annotated[
    dict[
        Annotated[str, Field(min_length=1, max_length=64), AfterValidator(_printable)],
        Annotated[str, Field(max_length=256), AfterValidator(_printable)],
    ],
    Field(max_length=MAX_ATTRIBUTES),
]


class Product(Value):
    """What the shop knows of one product. `sku` names it; `currency` is an ISO 4217 code.

    Raises pydantic's ValidationError, which is a ValueError and names the field.
    """

    sku: Sku
    title: Annotated[str, Field(max_length=300), AfterValidator(_printable)] = ""
    price: Price | None = None
    currency: Currency | None = None
    category: Category | None = None
    attributes: Attributes = Field(default_factory=dict)


class Filter(Value):
    """Conditions on a product, all of which must hold; without any, every product matches.

    Prices are compared as numbers, whatever their currency. A product without a price matches no condition on it.
    """

    category: Category | None = None
    price_min: Price | None = None
    price_max: Price | None = None
    attributes: Attributes = Field(default_factory=dict)

    def matches(self, product: Product) -> bool:
        """Return whether all conditions hold of `product`."""
        if self.category is not None and product.category != self.category:
            return False
        if self.price_min is not None and (product.price is None or product.price < self.price_min):
            return False
        if self.price_max is not None and (product.price is None or product.price > self.price_max):
            return False
        return self.attributes.items() <= product.attributes.items()
