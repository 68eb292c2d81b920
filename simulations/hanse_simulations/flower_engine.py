"""An experiment on Flower's own simulation engine: virtual nodes whose ClientApp runs in Ray's worker processes.

    require(experiment)
    league = FlowerLeague.assemble(experiment, folder, cache, tell)
    model = league.train(on_round=print)

A round is one message to each merchant and its reply, **without secure aggregation**: Ray's workers keep no state
between messages, which the trips of secure aggregation need. A sum is the same with masks and without, so the same
experiment and seed give the same model as in one process.

Training goes on in the caller's thread. Flower's engine runs in a thread of its own, where a ServerApp does
nothing but hand over its grid and wait until we are done with it. Ray is ours from start to end: processes, files
and all.
"""

import importlib.util
import logging
import os
import queue
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation
from numpy.typing import NDArray

from hanse_client.ledger import Ledger
from hanse_common import messages, wire
from hanse_common.errors import ConfigError, RoundFailed, WireError
from hanse_common.files import write_atomically
from hanse_common.flower import from_record, to_record
from hanse_common.messages import MAX_MESSAGE_BYTES, DeclineCode
from hanse_common.plan import Plan, SignedPlan
from hanse_common.secagg import ring
from hanse_server.coordinator import RoundOutcome
from hanse_server.league import RoundReport
from hanse_server.storage import Progress, State
from hanse_simulations.experiment import Experiment
from hanse_simulations.flower_merchant import PLAN_FILE, Answer, Order, answer
from hanse_simulations.shops import merchant_names
from hanse_simulations.simulation import (
    Tell,
    ledger_path,
    make_signed_plan,
    simulated_policy,
    train_with,
)

START_SECONDS = 120.0
"""How long Flower's engine may take to begin, after Ray has."""

STOP_SECONDS = 5.0
"""How long Flower's engine may take to end. A merchant that is still training then is killed, as in a crash."""

POLL_SECONDS = 0.02

OBJECT_STORE_BYTES = 256 << 20
"""Ray's shared memory at least. It would take a third of the machine's."""

MESSAGE_TYPE = "train"

MAX_SHOWN = 300
"""Bound of what is shown of a failure, in characters."""

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # or it reports its use
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # or it warns of what this will mean one day
    "FLWR_LOG_LEVEL": "CRITICAL",  # of the workers, which say whenever one ends
}


def require(experiment: Experiment) -> None:
    """Raise `ConfigError`, which says what to do, unless Ray is there and `experiment` can run on it."""
    for name in ("dropout_rate", "dropouts", "centring", "sweep"):
        if found := getattr(experiment, name):
            raise ConfigError(
                f"{name}: found {found}; Flower's engine loses no replies and runs one plan. "
                "Run this experiment without --engine."
            )
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(
            "--engine flower: Flower's simulation engine needs Ray, which is not installed. Install it with "
            "pip install 'hanse[flower-simulation]', or leave out --engine."
        )


@dataclass(frozen=True)
class FlowerLeague:
    """A league whose merchants are virtual nodes of Flower's, ready to train."""

    experiment: Experiment
    plan: Plan
    signed_plan: SignedPlan
    progress: Progress
    folder: Path
    cache: Path
    ledgers: Mapping[str, Ledger]
    tell: Tell

    @classmethod
    def assemble(cls, experiment: Experiment, folder: Path, cache: Path, tell: Tell) -> "FlowerLeague":
        """Return the league of `experiment`, whose result folder is `folder` and whose embeddings are in `cache`.

        Raises `PlanRefused` when the plan's ε can't be met.
        """
        plan, signed_plan = make_signed_plan(experiment)
        progress = State.open(folder / "server").progress(signed_plan, plan)
        write_atomically(folder / PLAN_FILE, wire.encode(signed_plan))  # merchants read it there
        budget = simulated_policy(experiment).budget
        names = merchant_names(experiment.data.merchants)
        ledgers = {name: Ledger(ledger_path(folder, name), budget) for name in names}
        return cls(experiment, plan, signed_plan, progress, folder.resolve(), cache.resolve(), ledgers, tell)

    def train(self, on_round: Callable[[RoundReport], None] = lambda report: None) -> NDArray[np.float32]:
        """Run all rounds, or those that are left, and return the published model, shape (d,), float32.

        Raises `RoundFailed` when a round fails in all its attempts, or the engine does not start.
        """
        merchant = partial(_on_message, self.folder, self.cache)
        with engine(merchant, len(self.ledgers), self.plan.dimension) as grid:
            rounds = FlowerRounds(
                grid,
                self.plan,
                tuple(self.ledgers),
                self.progress.next_attempt,
                self.experiment.optimization.attempts,
                self.tell,
            )
            return train_with(rounds, self.experiment, self.progress, on_round)


