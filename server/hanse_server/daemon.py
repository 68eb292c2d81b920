"""The server as one process: Flower's SuperLink, the aggregator's streams, the page, and the run that trains.

    Daemon(config, tell).train(stop, resume=False)     # one training, then end
    Daemon(config, tell).serve(stop)                   # trainings begin with `flwr run`

Flower keeps membership and runs; what a training came to is in our own records, which alone are the truth. A
Flower run that ended, however it did, is followed by another that goes on from there. Read `_run` for what one does.
"""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from hanse_common.errors import ConfigError, RunStopped
from hanse_common.files import read_bounded, write_atomically
from hanse_common.web.serving import HOST, listen, serving
from hanse_server import logs
from hanse_server.config import ServerConfig, Service
from hanse_server.flower_executor import Executor, RunContext
from hanse_server.flower_link import SuperLink
from hanse_server.live import Live
from hanse_server.members import Members
from hanse_server.metrics import Metrics
from hanse_server.page import application, listens
from hanse_server.reporting import Event, Reporter, Tell
from hanse_server.stream import StreamServer
from hanse_server.tokens import METRICS_TOKEN_FILE, metrics_token, read_token
from hanse_server.training import Training
from hanse_server.upkeep import MAX_PEM_BYTES, Upkeep
from hanse_server.work import Work

__all__ = ["Daemon", "Event", "Tell"]

POLL_SECONDS = 0.5

MAX_LOST = 3
"""After so many runs that were lost without a round, none is begun without being asked for."""


