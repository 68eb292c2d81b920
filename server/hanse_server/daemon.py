"""The server as one process: Flower's SuperLink, the aggregator's streams, and the run that trains.

    Daemon(config, tell).train(stop, resume=False)     # one training, then end
    Daemon(config, tell).serve(stop)                   # trainings begin with `flwr run`

Flower keeps membership and runs; what a training came to is in our own checkpoint, which alone is the truth. A
Flower run that ended, however it did, is followed by another that goes on from there.
"""

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from hanse_common.errors import ConfigError, HanseError, RunStopped
from hanse_common.files import read_bounded
from hanse_server.blocks import BlockTransport
from hanse_server.config import ServerConfig, Service
from hanse_server.flower_executor import Executor, RunContext
from hanse_server.flower_grid import FlowerMembership
from hanse_server.flower_link import SuperLink
from hanse_server.league import RoundReport
from hanse_server.members import Members
from hanse_server.stream import StreamServer
from hanse_server.training import Training

MAX_PEM_BYTES = 1 << 20
POLL_SECONDS = 0.5

Tell = Callable[["Event"], None]


@dataclass(frozen=True)
class Event:
    """Something the operator hears: a kind for programs, a text for people, and the facts in it."""

    kind: str
    text: str
    facts: dict[str, Any] = field(default_factory=dict)


class Daemon:
    """One league's server. `tell` hears of each round, from another thread than the caller's."""

    def __init__(self, config: ServerConfig, tell: Tell) -> None:
        if config.service is None:
            raise ConfigError(
                "service: missing; expected a section with plan, state, tls, … See hanse-server.yaml."
            )
        self._config = config
        self._service: Service = config.service
        self._tell = tell
        self._training = Training.open(config, self._service)
        self._members = Members(self._service, self._training.plan.league)
        self._ended = threading.Event()
        self._failure: Exception | None = None

    def train(self, stop: threading.Event, *, resume: bool) -> None:
        """Run the plan's training to its end, or until `stop` is set.

        Raises `ConfigError` when a training was begun and `resume` is not set, or the reverse; `RunStopped` when
        stopped; `RoundFailed` when the training fails. The checkpoint of the last round stays in each case.
        """
        begun = self._training.store.begun()
        if begun and not resume:
            raise ConfigError(
                f"{self._service.state}: found a training of this plan with {self._training.rounds_done()} of "
                f"{self._training.plan.training.rounds} rounds done; go on with --resume, or sign another plan "
                "and name another state folder."
            )
        if resume and not begun:
            raise ConfigError(f"{self._service.state}: found no training to go on with; leave out --resume.")
        with self._listening() as link:
            run = link.start_run()
            while not self._ended.wait(POLL_SECONDS):
                if stop.is_set():
                    link.stop_run(run)
        if self._failure is not None:
            raise self._failure

    def serve(self, stop: threading.Event) -> None:
        """Keep the listeners up until `stop` is set; runs begin with `flwr run`. Their failures end only them."""
        with self._listening():
            stop.wait()

    @contextmanager
    def _listening(self) -> Iterator[SuperLink]:
        """Bring everything up, in the order in which it is needed, and down again."""
        service = self._service
        tls = service.tls
        with ExitStack() as stack:
            streams = stack.enter_context(
                StreamServer(
                    host=service.aggregator.host,
                    port=service.aggregator.port,
                    certificate=read_bounded(
                        tls.certificate, MAX_PEM_BYTES, "a PEM certificate", ConfigError
                    ),
                    key=read_bounded(tls.key, MAX_PEM_BYTES, "a PEM key", ConfigError),
                    identities=lambda: self._members.identities,
                )
            )
            link = stack.enter_context(SuperLink(service))
            self._register(link)
            executor = Executor(link.state, lambda context: self._run(context, streams, link), streams.abort)
            stack.enter_context(executor)
            self._say(
                "listening",
                f"Merchants' nodes: port {link.fleet_port}. Streams: port {streams.port}. "
                f"Your own flwr commands: FLWR_HOME={link.flwr_home}",
                fleet_port=link.fleet_port,
                stream_port=streams.port,
                admin_port=link.admin_port,
            )
            yield link

    def _run(self, context: RunContext, streams: StreamServer, link: SuperLink) -> None:
        """Be the pinned ServerApp: train, publish. What went wrong is kept for `train` and goes to Flower, too."""
        training, plan = self._training, self._training.plan
        self._failure = None

        def say(kind: str, text: str, **facts: Any) -> None:
            context.log(text)
            self._say(kind, text, **facts)

        def refresh() -> frozenset[str]:
            self._members.refresh(lambda text: say("directory", text))
            self._register(link)
            return self._members.names

        def on_round(report: RoundReport) -> None:
            outcome = report.outcome
            text = f"Round {report.round + 1} of {plan.training.rounds}: {len(outcome.uploaded)} merchants."
            text += "".join(f" {name} dropped out." for name in outcome.dropped)
            text += "".join(f" {name} declined ({code})." for name, code in sorted(outcome.declined.items()))
            text += "".join(f" {name}: {reason}." for name, reason in sorted(outcome.blamed.items()))
            say(
                "round",
                text,
                round=report.round + 1,
                rounds=plan.training.rounds,
                uploaded=list(outcome.uploaded),
                dropped=list(outcome.dropped),
                declined=dict(outcome.declined),
                blamed=sorted(outcome.blamed),
            )

        try:
            done = training.rounds_done()
            if done:
                say("resumed", f"Going on after round {done} of {plan.training.rounds}.", rounds_done=done)
            membership = FlowerMembership(
                context.grid,
                lambda: self._members.nodes,
                lambda name, epsilon: say(
                    "spent", f"{name} has spent ε = {epsilon:.3f} in all.", merchant=name, epsilon=epsilon
                ),
            )
            with BlockTransport(
                streams,
                membership,
                training.signed_plan,
                plan,
                self._service.aggregator.address,
                refresh,
                self._service.blocks,
                lambda text: say("merchants", text),
            ) as transport:
                model = training.run(transport, lambda: self._members.current, on_round)
            published = training.publish(model)
            if published.is_dir():
                text = f"The recognizer is in {published}."
            else:
                digest = hashlib.sha256(published.read_bytes()).hexdigest()
                text = (
                    f"The centre is in {published}: give it to every merchant. The training's plan names it, "
                    f"under recipe, as centre: {digest}"
                )
            say("published", text, published=str(published))
        except Exception as error:
            self._failure = error
            reason = str(error) if isinstance(error, HanseError) else type(error).__name__
            say("stopped" if isinstance(error, RunStopped) else "failed", reason)
            raise
        finally:
            self._ended.set()

    def _register(self, link: SuperLink) -> None:
        """Let every member's node in. One that is no member any more may come, but is asked nothing."""
        for pem in self._members.nodes:
            link.register(pem)

    def _say(self, kind: str, text: str, **facts: Any) -> None:
        self._tell(Event(kind, text, facts))
