"""The modes of a plan: how its merchants use their photos, in which steps, with which noise.

    training = LocalTraining(
        rounds=50, local_steps=4, sampling_rate=0.1, expected_batch=64.0, clipping_norm=0.5, noise_multiplier=4.0,
        learning_rate=2.0,
    )
    training.total_steps    # 200: what privacy is computed for

A schedule is a mode but for its noise: whoever plans writes one, and the noise is computed for it. All fields are
public information.
"""

from collections.abc import Mapping
from datetime import date, timedelta
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from hanse_common import wire
from hanse_common.evaluation import CLIPPING_NORM
from hanse_common.privacy.accounting import STEPS_MAX
from hanse_common.protocol import Since
from hanse_common.wire import FromList, Value

Positive = Annotated[float, Field(gt=0, le=1e9)]


def _a_day(text: str) -> str:
    if date.fromisoformat(text).isoformat() != text:
        raise ValueError("expected a day as YYYY-MM-DD")
    return text


Day = Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$"), AfterValidator(_a_day)]
"""A day of UTC, such as 2026-11-16."""

Unit = Literal["photo", "product", "merchant"]
"""What ε is said of: one photo, all photos of one product (SKU), or all that one merchant has."""


class _Schedule(Value):
    """What all modes share but for the noise.

    In each of its steps a merchant takes each unit of privacy into its sample with probability `sampling_rate`,
    secretly. `repeats` is how many rounds, in all, may be tried once more after they failed: a merchant pays for the
    whole plan, so those are paid too. `expected_batch` divides each noisy sum, in units: a number of the plan, never
    of the merchant, whose own count would leave with the update.
    """

    mode: str
    rounds: Annotated[int, Field(ge=1, le=100_000)]
    repeats: Annotated[int, Field(ge=0, le=100_000)] = 0
    sampling_rate: Annotated[float, Field(gt=0, le=1)]
    expected_batch: Positive
    clipping_norm: Positive

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if self.total_steps > STEPS_MAX:
            raise ValueError(
                f"(rounds + repeats)·steps_per_round is {self.total_steps}; expected at most {STEPS_MAX}"
            )
        return self

    @property
    def steps_per_round(self) -> int:
        """Uses of the photos in one round, each with noise of its own."""
        return 1

    @property
    def total_steps(self) -> int:
        """The most steps that a merchant takes under this plan: what ε is computed for."""
        return (self.rounds + self.repeats) * self.steps_per_round

    @property
    def work(self) -> int:
        """The most training steps that a merchant computes under this plan, whatever they reveal."""
        return self.total_steps


class _Noisy(Value):
    """`noise_multiplier` is the noise's standard deviation over the sensitivity of the sum on the grid."""

    noise_multiplier: Annotated[float, Field(gt=0, le=1e4)]


class Thinned(_Schedule):
    """Schedules whose samples may hold fewer of some classes.

    A photo of class k is in a step's sample with probability `class_rates[k]`, or without them `sampling_rate`. None is
    over that: ε is that of `sampling_rate`, for every class (`privacy.sampling`). They are public numbers of whoever
    plans. `expected_batch` is then how many photos, or products, such a sample has, about.
    """

    class_rates: Annotated[
        tuple[Annotated[float, Field(gt=0, le=1)], ...],
        FromList,
        Field(max_length=wire.MAX_ITEMS),
        Since(3),
    ] = ()

    @model_validator(mode="after")
    def _thinned(self) -> Self:
        if self.class_rates and max(self.class_rates) > self.sampling_rate:
            raise ValueError(
                f"class_rates: found {max(self.class_rates):g}, expected none over sampling_rate, "
                f"{self.sampling_rate:g}, which privacy is computed for"
            )
        return self


class LocalSchedule(Thinned):
    """Mode `local` but for its noise: a round is `local_steps` steps of DP-SGD at each merchant.

    `expected_batch` is one merchant's. The learning rate of a round falls linearly to zero over the plan's rounds
    when `decay` is set. A trained number changes by at most `update_bound` in a round; more is cut off. `proximal` is
    μ of FedProx (Li et al. 2020, "Federated Optimization in Heterogeneous Networks", equation 2): it pulls a merchant's
    weights back to those that the round began with, by a gradient of μ·(weights − start), after the noise.
    """

    mode: Literal["local"] = "local"
    unit: Literal["photo", "product"] = "photo"
    local_steps: Annotated[int, Field(ge=1, le=10_000)]
    learning_rate: Positive
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    decay: bool = False
    update_bound: Positive = 4.0
    proximal: Annotated[float, Field(ge=0, le=1e9), Since(2)] = 0.0

    @property
    def steps_per_round(self) -> int:
        """A merchant's local steps."""
        return self.local_steps

    def learning_rate_of(self, round_: int) -> float:
        """Return the learning rate of the round `round_`, counted from 0."""
        return self.learning_rate * (1 - round_ / self.rounds if self.decay else 1.0)


class LocalTraining(LocalSchedule, _Noisy):
    """Mode `local`: each step has the full noise, so its guarantee needs no other merchant."""


class DistributedSchedule(Thinned):
    """Mode `distributed` but for its noise: a round is one step of DP-SGD of the whole league.

    `expected_batch` is the whole league's: `sampling_rate` times all photos, or products, there are.
    """

    mode: Literal["distributed"] = "distributed"
    unit: Literal["photo", "product"] = "photo"


