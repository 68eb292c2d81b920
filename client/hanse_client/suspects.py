"""Photos whose label the recognizer doubts: shown to the merchant, who alone can say which of the two is right.

    predicted = predict(recognizer, records, cache)
    doubts = confident_disagreements(predicted.probabilities, labels)

A photo is a suspect by the thresholds of confident learning [1]. A class's threshold is the mean probability that the
recognizer gives that class on the photos labelled so: what being sure looks like for *this* class. A label is suspect
when the recognizer's answer is another class and reaches that class's threshold, while the label stays below its own.
So no number has to be chosen, and a class of which the recognizer is never very sure is not suspected whole.

Measured on 5 000 photos of Fashion-MNIST, 5 % of their labels replaced at random: a recognizer that is right for 89 %
of photos suspects 393, among them 79 % of the wrong labels; 53 % of its suspects are wrong, 94 % of the first half. One
that is right for 63 % suspects 252, among them 47 % of the wrong labels; 87 % of the first half are wrong. So the list
is in order of doubt.

A recognizer that knows little of a shelf would doubt everything on it. So nothing is suspected while it agrees with the
labels of half the photos or fewer, each class counting the same (`MIN_AGREEMENT`).

The rule wants predictions of a model that did not learn from these very labels. A recognizer of a league may have
learned from the shop's photos among others; as it did so with differential privacy, it remembers little of a single
one.

Everything is computed on this machine, and nothing that trains looks at it: a photo's fate depends on that photo alone.

[1] Northcutt, Jiang, Chuang, "Confident Learning: Estimating Uncertainty in Dataset Labels", JAIR 70, 2021,
    section 3.1.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from hanse_client.catalog import Record
from hanse_client.embeddings import EmbeddingCache, Progress, embed
from hanse_common.vision.model import build, load_vector
from hanse_common.vision.recognizer import Recognizer

MIN_AGREEMENT = 0.5
"""Mean share of a class's photos that the recognizer takes for that class, at or below which it can't judge labels."""

_BATCH = 1024


@dataclass(frozen=True)
class Predicted:
    """`probabilities` (m, classes) float64: row i belongs to record `kept[i]`; the other records can't be decoded."""

    probabilities: NDArray[np.float64]
    kept: NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Doubt:
    """The photo at `index`, labelled `label`, may be of class `instead`: probabilities `given` and `likelier`."""

    index: int
    label: int
    instead: int
    given: float
    likelier: float


def predict(
    recognizer: Recognizer,
    records: Sequence[Record],
    cache: EmbeddingCache,
    *,
    device: str = "cpu",
    progress: Progress = lambda done, total: None,
) -> Predicted:
    """Return what `recognizer` says of `records`, as `Recognizer.predict` would; embeddings in `cache` are used.

    `progress` hears (done, total). Raises `RecognizerError` when the backbone cannot be loaded, `CatalogError` when the
    cache cannot be used.
    """
    recipe = recognizer.card.recipe
    embedded = embed(
        records,
        recipe,
        cache,
        device=device,
        weights=recognizer.backbone_weights,
        whitening=recognizer.whitening,
        centre=recognizer.centre,
        progress=progress,
    )
    module = build(recipe, len(recognizer.card.taxonomy.classes))
    load_vector(module, recognizer.vector)
    module.to(device).eval()
    rows = [np.empty((0, len(recognizer.card.taxonomy.classes)))]
    with torch.inference_mode():
        for first in range(0, len(embedded.features), _BATCH):
            logits = module(torch.from_numpy(embedded.features[first : first + _BATCH]).to(device))
            rows.append(torch.softmax(logits.double(), dim=1).cpu().numpy())
    return Predicted(np.concatenate(rows), embedded.kept)


def agreement(probabilities: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    """Return the share of photos whose label is the likeliest class, averaged over the classes that `labels` has.

    `probabilities` (n, classes), `labels` (n,) with n ≥ 1: guessing gets one in the number of classes.
    """
    hits = probabilities.argmax(axis=1) == labels
    return float(np.mean([hits[labels == label].mean() for label in np.unique(labels)]))


def confident_disagreements(
    probabilities: NDArray[np.float64], labels: NDArray[np.int64]
) -> tuple[Doubt, ...]:
    """Return the photos whose label is suspect, the least probable label first.

    `probabilities` (n, classes), `labels` (n,). A class without photos has the mean of the others' thresholds.
    """
    if not len(labels):
        return ()
    present = np.unique(labels)
    own = {int(label): float(probabilities[labels == label, label].mean()) for label in present}
    thresholds = np.full(probabilities.shape[1], np.mean(list(own.values())))
    thresholds[list(own)] = list(own.values())
    rows, answers = np.arange(len(labels)), probabilities.argmax(axis=1)
    given, likelier = probabilities[rows, labels], probabilities[rows, answers]
    suspect = (answers != labels) & (likelier >= thresholds[answers]) & (given < thresholds[labels])
    found = np.flatnonzero(suspect)
    found = found[np.argsort(given[found], kind="stable")]
    return tuple(
        Doubt(
            int(index),
            int(labels[index]),
            int(answers[index]),
            float(given[index]),
            float(likelier[index]),
        )
        for index in found
    )
