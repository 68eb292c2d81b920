"""What each option that should make recognition robust does on real photos: with it beside without.

    study = load(Study, Path("simulations/studies/recognition.yaml"))
    figures = run_study(study, Path("GroceryStoreDataset/dataset"), Path("results/recognition"))
    print(table(study, figures))

Each *arm* is one recipe, trained at each ε with each seed by the sums, the noise and the server's optimizer of mode
`distributed`, all photos in one place (`central`); ε null is the same training without noise. Each *row* of the table
compares two arms on the same test photos, which may be degraded (`degradations`). Stopped, it goes on where it was.
"""

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray
from pydantic import Field, model_validator

from hanse_client.embeddings import EmbeddingCache, Photo, embed
from hanse_client.exact_sums import ExactSums
from hanse_client.examples import Examples
from hanse_common.config import ConfigPath, Section
from hanse_common.files import write_atomically
from hanse_common.modes import DistributedSchedule, DistributedTraining
from hanse_common.plan import Cohort, Plan, SignedPlan
from hanse_common.vision import model as models
from hanse_common.vision.fusion import fused
from hanse_common.vision.imbalance import class_offsets, class_rates, class_weights
from hanse_common.vision.metrics import ClassificationReport
from hanse_common.vision.recipe import Recipe
from hanse_common.vision.taxonomy import Taxonomy
from hanse_server.config import PlanSettings, PrivacyTarget, make_plan
from hanse_server.coordinator import RoundOutcome
from hanse_server.evaluation import Evaluator
from hanse_server.league import train
from hanse_server.optimizers import create
from hanse_server.storage import State
from hanse_simulations import datasets
from hanse_simulations.central import CentralRounds
from hanse_simulations.degradations import Degraded
from hanse_simulations.grocery import Grocery
from hanse_simulations.photos import ArrayPhoto
from hanse_simulations.seeded import RoundRandomness, seed_for

TAIL = 3
"""The rarest classes, whose recall is a metric."""

VIEWS = 3
"""Photos of one product that are fused."""

DELTA = 1e-5
"""δ of all trainings."""

Test = Literal["clean", "occlusion", "clutter", "light", "viewpoint"]
Metric = Literal["accuracy", "macro_recall", "tail_recall", "log_loss", "fused_accuracy"]
Floats = NDArray[np.float64]


class Steps(Section):
    """How an arm is trained: rounds of one step each, on a Poisson sample, with momentum and a falling rate."""

    rounds: Annotated[int, Field(ge=1, le=10_000)]
    sampling_rate: Annotated[float, Field(gt=0, le=1)]
    clipping_norm: Annotated[float, Field(gt=0)] = 1.0
    learning_rate: Annotated[float, Field(gt=0)]
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9


class Data(Section):
    """Photos to train on and to test with.

    `photos` is how many of the dataset's training photos are used, all by default. With `ratio` they are a long tail:
    the most frequent class has `photos` of them, the rarest a `ratio`-th of that, geometric in between (Cui et al.
    2019, section 5.1), and which class is how frequent follows from the seed.
    """

    dataset: Literal["grocery", "fashion-mnist"]
    photos: Annotated[int, Field(ge=1)] | None = None
    ratio: Annotated[float, Field(gt=1)] | None = None
    test_photos: Annotated[int, Field(ge=1)]
    steps: Steps


class Arm(Section):
    """One recipe on `data`, with what `vision.imbalance` makes of the classes' counts where that is given.

    `tests` are the test photos that it is tried on, besides clean ones.
    """

    data: str
    recipe: Recipe
    tests: tuple[Test, ...] = ()
    weights_beta: float | None = None
    offsets_temperature: float | None = None
    rates_power: float | None = None


class Row(Section):
    """One line of the table. `with_metric` is where the option is one of use, and the arm the same."""

    option: str
    against: str
    source: str
    without: str
    with_: Annotated[str, Field(alias="with")]
    test: Test = "clean"
    metric: Metric = "accuracy"
    with_metric: Metric | None = None


