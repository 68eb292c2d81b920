"""What the recognizer's page says of a photo, in few words: how sure it is, how alike two things look.

    alikeness(0.93, threshold=0.7)     # Alike.SAME
    percent(0.9987)                    # ">99 %"
    views(found)                       # each match with its picture, for a template

A similarity is a cosine, which says nothing to a shop owner: what it is worth depends on the recognizer. So words go by
where it lies between the threshold of the open-set test, which is set on the shop's own photos, and 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from hanse_client.duplicates import SAME
from hanse_client.gallery.gallery import Match
from hanse_client.gallery.product import Product
from hanse_client.recognition.answers import Guess

SURE, LIKELY = 0.8, 0.5
"""Probabilities from which on a class is called sure, and likely."""


class Alike(StrEnum):
    """How alike two photos look; a template has the words."""

    SAME = "same"
    VERY = "very"
    ENOUGH = "enough"
    LITTLE = "little"
    NOT = "not"


class Certainty(StrEnum):
    """How sure the recognizer is of a class; a template has the words."""

    SURE = "sure"
    LIKELY = "likely"
    UNSURE = "unsure"


@dataclass(frozen=True)
class MatchView:
    """A match as it is shown: `photo` names its picture, `share` is how much it looks like it in [0, 1], for a bar."""

    product: Product
    photo: str
    alike: Alike
    share: float
    percent: str


@dataclass(frozen=True)
class Bar:
    """A class and its probability."""

    name: str
    share: float
    percent: str


def alikeness(similarity: float, threshold: float) -> Alike:
    """Return the word for a similarity; what a known product has is above `threshold`.

    Thirds of the way from the threshold to 1 divide the known, half of the threshold the unknown.
    """
    if similarity <= threshold:
        return Alike.LITTLE if similarity >= threshold / 2 > 0 else Alike.NOT
    way = (similarity - threshold) / (1 - threshold) if threshold < 1 else 1.0
    return Alike.SAME if way >= 2 / 3 else Alike.VERY if way >= 1 / 3 else Alike.ENOUGH


def certainty(probability: float) -> Certainty:
    """Return the word for the probability of the likeliest class."""
    return (
        Certainty.SURE
        if probability >= SURE
        else Certainty.LIKELY
        if probability >= LIKELY
        else Certainty.UNSURE
    )


def percent(share: float) -> str:
    """Return a share in [0, 1] in whole per cent, never 0 or 100 for one that is neither."""
    rounded = round(100 * share)
    if rounded <= 0 < share:
        return "<1 %"
    return ">99 %" if rounded >= 100 > 100 * share else f"{max(0, rounded)} %"


def bars(guesses: Sequence[Guess]) -> list[Bar]:
    """Return classes with their probabilities as they are shown."""
    return [Bar(each.label, each.probability, percent(each.probability)) for each in guesses]


def views(matches: Sequence[Match], threshold: float) -> list[MatchView]:
    """Return matches as they are shown: the same picture looks the same, whatever the threshold."""
    shown = []
    for match in matches:
        alike = Alike.SAME if match.nearest >= SAME else alikeness(match.similarity, threshold)
        share = min(1.0, max(0.0, match.looks))
        shown.append(MatchView(match.product, match.photo.hex(), alike, share, percent(share)))
    return shown


def price(product: Product) -> str:
    """Return a product's price with its currency; nothing without one."""
    return "" if product.price is None else " ".join(filter(None, (f"{product.price:f}", product.currency)))
