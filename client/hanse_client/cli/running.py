"""The daemon and what its owner asks of it: `run`, `status`, `history`, `pause`, `resume`, `doctor`, `page`."""

import json
import re
import time
import webbrowser
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from hanse_client.cli.options import DEFAULT_CONFIG, ConfigOption, say, say_now
from hanse_client.config import ClientConfig
from hanse_client.control import FOR_GOOD, Control, State, Status
from hanse_client.journal import Journal
from hanse_client.ledger import Ledger
from hanse_client.releases import Releases
from hanse_common import commands
from hanse_common.commands import out
from hanse_common.config import load
from hanse_common.errors import ConfigError, HanseError

JsonOption = Annotated[bool, typer.Option("--json", help="Print it for programs.")]

_LENGTH = re.compile(r"^([1-9][0-9]{0,3})([mhd])$")
_UNITS = {"m": "minutes", "h": "hours", "d": "days"}


def run(config: ConfigOption = DEFAULT_CONFIG) -> None:
    """Take part in your league until you stop it: wait for trainings, judge them, train, keep the accounts."""
    from hanse_client.daemon import Daemon  # torch takes seconds to load
    from hanse_client.examples import resolve_device
    from hanse_client.logs import log_to
    from hanse_client.resources import apply

    settings = load(ClientConfig, config)
    taking_part = Daemon(settings, say_now, config)
    settings.state.mkdir(mode=0o700, parents=True, exist_ok=True)
    log_to(settings.state / "daemon.log")
    apply(settings.resources, resolve_device(settings.device))
    with commands.until_stopped() as stop:
        with taking_part as daemon:
            daemon.run(stop)
        say_now("Stopped.")


def status(
    config: ConfigOption = DEFAULT_CONFIG,
    as_json: JsonOption = False,
    live: Annotated[bool, typer.Option("--live", help="Keep showing it, until Ctrl-C.")] = False,
) -> None:
    """Show how your daemon is: connected or not, in which round, what is spent, what waits for you.

    Exit codes: 0 it runs, 1 it does not.
    """
    settings = load(ClientConfig, config)
    if live:
        with Live(_shown(settings), console=out, auto_refresh=False) as screen:
            while True:
                screen.update(_shown(settings), refresh=True)
                time.sleep(1)
    found = Control(settings.state).status()
    if as_json:
        spent = _spent(settings)
        facts = found.model_dump(mode="json") if found else {"state": State.STOPPED}
        typer.echo(json.dumps(facts | {"epsilon": spent, "budget": settings.policy.epsilon}))
    else:
        out.print(_shown(settings))
    if found is None or found.state is State.STOPPED:
        raise typer.Exit(1)


def history(
    config: ConfigOption = DEFAULT_CONFIG,
    last: Annotated[int, typer.Option(help="How many events.", min=1, max=10_000, metavar="NUMBER")] = 30,
    as_json: JsonOption = False,
) -> None:
    """Show what happened lately: trainings, rounds, refusals, outages, changed photos."""
    settings = load(ClientConfig, config)
    events = Journal(settings.state).recent(last)
    if not events and not as_json:
        say("Nothing has happened yet.")
    for event in events:
        if as_json:
            typer.echo(event.model_dump_json())
        else:
            say(f"{event.time.astimezone():%Y-%m-%d %H:%M:%S}  {event.text}")


def pause(
    length: Annotated[
        str | None, typer.Argument(help="How long: 30m, 8h, 2d; without it until resume.", metavar="LENGTH")
    ] = None,
    config: ConfigOption = DEFAULT_CONFIG,
) -> None:
    """Have your daemon take part in nothing for a while. A round that was paid for is finished first."""
    settings = load(ClientConfig, config)
    until = Control(settings.state).pause(None if length is None else _length(length))
    when = (
        "until you say hanse-client resume"
        if until == FOR_GOOD
        else f"until {until.astimezone():%d %B, %H:%M}"
    )
    say(f"Paused {when}.")


def resume(config: ConfigOption = DEFAULT_CONFIG) -> None:
    """End a pause."""
    Control(load(ClientConfig, config).state).resume()
    say("Your daemon takes part again, in its hours.")