class Study(Section):
    """The whole file. Fashion-MNIST is in, or fetched to, `fashion_mnist`."""

    fashion_mnist: ConfigPath
    epsilons: Annotated[tuple[float | None, ...], Field(min_length=1)]
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=1 << 63)], ...], Field(min_length=1)]
    data: dict[str, Data]
    arms: dict[str, Arm]
    rows: tuple[Row, ...]

    @model_validator(mode="after")
    def _consistent(self) -> "Study":
        for name, arm in self.arms.items():
            if arm.data not in self.data:
                raise ValueError(
                    f"arms.{name}.data: found {arm.data}, expected one of {', '.join(self.data)}"
                )
        for index, row in enumerate(self.rows):
            for name in (row.without, row.with_):
                if name not in self.arms:
                    raise ValueError(f"rows.{index}: found {name}, expected one of arms")
                if row.test not in ("clean", *self.arms[name].tests):
                    raise ValueError(f"rows.{index}: {name} is not tried on {row.test}; add it to its tests")
        return self


@dataclass(frozen=True)
class Source:
    """One dataset: labels have shape (n,); `products` are the test photos' finer classes, whose photos are fused."""

    taxonomy: Taxonomy
    train: Sequence[Photo]
    train_labels: NDArray[np.int64]
    test: Sequence[Photo]
    test_labels: NDArray[np.int64]
    products: NDArray[np.int64]


class NoiselessRounds:
    """The rounds of `CentralRounds`, without noise; implements `hanse_server.league.Rounds`."""

    def __init__(self, plan: Plan, examples: Examples, randomness: RoundRandomness) -> None:
        self._plan = plan
        self._examples = examples
        self._sums = ExactSums(plan.recipe, plan.taxonomy, examples)
        self._randomness = randomness

    def run(self, round_: int, model: NDArray[np.float32]) -> RoundOutcome:
        """Return the outcome of one step from `model`, shape (d,)."""
        training, grid = self._plan.training, self._plan.mechanism(1).grid
        if not isinstance(training, DistributedTraining):
            raise ValueError(f"Expected a plan of mode distributed, found {training.mode}.")
        self._randomness.begin(round_)
        sample = self._examples.sample(
            "photo", training.sampling_rate, self._randomness, training.class_rates
        )
        seed = int(self._randomness.words(1)[0] >> np.uint64(1))
        exact = self._sums.sum(model.astype(np.float64), sample, grid, seed).astype(np.float64)
        return RoundOutcome(-exact * (grid.fine_unit / training.expected_batch), (), (), {}, {})


Tell = Callable[[str], None]


def run_study(
    study: Study, grocery: Path | None, folder: Path, tell: Tell = lambda text: None
) -> dict[str, dict[str, float]]:
    """Run what is left of `study`, and return each metric of each run, named "arm ε seed test".

    `grocery` is the folder of the Grocery Store Dataset; without it the arms that need it are left out. `folder` keeps
    embeddings and figures. Raises `DatasetUnavailable` without a dataset.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "figures.json"
    figures: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.exists() else {}
    for name, arm in study.arms.items():
        data = study.data[arm.data]
        wanted = [(epsilon, seed) for epsilon in study.epsilons for seed in study.seeds]
        left = [run for run in wanted if run_name(name, *run, "clean") not in figures]
        if not left or (data.dataset == "grocery" and grocery is None):
            continue
        source = _grocery(grocery) if data.dataset == "grocery" and grocery else _fashion(study.fashion_mnist)
        with EmbeddingCache(folder / "embeddings.sqlite") as cache:
            tests = _tests(arm, data, source, cache)
            for epsilon, seed in left:
                found = _measured(arm, data, source, tests, epsilon, seed, cache)
                figures |= {run_name(name, epsilon, seed, test): each for test, each in found.items()}
                write_atomically(path, json.dumps(figures, indent=1).encode())
                tell(f"{run_name(name, epsilon, seed, 'clean')}: {found['clean']['accuracy']:.4f}")
    return figures


def run_name(arm: str, epsilon: float | None, seed: int, test: str) -> str:
    """Return the name of one run's figures on one kind of test photos."""
    return f"{arm} {'-' if epsilon is None else format(epsilon, 'g')} {seed} {test}"


