"""What a ledger keeps account of: a budget, charges against it, and what they add up to.

    charge = Charge(plan_digest=digest, round=0, attempt=0, mechanism=mechanism, plan_steps=60, delta=1e-5)

Values only; `ledger` writes them down.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Self, get_args

from hanse_common.modes import Unit
from hanse_common.plan import Plan
from hanse_common.privacy import filters
from hanse_common.privacy.filters import Filter, Use
from hanse_common.privacy.mechanism import Mechanism

UNITS: tuple[Unit, ...] = get_args(Unit)
"""What an ε can be said of. None of them stands for another: what one ε promises of a whole shop, say, is about
twice as weak of one photo in a shop that stays, as its update is then replaced by another, not taken away."""

PARAMETERS = (
    "plan_steps",
    "clipping_norm",
    "dimension",
    "noise_multiplier",
    "sampling_rate",
    "shares",
    "delta",
    "unit",
)
"""What stays the same for all of a plan's charges, in the order of the ledger's columns."""


@dataclass(frozen=True)
class Budget:
    """The most that one `unit` may ever pay, and the filter by which it is added up.

    `accounting` is a name that `filters.parse` takes. `monthly` and `monthly_delta` are the most ε and δ in one
    calendar month, if any: a pace, no promise.

    Raises ValueError unless ε and `monthly` are > 0 and finite, 0 < δ < 1 and there are such a filter and unit.
    """

    epsilon: float
    delta: float
    accounting: str = filters.SUM.name
    unit: Unit = "photo"
    monthly: float | None = None
    monthly_delta: float | None = None

    def __post_init__(self) -> None:
        for epsilon in (self.epsilon, self.epsilon if self.monthly is None else self.monthly):
            if not 0 < epsilon < math.inf:
                raise ValueError(f"Expected a finite epsilon > 0, found {epsilon}.")
        for delta in (self.delta, self.delta if self.monthly_delta is None else self.monthly_delta):
            if not 0 < delta < 1:
                raise ValueError(f"Expected 0 < delta < 1, found {delta}.")
        _require_unit(self.unit)
        _ = self.filter

    @property
    def filter(self) -> Filter:
        """The filter called `accounting`."""
        return filters.parse(self.accounting)


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
        unit: what the plan's ε is said of.

    Raises:
        ValueError: a field is out of range.
    """

    plan_digest: bytes
    round: int
    attempt: int
    mechanism: Mechanism
    plan_steps: int
    delta: float
    unit: Unit = "photo"

    def __post_init__(self) -> None:
        if len(self.plan_digest) != 32:
            raise ValueError(f"Expected a plan_digest of 32 bytes, found {len(self.plan_digest)}.")
        if self.round < 0 or self.attempt < 0:
            raise ValueError(f"Expected round and attempt ≥ 0, found {self.round} and {self.attempt}.")
        if not self.mechanism.steps <= self.plan_steps:
            raise ValueError(f"Expected at most {self.plan_steps} steps, found {self.mechanism.steps}.")
        if not 0 < self.delta < 1:
            raise ValueError(f"Expected 0 < delta < 1, found {self.delta}.")
        _require_unit(self.unit)

    @classmethod
    def of(cls, plan: Plan, round_: int = 0, attempt: int = 0, steps: int | None = None) -> Self:
        """Return the charge of `steps` steps under `plan`; by default of all that it may take."""
        total = plan.training.total_steps
        mechanism = plan.mechanism(total if steps is None else steps)
        return cls(plan.digest, round_, attempt, mechanism, total, plan.delta, plan.training.unit)

    @classmethod
    def from_columns(
        cls, plan_digest: bytes, round_: int, attempt: int, steps: int, *parameters: Any
    ) -> Self:
        """Return the charge of these columns, those of `PARAMETERS` last, in their order."""
        plan_steps, clipping_norm, dimension, noise_multiplier, sampling_rate, shares, delta, unit = (
            parameters
        )
        mechanism = Mechanism(clipping_norm, dimension, noise_multiplier, sampling_rate, steps, shares)
        return cls(plan_digest, round_, attempt, mechanism, plan_steps, delta, unit)

    @property
    def parameters(self) -> tuple[int, float, int, float, float, int, float, Unit]:
        """The values of `PARAMETERS`, as the ledger's columns hold them."""
        mechanism = self.mechanism
        return (
            self.plan_steps,
            float(mechanism.clipping_norm),
            mechanism.dimension,
            float(mechanism.noise_multiplier),
            float(mechanism.sampling_rate),
            mechanism.shares,
            float(self.delta),
            self.unit,
        )


