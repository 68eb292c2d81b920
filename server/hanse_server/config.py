"""The operator's YAML file, `hanse-server.yaml`, and the plan that follows from it.

    config = load(ServerConfig, Path("hanse-server.yaml"))
    plan = make_plan(config.plan, serial=os.urandom(16))

The operator states a promise, ε at δ; the noise follows from it.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from hanse_common.config import ConfigPath, Section
from hanse_common.errors import PlanRefused
from hanse_common.modes import TRAININGS, EvaluationSchedule, Schedule
from hanse_common.plan import Cohort, Plan, dimension_of, noise_shares
from hanse_common.privacy.accounting import EPSILON_MAX
from hanse_common.privacy.calibration import noise_multiplier
from hanse_common.secagg.suite import MAX_SETUP_ROUNDS
from hanse_common.session import Address
from hanse_common.vision.recipe import Recipe
from hanse_common.vision.taxonomy import Taxonomy
from hanse_common.wire import Name
from hanse_server.deadlines import Deadlines
from hanse_server.early_stop import EarlyStop
from hanse_server.schedules import Constant, MoveSchedule
from hanse_server.selection import AllMembers, CohortSelection


class PrivacyTarget(Section):
    """What a merchant that takes part in every step spends: ε at δ, for any one photo."""

    epsilon: Annotated[float, Field(gt=0, le=EPSILON_MAX)]
    delta: Annotated[float, Field(gt=0, lt=1e-3)] = 1e-5


class PlanSettings(Section):
    """All that a plan needs besides its serial number. The noise follows from `privacy`."""

    league: Name
    taxonomy: Taxonomy
    recipe: Recipe
    training: Schedule
    privacy: PrivacyTarget
    cohort: Cohort


class Optimization(Section):
    """How the shared model is moved and tried: server optimizer, attempts a round, tail that is averaged.

    `schedule` says how much of the optimizer's move is made in each round, `early_stop` when no more rounds are run.
    """

    optimizer: dict[str, Any] = Field(default_factory=lambda: {"name": "fedavg"})
    schedule: MoveSchedule = Constant()
    early_stop: EarlyStop | None = None
    attempts: Annotated[int, Field(ge=1, le=100)] = 3
    tail_average: Annotated[float, Field(ge=0, le=1)] = 0.2

    @model_validator(mode="before")
    @classmethod
    def _no_longer(cls, found: object) -> object:
        if isinstance(found, dict) and "decay" in found:
            raise ValueError(
                "decay is now a schedule; write schedule: {name: linear} for true, and nothing for false"
            )
        return found


class EvaluationSettings(Section):
    """How the league tries its models on photos that merchants hold out, under a small ε of its own.

    It is a plan beside the training's, with the same league, recipe, classes and cohort. `holdout` is how many photos
    the whole league holds out, about; `times` how often a model may be tried; `every` after how many rounds one is, 0
    for the finished model alone.
    """

    privacy: PrivacyTarget
    holdout: Annotated[float, Field(gt=0, le=1e9)]
    unit: Literal["photo", "product"] = "photo"
    times: Annotated[int, Field(ge=1, le=10_000)] = 1
    repeats: Annotated[int, Field(ge=0, le=10_000)] = 1
    every: Annotated[int, Field(ge=0, le=100_000)] = 0


class Publication(Section):
    """What the figures of a recognizer must reach before it is released.

    `minimum` is the least `metric`, and `tolerance` how much less than the released recognizer's it may be. Figures are
    those of the federated evaluation; the lower end of their interval counts when `certain` is set.
    """

    metric: Literal["accuracy", "macro_f1", "macro_auc"] = "accuracy"
    minimum: Annotated[float, Field(ge=0, le=1)] = 0.0
    tolerance: Annotated[float, Field(ge=0, le=1)] = 0.01
    certain: bool = False


class Start(Section):
    """From which recognizer a training goes on, instead of from nothing.

    `version` is one of the registry's, its number, the start of its digest, or "released"; or `folder` holds one.
    `renamed` gives a class of the old taxonomy its name in the new one. `photos` is a folder of public photos, needed
    when the recipe is another. See `hanse_server.surgery`.
    """

    version: Annotated[str, Field(pattern=r"^[0-9a-z]{1,64}$")] | None = None
    folder: ConfigPath | None = None
    renamed: Annotated[dict[str, str], Field(max_length=1024)] = Field(default_factory=dict)
    photos: ConfigPath | None = None

    @model_validator(mode="after")
    def _one(self) -> "Start":
        if (self.version is None) == (self.folder is None):
            raise ValueError("expected either version or folder")
        return self


Host = Annotated[str, Field(pattern=r"^[A-Za-z0-9.:-]{1,253}$")]
Port = Annotated[int, Field(ge=0, le=65_535)]
Seconds = Annotated[float, Field(gt=0, le=86_400)]


class Tls(Section):
    """PEM files: the server's certificate with its chain, its key, and the authority that merchants trust."""

    authority: ConfigPath
    certificate: ConfigPath
    key: ConfigPath


