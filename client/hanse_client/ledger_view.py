"""The ledger as its owner sees it: what was spent in plain words, every entry, and a file that others can check.

**The exported file** has a JSON object for each entry, a line each, oldest first:

- `number` (from 1), `time` (UTC), `plan_digest` (hexadecimal), `round` and `attempt` (from 0), `steps`: the entry;
- `plan_steps`, `clipping_norm`, `dimension`, `noise_multiplier`, `sampling_rate`, `shares`, `delta`, `unit`: its plan;
- `filter`: how the ledger adds up; `previous` and `hash` (hexadecimal): the chain.

`hash` is the SHA-256 of `previous`, 32 bytes, followed by the MessagePack array of the fourteen values from `number` to
`unit` in the order above, `plan_digest` as bytes. The first `previous` is the SHA-256 of `hanse ledger 2 FILTER UNIT`,
with the values of `filter` and `unit`, the same in every entry. ε follows from `noise_multiplier`, `sampling_rate` and
the steps: for filter `sum` it is, summed over plans, that of `plan_steps` steps of the Poisson subsampled Gaussian at
the plan's `delta`; for `rdp-ALPHA` that of the Rényi divergence of order ALPHA, summed over all entries' `steps`, at
the budget's δ. Hanse's own ε is a little higher (`hanse_common.privacy.accounting`, `filters`).
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path

from rich.table import Table

from hanse_client.charges import PARAMETERS, Event, Spent
from hanse_client.explanation import SUSPICION, posterior_bound, upward
from hanse_client.ledger import Ledger
from hanse_client.policy import Policy
from hanse_common.errors import ConfigError
from hanse_common.files import write_atomically
from hanse_common.vision.photo import shown

_ONE = {
    "photo": "any one photo",
    "product": "any one product with all its photos",
    "merchant": "this shop as a whole",
}


def table(kept: Ledger, spent: Spent) -> Table:
    """Return a row for each plan; its ε and δ where those of all plans add up."""
    adds_up = kept.budget.filter.whole_plans
    names = ("plan", "rounds", "steps", "protects one", *(("ε", "δ") if adds_up else ()))
    found = Table(*names, box=None, pad_edge=False)
    for column in found.columns[1:]:
        column.justify = "right"
    for one in spent.plans:
        costs = (_up(one.epsilon), f"{one.delta:g}") if adds_up else ()
        steps = f"{one.steps} of {one.plan_steps}"
        found.add_row(one.plan_digest.hex()[:16], str(one.rounds), steps, one.unit, *costs)
    return found


def summary(kept: Ledger, spent: Spent, policy: Policy) -> Iterator[str]:
    """Yield sentences that tell a shop's owner what was spent, what that means, and what is left."""
    budget, unit = kept.budget, policy.unit  # the ledger's, too, or it would not have opened
    if not spent.plans:
        yield (
            f"Nothing was charged yet. You allow ε = {budget.epsilon:g} and δ = {budget.delta:g} for all plans "
            f"together, for {_ONE[unit]}."
        )
        return
    rounds = sum(plan.rounds for plan in spent.plans)
    after = f"After {'1 round' if rounds == 1 else f'{rounds} rounds'}"
    if math.isinf(spent.epsilon):
        yield f"{after}, nothing can be promised about {_ONE[unit]}: no finite ε can be told at your δ."
    else:
        bound = upward(100 * posterior_bound(spent.epsilon, SUSPICION), 2)
        yield (
            f"{after}, someone who knew everything else could raise a {100 * SUSPICION:g} % suspicion about "
            f"{_ONE[unit]} to at most {bound} %. The chance that this bound fails is about 1 in {1 / spent.delta:,.0f}."
        )
    if any(plan.shares > 1 for plan in spent.plans):
        yield (
            "Some of the noise was in shares, so this rests on other merchants, too: on no more of them conspiring "
            "with the operator than the plan reckoned with."
        )
    yield from _left(kept, spent)


def _left(kept: Ledger, spent: Spent) -> Iterator[str]:
    """Yield what of the budget is spent and left, and how it is counted."""
    budget, name = kept.budget, kept.budget.accounting
    epsilon = max(0.0, budget.epsilon - spent.epsilon)
    if budget.filter.whole_plans:
        delta = max(0.0, budget.delta - spent.delta)
        yield (
            f"Spent: ε = {_up(spent.epsilon)} of the {budget.epsilon:g} you allow, δ = {spent.delta:g} of "
            f"{budget.delta:g}. Left: ε = {_down(epsilon)}, δ = {delta:.3g}."
        )
        if epsilon == 0 or delta < 1e-3 * budget.delta:
            yield "No other plan fits beside these unless you raise the budget in your policy."
        yield f"A plan is paid in full when its first round starts, whether or not the others follow ({name})."
    else:
        yield (
            f"Spent: ε = {_up(spent.epsilon)} of the {budget.epsilon:g} you allow, at δ = {budget.delta:g}. "
            f"Left: ε = {_down(epsilon)}."
        )
        yield f"Each round is paid when it starts; the first costs more than later ones ({name})."


def entry(event: Event) -> str:
    """Return a line that tells of one entry."""
    charge = event.charge
    steps = charge.mechanism.steps
    return (
        f"{event.number:6}  {event.time}  plan {charge.plan_digest.hex()[:16]}  round {charge.round + 1}, "
        f"attempt {charge.attempt + 1}, {'1 step' if steps == 1 else f'{steps} steps'}"
    )


def verified(kept: Ledger) -> Iterator[str]:
    """Read the whole ledger again and yield what was found. Raises `LedgerError` when it is not sound."""
    kept.verify()
    number, last = kept.head
    yield f"{shown(kept.path)} is sound. Entries: {number}; none is altered, missing or out of order."
    yield f"Hash of the last entry: {last.hex()}"
    yield (
        "Note number and hash down away from this machine. A ledger that has fewer entries one day, or another hash at "
        "this number (--export shows all), is not this one any more."
    )


def export(kept: Ledger, path: Path) -> int:
    """Write the ledger to the new file `path` and return the number of entries. Raises `ConfigError`."""
    if path.exists():
        raise ConfigError(f"{shown(path)}: there is a file already; export to another name, or move it away.")
    lines = [_exported(event, kept.budget.accounting) for event in kept.events()]
    try:
        write_atomically(path, "".join(lines).encode())
    except OSError as error:
        raise ConfigError(
            f"{shown(path)}: cannot be written ({error.strerror}); choose another place."
        ) from None
    return len(lines)


def _exported(event: Event, filter_name: str) -> str:
    charge = event.charge
    fields = {
        "number": event.number,
        "time": event.time,
        "plan_digest": charge.plan_digest.hex(),
        "round": charge.round,
        "attempt": charge.attempt,
        "steps": charge.mechanism.steps,
        **dict(zip(PARAMETERS, charge.parameters, strict=True)),
        "filter": filter_name,
        "previous": event.previous.hex(),
        "hash": event.hash.hex(),
    }
    return json.dumps(fields) + "\n"


def _up(value: float) -> str:
    """Return `value` with three decimals, never less than it is."""
    return f"{value if math.isinf(value) else math.ceil(round(1000 * value, 6)) / 1000:.3f}"


def _down(value: float) -> str:
    """Return `value` with three decimals, never more than it is."""
    return f"{math.floor(round(1000 * value, 6)) / 1000:.3f}"
