"""A CSV file of products and their photos into the gallery, row by row.

    def embed(images):    # for each embedding that serves or is being filled, unit rows (len(images), d)
        seen = engine.see([engine.prepare(image) for image in images])
        return {engine.embedding: np.stack([one.embedding for one in seen])}

    done = import_products(gallery, Path("products.csv"), embed)
    print(done.products, done.photos, done.problems)

Fields are divided by commas, or by semicolons if there are more of these in the first line, which names the columns, in
any order and case: `sku`, which must be there, `title`, `price`, `currency`,
`category`, and `photo`, as often as there are photos (`photo`, `photo2`, …; or several in one field with `|` between).
Every other column is an attribute. A product may have several rows, and may be in the gallery already: each row adds
its photos, and its fields hold where they are not empty. An empty field, and a column that is missing, leave what was
known before; no row takes a field away. A price has a point or a comma before its decimals
(`hanse_client.gallery.prices`). The catalog file that `hanse-client import-products` writes (`path`, `label`, `sku`,
`title`) is read as well, and files with the columns of Google's Vision Product Search [1]: `image-uri`, `product-id`,
`product-category`, `product-display-name`, `labels` as `key=value,key=value`; its other columns say nothing here.

Paths count from the file's own folder and may not lead out of it. Nothing in the file is trusted: rows, fields and
photos are bounded, and a row that cannot be used becomes a `Problem`, which does not stop the rest.

*It can go on where it stopped.* What is stored is durable after each batch; a photo that the product has already, by
the digest of its stored form, is not embedded again.

[1] cloud.google.com/vision/product-search/docs/csv-format
"""

import csv
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError

from hanse_client.gallery.bounds import MAX_VIEWS
from hanse_client.gallery.faults import in_words
from hanse_client.gallery.gallery import Gallery
from hanse_client.gallery.prices import read_price
from hanse_client.gallery.product import Product
from hanse_client.gallery.spelling import composed
from hanse_common.errors import GalleryError, PhotoError
from hanse_common.vision import photo
from hanse_common.vision.photo import PhotoLimits

MAX_ROWS: Final = 1_000_000
"""Bound of the rows of a file."""

MAX_FIELD: Final = 4096
"""Bound of one field, in characters; a line may have 16 times as many bytes."""

MAX_COLUMNS: Final = 256
"""Bound of the columns of a file."""

MAX_PROBLEMS: Final = 1000
"""Problems that are told in full; the rest are only counted."""

BATCH: Final = 32
"""Photos that are embedded at once."""

Embed = Callable[[Sequence[Image.Image]], Mapping[bytes, NDArray[np.float32]]]
"""Makes of n images unit rows (n, d), by the name of their embedding, 32 bytes."""

