"""The metrics: Prometheus' own parser reads them, they say what happened, and they name nobody."""

import math
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from hanse_common.secagg.messages import Agreed, Joined, Ready, Shares, Unmasked, Upload
from hanse_server import metrics as module
from hanse_server.metrics import CONTENT_TYPE, FEWEST_REPORTING, OTHER, TRIPS, Failure, Metrics
from hanse_server.observed import ObservedTransport, TripObservation

NOW = 1_800_000_000.0


@pytest.fixture
def metrics(tmp_path: Path) -> Metrics:
    return Metrics(state=tmp_path, clock=lambda: NOW)


def samples(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(metrics.exposition().decode())
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return samples(metrics)[f"hanse_{name}", tuple(sorted(labels.items()))]


def observation(**changes: Any) -> TripObservation:
    fields: dict[str, Any] = {
        "kind": "upload",
        "asked": ("alder", "birch", "cedar"),
        "seconds": {"alder": 0.05, "birch": 2.0},
        "deadline": 5.0,
        "lasted": 5.0,
        "sent_bytes": 300,
        "received_bytes": 8000,
    }
    return TripObservation(**(fields | changes))


def test_a_trip_is_counted_by_its_kind(metrics: Metrics) -> None:
    metrics.trip(observation())
    metrics.trip(observation(seconds={"alder": 0.05, "birch": 2.0, "cedar": 700.0}))
    for name, expected in (
        ("trips_total", 2),
        ("trip_questions_total", 6),
        ("trip_late_total", 1),
        ("trip_sent_bytes_total", 600),
        ("trip_received_bytes_total", 16_000),
        ("trip_answer_seconds_count", 5),
        ("trip_answer_seconds_sum", 704.1),
        ("trip_seconds_sum", 10),
    ):
        assert value(metrics, name, trip="upload") == pytest.approx(expected), name
        assert value(metrics, name, trip="ready") == 0
    assert value(metrics, "trip_answer_seconds_bucket", trip="upload", le="0.1") == 2
    assert value(metrics, "trip_answer_seconds_bucket", trip="upload", le="600.0") == 4


def test_an_answer_of_nobody_that_was_asked_does_not_count(metrics: Metrics) -> None:
    metrics.trip(observation(seconds={"mallory": 0.1}))
    assert value(metrics, "trip_late_total", trip="upload") == 3
    assert value(metrics, "trip_answer_seconds_count", trip="upload") == 0


def test_the_kinds_are_those_that_the_coordinator_asks_for() -> None:
    asked = tuple(model.__name__.lower() for model in (Joined, Shares, Ready, Upload, Agreed, Unmasked))
    assert asked == TRIPS


def test_a_transport_that_is_observed_feeds_it(metrics: Metrics) -> None:
    class Transport:
        def gather(self) -> tuple[str, ...]:
            return ("alder",)

        merchants = gather

        def exchange(self, kind: str, payloads: Any, deadline: float) -> Iterator[tuple[str, bytes]]:
            yield "alder", b"answer"

    transport = ObservedTransport(Transport(), [metrics.trip])
    list(transport.exchange("joined", {"alder": b"question", "birch": b"question"}, 1.0))
    assert value(metrics, "trip_sent_bytes_total", trip="joined") == 16
    assert value(metrics, "trip_received_bytes_total", trip="joined") == 6
    assert value(metrics, "trip_late_total", trip="joined") == 1


def test_rounds_are_counted_with_who_took_what_part(metrics: Metrics) -> None:
    metrics.round_done(uploaded=5, dropped=1, declined=2, blamed=0, seconds=2.0, norm=3.5, norm_bound=9.0)
    metrics.round_done(uploaded=4, dropped=2, declined=0, blamed=1, seconds=40.0)
    assert value(metrics, "rounds_total") == 2
    assert value(metrics, "round_merchants") == 4
    assert value(metrics, "round_uploads_total") == 9
    assert value(metrics, "round_dropouts_total") == 3
    assert value(metrics, "round_declines_total") == 2
    assert value(metrics, "round_blames_total") == 1
    assert value(metrics, "round_seconds_sum") == 42
    assert value(metrics, "round_end_timestamp_seconds") == NOW
    assert math.isnan(value(metrics, "round_sum_norm")), "of the last round nothing is known"
    metrics.round_done(uploaded=4, dropped=0, declined=0, blamed=0, seconds=1.0, norm=3.5, norm_bound=9.0)
    assert (value(metrics, "round_sum_norm"), value(metrics, "round_sum_norm_bound")) == (3.5, 9.0)


def test_failures_set_ups_and_attempts_are_counted(metrics: Metrics) -> None:
    metrics.attempt()
    metrics.attempt()
    metrics.set_up()
    metrics.round_failed(Failure.SUM_LOST)
    assert (value(metrics, "attempts_total"), value(metrics, "setups_total")) == (2, 1)
    found = {reason.value: value(metrics, "round_failures_total", reason=reason.value) for reason in Failure}
    assert found == dict.fromkeys(found, 0.0) | {"sum_lost": 1.0}


def test_the_league_as_it_stands(metrics: Metrics) -> None:
    metrics.block(asked=9, connected=7)
    metrics.merchants(online=8, listed=10)
    metrics.training(True)
    metrics.plan(rounds=60, rounds_done=12, epsilon=2.998)
    metrics.evaluation(accuracy=0.91, low=0.9, high=0.92, loss=0.3)
    metrics.version(4)
    metrics.certificate(-60)
    metrics.directory(version=17, seconds_left=3600)
    for name, expected in (
        ("blocks_total", 1),
        ("block_asked_merchants", 9),
        ("block_connected_merchants", 7),
        ("merchants_online", 8),
        ("merchants_listed", 10),
        ("training_active", 1),
        ("plan_rounds", 60),
        ("plan_rounds_done", 12),
        ("plan_epsilon", 2.998),
        ("evaluation_accuracy_ratio", 0.91),
        ("evaluation_accuracy_low_ratio", 0.9),
        ("evaluation_accuracy_high_ratio", 0.92),
        ("evaluation_loss", 0.3),
        ("evaluation_timestamp_seconds", NOW),
        ("released_version", 4),
        ("released_timestamp_seconds", NOW),
        ("certificate_end_timestamp_seconds", NOW - 60),
        ("directory_version", 17),
        ("directory_end_timestamp_seconds", NOW + 3600),
    ):
        assert value(metrics, name) == expected, name
    metrics.training(False)
    assert value(metrics, "training_active") == 0


def test_what_nobody_has_said_yet_is_no_number(metrics: Metrics) -> None:
    unknown = {name for (name, _), found in samples(metrics).items() if math.isnan(found)}
    assert unknown >= {
        "hanse_evaluation_accuracy_ratio",
        "hanse_spent_epsilon_highest",
        "hanse_certificate_end_timestamp_seconds",
        "hanse_directory_end_timestamp_seconds",
    }


def test_the_highest_epsilon_is_hidden_while_it_would_be_a_known_merchants(metrics: Metrics) -> None:
    metrics.spent(FEWEST_REPORTING - 1, 1.5)
    assert value(metrics, "spent_reporting_merchants") == FEWEST_REPORTING - 1
    assert math.isnan(value(metrics, "spent_epsilon_highest"))
    metrics.spent(FEWEST_REPORTING, 1.5)
    assert value(metrics, "spent_epsilon_highest") == 1.5
    metrics.spent(0, None)
    assert math.isnan(value(metrics, "spent_epsilon_highest"))


@settings(max_examples=25)
@given(
    st.lists(
        st.tuples(st.text(max_size=9), st.lists(st.text(min_size=12, max_size=20), max_size=5)), max_size=5
    )
)
def test_whatever_merchants_do_there_are_as_many_series_and_none_names_one(
    trips: list[tuple[str, list[str]]],
) -> None:
    metrics = Metrics()
    before = samples(metrics).keys()
    for kind, merchants in trips:
        metrics.trip(observation(kind=kind, asked=tuple(merchants), seconds=dict.fromkeys(merchants, 1.0)))
    after = samples(metrics)
    assert after.keys() == before
    strange = sum(kind not in TRIPS for kind, _ in trips)
    assert after["hanse_trips_total", (("trip", OTHER),)] == strange


def test_names_and_types_follow_the_conventions(metrics: Metrics) -> None:
    families = list(text_string_to_metric_families(metrics.exposition().decode()))
    assert len({family.name for family in families}) == len(families)
    for family in families:
        assert re.fullmatch(r"(hanse|process)_[a-z0-9_]+", family.name)
        assert family.documentation
        assert family.type in ("counter", "gauge", "histogram")
        if family.name.startswith("hanse_"):
            assert not re.search(r"(milli|micro|minutes|hours|kilo|mega|percent|_total$)", family.name)
            assert {label for sample in family.samples for label in sample.labels} <= {
                "trip",
                "reason",
                "le",
                "version",
            }
    assert CONTENT_TYPE == "text/plain; version=0.0.4; charset=utf-8"


@pytest.mark.skipif(shutil.which("promtool") is None, reason="there is no promtool here")
def test_promtool_finds_nothing_to_complain_of(metrics: Metrics) -> None:
    metrics.trip(observation())
    done = subprocess.run(
        ["promtool", "check", "metrics"],
        input=metrics.exposition(),
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_the_process_and_its_disk_are_told(metrics: Metrics, tmp_path: Path) -> None:
    found = samples(metrics)
    assert found["process_resident_memory_bytes", ()] > 1e6
    assert found["process_start_time_seconds", ()] > 1e9
    usage = shutil.disk_usage(tmp_path)
    assert value(metrics, "state_size_bytes") == usage.total
    assert value(metrics, "state_free_bytes") == pytest.approx(usage.free, rel=0.1)
    assert math.isnan(value(Metrics(state=tmp_path / "nowhere"), "state_free_bytes"))


def test_servers_in_one_process_have_metrics_of_their_own(metrics: Metrics) -> None:
    other = Metrics()
    other.set_up()
    assert (value(metrics, "setups_total"), value(other, "setups_total")) == (0, 1)


def test_threads_lose_no_event(metrics: Metrics) -> None:
    def work() -> None:
        for number in range(200):
            metrics.trip(observation())
            if number % 50 == 0:
                metrics.exposition()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert value(metrics, "trip_answer_seconds_count", trip="upload") == 1600


def test_the_release_is_told(metrics: Metrics) -> None:
    assert value(metrics, "build_info", version=module.version("hanse")) == 1
