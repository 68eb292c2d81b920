"""What was spent: `ledger`."""

from pathlib import Path
from typing import Annotated

import typer

from hanse_client import ledger_view
from hanse_client.cli.options import DEFAULT_CONFIG, ConfigOption, say
from hanse_client.config import ClientConfig
from hanse_client.ledger import Ledger
from hanse_common.commands import out
from hanse_common.config import load
from hanse_common.vision.photo import shown


def ledger(
    config: ConfigOption = DEFAULT_CONFIG,
    entries: Annotated[bool, typer.Option("--entries", help="Also list every entry, oldest first.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read all of it again, and show its length and last hash.")
    ] = False,
    export: Annotated[
        Path | None,
        typer.Option(
            help="Write every entry to a new file, a line of JSON each, so that others can check chain and ε.",
            metavar="FILE",
        ),
    ] = None,
) -> None:
    """Show what your photos have paid, what that means, and how much of your budget is left.

    An exported FILE has a JSON object for each entry; client/README.md says how to check the chain and ε with it.

    Exit codes: 0 the ledger is sound, 13 it is damaged.
    """
    settings = load(ClientConfig, config)
    if not settings.ledger_path.exists():
        say(
            f"{shown(settings.ledger_path)}: no ledger yet. Nothing was ever charged from here. If you did take part "
            "before, the ledger was moved or deleted: find it before you go on."
        )
        return
    kept = Ledger(settings.ledger_path, settings.policy.budget)
    if verify:
        say("\n".join(ledger_view.verified(kept)))
    if export is not None:
        written = ledger_view.export(kept, export)
        say(
            f"Wrote {shown(export)}: {written} entries. It tells when you took part, and nothing of your photos."
        )
    if entries:
        say("".join(f"{ledger_view.entry(event)}\n" for event in kept.events()))
    if verify or export is not None:
        return
    spent = kept.spent()
    say("\n".join(ledger_view.summary(kept, spent, settings.policy)))
    if spent.plans:
        out.print()
        out.print(ledger_view.table(kept, spent))
    say(f"\nEntries in the ledger: {kept.counter}. None is altered or out of order.")
