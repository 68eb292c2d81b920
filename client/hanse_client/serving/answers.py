"""What REST answers, as typed models, and how the core's plain values become them.

    Classes.of(recognition.classify(image)).model_dump_json()
    Listed.of(recognition.search(image)).matches[0].product.sku

The commands print the same JSON. Digests are in hexadecimal, prices are texts such as "19.90".
"""

from datetime import datetime
from typing import Annotated, Literal, Self

from pydantic import Field

from hanse_client.gallery.gallery import Match
from hanse_client.gallery.product import Product
from hanse_client.gallery.rejection import Rejection
from hanse_client.personal.corrections import Correction
from hanse_client.recognition.answers import (
    Classification,
    Embedded,
    Found,
    RecognitionStatus,
)
from hanse_common.wire import Value

Hex = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]


class Likelihood(Value):
    """A label and its probability."""

    label: str
    probability: Share


class Classes(Value):
    """What a photo shows: the league's classes, best first, and the shop's own labels if it trained some."""

    classes: tuple[Likelihood, ...]
    personal: tuple[Likelihood, ...] | None
    recognizer: Hex

    @classmethod
    def of(cls, found: Classification) -> Self:
        """Return it of the core's answer."""
        told = [
            None if guesses is None else tuple(_likelihood(each.label, each.probability) for each in guesses)
            for guesses in (found.classes, found.personal)
        ]
        return cls(classes=told[0] or (), personal=told[1], recognizer=found.recognizer.hex())


class Vector(Value):
    """A photo as a vector of length 1. Only vectors of one `embedding` can be compared."""

    vector: tuple[float, ...]
    embedding: Hex

    @classmethod
    def of(cls, found: Embedded) -> Self:
        """Return it of the core's answer."""
        return cls(vector=tuple(found.vector.tolist()), embedding=found.embedding.hex())


class Matched(Value):
    """A product that was found; `photo` is its reference photo that is nearest, "" for one without photos.

    A search is in the order of `score`; products that are chosen to differ, and suggestions, in one of their own.
    """

    product: Product
    similarity: float
    score: float
    photo: str

    @classmethod
    def of(cls, match: Match) -> Self:
        """Return it of the gallery's answer."""
        return cls(
            product=match.product, similarity=match.similarity, score=match.score, photo=match.photo.hex()
        )


class Listed(Value):
    """Products, best first. `known` false: the photo likely shows none of the shop's, whatever the conditions.

    It is null where no photo was sent. Above the similarity `threshold` a photo shows a product.
    """

    matches: tuple[Matched, ...]
    known: bool | None
    threshold: float

    @classmethod
    def of(cls, found: Found) -> Self:
        """Return it of the core's answer."""
        matches = tuple(Matched.of(match) for match in found.matches)
        return cls(matches=matches, known=found.known, threshold=found.threshold)


class Suggested(Value):
    """Products that may interest a shopper, the most interesting first."""

    matches: tuple[Matched, ...]


class Shelved(Product):
    """A product with the digests of its photos."""

    photos: tuple[Hex, ...]

    @classmethod
    def on(cls, product: Product, photos: list[bytes]) -> Self:
        """Return it of a product and its photos' digests."""
        return cls(**dict(product), photos=tuple(photo.hex() for photo in photos))


class ProductPage(Value):
    """Products by SKU; `next` is what `after` must be for the next ones, null at the end."""

    products: tuple[Product, ...]
    next: str | None


class PhotoAdded(Value):
    """The digest of a photo as it is stored."""

    photo: Hex


class Rebuilding(Value):
    """How many photos the coming embedding has, of all."""

    done: Count
    total: Count


class ThresholdRates(Value):
    """How often `known` is wrong at the threshold, by the shop's own photos; null where there are none to tell.

    `false_accept` is the share of `impostor` photos, which show none of the products that they are compared with, that
    are taken for one; `false_reject` is the share of `genuine` photos of products that are turned away. `calibrated` is
    false as long as there are too few, and the threshold a stand-in.
    """

    calibrated: bool
    false_accept: Share | None
    impostor: Count
    false_reject: Share | None
    genuine: Count

    @classmethod
    def of(cls, rejection: Rejection) -> Self:
        """Return it of the gallery's rejection."""
        return cls(
            calibrated=rejection.calibrated,
            false_accept=rejection.false_accept,
            impostor=rejection.impostor,
            false_reject=rejection.false_reject,
            genuine=rejection.genuine,
        )


class ServiceStatus(Value):
    """What serves now. `problem` says why a newer recognizer does not; `rates`, how often `threshold` is wrong."""

    recognizer: Hex
    version: int | None
    embedding: str
    dimension: Count
    classes: tuple[str, ...]
    personal_labels: tuple[str, ...]
    products: Count
    photos: Count
    corrections: Count
    threshold: float
    rates: ThresholdRates
    rebuild: Rebuilding | None
    problem: str | None

    @classmethod
    def of(cls, status: RecognitionStatus, corrections: int) -> Self:
        """Return it of the core's status."""
        coming = status.rebuild
        rebuild = None if coming is None else Rebuilding(done=coming.done, total=coming.total)
        return cls(
            recognizer=status.recognizer.hex(),
            version=status.version,
            embedding=status.embedding.hex(),
            dimension=status.dimension,
            classes=status.classes,
            personal_labels=status.personal_labels,
            products=status.products,
            photos=status.photos,
            corrections=corrections,
            threshold=status.threshold,
            rates=ThresholdRates.of(status.rejection),
            rebuild=rebuild,
            problem=status.problem,
        )


class Corrected(Value):
    """What somebody said that a photo shows."""

    number: Annotated[int, Field(ge=1)]
    photo: Hex
    label: str | None
    sku: str | None
    time: datetime

    @classmethod
    def of(cls, correction: Correction) -> Self:
        """Return it of what was written down."""
        return cls(**dict(correction) | {"photo": correction.photo.hex()})


class CorrectionPage(Value):
    """Corrections, the earliest first; `next` is what `after` must be for the next ones, null at the end."""

    corrections: tuple[Corrected, ...]
    next: int | None


class Health(Value):
    """That the service runs; `ready` is whether it takes requests."""

    ready: bool


class Fault(Value):
    """Why one line of an import was left out."""

    line: Annotated[int, Field(ge=1)]
    message: str


class ImportProgress(Value):
    """An import: how many lines are done, of how many, and which were left out (the first hundred of `failed`)."""

    id: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    state: Literal["running", "done", "cancelled", "failed"]
    lines: Count
    done: Count
    failed: Count
    faults: tuple[Fault, ...]


def _likelihood(label: str, probability: float) -> Likelihood:
    return Likelihood(label=label, probability=min(1.0, max(0.0, probability)))
