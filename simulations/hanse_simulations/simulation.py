"""A league in one process: the server's own training loop and the merchants' own participants.

    league = League.assemble(experiment, seeded_members(experiment, shops, folder, tell), folder)
    model = league.train(on_round=print)

Everything but the transport is the product's code: plans are signed and judged, ledgers are real SQLite files
that are charged and synced, messages are encoded and decoded. `seeded_members` also replaces the source of
randomness, so that an experiment repeats to the bit; the demo's members keep the operating system's.

What is guaranteed: the same experiment and seed on the same machine give the same model, also when the training
was stopped between two rounds and resumed. Stopped in the middle of a round, it goes on with another attempt at
it, as the product does: merchants may pay twice, the plan needs `repeats`, and the noise is another.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from hanse_client.ledger import Ledger
from hanse_client.participant import Participant
from hanse_client.policy import Policy
from hanse_client.training import Examples, LocalTrainer
from hanse_common import messages, signing, wire
from hanse_common.messages import Invitation, Start
from hanse_common.plan import Plan, SignedPlan
from hanse_common.vision import model as models
from hanse_server.config import make_plan
from hanse_server.league import RoundReport, train
from hanse_server.optimizers import create
from hanse_server.store import Store
from hanse_simulations.experiment import Experiment
from hanse_simulations.grid import Handler, LocalGrid
from hanse_simulations.seeded import RoundRandomness, seed_for

Tell = Callable[[str, str], None]
"""Hears (merchant, text): what that merchant's owner would be told."""


@dataclass(frozen=True)
class Member:
    """One merchant in the process: what answers its messages, and the ledger to look at afterwards."""

    handle: Handler
    ledger: Ledger


@dataclass(frozen=True)
class League:
    """Server and merchants of one experiment, ready to train."""

    experiment: Experiment
    plan: Plan
    signed_plan: SignedPlan
    grid: LocalGrid
    members: Mapping[str, Member]
    store: Store

    @classmethod
    def assemble(cls, experiment: Experiment, members: Mapping[str, Member], folder: Path) -> "League":
        """Return the league of `members`; the server's files go to `folder`/server.

        Raises `PlanRefused` when the plan's ε can't be met.
        """
        serial = hashlib.sha256(f"{experiment.name} {experiment.seed}".encode()).digest()[:16]
        plan = make_plan(experiment.plan, serial)
        handlers = {name: member.handle for name, member in members.items()}
        return cls(
            experiment=experiment,
            plan=plan,
            signed_plan=SignedPlan.sign(plan, operator_key(experiment)),
            grid=LocalGrid(handlers, experiment.dropout_rate, experiment.seed),
            members=members,
            store=Store(folder / "server"),
        )

    def train(self, on_round: Callable[[RoundReport], None] = lambda report: None) -> NDArray[np.float32]:
        """Run all rounds, or those that are left, and return the published model, shape (d,), float32."""
        optimization = self.experiment.optimization
        initial = models.initial_vector(
            self.plan.recipe,
            len(self.plan.taxonomy.classes),
            seed_for(self.experiment.seed, "initialisation"),
        )
        return train(
            transport=self.grid,
            signed_plan=self.signed_plan,
            plan=self.plan,
            optimizer=create(optimization.optimizer),
            store=self.store,
            initial=initial,
            attempts=optimization.attempts,
            tail_average=optimization.tail_average,
            on_round=on_round,
        )


def operator_key(experiment: Experiment) -> Ed25519PrivateKey:
    """Return the simulated operator's key: from the seed, so that signed plans repeat to the bit."""
    return Ed25519PrivateKey.from_private_bytes(
        hashlib.sha256(f"hanse simulated operator {experiment.seed}".encode()).digest()
    )


def seeded_members(
    experiment: Experiment, shops: Mapping[str, Examples], folder: Path, tell: Tell
) -> dict[str, Member]:
    """Return a member for each of `shops`, with seeded randomness and a policy that allows just this plan."""
    settings = experiment.plan
    policy = Policy(
        league=settings.league,
        epsilon=settings.privacy.epsilon,
        delta=settings.privacy.delta,
        minimum_cohort=settings.cohort.min_merchants,
        max_rounds=settings.training.rounds + settings.training.repeats,
        max_steps=settings.training.total_steps,
    )
    members = {}
    for name, examples in shops.items():
        ledger = Ledger(folder / "merchants" / name / "ledger.sqlite", policy.budget)
        randomness = RoundRandomness(experiment.seed, f"merchant {name}")
        participant = Participant(
            operator_key=signing.public_bytes(operator_key(experiment)),
            policy=policy,
            taxonomy=settings.taxonomy,
            ledger=ledger,
            trainer=LocalTrainer(settings.recipe, settings.taxonomy, examples, randomness),
            tell=partial(tell, name),
        )
        members[name] = Member(_repeatable(participant, randomness), ledger)
    return members


def _repeatable(participant: Participant, randomness: RoundRandomness) -> Handler:
    """Return the participant's `handle` that begins the stream of each message's round and attempt first."""

    def handle(request: bytes) -> bytes:
        work = wire.decode_any((Invitation, Start), request, messages.MAX_MESSAGE_BYTES)
        randomness.begin(work.round, work.attempt)
        return participant.handle(request)

    return handle
