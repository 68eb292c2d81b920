"""Token buckets against a plain reckoning of the same rule."""

from hypothesis import given
from hypothesis import strategies as st

from hanse_server import rates
from hanse_server.rates import Rate, Rates


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_burst_then_a_trickle() -> None:
    clock = Clock()
    buckets = Rates(Rate(burst=3, per_second=0.5), clock)
    assert [buckets.take("a") for _ in range(4)] == [0.0, 0.0, 0.0, 2.0]
    assert buckets.take("b") == 0.0  # another's flood
    clock.now = 2.0
    assert buckets.take("a") == 0.0
    assert buckets.take("a") == 2.0


def test_whoever_was_refused_long_waits_no_longer_for_it() -> None:
    clock = Clock()
    buckets = Rates(Rate(burst=2, per_second=1.0), clock)
    for _ in range(10_000):
        buckets.charge("a")
    assert buckets.wait("a") == 1.0


def test_what_filled_up_is_forgotten_and_the_rest_is_bounded() -> None:
    clock = Clock()
    buckets = Rates(Rate(burst=1, per_second=1.0), clock)
    for number in range(3 * rates.MOST_KEYS):
        buckets.charge(number)
    assert len(buckets) == rates.MOST_KEYS
    clock.now = 1.0
    assert not buckets.wait(3 * rates.MOST_KEYS - 1)
    assert len(buckets) == rates.MOST_KEYS - 1


@given(st.integers(1, 5), st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, 4.0]), max_size=40))
def test_no_span_of_time_has_more_than_burst_and_rate_allow(burst: int, pauses: list[float]) -> None:
    clock = Clock()
    buckets = Rates(Rate(burst=burst, per_second=1.0), clock)
    taken = []
    for pause in pauses:
        clock.now += pause
        if not buckets.take("a"):
            taken.append(clock.now)
    for first, since in enumerate(taken):
        for last in range(first, len(taken)):
            assert last - first + 1 <= burst + (taken[last] - since) + 1e-9
