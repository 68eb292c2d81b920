"""Schedules against torch's own, and what holds of every one of them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from torch.optim import lr_scheduler as theirs

from hanse_server.schedules import Constant, Cosine, Linear, MoveSchedule, Step

ROUNDS = 40
SCHEDULES = st.one_of(
    st.builds(Constant, warmup=st.integers(0, 50)),
    st.builds(Linear, warmup=st.integers(0, 50)),
    st.builds(Cosine, warmup=st.integers(0, 50)),
    st.builds(Step, warmup=st.integers(0, 50), every=st.integers(1, 50), gamma=st.floats(0.01, 1)),
)


def torch_factors(make: Callable[[Any, int], Any], warmup: int) -> list[float]:
    """Return the learning rates of torch's schedule, from 1, with a `LinearLR` before it for the warmup."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = make(optimizer, ROUNDS - warmup)
    if warmup:
        rise = theirs.LinearLR(optimizer, 1 / (warmup + 1), 1.0, warmup)
        schedule = theirs.SequentialLR(optimizer, [rise, schedule], [warmup])
    found = []
    for _ in range(ROUNDS):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize(
    ("ours", "make"),
    [
        (Constant, lambda o, left: theirs.ConstantLR(o, 1.0)),
        (Linear, lambda o, left: theirs.LinearLR(o, 1.0, 0.0, left)),
        (Cosine, lambda o, left: theirs.CosineAnnealingLR(o, left)),
        (lambda warmup: Step(every=6, gamma=0.3, warmup=warmup), lambda o, left: theirs.StepLR(o, 6, 0.3)),
    ],
    ids=["constant", "linear", "cosine", "step"],
)
def test_factors_are_torchs(ours: Any, make: Callable[[Any, int], Any], warmup: int) -> None:
    schedule = ours(warmup=warmup)
    found = [schedule.factor(round_, ROUNDS) for round_ in range(ROUNDS)]
    assert found == pytest.approx(torch_factors(make, warmup), rel=1e-9, abs=1e-12)


@settings(deadline=None)
@given(schedule=SCHEDULES, rounds=st.integers(1, 200))
def test_a_factor_rises_in_the_warmup_and_never_after_it(schedule: MoveSchedule, rounds: int) -> None:
    found = [schedule.factor(round_, rounds) for round_ in range(rounds)]
    assert all(0 < factor <= 1 for factor in found)
    rise, rest = found[: schedule.warmup], found[schedule.warmup :]
    assert rise == sorted(rise)
    assert rest == sorted(rest, reverse=True)
    assert not rest or rest[0] == 1
    assert len(set(rise)) == len(rise)


def test_linear_is_the_decay_there_was() -> None:
    assert [Linear().factor(round_, 4) for round_ in range(4)] == [1.0, 0.75, 0.5, 0.25]


@pytest.mark.parametrize("round_", [-1, 4, 5])
def test_a_round_that_is_none_is_refused(round_: int) -> None:
    with pytest.raises(ValueError, match=r"a round from 0 to 3, found"):
        Linear(warmup=2).factor(round_, 4)


@pytest.mark.parametrize(
    "config",
    [
        {"name": "linea"},
        {"name": "step"},
        {"name": "step", "every": 0},
        {"name": "step", "every": 2, "gamma": 1.5},
        {"name": "linear", "warmup": -1},
        {"name": "cosine", "every": 3},
    ],
)
def test_what_a_schedule_refuses(config: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(MoveSchedule).validate_python(config)