@dataclass(frozen=True)
class Event:
    """One row: its number from 1, its time (UTC, ISO 8601, for the owner's eyes), its charge and its hash.

    `previous` is the hash of the row before; the first row's is the ledger's genesis.
    """

    number: int
    time: str
    charge: Charge
    previous: bytes
    hash: bytes


@dataclass(frozen=True)
class Account:
    """What the charges under one plan add up to. `last` is the last (round, attempt)."""

    plan_digest: bytes
    parameters: tuple[Any, ...]
    rounds: int = 0
    steps: int = 0
    last: tuple[int, int] = (-1, -1)

    @property
    def unit(self) -> Unit:
        """What the plan's ε is said of."""
        unit: Unit = self.parameters[-1]
        return unit

    def after(self, round_: int, attempt: int, steps: int) -> "Account":
        """Return the account with one more charge, later than `last`."""
        rounds = self.rounds + (round_ > self.last[0])
        return replace(self, rounds=rounds, steps=self.steps + steps, last=(round_, attempt))

    def use(self) -> Use:
        """Return what a filter counts. Raises ValueError for parameters that no charge has."""
        plan = _whole(self.plan_digest, self.parameters)
        return Use(plan.mechanism, plan.delta, self.steps)


def _require_unit(unit: str) -> None:
    if unit not in UNITS:
        raise ValueError(f"Expected a unit of {', '.join(UNITS)}, found {unit!r}.")


@lru_cache(maxsize=1024)
def _whole(plan_digest: bytes, parameters: tuple[Any, ...]) -> Charge:
    """Return the charge of all of a plan's steps; made once, since each charge counts all plans anew."""
    return Charge.from_columns(plan_digest, 0, 0, parameters[0], *parameters)


@dataclass(frozen=True)
class PlanSpend:
    """What one plan would cost alone. `rounds` and `steps` have taken place, of `plan_steps`.

    `unit` is what ε is said of, and its noise is in `shares`. What several plans cost together is the filter's to say.
    """

    plan_digest: bytes
    rounds: int
    steps: int
    plan_steps: int
    shares: int
    unit: Unit
    epsilon: float
    delta: float


@dataclass(frozen=True)
class Spent:
    """What all plans cost together, and each of them, in the order in which they were first charged."""

    plans: tuple[PlanSpend, ...]
    epsilon: float
    delta: float

    @classmethod
    def of(cls, accounts: Iterable[Account], budget: Budget) -> Self:
        """Return what `accounts` cost under the budget's filter."""
        kept = tuple(accounts)
        uses = [account.use() for account in kept]
        plans = tuple(
            PlanSpend(
                account.plan_digest,
                account.rounds,
                account.steps,
                use.mechanism.steps,
                use.mechanism.shares,
                account.unit,
                *budget.filter.spent((use,), budget.delta),
            )
            for account, use in zip(kept, uses, strict=True)
        )
        return cls(plans, *budget.filter.spent(uses, budget.delta))


@dataclass(frozen=True)
class Seen:
    """What a ledger read and found sound: the last row's number and hash, and what its rows add up to by plan.

    `month` is the latest that any row was written in, such as 2026-11, and `started` the accounts before it. A clock
    that is set back begins no month anew.
    """

    number: int
    hash: bytes
    accounts: Mapping[bytes, Account]
    month: str
    started: Mapping[bytes, Account]

    def monthly(self, time: str) -> Mapping[bytes, Account]:
        """Return the accounts as the month of `time`, or the latest one seen, began."""
        return self.accounts if time[:7] > self.month else self.started

    def after(self, hash_: bytes, time: str, accounts: Mapping[bytes, Account]) -> "Seen":
        """Return what is seen after one more row, written at `time`, that makes the accounts what they are."""
        return Seen(self.number + 1, hash_, accounts, max(self.month, time[:7]), self.monthly(time))


def since(
    before: Mapping[bytes, Account], accounts: Mapping[bytes, Account], filter_: Filter
) -> Iterator[Account]:
    """Yield what is new in `accounts`: plans that were not there `before`, and, where steps are paid, new steps."""
    for digest, account in accounts.items():
        old = before.get(digest)
        if old is None:
            yield account
        elif not filter_.whole_plans and account.steps > old.steps:
            yield replace(account, steps=account.steps - old.steps)
