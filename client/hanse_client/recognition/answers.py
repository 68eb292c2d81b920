"""What the recognizer answers, in plain values that name the recognizer or embedding they came from.

    answer = recognition.classify(image)
    answer.classes[0].label, answer.classes[0].probability, answer.recognizer.hex()

Digests are 32 bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hanse_client.duplicates import SAME

if TYPE_CHECKING:
    from hanse_client.gallery.gallery import Match
    from hanse_client.gallery.rejection import Rejection


@dataclass(frozen=True)
class Guess:
    """A label and its probability, from 0 to 1."""

    label: str
    probability: float


@dataclass(frozen=True)
class Classification:
    """What a photo shows: the league's classes, best first, and the shop's own labels where a personal head serves.

    `recognizer` is the digest of the one that said so.
    """

    classes: tuple[Guess, ...]
    personal: tuple[Guess, ...] | None
    recognizer: bytes


@dataclass(frozen=True, eq=False)
class Embedded:
    """A photo's `vector`, (d,) float32 of norm 1; comparable with others of the same `embedding`."""

    vector: NDArray[np.float32]
    embedding: bytes


@dataclass(frozen=True)
class Found:
    """Products, best first.

    `known` is whether the photo shows any product of the shop, whatever filter or text was asked by: the similarity of
    the nearest is above `threshold`, or a photo of one near is the same picture. It is None where no photo was asked
    about. `embedding` is whose index was searched.
    """

    matches: tuple["Match", ...]
    known: bool | None
    threshold: float
    embedding: bytes

    @property
    def knows_first(self) -> bool:
        """Whether the photo shows the first of the products: a filter may have left out the one that it shows."""
        return any(match.looks > self.threshold or match.nearest >= SAME for match in self.matches[:1])


@dataclass(frozen=True)
class Recognized:
    """Both answers about one photo, by one pass through the network."""

    classification: Classification
    found: Found


@dataclass(frozen=True)
class Rebuild:
    """How many of the gallery's photos the coming embedding has (`done`), of all (`total`)."""

    done: int
    total: int


@dataclass(frozen=True)
class RecognitionStatus:
    """What serves now.

    `version` is the released recognizer's number in the league's registry, None for one that was not released.
    `rejection` is by what a photo is said to show none of the products, and how often that is wrong. `rebuild` is under
    way while photos lack a vector; `problem` says why a newer recognizer does not serve.
    """

    recognizer: bytes
    version: int | None
    embedding: bytes
    dimension: int
    classes: tuple[str, ...]
    personal_labels: tuple[str, ...]
    products: int
    photos: int
    rejection: "Rejection"
    rebuild: Rebuild | None
    problem: str | None

    @property
    def threshold(self) -> float:
        """Similarity above which a photo shows one of the products."""
        return self.rejection.threshold


def ranked(labels: Sequence[str], probabilities: NDArray[np.floating[Any]], top: int) -> tuple[Guess, ...]:
    """Return the `top` most probable of `labels`, best first; the earlier one first where two are equal."""
    order = np.argsort(-probabilities, kind="stable")[:top]
    return tuple(Guess(labels[place], float(probabilities[place])) for place in order)
