"""A whole training: resumed anywhere it gives the same model, and no attempt number is used twice."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from hanse_common.errors import RoundFailed, StorageError
from hanse_common.plan import Plan, SignedPlan
from hanse_server.coordinator import RoundOutcome
from hanse_server.league import RoundReport, train
from hanse_server.optimizers import create
from hanse_server.storage import Checkpoint, Progress, State

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


def progress_in(folder: Path, plan: Plan) -> Progress:
    signed = SignedPlan.sign(plan, Ed25519PrivateKey.from_private_bytes(bytes(32)))
    return State.open(folder).progress(signed, plan)


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
        progress_in(folder, plan),
        create({"name": "fedadam"}),
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


def test_attempt_numbers_grow_and_go_on_after_a_restart(make_plan: MakePlan, tmp_path: Path) -> None:
    plan = make_plan()
    progress = progress_in(tmp_path, plan)
    assert not progress.begun()
    assert [progress.next_attempt() for _ in range(3)] == [0, 1, 2]
    assert progress.begun()
    assert progress_in(tmp_path, plan).next_attempt() == 3


def test_plans_in_one_state_do_not_mix(make_plan: MakePlan, tmp_path: Path) -> None:
    plan, other = make_plan(), make_plan(league="other")
    with pytest.raises(Stop):
        go(plan, Deterministic(plan), tmp_path, 1)
    assert np.array_equal(
        go(other, Deterministic(other), tmp_path), go(other, Deterministic(other), tmp_path / "alone")
    )
    rest = Deterministic(plan)
    assert np.array_equal(go(plan, rest, tmp_path), go(plan, Deterministic(plan), tmp_path / "whole"))
    assert rest.seen == [2, 3]


def test_a_damaged_object_is_named_and_left_alone(make_plan: MakePlan, tmp_path: Path) -> None:
    plan = make_plan()
    with pytest.raises(Stop):
        go(plan, Deterministic(plan), tmp_path, 1)
    (kept,) = (path for path in (tmp_path / "objects").rglob("*") if path.is_file())
    kept.write_bytes(b"half of")
    with pytest.raises(StorageError, match=kept.name):
        go(plan, Deterministic(plan), tmp_path)
    assert kept.read_bytes() == b"half of"


class Crash(Exception):
    pass


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_sum_that_was_opened_is_applied_once_whenever_the_server_dies(
    make_plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    plan = make_plan()
    apply = Progress.apply

    def dies(self: Progress, checkpoint: Checkpoint) -> None:
        if checkpoint.rounds_done == 3:
            if when == "after":
                apply(self, checkpoint)
            raise Crash
        apply(self, checkpoint)

    with monkeypatch.context() as patched, pytest.raises(Crash):
        patched.setattr(Progress, "apply", dies)
        go(plan, Deterministic(plan), tmp_path)
    rest = Deterministic(plan)
    resumed = go(plan, rest, tmp_path)
    assert rest.seen == [3]  # what merchants paid for is not asked for again
    assert np.array_equal(resumed, go(plan, Deterministic(plan), tmp_path / "whole"))


def test_a_training_that_has_had_enough_ends_and_stays_ended(make_plan: MakePlan, tmp_path: Path) -> None:
    plan = make_plan()
    rounds = Deterministic(plan)
    asked: list[int] = []

    def enough(done: int, published: NDArray[np.float32]) -> bool:
        asked.append(done)
        return done == 2

    for _ in range(2):
        train(
            rounds,
            progress_in(tmp_path, plan),
            create({"name": "fedavg"}),
            np.zeros(plan.dimension, dtype=np.float32),
            tail_average=0,
            enough=enough,
        )
    assert rounds.seen == [0, 1]
    assert asked == [1, 2, 2]


def test_what_is_published_is_the_mean_of_the_last_rounds_models(make_plan: MakePlan, tmp_path: Path) -> None:
    plan = make_plan()
    after, published = [], []

    def on_round(report: RoundReport) -> None:
        checkpoint = progress_in(tmp_path, plan).checkpoint()
        assert checkpoint is not None
        after.append(checkpoint.model)
        published.append(report.published)

    final = go(plan, Deterministic(plan), tmp_path, on_report=on_round)
    assert np.array_equal(published[1], after[1].astype(np.float32))  # the tail has not begun
    assert np.array_equal(final, np.mean(after[2:], axis=0).astype(np.float32))
    assert np.array_equal(final, published[-1])
    assert not np.array_equal(final, after[-1].astype(np.float32))