def table(study: Study, figures: Mapping[str, Mapping[str, float]]) -> str:
    """Return the rows of which there are figures as a table in Markdown: means over seeds ± standard deviation."""
    columns = ["no noise" if epsilon is None else f"ε = {epsilon:g}" for epsilon in study.epsilons]
    lines = [
        f"| option | against | measured | {' | '.join(columns)} | source |",
        f"|---|---|---|{'---|' * len(columns)}---|",
    ]
    for row in study.rows:
        cells = []
        for epsilon in study.epsilons:
            sides = []
            metrics = (row.metric, row.with_metric or row.metric)
            for arm, metric in zip((row.without, row.with_), metrics, strict=True):
                names = [run_name(arm, epsilon, seed, row.test) for seed in study.seeds]
                sides.append([figures[name][metric] for name in names if name in figures])
            if not all(sides):
                break
            scale = 1.0 if row.metric == "log_loss" else 100.0
            cells.append(" → ".join(_spread(scale * np.array(side), row.metric) for side in sides))
        if len(cells) == len(study.epsilons):
            measured = f"{row.metric.replace('_', ' ')}, {row.test} photos"
            lines.append(
                f"| {row.option} | {row.against} | {measured} | {' | '.join(cells)} | {row.source} |"
            )
    return "\n".join(lines)


def long_tail(data: Data, classes: int, seed: int) -> NDArray[np.int64]:
    """Return how many photos each class has in `data`'s long tail, shape (classes,)."""
    if data.ratio is None or data.photos is None:
        raise ValueError("expected data with photos and a ratio")
    falling = data.photos * data.ratio ** (-np.arange(classes) / (classes - 1))
    order = np.random.default_rng(seed_for(seed, "long tail")).permutation(classes)
    return np.maximum(1, np.round(falling)).astype(np.int64)[order]


def _spread(values: Floats, metric: str) -> str:
    digits = 3 if metric == "log_loss" else 1
    deviation = values.std(ddof=1) if len(values) > 1 else 0.0
    return f"{values.mean():.{digits}f} ± {deviation:.{digits}f}"


def _grocery(folder: Path) -> Source:
    found = Grocery.load(folder)
    return Source(
        found.taxonomy,
        found.train,
        np.array([photo.coarse for photo in found.train]),
        found.test,
        np.array([photo.coarse for photo in found.test]),
        np.array([photo.fine for photo in found.test]),
    )


def _fashion(folder: Path) -> Source:
    found = datasets.fashion_mnist(folder)
    test_labels = found.test_labels.astype(np.int64)
    return Source(
        Taxonomy(classes=datasets.CLASSES),
        [ArrayPhoto(image) for image in found.train_images],
        found.train_labels.astype(np.int64),
        [ArrayPhoto(image) for image in found.test_images],
        test_labels,
        test_labels,
    )


@dataclass(frozen=True)
class _Tests:
    """Each kind of test photos embedded, (n, …) float32, and what they show."""

    features: Mapping[Test, NDArray[np.float32]]
    labels: NDArray[np.int64]
    products: NDArray[np.int64]


