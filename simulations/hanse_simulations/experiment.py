"""An experiment, as a researcher writes it in YAML: data, plan, optimizer, seed.

    experiment = load(Experiment, Path("simulations/experiments/smoke.yaml"))

The `plan` section is the operator's own, word for word: what works here can be signed and run.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from hanse_common.config import ConfigPath, Section
from hanse_common.privacy.accounting import EPSILON_MAX
from hanse_common.wire import Name
from hanse_server.config import Optimization, PlanSettings
from hanse_simulations.attacks import Attack

CONFIG_FILE = "experiment.yaml"
"""The experiment with every default, in its result folder."""

TEST_PHOTOS = 10_000
"""Size of the public test set, which is divided between `whiten` and the evaluation."""


class Iid(Section):
    """Every merchant's photos are a uniform sample of all."""

    kind: Literal["iid"] = "iid"


class Dirichlet(Section):
    """Each merchant has class shares of its own, drawn from a Dirichlet(alpha): small alpha, much skew."""

    kind: Literal["dirichlet"] = "dirichlet"
    alpha: Annotated[float, Field(gt=0, le=1000)] = 1.0


class Data(Section):
    """Who holds which photos.

    `folder` is where the public dataset lies or is fetched to; with the dataset `folder` it has the photos themselves,
    in a sub-folder for each class.
    """

    dataset: Literal["fashion-mnist", "folder"] = "fashion-mnist"
    folder: ConfigPath
    merchants: Annotated[int, Field(ge=2, le=300)] = 5
    photos_per_merchant: Annotated[int, Field(ge=1, le=60_000)] = 5000
    partition: Annotated[Iid | Dirichlet, Field(discriminator="kind")] = Iid()
    test_photos: Annotated[int, Field(ge=10, le=TEST_PHOTOS)] = TEST_PHOTOS


class Whiten(Section):
    """Fit the recipe's public whitening to the first `photos` of the public test photos, without their labels.

    Those photos are then left out of the evaluation.
    """

    dimensions: Annotated[int, Field(ge=1, le=1 << 14)]
    photos: Annotated[int, Field(ge=10, le=9_000)] = 5000


Value = None | bool | int | float | str | list[Any] | dict[str, Any]


class Sweep(Section):
    """Run the experiment with each of `seeds` at each of `points`.

    A point names what is different there, by dotted keys: {plan.privacy.epsilon: 1, plan.training.rounds: 200}.
    """

    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=1 << 63)], ...], Field(min_length=1, max_length=100)]
    points: Annotated[tuple[dict[str, Value], ...], Field(min_length=1, max_length=100)]


class Centring(Section):
    """Learn the mean of the features first, in a plan of its own that costs `epsilon` and `delta` of the experiment's.

    The training's plan has what is left of `plan.privacy`.
    """

    epsilon: Annotated[float, Field(gt=0, le=EPSILON_MAX)]
    delta: Annotated[float, Field(gt=0, lt=1e-3)] = 1e-6


class Experiment(Section):
    """The whole file. `extensions` are Python files run first: they register optimizers of your own."""

    name: Name
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    data: Data
    whiten: Whiten | None = None
    centring: Centring | None = None
    plan: PlanSettings
    optimization: Optimization = Optimization()
    dropout_rate: Annotated[float, Field(ge=0, lt=1)] = 0.0
    dropouts: Annotated[int, Field(ge=0, le=300)] = 0
    attack: Attack | None = None
    evaluate_every: Annotated[int, Field(ge=1)] = 1
    extensions: tuple[ConfigPath, ...] = ()
    sweep: Sweep | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "Experiment":
        cohort, merchants = self.plan.cohort, self.data.merchants
        if not cohort.min_merchants <= merchants <= cohort.max_merchants:
            raise ValueError(
                f"data.merchants is {merchants}; expected plan.cohort.min_merchants ({cohort.min_merchants}) to "
                f"max_merchants ({cohort.max_merchants}), or some would never be asked"
            )
        if self.whiten is not None:
            self._check_whiten(self.whiten)
        if self.centring is not None:
            self._check_centring(self.centring)
        if self.attack is not None:
            self._check_attack(self.attack)
        if self.sweep is not None:
            for index in range(len(self.sweep.points)):
                self.at(index, self.seed)
        return self

    def at(self, index: int, seed: int) -> "Experiment":
        """Return the experiment at one of its sweep's points with `seed`, itself without a sweep.

        Raises `ValueError` when the point names a key that is not there, or the experiment makes no sense then.
        """
        if self.sweep is None:
            raise ValueError("expected an experiment with a sweep")
        tree = json.loads(self.model_dump_json(exclude={"sweep"}))
        for where, value in {**self.sweep.points[index], "seed": seed}.items():
            *outer, key = where.split(".")
            section = tree
            for step in outer:
                section = section.get(step) if isinstance(section, dict) else None
            if not isinstance(section, dict):
                raise ValueError(
                    f"sweep.points.{index}: found {where}, expected a dotted key of the experiment"
                )
            section[key] = value
        try:
            return Experiment.model_validate_json(json.dumps(tree))
        except ValidationError as error:
            faults = [
                f"{'.'.join(map(str, fault['loc'])) or 'the experiment'}: {fault['msg']}"
                for fault in error.errors(include_url=False, include_context=False)
            ]
            raise ValueError(f"sweep.points.{index}: {'; '.join(faults)}") from None

    def _check_centring(self, centring: Centring) -> None:
        privacy = self.plan.privacy
        if not (centring.epsilon < privacy.epsilon and centring.delta < privacy.delta):
            raise ValueError(
                f"centring: found epsilon {centring.epsilon:g} and delta {centring.delta:g}; expected less than "
                f"plan.privacy's {privacy.epsilon:g} and {privacy.delta:g}, which are for both"
            )
        if self.plan.recipe.backbone is None or self.plan.recipe.centre is not None:
            raise ValueError("centring: expected a plan.recipe with a backbone and without a centre")

    def _check_attack(self, attack: Attack) -> None:
        if attack.merchants >= self.data.merchants:
            raise ValueError(
                f"attack.merchants is {attack.merchants}; expected fewer than data.merchants, {self.data.merchants}"
            )
        for name in attack.targets:
            if name not in self.plan.taxonomy.classes:
                raise ValueError(f"attack: found {name}, expected one of plan.taxonomy.classes")

    def _check_whiten(self, whiten: Whiten) -> None:
        if whiten.photos + self.data.test_photos > TEST_PHOTOS:
            raise ValueError(
                f"whiten.photos is {whiten.photos} and data.test_photos {self.data.test_photos}; expected "
                f"at most {TEST_PHOTOS} together, which the public test set has"
            )
        backbone = self.plan.recipe.backbone
        if backbone is None or backbone.projection is not None or backbone.whitening is not None:
            raise ValueError(
                "whiten: expected a plan.recipe.backbone without projection and without whitening, which is "
                "what is fitted here"
            )
