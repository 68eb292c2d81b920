"""Between the core's values and gRPC's messages.

    pb = classification_message(recognition.classify(image))
    product = product_of(request.product)              # raises Refused (422), which names the field

A message's numbers and texts come from outside and are checked as REST's are.
"""

import re
from decimal import Decimal
from typing import Any

from hanse_client.gallery.faults import EXPECTED, SHOWN
from hanse_client.gallery.gallery import Match
from hanse_client.gallery.product import Filter, Product
from hanse_client.gallery.rejection import Rejection
from hanse_client.recognition.answers import Classification, Found, Guess
from hanse_client.serving import recognition_pb2 as pb
from hanse_client.serving.problems import Refused
from hanse_client.serving.schemas import DECIMAL, valid

_DECIMAL = re.compile(DECIMAL, re.ASCII)


def classification_message(found: Classification) -> pb.Classification:
    """Return the message of the core's answer."""
    return pb.Classification(
        classes=_guesses(found.classes), personal=_guesses(found.personal or ()), recognizer=found.recognizer
    )


def found_message(found: Found) -> pb.Found:
    """Return the message of the core's answer."""
    matches = map(match_message, found.matches)
    return pb.Found(matches=matches, known=found.known, threshold=found.threshold, embedding=found.embedding)


def match_message(match: Match) -> pb.Match:
    """Return the message of a product that was found."""
    return pb.Match(
        product=product_message(match.product),
        similarity=match.similarity,
        score=match.score,
        photo=match.photo,
    )


def rates_message(rejection: Rejection) -> pb.ThresholdRates:
    """Return the message of how often a threshold is wrong."""
    return pb.ThresholdRates(
        calibrated=rejection.calibrated,
        false_accept=rejection.false_accept,
        impostor=rejection.impostor,
        false_reject=rejection.false_reject,
        genuine=rejection.genuine,
    )


def product_message(product: Product) -> pb.Product:
    """Return the message of a product."""
    return pb.Product(
        sku=product.sku,
        title=product.title,
        price=None if product.price is None else f"{product.price:f}",
        currency=product.currency,
        category=product.category,
        attributes=product.attributes,
    )


def product_of(message: pb.Product) -> Product:
    """Return the product of a message. Raises `Refused` (422)."""
    return valid(
        Product,
        sku=message.sku,
        title=message.title,
        price=_decimal(message, "price"),
        currency=_text(message, "currency"),
        category=_text(message, "category"),
        attributes=dict(message.attributes),
    )


def conditions(message: pb.Filter) -> Filter | None:
    """Return the conditions of a message, None when there are none. Raises `Refused` (422)."""
    where = valid(
        Filter,
        category=_text(message, "category"),
        price_min=_decimal(message, "price_min"),
        price_max=_decimal(message, "price_max"),
        attributes=dict(message.attributes),
    )
    return None if where == Filter() else where


def number(message: Any, field: str, default: int, most: int) -> int:
    """Return a message's optional number from 1 to `most`. Raises `Refused` (422)."""
    found: int = getattr(message, field) if message.HasField(field) else default
    if not 1 <= found <= most:
        raise Refused(422, "invalid", f"{field}: found {found}, expected 1 to {most}.")
    return found


def _text(message: Any, field: str) -> str | None:
    return getattr(message, field) if message.HasField(field) else None


def _decimal(message: Any, field: str) -> Decimal | None:
    text = _text(message, field)
    if text is None:
        return None
    if not _DECIMAL.fullmatch(text):
        raise Refused(422, "invalid", f"{field}: found {text[:SHOWN]!r}, expected {EXPECTED[field]}.")
    return Decimal(text)


def _guesses(guesses: tuple[Guess, ...]) -> list[pb.Likelihood]:
    return [pb.Likelihood(label=guess.label, probability=guess.probability) for guess in guesses]
