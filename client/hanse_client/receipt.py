"""A month's privacy receipt: what left this machine, what that cost, and how anyone with the ledger can check it.

    receipt = Receipt.of(ledger, "2026-11", language="en", now=datetime.now(UTC))
    save(path, page(receipt))
    differences(read(path), ledger)          # () when it agrees

The page holds its figures twice: for people, and as one JSON object for machines, in an element `pre` with the id
`record`. That object is a `Receipt`. It names the ledger's last entry before the month and the last one that it counts,
each by number and hash, and since every hash depends on all entries before, those two fix everything between.

**A month** is a run of entries. Times are of the merchant's own clock, in UTC, and an entry is of the latest month that
it or an entry before it is dated in: a clock that was set back moves nothing into a month that is over.

**Checking** makes the receipt anew from the ledger, up to the entry that it ends with, and compares field by field.
So a ledger that has gone on since still agrees. An entry of the month that the receipt lacks, though it was there when
the receipt was made, is a difference, too.
"""

import html
import itertools
import math
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, field_validator

from hanse_client import templates
from hanse_client.charges import Account, Budget, Event, Spent
from hanse_client.explanation import SUSPICION, posterior_bound, upward
from hanse_client.ledger import Ledger, genesis
from hanse_common.errors import ConfigError, WireError
from hanse_common.files import read_bounded
from hanse_common.modes import Unit
from hanse_common.privacy import filters
from hanse_common.vision.photo import shown
from hanse_common.web.pages import Language, Pages
from hanse_common.wire import HexDigest, Value

MAX_BYTES = 4 << 20
"""Bound of a receipt's file."""

BYTES_A_NUMBER = 4
"""An upload is residues mod 2³²."""

RELEASE = version("hanse")
"""This release's name."""

_RECORD = '<pre id="record">'
_MAX_LINES = 10_000
_TOLD = 1e-9
"""The least ε but 0 that is told as a number."""

_SAME = 1e-6
"""Relative: an ε that another release computes may differ in its last digits."""

Month = Annotated[str, Field(pattern=r"^[0-9]{4}-(0[1-9]|1[0-2])$")]
Time = Annotated[str, Field(max_length=40)]
Count = Annotated[int, Field(ge=0, lt=1 << 53)]
Share = Annotated[float, Field(gt=0, lt=1)]
Epsilon = Annotated[float, Field(ge=0)] | None


class Entry(Value):
    """One entry of the ledger, by number and hash; number 0 is the genesis."""

    number: Count
    hash: HexDigest


class PlanLine(Value):
    """What one plan took in the month: at most one upload for each charge, of `numbers` numbers each."""

    plan: HexDigest
    rounds: Count
    charges: Count
    numbers: Count
    steps: Count

    @property
    def bytes(self) -> int:
        """The most bytes that its uploads have."""
        return BYTES_A_NUMBER * self.charges * self.numbers


class DayLine(Value):
    """What one plan took on one day: charges of rounds `first` to `last`, counted from 1."""

    day: Time
    plan: HexDigest
    first: Count
    last: Count
    charges: Count


