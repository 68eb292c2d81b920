"""A head of the shop's own: it says the shop's labels, which may be finer than the league's classes.

    card = recognizer.card
    head = PersonalHead.load(config.personal_path, card.recipe, card.taxonomy)    # None: the shared one serves
    features = recognizer.features(images)
    head.probabilities(features, recognizer.probabilities(features))    # (n, len(head.labels))

**What it says.** A mixture of two. One is a linear head over the features that the shared head reads, fitted to the
shop's labels alone (`learning`). The other is the shared head *in the shop's words*: what it says of a class is divided
among the class's own labels as the shop's training photos are, and labels without a class get nothing. The share of the
first, `blend`, is chosen by cross-validation among the training photos.

**When it serves.** Only when it is better than the shared head in the shop's words on the photos held out: it gets more
of them right, and an exact test of signs over products says that chance alone makes such a difference with a
probability below `compare.SIGNIFICANCE` = 0.05 (two-sided; so at least 6 products must differ). Photos held out were
never trained on here. Otherwise, and so with few photos, `load` returns None.

**What it belongs to.** The features that it reads and the league's classes. A league update that keeps both keeps the
head. One that changes either drops it at once: `load` returns None, until `personalize` learns it again.
"""

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import AwareDatetime, Field, model_validator

from hanse_client.personal import saved
from hanse_client.personal.saved import Saved
from hanse_common.errors import RecognizerError
from hanse_common.vision.recipe import Recipe
from hanse_common.vision.taxonomy import Taxonomy
from hanse_common.wire import HexDigest, Value

log = logging.getLogger(__name__)

NAME: Final = "head"
"""Of the files in the folder."""

MAX_LABELS: Final = 1000
"""The most labels of one head: the ones with the most photos."""

MIN_PHOTOS: Final = 3
"""The fewest training photos of a label that a head learns."""

_Text = Annotated[str, Field(min_length=1, max_length=4096)]
_Share = Annotated[float, Field(ge=0.0, le=1.0)]
_Count = Annotated[int, Field(ge=0)]


class Judgement(Value):
    """How two did on the same photos held out, the shared one and the shop's own.

    `differing` counts products of which one gets more right; `p_value` is the exact test's; `better` the verdict.
    """

    photos: _Count
    shared_right: _Count
    own_right: _Count
    differing: _Count
    p_value: _Share
    better: bool


class HeadRecord(Saved):
    """What is known of a head. `class_of[i]` is the league's class of `labels[i]`, None for one outside of them.

    `shares[i]` is the part that label has of its class's training photos; `photos[i]` is the number of its own.
    `strength` is the C of its fit, None where too few photos were there to choose; `recognizer` the one judged beside.
    """

    format_version: Literal[1] = 1
    features: HexDigest
    taxonomy: Taxonomy
    labels: Annotated[tuple[_Text, ...], Field(min_length=2, max_length=MAX_LABELS)]
    class_of: tuple[Annotated[int, Field(ge=0, lt=1000)] | None, ...]
    shares: tuple[_Share, ...]
    photos: tuple[_Count, ...]
    blend: Annotated[float, Field(gt=0.0, le=1.0)]
    strength: Annotated[float, Field(gt=0.0)] | None
    judgement: Judgement
    recognizer: HexDigest
    created: AwareDatetime

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not len(self.labels) == len(self.class_of) == len(self.shares) == len(self.photos):
            raise ValueError("expected one class, share and number of photos for each label")
        if any(index is not None and index >= len(self.taxonomy.classes) for index in self.class_of):
            raise ValueError("class_of: expected classes of the taxonomy")
        return self