def _on_message(folder: Path, cache: Path, message: Message, context: Context) -> Message:
    """The ClientApp, in a worker: `message` is to the virtual node that `context` is of."""
    request = from_record(message.content, MAX_MESSAGE_BYTES)
    reply = answer(folder, cache, int(context.node_config["partition-id"]), request)
    return Message(to_record(reply), reply_to=message)


class FlowerRounds:
    """Rounds of one message a merchant; implements `hanse_server.league.Rounds`.

    `next_attempt` returns a number that was never used for this plan, once it is recorded; one serves until a round
    fails, as under secure aggregation. A round is tried `attempts` times at most. `tell` hears what one of
    `merchants` says, or why it says nothing.
    """

    def __init__(
        self,
        grid: "WatchedGrid",
        plan: Plan,
        merchants: tuple[str, ...],
        next_attempt: Callable[[], int],
        attempts: int,
        tell: Tell,
    ) -> None:
        self._grid = grid
        self._plan = plan
        self._merchants = merchants
        self._next_attempt = next_attempt
        self._attempts = attempts
        self._tell = tell
        self._attempt: int | None = None

    def run(self, round_: int, model: NDArray[np.float32]) -> RoundOutcome:
        """Run the round `round_` from `model`, shape (d,). Raises `RoundFailed` after the last attempt."""
        failures = []
        for _ in range(self._attempts):
            if self._attempt is None:
                self._attempt = self._next_attempt()
            attempt = self._attempt
            try:
                return self._try(round_, attempt, model)
            except RoundFailed as failure:
                self._attempt = None
                failures.append(f"attempt {attempt}: {failure}")
        raise RoundFailed(f"Round {round_ + 1} of {self._plan.training.rounds} failed. " + " ".join(failures))

    def _try(self, round_: int, attempt: int, model: NDArray[np.float32]) -> RoundOutcome:
        order = Order(
            plan_digest=self._plan.digest,
            round=round_,
            attempt=attempt,
            model=messages.model_to_bytes(model),
        )
        total = np.zeros(self._plan.dimension, dtype=np.uint32)
        uploaded: list[str] = []
        declined: dict[str, DeclineCode] = {}
        lost: list[str] = []
        # Merchants may have to take turns on this machine.
        patience = self._plan.cohort.upload_deadline * len(self._merchants)
        for reply in self._grid.exchange(wire.encode(order), patience):
            try:
                found = self._open(reply, order)
                if found.code is None:
                    total += ring.from_bytes(found.vector, self._plan.dimension)
                    uploaded.append(found.merchant)
                else:
                    declined[found.merchant] = found.code
                if found.told:
                    self._tell(found.merchant, f"Round {round_ + 1}: {found.told}")
            except (WireError, ValueError) as error:
                lost.append(str(error))
                self._tell("a worker", f"Round {round_ + 1}: {error}")
        minimum = self._plan.cohort.min_merchants
        if len(uploaded) < minimum:
            notes = [f"{name} declined ({code})" for name, code in sorted(declined.items())] + lost
            raise RoundFailed(
                f"{len(uploaded)} of {len(self._merchants)} merchants uploaded, the plan needs {minimum}: "
                f"{'; '.join(notes) or 'the others did not answer in time'}."
            )
        return RoundOutcome(
            update=self._plan.decode(total, len(uploaded)),
            uploaded=tuple(sorted(uploaded)),
            dropped=tuple(sorted(set(self._merchants) - set(uploaded))),
            declined=declined,
            blamed={},
        )

    def _open(self, reply: Message, order: Order) -> Answer:
        if reply.has_error():
            raise WireError(f"a merchant's reply is an error: {_shown(reply.error.reason)}")
        found = wire.decode(Answer, from_record(reply.content, MAX_MESSAGE_BYTES), MAX_MESSAGE_BYTES)
        if found.work != order.work or found.merchant not in self._merchants:
            raise WireError("an answer to another order")
        return found


def _shown(reason: str | None) -> str:
    """Return the beginning of what Ray or Flower say, which may be a trace of many lines."""
    (first, *_) = (reason or "").splitlines() or [""]
    return "".join(c for c in first[:MAX_SHOWN] if c.isprintable())


class WatchedGrid:
    """Flower's grid for as long as its engine, in the thread `engine`, goes on."""

    def __init__(self, grid: Grid, engine: threading.Thread) -> None:
        self._grid = grid
        self._engine = engine

    def exchange(self, data: bytes, patience: float) -> Iterator[Message]:
        """Send `data` to every node and yield replies as they come, for `patience` seconds at most.

        Raises `RoundFailed` when the engine has ended.
        """
        deadline = time.monotonic() + patience
        outgoing = [
            Message(to_record(data), node, MESSAGE_TYPE, ttl=patience)
            for node in sorted(self._grid.get_node_ids())
        ]
        waiting = set(self._grid.push_messages(outgoing))
        while waiting and time.monotonic() < deadline:
            if not self._engine.is_alive():
                raise RoundFailed("Flower's simulation engine has ended")
            replies: Iterable[Message] = self._grid.pull_messages(waiting)
            for reply in replies:
                waiting.discard(reply.metadata.reply_to_message_id)
                yield reply
            time.sleep(POLL_SECONDS)


