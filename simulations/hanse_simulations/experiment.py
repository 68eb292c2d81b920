"""An experiment, as a researcher writes it in YAML: data, plan, optimizer, seed.

    experiment = load(Experiment, Path("simulations/experiments/smoke.yaml"))

The `plan` section is the operator's own, word for word: what works here can be signed and run.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from hanse_common.config import ConfigPath, Section
from hanse_common.wire import Name
from hanse_server.config import Optimization, PlanSettings

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
    """Who holds which photos. `folder` is where the public dataset lies or is fetched to."""

    dataset: Literal["fashion-mnist"] = "fashion-mnist"
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


class Experiment(Section):
    """The whole file. `extensions` are Python files run first: they register optimizers of your own."""

    name: Name
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    data: Data
    whiten: Whiten | None = None
    plan: PlanSettings
    optimization: Optimization = Optimization()
    dropout_rate: Annotated[float, Field(ge=0, lt=1)] = 0.0
    evaluate_every: Annotated[int, Field(ge=1)] = 1
    extensions: tuple[ConfigPath, ...] = ()

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
        return self

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
