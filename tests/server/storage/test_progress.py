"""Attempts, sums and checkpoints over each database: what a crash leaves, and what a restore leaves out."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from sqlalchemy import select

from hanse_common.errors import StorageError
from hanse_server.audit import verify
from hanse_server.coordinator import RoundOutcome
from hanse_server.storage import Progress, State
from hanse_server.storage.schema import AttemptRecord, ParticipantRecord, RoundRecord

Make = Callable[..., Any]


def test_a_whole_training_ends_with_the_same_model_over_any_database(
    state: State, progress_of: Make, train_all: Make, tmp_path: Any
) -> None:
    model = train_all(progress_of(state))
    with State.open(tmp_path / "by-default") as other:
        assert train_all(progress_of(other)).tobytes() == model.tobytes()
        entries = [(entry.kind, entry.facts) for entry in other.audit.entries()]
    assert [(entry.kind, entry.facts) for entry in state.audit.entries()] == entries
    verify(state.audit.entries())


def test_a_sum_comes_back_as_it_was_opened(state: State, progress_of: Make, make_outcome: Make) -> None:
    progress: Progress = progress_of(state)
    given: RoundOutcome = make_outcome(np.linspace(-1, 1, progress.plan.dimension) / 3)
    progress.next_attempt()
    progress.release(0, given)
    found = progress.unapplied()
    assert found is not None
    assert found[0] == 0
    assert found[1].update.tobytes() == given.update.tobytes()
    # A text that no database keeps is changed, not refused.
    assert found[1].blamed == {"elder": "its key is 0?? and 雪"}
    assert replace(found[1], update=given.update, blamed={}) == replace(given, blamed={})
    assert found[1].bound == math.inf


def test_long_and_strange_reasons_are_cut_and_kept(state: State, progress_of: Make) -> None:
    progress: Progress = progress_of(state)
    for reason in ("\U0001f600" * 5000, "\0" * 5000, "\ud800" * 5000, "雪" * 5000):
        run = state.history.begin_run(progress.plan.digest, 0)
        state.history.end_run(run, "failed", reason)
        found = state.history.last_run()
        assert found is not None
        assert len(found.reason) == 1000
    verify(state.audit.entries())


def test_left_out_rounds_are_not_asked_for_and_their_attempts_are_not_used(
    state: State, progress_of: Make, make_rounds: Make, train_all: Make
) -> None:
    progress: Progress = progress_of(state)
    with pytest.raises(_Stopped):
        train_all(progress, on_round=_stop_after(0))
    progress.leave_out(3)
    assert progress.rounds_done() == 3
    rounds = make_rounds(progress)
    train_all(progress, rounds)
    assert rounds.seen == [3]
    assert progress.rounds_done() == 4


def test_a_sum_that_was_opened_is_applied_before_rounds_are_left_out(
    state: State, progress_of: Make, make_rounds: Make, make_outcome: Make, train_all: Make
) -> None:
    progress: Progress = progress_of(state)
    progress.next_attempt()
    progress.release(0, make_outcome(np.ones(progress.plan.dimension)))
    progress.leave_out(2)
    done: list[int] = []
    rounds = make_rounds(progress)
    train_all(progress, rounds, on_round=lambda report: done.append(report.round))
    assert done == [0, 2, 3]
    assert rounds.seen == [2, 3]


def test_all_rounds_may_be_left_out_and_no_more(
    state: State, progress_of: Make, make_rounds: Make, train_all: Make
) -> None:
    progress: Progress = progress_of(state)
    with pytest.raises(_Stopped):
        train_all(progress, on_round=_stop_after(1))
    with pytest.raises(StorageError, match="5 rounds to leave out, it has 4"):
        progress.leave_out(5)
    progress.leave_out(4)
    rounds = make_rounds(progress)
    model = train_all(progress, rounds)
    assert rounds.seen == []
    checkpoint = progress.checkpoint()
    assert checkpoint is not None
    assert np.array_equal(model, checkpoint.model.astype(np.float32))


def test_left_out_evaluations_are_used_up(state: State, progress_of: Make, make_outcome: Make) -> None:
    evaluation: Progress = progress_of(state)
    evaluation.leave_out(2)
    assert evaluation.rounds_released() == 2
    evaluation.next_attempt()
    evaluation.release(2, make_outcome(np.ones(3)), subject={"training": "", "after": 0, "model": ""})
    assert evaluation.rounds_released() == 3


def test_an_attempt_that_came_to_nothing_is_lost_and_one_that_did_is_spent(
    state: State, progress_of: Make, train_all: Make
) -> None:
    progress: Progress = progress_of(state)
    progress.next_attempt()
    train_all(progress)
    with state.database.reading() as session:
        found = session.scalars(select(AttemptRecord).order_by(AttemptRecord.number)).all()
        assert [one.state for one in found] == ["lost", "spent", "spent", "spent", "released"]
        assert [one.ended is None for one in found] == [False] * 4 + [True]
        assert set(session.scalars(select(RoundRecord.state))) == {"applied"}
        of_round = select(ParticipantRecord).where(ParticipantRecord.round == 0)
        roles = {one.name: one.role for one in session.scalars(of_round)}
    assert roles == {
        "alder": "uploaded",
        "birch": "uploaded",
        "cedar": "dropped",
        "damson": "declined",
        "elder": "blamed",
    }


def test_objects_do_not_pile_up_while_training(state: State, progress_of: Make, train_all: Make) -> None:
    counts: list[int] = []
    train_all(progress_of(state), on_round=lambda report: counts.append(len(list(state.objects.present()))))
    assert counts == [1, 1, 1, 1]


class _Stopped(Exception):
    pass


def _stop_after(round_: int) -> Callable[[Any], None]:
    def stop(report: Any) -> None:
        if report.round == round_:
            raise _Stopped

    return stop
