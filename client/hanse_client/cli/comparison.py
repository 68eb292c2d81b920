"""The reason to stay: `compare`."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from hanse_client import templates
from hanse_client.cli.options import DEFAULT_CONFIG, ConfigOption, photos, say
from hanse_client.config import ClientConfig
from hanse_client.releases import recognizer_folder
from hanse_common.commands import out
from hanse_common.config import load
from hanse_common.errors import ConfigError
from hanse_common.vision.photo import shown
from hanse_common.web.pages import Language, Pages, require_new, save

if TYPE_CHECKING:
    from hanse_client.compare import Comparison


def compare(
    recognizer: Annotated[
        Path | None,
        typer.Option(
            "--recognizer",
            "-r",
            help="Folder of the league's recognizer, if not your configuration's.",
            metavar="FOLDER",
        ),
    ] = None,
    config: ConfigOption = DEFAULT_CONFIG,
    html: Annotated[
        Path | None,
        typer.Option(help="Also write a report with pictures to this new file.", metavar="FILE"),
    ] = None,
    language: Annotated[Language, typer.Option(help="The report's language.")] = "en",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Compare the league's recognizer with one trained on your photos alone, on the photos that you hold out.

    The one trained alone is a generous opponent: it learns here, without the noise that protects your photos in the
    league. It stays on this machine and is forgotten, so nothing is sent and nothing is charged.

    Exit codes: 0 compared, 14 no photo is held out or left to train on.
    """
    from hanse_client.compare import compare as judged
    from hanse_client.shop import Shop
    from hanse_common.vision.recognizer import Recognizer

    if html is not None:
        require_new(html)
    settings = load(ClientConfig, config)
    folder = recognizer or recognizer_folder(settings)
    if folder is None:
        raise ConfigError(
            f"{config}: recognizer: missing, and the league has released none yet; name its folder there, or with "
            "--recognizer."
        )
    league = Recognizer.load(folder, backbone_weights=settings.backbone_weights)
    with out.status("looking at photos and training alone"):
        found = judged(Shop(settings), league)
    if html is not None:
        page = Pages(templates.FOLDER, language).render(
            "comparison.html",
            c=found,
            chance=_percent(found.p_value),
            digest=league.digest().hex(),
            date=f"{datetime.now(UTC):%Y-%m-%d}",
        )
        save(html, page)
    if as_json:
        typer.echo(json.dumps(found.to_json(), allow_nan=False))
        return
    _print(found)
    if html is not None:
        say(f"\nWrote {shown(html)}. It tells of your catalog, so keep it to yourself.")


def _print(found: "Comparison") -> None:
    say(_verdict(found))
    say(
        f"Only the league's gets {photos(found.only_league)} right, only the one trained alone "
        f"{photos(found.only_alone)}. Were both equally good, chance alone would make such a difference with a "
        f"probability of {_percent(found.p_value)}.\n"
    )
    total = Table("", "right", f"of {found.photos}", "95 % interval", box=None, pad_edge=False)
    for column in total.columns[1:]:
        column.justify = "right"
    for name, score in (("league", found.league), ("trained alone", found.alone)):
        interval = f"{100 * score.low:.1f} to {100 * score.high:.1f} %"
        total.add_row(name, str(score.right), f"{100 * score.accuracy:.1f} %", interval)
    out.print(total)
    out.print()
    table = Table("class", "to train on", "held out", "league", "alone", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for index in found.shown:
        figures = [score.report.per_class[index] for score in (found.league, found.alone)]
        shares = [f"{100 * (each.recall or 0.0):.0f} %" for each in figures]
        name, trained = escape(found.taxonomy.classes[index]), str(found.trained[index])
        table.add_row(name, trained, str(figures[0].support), *shares)
    averages = [f"{100 * score.report.macro_recall:.0f} %" for score in (found.league, found.alone)]
    table.add_row("average of the classes", "", "", *averages, style="bold")
    out.print(table)
    if found.unknown:
        say(
            "\nYou have no photo to train on of these classes, so trained alone nothing can be known of them: "
            f"{', '.join(found.unknown)}."
        )
    say(
        f"\nThe one trained alone learned from {photos(sum(found.trained))} without the noise that protects them in "
        "the league: a generous opponent. It stayed on this machine, so nothing was charged."
    )
    for problem in found.problems:
        say(f"Left out: {problem}")


def _verdict(found: "Comparison") -> str:
    if found.verdict == "too few":
        return "The two differ on too few held-out photos to tell which is better."
    if found.verdict == "even":
        return "Your held-out photos do not show that one is better than the other."
    better = "league's recognizer" if found.verdict == "league" else "one trained alone"
    return f"The {better} gets {found.more} more of 100 of your held-out photos right."


def _percent(chance: float) -> str:
    """Return a probability in percent, with two digits."""
    share = 100 * chance
    return "< 0.01 %" if share < 0.01 else f"{share:.0f} %" if share >= 10 else f"{share:.2g} %"
