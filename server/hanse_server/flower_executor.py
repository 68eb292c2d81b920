"""Runs the league's own ServerApp for each Flower run, in this process, and nothing that a bundle carries.

    with Executor(link.state, run=train, on_stop=streams.abort):
        ...

A Flower run, whoever began it and with whichever bundle, is here only a request to train: its bundle is neither
unpacked nor imported. Runs are taken one at a time, in order.
"""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self, cast

from flwr.app import Context, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID, Status, SubStatus
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.proto.task_pb2 import Task
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.constant import TaskType
from flwr.supercore.servicer.runtime import runtime_handlers as core_handlers
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid
from flwr.superlink.servicer.runtime import runtime_handlers as handlers

log = logging.getLogger(__name__)

POLL_SECONDS = 0.25
STOP_SECONDS = 30.0


@dataclass(frozen=True)
class RunContext:
    """What a run works with: Flower's grid, a log that `flwr log` shows, and whether somebody stopped it."""

    grid: Grid
    log: Callable[[str], None]
    stopped: threading.Event = field(default_factory=threading.Event)


class _InProcessRuntime:
    """Flower's Runtime API without its network: each call of the client is its handler's."""

    def __init__(self, state: Any, task: Task) -> None:
        self._state, self._task = state, task

    def GetNodes(self, request: Any) -> Any:  # noqa: N802 - Flower's names
        return handlers.get_nodes(request, self._state, self._task)

    def PushMessages(self, request: Any) -> Any:  # noqa: N802
        return handlers.push_messages(request, self._state, self._task)

    def PullMessages(self, request: Any) -> Any:  # noqa: N802
        return handlers.pull_messages(request, self._state, self._task)

    def PushObject(self, request: Any) -> Any:  # noqa: N802
        return handlers.push_object(request, self._state, self._task)

    def PullObject(self, request: Any) -> Any:  # noqa: N802
        return handlers.pull_object(request, self._state, self._task)

    def ConfirmMessageReceived(self, request: Any) -> Any:  # noqa: N802
        return handlers.confirm_message_received(request, self._state, self._task)

    def close(self) -> None:
        """Nothing is open."""


class Executor:
    """A thread that runs `run` for each Flower run of `state`; `on_stop` is called when one is stopped."""

    def __init__(
        self, state: Any, run: Callable[[RunContext], None], on_stop: Callable[[], None] = lambda: None
    ) -> None:
        self._state = state
        self._run = run
        self._on_stop = on_stop
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._work, name="executor", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Stop the run that is going on, if any, and end."""
        self._ending.set()
        self._thread.join(STOP_SECONDS)

    def _work(self) -> None:
        wanted = AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP])
        while not self._ending.wait(POLL_SECONDS):
            try:
                acquired = core_handlers.acquire_task(wanted, self._state)
                if acquired.token and self._state.activate_task(acquired.task.task_id):
                    self._execute(acquired.task)
            except Exception:
                log.exception("A Flower run could not be executed; waiting for the next.")

    def _execute(self, task: Task) -> None:
        """Run the pinned ServerApp and tell Flower how it ended."""
        grid = HttpGrid(token="in-process")  # noqa: S106 - no token is ever used: its client is replaced
        grid._client = cast(Any, _InProcessRuntime(self._state, task))
        (info,) = self._state.get_run_info(run_ids=[task.run_id])
        grid.set_run(info)
        context = RunContext(grid, lambda text: self._state.add_task_log(task.task_id, text + "\n"))
        over = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(task, context, over), daemon=True)
        watcher.start()
        # Global in flwr, which puts them into every message: runs are executed one at a time.
        TaskIdentity.task_id, TaskIdentity.run_id = task.task_id, task.run_id
        TaskIdentity.node_id = SUPERLINK_NODE_ID
        app = ServerApp()

        @app.main()
        def main(grid: Grid, flower_context: Context) -> None:
            self._run(context)

        flower_context = Context(
            run_id=task.run_id, node_id=SUPERLINK_NODE_ID, node_config={}, state=RecordDict(), run_config={}
        )
        outcome, details = SubStatus.FAILED, ""
        try:
            app(grid=grid, context=flower_context)
            outcome = SubStatus.COMPLETED
        except Exception as error:
            log.debug("A run ended with an error.", exc_info=True)
            details = type(error).__name__
        finally:
            over.set()
            watcher.join()
            if not context.stopped.is_set() or self._ending.is_set():
                outcome = SubStatus.STOPPED if self._ending.is_set() else outcome
                self._state.finish_task(task.task_id, outcome, details)

    def _watch(self, task: Task, context: RunContext, over: threading.Event) -> None:
        """Keep the task alive in Flower's eyes, and see when somebody stops it."""
        while not over.wait(POLL_SECONDS):
            self._state.acknowledge_task_heartbeat(task.task_id)
            status = self._state.get_run_status({task.run_id}).get(task.run_id)
            gone = status is None or status.status == Status.FINISHED
            if (gone or self._ending.is_set()) and not context.stopped.is_set():
                context.stopped.set()
                self._on_stop()
