"""How well products are found that no training saw, by each embedding: a table.

    figures = run_study(Study(), Path("results/search"), Path(".data/fashion-mnist"), grocery=None)
    print(table(figures))

Columns are the *backbone*'s features as they are; the *league*'s embedding, features seen from the centre that the
league learned under privacy (`hanse_common.vision.centring`); on top of it a *personal* metric that a shop learns of
its own products (`hanse_client.personal.metric`), which leaves it never and is used where the shop's own photos and its
owner's corrections speak for it; the same metric *always*, whatever these say; and a league *projection* to 256
numbers, a candidate that the product does not have: docs/search.md says why.

Rows are recall at 1 and 5, and the area under the ROC curve of rejection: the best match's similarity tells photos of
products in the catalog from photos of others. *Same shop*: gallery and queries are photos of one style. *Across shops*:
queries are of another. Each repetition has other queries or other products; differences to the backbone are paired.

The projection is whitening of what changes between views of one photo [1], learned from one noisy sum [2]: with d the
difference of two views' embeddings in the span of 256 principal directions, a photo contributes ddᵀ/‖d‖², whose
Frobenius norm is 1, and with S the noisy mean an embedding x becomes (S + λI)^(−1/2)·x at norm 1.

References
[1] Hatch, Kajarekar, Stolcke 2006, "Within-Class Covariance Normalization for SVM-based Speaker Recognition".
[2] Dwork, Talwar, Thakurta, Zhang 2014, "Analyze Gauss: Optimal Bounds for Privacy-Preserving PCA".
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from hanse_client.exact_sums import ExactSums
from hanse_client.examples import Examples
from hanse_client.gallery.rejection import auroc
from hanse_client.personal.metric import PersonalMetric
from hanse_client.personal.metric_judging import Asked
from hanse_client.personal.metric_learning import learned_from
from hanse_common.privacy.calibration import noise_multiplier
from hanse_common.privacy.mechanism import Mechanism
from hanse_common.vision.centring import Centre
from hanse_common.vision.recipe import Recipe
from hanse_common.vision.taxonomy import Taxonomy
from hanse_simulations.search_trials import (
    Floats,
    League,
    Situation,
    Study,
    Trial,
    fashion_trials,
    grocery_trials,
)
from hanse_simulations.seeded import SeededRandomness

COLUMNS = ("backbone", "league", "personal", "always", "projection")
METRICS = ("recall_at_1", "recall_at_5", "rejection_auroc")

DELTA = 1e-5
"""δ of the centre and of the projection, each."""

RIDGE = 0.3
"""λ over the mean of S's eigenvalues."""

_CHUNK = 512

Embedding = Callable[[Floats], Floats]


@dataclass(frozen=True)
class Scores:
    """Recall at 1 and at 5 of the queries, and the area under the ROC curve of rejection."""

    recall_at_1: float
    recall_at_5: float
    rejection_auroc: float


@dataclass(frozen=True)
class Row:
    """One metric on one dataset: for each column the mean over repetitions, in [0, 1].

    `differences` are to the backbone, `intervals` half the width of their 95 % confidence intervals (Student's t).
    """

    data: str
    situation: Situation
    metric: str
    repetitions: int
    means: dict[str, float]
    differences: dict[str, float]
    intervals: dict[str, float]


@dataclass(frozen=True)
class Measured:
    """The scores of each column in one trial, and whether the personal metric serves."""

    scores: dict[str, Scores]
    serves: bool


@dataclass
class _Found:
    scores: dict[str, list[Scores]] = field(default_factory=lambda: {column: [] for column in COLUMNS})
    serves: int = 0


