"""The shop's products, among which photos are looked up: `products`, with a command for each thing to do."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from pydantic import BaseModel, ValidationError

from hanse_client.cli.options import DEFAULT_CONFIG, ConfigOption, photos, say, with_options
from hanse_client.config import ClientConfig
from hanse_client.gallery.gallery import Gallery
from hanse_client.gallery.product import MAX_NAME, MAX_SKU, Filter, Product
from hanse_client.gallery.spelling import composed
from hanse_client.personal.corrections import Corrections
from hanse_common import commands
from hanse_common.commands import err
from hanse_common.config import load
from hanse_common.errors import GalleryError
from hanse_common.vision.photo import decode

if TYPE_CHECKING:  # torch takes seconds to load
    from hanse_client.recognition.service import Recognition

app = commands.new_app("Your products with their reference photos: a photo is looked up among them.")

M = TypeVar("M", bound=BaseModel)
Put = Callable[[Product], Sequence[bytes]]

Sku = Annotated[str, typer.Argument(help="Your number of the product.", metavar="SKU", show_default=False)]
Title = Annotated[str | None, typer.Option(help="Its title.", metavar="TEXT")]
Price = Annotated[str | None, typer.Option(help="Its price, such as 19.90.", metavar="DECIMAL")]
Currency = Annotated[str | None, typer.Option(help="The price's currency, such as EUR.", metavar="CODE")]
Category = Annotated[str | None, typer.Option(help="Its category.", metavar="TEXT")]
Attributes = Annotated[
    list[str] | None,
    typer.Option("--attribute", "-a", help="NAME=VALUE, as often as you like.", metavar="NAME=VALUE"),
]
Photos = Annotated[
    list[Path] | None,
    typer.Option("--photo", "-p", help="A photo of it, as often as you like.", metavar="FILE"),
]
CategoryIs = Annotated[str | None, typer.Option("--category", help="Of this category only.", metavar="TEXT")]
PriceMin = Annotated[str | None, typer.Option(help="At this price or above.", metavar="DECIMAL")]
PriceMax = Annotated[str | None, typer.Option(help="At this price or below.", metavar="DECIMAL")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def conditions(
    category: CategoryIs = None,
    price_min: PriceMin = None,
    price_max: PriceMax = None,
    attribute: Attributes = None,
) -> Filter | None:
    """Return the condition that these options say, None when there is none. Raises `GalleryError`."""
    where = _valid(
        Filter,
        category=category,
        price_min=_decimal("--price-min", price_min),
        price_max=_decimal("--price-max", price_max),
        attributes=_pairs(attribute),
    )
    return None if where == Filter() else where


def _fields(
    title: Title = None,
    price: Price = None,
    currency: Currency = None,
    category: Category = None,
    attribute: Attributes = None,
) -> dict[str, Any]:
    """Return the fields that were given."""
    fields = {
        "title": title,
        "price": _decimal("--price", price),
        "currency": currency,
        "category": category,
        "attributes": _pairs(attribute) or None,
    }
    return {name: value for name, value in fields.items() if value is not None}


@app.command()
@with_options("fields", _fields)
def add(
    sku: Sku,
    fields: dict[str, Any],
    photo: Photos = None,
    config: ConfigOption = DEFAULT_CONFIG,
    as_json: Json = False,
) -> None:
    """Add a product with its photos: from then on it is found. No training is needed.

    Without a photo it is found by its words alone, and no recognizer is needed.

    Exit codes: 0 added, 21 to 23 a photo can't be used, 30 there is such a product already, or a value is wrong.
    """
    product = _valid(Product, sku=sku, **fields)
    with _shelf(config, photo) as (gallery, put):
        if gallery.get(sku) is not None:
            raise GalleryError(
                f"Product {sku!r}: there is one already; change it with hanse-client products update."
            )
        added = put(product)
    _tell(product, f"Added {product.sku} with {photos(len(added))}.", added, as_json)


@app.command()
@with_options("fields", _fields)
def update(
    sku: Sku,
    fields: dict[str, Any],
    photo: Photos = None,
    config: ConfigOption = DEFAULT_CONFIG,
    as_json: Json = False,
) -> None:
    """Change what you name of a product, and add photos. The rest stays; attributes that you name are added.

    Exit codes: 0 changed, 21 to 23 a photo can't be used, 30 there is no such product, or a value is wrong.
    """
    with _shelf(config, photo) as (gallery, put):
        before = _known(gallery, sku)
        attributes = before.attributes | fields.pop("attributes", {})
        product = _valid(Product, **dict(before) | fields | {"attributes": attributes})
        put(product)
        there = gallery.photos_of(sku)
    _tell(product, f"Changed {product.sku}; it has {photos(len(there))}.", there, as_json)


@app.command()
def remove(
    skus: Annotated[list[str], typer.Argument(help="The products.", metavar="SKU...")],
    config: ConfigOption = DEFAULT_CONFIG,
    as_json: Json = False,
) -> None:
    """Remove products with their photos, for good, and the photos that you said show them.

    Exit codes: 0 all removed, 30 one of them is not there (the others are removed all the same).
    """
    settings = load(ClientConfig, config)
    with (
        Gallery.open(settings.gallery_path) as gallery,
        Corrections(settings.corrections_path) as corrections,
    ):
        removed = {sku: gallery.remove(sku) for sku in dict.fromkeys(composed(sku, MAX_SKU) for sku in skus)}
        for sku in removed:
            corrections.forget(sku)
    if as_json:
        typer.echo(json.dumps({"removed": removed}))
    else:
        for sku in (sku for sku, was in removed.items() if was):
            say(f"Removed {sku}.")
    missing = [sku for sku, was in removed.items() if not was]
    if missing:
        raise GalleryError(
            f"Found no product {', '.join(map(repr, missing))}; hanse-client products list shows all."
        )


@app.command()
def show(sku: Sku, config: ConfigOption = DEFAULT_CONFIG, as_json: Json = False) -> None:
    """Show a product. Exit codes: 0, 30 there is none."""
    with Gallery.open(load(ClientConfig, config).gallery_path) as gallery:
        product = _known(gallery, sku)
        digests = gallery.photos_of(sku)
    _tell(product, f"{described(product)}; {photos(len(digests))}", digests, as_json)


@app.command("list")
@with_options("where", conditions)
def list_products(
    where: Filter | None,
    config: ConfigOption = DEFAULT_CONFIG,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object for each product.")] = False,
) -> None:
    """List your products by SKU."""
    with Gallery.open(load(ClientConfig, config).gallery_path) as gallery:
        after, count = "", 0
        while found := gallery.products(where, after, 500):
            for product in found:
                typer.echo(product.model_dump_json()) if as_json else say(described(product))
            after, count = found[-1].sku, count + len(found)
    if not count and not as_json:
        say("There is no such product." if where else "There is no product yet: hanse-client products add.")


@app.command("import")
def import_csv(
    source: Annotated[Path, typer.Argument(help="The CSV file.", metavar="FILE")],
    config: ConfigOption = DEFAULT_CONFIG,
    as_json: Json = False,
) -> None:
    """Take in many products from a CSV file: sku, title, price, currency, category, photo; more columns are attributes.

    What `import-products` writes is such a file, too. Rows that can't be used are told, and the others taken in.

    Exit codes: 0 all taken in, 30 the file can't be used, or a row could not be taken in.
    """
    with _recognition(config) as recognition, err.status("importing") as status:
        done = recognition.import_products(
            source, lambda read, total: status.update(f"importing: {100 * read // max(1, total)} %")
        )
    problems = [{"line": problem.line, "reason": problem.reason} for problem in done.problems]
    if as_json:
        facts = {"products": done.products, "photos": done.photos, "left_out": done.problem_count}
        typer.echo(json.dumps(facts | {"problems": problems}))
    else:
        products = "1 product" if done.products == 1 else f"{done.products} products"
        say(f"Took in {products} with {photos(done.photos)}.")
    if done.problem_count:
        told = "\n".join(problem.reason for problem in done.problems[:20])
        raise GalleryError(f"{source}: {done.problem_count} rows or photos were left out:\n{told}")


@app.command()
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

    with _recognition(config) as recognition, err.status("looking at photos"):
        recognition.complete()
        skus = list(recognition.gallery.skus())
        best = {sku: photo for sku in skus if (photo := display.best_photo(recognition, sku)) is not None}
        alike = display.look_alike_photos(recognition.gallery)
        twins = display.twins(alike)
        misplaced = display.misplaced_photos(recognition)
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
        }
        typer.echo(json.dumps(facts))
        return
    for one in misplaced:
        say(
            f"Perhaps at the wrong product: {_short(one.placed.photo)} of {one.placed.sku} looks like {one.instead}."
        )
    for group in alike:
        say("These look the same: " + ", ".join(f"{_short(one.photo)} of {one.sku}" for one in group) + ".")
    if twins:
        count = len({sku for skus in twins for sku in skus})
        told = "; ".join(" and ".join(skus) for skus in twins)
        say(f"{count} products look the same under several SKUs: {told}. No photo tells one from the other.")
    for sku, photo in best.items():
        say(f"{sku}: show {_short(photo)} first.")
    if not best:
        say("There is no photo yet: hanse-client products add.")


def _short(digest: bytes) -> str:
    return digest.hex()[:8]


def _save(gallery: Gallery, digests: set[bytes], folder: Path) -> None:
    """Write the pictures into the new `folder`, for the owner's eyes."""
    try:
        folder.mkdir(mode=0o700)
        for digest in digests:
            data = gallery.photo(digest)
            if data is not None:  # removed meanwhile
                (folder / f"{_short(digest)}.jpg").write_bytes(data)
    except OSError as error:
        raise GalleryError(f"{folder}: cannot be written ({error.strerror}); name a new folder.") from None