class DistributedTraining(DistributedSchedule, _Noisy):
    """Mode `distributed`: the noise is in shares, one from each merchant, and whole in the masked sum alone."""


class MerchantLevelSchedule(_Schedule):
    """Mode `merchant-level` but for its noise: what one merchant contributes, as a whole, is clipped and hidden.

    A merchant decides by a secret coin, with probability `sampling_rate`, to take part in a round, else it uploads
    noise alone. It trains `local_steps` plain steps, each on a random `local_rate` of its photos, and clips the whole
    change. `expected_batch` is in merchants.
    """

    mode: Literal["merchant-level"] = "merchant-level"
    unit: Literal["merchant"] = "merchant"
    local_steps: Annotated[int, Field(ge=1, le=10_000)]
    local_rate: Annotated[float, Field(gt=0, le=1)]
    learning_rate: Positive

    @property
    def work(self) -> int:
        """All local steps: they are computed whatever the coin says, so that it does not show in the time."""
        return (self.rounds + self.repeats) * self.local_steps


class MerchantLevelTraining(MerchantLevelSchedule, _Noisy):
    """Mode `merchant-level`: the noise is in shares, as in mode `distributed`."""


class MeanSchedule(_Schedule):
    """Mode `mean` but for its noise: not a training, but one noisy sum of everyone's features, of norm 1 each.

    What it gives is a recipe's centre (`hanse_common.vision.centring`). `expected_batch` is how many photos, or
    products, the league has, about.
    """

    mode: Literal["mean"] = "mean"
    unit: Literal["photo", "product"] = "photo"
    rounds: Annotated[int, Field(ge=1, le=1)] = 1
    sampling_rate: Annotated[float, Field(ge=1, le=1)] = 1.0
    clipping_norm: Annotated[float, Field(ge=1, le=1)] = 1.0


class MeanTraining(MeanSchedule, _Noisy):
    """Mode `mean`: the noise is in shares, as in mode `distributed`."""


class EvaluationSchedule(_Schedule):
    """Mode `evaluation` but for its noise: not a training, but noisy counts of how well a model does on holdout photos.

    Each round tries one model that the server shows; what a photo contributes is in `hanse_common.evaluation`.
    `expected_batch` is how many holdout photos, or products, the league has, about, times `sampling_rate`.
    """

    since: ClassVar[int] = 2

    mode: Literal["evaluation"] = "evaluation"
    unit: Literal["photo", "product"] = "photo"
    sampling_rate: Annotated[float, Field(gt=0, le=1)] = 1.0
    clipping_norm: Annotated[float, Field(ge=CLIPPING_NORM, le=CLIPPING_NORM)] = CLIPPING_NORM


class EvaluationTraining(EvaluationSchedule, _Noisy):
    """Mode `evaluation`: the noise is in shares, as in mode `distributed`."""


class TrendsSchedule(_Schedule):
    """Mode `trends` but for its noise: not a training, but noisy counts of what shoppers asked for, by class.

    What is counted are photos that shoppers searched by, on the `days` days from `first_day` on, which are over. Each
    adds 1 to one number, that of the class that the shop's own recognizer took it for. The unit of privacy is one such
    photo. `expected_batch` is how many the league has in that time, about.
    """

    since: ClassVar[int] = 3

    mode: Literal["trends"] = "trends"
    unit: Literal["photo"] = "photo"
    first_day: Day
    days: Annotated[int, Field(ge=1, le=366)]
    rounds: Annotated[int, Field(ge=1, le=1)] = 1
    sampling_rate: Annotated[float, Field(ge=1, le=1)] = 1.0
    clipping_norm: Annotated[float, Field(ge=1, le=1)] = 1.0

    @model_validator(mode="after")
    def _ends(self) -> Self:
        if self.first > date.max - timedelta(days=self.days):
            raise ValueError(f"first_day: found {self.first_day}, after which there are no {self.days} days")
        return self

    @property
    def first(self) -> date:
        """The first day."""
        return date.fromisoformat(self.first_day)

    @property
    def end(self) -> date:
        """The day after the last one."""
        return self.first + timedelta(days=self.days)


class TrendsTraining(TrendsSchedule, _Noisy):
    """Mode `trends`: the noise is in shares, as in mode `distributed`."""


Schedule = Annotated[
    LocalSchedule
    | DistributedSchedule
    | MerchantLevelSchedule
    | MeanSchedule
    | EvaluationSchedule
    | TrendsSchedule,
    Field(discriminator="mode"),
]
Training = Annotated[
    LocalTraining
    | DistributedTraining
    | MerchantLevelTraining
    | MeanTraining
    | EvaluationTraining
    | TrendsTraining,
    Field(discriminator="mode"),
]
TRAININGS: Mapping[
    str,
    type[
        LocalTraining
        | DistributedTraining
        | MerchantLevelTraining
        | MeanTraining
        | EvaluationTraining
        | TrendsTraining
    ],
] = {
    "local": LocalTraining,
    "distributed": DistributedTraining,
    "merchant-level": MerchantLevelTraining,
    "mean": MeanTraining,
    "evaluation": EvaluationTraining,
    "trends": TrendsTraining,
}