def run_study(study: Study, folder: Path, fashion: Path, grocery: Path | None) -> dict[str, Any]:
    """Return the table's `rows`, as `Row` has them, and the `study`'s numbers; photos' features stay in `folder`.

    `personal` says in how many repetitions the personal metric serves.

    Fashion-MNIST is in, or fetched to, `fashion`; the Grocery Store Dataset in `grocery`, and left out without. Raises
    `DatasetUnavailable` when either cannot be had.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cache = folder / "embeddings.sqlite"
    found: dict[tuple[str, Situation], _Found] = {}
    trials = [("Fashion-MNIST, invented styles", fashion_trials(study, cache, fashion))]
    if grocery is not None:
        trials.append(("groceries", grocery_trials(study, cache, grocery)))
    for name, each in trials:
        for number, (situation, league, trial) in enumerate(each):
            kept = found.setdefault((name, situation), _Found())
            one = measured(study, league, trial, f"{name} {number}")
            kept.serves += one.serves
            for column, scores in one.scores.items():
                kept.scores[column].append(scores)
    rows = [row for (name, situation), kept in found.items() for row in _rows(name, situation, kept.scores)]
    numbers = {key: value for key, value in vars(study).items() if not isinstance(value, Recipe)}
    personal = [
        {
            "data": name,
            "situation": situation,
            "repetitions": len(kept.scores["personal"]),
            "serves": kept.serves,
        }
        for (name, situation), kept in found.items()
    ]
    return {
        "rows": [asdict(row) for row in rows],
        "personal": personal,
        "study": numbers | {"delta": DELTA},
    }


def measured(study: Study, league: League, trial: Trial, name: str) -> Measured:
    """Return what is measured of one trial. `name` keeps the noise of trials apart."""
    centre = learned_centre(study, league.photos, SeededRandomness(study.seed, f"centre {name}"))

    def seen(features: Floats) -> Floats:
        return centre.apply(features, 1.0)

    projection = learned_projection(
        study, seen(league.photos), seen(league.views), SeededRandomness(study.seed, f"projection {name}")
    )
    metric = learned_metric(trial, seen)

    def moved(features: Floats) -> Floats:
        return seen(features) if metric is None else metric.apply(seen(features))

    serves = metric is not None and metric.record.serves
    scores = {
        "backbone": scored(trial, unit),
        "league": scored(trial, seen),
        "personal": scored(trial, moved if serves else seen),
        "always": scored(trial, moved),
        "projection": scored(trial, lambda rows: unit((seen(rows) @ projection).astype(np.float32))),
    }
    return Measured(scores, serves)


def learned_metric(trial: Trial, seen: Embedding) -> PersonalMetric | None:
    """Return what the shop learns and judges by its own photos and its corrections, None where these are too few."""
    corrections, corrected = seen(trial.corrections), trial.corrected_products
    asked = Asked(corrections, corrected, seen(trial.gallery), trial.gallery_products)
    rows, products = (
        np.concatenate([seen(trial.own), corrections]),
        np.concatenate([trial.own_products, corrected]),
    )
    return learned_from(rows, products, bytes(32), asked).metric


def learned_centre(study: Study, features: Floats, randomness: SeededRandomness) -> Centre:
    """Return the centre of `features`, (n, F), with the noise of `study.centre_epsilon`, as mode `mean` learns it."""
    mean = _noisy_mean([features], len(features), features.shape[1], study.centre_epsilon, randomness)
    return Centre(mean.astype(np.float32), study.centre_epsilon, DELTA)


def learned_projection(
    study: Study, photos: Floats, views: Floats, randomness: SeededRandomness
) -> NDArray[np.float64]:
    """Return a matrix, (F, k), that embeddings are multiplied by, from embeddings of photos and of their views, (n, F).

    The 256 directions are the photos' principal ones without noise, which no league has: that is in its favour.
    """
    double = photos.astype(np.float64)
    _, vectors = np.linalg.eigh(double.T @ double)
    basis = vectors[:, : -study.dimensions - 1 : -1]
    size = basis.shape[1]
    upper = np.triu_indices(size)
    # Each number off the diagonal stands for two, so that the vector is as long as the matrix.
    weights = np.where(upper[0] == upper[1], 1.0, np.sqrt(2.0))
    differences = (views - photos) @ basis

    def outer_products() -> Iterator[Floats]:
        for start in range(0, len(differences), _CHUNK):
            part = differences[start : start + _CHUNK]
            yield (part[:, upper[0]] * part[:, upper[1]] * weights).astype(np.float32)

    mean = _noisy_mean(outer_products(), len(photos), len(weights), study.projection_epsilon, randomness)
    scatter = np.zeros((size, size))
    scatter[upper[1], upper[0]] = mean / weights  # eigh reads the lower triangle
    values, directions = np.linalg.eigh(scatter)
    scales = (np.maximum(values, 0.0) + RIDGE / size) ** -0.5  # S has trace 1, but for the noise
    matrix = basis @ (directions * scales) @ directions.T
    return np.asarray(matrix, dtype=np.float64)


def scored(trial: Trial, embedding: Embedding) -> Scores:
    """Return how well `embedding` finds the trial's products, each compared by the mean of its photos at norm 1."""
    gallery = embedding(trial.gallery)
    products, places = np.unique(trial.gallery_products, return_inverse=True)
    sums = np.zeros((len(products), gallery.shape[1]), dtype=np.float64)
    np.add.at(sums, places, gallery)
    prototypes = unit(sums.astype(np.float32))
    cosines = embedding(trial.queries) @ prototypes.T
    own = np.take_along_axis(cosines, np.searchsorted(products, trial.query_products)[:, None], axis=1)
    better = np.sum(cosines >= own, axis=1) - 1  # a tie is no find
    strange = (embedding(trial.strangers) @ prototypes.T).max(axis=1)
    return Scores(
        recall_at_1=float(np.mean(better < 1)),
        recall_at_5=float(np.mean(better < 5)),
        rejection_auroc=auroc(cosines.max(axis=1), strange),
    )