def doctor(config: ConfigOption = DEFAULT_CONFIG, as_json: JsonOption = False) -> None:
    """Check everything that taking part needs, and say for each failure what to do. Nothing is sent or spent.

    Exit codes: 0 all is well or will soon want attention, 25 something must be mended.
    """
    from hanse_client.doctor import EXIT_CODE, Mark, examine

    styles = {Mark.WELL: "green", Mark.SOON: "yellow", Mark.BAD: "red", Mark.SKIPPED: "dim"}
    settings = load(ClientConfig, config)
    if not as_json:
        say(f"ok    configuration: {config} can be read")
    bad = 0
    for finding in examine(settings):
        bad += finding.mark is Mark.BAD
        if as_json:
            facts = {
                "check": finding.name,
                "mark": finding.mark,
                "text": finding.text,
                "remedy": finding.remedy,
            }
            typer.echo(json.dumps(facts))
            continue
        out.print(f"[{styles[finding.mark]}]{finding.mark:4}[/]", end="  ")
        say(f"{finding.name}: {finding.text}")
        if finding.remedy and finding.mark is not Mark.WELL:
            say(f"      What to do: {finding.remedy}")
    if bad:
        raise typer.Exit(EXIT_CODE)


def page(
    config: ConfigOption = DEFAULT_CONFIG,
    show: Annotated[bool, typer.Option("--show", help="Print the address and open nothing.")] = False,
) -> None:
    """Open your daemon's page in your browser. The address it prints lets whoever has it see the page: keep it."""
    from hanse_client.page_access import address, opener

    settings = load(ClientConfig, config)
    if settings.page is None:
        raise ConfigError(f"{config}: page: missing; expected a section with a port.")
    found = address(settings)
    say(found)
    if not show:
        # Others could read the address in the list of processes.
        webbrowser.open(opener(settings.state, found).as_uri())


def _length(text: str) -> timedelta:
    found = _LENGTH.fullmatch(text)
    if found is None:
        raise ConfigError(f"LENGTH: found {text!r}, expected a number and m, h or d, such as 30m, 8h or 2d.")
    return timedelta(**{_UNITS[found[2]]: int(found[1])})


def _spent(settings: ClientConfig) -> float | None:
    """Return the ε that was spent, None when the ledger can't say."""
    if not settings.ledger_path.exists():
        return 0.0
    try:
        return Ledger(settings.ledger_path, settings.policy.budget).spent().epsilon
    except HanseError:
        return None


def _shown(settings: ClientConfig) -> Group:
    found = Control(settings.state).status()
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, text in _rows(settings, found):
        table.add_row(name, Text(text))
    return Group(table)


def _rows(settings: ClientConfig, found: Status | None) -> Iterator[tuple[str, str]]:
    now = datetime.now(UTC)
    if found is None:
        yield "daemon", "it has not run yet; start it with hanse-client run"
    else:
        yield "daemon", f"{found.state}, for {_ago(now - found.since)}"
        yield "", found.note
        yield "league", f"{settings.policy.league}, server {found.server}"
        if found.plan:
            yield "training", f"plan {found.plan[:16]}, round {found.round} of {found.rounds}"
        if found.preparing:
            yield "photos", f"being prepared: {found.preparing[0]} of {found.preparing[1]}"
        elif found.photos is not None:
            yield "photos", f"{found.photos} ready to train on, {found.problems} can't be used"
        if settings.network.monthly_megabytes is not None:
            yield "network", f"{found.megabytes:g} of {settings.network.monthly_megabytes} MB this month"
        recognizer = _recognizer(settings)
        if recognizer:
            yield "recognizer", recognizer
        if found.waiting_plans:
            yield "plans", f"{found.waiting_plans} wait for your word: hanse-client plans"
    spent = _spent(settings)
    budget = settings.policy.epsilon
    yield (
        "privacy",
        (
            "the ledger can't be read: hanse-client ledger"
            if spent is None
            else f"ε = {spent:.3f} of the {budget:g} you allow is spent"
        ),
    )


def _recognizer(settings: ClientConfig) -> str:
    """Return which recognizer is in use, and which one waits; nothing before the first."""
    releases = Releases.of(settings)
    try:
        found, waiting = releases.in_use(), releases.waiting()
    except HanseError as error:
        return str(error)
    said = []
    if settings.recognizer is not None:
        said.append(f"the one in {settings.recognizer} (recognizer)")
    elif found is not None:
        said.append(f"the league's version {found.version}, its release {found.number}")
    if waiting is not None:
        said.append(f"version {waiting.version} is not taken yet: hanse-client update")
    return "; ".join(said)


def _ago(length: timedelta) -> str:
    seconds = max(0, round(length.total_seconds()))
    for name, size in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size} {name}"
    return f"{seconds} seconds"