def _tests(arm: Arm, data: Data, source: Source, cache: EmbeddingCache) -> _Tests:
    chosen = np.linspace(0, len(source.test) - 1, min(data.test_photos, len(source.test))).astype(int)
    photos = [source.test[index] for index in chosen]
    features: dict[Test, NDArray[np.float32]] = {}
    for test in ("clean", *arm.tests):
        shown: Sequence[Photo] = photos
        if test != "clean":
            # Clutter comes from another photo, half the test away: of another class.
            others = [*photos[len(photos) // 2 :], *photos[: len(photos) // 2]]
            shown = [Degraded(photo, test, other) for photo, other in zip(photos, others, strict=True)]
        features[test] = embed(shown, arm.recipe, cache).features
    return _Tests(features, source.test_labels[chosen], source.products[chosen])


def _measured(
    arm: Arm,
    data: Data,
    source: Source,
    tests: _Tests,
    epsilon: float | None,
    seed: int,
    cache: EmbeddingCache,
) -> dict[str, dict[str, float]]:
    """Train an arm once, and return its metrics on each kind of test photos."""
    labels, classes = source.train_labels, len(source.taxonomy.classes)
    if data.ratio is None:
        chosen = np.linspace(0, len(labels) - 1, min(data.photos or len(labels), len(labels))).astype(int)
    else:
        counts = long_tail(data, classes, seed)
        chosen = np.concatenate([np.flatnonzero(labels == k)[:n] for k, n in enumerate(counts)])
    counts = np.maximum(1, np.bincount(labels[chosen], minlength=classes))
    features = embed([source.train[index] for index in chosen], arm.recipe, cache).features
    examples = Examples.of(features, labels[chosen], "cpu")
    plan, model = _trained(arm, data, source.taxonomy, examples, counts, epsilon, seed)
    found = {}
    for test, inputs in tests.features.items():
        evaluated = Examples.of(inputs, tests.labels, "cpu")
        evaluator = Evaluator(plan.recipe, plan.taxonomy, evaluated.inputs, evaluated.labels)
        found[str(test)] = _metrics(tests, evaluator.probabilities(model), counts)
    return found


def _trained(
    arm: Arm,
    data: Data,
    taxonomy: Taxonomy,
    examples: Examples,
    counts: NDArray[np.int64],
    epsilon: float | None,
    seed: int,
) -> tuple[Plan, NDArray[np.float32]]:
    steps = data.steps
    loss = {
        **(
            {}
            if arm.weights_beta is None
            else {"class_weights": class_weights(counts.tolist(), arm.weights_beta)}
        ),
        **(
            {}
            if arm.offsets_temperature is None
            else {"class_offsets": class_offsets(counts.tolist(), arm.offsets_temperature)}
        ),
    }
    rates = (
        () if arm.rates_power is None else class_rates(counts.tolist(), steps.sampling_rate, arm.rates_power)
    )
    sampled = float(np.dot(rates, counts)) if rates else steps.sampling_rate * len(examples)
    plan = make_plan(
        PlanSettings(
            league="recognition",
            taxonomy=taxonomy,
            recipe=arm.recipe.model_copy(update={"loss": arm.recipe.loss.model_copy(update=loss)}),
            training=DistributedSchedule(
                rounds=steps.rounds,
                sampling_rate=steps.sampling_rate,
                expected_batch=sampled,
                clipping_norm=steps.clipping_norm,
                class_rates=rates,
            ),
            # Without noise its amount does not matter.
            privacy=PrivacyTarget(epsilon=8.0 if epsilon is None else epsilon, delta=DELTA),
            cohort=Cohort(min_merchants=3, max_merchants=3),
        ),
        seed.to_bytes(16, "big"),
    )
    randomness = RoundRandomness(seed, "recognition")
    rounds = (NoiselessRounds if epsilon is None else CentralRounds)(plan, examples, randomness)
    optimizer = {"name": "fedavgm", "learning_rate": steps.learning_rate, "momentum": steps.momentum}
    signed_plan = SignedPlan.sign(plan, Ed25519PrivateKey.generate())
    with tempfile.TemporaryDirectory() as scratch:
        model = train(
            rounds=rounds,
            progress=State.open(Path(scratch)).progress(signed_plan, plan),
            optimizer=create(optimizer),
            initial=models.initial_vector(plan.recipe, len(taxonomy.classes), seed),
            tail_average=0.2,
            factor=lambda round_: 1 - round_ / steps.rounds,
        )
    return plan, model


def _metrics(tests: _Tests, probabilities: Floats, counts: NDArray[np.int64]) -> dict[str, float]:
    report = ClassificationReport.of(tests.labels, probabilities)
    hits = probabilities.argmax(1) == tests.labels
    rare = np.argsort(counts, kind="stable")[:TAIL]
    recalls = [hits[tests.labels == k].mean() for k in rare if (tests.labels == k).any()]
    right = []
    for product in np.unique(tests.products):
        own = np.flatnonzero(tests.products == product)
        for first in range(0, len(own) - VIEWS + 1, VIEWS):
            together = own[first : first + VIEWS]
            right.append(fused(probabilities[together]).argmax() == tests.labels[together[0]])
    return {
        "accuracy": report.accuracy,
        "macro_recall": report.macro_recall,
        "tail_recall": float(np.mean(recalls)) if recalls else float("nan"),
        "log_loss": report.log_loss,
        "fused_accuracy": float(np.mean(right)) if right else float("nan"),
    }
