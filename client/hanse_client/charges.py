"""What a ledger keeps account of: a budget, charges against it, and what they add up to.

    charge = Charge(plan_digest=digest, round=0, attempt=0, mechanism=mechanism, plan_steps=60, delta=1e-5)

Values only; `ledger` writes them down.
"""

import math
from dataclasses import dataclass
from typing import Self

from hanse_common.plan import Plan
from hanse_common.privacy.mechanism import Mechanism


@dataclass(frozen=True)
class Budget:
    """The most that one photo may ever pay. Raises ValueError unless ε > 0 is finite and 0 < δ < 1."""

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        if not 0 < self.epsilon < math.inf:
            raise ValueError(f"Expected a finite epsilon > 0, found {self.epsilon}.")
        if not 0 < self.delta < 1:
            raise ValueError(f"Expected 0 < delta < 1, found {self.delta}.")


@dataclass(frozen=True)
class Charge:
    """One use of the photos. All of it is public: it follows from the plan.

    Attributes:
        plan_digest: names the plan, 32 bytes.
        round: counted from 0.
        attempt: counted from 0 in each round.
        mechanism: that of this round; its `steps` are this round's.
        plan_steps: how many steps the whole plan may take, repeated rounds included.
        delta: the plan's δ.

    Raises:
        ValueError: a field is out of range.
    """

    plan_digest: bytes
    round: int
    attempt: int
    mechanism: Mechanism
    plan_steps: int
    delta: float

    def __post_init__(self) -> None:
        if len(self.plan_digest) != 32:
            raise ValueError(f"Expected a plan_digest of 32 bytes, found {len(self.plan_digest)}.")
        if self.round < 0 or self.attempt < 0:
            raise ValueError(f"Expected round and attempt ≥ 0, found {self.round} and {self.attempt}.")
        if not self.mechanism.steps <= self.plan_steps:
            raise ValueError(f"Expected at most {self.plan_steps} steps, found {self.mechanism.steps}.")
        if not 0 < self.delta < 1:
            raise ValueError(f"Expected 0 < delta < 1, found {self.delta}.")

    @classmethod
    def of(cls, plan: Plan, round_: int = 0, attempt: int = 0, steps: int | None = None) -> Self:
        """Return the charge of `steps` steps under `plan`; by default of all that it may take."""
        total = plan.training.total_steps
        mechanism = plan.mechanism(total if steps is None else steps)
        return cls(plan.digest, round_, attempt, mechanism, total, plan.delta)

    @property
    def parameters(self) -> tuple[int, float, int, float, float, float]:
        """What stays the same for all of a plan's charges, in the order of the ledger's columns."""
        mechanism = self.mechanism
        return (
            self.plan_steps,
            float(mechanism.clipping_norm),
            mechanism.dimension,
            float(mechanism.noise_multiplier),
            float(mechanism.sampling_rate),
            float(self.delta),
        )


@dataclass(frozen=True)
class Event:
    """One row: its number from 1, its time (UTC, ISO 8601, for the owner's eyes), its charge and its hash."""

    number: int
    time: str
    charge: Charge
    hash: bytes


@dataclass(frozen=True)
class PlanSpend:
    """What one plan costs. `rounds` and `steps` have taken place; ε and δ are set aside for `plan_steps`."""

    plan_digest: bytes
    rounds: int
    steps: int
    plan_steps: int
    epsilon: float
    delta: float


@dataclass(frozen=True)
class Spent:
    """What all plans cost together, and each of them, in the order in which they were first charged."""

    plans: tuple[PlanSpend, ...]

    @property
    def epsilon(self) -> float:
        """Σε."""
        return math.fsum(plan.epsilon for plan in self.plans)

    @property
    def delta(self) -> float:
        """Σδ."""
        return math.fsum(plan.delta for plan in self.plans)
