"""What a federated evaluation found: every figure with the interval in which the true one lies, 19 times in 20.

    report = FederatedReport.from_json(text)
    report.accuracy.value, report.accuracy.low, report.accuracy.high
    report.to_json() == text

`hanse_common.evaluation_estimate` makes it from a noisy sum over all merchants. A figure that the noise leaves nothing
of is None. Counts are of the holdout photos at hand, so their intervals are for the noise alone; all other figures are
of the recognizer, and their intervals are for the choice of photos, too.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError, model_validator

from hanse_common.errors import WireError
from hanse_common.evaluation import CONFIDENCE_BINS, MAX_CLASSES, SCORE_BINS
from hanse_common.wire import Value

MAX_REPORT_BYTES = 1 << 24
"""Bound of a report as JSON, in bytes."""


class Figure(Value):
    """A figure and its 95 % interval, `low` to `high`."""

    value: float
    low: float
    high: float

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.low <= self.value <= self.high:
            raise ValueError(f"found {self.value} outside of its interval, {self.low} to {self.high}")
        return self


class Rate(Figure):
    """A figure between 0 and 1."""

    low: Annotated[float, Field(ge=0)]
    high: Annotated[float, Field(le=1)]


class Count(Figure):
    """How many photos, or products, there are of a kind."""

    low: Annotated[float, Field(ge=0)]


class RocPoint(Value):
    """The rates of one class against all others for one threshold of its score."""

    threshold: Annotated[float, Field(ge=0, le=1)]
    false_positive_rate: Rate
    true_positive_rate: Rate


class ClassReport(Value):
    """Figures of one class. `roc` holds its thresholds, falling; it is empty when there is no `auc`."""

    support: Count
    precision: Rate | None
    recall: Rate | None
    f1: Rate | None
    auc: Rate | None
    roc: Annotated[tuple[RocPoint, ...], Field(max_length=SCORE_BINS)]


class ReliabilityBin(Value):
    """The photos whose largest score is between `low` and `high`: their mean score, and how many of them are right."""

    low: Annotated[float, Field(ge=0, le=1)]
    high: Annotated[float, Field(ge=0, le=1)]
    photos: Count
    confidence: Rate | None
    accuracy: Rate | None


class FederatedReport(Value):
    """A recognizer's figures on the holdout photos of all merchants together.

    `photos` is how many there are, or products where `unit` says so. `merchants` is how many are in the sum. `log_loss`
    is in nats, a photo's cut to `evaluation.LOSS_BOUND`. `expected_calibration_error` is over bins of equal width of
    the largest score, with what noise and chance add to it taken out [1]; `overconfidence` is the mean largest score
    minus the accuracy. `confusion` has a row for each true class. A macro average is over the classes that have the
    figure.

    [1] Kumar, Liang, Ma 2019, "Verified Uncertainty Calibration".
    """

    format_version: Literal[1] = 1
    unit: Literal["photo", "product"]
    merchants: Annotated[int, Field(ge=1)]
    photos: Count
    accuracy: Rate | None
    macro_precision: Rate | None
    macro_recall: Rate | None
    macro_f1: Rate | None
    macro_auc: Rate | None
    log_loss: Figure | None
    expected_calibration_error: Rate | None
    overconfidence: Figure | None
    confusion: Annotated[
        tuple[Annotated[tuple[Count, ...], Field(max_length=MAX_CLASSES)], ...],
        Field(min_length=2, max_length=MAX_CLASSES),
    ]
    per_class: Annotated[tuple[ClassReport, ...], Field(min_length=2, max_length=MAX_CLASSES)]
    reliability: Annotated[tuple[ReliabilityBin, ...], Field(max_length=CONFIDENCE_BINS)]

    @model_validator(mode="after")
    def _square(self) -> Self:
        classes = len(self.per_class)
        if {len(self.confusion), *map(len, self.confusion)} != {classes}:
            raise ValueError(f"confusion: expected {classes} rows of {classes} counts, as there are classes")
        return self

    def to_json(self) -> str:
        """Return the report as JSON."""
        return self.model_dump_json()

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Return the report in `text`, untrusted. Raises `WireError` unless it is one, of at most 16 MiB."""
        if len(text) > MAX_REPORT_BYTES:
            raise WireError(f"Report: found {len(text)} bytes, expected at most {MAX_REPORT_BYTES}.")
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            fault = error.errors(include_input=False, include_url=False)[0]
            field = ".".join(str(part) for part in fault["loc"]) or "fields"
            raise WireError(f"Report: field {field}: {fault['msg']}.") from None
