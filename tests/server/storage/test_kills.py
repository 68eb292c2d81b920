"""kill -9 at every statement, sync, rename and deletion of a training: the next start goes on, to the same model."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import event, select
from sqlalchemy.engine import Engine

from hanse_server.audit import verify
from hanse_server.storage import Beginning, Progress, State
from hanse_server.storage.schema import AttemptRecord, RoundRecord

Make = Callable[..., Any]
STEP = 61
"""Every so manieth place in the quick test; it is coprime to the places of a round, so that each kind is met."""


class Places:
    """Counts the places where a process may die, and dies at one of them."""

    def __init__(self, at: int | None) -> None:
        self.met = 0
        self._at = at

    def __call__(self, *arguments: Any, **named: Any) -> None:
        if self.met == self._at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.met += 1

    def watch(self) -> None:
        """Be called before each statement, commit, sync, rename and deletion from now on."""
        for name in ("before_cursor_execute", "after_cursor_execute", "commit"):
            event.listen(Engine, name, self)
        for owner, name in ((os, "fsync"), (Path, "replace"), (Path, "unlink")):
            setattr(owner, name, self._before(getattr(owner, name)))

    def _before(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any, **named: Any) -> Any:
            self()
            return function(*arguments, **named)

        return called


class World:
    """One training in a folder; what merchants heard, in a file beside it."""

    def __init__(self, folder: Path, progress_of: Make, make_rounds: Make, train_all: Make) -> None:
        self._folder = folder
        self._progress_of, self._make_rounds, self._train_all = progress_of, make_rounds, train_all

    def trained(self) -> bytes:
        """Start, go on to the end, and return the model."""
        with State.open(self._folder / "state") as state, state.alone():
            state.collect()
            progress: Progress = self._progress_of(state, training={"rounds": 2})
            run = state.history.begin_run(progress.plan.digest, progress.rounds_done())
            progress.start_from(lambda: Beginning(np.zeros(progress.plan.dimension, dtype=np.float32)))
            rounds = self._make_rounds(progress)
            begin = progress.next_attempt

            def next_attempt() -> int:
                number = begin()
                with (self._folder / "heard").open("a") as file:
                    file.write(f"{number}\n")
                return number

            progress.next_attempt = next_attempt  # type: ignore[method-assign]
            model = self._train_all(progress, rounds)
            state.history.end_run(run, "finished")
        return bytes(model.tobytes())

    def check(self) -> None:
        """Hold what is there against what must be."""
        heard = [int(line) for line in (self._folder / "heard").read_text().split()]
        assert heard == sorted(set(heard))  # none was used twice
        with State.open(self._folder / "state") as state:
            verify(state.audit.entries())
            with state.database.reading() as session:
                assert set(heard) <= set(session.scalars(select(AttemptRecord.number)))
                rounds = session.scalars(select(RoundRecord).order_by(RoundRecord.number)).all()
            assert [(one.number, one.state) for one in rounds] == [(0, "applied"), (1, "applied")]
            assert len(list(state.objects.present())) == 2  # the beginning and the checkpoint


@pytest.fixture
def make_world(progress_of: Make, make_rounds: Make, train_all: Make) -> Callable[[Path], World]:
    def make(folder: Path) -> World:
        folder.mkdir()
        return World(folder, progress_of, make_rounds, train_all)

    return make


def _die_at_every(step: int, make_world: Callable[[Path], World], in_child: Make, folder: Path) -> None:
    whole = make_world(folder / "whole")
    counted = folder / "counted"

    def count() -> None:
        places = Places(None)
        places.watch()
        make_world(folder / "other").trained()
        counted.write_text(str(places.met))

    assert in_child(count) == 0
    model = whole.trained()
    whole.check()
    total = int(counted.read_text())
    assert total > 100
    for at in range(0, total, step):
        world = make_world(folder / f"at{at}")

        def die(world: World = world, at: int = at) -> None:
            Places(at).watch()
            world.trained()

        assert in_child(die) == signal.SIGKILL, at
        assert world.trained() == model, at
        world.check()


def test_a_training_that_is_killed_anywhere_goes_on_to_the_same_model(
    make_world: Callable[[Path], World], in_child: Make, tmp_path: Path
) -> None:
    _die_at_every(STEP, make_world, in_child, tmp_path)


@pytest.mark.slow
def test_a_training_that_is_killed_at_many_places_goes_on_to_the_same_model(
    make_world: Callable[[Path], World], in_child: Make, tmp_path: Path
) -> None:
    _die_at_every(5, make_world, in_child, tmp_path)
