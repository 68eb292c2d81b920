"""What an operator's plan would come to on public photos, before it is signed: accuracy, and a merchant's time.

    composed = compose(load(ServerConfig, path), proxy=None, merchants=None, photos=None, quick=False)
    composed.experiment, composed.notes
    figures = forecast(composed, write=lambda figures: None)

The plan is taken word for word. Where it cannot be, a note says so: other classes stand for the league's, a public
whitening and a centre are learnt anew from the public photos, and a league of more photos than there are is made
smaller. `hanse-server rehearse` runs this as a process of its own.
"""

import io
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from hanse_client.examples import Examples
from hanse_client.training import ShopTrainer
from hanse_common.errors import ConfigError, HanseError
from hanse_common.modes import DistributedSchedule, LocalSchedule, MerchantLevelSchedule
from hanse_common.plan import Plan
from hanse_common.randomness import OsRandomness
from hanse_common.vision import model as models
from hanse_common.vision.backbones import raw_features
from hanse_common.vision.centring import Centre
from hanse_common.vision.extraction import extract
from hanse_common.vision.photo import decode
from hanse_common.vision.recipe import Recipe
from hanse_common.vision.taxonomy import Taxonomy
from hanse_server.config import PlanSettings, PrivacyTarget, ServerConfig, make_plan
from hanse_simulations import datasets
from hanse_simulations.console import console
from hanse_simulations.experiment import TEST_PHOTOS, Centring, Data, Dirichlet, Experiment, Whiten
from hanse_simulations.photos import public_photos

SEEDS = (1, 2, 3)
QUICK = 4
"""With --quick the league has so many times fewer photos."""
QUICK_TEST_PHOTOS = 2000

WHITENING_PHOTOS = 5000
MERCHANT_LEVEL_PHOTOS = 300
"""Photos of a merchant where the plan does not say: mode merchant-level counts merchants."""

CENTRE = PrivacyTarget(epsilon=0.05, delta=1e-6)
"""What a centre costs whose file is not here."""

PHOTO_SIDE = 1000
"""Side of the made-up photos whose embedding is timed, in pixels: a usual one in a shop."""


@dataclass(frozen=True)
class Composed:
    """The experiment that stands for the league, and what is different in it, for people.

    `photos` is how many a merchant of the league has, `proxy` what the public photos are called.
    """

    experiment: Experiment
    proxy: str
    photos: int
    notes: tuple[str, ...]
    seeds: tuple[int, ...]

    @property
    def engine(self) -> Literal["local", "pooled"]:
        """In mode `distributed` one curator with the league's noise comes to the same, much faster."""
        return "pooled" if isinstance(self.experiment.plan.training, DistributedSchedule) else "local"


