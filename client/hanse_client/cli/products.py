"""The shop's products, among which photos are looked up: `products`, with a command for each thing to do."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from pydantic import BaseModel, ValidationError

from hanse_client.cli.options import DEFAULT_CONFIG, ConfigOption, counted, photos, say, with_options
from hanse_client.config import ClientConfig
from hanse_client.gallery.faults import in_words
from hanse_client.gallery.gallery import Gallery
from hanse_client.gallery.prices import read_price
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

DIGITS = 8
"""By so many digits of its SHA-256 a photo is named."""

TOLD = 20
"""So many problems of an import are told."""

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
    """Return the fields that were given; one that was given as "" is to be empty, so an attribute."""
    given = {"price": price, "currency": currency, "category": category}
    fields: dict[str, Any] = {name: text or None for name, text in given.items() if text is not None}
    if title is not None:
        fields["title"] = title
    if price:
        fields["price"] = _decimal("--price", price)
    if attribute:
        fields["attributes"] = _pairs(attribute)
    return fields


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
    product = _valid(Product, **_changed({"sku": sku}, fields))
    with _shelf(config, photo) as (gallery, put), gallery.changing:
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

    An empty value takes away what was there: --price "" the price, -a size= the attribute size. hanse-client products
    remove --photo takes away a photo.

    Exit codes: 0 changed, 21 to 23 a photo can't be used, 30 there is no such product, or a value is wrong.
    """
    with _shelf(config, photo) as (gallery, put), gallery.changing:
        product = _valid(Product, **_changed(dict(_known(gallery, sku)), fields))
        put(product)
        there = gallery.photos_of(sku)
    _tell(product, f"Changed {product.sku}; it has {photos(len(there))}.", there, as_json)


@app.command()
def remove(
    skus: Annotated[list[str], typer.Argument(help="The products.", metavar="SKU...")],
    photo: Annotated[
        list[str] | None,
        typer.Option(
            "--photo",
            "-p",
            help="Remove this photo of the product alone, as often as you like: the first digits of its SHA-256, as "
            "show and check print them.",
            metavar="DIGITS",
        ),
    ] = None,
    config: ConfigOption = DEFAULT_CONFIG,
    as_json: Json = False,
) -> None:
    """Remove products with their photos, for good, and the photos that you said show them.

    With --photo the product stays, and only these photos of it go.

    Exit codes: 0 all removed, 30 one of them is not there (other products are removed all the same).
    """
    settings = load(ClientConfig, config)
    if photo:
        if len(skus) != 1:
            raise GalleryError(f"--photo: found {len(skus)} products, expected the one that has the photo.")
        _remove_photos(settings, skus[0], photo, as_json)
        return
    with (
        Gallery.open(settings.gallery_path) as gallery,
        Corrections(settings.corrections_path) as corrections,
    ):
        removed = {}
        for sku in dict.fromkeys(composed(sku, MAX_SKU) for sku in skus):
            with gallery.changing:
                # The product goes last: a removal that did not end can be asked for once more.
                corrections.forget(sku)
                removed[sku] = gallery.remove(sku)
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
    named = f": {', '.join(map(short, digests))}" if digests else ""
    _tell(product, f"{described(product)}; {photos(len(digests))}{named}", digests, as_json)


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

    What `import-products` writes is such a file, too. Rows that can't be used are told, and the others taken in. An
    empty field leaves what a product has. A file may be imported again: what is there already is passed over.

    Exit codes: 0 all taken in, 30 the file can't be used, or a row or photo was left out, 130 you stopped it.
    """
    try:
        with opened(config) as recognition, err.status("importing") as status:
            done = recognition.import_products(
                source, lambda read, total: status.update(f"importing: {100 * read // max(1, total)} %")
            )
    except KeyboardInterrupt:
        err.print("What was taken in by now stays. Call the command again, and it goes on from there.")
        raise
    problems = [{"line": problem.line, "reason": problem.reason} for problem in done.problems]
    if as_json:
        facts = {
            "rows": done.rows,
            "products": done.products,
            "photos": done.photos,
            "left_out": done.problem_count,
            "rows_left_out": done.rows_left_out,
            "photos_left_out": done.photos_left_out,
        }
        typer.echo(json.dumps(facts | {"problems": problems}))
    elif done.products:
        say(f"Took in {counted(done.products, 'product')} with {photos(done.photos)}.")
    elif done.rows:
        say(
            "Nothing new: your products are as the file has them."
            if not done.problem_count
            else "Nothing new."
        )
    else:
        say("The file has no row below the names of its columns.")
    if done.problem_count:
        told = "\n".join(problem.reason for problem in done.problems[:TOLD])
        left = counted(done.rows_left_out, "row"), photos(done.photos_left_out)
        which = " and ".join(text for text in left if not text.startswith("0 "))
        first = f", the first {TOLD} are" if done.problem_count > TOLD else ""
        raise GalleryError(f"{source}: left out {which}{first}:\n{told}")


def short(digest: bytes) -> str:
    """Return the digits by which a photo is named."""
    return digest.hex()[:DIGITS]


def _changed(before: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a product with `fields` in place of those `before`; attributes are added, empty ones go."""
    given = fields.get("attributes", {})
    attributes = before.get("attributes", {}) | given
    kept = {name: value for name, value in attributes.items() if value or name not in given}
    return before | fields | {"attributes": kept}


def _remove_photos(settings: ClientConfig, sku: str, named: Sequence[str], as_json: bool) -> None:
    """Remove the photos of the product `sku` whose SHA-256 begin as `named`; none, if there isn't one for each."""
    with Gallery.open(settings.gallery_path) as gallery:
        product = _known(gallery, sku)
        there = gallery.photos_of(sku)
        chosen = dict.fromkeys(_named(product, there, digits) for digits in named)
        for digest in chosen:
            gallery.remove_photo(sku, digest)
        left = gallery.photos_of(sku)
    _tell(
        product, f"Removed {photos(len(chosen))} of {product.sku}; it has {photos(len(left))}.", left, as_json
    )


def _named(product: Product, there: Sequence[bytes], digits: str) -> bytes:
    """Return which of the photos that are `there` begins with `digits`."""
    if len(digits) < DIGITS:
        raise GalleryError(
            f"--photo: found {digits!r}, expected the first {DIGITS} digits of a SHA-256 or more."
        )
    found = [digest for digest in there if digest.hex().startswith(digits.lower())]
    if len(found) != 1:
        raise GalleryError(
            f"Product {product.sku!r}: found {len(found)} photos that begin with {digits[:64]!r}, expected one; "
            f"hanse-client products show {product.sku} lists them."
        )
    return found[0]


def described(product: Product) -> str:
    """Return a product in one line."""
    price = "" if product.price is None else f"{product.price:f} {product.currency or ''}".strip()
    more = ", ".join(f"{name} {value}" for name, value in product.attributes.items())
    return "  ".join(part for part in (product.sku, product.title, price, product.category, more) if part)


@contextmanager
def opened(config: Path) -> "Iterator[Recognition]":
    """Yield the recognizer and gallery of the shop."""
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
    with opened(config) as recognition:
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
        return None if text is None else read_price(text)
    except ValueError as error:
        raise GalleryError(f"{option}: {error}. Correct it and call the command again.") from None


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
        said = in_words(error.errors(include_url=False))
        raise GalleryError(f"{said}. Correct it and call the command again.") from None