class Admin(Section):
    """The operator's own listener for Flower's commands, on loopback. `token` is a file that holds the secret."""

    port: Port = 9091
    token: ConfigPath


class Fleet(Section):
    """Where merchants' nodes connect."""

    host: Host = "0.0.0.0"  # noqa: S104 - merchants come from everywhere
    port: Port = 9092


class AggregatorListener(Section):
    """Where merchants' streams connect. `address` is what merchants are told, host:port."""

    host: Host = "0.0.0.0"  # noqa: S104 - merchants come from everywhere
    port: Port = 9093
    address: Address


class Blocks(Section):
    """How long the daemon waits for merchants.

    A block is `rounds` rounds with one set-up of secure aggregation. `patience` is how long it waits for the plan's
    minimum, `gather` how long it then waits for the others, both in seconds. `cohort` says who is asked; without
    `deadlines` every trip has the plan's.
    """

    rounds: Annotated[int, Field(ge=1, le=MAX_SETUP_ROUNDS)] = 20
    patience: Seconds = 3600.0
    gather: Seconds = 30.0
    cohort: CohortSelection = AllMembers()
    deadlines: Deadlines | None = Deadlines()


class Page(Section):
    """The operator's page, metrics and health, on loopback; who reads them needs the admin token."""

    port: Port = 9094


class Logs(Section):
    """Where the server's log goes: the standard error, or `file`, which is rotated; `json` is an object a line."""

    form: Literal["text", "json"] = "text"
    file: ConfigPath | None = None


StorageUrl = Annotated[str, Field(pattern=r"^(sqlite|postgresql)(\+psycopg)?://[!-~]{1,1000}$")]


class Service(Section):
    """What `hanse-server run` needs besides the plan.

    `plan` is the signed plan, `state` a folder for checkpoints and the recognizer, `whitening` and `centre` the
    recipe's files where it names them. `directory` is the league's signed directory, which says who is a member and is
    read again before each block, `charter` the digest of the league's founding charter. `database` is "memory", or a
    file for Flower's own state. `storage` is the URL of the database for our own records, a SQLite file in `state` by
    default. `evaluation` is the signed evaluation plan, if there is one.
    """

    plan: ConfigPath
    evaluation: ConfigPath | None = None
    directory: ConfigPath
    charter: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    state: ConfigPath
    storage: StorageUrl | None = None
    whitening: ConfigPath | None = None
    centre: ConfigPath | None = None
    tls: Tls
    admin: Admin
    fleet: Fleet = Fleet()
    aggregator: AggregatorListener
    database: Literal["memory"] | ConfigPath = "memory"
    blocks: Blocks = Blocks()
    page: Page | None = Page()
    logs: Logs = Logs()


class ServerConfig(Section):
    """The whole file. `service` is needed by the daemon alone."""

    signing_key: ConfigPath
    plan: PlanSettings
    evaluation: EvaluationSettings | None = None
    optimization: Optimization = Optimization()
    publication: Publication = Publication()
    start: Start | None = None
    service: Service | None = None


def make_plan(settings: PlanSettings, serial: bytes) -> Plan:
    """Return the plan with the least noise that keeps to `settings.privacy`.

    `serial`, 16 bytes, keeps plans of equal content apart. Raises `PlanRefused` when no noise would do.
    """
    training, privacy, cohort = settings.training, settings.privacy, settings.cohort
    dimension = dimension_of(training, settings.recipe, len(settings.taxonomy.classes))
    try:
        multiplier = noise_multiplier(
            epsilon=privacy.epsilon,
            delta=privacy.delta,
            sampling_rate=training.sampling_rate,
            steps=training.total_steps,
            clipping_norm=training.clipping_norm,
            dimension=dimension,
            shares=noise_shares(training, cohort),
        )
        plan = Plan(
            league=settings.league,
            serial=serial,
            recipe=settings.recipe,
            taxonomy=settings.taxonomy,
            dimension=dimension,
            training=TRAININGS[training.mode](**training.model_dump(), noise_multiplier=multiplier),
            cohort=cohort,
            delta=privacy.delta,
        )
        plan.require_room()
    except ValueError as error:
        raise PlanRefused(str(error)) from None
    return plan


def make_evaluation_plan(settings: PlanSettings, evaluation: EvaluationSettings, serial: bytes) -> Plan:
    """Return the plan that tries models of `settings` on what merchants hold out. Raises as `make_plan` does."""
    training = EvaluationSchedule(
        rounds=evaluation.times,
        repeats=evaluation.repeats,
        unit=evaluation.unit,
        expected_batch=evaluation.holdout,
    )
    return make_plan(
        settings.model_copy(update={"training": training, "privacy": evaluation.privacy}), serial
    )