@contextmanager
def engine(
    merchant: Callable[[Message, Context], Message], merchants: int, dimension: int
) -> Iterator[WatchedGrid]:
    """Run Flower's simulation engine with `merchants` nodes, each of which answers with `merchant`.

    At the end, however it comes, the engine, Ray's processes and their files are gone. `dimension` is the plan's.
    Call it in the main thread.

    Raises `RoundFailed` when it does not start.
    """
    handed: queue.Queue[Grid] = queue.Queue()
    done = threading.Event()
    server_app, client_app = ServerApp(), ClientApp()
    client_app.train()(merchant)
    failures: list[BaseException] = []

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        handed.put(grid)
        done.wait()

    def run() -> None:
        try:
            run_simulation(
                server_app, client_app, merchants, backend_config={"client_resources": {"num_cpus": 1}}
            )
        except Exception as error:
            failures.append(error)

    with _quiet_flwr(), _ray(merchants, dimension):
        thread = threading.Thread(target=run, name="flower-engine", daemon=True)
        thread.start()
        try:
            grid = _with_nodes(merchants, handed, thread)
            if grid is None:
                reason = _shown(str(failures[0])) if failures else "it did not answer in time"
                raise RoundFailed(f"Flower's simulation engine did not start: {reason}.")
            yield WatchedGrid(grid, thread)
        finally:
            done.set()
            try:
                thread.join(STOP_SECONDS)
            finally:
                if thread.is_alive():
                    _kill_workers()  # or the engine, and with it this process, would wait for them
                    thread.join(STOP_SECONDS)


def _with_nodes(count: int, handed: "queue.Queue[Grid]", thread: threading.Thread) -> Grid | None:
    """Return the grid that is handed over once all of its nodes are there, or None if that takes too long."""
    deadline = time.monotonic() + START_SECONDS
    grid = None
    while thread.is_alive() and time.monotonic() < deadline:
        with suppress(queue.Empty):
            grid = grid or handed.get(timeout=POLL_SECONDS)
        if grid is not None and len(list(grid.get_node_ids())) == count:
            return grid
        time.sleep(POLL_SECONDS)
    return None


def _kill_workers() -> None:
    """Kill Ray's workers, as ray.kill does, which would need handles that Flower keeps to itself."""
    from ray import ActorID
    from ray._private.state import actors
    from ray._private.worker import global_worker

    core: Any = global_worker
    for actor in actors():
        core.core_worker.kill_actor(ActorID.from_hex(actor), True)


@contextmanager
def _quiet_flwr() -> Iterator[None]:
    """Silence flwr's own log, which has a paragraph for everything; FLWR_LOG_LEVEL brings it back."""
    logger = logging.getLogger("flwr")
    before = logger.level
    if "FLWR_LOG_LEVEL" not in os.environ:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def _ray(merchants: int, dimension: int) -> Iterator[None]:
    """Run Ray here, a process for each core or merchant, with its files in a folder that is removed."""
    import ray  # seconds, and only here

    # Sockets lie in this folder, and a socket's path has a hundred characters at most.
    short = "/tmp" if Path("/tmp").is_dir() else None  # noqa: S108 - the folder made in it is ours alone
    before = signal.getsignal(signal.SIGTERM)
    with tempfile.TemporaryDirectory(prefix="hanse-ray-", dir=short, ignore_cleanup_errors=True) as scratch:
        try:
            with _environment(ENVIRONMENT):
                ray.init(
                    address="local",
                    num_cpus=min(os.cpu_count() or 1, merchants),
                    object_store_memory=OBJECT_STORE_BYTES + 2 * merchants * dimension * ring.WORD.itemsize,
                    include_dashboard=False,
                    logging_level=logging.ERROR,
                    log_to_driver=False,
                    _temp_dir=scratch,
                )
            # Ray's own handler aborts and leaves processes behind; this one unwinds.
            signal.signal(signal.SIGTERM, _exit)
        except Exception as error:
            ray.shutdown()
            raise RoundFailed(
                f"Ray, which Flower's simulation engine needs, did not start: {_shown(str(error))}"
            ) from None
        try:
            yield
        finally:
            ray.shutdown()
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _exit(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


@contextmanager
def _environment(wanted: Mapping[str, str]) -> Iterator[None]:
    """Let processes started in the body have these variables, but for those that the researcher has set."""
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]
