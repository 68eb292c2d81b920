"""Flower runs as the executor takes them: one at a time, the pinned app alone, however they end."""

import queue
import threading
from collections.abc import Callable
from typing import Any

import pytest

from hanse_common.errors import RoundFailed
from hanse_server import flower_executor
from hanse_server.flower_executor import Executor, RunContext
from hanse_server.flower_link import SuperLink

# isort: split
from flwr.common.constant import Status, SubStatus
from flwr.supercore.task_identity import TaskIdentity

WAIT = 60.0

pytestmark = pytest.mark.usefixtures("quick_executor")


def status(link: SuperLink, run: int) -> tuple[str, str, str]:
    found = link.state.get_run_status({run})[run]
    return found.status, found.sub_status, found.details


def logged(link: SuperLink, run: int) -> str:
    (info,) = link.state.get_run_info(run_ids=[run])
    text: str = link.state.get_task_log(info.primary_task_id, None)[0]
    return text


@pytest.fixture
def finished(link: SuperLink, wait_until: Callable[..., Any]) -> Callable[[int], tuple[str, str]]:
    """Return a function that waits for a run's end and returns how it ended."""

    def wait(run: int) -> tuple[str, str]:
        wait_until("the run's end", lambda: status(link, run)[0] == Status.FINISHED)
        return status(link, run)[1:]

    return wait


def test_a_run_is_executed_with_a_grid_and_a_log(link: SuperLink, finished: Callable[[int], Any]) -> None:
    seen: list[Any] = []

    def run(context: RunContext) -> None:
        context.log("Round 1 of 2: alder.")
        context.log("x" * 100_000)
        seen.append(
            (context.run_id, context.grid.run.run_id, list(context.grid.get_nodes()), TaskIdentity.run_id)
        )

    with Executor(link.state, run):
        number = link.start_run()
        assert finished(number) == (SubStatus.COMPLETED, "")
    assert seen == [(number, number, [], number)]
    lines = logged(link, number).splitlines()
    assert lines[0] == "Round 1 of 2: alder."
    assert len(lines) == 2
    assert len(lines[1]) == flower_executor.MAX_LOG_CHARACTERS


def test_an_error_ends_its_run_alone_and_tells_flower_its_class_alone(
    link: SuperLink, finished: Callable[[int], Any]
) -> None:
    errors: queue.SimpleQueue[Exception] = queue.SimpleQueue()
    errors.put(RoundFailed("a text for the operator's eyes"))
    errors.put(KeyError("another"))

    def run(context: RunContext) -> None:
        if not errors.empty():
            raise errors.get()

    with Executor(link.state, run):
        ends = [finished(link.start_run()) for _ in range(3)]
    assert ends == [
        (SubStatus.FAILED, "RoundFailed"),
        (SubStatus.FAILED, "KeyError"),
        (SubStatus.COMPLETED, ""),
    ]


def test_runs_are_taken_one_at_a_time_in_order(link: SuperLink, finished: Callable[[int], Any]) -> None:
    begun: list[int] = []
    at_once: list[int] = []
    working = threading.Semaphore(1)

    def run(context: RunContext) -> None:
        begun.append(context.run_id)
        at_once.append(working.acquire(blocking=False))
        threading.Event().wait(0.05)
        working.release()

    numbers = [link.start_run() for _ in range(4)]
    with Executor(link.state, run):
        assert [finished(number) for number in numbers] == [(SubStatus.COMPLETED, "")] * 4
    assert begun == numbers
    assert at_once == [True] * 4


def test_a_stop_reaches_the_run(link: SuperLink, finished: Callable[[int], Any]) -> None:
    aborted = threading.Event()
    outcomes: list[bool] = []
    begun = threading.Event()

    def run(context: RunContext) -> None:
        begun.set()
        outcomes.append(aborted.wait(WAIT) and context.stopped.is_set())
        raise RoundFailed("because it was stopped")

    with Executor(link.state, run, aborted.set):
        number = link.start_run()
        assert begun.wait(WAIT)
        link.stop_run(number)
        assert finished(number) == (SubStatus.STOPPED, "")
        aborted.wait(WAIT)
    assert outcomes == [True]
    assert status(link, number) == (Status.FINISHED, SubStatus.STOPPED, "")


