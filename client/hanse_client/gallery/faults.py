"""What is wrong with the fields of a product or a condition, in words for whoever sent them.

    try:
        Product(sku="A-17", currency="EURO")
    except ValidationError as error:
        print(in_words(error.errors(include_url=False)))   # currency: found 'EURO', expected three capital letters, …

Import, commands, REST and gRPC tell it in these words. The page has its own beside each field, since it speaks several
languages. `hanse_common.config` words a file's faults by its schema: there a pattern is shown as it is, which says
nothing to a shop owner, so here each field has its words.
"""

from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any, Final

from hanse_client.gallery import prices
from hanse_client.gallery.product import (
    MAX_ATTRIBUTES,
    MAX_CATEGORY,
    MAX_NAME,
    MAX_SKU,
    MAX_TITLE,
    MAX_VALUE,
    PRICE_DIGITS,
    PRICE_PLACES,
)

TOLD: Final = 5
"""So many faults are told in full; the rest are only counted."""

SHOWN: Final = 40
"""Characters of a value that are shown."""

EXPECTED: Final[Mapping[str, str]] = {
    "sku": f"1 to {MAX_SKU} printable characters, no space at either end, none that is invisible, not . or ..",
    "title": f"at most {MAX_TITLE} characters in one line",
    "price": prices.WORDS,
    "price_min": prices.WORDS,
    "price_max": prices.WORDS,
    "currency": "three capital letters, such as EUR",
    "category": f"1 to {MAX_CATEGORY} characters in one line",
    "attributes": f"at most {MAX_ATTRIBUTES} names, each with a value",
    "attribute": f"at most {MAX_ATTRIBUTES} of the form NAME:VALUE",
}
"""What is expected of each field, behind the word expected."""

_NAME: Final = f"a name of 1 to {MAX_NAME} characters in one line"
_VALUE: Final = f"a value of at most {MAX_VALUE} characters in one line"
_PARTS: Final = ("body", "query", "path")
_MANY_DIGITS: Final = 10**SHOWN

Fault = Mapping[str, Any]
"""One of the errors of a pydantic ValidationError."""


def in_words(faults: Sequence[Fault]) -> str:
    """Return the `faults` in one line: of each its field, what was found, if that can be shown, and what was expected.

    The line has no full stop.
    """
    said = "; ".join(map(_told, faults[:TOLD]))
    return f"{said}; and {len(faults) - TOLD} more" if len(faults) > TOLD else said


def _told(fault: Fault) -> str:
    loc = [str(step)[:MAX_NAME] for step in fault["loc"]]
    if len(loc) > 1 and loc[0] in _PARTS:  # of a request, as FastAPI names them
        del loc[0]
    is_name = loc[-1:] == ["[key]"]  # as pydantic says that it means a key of a mapping
    place = ".".join(loc[:-1] if is_name else loc) or "body"
    expected = _expected(loc, is_name)
    match fault["type"]:
        case "missing":
            return f"{place}: is missing, expected {expected or 'a value'}"
        case "extra_forbidden":
            return f"{place}: there is no such field, check how it is spelt"
        case "value_error":  # one of our own, which says what was expected
            reason = str(fault["msg"]).removeprefix("Value error, ")
        case "decimal_max_places":
            reason = f"expected at most {PRICE_PLACES} digits after the point"
        case "decimal_whole_digits":
            reason = f"expected at most {PRICE_DIGITS - PRICE_PLACES} digits before the point"
        case "decimal_max_digits":
            reason = f"expected at most {PRICE_DIGITS} digits in all"
        case _:
            if expected is None:
                return f"{place}: {fault['msg']}"
            reason = f"expected {expected}"
    found = None if expected is None else _shown(fault.get("input"))
    return f"{place}: {reason}" if found is None else f"{place}: found {found}, {reason}"


def _expected(loc: Sequence[str], is_name: bool) -> str | None:
    if not loc:
        return None
    if loc[0] == "attributes" and len(loc) > 1:
        return _NAME if is_name else _VALUE
    return EXPECTED.get(loc[0])


def _shown(value: object) -> str | None:
    """Return a plain value in short, a mapping's length, None for what is not to be shown."""
    match value:
        case bool():
            return str(value).lower()
        case str():
            return repr(value[:SHOWN])
        case int() if abs(value) >= _MANY_DIGITS:
            return f"a number of more than {SHOWN} digits"
        case int() | float() | Decimal():
            return str(value)[:SHOWN]
        case dict():
            return str(len(value))
    return None
