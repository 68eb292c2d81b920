"""From the shop's own labels to a head of its own, on this machine alone.

    with Corrections(config.corrections_path) as corrections:
        learned = learn(Shop(config), recognizer, corrections)
    learned.head.record.judgement          # beside the shared one, on photos held out
    learned.head.save(config.personal_path)

The linear head is multinomial logistic regression over the features that the recognizer's own head reads, as for
`compare`: without noise, since it never leaves. Its regularisation, and then its share in the mixture with the shared
head, are those that do best in five-fold cross-validation among the training photos; of equals the strictest, and the
most of the shared one. Without photos enough for that the share is `UNTRIED`.

A photo that the owner corrected counts once: a picture of the catalog that is the same by its features gives way to the
correction, which takes its side, so that none is trained on and judged by.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import cross_val_predict

from hanse_client.compare import (
    SIGNIFICANCE,
    choose_strength,
    embed_for,
    fit_head,
    folds,
    product_gains,
    searched,
    sign_test,
    unfitted_head,
)
from hanse_client.embeddings import Progress
from hanse_client.personal import saved
from hanse_client.personal.corrections import Corrections
from hanse_client.personal.head import (
    MAX_LABELS,
    MIN_PHOTOS,
    HeadRecord,
    Judgement,
    PersonalHead,
    features_digest,
    in_own_words,
    mixed,
)
from hanse_client.personal.photos import LabelledPhotos, copies, gather
from hanse_client.shop import Shop
from hanse_common.errors import RecognizerError
from hanse_common.vision.recognizer import Recognizer

BLENDS: Final = (0.25, 0.5, 0.75, 1.0)
"""The shares of the shop's own head that cross-validation chooses from."""

UNTRIED: Final = 0.5
"""The share where there are too few photos to choose."""


@dataclass(frozen=True)
class Examples:
    """Features, (n, F), and of each row what the shared head says, its label's index, its side, its product.

    `corrected` are the rows whose label is a correction.
    """

    features: NDArray[np.float32]
    shared: NDArray[np.float64]
    index: NDArray[np.int64]
    held_out: NDArray[np.bool_]
    products: tuple[str | None, ...]
    corrected: NDArray[np.bool_]

    def take(self, rows: NDArray[Any]) -> "Examples":
        """Return those of `rows`, indices or a mask."""
        chosen = np.arange(len(self.index))[rows]
        return Examples(
            self.features[chosen],
            self.shared[chosen],
            self.index[chosen],
            self.held_out[chosen],
            tuple(self.products[row] for row in chosen),
            self.corrected[chosen],
        )


@dataclass(frozen=True)
class Learned:
    """What came out. `head` is None when there are not two labels of `MIN_PHOTOS` training photos.

    `rare` has the labels with fewer, and how many; `unjudged` counts photos held out whose label no head learns;
    `corrections` those whose label it does; `problems` names photos that could not be decoded.
    """

    head: PersonalHead | None
    rare: dict[str, int] = field(default_factory=dict)
    unjudged: int = 0
    corrections: int = 0
    problems: tuple[str, ...] = ()


def learn(
    shop: Shop,
    recognizer: Recognizer,
    corrections: Corrections,
    progress: Progress = lambda done, total: None,
) -> Learned:
    """Return a head learned from the shop's labels, for `recognizer`; nothing is saved.

    Raises `RecognizerError` for a recognizer without an embedding, and as `gather` and `embed` do.
    """
    if recognizer.card.recipe.backbone is None:
        raise RecognizerError(
            "The recognizer was trained whole, without a public backbone: there are no features for a head of your own."
        )
    found = gather(shop, corrections)
    embedded = embed_for(shop, recognizer, found.photos, progress)
    kept = embedded.kept
    examples = Examples(
        embedded.features,
        recognizer.probabilities(embedded.features),
        found.index[kept],
        found.held_out[kept],
        tuple(found.products[row] for row in kept),
        kept >= found.from_catalog,
    )
    return replace(fit(without_copies(examples), found, recognizer), problems=embedded.problems)