def test_a_stopped_run_is_followed_by_the_next(link: SuperLink, finished: Callable[[int], Any]) -> None:
    first = threading.Event()
    stops: list[None] = []

    def run(context: RunContext) -> None:
        if not first.is_set():
            first.set()
            assert context.stopped.wait(WAIT)

    with Executor(link.state, run, lambda: stops.append(None)):
        number = link.start_run()
        assert first.wait(WAIT)
        link.stop_run(number)
        assert finished(link.start_run()) == (SubStatus.COMPLETED, "")
    assert len(stops) == 1


def test_the_executors_end_stops_its_run(link: SuperLink) -> None:
    begun = threading.Event()

    def run(context: RunContext) -> None:
        begun.set()
        if context.stopped.wait(WAIT):
            raise RoundFailed("stopped")

    with Executor(link.state, run):
        number, waiting = link.start_run(), link.start_run()
        assert begun.wait(WAIT)
    assert status(link, number) == (Status.FINISHED, SubStatus.STOPPED, "")
    assert status(link, waiting)[0] == Status.PENDING


def test_other_kinds_of_flower_apps_are_never_taken(link: SuperLink, finished: Callable[[int], Any]) -> None:
    executed: list[int] = []
    with Executor(link.state, lambda context: executed.append(context.run_id)):
        fields: dict[str, Any] = {
            "fab_id": "a/b", "fab_version": "1", "fab_hash": None, "override_config": {},
            "federation_id": "@none/default", "federation_config": None, "flwr_aid": "none",
        }  # fmt: skip
        others = [
            link.state.create_run(**fields, primary_task_type=kind)
            for kind in ("flwr-agentapp", "flwr-simulation", "flwr-clientapp")
        ]
        number = link.start_run()
        finished(number)
        assert executed == [number]
        assert {status(link, other)[0] for other in others} == {Status.PENDING}


class Flaky:
    """A state some of whose calls fail the first times, and which counts them."""

    def __init__(self, state: Any, **failures: int) -> None:
        self.state, self.failures = state, failures
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **keywords: Any) -> Any:
            self.calls.append(name)
            if self.failures.get(name, 0) > 0:
                self.failures[name] -= 1
                raise OSError("database is locked")
            return getattr(self.state, name)(*arguments, **keywords)

        return call


def test_a_state_that_fails_for_a_while_is_asked_again(
    link: SuperLink, finished: Callable[[int], Any]
) -> None:
    state = Flaky(link.state, get_tasks=2, acknowledge_task_heartbeat=1, get_run_status=1)
    stopped = threading.Event()
    begun = threading.Event()

    def run(context: RunContext) -> None:
        begun.set()
        if context.stopped.wait(WAIT):
            stopped.set()

    with Executor(state, run):
        number = link.start_run()
        assert begun.wait(WAIT)
        link.stop_run(number)
        assert stopped.wait(WAIT)
    assert all(count == 0 for count in state.failures.values())


def test_flower_hears_that_a_run_goes_on(
    link: SuperLink, monkeypatch: pytest.MonkeyPatch, wait_until: Callable[..., Any]
) -> None:
    monkeypatch.setattr(flower_executor, "HEARTBEAT_SECONDS", 0.01)
    monkeypatch.setattr(flower_executor, "POLL_SECONDS", 0.01)
    state = Flaky(link.state)
    with Executor(state, lambda context: context.stopped.wait(WAIT) or None):
        number = link.start_run()
        wait_until("heartbeats", lambda: state.calls.count("acknowledge_task_heartbeat") > 2)
        assert status(link, number)[0] == Status.RUNNING


def test_an_executor_without_work_ends_at_once(link: SuperLink) -> None:
    with Executor(link.state, lambda context: None) as executor:
        assert executor._thread.is_alive()
    assert not executor._thread.is_alive()
