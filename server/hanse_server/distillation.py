"""A head for new features that says of public photos what a released recognizer says of them.

    vector, fidelity = distil(recognizer, recipe, public_images)
    vector.shape                  # (recipe.dimension(classes),): the recognizer's classes, in its order
    fidelity.agreement            # 0.97: the share of held-out photos that both give the same class

The last layer is fitted by ridge regression, in closed form and float64, to the recognizer's logits less their mean
over the classes, which softmax does not see: of all heads that say the same, that gives the smallest. Matching logits
is what distillation becomes at a high temperature (Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural
Network", section 2.1). The hidden layer of an MLP stays as the recipe's digest draws it: public random features
(Rahimi, Recht 2008).

Of five photos three are fitted, one chooses the ridge penalty, by the divergence it leaves; then four are fitted, and
what is said of faithfulness comes from the fifth, which had no part in either. Photos need no labels, but should look
like the merchants': about others the new head knows nothing.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.special import log_softmax

from hanse_common.errors import RecognizerError
from hanse_common.vision.backbones import load_backbone
from hanse_common.vision.centring import centred, load_centre
from hanse_common.vision.extraction import extract
from hanse_common.vision.model import initial_vector
from hanse_common.vision.recipe import Recipe
from hanse_common.vision.recipe_model import Mlp
from hanse_common.vision.recognizer import Recognizer

MIN_PHOTOS = 100
"""With fewer, a figure from one in five of them would say little."""

PENALTIES = tuple(10.0**exponent for exponent in range(-9, 1))
"""The ridge penalties that are tried, as parts of the sum of all squared features, each less its mean."""

_BATCH = 64

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Fidelity:
    """How alike the new head and the old recognizer judge `photos` public photos that were not fitted.

    `agreement` is the share to which both give the same class, `divergence` the mean Kullback-Leibler divergence of the
    new probabilities from the old ones, in nats. `penalty` is the chosen one of `PENALTIES`.
    """

    photos: int
    agreement: float
    divergence: float
    penalty: float


@dataclass(frozen=True)
class _Head:
    """A last layer: `weights` (classes, features) and `bias` (classes,), float64."""

    weights: Floats
    bias: Floats

    def logits(self, features: Floats) -> Floats:
        logits: Floats = features @ self.weights.T + self.bias
        return logits


def distil(
    recognizer: Recognizer,
    recipe: Recipe,
    photos: Iterable[Image.Image],
    *,
    whitening: Path | None = None,
    centre: Path | None = None,
    backbone_weights: Path | None = None,
) -> tuple[NDArray[np.float32], Fidelity]:
    """Return the parameters of `recipe`'s model for the classes of `recognizer`, (d,) float32, and their faithfulness.

    `photos` are public, decoded, and taken one by one: only their features, float32, stay in memory. `whitening`,
    `centre` and `backbone_weights` are the files of `recipe`. The same input gives the same bits on the same machine.

    Raises `RecognizerError` when the recipe has no backbone, for fewer than `MIN_PHOTOS` photos or photos that do not
    differ, for numbers that are not finite, and for files that are not the recipe's.
    """
    if recipe.backbone is None:
        raise RecognizerError(
            f"Model {recipe.model.name!r} is trained whole and cannot be fitted to what a recognizer says. Choose a "
            "recipe with a backbone, or start without a parent."
        )
    network = load_backbone(recipe, device=recognizer.device, weights=backbone_weights, whitening=whitening)
    middle = load_centre(recipe, centre)
    judged: list[Floats] = []
    raw = extract(network, _judging(photos, recognizer, judged), recipe.views, recognizer.device)
    if len(raw) < MIN_PHOTOS:
        raise RecognizerError(f"Found {len(raw)} public photos, expected at least {MIN_PHOTOS}; give more.")
    hidden, features = _last_inputs(
        recipe, centred(raw, recipe, middle), len(recognizer.card.taxonomy.classes)
    )
    _require_finite(features)
    head, fidelity = _fit(features, np.concatenate(judged))
    vector = np.concatenate([hidden, head.weights.ravel(), head.bias]).astype(np.float32)
    return vector, fidelity


def _judging(
    photos: Iterable[Image.Image], recognizer: Recognizer, judged: list[Floats]
) -> Iterator[Image.Image]:
    """Yield `photos`, and put the recognizer's probabilities of them, (n, classes), into `judged`, part by part."""
    source = iter(photos)
    while batch := list(islice(source, _BATCH)):
        judged.append(recognizer.predict(batch))
        yield from batch


