"""What Prometheus may know of a league's server: how rounds go, how long answers take, what the plan has spent.

    metrics = Metrics(state=Path("state"))
    metrics.trip(observation)                       # a TripObservation, after each trip
    metrics.round_done(uploaded=5, dropped=1, declined=0, blamed=0, seconds=2.4)
    body, kind = metrics.exposition(), CONTENT_TYPE

Whoever may look at a dashboard need not be the operator. So no label names a merchant, a file or a reason in words:
labels are kinds of trips and the codes of `Failure`, and there are as many series, whatever merchants do. What the
operator knows by name stands in the log and on the page. Of ε that merchants reported, the highest is shown only where
it may be one of several.

Names follow the conventions of Prometheus [1]: base units, `_total` for counters. What ends is given as the time at
which it ends, so that an alert counts down although nobody calls again [2].

[1] https://prometheus.io/docs/practices/naming/
[2] https://prometheus.io/docs/practices/instrumentation/#timestamps-not-time-since
"""

import math
import shutil
import time
from collections.abc import Callable
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.process_collector import ProcessCollector

from hanse_server.observed import TripObservation

# The time at which a counter was made is told by the start of the process.
prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_PLAIN_0_0_4
"""The media type of `Metrics.exposition`, Prometheus' text format."""

TRIPS = ("joined", "shares", "ready", "upload", "agreed", "unmasked")
"""The trips of a round, as `TripObservation.kind` names them. Any other counts as `OTHER`."""

OTHER = "other"

FEWEST_REPORTING = 3
"""With fewer merchants that say what they spent, the highest would be a known one's."""

_ANSWER_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)
_ROUND_BUCKETS = (0.3, 1.0, 3.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)


class Failure(StrEnum):
    """Why a round, or one attempt at it, ended without a sum that was used."""

    MERCHANTS = "merchants"
    """Too few came, or too many declined."""
    SETUP = "setup"
    """Keys and shares did not come together."""
    SUM_LOST = "sum_lost"
    """Too few survivors to take the masks off."""
    IMPLAUSIBLE = "implausible"
    """The sum is longer than honest merchants' clipped updates and the noise explain."""
    STORAGE = "storage"
    """The sum could not be recorded."""
    OTHER = "other"