class Receipt(Value):
    """One month of a ledger.

    `start` is the last entry before the month, `end` the last that is counted. `epsilon_before`, `epsilon_after` and
    the δ belong to all entries up to those two, by the filter called `accounting`; an ε is None where none can be
    promised. `budget_epsilon` and `budget_delta` are what the policy allowed when the receipt was `made`. `in_shares`
    says that some plan up to the end had its noise in shares.
    """

    format_version: Literal[1] = 1
    release: Annotated[str, Field(max_length=40)]
    language: Language
    made: Time
    month: Month
    unit: Unit
    accounting: Annotated[str, Field(max_length=16)]
    budget_epsilon: Annotated[float, Field(gt=0)]
    budget_delta: Share
    start: Entry
    end: Entry
    epsilon_before: Epsilon
    delta_before: Annotated[float, Field(ge=0)]
    epsilon_after: Epsilon
    delta_after: Annotated[float, Field(ge=0)]
    in_shares: bool
    plans: Annotated[tuple[PlanLine, ...], Field(max_length=_MAX_LINES)]
    days: Annotated[tuple[DayLine, ...], Field(max_length=_MAX_LINES)]

    @field_validator("accounting")
    @classmethod
    def _known(cls, name: str) -> str:
        return filters.parse(name).name

    @classmethod
    def of(cls, ledger: Ledger, month: str, *, language: Language, now: datetime) -> Self:
        """Return the receipt of `month`, such as 2026-11, up to now. Raises `LedgerError` as the ledger does."""
        return cls._made(
            tuple(ledger.events()), ledger.budget, month, language, _seconds(now), version("hanse")
        )

    @classmethod
    def _made(
        cls, events: Sequence[Event], budget: Budget, month: str, language: Language, made: str, release: str
    ) -> Self:
        months = [*itertools.accumulate((event.time[:7] for event in events), max)]
        before = [event for event, each in zip(events, months, strict=True) if each < month]
        during = [event for event, each in zip(events, months, strict=True) if each == month]
        spent = [Spent.of(_accounts(part), budget) for part in (before, [*before, *during])]
        return cls(
            release=release,
            language=language,
            made=made,
            month=month,
            unit=budget.unit,
            accounting=budget.accounting,
            budget_epsilon=budget.epsilon,
            budget_delta=budget.delta,
            start=_last(before, budget),
            end=_last([*before, *during], budget),
            epsilon_before=_finite(spent[0].epsilon),
            delta_before=spent[0].delta,
            epsilon_after=_finite(spent[1].epsilon),
            delta_after=spent[1].delta,
            in_shares=any(plan.shares > 1 for plan in spent[1].plans),
            plans=tuple(_plan_lines(during)),
            days=tuple(_day_lines(during)),
        )

    @property
    def charges(self) -> int:
        """How many charges there were: at most as many uploads left."""
        return sum(line.charges for line in self.plans)

    @property
    def rounds(self) -> int:
        """How many rounds there were; one that was repeated is one."""
        return sum(line.rounds for line in self.plans)

    @property
    def bytes(self) -> int:
        """The most bytes that uploads had."""
        return sum(line.bytes for line in self.plans)

    @property
    def whole_plans(self) -> bool:
        """Whether a plan is paid for in full when its first round is."""
        return filters.parse(self.accounting).whole_plans

    @property
    def epsilons(self) -> tuple[str | None, str | None, str | None]:
        """ε before the month, in it and after it, as they are told: never less than they are."""
        before, after = self.epsilon_before, self.epsilon_after
        added = None if before is None or after is None else max(0.0, after - before)
        return _told(before), _told(added), _told(after)

    @property
    def suspicion(self) -> str | None:
        """The percentage that a suspicion of 1 % can become, after all that was charged; None without a promise."""
        if self.epsilon_after is None:
            return None
        return upward(100 * posterior_bound(self.epsilon_after, SUSPICION), 2)


def page(receipt: Receipt) -> str:
    """Return the receipt as a page, in its language: the same for the same receipt."""
    return Pages(templates.FOLDER, receipt.language).render(
        "receipt.html", r=receipt, record=receipt.model_dump_json(indent=1)
    )


def read(path: Path) -> tuple[Receipt, bool]:
    """Return the receipt in the file `path`, untrusted, and whether the page is the one made of it.

    A page of another release may look different; of this release's it was then altered. Raises `ConfigError` when the
    file can't be read, and `WireError` when it is no receipt.
    """
    data = read_bounded(path, MAX_BYTES, "a receipt", ConfigError)
    name = shown(path)
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise WireError(f"{name}: found no text in UTF-8, expected a receipt.") from None
    parts = text.split(_RECORD)
    if len(parts) != 2:
        raise WireError(
            f"{name}: found {len(parts) - 1} records, expected the one of a receipt, behind {_RECORD}. Get the file "
            "again from where it was made."
        )
    try:
        receipt = Receipt.model_validate_json(html.unescape(parts[1].partition("</pre>")[0]))
    except ValidationError as error:
        fault = error.errors(include_input=False, include_url=False)[0]
        field = ".".join(map(str, fault["loc"])) or "the record"
        raise WireError(f"{name}: {field}: {fault['msg']} ({error.error_count()} faults in all).") from None
    return receipt, page(receipt) == text


