"""Looking through the photos: `hanse-client catalog`."""

from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from hanse_client.cli.options import DEFAULT_CONFIG, ConfigOption, photos, say
from hanse_client.config import ClientConfig
from hanse_common.commands import out
from hanse_common.config import load


def catalog(
    config: ConfigOption = DEFAULT_CONFIG,
    problems: Annotated[
        int, typer.Option(help="How many unusable photos to list.", min=0, metavar="NUMBER")
    ] = 20,
) -> None:
    """Look through your photos: how many of each class, which labels have no class, which files are unusable.

    Nothing is sent and nothing is spent.
    """
    from hanse_client.shop import Shop  # torch takes seconds to load, and --help should not

    settings = load(ClientConfig, config)
    with out.status("reading photos"):
        found = Shop(settings).catalog()
    table = Table("class", "to train on", "held out", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for index, name in enumerate(settings.league.taxonomy.classes):
        counts = [sum(r.label == index for r in side) for side in (found.train, found.holdout)]
        table.add_row(escape(name), *(str(count) for count in counts))
    table.add_row("all", str(len(found.train)), str(len(found.holdout)), style="bold")
    out.print(table)
    if found.unmapped:
        where = settings.labels or f"a file that {config} names under labels"
        say(f"\nThese labels have no class of the league, so their photos are not used. Map them in {where}:")
        for label, count in found.unmapped.items():
            say(f"  {label!r}: {photos(count)}")
    if found.problems:
        say(f"\n{photos(len(found.problems))} can't be used:")
        for problem in found.problems[:problems]:
            say(f"  {problem.reason}")
        if len(found.problems) > problems:
            say(f"  ... and {len(found.problems) - problems} more (--problems NUMBER lists more)")
