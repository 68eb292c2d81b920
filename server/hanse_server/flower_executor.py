"""Runs the league's own ServerApp for each Flower run, in this process, and nothing that a bundle carries.

    with Executor(link.state, run=train, on_stop=streams.abort):
        ...

A Flower run, whoever began it and with whichever bundle, is here only a request to train: its bundle is neither
unpacked nor imported, nor is its configuration read. Runs are taken one at a time, in order. What `run` does is
seen by `flwr ls` and `flwr log`, and `flwr stop` reaches it.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self, cast

from flwr.app import Context, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID, Status, SubStatus
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.message_pb2 import ObjectTree, PullObjectResponse
from flwr.proto.runtime_pb2 import AcquireTaskRequest, PullAppMessagesRequest, PullAppMessagesResponse
from flwr.proto.task_pb2 import Task
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.constant import TaskType
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.servicer.runtime import runtime_handlers as core_handlers
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid
from flwr.superlink.servicer.runtime import runtime_handlers as handlers

log = logging.getLogger(__name__)

POLL_SECONDS = 0.5
"""How often we look for a run to begin, and whether the present one was stopped."""

HEARTBEAT_SECONDS = 10.0
"""How often Flower hears that the run goes on. It gives a silent one up after 60 s."""

ARRIVAL_SECONDS = 10.0
"""How long the objects of a reply may come after its envelope."""

STOP_SECONDS = 30.0
MAX_LOG_CHARACTERS = 4000


@dataclass(frozen=True)
class RunContext:
    """What a run works with: Flower's grid, a log that `flwr log` shows, and whether somebody stopped it."""

    run_id: int
    grid: Grid
    log: Callable[[str], None]
    stopped: threading.Event = field(default_factory=threading.Event)


class Executor:
    """A thread that runs `run` for each Flower run of `state`; `on_stop` is called when one is stopped.

    `state` is Flower's LinkState. `run` should end soon after `on_stop` or `context.stopped`; whatever it raises
    ends that Flower run alone, as failed, with the error's class and no more.
    """

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
        """Stop the run that is going on, if any, and end, within `STOP_SECONDS`."""
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
                log.exception("A Flower run could not be begun or ended; waiting for the next.")

    def _execute(self, task: Task) -> None:
        """Run the pinned ServerApp and tell Flower how it ended."""
        # Global in flwr, and read by every message that is made: there is one run at a time.
        TaskIdentity.task_id, TaskIdentity.run_id = task.task_id, task.run_id
        TaskIdentity.node_id = SUPERLINK_NODE_ID
        context = RunContext(task.run_id, self._grid(task), lambda text: self._log(task, text))
        over = threading.Event()
        watcher = threading.Thread(
            target=self._watch, args=(task, context, over), name="executor-watch", daemon=True
        )
        watcher.start()
        outcome, details = SubStatus.FAILED, ""
        try:
            self._pinned_app(context)(
                grid=context.grid,
                context=Context(
                    run_id=task.run_id,
                    node_id=SUPERLINK_NODE_ID,
                    node_config={},
                    state=RecordDict(),
                    run_config={},
                ),
            )
            outcome = SubStatus.COMPLETED
        except Exception as error:
            log.debug("Flower run %d ended with an error.", task.run_id, exc_info=True)
            details = type(error).__name__
        finally:
            over.set()
            watcher.join()
            if self._ending.is_set() and outcome != SubStatus.COMPLETED:
                outcome, details = SubStatus.STOPPED, ""
            # A run that somebody stopped has ended for Flower already; then this changes nothing.
            self._state.finish_task(task.task_id, outcome, details)

    def _pinned_app(self, context: RunContext) -> ServerApp:
        """Return the only ServerApp that runs here."""
        app = ServerApp()

        @app.main()
        def main(grid: Grid, flower_context: Context) -> None:
            self._run(context)

        return app

    def _grid(self, task: Task) -> Grid:
        grid = HttpGrid(token="none")  # noqa: S106 - its client, which would send it, is replaced
        grid._client = cast(Any, _InProcessRuntime(self._state, task))
        (run,) = self._state.get_run_info(run_ids=[task.run_id])
        grid.set_run(run)
        return grid

    def _log(self, task: Task, text: str) -> None:
        self._state.add_task_log(task.task_id, text[:MAX_LOG_CHARACTERS] + "\n")

    def _watch(self, task: Task, context: RunContext, over: threading.Event) -> None:
        """Keep the task alive in Flower's eyes, and see when somebody stops it."""
        next_heartbeat = 0.0
        while not over.wait(POLL_SECONDS):
            try:
                if time.monotonic() >= next_heartbeat:
                    self._state.acknowledge_task_heartbeat(task.task_id)
                    next_heartbeat = time.monotonic() + HEARTBEAT_SECONDS
                status = self._state.get_run_status({task.run_id}).get(task.run_id)
                if status is None or status.status == Status.FINISHED or self._ending.is_set():
                    context.stopped.set()
                    self._on_stop()
                    return
            except Exception:
                log.exception("Flower run %d could not be watched; trying again.", task.run_id)


@dataclass
class _Arriving:
    """A reply whose envelope is here and whose objects may not be, all of them."""

    message: MessageProto
    tree: ObjectTree
    overdue: float


class _InProcessRuntime:
    """The client of Flower's Runtime API that a grid calls, without a network: each call is its handler's.

    flwr's grid would wait, for hours, for a reply whose sender does not finish its upload. This client gives out a
    reply when all of it is here, or overdue, so that a slow merchant holds up nobody but itself.
    """

    def __init__(self, state: Any, task: Task) -> None:
        self._state, self._task = state, task
        self._arriving: dict[str, _Arriving] = {}

    def GetNodes(self, request: Any) -> Any:  # noqa: N802 - Flower's names
        return handlers.get_nodes(request, self._state, self._task)

    def PushMessages(self, request: Any) -> Any:  # noqa: N802
        return handlers.push_messages(request, self._state, self._task)

    def PushObject(self, request: Any) -> Any:  # noqa: N802
        return handlers.push_object(request, self._state, self._task)

    def ConfirmMessageReceived(self, request: Any) -> Any:  # noqa: N802
        return handlers.confirm_message_received(request, self._state, self._task)

    def PullMessages(self, request: PullAppMessagesRequest) -> PullAppMessagesResponse:  # noqa: N802
        unheard = [asked for asked in request.message_ids if asked not in self._arriving]
        if unheard:
            heard = handlers.pull_messages(
                PullAppMessagesRequest(message_ids=unheard), self._state, self._task
            )
            overdue = time.monotonic() + ARRIVAL_SECONDS
            for message, tree in zip(heard.messages_list, heard.message_object_trees, strict=True):
                self._arriving[message.metadata.reply_to_message_id] = _Arriving(message, tree, overdue)
        response = PullAppMessagesResponse()
        for asked in request.message_ids:
            reply = self._arriving.get(asked)
            if reply is not None and (time.monotonic() > reply.overdue or self._is_here(reply.tree)):
                del self._arriving[asked]
                response.messages_list.append(reply.message)
                response.message_object_trees.append(reply.tree)
        return response

    def PullObject(self, request: Any) -> PullObjectResponse:  # noqa: N802
        found = handlers.pull_object(request, self._state, self._task)
        # What is not here now is overdue: "not found" keeps the grid from waiting for it.
        return found if found.object_available else PullObjectResponse()

    def close(self) -> None:
        """Nothing is open."""

    def _is_here(self, tree: ObjectTree) -> bool:
        return all(
            self._state.get_object(self._task.run_id, node.object_id) for node in iterate_object_tree(tree)
        )
