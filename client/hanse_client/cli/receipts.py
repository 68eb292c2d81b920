"""A month on one page: `receipt`."""

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from hanse_client import receipt as receipts
from hanse_client.cli.options import DEFAULT_CONFIG, ConfigOption, say
from hanse_client.config import ClientConfig
from hanse_client.ledger import Ledger
from hanse_client.receipt import Receipt
from hanse_common.config import load
from hanse_common.errors import ConfigError, LedgerError
from hanse_common.vision.photo import shown
from hanse_common.web.pages import Language, save


def receipt(
    month: Annotated[
        str | None,
        typer.Option(help="The month, such as 2026-11; by default the ledger's last.", metavar="YYYY-MM"),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--out", help="The new file; by default receipt-YYYY-MM.html, here.", metavar="FILE"),
    ] = None,
    verify: Annotated[
        Path | None, typer.Option(help="Check this receipt against your ledger instead.", metavar="FILE")
    ] = None,
    language: Annotated[Language, typer.Option(help="The receipt's language.")] = "en",
    config: ConfigOption = DEFAULT_CONFIG,
) -> None:
    """Write a month's privacy receipt: the rounds, what they cost, what left this machine, and how to check it.

    Times are of this machine's clock, in UTC. Nothing is sent.

    Exit codes: 0 written, or the receipt agrees; 13 the receipt differs, or the ledger is damaged; 11 it is no receipt.
    """
    settings = load(ClientConfig, config)
    if verify is not None:
        found, as_made = receipts.read(verify)
    if not settings.ledger_path.exists():
        text = (
            f"{shown(settings.ledger_path)}: no ledger yet. Nothing was ever charged from here. If you did take part "
            "before, the ledger was moved or deleted: find it before you go on."
        )
        if verify is not None:
            raise LedgerError(text)
        say(text)
        return
    ledger = Ledger(settings.ledger_path, settings.policy.budget)
    if verify is None:
        _write(ledger, month, output, language)
    else:
        _verify(verify, found, as_made, ledger)


def _write(ledger: Ledger, month: str | None, output: Path | None, language: Language) -> None:
    now = datetime.now(UTC)
    if month is None:
        month = max((event.time[:7] for event in ledger.events()), default=f"{now:%Y-%m}")
    if not re.fullmatch(r"[0-9]{4}-(0[1-9]|1[0-2])", month) or month > f"{now:%Y-%m}":
        raise ConfigError(f"--month: found {month!r}, expected a month up to now, such as {now:%Y-%m}.")
    made = Receipt.of(ledger, month, language=language, now=now)
    path = output or Path(f"receipt-{month}.html")
    save(path, receipts.page(made))
    say(f"Wrote {shown(path)}. {_figures(made)}")
    say("Keep a copy away from this machine: it also shows when a ledger was replaced.")


def _verify(path: Path, found: Receipt, as_made: bool, ledger: Ledger) -> None:
    lines = receipts.differences(found, ledger)
    if not as_made and found.release == receipts.RELEASE:
        lines = ("the page is not the one that its record makes: it was edited.", *lines)
    if lines:
        raise LedgerError("\n".join(f"{shown(path)}: {line}" for line in lines))
    say(f"{shown(path)} agrees with the ledger. {_figures(found)}")
    if not as_made:
        say(
            f"It was made by release {found.release}, so only its record was checked, not how the page looks. Believe "
            "the figures above."
        )
    later = ledger.counter - found.end.number
    if later:
        say(f"The ledger has gone on since: {later} more {'entry' if later == 1 else 'entries'}.")


def _figures(found: Receipt) -> str:
    before, added, after = (each or "none that can be promised" for each in found.epsilons)
    return (
        f"{found.month}: rounds {found.rounds}, uploads at most {found.charges}; ε {before} before it, {added} in it, "
        f"{after} after it. Last entry {found.end.number}, hash {found.end.hash}."
    )