_SAME = {
    "product-id": "sku",
    "id": "sku",
    "product-display-name": "title",
    "name": "title",
    "product-category": "category",
    "label": "category",
}
_PHOTO = re.compile(r"^(photo|image|path|image-uri)[ _-]?\d{0,3}$")
_SAYS_NOTHING = {"image-id", "product-set-id", "bounding-poly"}
_FIELDS = ("sku", "title", "price", "currency", "category")
# Places where a line may break or may not, and the mark that says in which order a file's bytes are.
_UNSEEN = dict.fromkeys(map(ord, "\u00ad\u200b\u2060\ufeff"))


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong in a line of the file, in words for the merchant."""

    line: int
    reason: str


@dataclass(slots=True)
class Imported:
    """What an import did: rows read, products added or changed, photos added, and rows and photos left out.

    `problems` has the first `MAX_PROBLEMS` of what was left out.
    """

    rows: int = 0
    products: int = 0
    photos: int = 0
    rows_left_out: int = 0
    photos_left_out: int = 0
    problems: list[Problem] = field(default_factory=list)

    @property
    def problem_count(self) -> int:
        """How many problems there were, those that are not told included."""
        return self.rows_left_out + self.photos_left_out

    def leave_out_row(self, line: int, reason: str) -> None:
        """Note that a row could not be used."""
        self.rows_left_out += 1
        self._tell(line, reason)

    def leave_out_photo(self, line: int, reason: str) -> None:
        """Note that a photo could not be used; the rest of its row was."""
        self.photos_left_out += 1
        self._tell(line, reason)

    def _tell(self, line: int, reason: str) -> None:
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(Problem(line, reason))


@dataclass(frozen=True, slots=True)
class _Columns:
    """The fields of one row: those that a product has, its attributes, and the paths of its photos."""

    fields: dict[str, str]
    attributes: dict[str, str]
    photos: list[str]


@dataclass(frozen=True, slots=True)
class _Row:
    """A row that can be used: what it says, and its photos as stored, each once."""

    line: int
    sku: str
    columns: _Columns
    photos: tuple[bytes, ...]


def import_products(
    gallery: Gallery,
    source: Path,
    embed: Embed,
    *,
    limits: PhotoLimits = photo.LIMITS,
    progress: Callable[[int, int], None] | None = None,
) -> Imported:
    """Put the products of the CSV file `source` into the gallery; `progress` gets bytes read and bytes in all.

    Raises `GalleryError` when the file cannot be read, has no column `sku`, is not UTF-8, or the gallery cannot be
    written; what was stored by then stays. What `embed` raises comes through.
    """
    done = Imported()
    waiting: list[_Row] = []
    taken: set[str] = set()
    for row, product in _rows(gallery, source, limits, done, progress):
        # What is there already is passed over, but not what a row that waits changes.
        if (
            _new(gallery, row)
            or gallery.get(row.sku) != product
            or any(one.sku == row.sku for one in waiting)
        ):
            waiting.append(row)
        if sum(len(one.photos) for one in waiting) >= BATCH or len(waiting) >= BATCH:
            taken |= _put(gallery, source, waiting, embed, done)
            waiting = []
    taken |= _put(gallery, source, waiting, embed, done)
    done.products = len(taken)
    done.problems.sort(key=lambda problem: problem.line)
    return done


def _put(gallery: Gallery, source: Path, waiting: list[_Row], embed: Embed, done: Imported) -> set[str]:
    """Embed the photos of `waiting` at once, as stored, store each row, and return the SKUs of what was stored."""
    taken: set[str] = set()
    seen = _Seen(embed, [jpeg for row in waiting for jpeg in _new(gallery, row)])
    for row in waiting:
        with gallery.changing:
            if _put_row(gallery, source, row, seen, done):
                taken.add(row.sku)
    return taken


def _put_row(gallery: Gallery, source: Path, row: _Row, seen: "_Seen", done: Imported) -> bool:
    """Store one row in what the product is by now, and return whether it could be."""
    try:
        product = _product(row.columns, gallery.get(row.sku))
    except ValueError as error:
        done.leave_out_row(row.line, f"{source}:{row.line}: {error}")
        return False
    new = _new(gallery, row)
    has = len(gallery.photos_of(row.sku))
    if has + len(new) > MAX_VIEWS:
        done.leave_out_row(
            row.line,
            f"{source}:{row.line}: product {row.sku!r} would have {has} + {len(new)} photos, expected at most "
            f"{MAX_VIEWS}. Name those that show something new.",
        )
        return False
    gallery.put(product, new, seen.vectors(new) if new else None)
    done.photos += len(new)
    return True


class _Seen:
    """What photos look like, each of which is embedded once."""

    def __init__(self, embed: Embed, photos: Iterable[bytes]) -> None:
        self._embed = embed
        self._places = {jpeg: place for place, jpeg in enumerate(dict.fromkeys(photos))}
        self._vectors = self._embedded(list(self._places))

    def vectors(self, photos: list[bytes]) -> Mapping[bytes, NDArray[np.float32]]:
        """Return unit rows (len(photos), d) for each embedding. A photo that its product had until now comes late."""
        if any(jpeg not in self._places for jpeg in photos):
            return self._embedded(photos)
        chosen = [self._places[jpeg] for jpeg in photos]
        return {name: matrix[chosen] for name, matrix in self._vectors.items()}

    def _embedded(self, photos: list[bytes]) -> Mapping[bytes, NDArray[np.float32]]:
        return self._embed([photo.decode(jpeg) for jpeg in photos]) if photos else {}


def _new(gallery: Gallery, row: _Row) -> list[bytes]:
    """Return the photos of the row that its product has not."""
    stored = set(gallery.photos_of(row.sku))
    return [jpeg for jpeg in row.photos if photo.content_digest(jpeg) not in stored]


def _rows(
    gallery: Gallery,
    source: Path,
    limits: PhotoLimits,
    done: Imported,
    progress: Callable[[int, int], None] | None,
) -> Iterator[tuple[_Row, Product]]:
    """Yield the rows that can be used, each with what it would make of the product as it is now."""
    folder = Path(os.path.realpath(source.parent))
    for line, columns in _records(source, done, progress):
        done.rows += 1
        try:
            product = _product(columns, gallery.get(columns.fields.get("sku", "")))
        except ValueError as error:
            done.leave_out_row(line, f"{source}:{line}: {error}")
            continue
        photos = []
        for name in columns.photos:
            try:
                photos.append(_prepared(folder, name, limits))
            except ValueError as error:
                left = f"{source}:{line}: {error} Product {product.sku!r} was taken in without this photo."
                done.leave_out_photo(line, left)
        yield _Row(line, product.sku, columns, tuple(dict.fromkeys(photos))), product


def _records(
    source: Path, done: Imported, progress: Callable[[int, int], None] | None
) -> Iterator[tuple[int, _Columns]]:
    try:
        opened = source.open("rb")
        size = source.stat().st_size
    except OSError as error:
        raise GalleryError(f"{source}: cannot be read ({error.strerror}), expected a CSV file.") from None
    with opened as file:
        lines = _lines(source, file)
        first = next(lines, "")
        # Spreadsheets write semicolons where the comma is in numbers.
        between = ";" if first.count(";") > first.count(",") else ","
        reader = csv.reader(chain([first], lines), delimiter=between)
        names = _names(source, next(reader, []))
        count = 0
        while True:
            try:
                row = next(reader)
            except StopIteration:
                break
            except csv.Error as error:
                done.leave_out_row(
                    reader.line_num,
                    f"{source}:{reader.line_num}: not CSV ({error}). Mind quotes, and what stands between fields.",
                )
                continue
            if not any(row):
                continue
            count += 1
            if count > MAX_ROWS:
                raise GalleryError(f"{source}:{reader.line_num}: more than {MAX_ROWS} rows. Split the file.")
            try:
                yield reader.line_num, _columns(names, row)
            except ValueError as error:
                done.leave_out_row(reader.line_num, f"{source}:{reader.line_num}: {error}")
            if progress is not None:
                progress(min(file.tell(), size), size)


def _names(source: Path, header: list[str]) -> list[str]:
    names = [composed(name.strip(), MAX_FIELD) for name in header]
    names = [_SAME.get(name.casefold(), name) for name in names]
    names = [name.casefold() if name.casefold() in (*_FIELDS, "labels") else name for name in names]
    if len(names) > MAX_COLUMNS:
        raise GalleryError(f"{source}:1: found {len(names)} columns, expected at most {MAX_COLUMNS}.")
    for name in _FIELDS:
        if names.count(name) > 1 or (name == "sku" and name not in names):
            raise GalleryError(
                f"{source}:1: found the columns {', '.join(names)[:99]!r}, expected {name!r} once. Name the columns "
                "sku, title, price, currency, category, photo; others are attributes."
            )
    return names


def _columns(names: list[str], row: list[str]) -> _Columns:
    if len(row) != len(names):
        raise ValueError(
            f"found {len(row)} fields, expected {len(names)}. Mind quotes, and what stands between fields."
        )
    if (longest := max(map(len, row))) > MAX_FIELD:
        raise ValueError(f"found a field of {longest} characters, expected at most {MAX_FIELD}.")
    found = _Columns({}, {}, [])
    for name, field_ in zip(names, row, strict=True):
        # Shop systems write line breaks, tabs, spaces that do not break, and what is not seen, into titles.
        text = composed(" ".join(field_.translate(_UNSEEN).split()), MAX_FIELD)
        if not text:
            continue
        if name in _FIELDS:
            found.fields[name] = text
        elif _PHOTO.match(name.casefold()):
            found.photos.extend(path.strip() for path in field_.split("|") if path.strip())
        elif name == "labels":
            for label in text.split(","):
                key, equals, value = label.partition("=")
                if not equals:
                    raise ValueError(f"labels: found {label[:40]!r}, expected key=value,key=value.")
                found.attributes[key.strip()] = value.strip()
        elif name.casefold() not in _SAYS_NOTHING:
            found.attributes[name] = text
    if len(found.photos) > MAX_VIEWS:
        raise ValueError(f"found {len(found.photos)} photos, expected at most {MAX_VIEWS}.")
    return found


def _product(columns: _Columns, before: Product | None) -> Product:
    """Return the product of a row: what it says, and for the rest what it was `before`. Raises `ValueError`."""
    given: dict[str, object] = dict(columns.fields)
    if "sku" not in given:
        raise ValueError("sku is empty, expected a value. Fill it in or delete the row.")
    if "price" in given:
        try:
            given["price"] = read_price(columns.fields["price"])
        except ValueError as error:
            raise ValueError(f"price: {error}.") from None
    if "currency" in given:
        given["currency"] = columns.fields["currency"].upper()
    if before is not None:
        given = {name: getattr(before, name) for name in _FIELDS} | given
    given["attributes"] = (before.attributes if before else {}) | columns.attributes
    try:
        return Product.model_validate(given)
    except ValidationError as error:
        raise ValueError(f"{in_words(error.errors(include_url=False))}.") from None


def _prepared(folder: Path, name: str, limits: PhotoLimits) -> bytes:
    """Return the stored form of the photo called `name` in the folder.

    Raises ValueError, which calls it by `name`, when it leads out or is no photo.
    """
    if "\0" in name:
        raise ValueError("photo: found a NUL character, expected a path.")
    path = Path(os.path.realpath(folder / name))
    if not path.is_relative_to(folder):
        raise ValueError(f"photo {name!r} leads out of the file's folder, expected one inside.")
    try:
        return Gallery.prepare(photo.decode(path, limits))
    except PhotoError as error:
        reason = str(error).removeprefix(photo.shown(path))
        raise ValueError(f"{photo.shown(Path(name))}{reason}") from None


def _lines(source: Path, file: BinaryIO) -> Iterator[str]:
    number, bound = 0, 16 * MAX_FIELD
    while line := file.readline(bound + 1):
        number += 1
        if len(line) > bound:
            raise GalleryError(f"{source}:{number}: longer than {bound} bytes, expected a row of a CSV file.")
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise GalleryError(f"{source}:{number}: not UTF-8. Save the file as CSV UTF-8.") from None