class Metrics:
    """The metrics of one server, in a registry of their own. Every method may be called from any thread.

    `state` is the folder whose disk is watched, `clock` returns seconds since 1970.
    """

    def __init__(self, state: Path | None = None, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._gauge("build_info", "The server's release.", ("version",)).labels(version("hanse")).set(1)
        self._add_trips()
        self._add_rounds()
        self._add_league()
        if state is not None:
            self._watch_disk(state)

    def trip(self, observation: TripObservation) -> None:
        """Count one trip: who was asked, who answered after how long, and its bytes."""
        kind = observation.kind if observation.kind in TRIPS else OTHER
        answered = observation.seconds.keys() & set(observation.asked)
        self._trips.labels(kind).inc()
        self._trip_seconds.labels(kind).observe(observation.lasted)
        self._asked.labels(kind).inc(len(observation.asked))
        self._late.labels(kind).inc(len(observation.asked) - len(answered))
        for merchant in answered:
            self._answer_seconds.labels(kind).observe(observation.seconds[merchant])
        self._sent.labels(kind).inc(observation.sent_bytes)
        self._received.labels(kind).inc(observation.received_bytes)

    def round_done(
        self,
        uploaded: int,
        dropped: int,
        declined: int,
        blamed: int,
        seconds: float,
        norm: float | None = None,
        norm_bound: float | None = None,
    ) -> None:
        """Count a finished round and how many merchants took what part in it; it lasted `seconds`.

        `norm` is the Euclidean norm of the released, noisy sum in the model's units, `norm_bound` what honest
        merchants' updates and the noise explain.
        """
        self._rounds.inc()
        self._round_seconds.observe(seconds)
        self._round_finished.set(self._clock())
        self._round_merchants.set(uploaded)
        self._uploads.inc(uploaded)
        self._dropouts.inc(dropped)
        self._declines.inc(declined)
        self._blames.inc(blamed)
        self._norm.set(_number(norm))
        self._norm_bound.set(_number(norm_bound))

    def round_failed(self, reason: Failure) -> None:
        """Count a round, or one attempt at it, that ended without a sum that was used."""
        self._failed.labels(reason.value).inc()

    def set_up(self) -> None:
        """Count a set-up of secure aggregation that came about."""
        self._set_ups.inc()

    def attempt(self) -> None:
        """Count an attempt number that was given out: each set-up that is begun takes one."""
        self._attempts.inc()

    def block(self, asked: int, connected: int) -> None:
        """Note a block that begins: how many merchants were asked, and how many came."""
        self._blocks.inc()
        self._block_asked.set(asked)
        self._block_connected.set(connected)

    def merchants(self, online: int, listed: int) -> None:
        """Note how many of the directory's `listed` merchants are online."""
        self._online.set(online)
        self._listed.set(listed)

    def training(self, active: bool) -> None:
        """Note whether a training is under way; alerts about rounds are silent without one."""
        self._training.set(active)

    def plan(self, rounds: int, rounds_done: int, epsilon: float) -> None:
        """Note the plan: its rounds, how many are done, and the ε that a merchant pays for all of it."""
        self._plan_rounds.set(rounds)
        self._plan_done.set(rounds_done)
        self._plan_epsilon.set(epsilon)

    def spent(self, merchant_count: int, highest: float | None) -> None:
        """Note the ε that merchants reported by their own consent: how many did, and the highest in all."""
        self._reporting.set(merchant_count)
        self._highest.set(_number(highest if merchant_count >= FEWEST_REPORTING else None))

    def evaluation(self, accuracy: float, low: float, high: float, loss: float | None = None) -> None:
        """Note the last evaluation: accuracy in [0, 1] with its interval, and the mean loss in nats."""
        self._accuracy.set(accuracy)
        self._accuracy_low.set(low)
        self._accuracy_high.set(high)
        self._loss.set(_number(loss))
        self._evaluated.set(self._clock())

    def version(self, number: int) -> None:
        """Note which release of the model is the league's now."""
        self._released.set(number)
        self._released_at.set(self._clock())

    def certificate(self, seconds_left: float) -> None:
        """Note in how many seconds the first of certificate, chain and authority ends; negative ones are past."""
        self._certificate_end.set(self._clock() + seconds_left)

    def directory(self, version: int, seconds_left: float) -> None:
        """Note the league's directory: its version, and in how many seconds it or the first of its entries ends."""
        self._directory_version.set(version)
        self._directory_end.set(self._clock() + seconds_left)

    def exposition(self) -> bytes:
        """Return all metrics in Prometheus' text format, whose media type is `CONTENT_TYPE`."""
        return prometheus_client.generate_latest(self._registry)

    def _add_trips(self) -> None:
        trip = ("trip",)
        self._trips = self._counter("trips_total", "Trips: one question to many merchants.", trip)
        self._asked = self._counter("trip_questions_total", "Merchants asked, over all trips.", trip)
        self._late = self._counter("trip_late_total", "Merchants asked that did not answer in time.", trip)
        self._sent = self._counter("trip_sent_bytes_total", "Bytes of questions.", trip)
        self._received = self._counter("trip_received_bytes_total", "Bytes of answers.", trip)
        self._answer_seconds = self._histogram(
            "trip_answer_seconds", "From the question to a merchant's answer.", _ANSWER_BUCKETS, trip
        )
        self._trip_seconds = self._histogram(
            "trip_seconds", "From the question to the end of the trip.", _ANSWER_BUCKETS, trip
        )
        by_kind = (self._trips, self._asked, self._late, self._sent, self._received)
        for kind in (*TRIPS, OTHER):
            # A series that appears with its first event has no rate for it.
            for metric in (*by_kind, self._answer_seconds, self._trip_seconds):
                metric.labels(kind)

    def _add_rounds(self) -> None:
        self._rounds = self._counter("rounds_total", "Rounds that ended with a sum.")
        self._failed = self._counter(
            "round_failures_total", "Rounds, or attempts at one, without a sum that was used.", ("reason",)
        )
        for reason in Failure:
            self._failed.labels(reason.value)
        self._round_seconds = self._histogram(
            "round_seconds", "How long finished rounds took.", _ROUND_BUCKETS
        )
        self._round_finished = self._gauge(
            "round_end_timestamp_seconds", "When a round last ended with a sum."
        )
        self._round_merchants = self._gauge("round_merchants", "Merchants in the last round's sum.")
        self._uploads = self._counter("round_uploads_total", "Updates that are in a round's sum.")
        self._dropouts = self._counter("round_dropouts_total", "Roster members lost after a set-up.")
        self._declines = self._counter("round_declines_total", "Merchants that declined, over all rounds.")
        self._blames = self._counter(
            "round_blames_total", "Merchants that broke the protocol, over all rounds."
        )
        self._norm = self._unknown("round_sum_norm", "Norm of the last round's noisy sum, model units.")
        self._norm_bound = self._unknown(
            "round_sum_norm_bound", "What honest updates and the noise explain of that norm."
        )
        self._set_ups = self._counter("setups_total", "Set-ups of secure aggregation that came about.")
        self._attempts = self._counter("attempts_total", "Set-ups of secure aggregation that were begun.")

    def _add_league(self) -> None:
        self._blocks = self._counter("blocks_total", "Blocks of rounds that were begun.")
        self._block_asked = self._gauge("block_asked_merchants", "Merchants asked for the present block.")
        self._block_connected = self._gauge("block_connected_merchants", "Merchants that came to it.")
        self._online = self._gauge("merchants_online", "Merchants whose nodes are online.")
        self._listed = self._gauge("merchants_listed", "Merchants in the league's directory.")
        self._training = self._gauge("training_active", "1 while a training is under way.")
        self._plan_rounds = self._gauge("plan_rounds", "Rounds of the plan.")
        self._plan_done = self._gauge("plan_rounds_done", "Rounds of it that are done.")
        self._plan_epsilon = self._unknown("plan_epsilon", "What a merchant pays for the whole plan.")
        self._reporting = self._gauge("spent_reporting_merchants", "Merchants that report what they spent.")
        self._highest = self._unknown(
            "spent_epsilon_highest", "The highest ε that a merchant reports, in all."
        )
        self._accuracy = self._unknown("evaluation_accuracy_ratio", "Accuracy of the model last evaluated.")
        self._accuracy_low = self._unknown("evaluation_accuracy_low_ratio", "Lower end of its interval.")
        self._accuracy_high = self._unknown("evaluation_accuracy_high_ratio", "Upper end of its interval.")
        self._loss = self._unknown("evaluation_loss", "Mean loss of the model last evaluated, in nats.")
        self._evaluated = self._gauge("evaluation_timestamp_seconds", "When a model was last evaluated.")
        self._released = self._gauge("released_version", "Number of the release that is the league's now.")
        self._released_at = self._gauge("released_timestamp_seconds", "When it was released or noticed.")
        self._certificate_end = self._unknown(
            "certificate_end_timestamp_seconds", "When the first of certificate, chain and authority ends."
        )
        self._directory_version = self._gauge("directory_version", "Version of the league's directory.")
        self._directory_end = self._unknown(
            "directory_end_timestamp_seconds", "When the directory or the first of its entries ends."
        )

    def _watch_disk(self, state: Path) -> None:
        free = self._gauge("state_free_bytes", "Free on the disk of the state folder, for this user.")
        size = self._gauge("state_size_bytes", "Size of that disk.")
        free.set_function(lambda: _disk(state)[0])
        size.set_function(lambda: _disk(state)[1])

    def _counter(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(f"hanse_{name}", text, labels, registry=self._registry)

    def _gauge(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Gauge:
        return Gauge(f"hanse_{name}", text, labels, registry=self._registry)

    def _unknown(self, name: str, text: str) -> Gauge:
        """Return a gauge whose 0 would be a statement: it is NaN, which no alert takes for a number, until set."""
        gauge = self._gauge(name, text)
        gauge.set(math.nan)
        return gauge

    def _histogram(
        self, name: str, text: str, buckets: tuple[float, ...], labels: tuple[str, ...] = ()
    ) -> Histogram:
        return Histogram(f"hanse_{name}", text, labels, buckets=buckets, registry=self._registry)


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _disk(folder: Path) -> tuple[float, float]:
    """Return free and total bytes of the disk of `folder`, NaN where nobody can tell."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return math.nan, math.nan
    return usage.free, usage.total
