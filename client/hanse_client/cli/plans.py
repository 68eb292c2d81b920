"""Judging a plan before anything is spent: `explain`."""

from pathlib import Path
from typing import Annotated

import typer

from hanse_client.charges import Charge
from hanse_client.cli.options import DEFAULT_CONFIG, ConfigOption, say
from hanse_client.config import ClientConfig
from hanse_client.ledger import Ledger
from hanse_common import wire
from hanse_common.commands import out
from hanse_common.config import load
from hanse_common.errors import ConfigError, PlanRefused, SignatureInvalid, WireError
from hanse_common.files import read_bounded
from hanse_common.plan import Plan, SignedPlan
from hanse_common.vision.photo import shown


def explain(
    plan: Annotated[Path, typer.Argument(help="The plan file the operator gave you.", metavar="PLAN")],
    config: ConfigOption = DEFAULT_CONFIG,
) -> None:
    """Say in plain words what a plan would do with your photos, and whether you allow it.

    PLAN is the file that the operator gave you. No photo is read, and nothing is spent.

    Exit codes: 0 allowed, 3 refused by your policy, 4 no room in your budget, 12 not signed by your operator.
    """
    settings = load(ClientConfig, config)
    found = _read_plan(plan, bytes.fromhex(settings.league.operator_key))
    say("\n".join(settings.policy.explain(found)))
    reasons = settings.policy.reasons(found, settings.league.taxonomy)
    if reasons:
        out.print("\n[red]Your policy refuses this plan:[/red]")
        say("\n".join(f"- {reason}" for reason in reasons))
        raise typer.Exit(PlanRefused.exit_code)
    _require_budget(settings, found)
    out.print("\n[green]Your policy allows this plan, and your budget has room for it.[/green]")


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