def unit(rows: Floats) -> Floats:
    """Return `rows`, (n, F), at norm 1; zeros stay zero."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.where(norms > 0, norms, 1.0), dtype=np.float32)


def table(figures: Mapping[str, Any]) -> str:
    """Return the rows as a Markdown table, in per cent; in brackets the difference to the backbone.

    Below it, where the personal metric serves.
    """
    names = {"recall_at_1": "recall@1", "recall_at_5": "recall@5", "rejection_auroc": "rejection AUROC"}
    lines = [
        f"| photos | search | figure | {' | '.join(COLUMNS)} |",
        f"|{'---|' * (3 + len(COLUMNS))}",
    ]
    for row in figures["rows"]:
        cells = [f"{100 * row['means']['backbone']:.1f}"] + [
            f"{100 * row['means'][column]:.1f} ({100 * row['differences'][column]:+.1f} ± "
            f"{100 * row['intervals'][column]:.1f})"
            for column in COLUMNS[1:]
        ]
        first = [row["data"], row["situation"], names[row["metric"]]]
        lines.append(f"| {' | '.join(first + cells)} |")
    lines += ["", "The personal metric serves"]
    lines += [
        f"- {each['data']}, {each['situation']}: in {each['serves']} of {each['repetitions']}"
        for each in figures["personal"]
    ]
    return "\n".join(lines)


def _rows(data: str, situation: Situation, scores: Mapping[str, Sequence[Scores]]) -> Iterator[Row]:
    for metric in METRICS:
        values = {column: np.array([getattr(one, metric) for one in scores[column]]) for column in COLUMNS}
        count = len(values["backbone"])
        paired = {column: values[column] - values["backbone"] for column in COLUMNS}
        reach = float(stats.t.ppf(0.975, count - 1)) / count**0.5
        yield Row(
            data=data,
            situation=situation,
            metric=metric,
            repetitions=count,
            means={column: float(found.mean()) for column, found in values.items()},
            differences={column: float(found.mean()) for column, found in paired.items()},
            intervals={column: reach * float(found.std(ddof=1)) for column, found in paired.items()},
        )


def _noisy_mean(
    chunks: Iterable[Floats], count: int, dimension: int, epsilon: float, randomness: SeededRandomness
) -> NDArray[np.float64]:
    """Return the mean of `count` rows, each scaled to norm 1, by the sum and the mechanism of mode `mean`, (d,)."""
    mechanism = _mechanism(epsilon, dimension)
    taxonomy, recipe = Taxonomy(classes=("any", "other")), Recipe()
    total = np.zeros(dimension, dtype=np.int64)
    for rows in chunks:
        examples = Examples.of(rows, np.zeros(len(rows), dtype=np.int64), "cpu")
        sums = ExactSums(recipe, taxonomy, examples)
        total += sums.feature_sum(np.arange(len(rows)), mechanism.grid)
    return mechanism.release(total, randomness) / count


@lru_cache
def _mechanism(epsilon: float, dimension: int) -> Mechanism:
    """Return the one step that releases a sum of rows of norm 1 for `epsilon`."""
    noise = noise_multiplier(
        epsilon=epsilon, delta=DELTA, sampling_rate=1.0, steps=1, clipping_norm=1.0, dimension=dimension
    )
    return Mechanism(1.0, dimension, noise, sampling_rate=1.0, steps=1)