def fit(examples: Examples, found: LabelledPhotos, recognizer: Recognizer) -> Learned:
    """Return the head that `examples`, whose labels are those of `found`, teach, judged by those held out."""
    counts = np.bincount(examples.index[~examples.held_out], minlength=len(found.labels))
    known = np.sort(np.argsort(-counts, kind="stable")[:MAX_LABELS])
    known = known[counts[known] >= MIN_PHOTOS]
    rare = {
        found.labels[number]: int(counts[number]) for number in np.setdiff1d(np.arange(len(counts)), known)
    }
    if len(known) < 2:
        return Learned(None, rare)
    place = np.full(len(counts), -1)
    place[known] = np.arange(len(known))
    examples = replace(examples, index=place[examples.index])
    unjudged = int(np.sum(examples.held_out & (examples.index < 0)))
    examples = examples.take(examples.index >= 0)
    training, tested = examples.take(~examples.held_out), examples.take(examples.held_out)

    class_of = tuple(found.class_of[number] for number in known)
    shares = _shares(class_of, counts[known])
    strength = choose_strength(training.features, training.index)
    weight, bias = _linear(fit_head(training.features, training.index, strength))
    blend = UNTRIED
    if strength is not None:
        blend = _choose_blend(training, in_own_words(training.shared, class_of, shares), strength)
    arrays = {"weight": weight, "bias": bias}
    record = HeadRecord(
        arrays=saved.digest_of(arrays),
        features=features_digest(recognizer.card.recipe),
        taxonomy=recognizer.card.taxonomy,
        labels=tuple(found.labels[number] for number in known),
        class_of=class_of,
        shares=shares,
        photos=tuple(int(count) for count in counts[known]),
        blend=blend,
        strength=strength,
        judgement=Judgement(photos=0, shared_right=0, own_right=0, differing=0, p_value=1.0, better=False),
        recognizer=recognizer.digest().hex(),
        created=datetime.now(UTC),
    )
    head = PersonalHead(record, weight, bias)
    words = in_own_words(tested.shared, class_of, shares)
    own = head.probabilities(tested.features, tested.shared)
    judged = judge(tested.index, words, own, tested.products)
    head = replace(head, record=record.model_copy(update={"judgement": judged}))
    return Learned(head, rare, unjudged, int(examples.corrected.sum()))


def judge(
    index: NDArray[np.int64],
    shared: NDArray[np.float64],
    own: NDArray[np.float64],
    products: Sequence[str | None],
) -> Judgement:
    """Return how `shared` and `own`, each (n, labels), do on photos whose labels are `index`, (n,).

    Where the shared head gives all labels nothing, it is wrong.
    """
    shared_right = (shared.argmax(axis=1) == index) & shared.any(axis=1)
    own_right = own.argmax(axis=1) == index
    gains = product_gains(own_right.astype(np.int64) - shared_right, products)
    p_value = sign_test(gains)
    return Judgement(
        photos=len(index),
        shared_right=int(shared_right.sum()),
        own_right=int(own_right.sum()),
        differing=sum(gain != 0 for gain in gains),
        p_value=p_value,
        better=p_value < SIGNIFICANCE and bool(own_right.sum() > shared_right.sum()),
    )


def without_copies(examples: Examples) -> Examples:
    """Return `examples` in which a correction stands in for the catalog's photo that is the same picture."""
    corrected, others = np.flatnonzero(examples.corrected), np.flatnonzero(~examples.corrected)
    same = copies(examples.features[corrected], examples.features[others])
    held_out, products = examples.held_out.copy(), list(examples.products)
    gone = np.zeros(len(held_out), dtype=np.bool_)
    for row, place in zip(corrected.tolist(), same.tolist(), strict=True):
        if place >= 0:
            original = others[place]
            gone[original] = True
            held_out[row], products[row] = held_out[original], products[original]
    return replace(examples, held_out=held_out, products=tuple(products)).take(~gone)


def _shares(class_of: Sequence[int | None], counts: NDArray[np.int64]) -> tuple[float, ...]:
    """Return the part of each label in the photos of its class, 0 for one without."""
    totals: dict[int, int] = {}
    for index, count in zip(class_of, counts.tolist(), strict=True):
        if index is not None:
            totals[index] = totals.get(index, 0) + count
    return tuple(
        0.0 if index is None else count / totals[index]
        for index, count in zip(class_of, counts.tolist(), strict=True)
    )


def _linear(pipeline: Any) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the weight, (L, F), and bias, (L,), of scaling and regression in one; of two labels the first is zero."""
    scaler, regression = pipeline[0], pipeline[1]
    weight = regression.coef_ / scaler.scale_
    bias = regression.intercept_ - weight @ scaler.mean_
    if len(bias) == 1:
        weight, bias = np.vstack([np.zeros_like(weight), weight]), np.array([0.0, bias[0]])
    return np.ascontiguousarray(weight, dtype=np.float32), np.ascontiguousarray(bias, dtype=np.float32)


def _choose_blend(training: Examples, words: NDArray[np.float64], strength: float) -> float:
    """Return the one of `BLENDS` that gets most right in cross-validation, the smallest of equals."""
    rows = searched(training.index)
    if rows is None:
        return UNTRIED
    labels = training.index[rows]
    with warnings.catch_warnings():
        # A label may have fewer photos than there are folds, and a hard fit may not converge in time.
        warnings.simplefilter("ignore", UserWarning)
        own = cross_val_predict(
            unfitted_head(strength), training.features[rows], labels, cv=folds(), method="predict_proba"
        )
    said = np.zeros((len(rows), words.shape[1]))
    said[:, np.unique(labels)] = own
    right = [int(np.sum(mixed(said, words[rows], blend).argmax(axis=1) == labels)) for blend in BLENDS]
    return BLENDS[int(np.argmax(right))]