class Daemon:
    """One league's server. `tell` hears of each round, from another thread than the caller's."""

    def __init__(self, config: ServerConfig, tell: Tell) -> None:
        if config.service is None:
            raise ConfigError(
                "service: missing; expected a section with plan, state, tls, … See hanse-server.yaml."
            )
        self._service: Service = config.service
        if self._service.logs.file is not None or self._service.logs.form == "json":
            logs.configure(self._service.logs.form, self._service.logs.file)
        self._training = Training.open(config, self._service)
        self._members = Members(self._service, self._training.plan.league)
        self._reporter = Reporter(tell, self._training.state, Metrics(self._service.state), Live())
        self._ended = threading.Event()
        self._failure: Exception | None = None

    def train(self, stop: threading.Event, *, resume: bool) -> None:
        """Run the plan's training to its end, or until `stop` is set.

        Raises `ConfigError` when a training was begun and `resume` is not set, or the reverse; `RunStopped` when
        stopped; `RoundFailed` when the training fails. The checkpoint of the last round stays in each case.
        """
        progress = self._training.progress
        begun = progress.begun()
        if begun and not resume:
            raise ConfigError(
                f"{self._service.state}: found a training of this plan with {progress.rounds_done()} of "
                f"{progress.plan.training.rounds} rounds done; go on with hanse-server resume, or sign another plan."
            )
        if resume and self._training.state.versions.of_plan(progress.plan.digest) is not None:
            raise ConfigError(
                f"{self._service.state}: this plan's training has ended with a version already; sign another plan."
            )
        if resume and not begun:
            raise ConfigError(
                f"{self._service.state}: found no training of this plan to go on with; begin it with hanse-server run."
            )
        upkeep = Upkeep(self._service, self._reporter)
        with self._listening() as (link, streams):
            run = link.start_run()
            while not self._ended.wait(POLL_SECONDS):
                upkeep.tick()
                if stop.is_set():
                    streams.abort()  # before Flower drops its messages, which would look as if merchants were lost
                    link.stop_run(run)
        if self._failure is not None:
            raise self._failure

    def serve(self, stop: threading.Event) -> None:
        """Keep the listeners up until `stop` is set; runs begin with `flwr run`. Their failures end only them.

        A training that was lost with the process before, neither stopped nor failed, goes on at once.
        """
        upkeep = Upkeep(self._service, self._reporter)
        last = self._training.state.history.last_run()
        with self._listening() as (link, _):
            if last is not None and (last.state, last.plan) == ("running", self._training.plan.digest.hex()):
                self._go_on(link)
            while not stop.wait(POLL_SECONDS):
                upkeep.tick()

    def _go_on(self, link: SuperLink) -> None:
        """Begin a run for the one that was lost, unless some before were lost at the same round: each may cost one."""
        progress = self._training.progress
        done = progress.rounds_done()
        lost = self._training.state.history.lost_in_a_row(progress.plan.digest, done)
        if lost < MAX_LOST:
            link.start_run()
            return
        self._reporter.say(
            "failed",
            f"{lost} runs in a row were lost after round {done}, so it is not tried again by itself. Find out why in "
            "the log, then go on with hanse-server resume, or flwr run.",
        )

    @contextmanager
    def _listening(self) -> Iterator[tuple[SuperLink, StreamServer]]:
        """Bring everything up, in the order in which it is needed, and down again."""
        service, state = self._service, self._training.state
        tls = service.tls
        with ExitStack() as stack:
            stack.enter_context(state)
            stack.enter_context(state.alone())
            state.collect()
            streams = stack.enter_context(
                StreamServer(
                    host=service.aggregator.host,
                    port=service.aggregator.port,
                    certificate=read_bounded(
                        tls.certificate, MAX_PEM_BYTES, "a PEM certificate", ConfigError
                    ),
                    key=read_bounded(tls.key, MAX_PEM_BYTES, "a PEM key", ConfigError),
                    identities=lambda: self._members.identities,
                    releases=state.versions,
                )
            )
            link = stack.enter_context(SuperLink(service))
            work = Work(self._training, self._members, streams, link, self._reporter)
            work.refresh()
            executor = Executor(link.state, lambda context: self._run(context, work, streams), streams.abort)
            stack.enter_context(executor)
            page = self._serve_page(stack, link, streams)
            self._reporter.say(
                "listening",
                f"Merchants' nodes: port {link.fleet_port}. Streams: port {streams.port}. "
                + ("" if page is None else f"Your page: http://{HOST}:{page}. ")
                + f"Your own flwr commands: FLWR_HOME={link.flwr_home}",
                fleet_port=link.fleet_port,
                stream_port=streams.port,
                admin_port=link.admin_port,
                page_port=page,
            )
            yield link, streams

    def _serve_page(self, stack: ExitStack, link: SuperLink, streams: StreamServer) -> int | None:
        """Serve the operator's page, metrics and health as long as `stack` is open; return its port, if any."""
        service = self._service
        if service.page is None:
            return None
        listening = stack.enter_context(listen(service.page.port))
        port: int = listening.getsockname()[1]
        listeners = ((service.fleet.host, link.fleet_port), (service.aggregator.host, streams.port))
        token = read_token(service.admin.token)
        write_atomically(service.state / METRICS_TOKEN_FILE, metrics_token(token))
        app = application(
            self._training.state,
            self._reporter.live,
            self._reporter.metrics,
            token,
            port=port,
            service=service,
            ready=lambda: all(listens(host, number) for host, number in listeners),
            tell=self._reporter.say,
        )
        stack.enter_context(serving(app, listening))
        return port

    def _run(self, context: RunContext, work: Work, streams: StreamServer) -> None:
        """Be the pinned ServerApp: train, publish. What went wrong is kept for `train` and goes to Flower, too."""
        self._failure = None
        streams.resume()  # the run before may have been stopped
        history, progress = self._training.state.history, self._training.progress
        done = progress.rounds_done()
        run = history.begin_run(progress.plan.digest, done)
        over = threading.Event()
        watcher = threading.Thread(target=self._heed, args=(run, over, streams), name="stop", daemon=True)
        watcher.start()
        try:
            work.run(context, run, done)
            history.end_run(run, *self._reporter.ended(None))
        except RunStopped as error:
            self._failure = error
            self._reporter.ended(None)
            history.end_run(run, "stopped", str(error))
            self._reporter.say("stopped", str(error))
            raise
        except Exception as error:
            self._failure = error
            state, reason = self._reporter.ended(error)
            self._reporter.say("failed", reason)
            history.end_run(run, state, reason)
            raise
        finally:
            over.set()
            watcher.join()
            self._ended.set()

    def _heed(self, run: int, over: threading.Event, streams: StreamServer) -> None:
        """Stop the run when `hanse-server stop` asks for it."""
        history = self._training.state.history
        while not over.wait(POLL_SECONDS):
            if history.stop_requested(run):
                streams.abort()
                return
