"""Any order of what a server does, with crashes between, against a model in plain Python."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import func, select

from hanse_common.errors import StorageError
from hanse_server.audit import verify
from hanse_server.storage import Beginning, Checkpoint, State
from hanse_server.storage.schema import (
    TRANSITIONS,
    AttemptRecord,
    BlockRecord,
    CheckpointRecord,
    PlanRecord,
    RoundRecord,
    RunRecord,
    VersionRecord,
)

ROUNDS = 4
Make = Callable[..., Any]


class Server(RuleBasedStateMachine):
    """One plan's training, its evaluation, its runs and blocks, and the league's versions."""

    url: str | None = None
    progress_of: Make
    make_outcome: Make
    sign: Make

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.last_attempt = {"training": -1, "evaluation": -1}
        self.attempt_states: dict[tuple[str, int], str] = {}
        self.released: dict[str, int | None] = {"training": None, "evaluation": None}
        self.done = {"training": 0, "evaluation": 0}
        self.opened: dict[str, float] = {}
        self.model = -1.0
        self.runs: list[str] = []
        self.blocks: list[str] = []
        self.versions: list[str] = []
        self.release_numbers = 0
        self.seen: dict[tuple[str, Any], list[str]] = {}
        self._open()

    def _open(self) -> None:
        self.state = State.open(self.folder / "state", self.url)
        self.progress = {
            "training": self.progress_of(self.state),
            "evaluation": self.progress_of(self.state, serial=b"e" * 16),
        }
        self.dimension = self.progress["training"].plan.dimension

    def teardown(self) -> None:
        if hasattr(self, "state"):
            self.state.database.close()
            shutil.rmtree(self.folder)

    @rule()
    def crash(self) -> None:
        """A killed process leaves what was committed, and files that nothing names."""
        self.state.database.close()
        self._open()
        self.state.objects.put(b"half a round")
        half = self.folder / "state" / "objects" / "ab"
        half.mkdir(exist_ok=True)
        (half / ".half-written").write_bytes(b"half")
        self._collect()

    def _collect(self) -> None:
        with self.state.alone():
            self.state.collect()
        left = {path.name for path in (self.folder / "state" / "objects").rglob("*") if path.is_file()}
        assert left == self._named()

    def _named(self) -> set[str]:
        with self.state.database.reading() as session:
            named = set(session.scalars(select(CheckpointRecord.object)))
            rounds = select(RoundRecord.update).where(RoundRecord.state == "released")
            named |= set(session.scalars(rounds))
        for one in self.state.versions.all():
            named |= set(one.files.values())
        return named | self._started()

    def _started(self) -> set[str]:
        if not hasattr(self, "start"):
            return set()
        with self.state.database.reading() as session:
            return {
                digest for start in session.scalars(select(PlanRecord.start)) for digest in start.values()
            }

    @rule()
    def start_from(self) -> None:
        model = np.full(self.dimension, 3, np.float32)
        found = self.progress["training"].start_from(lambda: Beginning(model, b"card"))
        assert np.array_equal(found.model, model)
        assert found.card == b"card"
        self.start = True

    @rule(which=st.sampled_from(["training", "evaluation"]))
    def next_attempt(self, which: str) -> None:
        number = self.progress[which].next_attempt()
        assert number > self.last_attempt[which]
        before = (which, self.last_attempt[which])
        if before in self.attempt_states:
            self.attempt_states[before] = "spent" if self.attempt_states[before] == "released" else "lost"
        self.last_attempt[which] = number
        self.attempt_states[which, number] = "begun"

    @precondition(lambda self: self.last_attempt["training"] >= 0 and self.done["training"] < ROUNDS)
    @rule(value=st.integers(1, 100))
    def open_sum(self, value: int) -> None:
        round_ = self.done["training"]
        release = lambda: self.progress["training"].release(  # noqa: E731
            round_, self.make_outcome(np.full(self.dimension, float(value)))
        )
        if self.released["training"] is not None:
            with pytest.raises(StorageError):
                release()  # a round has one sum
            return
        release()
        self.released["training"], self.opened["training"] = round_, float(value)
        self.attempt_states["training", self.last_attempt["training"]] = "released"

    @precondition(lambda self: self.released["training"] is not None)
    @rule()
    def apply(self) -> None:
        self.model = self.opened["training"]
        self.progress["training"].apply(self._checkpoint(self.done["training"] + 1))
        self.done["training"] += 1
        self.released["training"] = None

    @precondition(lambda self: self.released["training"] is None)
    @rule(round_=st.integers(0, ROUNDS))
    def apply_what_was_not_opened(self, round_: int) -> None:
        with pytest.raises(StorageError):
            self.progress["training"].apply(self._checkpoint(round_))

    @precondition(lambda self: self.released["evaluation"] is None)
    @rule()
    def open_evaluation(self) -> None:
        digest = self.progress["training"].plan.digest.hex()
        subject = {"training": digest, "after": self.done["training"], "model": "ab" * 32}
        self.progress["evaluation"].release(
            self.done["evaluation"], self.make_outcome(np.ones(3)), subject=subject
        )
        self.released["evaluation"] = self.done["evaluation"]
        last = ("evaluation", self.last_attempt["evaluation"])
        if last in self.attempt_states:
            self.attempt_states[last] = "released"

    @precondition(lambda self: self.released["evaluation"] is not None)
    @rule()
    def evaluated(self) -> None:
        self.progress["evaluation"].evaluated(self.done["evaluation"], "{}")
        self.done["evaluation"] += 1
        self.released["evaluation"] = None

    @rule()
    def begin_run(self) -> None:
        number = self.state.history.begin_run(self.progress["training"].plan.digest, self.done["training"])
        self.runs = ["lost" if run == "running" else run for run in self.runs]
        self.blocks = ["lost" if block in ("gathering", "open") else block for block in self.blocks]
        self.runs.append("running")
        assert number == len(self.runs)

    @precondition(lambda self: self.runs)
    @rule(ending=st.sampled_from(["finished", "stopped", "failed"]), reason=st.text(max_size=40))
    def end_run(self, ending: str, reason: str) -> None:
        if self.runs[-1] != "running":
            with pytest.raises(StorageError):
                self.state.history.end_run(len(self.runs), ending, reason)
            return
        self.state.history.end_run(len(self.runs), ending, reason)
        self.runs[-1] = ending

    @rule()
    def request_stop(self) -> None:
        running = bool(self.runs) and self.runs[-1] == "running"
        assert self.state.history.request_stop() == (len(self.runs) if running else None)

    @precondition(lambda self: self.runs and self.runs[-1] == "running")
    @rule()
    def open_block(self) -> None:
        block = len(self.blocks).to_bytes(16, "big")
        plan = self.progress["training"].plan.digest
        self.state.history.open_block(len(self.runs), plan, block, {"order": ["alder"]})
        self.blocks.append("gathering")

    @precondition(lambda self: self.blocks)
    @rule(data=st.data(), state=st.sampled_from(["open", "closed", "failed"]))
    def move_block(self, data: st.DataObject, state: str) -> None:
        number = data.draw(st.integers(0, len(self.blocks) - 1))
        move = lambda: self.state.history.move_block(number.to_bytes(16, "big"), state)  # noqa: E731
        if state in TRANSITIONS["block"].get(self.blocks[number], ()):
            move()
            self.blocks[number] = state
        else:
            with pytest.raises(StorageError):
                move()

    @rule(content=st.integers(0, 5))
    def add_version(self, content: int) -> None:
        folder = self.folder / "recognizer"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "card.json").write_text(str(content))
        (folder / "model.safetensors").write_bytes(b"all have this one")
        made = self.state.versions.add(folder, self.progress["training"].plan.digest, None, bytes(32))
        if made.number > len(self.versions):
            self.versions.append("candidate")
        assert made.number <= len(self.versions)

    @precondition(lambda self: self.versions)
    @rule(data=st.data(), back=st.booleans())
    def release(self, data: st.DataObject, back: bool) -> None:
        number = data.draw(st.integers(1, len(self.versions)))
        version = self.state.versions.all()[number - 1]
        statement = self.sign(version, self.release_numbers + 1)
        go = lambda: self.state.versions.release(  # noqa: E731
            version.digest, statement, self.release_numbers + 1, "", back=back
        )
        if self.versions[number - 1] == "withdrawn":
            with pytest.raises(StorageError):
                go()  # withdrawn is for good
            return
        go()
        self.release_numbers += 1
        after = "withdrawn" if back else "superseded"
        self.versions = [after if state == "released" else state for state in self.versions]
        self.versions[number - 1] = "released"

    @invariant()
    def records_are_those_of_the_model(self) -> None:
        if not hasattr(self, "state"):
            return
        with self.state.database.reading() as session:
            assert [
                run.state for run in session.scalars(select(RunRecord).order_by(RunRecord.number))
            ] == self.runs
            assert [
                one.state for one in session.scalars(select(BlockRecord).order_by(BlockRecord.id))
            ] == self.blocks
            versions = select(VersionRecord.state).order_by(VersionRecord.number)
            assert list(session.scalars(versions)) == self.versions
            plans = {progress.plan.digest.hex(): which for which, progress in self.progress.items()}
            attempts = {
                (plans[one.plan], one.number): (one.state, one.ended)
                for one in session.scalars(select(AttemptRecord))
            }
            twice = select(RoundRecord.plan, RoundRecord.number).group_by(
                RoundRecord.plan, RoundRecord.number
            )
            assert not session.execute(twice.having(func.count() > 1)).all()
        assert {key: state for key, (state, _) in attempts.items()} == self.attempt_states
        assert all((ended is not None) == (state in ("spent", "lost")) for state, ended in attempts.values())
        assert self.runs.count("running") <= 1
        assert self.versions.count("released") <= 1
        verify(self.state.audit.entries())

    @invariant()
    def what_was_opened_is_found_and_what_was_applied_is_in_the_checkpoint(self) -> None:
        if not hasattr(self, "state"):
            return
        for which, progress in self.progress.items():
            found = progress.unapplied()
            assert (found and found[0]) == self.released[which]
            if found and which == "training":
                assert np.array_equal(found[1].update, np.full(self.dimension, self.opened[which]))
        assert self.progress["training"].rounds_done() == self.done["training"]
        opened = self.done["evaluation"] + (self.released["evaluation"] is not None)
        assert self.progress["evaluation"].rounds_released() == opened
        checkpoint = self.progress["training"].checkpoint()
        assert (checkpoint is not None) == (self.done["training"] > 0)
        if checkpoint is not None:
            assert checkpoint.rounds_done == self.done["training"]
            assert np.array_equal(checkpoint.model, np.full(self.dimension, self.model))

    @invariant()
    def what_is_named_is_there(self) -> None:
        if hasattr(self, "state"):
            assert self._named() <= set(self.state.objects.present())

    def _checkpoint(self, rounds_done: int) -> Checkpoint:
        model = np.full(self.dimension, self.model)
        return Checkpoint(rounds_done, model, {"m": model}, model, 0)


def _run(server: type[Server], examples: int, steps: int) -> None:
    run_state_machine_as_test(
        server,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            phases=(Phase.explicit, Phase.reuse, Phase.generate),
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.fixture
def server(progress_of: Make, make_outcome: Make, sign_release_of: Make) -> type[Server]:
    class Here(Server):
        pass

    Here.progress_of = staticmethod(progress_of)
    Here.make_outcome = staticmethod(make_outcome)
    Here.sign = staticmethod(sign_release_of)
    return Here


def test_records_keep_their_promises_whatever_happens(server: type[Server]) -> None:
    _run(server, examples=4, steps=20)


@pytest.mark.slow
def test_records_keep_their_promises_whatever_happens_for_long(server: type[Server]) -> None:
    _run(server, examples=60, steps=50)


@pytest.mark.slow
def test_records_keep_their_promises_on_postgresql(
    server: type[Server], make_postgresql: Callable[[], str]
) -> None:
    class There(server):  # type: ignore[misc,valid-type]
        @property
        def url(self) -> str:
            if not hasattr(self, "_url"):
                self._url = make_postgresql()
            return self._url

    _run(There, examples=8, steps=40)
