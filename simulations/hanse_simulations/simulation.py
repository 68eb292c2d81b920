"""A league in one process: the server's own training loop and the merchants' own participants.

    league = League.assemble(experiment, seeded_members(experiment, shops, folder, tell), folder)
    model = league.train(on_round=print)

Everything but the transport is the product's code: plans are signed and judged, ledgers are real SQLite files
that are charged and synced, messages are encoded and decoded. `seeded_members` also replaces the source of
randomness, so that an experiment repeats to the bit; the demo's members keep the operating system's.

What is guaranteed: the same experiment and seed on the same machine give the same model, also when the training
was stopped and resumed. Stopped in the middle of a round, it goes on with another attempt at it, as the product
does: merchants may pay twice, and the plan needs `repeats`. The keys of secure aggregation come from the operating
system in any case; masks cancel, so they change no result.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from hanse_client.examples import Examples
from hanse_client.ledger import Ledger
from hanse_client.markers import Markers
from hanse_client.participant import Participant, PinnedLeague
from hanse_client.policy import Mode, Policy
from hanse_client.queries import QueryLog
from hanse_client.training import ShopTrainer, Trainer
from hanse_common import signing, wire
from hanse_common.charter import SignedCharter, founded
from hanse_common.directory import Directory, Entry, SignedDirectory
from hanse_common.errors import ConfigError, WireError
from hanse_common.messages import MAX_MESSAGE_BYTES, Start
from hanse_common.modes import (
    EvaluationSchedule,
    EvaluationTraining,
    MeanSchedule,
    MeanTraining,
    TrendsSchedule,
    TrendsTraining,
)
from hanse_common.plan import Plan, SignedPlan
from hanse_common.vision import model as models
from hanse_server.config import PrivacyTarget, make_plan
from hanse_server.coordinator import LeagueDirectory, MaskedRounds
from hanse_server.league import RoundReport, Rounds, train
from hanse_server.optimizers import create
from hanse_server.storage import Progress, State
from hanse_simulations.attacks import Attacker
from hanse_simulations.experiment import Experiment
from hanse_simulations.grid import Handler, LocalGrid
from hanse_simulations.seeded import RoundRandomness, seed_for
from hanse_simulations.shops import attackers

SETUP_ROUNDS = 20
"""Rounds of one set-up of secure aggregation."""

NEVER = (1 << 40) - 1

Tell = Callable[[str, str], None]
"""Hears (merchant, text): what that merchant's owner would be told."""


@dataclass(frozen=True)
class Member:
    """One merchant in the process: what answers its messages, and the ledger to look at afterwards."""

    handle: Handler
    ledger: Ledger


@dataclass(frozen=True)
class League:
    """Server and merchants of one experiment, ready to train.

    `seen` then holds what the server saw in the last round: the first merchant's masked upload under its name, and the
    sum under "", both residues of the plan's ring, shape (d,).
    """

    experiment: Experiment
    plan: Plan
    signed_plan: SignedPlan
    grid: LocalGrid
    members: Mapping[str, Member]
    progress: Progress
    seen: dict[str, NDArray[np.uint32]] = field(default_factory=dict)

    @property
    def ledgers(self) -> dict[str, Ledger]:
        """The merchants' ledgers."""
        return {name: member.ledger for name, member in self.members.items()}

    @classmethod
    def assemble(cls, experiment: Experiment, members: Mapping[str, Member], folder: Path) -> "League":
        """Return the league of `members`; the server's files go to `folder`/server.

        Raises `PlanRefused` when the plan's ε can't be met.
        """
        plan, signed_plan = make_signed_plan(experiment)
        handlers = {name: member.handle for name, member in members.items()}
        return cls(
            experiment=experiment,
            plan=plan,
            signed_plan=signed_plan,
            grid=LocalGrid(handlers, experiment.dropout_rate, experiment.seed, experiment.dropouts),
            members=members,
            progress=State.open(folder / "server").progress(signed_plan, plan),
        )

    def train(self, on_round: Callable[[RoundReport], None] = lambda report: None) -> NDArray[np.float32]:
        """Run all rounds, or those that are left, and return the published model, shape (d,), float32.

        Raises `ConfigError` when the plan trains nothing.
        """
        return train_with(self.rounds(), self.experiment, self.progress, on_round)

    def rounds(self) -> MaskedRounds:
        """Return what runs the plan's rounds, one after the other."""
        directory = directory_of(self.experiment, self.members)
        return MaskedRounds(
            self.grid,
            self.signed_plan,
            self.plan,
            lambda: directory,
            self.progress.next_attempt,
            setup_rounds=SETUP_ROUNDS,
            attempts=self.experiment.optimization.attempts,
            watch=self._watch,
        )

    def _watch(self, merchant: str, residues: NDArray[np.uint32]) -> None:
        if merchant in ("", min(self.members)):
            self.seen[merchant] = residues.copy()


def make_signed_plan(experiment: Experiment) -> tuple[Plan, SignedPlan]:
    """Return the experiment's plan, as it is and signed. Raises `PlanRefused` when its ε can't be met."""
    serial = hashlib.sha256(f"{experiment.name} {experiment.seed}".encode()).digest()[:16]
    plan = make_plan(experiment.plan, serial)
    return plan, SignedPlan.sign(plan, operator_key(experiment))


