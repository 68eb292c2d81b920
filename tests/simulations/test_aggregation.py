"""Benchmarks of the server's sum: what they measure is what they say."""

import pytest

from hanse_simulations.benchmarks import scale
from hanse_simulations.benchmarks.aggregation import Best, _times
from hanse_simulations.benchmarks.memory import measured_apart

MIB = 1 << 20


def test_twenty_uploads_at_once_take_the_memory_of_a_few() -> None:
    """20 merchants send 8 MB each over TLS, all at once; all of them would be 160 MB."""
    dimension, merchants = 2_000_000, 20
    found = measured_apart("hanse_simulations.benchmarks.aggregation_memory", merchants, dimension)
    assert found["models"] * 4 * dimension < 4 * 4 * dimension + merchants * MIB


def test_the_sum_is_timed_beside_its_floor_and_its_peer() -> None:
    figures = _times(merchants=3, dimension=200_000, repeats=2)
    assert 0 < figures["floor_seconds"] < figures["ours_seconds"]
    assert figures["peer_over_floor"] > 1
    assert figures["over_floor"] == pytest.approx(figures["ours_seconds"] / figures["floor_seconds"])


def test_the_best_of_each_part_counts() -> None:
    best = Best()
    for _ in range(3):
        for part in "ab":
            with best.part(part):
                pass
    assert len(best._parts) == 2
    assert best.seconds == sum(best._parts.values())


def rows(cpu: list[float], seconds: list[float]) -> list[dict[str, float]]:
    sizes = [10 * 2**place for place in range(len(cpu))]
    return [
        {
            "merchants": n,
            "cpu_ms_per_message": one,
            "setup_cpu_ms_per_message": 1.0,
            "round_seconds": n * other,
        }
        for n, one, other in zip(sizes, cpu, seconds, strict=True)
    ]


def test_a_knee_is_where_a_figure_first_bends() -> None:
    flat = {"cpu_ms_per_message": None, "setup_cpu_ms_per_message": None, "round_seconds_a_merchant": None}
    assert scale.knees(rows([2.0, 1.0, 1.4], [1.0, 1.0, 1.4])) == flat
    assert scale.knees(rows([2.0, 1.0, 1.6, 9.0], [1.0] * 4)) == flat | {"cpu_ms_per_message": 40}
    assert scale.knees(rows([1.0, 1.0], [0.1, 0.2])) == flat | {"round_seconds_a_merchant": 20}
