"""What one run does, from its first block to the candidate recognizer. Read `run`.

    work = Work(training, members, streams, link, reporter)
    work.run(context, run_number, rounds_done)

It holds together what each knows alone: blocks, rounds, evaluations, the registry and who hears of it.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hanse_common.federated_report import FederatedReport
from hanse_common.modes import MeanTraining, TrendsTraining
from hanse_server.blocks import BlockTransport
from hanse_server.coordinator import MaskedRounds, RoundOutcome
from hanse_server.deadlines import ObservedDeadlines
from hanse_server.evaluations import Evaluations, card_metrics, described
from hanse_server.federated_evaluation import evaluate
from hanse_server.flower_executor import RunContext
from hanse_server.flower_grid import FlowerMembership
from hanse_server.flower_link import SuperLink
from hanse_server.members import Members
from hanse_server.observed import ObservedTransport, TripObservation
from hanse_server.records import BlockRecords
from hanse_server.reporting import Reporter
from hanse_server.selection import select
from hanse_server.storage import Progress
from hanse_server.stream import StreamServer
from hanse_server.training import Training

SET_UP_ENDS = "ready"
"""The last trip of a set-up."""


class Work:
    """One league's training, and the evaluations in it, over merchants' streams."""

    def __init__(
        self,
        training: Training,
        members: Members,
        streams: StreamServer,
        link: SuperLink,
        reporter: Reporter,
    ) -> None:
        self._training = training
        self._members = members
        self._streams = streams
        self._link = link
        self._reporter = reporter

    def run(self, context: RunContext, number: int, done: int) -> None:
        """Train the rounds after the `done` ones, try the model, and keep it as a candidate.

        Raises `RoundFailed`, `RunStopped`, and what else ends a run.
        """
        training, reporter = self._training, self._reporter
        plan = training.plan
        total = plan.training.rounds
        reporter.metrics.training(True)
        reporter.metrics.plan(total, done, plan.epsilon())
        reporter.live.note(run=number, round=done, rounds=total, needed=plan.cohort.min_merchants)
        if done:
            self._say(context, "resumed", f"Going on after round {done} of {total}.", rounds_done=done)
        membership = FlowerMembership(context.grid, lambda: self._members.nodes, reporter.spent)
        setup_rounds = training.service.blocks.rounds
        with self._asking(training.progress, membership, number, setup_rounds) as (rounds, transport):

            def conduct(round_: int, model: NDArray[np.float32]) -> RoundOutcome:
                rounds.forget()
                transport.end_block()
                return self._evaluate(membership, number, round_, model)

            evaluations = Evaluations(
                training.config,
                training.progress,
                training.evaluation,
                training.state.history,
                conduct,
                lambda after, report: self._tried(context, after, report),
                lambda after, reason: self._say(
                    context,
                    "not-evaluated",
                    f"After round {after}, the model could not be tried: {reason}",
                    after=after,
                ),
            )
            reporter.live.note(phase="training")
            model = training.run(rounds, lambda report: reporter.round(report, total), evaluations.enough)
            if isinstance(plan.training, MeanTraining):
                path = training.publish_centre(model)
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                self._say(
                    context,
                    "published",
                    f"The centre is in {path}: give it to every merchant. The training's plan names it, under "
                    f"recipe, as centre: {digest}",
                    published=str(path),
                )
                return
            if isinstance(plan.training, TrendsTraining):
                days = f"{plan.training.days} days from {plan.training.first_day} on"
                self._say(
                    context,
                    "counted",
                    f"What shoppers searched for on {days} is counted. Show it: hanse-server trends",
                    first_day=plan.training.first_day,
                    days=plan.training.days,
                )
                return
            report = evaluations.of(model, training.progress.rounds_done())
        version = training.publish(model, {} if report is None else card_metrics(report))
        self._say(
            context,
            "published",
            f"The recognizer is version {version.number}, a candidate, in {training.service.state / 'recognizer'}. "
            f"Release it: hanse-server publish {version.number}",
            published=str(training.service.state / "recognizer"),
            version=version.number,
        )

    def refresh(self) -> frozenset[str]:
        """Read the directory again, let its members' nodes in, and return their names."""
        self._members.refresh(lambda text: self._reporter.say("directory", text))
        # One that is no member any more may come, but is asked nothing.
        for pem in self._members.nodes:
            self._link.register(pem)
        self._reporter.directory(self._members.current)
        releases = self._training.state.versions.releases()
        if releases:  # by another process: the key that signs is not here
            self._reporter.metrics.version(releases[-1].number)
        return self._members.names

    def _evaluate(
        self, membership: FlowerMembership, number: int, round_: int, model: NDArray[np.float32]
    ) -> RoundOutcome:
        """Run one round of the evaluation's plan, in a block of its own."""
        evaluation = self._training.evaluation
        if evaluation is None:
            raise ValueError("Expected an evaluation plan.")
        self._reporter.live.note(phase="evaluating")
        try:
            with self._asking(evaluation, membership, number, 1) as (rounds, _):
                return evaluate(rounds, evaluation.plan, round_, model)[1]
        finally:
            self._reporter.live.note(phase="training")

    @contextmanager
    def _asking(
        self, progress: Progress, membership: FlowerMembership, run: int, setup_rounds: int
    ) -> Iterator[tuple[MaskedRounds, BlockTransport]]:
        """Yield what runs rounds of one plan, and what carries them; a block that is open ends after it."""
        service, plan, reporter = self._training.service, progress.plan, self._reporter
        records = BlockRecords(self._training.state.history, reporter, run, plan.digest)
        selection = select(
            service.blocks.cohort, plan, lambda: self._members.identities, records.next, records.drawn
        )
        deadlines = ObservedDeadlines(service.blocks.deadlines, plan.cohort.upload_slot)

        def next_attempt() -> int:
            reporter.metrics.attempt()
            return progress.next_attempt()

        def observe(trip: TripObservation) -> None:
            reporter.metrics.trip(trip)
            if trip.kind == SET_UP_ENDS and len(trip.seconds) == len(trip.asked):
                reporter.metrics.set_up()

        with BlockTransport(
            self._streams,
            membership,
            progress.signed_plan,
            plan,
            service.aggregator.address,
            self.refresh,
            service.blocks,
            lambda text: reporter.say("merchants", text),
            selection,
            records,
        ) as transport:
            rounds = MaskedRounds(
                ObservedTransport(
                    transport,
                    [observe, deadlines.observe, selection.observe],
                    reporter.live.trip,
                ),
                progress.signed_plan,
                plan,
                lambda: self._members.current,
                next_attempt,
                setup_rounds=setup_rounds,
                attempts=self._training.config.optimization.attempts,
                deadline=deadlines.seconds,
                watch=reporter.live.watch,
            )
            yield rounds, transport

    def _tried(self, context: RunContext, after: int, report: FederatedReport) -> None:
        accuracy, loss = report.accuracy, report.log_loss
        facts: dict[str, Any] = {"after": after}
        if accuracy is not None:
            self._reporter.metrics.evaluation(
                accuracy.value, accuracy.low, accuracy.high, loss.value if loss else None
            )
            facts["accuracy"] = [accuracy.value, accuracy.low, accuracy.high]
        self._say(context, "evaluated", f"After round {after}: {described(report)}", **facts)

    def _say(self, context: RunContext, kind: str, text: str, **facts: Any) -> None:
        context.log(text)
        self._reporter.say(kind, text, **facts)