def _last_inputs(
    recipe: Recipe, features: NDArray[np.float32], classes: int
) -> tuple[NDArray[np.float32], Floats]:
    """Return the parameters before the last layer, and what it sees of `features`, (n, inputs) float64."""
    if not isinstance(recipe.model, Mlp):
        return np.empty(0, dtype=np.float32), features.astype(np.float64)
    seed = int.from_bytes(recipe.digest()[:8], "big") >> 1
    first = initial_vector(recipe, classes, seed)[: recipe.dimension(0)]
    units = recipe.model.hidden
    weights, bias = first[:-units].reshape(units, -1), first[-units:]
    return first, np.tanh(features.astype(np.float64) @ weights.T + bias)


def _fit(features: Floats, teacher: Floats) -> tuple[_Head, Fidelity]:
    """Return the head that fits `teacher`, (n, classes) probabilities, on `features`, and how well it does."""
    fold = np.arange(len(features)) % 5
    reported, chosen = fold == 4, fold == 3
    targets = np.log(np.maximum(teacher, np.finfo(np.float64).tiny))
    targets -= targets.mean(axis=1, keepdims=True)
    small = fold < 3
    divergences = [
        _divergence(teacher[chosen], head.logits(features[chosen]))
        for head in _ridge(features[small], targets[small], PENALTIES)
    ]
    penalty = PENALTIES[int(np.argmin(divergences))]
    (head,) = _ridge(features[~reported], targets[~reported], (penalty,))
    logits = head.logits(features[reported])
    agreement = float((logits.argmax(1) == teacher[reported].argmax(1)).mean())
    return head, Fidelity(len(logits), agreement, _divergence(teacher[reported], logits), penalty)


def _ridge(features: Floats, targets: Floats, penalties: Iterable[float]) -> list[_Head]:
    """Return for each penalty the W, b that minimise ‖XWᵀ + b − Y‖² + λ‖W‖², with the bias free.

    Of the two Gram matrices the smaller is decomposed: (XᵀX + λI)⁻¹Xᵀ = Xᵀ(XXᵀ + λI)⁻¹.
    """
    middle, level = features.mean(0), targets.mean(0)
    x, y = features - middle, targets - level
    wide = x.shape[1] > x.shape[0]
    values, vectors = np.linalg.eigh(x @ x.T if wide else x.T @ x)
    total = float(np.sum(x * x))
    if total <= len(x) * np.finfo(np.float32).eps ** 2:
        raise RecognizerError(
            "The public photos do not differ in their features; give photos of many products."
        )
    rotated = vectors.T @ (y if wide else x.T @ y)
    heads = []
    for penalty in penalties:
        solution = vectors @ (rotated / (np.maximum(values, 0.0) + penalty * total)[:, None])
        weights = (x.T @ solution if wide else solution).T
        heads.append(_Head(weights, level - weights @ middle))
    return heads


def _divergence(teacher: Floats, logits: Floats) -> float:
    """Return the mean of KL(teacher ‖ softmax(logits)) over the rows, in nats."""
    known = np.log(np.maximum(teacher, np.finfo(np.float64).tiny))
    return float(np.sum(teacher * (known - log_softmax(logits, axis=1)), axis=1).mean())


def _require_finite(features: Floats) -> None:
    finite = np.isfinite(features).all(axis=1)
    if not finite.all():
        raise RecognizerError(
            f"Public photo {int(np.argmin(finite)) + 1}: found features that are not finite; leave it out."
        )
