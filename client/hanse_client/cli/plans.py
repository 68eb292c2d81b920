"""Judging plans before anything is spent: `explain`, and by hand `plans`, `approve`, `refuse`."""

import re
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from hanse_client.approvals import Approvals, Standing
from hanse_client.charges import Charge
from hanse_client.cli.options import DEFAULT_CONFIG, ConfigOption, say
from hanse_client.config import ClientConfig
from hanse_client.explanation import upward
from hanse_client.ledger import Ledger
from hanse_common import wire
from hanse_common.commands import out
from hanse_common.config import load
from hanse_common.errors import ConfigError, HanseError, PlanRefused, SignatureInvalid, WireError
from hanse_common.files import read_bounded
from hanse_common.plan import Plan, SignedPlan
from hanse_common.vision.photo import shown

NameArgument = Annotated[
    str, typer.Argument(help="The beginning of a name that hanse-client plans lists.", metavar="PLAN")
]
_NAME = re.compile(r"^[0-9a-fA-F]{4,64}$")


def explain(
    plan: Annotated[str, typer.Argument(help="A plan file, or a plan that waits.", metavar="PLAN")],
    config: ConfigOption = DEFAULT_CONFIG,
) -> None:
    """Say in plain words what a plan would do with your photos, and whether you allow it.

    PLAN is a file that the operator gave you, or the beginning of a name that hanse-client plans lists. No photo is
    read, and nothing is spent.

    Exit codes: 0 allowed, 3 refused by your policy, 4 no room in your budget, 12 not signed by your operator.
    """
    settings = load(ClientConfig, config)
    found = _opened(settings, plan)
    say("\n".join(settings.policy.explain(found)))
    say(f"You take part {settings.schedule.describe()} (schedule).")
    if settings.policy.approval == "manual":
        say("Your policy has it wait for your word: hanse-client approve (approval).")
    reasons = settings.policy.reasons(found, settings.league.taxonomy)
    if reasons:
        out.print("\n[red]Your policy refuses this plan:[/red]")
        say("\n".join(f"- {reason}" for reason in reasons))
        raise typer.Exit(PlanRefused.exit_code)
    _require_budget(settings, found)
    out.print("\n[green]Your policy allows this plan, and your budget has room for it.[/green]")


def plans(config: ConfigOption = DEFAULT_CONFIG) -> None:
    """List the plans that wait for your word, and what you said of others. For a policy with approval: manual."""
    settings = load(ClientConfig, config)
    found = Approvals(settings.plans_path).list()
    if not found:
        say("No plan has come that needed your word.")
        return
    table = Table("plan", "standing", "rounds", "ε", box=None, pad_edge=False)
    for name, standing in found.items():
        try:
            plan = _opened(settings, name)
            facts = (str(plan.training.rounds), f"{upward(plan.epsilon(), 3)}")
        except (HanseError, ValueError):
            facts = ("?", "?")
        table.add_row(name[:16], standing, *facts)
    out.print(table)


def approve(name: NameArgument, config: ConfigOption = DEFAULT_CONFIG) -> None:
    """Let your daemon take part in a plan that waits. It is charged when its first round starts."""
    settings = load(ClientConfig, config)
    approvals = Approvals(settings.plans_path)
    found = _opened(settings, name)
    reasons = settings.policy.reasons(found, settings.league.taxonomy)
    if reasons:
        raise PlanRefused("Your policy refuses this plan, whatever you say here:\n" + "\n".join(reasons))
    say(f"Approved: plan {approvals.decide(name, Standing.APPROVED)[:16]}.")


def refuse(name: NameArgument, config: ConfigOption = DEFAULT_CONFIG) -> None:
    """Keep your daemon out of a plan, from its next block on. What was charged stays charged."""
    settings = load(ClientConfig, config)
    say(f"Refused: plan {Approvals(settings.plans_path).decide(name, Standing.REFUSED)[:16]}.")


def _opened(settings: ClientConfig, name: str) -> Plan:
    """Return the plan in the file `name`, or the one that waits under that name."""
    key = bytes.fromhex(settings.league.operator_key)
    if _NAME.fullmatch(name) and not Path(name).exists():
        return Approvals(settings.plans_path).plan(name).open(key)
    return _read_plan(Path(name), key)


def _read_plan(path: Path, operator_key: bytes) -> Plan:
    name = shown(path)
    data = read_bounded(path, wire.MAX_DOCUMENT_BYTES, "a plan file", ConfigError)
    try:
        return wire.decode(SignedPlan, data).open(operator_key)
    except WireError as error:
        raise WireError(f"{name}: not a plan file. {error} Ask the operator for it again.") from None
    except SignatureInvalid:
        raise SignatureInvalid(
            f"{name}: not signed with the key under league.operator_key. Take it for a forgery until the "
            "operator, asked by telephone, says otherwise."
        ) from None


def _require_budget(settings: ClientConfig, plan: Plan) -> None:
    """Raise `BudgetExceeded` unless the plan is in the ledger already or fits beside what is there."""
    if not settings.ledger_path.exists():
        return
    kept = Ledger(settings.ledger_path, settings.policy.budget)
    if kept.last_work(plan.digest) is None:
        kept.check(Charge.of(plan))
