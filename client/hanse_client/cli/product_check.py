"""What to know of the photos of the shop's products: `products check`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from hanse_client.cli.options import DEFAULT_CONFIG, ConfigOption, counted, photos, say
from hanse_client.cli.products import Json, opened, short
from hanse_client.gallery.gallery import Gallery
from hanse_client.gallery.rejection import Rejection
from hanse_common.commands import err
from hanse_common.errors import GalleryError


def check(
    pictures: Annotated[
        Path | None,
        typer.Option(help="Folder for the pictures that are named; it must be new.", metavar="FOLDER"),
    ] = None,
    config: ConfigOption = DEFAULT_CONFIG,
    as_json: Json = False,
) -> None:
    """Look through your products' photos: the best one of each, those that look the same, those at the wrong product.

    Nothing is changed. Photos are named by the first digits of their SHA-256.

    Exit codes: 0, 30 the gallery or the folder can't be used.
    """
    from hanse_client.applications import display
    from hanse_client.serving.answers import ThresholdRates

    with opened(config) as recognition, err.status("looking at photos"):
        recognition.complete()
        skus = list(recognition.gallery.skus())
        best = {sku: photo for sku in skus if (photo := display.best_photo(recognition, sku)) is not None}
        alike = display.look_alike_photos(recognition.gallery)
        twins = display.twins(alike)
        misplaced = display.misplaced_photos(recognition)
        looked_at = recognition.gallery.count_photos()
        rejection = recognition.status().rejection
        if pictures is not None:
            named = {*best.values(), *(one.photo for group in alike for one in group)}
            _save(recognition.gallery, named | {one.placed.photo for one in misplaced}, pictures)
    if as_json:
        facts = {
            "best": {sku: photo.hex() for sku, photo in best.items()},
            "alike": [[{"sku": one.sku, "photo": one.photo.hex()} for one in group] for group in alike],
            "twins": twins,
            "misplaced": [
                {"sku": one.placed.sku, "photo": one.placed.photo.hex(), "instead": one.instead}
                for one in misplaced
            ],
            "threshold": rejection.threshold,
            "rates": ThresholdRates.of(rejection).model_dump(),
        }
        typer.echo(json.dumps(facts))
        return
    for one in misplaced:
        say(
            f"Perhaps at the wrong product: {short(one.placed.photo)} of {one.placed.sku} looks like {one.instead}."
        )
    for group in alike:
        owners: dict[str, list[str]] = {}
        for each in group:
            owners.setdefault(short(each.photo), []).append(each.sku)
        told = ", ".join(f"{name} of {' and '.join(skus)}" for name, skus in owners.items())
        say(f"These look the same: {told}." if len(owners) > 1 else f"This is at several products: {told}.")
    if twins:
        count = len({sku for skus in twins for sku in skus})
        told = "; ".join(" and ".join(skus) for skus in twins)
        say(f"{count} products look the same under several SKUs: {told}. No photo tells one from the other.")
    for sku, photo in best.items():
        say(f"{sku}: show {short(photo)} first.")
    if not best:
        say("There is no photo yet: hanse-client products add.")
        return
    say(
        f"Looked at {photos(looked_at)} of {counted(len(best), 'product')}: {len(misplaced)} perhaps at the wrong "
        f"product, {counted(len(alike), 'group')} that look the same."
    )
    if told := ", ".join(_rates(rejection)):
        say(f'"Not in the catalog", tried on your photos: {told}. search.false_reject sets what is allowed.')


def _rates(rejection: Rejection) -> Iterator[str]:
    """Yield in words how often "not in the catalog" is said wrongly, and wrongly not said."""
    if rejection.false_reject is not None:
        yield f"said of {100 * rejection.false_reject:.0f} % of {rejection.genuine} that show a product"
    if rejection.false_accept is not None:
        yield (
            f"not said of {100 * rejection.false_accept:.0f} % of {rejection.impostor}, each without its product"
        )


def _save(gallery: Gallery, digests: set[bytes], folder: Path) -> None:
    """Write the pictures into the new `folder`, for the owner's eyes."""
    try:
        folder.mkdir(mode=0o700)
        for digest in digests:
            data = gallery.photo(digest)
            if data is not None:  # removed meanwhile
                (folder / f"{short(digest)}.jpg").write_bytes(data)
    except OSError as error:
        raise GalleryError(f"{folder}: cannot be written ({error.strerror}); name a new folder.") from None
