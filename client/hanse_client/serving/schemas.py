"""What REST hears, as typed models; OpenAPI is made of them.

    conditions = Conditions(category="shoes", price_max=Decimal(60), attribute=["size:42"]).filter()
    product = ProductFields(title="Trail shoe", price=Decimal("59.90")).product("A-17")

What REST answers is in `hanse_client.serving.answers`. Send a price as a text, such as "19.90": a binary number would
round it, though one is taken, too.
"""

import re
from typing import Annotated, Any, Final, TypeVar

from pydantic import (
    Base64Bytes,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
)

from hanse_client.gallery import prices
from hanse_client.gallery.product import (
    MAX_ATTRIBUTES,
    Attributes,
    Category,
    Currency,
    Filter,
    Price,
    Product,
    Sku,
    Title,
)
from hanse_client.personal.corrections import Label
from hanse_client.serving.problems import Refused, faults_in_words
from hanse_common.wire import Value

MAX_RESULTS: Final = 100
"""How many products one answer has at most."""

MAX_PHOTOS: Final = 64
"""How many photos one line of an import brings at most: as many as a product has."""

DECIMAL: Final = r"[0-9]{1,12}(\.[0-9]{1,4})?"
"""How a price is written."""

_DECIMAL = re.compile(DECIMAL, re.ASCII)

M = TypeVar("M", bound=BaseModel)


class Asked(BaseModel):
    """Base of what comes in an address or a body: nothing unknown, nothing infinite; texts become numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def valid(model: type[M], **fields: Any) -> M:
    """Return the `model` of `fields`. Raises `Refused` (422) when they are not valid."""
    try:
        return model(**fields)
    except ValidationError as error:
        raise Refused(422, "invalid", faults_in_words(error.errors(include_url=False))) from None


def _plain(value: object) -> object:
    if isinstance(value, bool) or (isinstance(value, str) and not _DECIMAL.fullmatch(value)):
        raise ValueError(f"expected {prices.WORDS}")
    return value


def _one_line(value: object) -> object:
    if isinstance(value, str) and len(value.splitlines()) > 1:
        raise ValueError("expected one line")
    return value


_WRITTEN: Final = {"type": "string", "pattern": f"^{DECIMAL}$"}
_NUMBER: Final = {"type": "number", "minimum": 0, "maximum": 999_999_999_999}
AskedPrice = Annotated[Price, BeforeValidator(_plain), WithJsonSchema({"anyOf": [_WRITTEN, _NUMBER]})]
PriceInAddress = Annotated[Price, BeforeValidator(_plain), WithJsonSchema(_WRITTEN)]
Attribute = Annotated[str, Field(pattern=r"^[^:]{1,64}:.{0,256}$")]
Results = Annotated[int, Field(ge=1, le=MAX_RESULTS, description="How many at most.")]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Conditions(Asked):
    """What must hold of the products: all that is given."""

    category: Category | None = None
    price_min: PriceInAddress | None = None
    price_max: PriceInAddress | None = None
    attribute: Annotated[
        list[Attribute],
        Field(max_length=MAX_ATTRIBUTES, description="NAME:VALUE, as often as there are conditions."),
    ] = []

    def filter(self) -> Filter | None:
        """Return the condition, None when there is none. Raises `Refused` (422)."""
        attributes = dict(each.split(":", 1) for each in self.attribute)
        if len(attributes) != len(self.attribute):
            raise Refused(422, "invalid", "attribute: found a name twice, expected one value for each.")
        where = valid(
            Filter,
            category=self.category,
            price_min=self.price_min,
            price_max=self.price_max,
            attributes=attributes,
        )
        return None if where == Filter() else where


class SearchQuery(Conditions):
    """The address of a search by photo."""

    text: Annotated[str | None, Field(min_length=1, max_length=300)] = None
    k: Results = 10


class TextQuery(Conditions):
    """The address of a search by text alone."""

    text: Annotated[str, Field(min_length=1, max_length=300)]
    k: Results = 10


class SimilarQuery(Conditions):
    """The address of a question for similar products."""

    k: Results = 10
    diversity: Annotated[
        float,
        Field(ge=0, le=1, description="From 0, the nearest ones, to 1, such as differ from one another."),
    ] = 0.0


class SuggestionsQuery(Conditions):
    """The address of a question for what may interest a shopper next."""

    viewed: Annotated[
        list[Sku],
        Field(min_length=1, max_length=50, description="SKUs that the shopper looked at, the latest first."),
    ]
    k: Results = 10


class ListQuery(Conditions):
    """The address of a list of products: those after `after`, by SKU."""

    after: Annotated[str, Field(max_length=64)] = ""
    limit: Annotated[int, Field(ge=1, le=1000)] = 100


class ClassifyQuery(Asked):
    """The address of a classification."""

    top: Annotated[int, Field(ge=1, le=1024, description="How many classes at most.")] = 5


class CorrectionQuery(Asked):
    """The address of a correction: what the photo shows, in a few words."""

    label: Annotated[Label, BeforeValidator(_one_line)]


class CorrectionsQuery(Asked):
    """The address of a list of corrections."""

    after: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    limit: Annotated[int, Field(ge=1, le=1000)] = 100


class ProductFields(Asked):
    """A product but for its SKU, which is in the address."""

    title: Title = ""
    price: AskedPrice | None = None
    currency: Currency | None = None
    category: Category | None = None
    attributes: Attributes = {}

    def product(self, sku: str) -> Product:
        """Return the product."""
        return valid(Product, sku=sku, **dict(self))


class ProductChanges(Asked):
    """What changes of a product: the fields that are given. null takes a field away."""

    title: Title | None = None
    price: AskedPrice | None = None
    currency: Currency | None = None
    category: Category | None = None
    attributes: Attributes | None = None

    def applied(self, product: Product) -> Product:
        """Return `product`, changed."""
        fields = dict(product) | {name: getattr(self, name) for name in self.model_fields_set}
        fields["title"] = fields["title"] or ""
        fields["attributes"] = fields["attributes"] or {}
        return valid(Product, **fields)


class ImportedProduct(Value):
    """One line of an import: a product, with its photos' files in base64."""

    sku: Sku
    title: Title = ""
    price: Price | None = None
    currency: Currency | None = None
    category: Category | None = None
    attributes: Attributes = Field(default={})
    photos: Annotated[tuple[Base64Bytes, ...], Field(max_length=MAX_PHOTOS)] = ()

    def product(self) -> Product:
        """Return the product without its photos."""
        return Product(**{name: value for name, value in dict(self).items() if name != "photos"})