@dataclass(frozen=True, eq=False)
class PersonalHead:
    """A record, and the linear head's `weight`, shape (labels, F), and `bias`, shape (labels,), both float32."""

    record: HeadRecord
    weight: NDArray[np.float32]
    bias: NDArray[np.float32]

    @property
    def labels(self) -> tuple[str, ...]:
        """The shop's labels, in the order of the probabilities."""
        return self.record.labels

    def probabilities(
        self, features: NDArray[np.float32], shared: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Return each label's probability, (n, labels), of `features`, (n, F), of which the shared head says `shared`.

        `shared` has shape (n, classes).
        """
        own = softmax(features @ self.weight.T + self.bias)
        return mixed(own, in_own_words(shared, self.record.class_of, self.record.shares), self.record.blend)

    def save(self, folder: Path) -> None:
        """Write it into `folder`. Raises `RecognizerError` when the disk fails."""
        saved.save(folder, NAME, self.record, {"weight": self.weight, "bias": self.bias})

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Return the head in `folder`, be it better or not. Raises `RecognizerError` when it is damaged or missing."""
        record, arrays = saved.read(folder, NAME, HeadRecord)
        shapes = {name: array.shape for name, array in arrays.items()}
        width = arrays["weight"].shape[-1] if "weight" in arrays else 0
        expected = {"weight": (len(record.labels), width), "bias": (len(record.labels),)}
        if shapes != expected:
            raise RecognizerError(f"{folder}: head: found arrays {shapes}, expected {expected}.")
        return cls(record, arrays["weight"], arrays["bias"])

    @classmethod
    def load(cls, folder: Path, recipe: Recipe, taxonomy: Taxonomy) -> Self | None:
        """Return the head that serves beside a recognizer of that recipe and taxonomy, None where the shared one does.

        None: there is none, it was not better, it belongs to other features or classes, or its files are damaged,
        which is logged: a shop is served all the same.
        """
        if recipe.backbone is None or not saved.exists(folder, NAME):
            return None
        try:
            head = cls.read(folder)
        except RecognizerError as error:
            log.warning("The personal head is not used: %s", error)
            return None
        record = head.record
        if (record.features, record.taxonomy) != (features_digest(recipe), taxonomy):
            log.warning(
                "The personal head belongs to an earlier recognizer; `hanse-client personalize` learns it anew."
            )
            return None
        if head.weight.shape[1] != recipe.feature_dimension:
            log.warning("The personal head does not fit the recognizer's features; it is not used.")
            return None
        return head if record.judgement.better else None


def forget(folder: Path) -> bool:
    """Remove the head in `folder`; return whether there was one. Raises `RecognizerError` when the disk fails."""
    return saved.remove(folder, NAME)


def features_digest(recipe: Recipe) -> str:
    """Return what names the features that a head of `recipe` reads, in hexadecimal: preprocessing, backbone, centre.

    Raises `ValueError` without a backbone.
    """
    centre = bytes.fromhex(recipe.centre) if recipe.centre else b""
    return hashlib.sha256(recipe.embedding_digest() + centre).hexdigest()


def in_own_words(
    shared: NDArray[np.float64], class_of: tuple[int | None, ...], shares: tuple[float, ...]
) -> NDArray[np.float64]:
    """Return what the shared head says, `shared` (n, classes), of the shop's labels: (n, labels).

    Rows sum to 1, or are zero where it gives all labels nothing.
    """
    columns = np.array([0 if index is None else index for index in class_of])
    parts = np.array([0.0 if index is None else share for index, share in zip(class_of, shares, strict=True)])
    words = shared[:, columns] * parts
    total = words.sum(axis=1, keepdims=True)
    divided: NDArray[np.float64] = words / np.where(total > 0, total, 1.0)
    return divided


def mixed(own: NDArray[np.float64], words: NDArray[np.float64], blend: float) -> NDArray[np.float64]:
    """Return blend·own + (1 − blend)·words, (n, labels); where the words are all zero, `own`."""
    mixture: NDArray[np.float64] = np.where(
        words.any(axis=1, keepdims=True), blend * own + (1.0 - blend) * words, own
    )
    return mixture


def softmax(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return the softmax of each row of `logits`, in float64."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    probabilities: NDArray[np.float64] = shifted / shifted.sum(axis=1, keepdims=True)
    return probabilities
