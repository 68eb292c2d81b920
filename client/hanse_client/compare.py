"""The league's recognizer beside one that a shop trains alone, on the shop's own held-out photos.

    comparison = compare(Shop(config), Recognizer.load(folder))
    comparison.verdict, comparison.league.accuracy, comparison.alone.low, comparison.p_value

**The opponent** is a generous one. It is a linear head over the same embeddings, trained on the shop's training photos
by multinomial logistic regression, with the regularisation that does best in five-fold cross-validation among those
photos alone, and **without the noise** that protects them: it never leaves this machine, so nothing is charged for it.
What it cannot have is what others know: of a class without a training photo it can say nothing.

**The figures.** An accuracy's 95 % interval is Wilson's [1]. Whether the difference is more than chance is for an exact
test of signs: were both recognizers alike, each product's difference could as well have the other sign. Where each
photo is a product of its own this is McNemar's exact test [2]; several photos of one product (`sku`) are judged
together, as they are right or wrong together. All is computed here, and nothing of it leaves.

References:
[1] Wilson 1927, "Probable Inference, the Law of Succession, and Statistical Inference".
[2] Dietterich 1998, "Approximate Statistical Tests for Comparing Supervised Classification Learning Algorithms",
    section 3.1.
"""

import math
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from hanse_client.catalog import Record
from hanse_client.embeddings import Embedded, EmbeddingCache, Photo, Progress, embed
from hanse_client.examples import resolve_device
from hanse_client.shop import Shop
from hanse_common.errors import CatalogError, ConfigError
from hanse_common.vision.metrics import ClassificationReport
from hanse_common.vision.model import build, load_vector
from hanse_common.vision.recognizer import Recognizer
from hanse_common.vision.taxonomy import Taxonomy

SIGNIFICANCE = 0.05
"""A difference that chance alone makes as often as this is no difference."""

DECISIVE = 6
"""The fewest products that differ by which the test can decide: 2·2⁻⁶ < 0.05 < 2·2⁻⁵."""

_Z = 1.959963984540054
"""The normal distribution's 97.5 % quantile."""

_PICTURED = 40
"""The most classes in a picture of what was taken for what."""

_FOLDS = 5
_STRENGTHS = tuple(10.0**power for power in range(-4, 3))
"""The inverse regularisations C that cross-validation chooses from, over features scaled to variance 1."""

_SEARCHED = 2500
"""The most photos that cross-validation reads: it fits the head 35 times."""

_SEED = 20_240

Verdict = Literal["league", "alone", "too few", "even"]


@dataclass(frozen=True)
class Score:
    """One recognizer on the held-out photos: `right` of them, and the 95 % interval of its accuracy."""

    right: int
    report: ClassificationReport
    low: float
    high: float

    @classmethod
    def of(cls, labels: NDArray[np.int64], probabilities: NDArray[np.floating[Any]]) -> Self:
        """Return the score on `labels`, (n,), of `probabilities`, (n, classes)."""
        report = ClassificationReport.of(labels, probabilities)
        right = int(np.trace(report.confusion))
        return cls(right, report, *wilson(right, report.examples))

    @property
    def accuracy(self) -> float:
        """The share of photos it gets right."""
        return self.report.accuracy


@dataclass(frozen=True)
class Confusion:
    """Counts of held-out photos, `league[row][column]` and `alone[row][column]`: a row for each true class.

    A last column called None has all classes that have none of their own. `hits[row]` is the column of the row's class.
    """

    rows: tuple[str, ...]
    columns: tuple[str | None, ...]
    hits: tuple[int, ...]
    league: list[list[int]]
    alone: list[list[int]]


