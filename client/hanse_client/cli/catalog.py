"""Looking through the photos, `catalog`, and listing those of another shop system, `import-products`."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import typer
from rich.markup import escape
from rich.table import Table

from hanse_client import product_export
from hanse_client.cli.options import DEFAULT_CONFIG, ConfigOption, photos, say
from hanse_client.config import ClientConfig
from hanse_common.commands import err, out
from hanse_common.config import load
from hanse_common.vision.photo import shown

if TYPE_CHECKING:  # torch takes seconds to load, and --help should not
    from hanse_client.catalog_check import Findings, Group

T = TypeVar("T")


def catalog(
    config: ConfigOption = DEFAULT_CONFIG,
    problems: Annotated[
        int, typer.Option(help="How many entries of each list to show.", min=0, metavar="NUMBER")
    ] = 20,
    html: Annotated[
        Path | None,
        typer.Option(help="Also write a contact sheet, one page with small pictures.", metavar="FILE"),
    ] = None,
    language: Annotated[Literal["en", "zh"], typer.Option(help="Language of the contact sheet.")] = "en",
    as_json: Annotated[bool, typer.Option("--json", help="Print all of it as one JSON object.")] = False,
) -> None:
    """Look through your photos: how many of each class, which labels have no class, which files are unusable.

    Also shows duplicates, photos that look the same, and labels that your recognizer doubts. Nothing is sent, nothing
    is spent, and nothing is changed.
    """
    from hanse_client.catalog_check import check
    from hanse_client.contact_sheet import contact_sheet, write
    from hanse_client.shop import Shop

    settings = load(ClientConfig, config)
    shop = Shop(settings)
    with err.status("reading photos") as status:

        def tell(what: str, done: int, total: int) -> None:
            status.update(f"{what}: {done} of {total}")

        loaded = shop.catalog(lambda done, total: tell("reading photos", done, total))
        found = check(shop, loaded, tell)
        if html is not None:
            status.update("making the contact sheet")
            folder = settings.photos if settings.photos.is_dir() else settings.photos.parent
            write(html, contact_sheet(found, folder, language))
    if as_json:
        typer.echo(json.dumps(found.summary()))
        return
    _print_classes(found)
    say("\n".join(_balance(found, settings.recognizer)))
    if loaded.unmapped:
        where = settings.labels or f"a file that {config} names under labels"
        say(f"\nThese labels have no class of the league, so their photos are not used. Map them in {where}:")
        for label, count in loaded.unmapped.items():
            say(f"  {label!r}: {photos(count)}")
    if found.problems:
        say(f"\n{photos(len(found.problems))} can't be used:")
        _list(found.problems, problems, lambda each: each.reason)
    for line in _duplicates(found, problems):
        say(line)
    if found.doubts and found.doubts.suspects:
        names = settings.league.taxonomy.classes
        say("\nThe recognizer takes these photos for another class. Look at them: it may be wrong, too.")
        _list(
            found.doubts.suspects,
            problems,
            lambda each: (
                f"{shown(each.record.path)}: filed as {names[each.record.label]} ({100 * each.given:.0f} %), "
                f"looks like {each.instead} ({100 * each.likelier:.0f} %)"
            ),
        )
    if html is not None:
        say(f"\nWrote {shown(html)}. It shows your photos, so keep it to yourself.")


def _print_classes(found: "Findings") -> None:
    table = Table("class", "to train on", "held out", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for each in found.classes:
        table.add_row(escape(each.name), str(each.train), str(each.holdout))
    table.add_row("all", str(len(found.catalog.train)), str(len(found.catalog.holdout)), style="bold")
    out.print(table)


def _balance(found: "Findings", recognizer: Path | None) -> Iterator[str]:
    """Yield what is to be said right below the table."""
    from hanse_client.catalog_check import FEW

    if found.empty:
        yield f"No photos of: {', '.join(each.name for each in found.empty)}."
    if found.few:
        named = ", ".join(f"{each.name} ({each.total})" for each in found.few)
        yield f"Few photos, under {FEW}, of: {named}."
    if found.uneven:
        large, small = found.uneven
        yield (
            f"Uneven: {large.name} has {large.total // small.total} times the photos of {small.name}. "
            "A recognizer leans to what it sees most."
        )
    yield (
        f"Duplicates: {len(found.copies) or 'none'}. Groups that look the same: {len(found.alike) or 'none'}. "
        f"{_doubts(found, recognizer)}"
    )


def _doubts(found: "Findings", recognizer: Path | None) -> str:
    if found.doubts is None:
        missing = "there is none yet" if recognizer is None else f"there is none in {shown(recognizer)} yet"
        return f"Suspect labels: not looked for, as that takes a recognizer, and {missing}."
    share = f"{100 * found.doubts.agreement:.0f} %"
    if not found.doubts.can_judge:
        return f"Suspect labels: not looked for, as the recognizer agrees with only {share} of your labels."
    return f"Suspect labels: {len(found.doubts.suspects) or 'none'} (the recognizer agrees with {share})."


def _duplicates(found: "Findings", bound: int) -> Iterator[str]:
    def lines(groups: Sequence["Group"]) -> Iterator[str]:
        for group in groups[:bound]:
            notes = [
                note
                for holds, note in (
                    (group.across_classes, "in different classes"),
                    (group.across_border, "both to train on and held out"),
                )
                if holds
            ]
            names = ", ".join(shown(record.path) for record in group.records[:5])
            rest = f" and {len(group.records) - 5} others" if len(group.records) > 5 else ""
            yield f"  {names}{rest}" + (f"  ({'; '.join(notes)})" if notes else "")
        if len(groups) > bound:
            yield f"  ... and {len(groups) - bound} more (--problems NUMBER lists more)"

    def worst_first(groups: Iterable["Group"]) -> list["Group"]:
        return sorted(groups, key=lambda group: (not group.across_classes, not group.across_border))

    if found.copies:
        yield "\nThe very same file, more than once:"
        yield from lines(worst_first(found.copies))
    if found.alike:
        yield "\nDifferent files that look the same:"
        yield from lines(worst_first(found.alike))
    if found.copies or found.alike:
        yield (
            "They are shown and nothing is merged: what happens to a photo may depend on that photo alone, "
            "or its privacy would not be counted right."
        )


def _list(entries: Sequence[T], bound: int, line: Callable[[T], str]) -> None:
    for entry in entries[:bound]:
        say(f"  {line(entry)}")
    if len(entries) > bound:
        say(f"  ... and {len(entries) - bound} more (--problems NUMBER lists more)")


def import_products(
    export: Annotated[Path, typer.Argument(help="The products' CSV file.", metavar="EXPORT")],
    images: Annotated[Path, typer.Option(help="The folder with the products' photos.", metavar="FOLDER")],
    to: Annotated[Path, typer.Option("--out", help="The list to write.", metavar="FILE")] = Path(
        "catalog.csv"
    ),
    problems: Annotated[
        int, typer.Option(help="How many entries of each list to show.", min=0, metavar="NUMBER")
    ] = 20,
) -> None:
    """Make a list of photos from a product export of Shopify or WooCommerce, with photos that lie on this machine.

    Each photo's address in EXPORT is matched to a file in FOLDER by its name; nothing is downloaded. All photos of a
    product get the same sku, by which privacy per product counts. An older FILE is never overwritten.

    Exit codes: 0 written, 10 FILE exists or lies in the wrong place, 14 EXPORT can't be read or no photo was found.
    """
    with err.status("looking for the photos"):
        done = product_export.import_products(export, images, to)
    products = "1 product" if done.products == 1 else f"{done.products} products"
    say(f"Wrote {shown(to)}: {photos(done.photos)} of {products}, from a {done.system} export.")
    say("\nCategories, to be mapped to the league's classes in your label file:")
    _list(list(done.categories.items()), problems, lambda each: f"{each[0]!r}: {photos(each[1])}")
    for title, entries in (
        ("Photos that are not in the folder", done.missing),
        ("Photos with several files of that name, none of them taken", done.ambiguous),
        ("Photos that several products have, listed for the first", done.shared),
        ("Products without a photo", done.without_photo),
        ("Products without a category, left out", done.without_category),
    ):
        if entries:
            say(f"\n{title}: {len(entries)}")
            _list(entries, problems, lambda each: each if each.isprintable() else repr(each))
    say(f"\nName {shown(to)} under photos in your configuration, then run hanse-client catalog.")
