"""The league's recognizers: `versions`, `publish`, `rollback`, `export`."""

from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from hanse_common import signing, wire
from hanse_common.commands import out
from hanse_common.errors import ConfigError, ReleaseRefused
from hanse_common.federated_report import FederatedReport
from hanse_common.files import PUBLIC, write_atomically
from hanse_server.cli.options import DEFAULT_CONFIG, ConfigOption, say, settings_of
from hanse_server.publication import judge, sign_release
from hanse_server.storage import State, Version

VersionArgument = Annotated[
    str,
    typer.Argument(help="Its number, the start of its digest, 'latest' or 'released'.", metavar="VERSION"),
]

RELEASE_FILE = "release.hanse"


def versions(config: ConfigOption = DEFAULT_CONFIG) -> None:
    """List the league's recognizers, the newest first, with what became of each."""
    _, service = settings_of(config)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("version", "state", "made", "plan", "after", "accuracy", "digest"):
        table.add_column(name, no_wrap=True)
    with State.open(service.state, service.storage) as state:
        known = state.versions.all()
        numbers = {one.digest: str(one.number) for one in known}
        for one in reversed(known):
            report = _report(state, one)
            found = None if report is None else report.accuracy
            accuracy = "" if found is None else f"{100 * found.value:.1f} %"
            table.add_row(
                str(one.number),
                one.state,
                f"{datetime.fromtimestamp(one.made):%Y-%m-%d %H:%M}",
                one.plan[:8],
                numbers.get(one.parent or "", one.parent[:8] if one.parent else ""),
                accuracy,
                one.digest[:12],
            )
    if known:
        out.print(table)
    else:
        say("None yet: a training ends with one.")


def finish(config: ConfigOption = DEFAULT_CONFIG) -> None:
    """End the plan's training where it is: what its finished rounds came to becomes a candidate.

    For a training that cannot go on, because merchants are missing or its rounds are used up. They have paid for all of
    it; without this they would have nothing of it. It can't be undone: the plan is not trained any further.
    """
    from hanse_server.league import published_so_far
    from hanse_server.training import Training  # torch takes seconds to load

    settings, service = settings_of(config)
    training = Training.open(settings, service)
    with training.state, training.state.alone():
        model = published_so_far(training.progress, settings.optimization.tail_average)
        done, rounds = training.progress.rounds_done(), training.plan.training.rounds
        if model is None or training.plan.training.mode in ("mean", "trends"):
            raise ConfigError(
                f"{service.state}: no round of this plan is done that a recognizer could be made of."
            )
        version = training.publish(model, {})
        training.state.audit.append("finished", plan=training.plan.digest.hex(), rounds_done=done)
    say(
        f"Version {version.number}, a candidate, is what {done} of {rounds} rounds came to. It has no figures; to "
        f"release it all the same: hanse-server publish {version.number} --without-figures"
    )


def publish(
    version: VersionArgument = "latest",
    config: ConfigOption = DEFAULT_CONFIG,
    reason: Annotated[str, typer.Option(help="Why, for the merchants.", metavar="TEXT")] = "",
    without_figures: Annotated[
        bool, typer.Option("--without-figures", help="Release it whatever its figures are, or without any.")
    ] = False,
) -> None:
    """Release a recognizer to the league, once its figures pass, by your signature. Merchants fetch it by themselves.

    It needs the secret signing key, which is not on the server that merchants reach: run it where key and database are.
    """
    settings, service = settings_of(config)
    with State.open(service.state, service.storage) as state:
        chosen = state.versions.find(version)
        if chosen.state not in ("candidate", "superseded"):
            raise ReleaseRefused(
                f"version {chosen.number}: it is {chosen.state}; expected a candidate. See hanse-server versions."
            )
        current = next((one for one in state.versions.all() if one.state == "released"), None)
        if not without_figures:
            before = _report(state, current) if current else None
            tried = service.evaluation is not None
            for line in judge(settings.publication, _report(state, chosen), before, tried=tried):
                say(line)
        league, judged = settings.plan.league, not without_figures
        _release(
            settings.signing_key, service.state, state, chosen, league, reason, back=False, judged=judged
        )


def rollback(
    version: VersionArgument,
    config: ConfigOption = DEFAULT_CONFIG,
    reason: Annotated[str, typer.Option(help="Why, for the merchants.", metavar="TEXT")] = "",
) -> None:
    """Go back to an earlier recognizer: it is released again, and the present one is withdrawn for good."""
    settings, service = settings_of(config)
    with State.open(service.state, service.storage) as state:
        chosen = state.versions.find(version)
        if chosen.state != "superseded":
            raise ReleaseRefused(
                f"version {chosen.number}: it is {chosen.state}; expected one that was released before. See "
                "hanse-server versions."
            )
        _release(settings.signing_key, service.state, state, chosen, settings.plan.league, reason, back=True)


def export(
    folder: Annotated[Path, typer.Argument(help="A new folder for its files.", metavar="FOLDER")],
    version: VersionArgument = "released",
    config: ConfigOption = DEFAULT_CONFIG,
) -> None:
    """Write a recognizer's files to a new folder: for a look, for hanse-client classify, for another program."""
    _, service = settings_of(config)
    with State.open(service.state, service.storage) as state:
        chosen = state.versions.find(version)
        state.versions.export(chosen.digest, folder)
    say(f"Version {chosen.number} is in {folder}.")


def _release(
    key_file: Path,
    folder: Path,
    state: State,
    version: Version,
    league: str,
    reason: str,
    *,
    back: bool,
    judged: bool = True,
) -> None:
    signed, number = sign_release(version, state.versions, signing.load_key(key_file), league, reason)
    state.versions.release(version.digest, signed, number, reason, back=back, judged=judged)
    write_atomically(folder / RELEASE_FILE, wire.encode(signed), PUBLIC)
    say(
        f"Version {version.number} is released, as number {number} of the league's releases. Merchants fetch it."
    )


def _report(state: State, version: Version) -> FederatedReport | None:
    record = state.history.evaluation_of(bytes.fromhex(version.model))
    return None if record is None else FederatedReport.from_json(record.report)
