"""The recognizer at work: `classify`, `search`, `similar`, `inventory`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from hanse_client.applications.inventory import WHOLE, Grid, photos_in, take_inventory
from hanse_client.applications.similar import similar_products
from hanse_client.cli.options import DEFAULT_CONFIG, ConfigOption, photos, say, with_options
from hanse_client.cli.products import Json, conditions, described
from hanse_client.config import ClientConfig
from hanse_client.gallery.product import Filter
from hanse_client.recognition.answers import ranked
from hanse_client.releases import recognizer_folder
from hanse_common import commands
from hanse_common.config import load
from hanse_common.errors import CatalogError, ConfigError, GalleryError, PhotoError
from hanse_common.vision.photo import decode, shown

if TYPE_CHECKING:  # torch takes seconds to load
    from hanse_client.recognition.answers import Found
    from hanse_client.recognition.engine import Engine, Seen
    from hanse_client.recognition.service import Recognition

Results = Annotated[
    int, typer.Option("-k", help="How many products to show.", min=1, max=100, metavar="NUMBER")
]


def classify(
    photos: Annotated[list[Path], typer.Argument(help="Photos to classify.", metavar="PHOTO...")],
    recognizer: Annotated[
        Path | None,
        typer.Option(
            "--recognizer",
            "-r",
            help="Folder of the recognizer, if not your configuration's.",
            metavar="FOLDER",
        ),
    ] = None,
    config: ConfigOption = DEFAULT_CONFIG,
    top: Annotated[int, typer.Option(help="How many classes to show.", min=1, metavar="NUMBER")] = 3,
    one_product: Annotated[
        bool, typer.Option("--one-product", help="The photos show one product: give one answer for all.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object for each photo.")] = False,
) -> None:
    """Say what is on each photo, and how sure the recognizer is.

    A second line has your own labels, if `personalize` found that they do better. A photo that can't be used is named,
    and the others are classified all the same. Several photos of one product, such as its sides, tell more together.

    Exit codes: 0 all classified, 21 no such file, 22 not a photo or damaged, 23 too large (of the first such).
    """
    from hanse_client.recognition.engine import Engine

    if recognizer is not None:
        engine = Engine.load(recognizer)
    else:
        settings = load(ClientConfig, config)
        folder = recognizer_folder(settings)
        if folder is None:
            raise ConfigError(
                f"{config}: recognizer: missing, and the league has released none yet; name its folder there, or with "
                "--recognizer."
            )
        weights, personal = settings.backbone_weights, settings.personal_path
        engine = Engine.load(folder, backbone_weights=weights, personal=personal)
    failed: PhotoError | None = None
    together: dict[Path, Seen] = {}
    for path in photos:
        try:
            image = decode(path)
        except PhotoError as error:
            commands.complain(error)
            failed = failed or error
            continue
        (together[path],) = engine.see([engine.prepare(image)])
        if not one_product:
            _tell_classes(engine, together, top, as_json)
            together.clear()
    if together:
        _tell_classes(engine, together, top, as_json)
    if failed is not None:
        raise typer.Exit(failed.exit_code)


def _tell_classes(engine: "Engine", together: "Mapping[Path, Seen]", top: int, as_json: bool) -> None:
    """Print what the photos show, if there are several, as views of one product."""
    from hanse_common.vision.fusion import fused

    paths, seen = list(together), list(together.values())
    classes = fused(np.stack([one.probabilities for one in seen]))
    personal = [one.personal for one in seen if one.personal is not None]
    facts = {"probabilities": ranked(engine.classes, classes, len(classes))}
    if personal:
        facts["personal"] = ranked(engine.personal_labels, fused(np.stack(personal)), len(personal[0]))
    if as_json:
        named: dict[str, Any] = (
            {"photo": str(paths[0])} if len(paths) == 1 else {"photos": list(map(str, paths))}
        )
        told = {
            name: {guess.label: guess.probability for guess in guesses} for name, guesses in facts.items()
        }
        typer.echo(json.dumps(named | told))
        return
    for guesses in facts.values():
        listed = ", ".join(f"{guess.label} {100 * guess.probability:.1f} %" for guess in guesses[:top])
        say(f"{', '.join(map(shown, paths))}: {listed}")


@with_options("where", conditions)
def search(
    paths: Annotated[
        list[Path] | None, typer.Argument(help="Photos to look up.", metavar="[PHOTO]...")
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="What the title says; alone, or beside photos.", metavar="TEXT")
    ] = None,
    k: Results = 5,
    where: Filter | None = None,
    config: ConfigOption = DEFAULT_CONFIG,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object for each photo.")] = False,
) -> None:
    """Find the products of yours that look most like a photo, or whose titles are most like a text, or both.

    Exit codes: 0 all looked up, 21 to 23 a photo can't be used (the first such), 30 the gallery can't be used.
    """
    from hanse_client.recognition.service import Recognition

    if not paths and text is None:
        raise GalleryError("search: found neither a photo nor --text, expected one of them.")
    failed: PhotoError | None = None
    with Recognition.open(load(ClientConfig, config)) as recognition:
        if not paths:
            answer = recognition.search(text=text, where=where, k=k)
            _tell("", answer, as_json, _why_nothing(recognition, where, by_photo=False))
        for path in paths or ():
            try:
                image = decode(path)
            except PhotoError as error:
                commands.complain(error)
                failed = failed or error
                continue
            answer = recognition.search(image, text=text, where=where, k=k)
            _tell(shown(path), answer, as_json, _why_nothing(recognition, where))
    if failed is not None:
        raise typer.Exit(failed.exit_code)


@with_options("where", conditions)
def similar(
    sku: Annotated[str, typer.Argument(help="The product.", metavar="SKU", show_default=False)],
    k: Results = 5,
    diversity: Annotated[
        float,
        typer.Option(
            help="From 0, the nearest ones, to 1, such as differ from one another.",
            min=0,
            max=1,
            metavar="SHARE",
        ),
    ] = 0.0,
    where: Filter | None = None,
    config: ConfigOption = DEFAULT_CONFIG,
    as_json: Json = False,
) -> None:
    """Find the products that look most like one of yours. Exit codes: 0, 30 there is no such product."""
    from hanse_client.recognition.service import Recognition

    with Recognition.open(load(ClientConfig, config)) as recognition:
        found = similar_products(recognition, sku, k=k, where=where, diversity=diversity)
        _tell("", found, as_json, _why_nothing(recognition, where))


def inventory(
    paths: Annotated[list[Path], typer.Argument(help="Photos, or folders of them.", metavar="PHOTO...")],
    grid: Annotated[
        str, typer.Option(help="How each photo is divided: one product in each cell.", metavar="ROWSxCOLUMNS")
    ] = "1x1",
    unknown: Annotated[
        Path | None,
        typer.Option(help="Folder for pictures of what is none of your products.", metavar="FOLDER"),
    ] = None,
    config: ConfigOption = DEFAULT_CONFIG,
    as_json: Json = False,
) -> None:
    """Count your products on photos of shelves; what is none of them is set aside for a person.

    Exit codes: 0 all looked at, 14 a photo could not be used (the others are counted).
    """
    from hanse_client.recognition.service import Recognition

    divided = WHOLE if grid == "1x1" else Grid.parse(grid)
    files = [photo for path in paths for photo in (photos_in(path) if path.is_dir() else (path,))]
    with Recognition.open(load(ClientConfig, config)) as recognition:
        found = take_inventory(recognition, files, divided, unknown_folder=unknown)
        empty = recognition.gallery.count_photos() == 0
    if as_json:
        typer.echo(found.model_dump_json())
    else:
        for line in found.counts:
            say(f"{line.count:6}  {line.sku}  {line.title}".rstrip())
        say(f"Looked at {photos(found.photos)}; unknown: {len(found.unknown)}.")
        for each in found.unknown if unknown is None else ():
            say(f"  {each.photo} {list(each.box)}")
        if empty:
            say(_EMPTY)
    if found.problems:
        raise CatalogError("\n".join(found.problems))


_EMPTY = "There is no product with a photo yet: hanse-client products add."


def _why_nothing(recognition: "Recognition", where: Filter | None, *, by_photo: bool = True) -> str:
    """Return what is to be said where no product is found."""
    if recognition.gallery.count() == 0:
        return "nothing. There is no product yet: hanse-client products add."
    if by_photo and recognition.gallery.count_photos() == 0:
        return f"nothing. {_EMPTY}"
    if where is not None:
        asked = "--category, --price-min, --price-max and --attribute"
        return f"nothing: none of your products fits {asked if by_photo else f'--text, {asked}'} together."
    return "nothing"


def _tell(name: str, found: "Found", as_json: bool, nothing: str) -> None:
    """Print what was found for the photo of that name; `nothing`, if nothing was."""
    from hanse_client.serving.answers import Listed

    if as_json:
        facts: dict[str, Any] = {"photo": name} if name else {}
        typer.echo(json.dumps(facts | Listed.of(found).model_dump(mode="json")))
        return
    unsure = "  (none of your products, as it seems)" if found.known is False else ""
    if name or unsure:
        say(f"{name or 'Found'}:{unsure}")
    for match in found.matches:
        say(f"  {match.score:6.3f}  {described(match.product)}")
    if not found.matches:
        say(f"  {nothing}")
