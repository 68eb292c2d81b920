"""A product of the shop, and a condition on products.

    shoe = Product(sku="A-17", title="Trail shoe", price=Decimal("59.90"), currency="EUR", attributes={"size": "42"})
    assert Filter(price_max=Decimal(60), attributes={"size": "42"}).matches(shoe)

All fields are bounded, since they come from files and requests. A text is one line of printable characters in
composed form (`hanse_client.gallery.spelling`): what is stored is looked up, and shown in terminals and pages.
"""

from decimal import Decimal
from typing import Annotated, Any, Final

from pydantic import AfterValidator, BeforeValidator, Field, ValidatorFunctionWrapHandler, WrapValidator

from hanse_client.gallery.spelling import composed, identifier, printable
from hanse_common.wire import Value

MAX_SKU: Final = 64
"""Bound of a SKU, in characters."""

MAX_TITLE: Final = 300
"""Bound of a title, in characters."""

MAX_CATEGORY: Final = 128
"""Bound of a category, in characters."""

MAX_NAME: Final = 64
"""Bound of an attribute's name, in characters."""

MAX_VALUE: Final = 256
"""Bound of an attribute's value, in characters."""

MAX_ATTRIBUTES: Final = 32
"""Bound of the attributes of one product, and of one filter."""

PRICE_PLACES: Final = 4
"""Digits of a price after the point."""

PRICE_DIGITS: Final = 16
"""Digits of a price in all: such a price in ten-thousandths fits 64 bits."""


def _distinct(given: Any, handler: ValidatorFunctionWrapHandler) -> dict[str, str]:
    found: dict[str, str] = handler(given)
    if len(found) != len(given):
        raise ValueError("expected names that differ")
    return found


def _composed(most: int) -> BeforeValidator:
    """Compose a text before it is counted; what is no text is for the type to refuse."""
    return BeforeValidator(lambda given: composed(given, most) if isinstance(given, str) else given)


Sku = Annotated[str, Field(min_length=1, max_length=MAX_SKU), _composed(MAX_SKU), AfterValidator(identifier)]
Title = Annotated[str, Field(max_length=MAX_TITLE), _composed(MAX_TITLE), AfterValidator(printable)]
Price = Annotated[Decimal, Field(ge=0, max_digits=PRICE_DIGITS, decimal_places=PRICE_PLACES)]
Currency = Annotated[str, Field(pattern=r"^[A-Z]{3}$")]
Category = Annotated[
    str, Field(min_length=1, max_length=MAX_CATEGORY), _composed(MAX_CATEGORY), AfterValidator(printable)
]
Attributes = Annotated[
    dict[
        Annotated[
            str, Field(min_length=1, max_length=MAX_NAME), _composed(MAX_NAME), AfterValidator(printable)
        ],
        Annotated[str, Field(max_length=MAX_VALUE), _composed(MAX_VALUE), AfterValidator(printable)],
    ],
    Field(max_length=MAX_ATTRIBUTES),
    WrapValidator(_distinct),
]


class Product(Value):
    """What the shop knows of one product. `sku` names it; `currency` is an ISO 4217 code.

    Raises pydantic's ValidationError, which is a ValueError and names the field.
    """

    sku: Sku
    title: Title = ""
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