def differences(receipt: Receipt, ledger: Ledger) -> tuple[str, ...]:
    """Return a line for each thing in which `receipt` and the ledger differ; none when they agree.

    Raises `LedgerError` when the ledger itself is not sound.
    """
    budget, events = ledger.budget, tuple(ledger.events())
    if (receipt.accounting, receipt.unit) != (budget.accounting, budget.unit):
        text = (
            f"another ledger: the receipt is of one by {receipt.accounting} for each {receipt.unit}, this one is by "
            f"{budget.accounting} for each {budget.unit}."
        )
        return (text,)
    if receipt.end.number > len(events):
        text = (
            f"the receipt counts {receipt.end.number} entries, the ledger has {len(events)}: entries are gone, or this "
            "is another ledger."
        )
        return (text,)
    counted = events[: receipt.end.number]
    terms = Budget(receipt.budget_epsilon, receipt.budget_delta, budget.accounting, budget.unit)
    own = Receipt._made(counted, terms, receipt.month, receipt.language, receipt.made, receipt.release)
    found = [*_compared("", receipt.model_dump(), own.model_dump())]
    months = itertools.accumulate((event.time[:7] for event in events), max)
    found += [
        f"entry {event.number} of this month is not in the receipt, but dated {event.time}, before it was made."
        for event, month in zip(events, months, strict=True)
        if event.number > receipt.end.number and month == receipt.month and event.time < receipt.made
    ][:1]
    return tuple(found)


def _compared(name: str, said: Any, own: Any) -> Iterator[str]:
    """Yield a line for each value in which two records differ."""
    if isinstance(said, dict):
        for key, value in said.items():
            yield from _compared(f"{name}.{key}".lstrip("."), value, own[key])
    elif isinstance(said, tuple):
        if len(said) != len(own):
            yield f"{name}: the receipt has {len(said)} lines, the ledger gives {len(own)}."
        for index, (one, other) in enumerate(zip(said, own, strict=False)):
            yield from _compared(f"{name}[{index}]", one, other)
    elif isinstance(said, float) and isinstance(own, float):
        if not math.isclose(said, own, rel_tol=_SAME, abs_tol=1e-12):
            yield f"{name}: the receipt says {said:.9g}, the ledger gives {own:.9g}."
    elif said != own:
        yield f"{name}: the receipt says {said}, the ledger gives {own}."


def _accounts(events: Sequence[Event]) -> list[Account]:
    """Return what `events`, the first of a ledger, add up to by plan."""
    found: dict[bytes, Account] = {}
    for event in events:
        charge = event.charge
        account = found.get(charge.plan_digest) or Account(charge.plan_digest, charge.parameters)
        found[charge.plan_digest] = account.after(charge.round, charge.attempt, charge.mechanism.steps)
    return list(found.values())


def _plan_lines(events: Sequence[Event]) -> Iterator[PlanLine]:
    by_plan: dict[bytes, list[Event]] = {}
    for event in events:
        by_plan.setdefault(event.charge.plan_digest, []).append(event)
    for digest, charged in by_plan.items():
        mechanism = charged[0].charge.mechanism
        yield PlanLine(
            plan=digest.hex(),
            rounds=len({event.charge.round for event in charged}),
            charges=len(charged),
            numbers=mechanism.dimension,
            steps=sum(event.charge.mechanism.steps for event in charged),
        )


def _day_lines(events: Sequence[Event]) -> Iterator[DayLine]:
    by_day: dict[tuple[str, bytes], list[int]] = {}
    for event in events:
        by_day.setdefault((event.time[:10], event.charge.plan_digest), []).append(event.charge.round + 1)
    for (day, digest), rounds in by_day.items():
        yield DayLine(day=day, plan=digest.hex(), first=min(rounds), last=max(rounds), charges=len(rounds))


def _last(events: Sequence[Event], budget: Budget) -> Entry:
    if not events:
        return Entry(number=0, hash=genesis(budget).hex())
    return Entry(number=events[-1].number, hash=events[-1].hash.hex())


def _told(epsilon: float | None) -> str | None:
    if epsilon is None:
        return None
    return upward(max(epsilon, _TOLD), 4) if epsilon else "0"


def _finite(epsilon: float) -> float | None:
    return epsilon if math.isfinite(epsilon) else None


def _seconds(time: datetime) -> str:
    """Return `time` as the ledger writes it."""
    return time.astimezone(UTC).isoformat(timespec="seconds")
