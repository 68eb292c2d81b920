"""The operator's YAML file, `hanse-server.yaml`, and the plan that follows from it.

    config = load(ServerConfig, Path("hanse-server.yaml"))
    plan = make_plan(config.plan, serial=os.urandom(16))

The operator states a promise, ε at δ; the noise follows from it.
"""

from typing import Annotated, Any, Literal

from pydantic import Field

from hanse_common.config import ConfigPath, Section
from hanse_common.errors import PlanRefused
from hanse_common.plan import TRAININGS, Cohort, Plan, Schedule, dimension_of, noise_shares
from hanse_common.privacy.accounting import EPSILON_MAX
from hanse_common.privacy.calibration import noise_multiplier
from hanse_common.secagg.suite import MAX_SETUP_ROUNDS
from hanse_common.session import Address
from hanse_common.vision.recipe import Recipe
from hanse_common.vision.taxonomy import Taxonomy
from hanse_common.wire import Name


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

    With `decay` the optimizer's moves shrink linearly to zero over the rounds.
    """

    optimizer: dict[str, Any] = Field(default_factory=lambda: {"name": "sgd"})
    attempts: Annotated[int, Field(ge=1, le=100)] = 3
    decay: bool = False
    tail_average: Annotated[float, Field(ge=0, le=1)] = 0.2


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
    minimum, `gather` how long it then waits for the others, both in seconds.
    """

    rounds: Annotated[int, Field(ge=1, le=MAX_SETUP_ROUNDS)] = 20
    patience: Seconds = 3600.0
    gather: Seconds = 30.0


class Service(Section):
    """What `hanse-server run` needs besides the plan.

    `plan` is the signed plan, `state` a folder for checkpoints and the recognizer, `whitening` and `centre` the
    recipe's files where it names them. `directory` is the league's signed directory, which says who is a member and is
    read again before each block, `charter` the digest of the league's founding charter. `database` is "memory", or a
    file for Flower's own state.
    """

    plan: ConfigPath
    directory: ConfigPath
    charter: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    state: ConfigPath
    whitening: ConfigPath | None = None
    centre: ConfigPath | None = None
    tls: Tls
    admin: Admin
    fleet: Fleet = Fleet()
    aggregator: AggregatorListener
    database: Literal["memory"] | ConfigPath = "memory"
    blocks: Blocks = Blocks()


class ServerConfig(Section):
    """The whole file. `service` is needed by the daemon alone."""

    signing_key: ConfigPath
    plan: PlanSettings
    optimization: Optimization = Optimization()
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