def described(product: Product) -> str:
    """Return a product in one line."""
    price = "" if product.price is None else f"{product.price:f} {product.currency or ''}".strip()
    more = ", ".join(f"{name} {value}" for name, value in product.attributes.items())
    return "  ".join(part for part in (product.sku, product.title, price, product.category, more) if part)


@contextmanager
def _recognition(config: Path) -> "Iterator[Recognition]":
    from hanse_client.recognition.service import Recognition

    with Recognition.open(load(ClientConfig, config)) as recognition:
        yield recognition


@contextmanager
def _shelf(config: Path, photos: Sequence[Path] | None) -> Iterator[tuple[Gallery, Put]]:
    """Yield the gallery, and what puts a product with the `photos` there: a recognizer, where there are any."""
    if not photos:
        with Gallery.open(load(ClientConfig, config).gallery_path) as gallery:
            yield gallery, gallery.put
        return
    images = [decode(path) for path in photos]
    with _recognition(config) as recognition:
        yield recognition.gallery, lambda product: recognition.put(product, images)


def _known(gallery: Gallery, sku: str) -> Product:
    product = gallery.get(sku)
    if product is None:
        raise GalleryError(f"Found no product {sku!r}; hanse-client products list shows all.")
    return product


def _tell(product: Product, text: str, digests: Sequence[bytes], as_json: bool) -> None:
    if as_json:
        named = [digest.hex() for digest in digests]
        typer.echo(json.dumps(product.model_dump(mode="json") | {"photos": named}))
    else:
        say(text)


def _decimal(option: str, text: str | None) -> Decimal | None:
    try:
        return None if text is None else Decimal(text)
    except InvalidOperation:
        raise GalleryError(
            f"{option}: found {text!r:.40}, expected a decimal number, such as 19.90."
        ) from None


def _pairs(texts: list[str] | None) -> dict[str, str]:
    pairs = [text.partition("=") for text in texts or ()]
    for name, sign, _ in pairs:
        if not (name and sign):
            raise GalleryError(f"--attribute: found {name[:40]!r}, expected NAME=VALUE.")
    return {composed(name, MAX_NAME): value for name, _, value in pairs}


def _valid(model: type[M], **fields: Any) -> M:
    try:
        return model(**fields)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_input=False)
        said = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in faults)
        raise GalleryError(f"{said}. Correct it and call the command again.") from None