def compose(
    config: ServerConfig, proxy: Path | None, merchants: int | None, photos: int | None, quick: bool
) -> Composed:
    """Return the experiment for `config`.

    `proxy` is a folder with a sub-folder of photos for each class, Fashion-MNIST without. So many `merchants` have so
    many `photos` each; by default the plan's most, and what its `expected_batch` reckons with.

    Raises `ConfigError` when the plan trains nothing, or the public photos have too few classes.
    """
    plan, notes = config.plan, list[str]()
    merchants = merchants or plan.cohort.max_merchants
    wanted = photos or photos_of(plan, merchants)
    taxonomy = _stand_in(plan.taxonomy, proxy, notes)
    name = "Fashion-MNIST" if proxy is None else str(proxy)
    data = Data(
        dataset="fashion-mnist" if proxy is None else "folder",
        folder=proxy or datasets.default_folder(),
        merchants=merchants,
        partition=Dirichlet(),
    )
    public = public_photos(data, taxonomy)
    used = min(max(wanted // QUICK, 1) if quick else wanted, len(public.train) // merchants)
    plan = plan.model_copy(update={"taxonomy": taxonomy})
    if used < wanted:
        plan = _smaller(plan, used / wanted)
        notes.append(
            f"Merchants have {used:,} photos each here, not {wanted:,}, and expected_batch is smaller by as much: "
            "the league itself will do better."
        )
    tested = min(len(public.test), QUICK_TEST_PHOTOS if quick else TEST_PHOTOS)
    plan, whiten, centring = _learnt_anew(config, plan, tested, notes)
    if config.start is not None:
        notes.append(
            "The league goes on from a recognizer, this begins from nothing: the league does better."
        )
    experiment = Experiment(
        name="forecast",
        seed=SEEDS[0],
        data=data.model_copy(
            update={
                "photos_per_merchant": used,
                "test_photos": max(tested - (whiten.photos if whiten else 0), 10),
            }
        ),
        whiten=whiten,
        centring=centring,
        plan=plan,
        optimization=config.optimization,
        evaluate_every=max(plan.training.rounds // 10, 1),
    )
    return Composed(experiment, name, wanted, tuple(notes), SEEDS[:1] if quick else SEEDS)


def photos_of(plan: PlanSettings, merchants: int) -> int:
    """Return how many photos, or products, a merchant has by the plan's own numbers.

    Raises `ConfigError` when the plan trains nothing.
    """
    training = plan.training
    if isinstance(training, MerchantLevelSchedule):
        return MERCHANT_LEVEL_PHOTOS
    if not isinstance(training, LocalSchedule | DistributedSchedule):
        raise ConfigError(f"plan.training.mode: found {training.mode}, which trains nothing to be forecast.")
    # With rates of their own, classes are as many in a sample, about.
    rates = training.class_rates or (training.sampling_rate,)
    photos = training.expected_batch * sum(1 / rate for rate in rates) / len(rates)
    return max(round(photos if isinstance(training, LocalSchedule) else photos / merchants), 1)


def forecast(composed: Composed, write: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Time a merchant's work, run the experiment with each seed, and return the figures.

    `write` hears them as soon as there are some, and again. Raises as `hanse_simulations.run.run` does.
    """
    experiment = composed.experiment
    console.print("timing a merchant's work, on made-up photos")
    figures: dict[str, Any] = {
        "proxy": composed.proxy,
        "notes": composed.notes,
        "merchants": experiment.data.merchants,
        "photos": composed.photos,
        "photos_used": experiment.data.photos_per_merchant,
        "test_photos": experiment.data.test_photos,
        "round_seconds": round_seconds(make_plan(experiment.plan, bytes(16)), composed.photos),
        "photo_seconds": photo_seconds(experiment.plan.recipe),
        "accuracies": [],
    }
    write(figures)
    from hanse_simulations.run import run, shops_maker  # what is above works without matplotlib

    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    embeddings = cache / "embeddings.sqlite"
    make = shops_maker(embeddings)
    for number, seed in enumerate(composed.seeds, start=1):
        console.print(f"training {number} of {len(composed.seeds)}, on {composed.proxy}")
        with tempfile.TemporaryDirectory() as folder:
            variant = experiment.model_copy(update={"seed": seed})
            found = run(variant, Path(folder), embeddings, composed.engine, make)
        figures["accuracies"].append(found["accuracy"])
        write(figures)
    return figures


def cache_folder() -> Path:
    """Return where embeddings of public photos are kept from one forecast to the next."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hanse" / "forecast"


def round_seconds(plan: Plan, photos: int) -> float:
    """Return what a merchant with so many photos computes in a round, in seconds, on made-up features."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(photos, *plan.recipe.example_shape)).astype(np.float32)
    labels = rng.integers(0, len(plan.taxonomy.classes), photos)
    trainer = ShopTrainer(plan.recipe, plan.taxonomy, Examples.of(inputs, labels, "auto"), OsRandomness())
    if not trainer.accepts(plan):
        raise HanseError("The plan's training cannot be prepared on this machine.")
    model = models.initial_vector(plan.recipe, len(plan.taxonomy.classes), 0)
    trainer.contribution(plan, 0, model)
    started = time.perf_counter()
    trainer.contribution(plan, 0, model)
    return time.perf_counter() - started


def photo_seconds(recipe: Recipe) -> float | None:
    """Return the seconds from a JPEG file to its embedding; None when the backbone's weights are not here."""
    pixels = np.random.default_rng(0).integers(0, 256, (PHOTO_SIDE // 8, PHOTO_SIDE // 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((PHOTO_SIDE, PHOTO_SIDE)).save(file, "JPEG")
    try:
        network = None if recipe.backbone is None else raw_features(recipe)
    except HanseError as error:
        console.print(f"{error}", markup=False)
        return None
    count = 64
    extract(network, [decode(file.getvalue())], recipe.views)
    started = time.perf_counter()
    extract(network, (decode(file.getvalue()) for _ in range(count)), recipe.views)
    return (time.perf_counter() - started) / count


def _stand_in(taxonomy: Taxonomy, proxy: Path | None, notes: list[str]) -> Taxonomy:
    """Return the league's classes where the public photos have them all, and else as many of theirs."""
    if proxy is None:
        known: tuple[str, ...] = datasets.CLASSES
    elif proxy.is_dir():
        folders = sorted(path for path in proxy.iterdir() if path.is_dir() and not path.name.startswith("."))
        known = tuple(path.name for path in folders)
    else:
        raise ConfigError(
            f"{proxy}: no such folder, expected one with a sub-folder of photos for each class."
        )
    classes = taxonomy.classes
    if set(classes) <= set(known):
        return taxonomy
    name = "Fashion-MNIST" if proxy is None else str(proxy)
    if len(known) < len(classes):
        raise ConfigError(
            f"{name} has {len(known)} classes and the league {len(classes)}; name with --proxy a folder of public "
            "photos that has as many, in a sub-folder each."
        )
    chosen = known[: len(classes)]
    notes.append(f"Classes of {name} stand for the league's: {', '.join(chosen)}.")
    return Taxonomy(classes=chosen)


def _smaller(plan: PlanSettings, part: float) -> PlanSettings:
    """Return the plan for a league with that part of the photos."""
    training = plan.training
    if isinstance(training, MerchantLevelSchedule):
        return plan
    smaller = training.model_copy(update={"expected_batch": training.expected_batch * part})
    return plan.model_copy(update={"training": smaller})


def _learnt_anew(
    config: ServerConfig, plan: PlanSettings, tested: int, notes: list[str]
) -> tuple[PlanSettings, Whiten | None, Centring | None]:
    """Return the plan without whitening and centre, and what learns them from the public photos instead."""
    recipe, privacy = plan.recipe, plan.privacy
    whiten = centring = None
    if recipe.backbone is not None and recipe.backbone.whitening is not None:
        photos = max(min(WHITENING_PHOTOS, tested // 2), 10)
        whiten = Whiten(dimensions=recipe.backbone.whitening.dimensions, photos=photos)
        backbone = recipe.backbone.model_copy(update={"whitening": None})
        recipe = recipe.model_copy(update={"backbone": backbone})
        notes.append(
            "The whitening is fitted to public photos of this set, not the file that the plan names."
        )
    if recipe.centre is not None:
        path = config.service.centre if config.service else None
        cost = CENTRE
        if path is not None and path.exists():
            centre = Centre.read(path, recipe.feature_dimension)
            cost = PrivacyTarget(epsilon=centre.epsilon, delta=centre.delta)
        centring = Centring(epsilon=cost.epsilon, delta=cost.delta)
        recipe = recipe.model_copy(update={"centre": None})
        privacy = PrivacyTarget(epsilon=privacy.epsilon + cost.epsilon, delta=privacy.delta + cost.delta)
        notes.append("The centre is learnt from the public photos, at what the league paid for its own.")
    return plan.model_copy(update={"recipe": recipe, "privacy": privacy}), whiten, centring