@dataclass(frozen=True)
class Comparison:
    """What came out.

    `only_league` and `only_alone` count held-out photos that one of the two alone gets right, `differing` the products
    of which one gets more right. `trained` is the number of the shop's training photos of each class, `problems` names
    photos that could not be decoded. `strength` is the C of the one trained alone; None where it had one class only, or
    too few photos to choose.
    """

    taxonomy: Taxonomy
    league: Score
    alone: Score
    only_league: int
    only_alone: int
    differing: int
    p_value: float
    trained: tuple[int, ...]
    strength: float | None
    problems: tuple[str, ...] = ()

    @property
    def photos(self) -> int:
        """How many photos are held out."""
        return self.league.report.examples

    @property
    def difference(self) -> float:
        """By how much more of the photos the league's recognizer gets right, in [−1, 1]."""
        return (self.league.right - self.alone.right) / self.photos

    @property
    def more(self) -> str:
        """How many more of 100 photos the better one gets right, as it is told."""
        hundred = abs(100 * self.difference)
        return f"{hundred:.0f}" if hundred >= 9.95 else f"{hundred:.1f}".removesuffix(".0")

    @property
    def verdict(self) -> Verdict:
        """Which one is better, if that can be told: `even` where photos enough leave it open."""
        if self.p_value < SIGNIFICANCE:
            return "league" if self.difference > 0 else "alone"
        return "too few" if self.differing < DECISIVE else "even"

    @property
    def shown(self) -> tuple[int, ...]:
        """The classes of held-out photos."""
        return tuple(c for c, figures in enumerate(self.league.report.per_class) if figures.support)

    @property
    def unknown(self) -> tuple[str, ...]:
        """The classes of which there is no training photo."""
        return tuple(
            name for name, count in zip(self.taxonomy.classes, self.trained, strict=True) if not count
        )

    def confusion(self) -> "Confusion":
        """Return what was taken for what, by the classes with the most held-out photos."""
        league, alone = self.league.report.confusion, self.alone.report.confusion
        is_, said = league.sum(axis=1), league.sum(axis=0) + alone.sum(axis=0)
        ranked = [int(c) for c in np.lexsort((-said, -is_)) if is_[c] or said[c]]
        columns, others = sorted(ranked[:_PICTURED]), ranked[_PICTURED:]
        rows = [c for c in columns if is_[c]]
        counts = [
            np.column_stack([table[rows][:, columns], table[rows][:, others].sum(axis=1)])
            for table in (league, alone)
        ]
        if not others:
            counts = [table[:, :-1] for table in counts]
        names = self.taxonomy.classes
        return Confusion(
            rows=tuple(names[c] for c in rows),
            columns=(*(names[c] for c in columns), *([None] if others else [])),
            hits=tuple(columns.index(c) for c in rows),
            league=counts[0].tolist(),
            alone=counts[1].tolist(),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the comparison as what `json.dumps` takes."""
        plain = {
            key: value for key, value in vars(self).items() if key not in ("taxonomy", "league", "alone")
        }
        scores = {
            name: {"right": score.right, "low": score.low, "high": score.high, **score.report.to_json()}
            for name, score in (("league", self.league), ("alone", self.alone))
        }
        return {
            "classes": self.taxonomy.classes,
            "photos": self.photos,
            "verdict": self.verdict,
            "difference": self.difference,
            **plain,
            **scores,
        }


def compare(shop: Shop, recognizer: Recognizer, progress: Progress = lambda done, total: None) -> Comparison:
    """Return how `recognizer` and one trained on the shop's photos alone do on those held out.

    Raises:
        CatalogError: nothing is held out, or nothing is left to train on.
        ConfigError: the recognizer's classes are not the configuration's, or it has no embedding to compare over.
        RecognizerError: its backbone can't be loaded.
    """
    taxonomy, recipe = shop.config.league.taxonomy, recognizer.card.recipe
    if recognizer.card.taxonomy != taxonomy:
        raise ConfigError(
            f"recognizer: found one of the classes {_few(recognizer.card.taxonomy.classes)}; expected those of "
            f"league.taxonomy, {_few(taxonomy.classes)}. Name the league's present recognizer."
        )
    if recipe.backbone is None:
        raise ConfigError(
            "recognizer: found a net that was trained whole; expected one over a public backbone, from whose "
            "embeddings both can learn. A net trained on one shop's photos would be no fair opponent."
        )
    catalog = shop.catalog()
    _require_sides(catalog.train, catalog.holdout, shop)
    embedded = embed_for(shop, recognizer, catalog.records, progress)
    kept = [catalog.records[index] for index in embedded.kept]
    held_out = np.array([record.holdout for record in kept], dtype=bool)
    _require_sides([r for r in kept if not r.holdout], [r for r in kept if r.holdout], shop)
    labels = np.array([record.label for record in kept], dtype=np.int64)
    features, tested = embedded.features[held_out], labels[held_out]

    alone, strength = train_alone(
        embedded.features[~held_out], labels[~held_out], features, len(taxonomy.classes)
    )
    products = [record.sku for record in kept if record.holdout]
    return judge(
        taxonomy,
        tested,
        head_probabilities(recognizer, features),
        alone,
        products=products,
        trained=np.bincount(labels[~held_out], minlength=len(taxonomy.classes)).tolist(),
        strength=strength,
        problems=embedded.problems,
    )


def embed_for(
    shop: Shop,
    recognizer: Recognizer,
    photos: Sequence[Photo],
    progress: Progress = lambda done, total: None,
) -> Embedded:
    """Return the embeddings of `photos` that the recognizer's head reads, cached in the shop's state. See `embed`."""
    device = resolve_device(shop.config.device)
    with EmbeddingCache(shop.config.state / "embeddings.sqlite") as cache:
        return embed(
            photos,
            recognizer.card.recipe,
            cache,
            device=device,
            weights=shop.config.backbone_weights,
            whitening=recognizer.whitening,
            centre=recognizer.centre,
            memory=shop.config.resources.batch_bytes(device),
            progress=progress,
        )


def judge(
    taxonomy: Taxonomy,
    labels: NDArray[np.int64],
    league: NDArray[np.floating[Any]],
    alone: NDArray[np.floating[Any]],
    *,
    products: Sequence[str | None],
    trained: Sequence[int],
    strength: float | None = None,
    problems: tuple[str, ...] = (),
) -> Comparison:
    """Return the comparison of two recognizers' probabilities, each (n, classes), on `labels`, (n,).

    `products` names each photo's product; a photo whose product is None is one of its own.
    """
    right = [probabilities.argmax(axis=1) == labels for probabilities in (league, alone)]
    gains = right[0].astype(np.int64) - right[1]
    by_product = product_gains(gains, products)
    return Comparison(
        taxonomy,
        Score.of(labels, league),
        Score.of(labels, alone),
        only_league=int(np.sum(gains > 0)),
        only_alone=int(np.sum(gains < 0)),
        differing=sum(gain != 0 for gain in by_product),
        p_value=sign_test(by_product),
        trained=tuple(trained),
        strength=strength,
        problems=problems,
    )


def train_alone(
    features: NDArray[np.float32], labels: NDArray[np.int64], tested: NDArray[np.float32], classes: int
) -> tuple[NDArray[np.float64], float | None]:
    """Return what a head trained on `features`, (n, F), and `labels` says of `tested`: (m, classes), and its C.

    Without two classes to tell apart it always says the one it knows.
    """
    known = np.unique(labels)
    probabilities = np.zeros((len(tested), classes))
    if len(known) == 1:
        probabilities[:, known] = 1.0
        return probabilities, None
    strength = choose_strength(features, labels)
    probabilities[:, known] = fit_head(features, labels, strength).predict_proba(tested)
    return probabilities, strength


def fit_head(features: NDArray[np.float32], labels: NDArray[np.int64], strength: float | None) -> Any:
    """Return scikit-learn's pipeline of scaling and logistic regression, fitted with C = `strength`, 1 where None."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return unfitted_head(1.0 if strength is None else strength).fit(features, labels)


def head_probabilities(recognizer: Recognizer, features: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return what the recognizer says of embeddings `features`, (n, F): (n, classes), as `Recognizer.predict` does."""
    module = build(recognizer.card.recipe, len(recognizer.card.taxonomy.classes))
    load_vector(module, recognizer.vector)
    with torch.inference_mode():
        logits = module.eval()(torch.from_numpy(features))
        probabilities: NDArray[np.float64] = torch.softmax(logits.double(), dim=1).numpy()
    return probabilities


def wilson(right: int, of: int) -> tuple[float, float]:
    """Return the 95 % interval of a share of which `right` of `of` > 0 were seen [1]."""
    share, spread = right / of, _Z**2 / of
    centre = (share + spread / 2) / (1 + spread)
    half = math.sqrt(spread * (share * (1 - share) + spread / 4)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def sign_test(gains: Sequence[int]) -> float:
    """Return the two-sided p-value of `gains`: how often random signs make a |sum| as large as theirs, or larger."""
    sizes = [abs(gain) for gain in gains if gain]
    total = sum(sizes)
    chances = np.ones(1)  # of the sum of those with a positive sign
    for size in sizes:
        chances = 0.5 * (np.pad(chances, (0, size)) + np.pad(chances, (size, 0)))
    sums = np.abs(2 * np.arange(total + 1) - total)
    return min(1.0, float(chances[sums >= abs(sum(gains))].sum()))


def product_gains(gains: NDArray[np.integer[Any]], products: Sequence[str | None]) -> list[int]:
    """Return the sums of photos' `gains`, (n,), over each product; a photo whose product is None is one of its own."""
    by_product: Counter[object] = Counter()
    for index, (product, gain) in enumerate(zip(products, gains.tolist(), strict=True)):
        by_product[index if product is None else product] += gain
    return list(by_product.values())


def searched(labels: NDArray[np.int64]) -> NDArray[np.intp] | None:
    """Return the indices of the photos that cross-validation reads; None when there are too few for its folds."""
    chosen = np.arange(len(labels))
    if len(labels) > _SEARCHED:
        chosen, _ = train_test_split(chosen, train_size=_SEARCHED, random_state=_SEED)
    largest = sorted(Counter(labels[chosen].tolist()).values(), reverse=True)
    return None if len(largest) < 2 or largest[0] < _FOLDS or largest[1] < 2 else chosen


def folds() -> StratifiedKFold:
    """Return the folds of cross-validation."""
    return StratifiedKFold(_FOLDS, shuffle=True, random_state=_SEED)


def choose_strength(features: NDArray[np.float32], labels: NDArray[np.int64]) -> float | None:
    """Return the C that does best in cross-validation, the strictest of equals; None with too few photos to try."""
    chosen = searched(labels)
    if chosen is None:
        return None
    search = GridSearchCV(
        unfitted_head(1.0), {"logisticregression__C": _STRENGTHS}, cv=folds(), scoring="accuracy", refit=False
    )
    with warnings.catch_warnings():
        # A class may have fewer photos than there are folds.
        warnings.simplefilter("ignore", UserWarning)
        search.fit(features[chosen], labels[chosen])
    return float(search.best_params_["logisticregression__C"])


def unfitted_head(strength: float) -> Any:
    """Return the pipeline that `fit_head` fits."""
    return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000))


def _require_sides(train: Sequence[Record], holdout: Sequence[Record], shop: Shop) -> None:
    where, fraction = shop.config.photos, shop.config.holdout_fraction
    if not holdout:
        raise CatalogError(
            f"{where}: none of {len(train)} usable photos is held out (holdout_fraction: {fraction:g}), so there is "
            "nothing to compare on. Add photos, or raise holdout_fraction before the next training: photos that were "
            "trained on flatter."
        )
    if not train:
        raise CatalogError(
            f"{where}: all {len(holdout)} usable photos are held out, so none is left to train on. Add photos."
        )


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
