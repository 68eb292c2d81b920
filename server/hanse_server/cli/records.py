"""What the server must not forget: `audit`, `backup`, `restore`, `migrate`."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from hanse_common.commands import out
from hanse_common.errors import ConfigError
from hanse_server.audit import Head, verify
from hanse_server.cli.options import DEFAULT_CONFIG, ConfigOption, require_new, say, settings_of
from hanse_server.config import ServerConfig, Service
from hanse_server.storage import State
from hanse_server.storage.backup import read_backup, write_backup
from hanse_server.storage.database import migrate as migrate_database
from hanse_server.storage.state import storage_url
from hanse_server.training import Training


def audit(
    config: ConfigOption = DEFAULT_CONFIG,
    check: Annotated[
        bool, typer.Option("--verify", help="Check that nothing in it was changed, moved or taken out.")
    ] = False,
    head: Annotated[
        str | None,
        typer.Option(help="A head that was noted down earlier, with --verify.", metavar="NUMBER WORDS"),
    ] = None,
    last: Annotated[int, typer.Option(help="Show so many entries.", min=1, max=1_000_000)] = 20,
) -> None:
    """Show the audit log: plans, runs, blocks, sums, releases. Note its head down to notice if it is written anew."""
    _, service = settings_of(config)
    with State.open(service.state, service.storage) as state:
        if check:
            count = verify(state.audit.entries(), None if head is None else Head.parse(head))
            say(f"All {count} entries are sound.")
        newest = state.audit.latest(1 if check else last)
    if not check:
        for entry in reversed(newest):
            at = datetime.fromtimestamp(entry.time, UTC)
            facts = ", ".join(f"{name} {_short(value)}" for name, value in json.loads(entry.facts).items())
            say(f"{entry.sequence:6}  {at:%Y-%m-%d %H:%M:%S}  {entry.kind:15} {facts}")
    if newest:
        say(f"Its head, to be noted down: {Head.of(newest[0])}")


def backup(
    file: Annotated[Path, typer.Argument(help="Where to write it, a new file.", metavar="FILE")],
    config: ConfigOption = DEFAULT_CONFIG,
) -> None:
    """Write all records and models into one file, while the server runs or not. It holds no key."""
    require_new(file)
    _, service = settings_of(config)
    with State.open(service.state, service.storage) as state, out.status("writing"):
        count = write_backup(state, file)
    say(
        f"Wrote {file}: {count} records. Keep it apart from this machine; restore it with hanse-server restore."
    )


def restore(
    file: Annotated[Path, typer.Argument(help="What hanse-server backup wrote.", metavar="FILE")],
    config: ConfigOption = DEFAULT_CONFIG,
    rounds: Annotated[
        int | None,
        typer.Option(
            help="How many rounds of the training were begun in all, those after the backup, too.", min=0
        ),
    ] = None,
    evaluations: Annotated[
        int | None, typer.Option(help="How many evaluations were begun in all.", min=0)
    ] = None,
) -> None:
    """Bring a backup back, into a state folder and a database that are empty: here, or under another storage.

    Merchants have paid for the rounds that were run after the backup, and decline to be asked for them again. Say with
    --rounds and --evaluations how many there were; a log, or any merchant, knows. What came of them is lost, and the
    training goes on after them.
    """
    settings, service = settings_of(config)
    with State.open(service.state, service.storage) as state, state.alone(), out.status("reading"):
        count = read_backup(state, file)
    say(f"Restored {count} records.")
    if rounds is not None or evaluations is not None:
        _leave_out(settings, service, rounds, evaluations)
    say("Go on with hanse-server resume.")


def _leave_out(settings: ServerConfig, service: Service, rounds: int | None, evaluations: int | None) -> None:
    training = Training.open(settings, service)
    with training.state:
        if rounds is not None:
            training.progress.leave_out(rounds)
            say(f"The training goes on after round {training.progress.rounds_done()}.")
        if evaluations is not None:
            if training.evaluation is None:
                raise ConfigError("service.evaluation: missing; expected the plan whose rounds are left out.")
            training.evaluation.leave_out(evaluations)
            say(f"{training.evaluation.rounds_released()} evaluations are used up.")


def migrate(
    config: ConfigOption = DEFAULT_CONFIG,
    to: Annotated[
        str, typer.Option(help="The schema's version; head is this release's.", metavar="VERSION")
    ] = "head",
) -> None:
    """Bring the database to this release's schema, or to another one, forwards or back. Make a backup first."""
    _, service = settings_of(config)
    before, after = migrate_database(storage_url(service.state, service.storage), to)
    say(f"Schema version {after or 'none'}; it was {before or 'none'}.")


def _short(value: object) -> str:
    text = str(value)
    return text[:16] if len(text) == 64 else text[:80]
