"""A whole training: resumed anywhere it gives the same model, and no attempt number is used twice."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from hanse_common.errors import ConfigError, RoundFailed
from hanse_common.plan import Plan, SignedPlan
from hanse_server.coordinator import RoundOutcome
from hanse_server.league import RoundReport, train
from hanse_server.optimizers import create
from hanse_server.store import Store

MakePlan = Callable[..., Plan]


class Deterministic:
    """Rounds whose update depends on round and model alone; they remember which were asked for."""

    def __init__(self, plan: Plan, fails: frozenset[int] = frozenset()) -> None:
        self.plan = plan
        self.fails = fails
        self.seen: list[int] = []

    def run(self, round_: int, model: NDArray[np.float32]) -> RoundOutcome:
        self.seen.append(round_)
        if round_ in self.fails:
            raise RoundFailed(f"Round {round_ + 1} of 4 failed.")
        update = 0.1 * (round_ + 1) - 0.5 * model.astype(np.float64)
        return RoundOutcome(update, ("a", "b", "c"), (), {}, {})


class Stop(Exception):
    pass


def go(
    plan: Plan,
    rounds: Deterministic,
    folder: Path,
    stop_after: int | None = None,
    on_report: Callable[[RoundReport], None] = lambda report: None,
) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    def on_round(report: RoundReport) -> None:
        on_report(report)
        if report.round == stop_after:
            raise Stop

    return train(
        rounds,
        SignedPlan.sign(plan, Ed25519PrivateKey.from_private_bytes(bytes(32))),
        plan,
        create({"name": "fedadam"}),
        Store(folder),
        np.ones(plan.dimension, dtype=np.float32),
        tail_average=0.5,
        on_round=on_round,
    )


@pytest.mark.parametrize("stop_after", [0, 1, 2, 3])
def test_a_resumed_training_ends_with_the_same_model(
    make_plan: MakePlan, tmp_path: Path, stop_after: int
) -> None:
    plan = make_plan()
    whole = go(plan, Deterministic(plan), tmp_path / "whole")
    with pytest.raises(Stop):
        go(plan, Deterministic(plan), tmp_path / "parts", stop_after)
    rest = Deterministic(plan)
    resumed = go(plan, rest, tmp_path / "parts")
    assert np.array_equal(whole, resumed)
    assert rest.seen == list(range(stop_after + 1, 4))


def test_a_round_that_fails_for_good_keeps_the_round_before(make_plan: MakePlan, tmp_path: Path) -> None:
    plan = make_plan()
    with pytest.raises(RoundFailed, match="Round 3 of 4"):
        go(plan, Deterministic(plan, frozenset({2})), tmp_path)
    again = Deterministic(plan)
    assert np.array_equal(go(plan, again, tmp_path), go(plan, Deterministic(plan), tmp_path / "whole"))
    assert again.seen == [2, 3]


def test_attempt_numbers_grow_and_go_on_after_a_restart(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert not store.begun()
    assert [store.next_attempt() for _ in range(3)] == [0, 1, 2]
    assert store.begun()
    assert Store(tmp_path).next_attempt() == 3


def test_a_store_of_another_plan_is_refused(make_plan: MakePlan, tmp_path: Path) -> None:
    go(make_plan(), Deterministic(make_plan()), tmp_path)
    other = make_plan(league="other")
    with pytest.raises(ConfigError, match="another plan"):
        go(other, Deterministic(other), tmp_path)


@pytest.mark.parametrize("name", ["checkpoint.safetensors", "plan.hanse"])
def test_a_damaged_file_is_named_and_left_alone(make_plan: MakePlan, tmp_path: Path, name: str) -> None:
    plan = make_plan()
    with pytest.raises(Stop):
        go(plan, Deterministic(plan), tmp_path, 1)
    (tmp_path / name).write_bytes(b"half of")
    with pytest.raises(ConfigError, match=name):
        go(plan, Deterministic(plan), tmp_path)
    assert (tmp_path / name).read_bytes() == b"half of"


@pytest.mark.parametrize(
    "content",
    [b"half of", b'{"attempt":Infinity}', b"[" * 4000, b'{"attempt":-5}', b'{"round":0,"attempt":1}'],
)
def test_an_attempt_file_that_makes_no_sense_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "attempt.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"attempt\.json"):
        Store(tmp_path).next_attempt()
    assert (tmp_path / "attempt.json").read_bytes() == content


def test_what_is_published_is_the_mean_of_the_last_rounds_models(make_plan: MakePlan, tmp_path: Path) -> None:
    plan = make_plan()
    after, published = [], []

    def on_round(report: RoundReport) -> None:
        checkpoint = Store(tmp_path).load(plan.digest, plan.dimension)
        assert checkpoint is not None
        after.append(checkpoint.model)
        published.append(report.published)

    final = go(plan, Deterministic(plan), tmp_path, on_report=on_round)
    assert np.array_equal(published[1], after[1].astype(np.float32))  # the tail has not begun
    assert np.array_equal(final, np.mean(after[2:], axis=0).astype(np.float32))
    assert np.array_equal(final, published[-1])
    assert not np.array_equal(final, after[-1].astype(np.float32))
