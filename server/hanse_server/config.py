"""The operator's YAML file, `hanse-server.yaml`, and the plan that follows from it.

    config = load(ServerConfig, Path("hanse-server.yaml"))
    plan = make_plan(config.plan, serial=os.urandom(16))

The operator states a promise, ε at δ; the noise follows from it.
"""

from typing import Annotated, Any

from pydantic import Field

from hanse_common.config import ConfigPath, Section
from hanse_common.plan import Cohort, LocalSchedule, LocalTraining, Name, Plan, Positive
from hanse_common.privacy.accounting import EPSILON_MAX
from hanse_common.privacy.calibration import noise_multiplier
from hanse_common.vision.recipe import Recipe
from hanse_common.vision.taxonomy import Taxonomy


class PrivacyTarget(Section):
    """What a merchant that takes part in every step spends: ε at δ, for any one photo."""

    epsilon: Annotated[float, Field(gt=0, le=EPSILON_MAX)]
    delta: Annotated[float, Field(gt=0, lt=1e-3)] = 1e-5


class PlanSettings(Section):
    """All that a plan needs besides its serial number. The noise follows from `privacy`."""

    league: Name
    taxonomy: Taxonomy
    recipe: Recipe
    training: LocalSchedule
    privacy: PrivacyTarget
    cohort: Cohort
    update_bound: Positive = 4.0


class Optimization(Section):
    """How the shared model is moved and tried: server optimizer, attempts a round, tail that is averaged."""

    optimizer: dict[str, Any] = Field(default_factory=lambda: {"name": "sgd"})
    attempts: Annotated[int, Field(ge=1, le=100)] = 3
    tail_average: Annotated[float, Field(ge=0, le=1)] = 0.2


class ServerConfig(Section):
    """The whole file."""

    signing_key: ConfigPath
    plan: PlanSettings
    optimization: Optimization = Optimization()


def make_plan(settings: PlanSettings, serial: bytes) -> Plan:
    """Return the plan with the least noise that keeps to `settings.privacy`.

    `serial`, 16 bytes, keeps plans of equal content apart. Raises `PlanRefused` when no noise would do.
    """
    training, privacy = settings.training, settings.privacy
    dimension = settings.recipe.dimension(len(settings.taxonomy.classes))
    multiplier = noise_multiplier(
        epsilon=privacy.epsilon,
        delta=privacy.delta,
        sampling_rate=training.sampling_rate,
        steps=training.total_steps,
        clipping_norm=training.clipping_norm,
        dimension=dimension,
    )
    return Plan(
        league=settings.league,
        serial=serial,
        recipe=settings.recipe,
        taxonomy=settings.taxonomy,
        dimension=dimension,
        training=LocalTraining(**training.model_dump(), noise_multiplier=multiplier),
        cohort=settings.cohort,
        delta=privacy.delta,
        update_bound=settings.update_bound,
    )