def train_with(
    rounds: Rounds,
    experiment: Experiment,
    progress: Progress,
    on_round: Callable[[RoundReport], None],
) -> NDArray[np.float32]:
    """Run the experiment's rounds that are left as `rounds` does and return the published model, shape (d,).

    Raises as `league.train` does, and `ConfigError` when the plan trains nothing.
    """
    plan, settings = progress.plan, experiment.optimization
    if isinstance(plan.training, EvaluationTraining):
        raise ConfigError(
            "plan.training.mode: found evaluation, which trains nothing; see hanse_server.federated_evaluation."
        )
    if isinstance(plan.training, MeanTraining | TrendsTraining):
        initial = np.zeros(plan.dimension, dtype=np.float32)
    else:
        seed = seed_for(experiment.seed, "initialisation")
        initial = models.initial_vector(plan.recipe, len(plan.taxonomy.classes), seed)
    return train(
        rounds=rounds,
        progress=progress,
        optimizer=create(settings.optimizer),
        initial=initial,
        tail_average=settings.tail_average,
        factor=lambda round_: settings.schedule.factor(round_, plan.training.rounds),
        on_round=on_round,
    )


def operator_key(experiment: Experiment) -> Ed25519PrivateKey:
    """Return the simulated operator's key: from the seed, so that signed plans repeat to the bit."""
    return _key(experiment, "operator")


def league_key(experiment: Experiment) -> Ed25519PrivateKey:
    """Return the key that signs the simulated league's directory, from the seed."""
    return _key(experiment, "league")


def identity_key(experiment: Experiment, merchant: str) -> Ed25519PrivateKey:
    """Return a simulated merchant's identity, from the seed."""
    return _key(experiment, f"merchant {merchant}")


def directory_of(experiment: Experiment, merchants: Iterable[str]) -> LeagueDirectory:
    """Return the signed directory of the simulated merchants. It never expires, so that it repeats to the bit."""
    entries = tuple(
        Entry(
            name=name,
            entity=name,
            identity=signing.public_bytes(identity_key(experiment, name)),
            expires=NEVER,
        )
        for name in sorted(merchants)
    )
    charter = simulated_charter(experiment)
    directory = Directory(
        league=experiment.plan.league,
        charter=charter.read().digest,
        version=1,
        expires=NEVER,
        entries=entries,
    )
    signed = SignedDirectory.of(directory, (charter,)).signed_by(league_key(experiment))
    return LeagueDirectory(signed, directory)


def simulated_charter(experiment: Experiment) -> SignedCharter:
    """Return the charter of the simulated league, whose key has one holder."""
    return founded(experiment.plan.league, league_key(experiment))


def _key(experiment: Experiment, holder: str) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(
        hashlib.sha256(f"hanse simulated {holder} {experiment.seed}".encode()).digest()
    )


def simulated_policy(experiment: Experiment, budget: PrivacyTarget | None = None) -> Policy:
    """Return the policy of the simulated merchants, which allows the experiment's plan, and `budget` in all."""
    settings = experiment.plan
    budget, unit = budget or settings.privacy, settings.training.unit
    return Policy(
        league=settings.league,
        epsilon=budget.epsilon,
        delta=budget.delta,
        unit=unit,
        minimum_cohort=settings.cohort.min_merchants,
        corrupt_merchants=settings.cohort.max_corrupt,
        max_rounds=settings.training.rounds + settings.training.repeats,
        max_steps=settings.training.work,
        modes=tuple(mode for mode in get_args(Mode) if mode != "trends" or unit == "photo"),
    )


def stream_name(experiment: Experiment, holder: str) -> str:
    """Return the name of a random stream: one plan's noise must not be another's, when an experiment has several."""
    training = experiment.plan.training
    if isinstance(training, TrendsSchedule):
        return f"{training.mode} {training.first_day} {holder}"
    apart = isinstance(training, MeanSchedule | EvaluationSchedule)
    return f"{training.mode} {holder}" if apart else holder


def ledger_path(folder: Path, merchant: str) -> Path:
    """Return where the result folder `folder` keeps a merchant's ledger."""
    return folder / "merchants" / merchant / "ledger.sqlite"


def seeded_members(
    experiment: Experiment,
    shops: Mapping[str, Examples],
    folder: Path,
    tell: Tell,
    budget: PrivacyTarget | None = None,
    queries: Mapping[str, QueryLog] | None = None,
) -> dict[str, Member]:
    """Return a member for each of `shops`, with seeded randomness and a policy that allows this plan.

    `queries` are what their shoppers asked for, where a plan counts that.
    `budget` is for all plans that its ledger in `folder` is charged for; by default that of this plan.
    """
    settings = experiment.plan
    policy = simulated_policy(experiment, budget)
    league = PinnedLeague(
        operator_key=signing.public_bytes(operator_key(experiment)),
        charter=simulated_charter(experiment).read().digest,
        taxonomy=settings.taxonomy,
    )
    members = {}
    for name, examples in shops.items():
        own = ledger_path(folder, name)
        ledger = Ledger(own, policy.budget)
        randomness = RoundRandomness(experiment.seed, stream_name(experiment, f"merchant {name}"))
        trainer: Trainer = ShopTrainer(
            settings.recipe, settings.taxonomy, examples, randomness, queries=(queries or {}).get(name)
        )
        if experiment.attack is not None and name in attackers(experiment):
            trainer = Attacker(experiment.attack, trainer, experiment.seed, name)
        participant = Participant(
            league=league,
            policy=policy,
            identity=identity_key(experiment, name),
            ledger=ledger,
            markers=Markers(own.with_name("markers.sqlite")),
            trainer=trainer,
            tell=partial(tell, name),
            wait=lambda seconds: None,
        )
        members[name] = Member(_repeatable(participant, randomness), ledger)
    return members


def _repeatable(participant: Participant, randomness: RoundRandomness) -> Handler:
    """Return the participant's `handle` that begins the stream of each try at a round first."""

    def handle(request: bytes) -> bytes:
        with suppress(WireError):  # of another kind
            randomness.begin(wire.decode(Start, request, MAX_MESSAGE_BYTES).round)
        return participant.handle(request)

    return handle
