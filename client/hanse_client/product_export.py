"""A shop system's product export and a folder of its photos become a catalog's CSV file.

    done = import_products(Path("products_export.csv"), Path("photos"), Path("catalog.csv"))
    print(done.photos, done.missing, done.categories)

Two formats are read, told apart by their column names:

- **Shopify** [1]: a row for each variant and each further photo, held together by `Handle` (`URL handle` in newer
  exports); title and category stand in the first row. Photos are in `Image Src` (`Product image URL`) and `Variant
  Image` (`Variant image URL`). The category is `Type`, else `Product Category`, else the first of `Tags`.
- **WooCommerce** [2]: a row for each product and variation. `Images` and `Categories` are lists, divided by commas,
  where a comma inside is written `\\,`; a category is a path, `Clothing > Shirts`, and the deepest is taken. A
  variation names its product in `Parent`, by SKU or as `id:44`. Column names are in the language of the user who
  exports; English is expected here.

**Nothing is downloaded.** A photo's address is matched by its file's name alone: percent-decoded, without `?v=…`, in
any case and Unicode form, and, where that finds nothing, without the size that WordPress (`-1024x768`, `-scaled`) or
Shopify (`_1024x1024`, `_medium`) adds, at either end. Of several files with the name, the one that shares most of the
address's folders is taken, and none when two share as many: a wrong photo is worse than a missing one. Names are looked
up among the files that the folder has, links left out, so no address leads out of it.

All photos of one product get the product's sku, since privacy by product counts by it.

[1] help.shopify.com/en/manual/products/import-export/using-csv
[2] github.com/woocommerce/woocommerce/wiki/Product-CSV-Importer-&-Exporter, and the exporter's source,
    includes/export/abstract-wc-csv-exporter.php and class-wc-product-csv-exporter.php
"""

import csv
import io
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

from hanse_common.errors import CatalogError, ConfigError
from hanse_common.files import write_atomically

MAX_ROWS = 1_000_000
"""Bound of the rows of an export, and of the files in the folder of photos."""

MAX_BYTES = 1 << 28
"""Bound of an export, in bytes."""

MAX_LINE = 1 << 20
"""Bound of a line, in bytes: descriptions are long. A field may have 131 072 characters, Python's own bound."""

MAX_PHOTOS = 1_000_000
"""Bound of the addresses of photos in an export."""

MAX_TEXT = 500
"""Bound of a sku and a category, in characters; a title is cut there. A catalog's own bound is higher."""

MAX_NAMESAKES = 1000
"""Bound of the files of one name among which an address's folders choose."""

_SHOWN = 200
"""Characters of an address in a line for the merchant."""

_SIZE = re.compile(
    r"(?:[-_]\d{1,5}x\d{1,5}|_(?:\d{1,5}x|x\d{1,5})|-scaled|_(?:pico|icon|thumb|small|compact|medium|large|grande))"
    r"(?:_crop_(?:top|center|bottom|left|right))?(?:@[23]x)?$"
)
_COLUMNS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "Shopify": (("handle", "url handle"), ("image src", "product image url")),
    "WooCommerce": (("sku",), ("name",), ("categories",), ("images",)),
}


_File = tuple[Path, tuple[str, ...]]
"""A file, and the folded names of the folders it lies in."""

_Row = tuple[str, dict[str, str]]
"""Where a row stands, for errors, and its fields by lower-case column name."""


@dataclass(slots=True)
class Product:
    """One product: what all its photos share as `sku`, its category, and the addresses of its photos."""

    sku: str
    title: str = ""
    category: str = ""
    addresses: dict[str, None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Imported:
    """What was written: `photos` of `products`, by category; and what was not, in lines for the merchant's eyes."""

    system: str
    photos: int
    products: int
    categories: Mapping[str, int]
    missing: tuple[str, ...]
    ambiguous: tuple[str, ...]
    shared: tuple[str, ...]
    without_photo: tuple[str, ...]
    without_category: tuple[str, ...]


def import_products(export: Path, images: Path, to: Path) -> Imported:
    """Write the catalog of `export`, with photos in the folder `images`, to the new file `to`, mode 0600.

    Raises `CatalogError` when the export cannot be read, or no photo is found; `ConfigError` when `to` exists, or lies
    neither in `images` nor in a folder above it, where a catalog's paths may not lead.
    """
    folder = _folder_of_photos(images)
    base = Path(os.path.realpath(to.parent))
    if not folder.is_relative_to(base):
        raise ConfigError(
            f"{to}: expected in {images} or in a folder above it, as the list's paths may not lead out of its folder."
        )
    if to.exists() or to.is_symlink():
        raise ConfigError(f"{to}: there is a file already. Move it away, or name another with --out.")
    system, products = read_export(export)
    local = LocalPhotos(folder)
    rows: list[tuple[str, str, str, str]] = []
    taken: dict[Path, str] = {}
    missing: list[str] = []
    ambiguous: list[str] = []
    shared: list[str] = []
    for product in products:
        for address in product.addresses if product.category else ():
            line = f"{product.sku}: {address[:_SHOWN]}"
            found = local.find(address)
            if len(found) != 1:
                (ambiguous if found else missing).append(line)
            elif (path := found[0]) not in taken:
                taken[path] = product.sku
                rows.append((path.relative_to(base).as_posix(), product.category, product.sku, product.title))
            elif taken[path] != product.sku:
                shared.append(f"{line}, listed for {taken[path]}")
    if not rows:
        raise CatalogError(
            f"{export}: found none of its photos in {images}. Expected files named as the photos' addresses end; the "
            f"first is {_first_address(products)}."
        )
    _write(to, rows)
    return Imported(
        system,
        len(rows),
        len({sku for _, _, sku, _ in rows}),
        dict(sorted(Counter(category for _, category, _, _ in rows).items())),
        tuple(missing),
        tuple(ambiguous),
        tuple(shared),
        tuple(product.sku for product in products if not product.addresses),
        tuple(product.sku for product in products if not product.category),
    )


def read_export(path: Path) -> tuple[str, list[Product]]:
    """Return which shop system wrote the export at `path`, and its products in order. Raises `CatalogError`."""
    try:
        opened = path.open("rb")
    except OSError as error:
        raise CatalogError(
            f"{path}: cannot be read ({error.strerror}), expected a product export. Check the path."
        ) from None
    with opened as file:
        reader = csv.reader(_lines(path, file), strict=True)
        try:
            columns = [name.strip().casefold() for name in next(reader, [])]
            system = _system(path, columns)
            rows = _rows(path, columns, ((reader.line_num, row) for row in reader if row))
            products = _shopify(rows) if system == "Shopify" else _woocommerce(rows)
        except csv.Error as error:
            raise CatalogError(f"{path}:{reader.line_num}: not CSV ({error}). Export it again.") from None
    return system, products


class LocalPhotos:
    """The files in and below `folder`, found by the name that an address ends with.

    Links, hidden files and names that no CSV file can hold are left out. Raises `CatalogError` when the folder cannot
    be listed or has more than `MAX_ROWS` files.
    """

    def __init__(self, folder: Path) -> None:
        self._named: dict[str, list[_File]] = {}
        self._resized: dict[str, list[_File]] = {}
        for path in _files(folder):
            *folders, name = (_folded(part) for part in path.relative_to(folder).parts)
            self._named.setdefault(name, []).append((path, tuple(folders)))
            if (original := _without_size(name)) != name:
                self._resized.setdefault(original, []).append((path, tuple(folders)))

    def find(self, address: str) -> list[Path]:
        """Return the files that the photo at `address` may be: the one, none, or several that fit equally well."""
        *folders, name = _address_parts(address) or ("",)
        candidates = (
            self._named.get(name) or self._named.get(_without_size(name)) or self._resized.get(name) or []
        )
        if len(candidates) == 1 or len(candidates) > MAX_NAMESAKES:
            return [path for path, _ in candidates]
        shared = [_shared_end(theirs, folders) for _, theirs in candidates]
        best = max(shared, default=0)
        return [path for (path, _), count in zip(candidates, shared, strict=True) if count == best]


def _folder_of_photos(images: Path) -> Path:
    folder = Path(os.path.realpath(images))
    if not folder.is_dir():
        raise CatalogError(f"{images}: found no folder, expected the folder of the photos. Check the path.")
    return folder


def _files(folder: Path) -> Iterator[Path]:
    def fail(error: OSError) -> None:
        raise CatalogError(f"{error.filename}: cannot be listed ({error.strerror}). Check its permissions.")

    count = 0
    for parent, folders, names in os.walk(folder, onerror=fail):
        folders[:] = sorted(filter(_can_be_listed, folders))
        for name in sorted(filter(_can_be_listed, names)):
            path = Path(parent, name)
            if path.is_symlink() or not path.is_file():
                continue
            count += 1
            if count > MAX_ROWS:
                raise CatalogError(f"{folder}: found more than {MAX_ROWS} files, expected at most that.")
            yield path


def _can_be_listed(name: str) -> bool:
    """Return whether `name` is not hidden, is UTF-8, and has no spaces around it, which a catalog would cut off."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return name == name.strip() and not name.startswith(".")


def _address_parts(address: str) -> tuple[str, ...]:
    """Return the folded names in the path of `address`, () for one that names no file."""
    try:
        path = urlsplit(address.strip()).path
    except ValueError:
        return ()
    parts = tuple(_folded(unquote(part)) for part in PurePosixPath(path).parts if part != "/")
    if not parts or parts[-1] in (".", "..") or any(sign in parts[-1] for sign in "/\\\0"):
        return ()
    return parts


def _shared_end(one: Sequence[str], other: Sequence[str]) -> int:
    count = 0
    for a, b in zip(reversed(one), reversed(other), strict=False):
        if a != b:
            break
        count += 1
    return count


def _without_size(name: str) -> str:
    stem, dot, suffix = name.rpartition(".")
    shorter = _SIZE.sub("", stem)
    return f"{shorter}{dot}{suffix}" if shorter else name


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _system(path: Path, columns: list[str]) -> str:
    for system, needed in _COLUMNS.items():
        if all(any(name in columns for name in names) for names in needed):
            twice = [name for names in needed for name in names if columns.count(name) > 1]
            if twice:
                raise CatalogError(f"{path}:1: found the column {twice[0]!r} twice, expected it once.")
            return system
    raise CatalogError(
        f"{path}:1: found the columns {', '.join(columns)[:99]!r}, expected a product export of Shopify (Handle, "
        "Title, Image Src, ...) or WooCommerce (SKU, Name, Categories, Images, ...). Export it with English column "
        "names, with commas."
    )


def _rows(path: Path, columns: list[str], rows: Iterable[tuple[int, list[str]]]) -> Iterator[_Row]:
    for count, (line, row) in enumerate(rows):
        place = f"{path}:{line}"
        if count >= MAX_ROWS:
            raise CatalogError(f"{place}: more than {MAX_ROWS} rows. Export fewer products at a time.")
        if len(row) != len(columns):
            raise CatalogError(
                f"{place}: found {len(row)} fields, expected {len(columns)}. Export it again, without a spreadsheet "
                "program between."
            )
        yield place, {name: text.strip() for name, text in zip(columns, row, strict=True)}


def _shopify(rows: Iterable[_Row]) -> list[Product]:
    products = _Products()
    for place, row in rows:
        handle = row.get("handle") or row.get("url handle") or ""
        if not handle:
            raise CatalogError(f"{place}: the handle is empty, expected the product's. Export it again.")
        tags = row.get("tags", "").partition(",")[0]
        category = row.get("type") or row.get("product category") or row.get("product type") or tags
        product = products.add(place, handle, row.get("title", ""), category)
        for column in ("image src", "product image url", "variant image", "variant image url"):
            products.add_photo(place, product, row.get(column, ""))
    return products.all()


def _woocommerce(rows: Iterable[_Row]) -> list[Product]:
    products = _Products()
    skus: dict[str, str] = {}
    variations: list[tuple[str, str, list[str]]] = []
    for place, row in rows:
        sku, number, parent = (row.get(column, "") for column in ("sku", "id", "parent"))
        addresses = _divided(row["images"])
        if parent and "variation" in row.get("type", ""):
            variations.append((place, parent, addresses))
            continue
        own = sku or (f"id:{number}" if number else "")
        if not own:
            raise CatalogError(
                f"{place}: ID and SKU are empty, expected one of them. Export it again with both."
            )
        skus[f"id:{number}"] = own
        categories = [
            " > ".join(part.strip() for part in path.split(">")) for path in _divided(row["categories"])
        ]
        deepest = max(categories, key=lambda path: path.count(">"), default="")
        product = products.add(place, own, row["name"], deepest)
        for address in addresses:
            products.add_photo(place, product, address)
    for place, parent, addresses in variations:
        product = products.add(place, skus.get(parent, parent), "", "")
        for address in addresses:
            products.add_photo(place, product, address)
    return products.all()


class _Products:
    """The products met so far, each under its sku; first come, first kept for title and category."""

    def __init__(self) -> None:
        self._products: dict[str, Product] = {}
        self._addresses = 0

    def add(self, place: str, sku: str, title: str, category: str) -> Product:
        sku, title, category = (" ".join(text.split()) for text in (sku, title, category))
        for name, text in (("sku or handle", sku), ("category", category)):
            if len(text) > MAX_TEXT or "\0" in text:
                raise CatalogError(
                    f"{place}: found a {name} of {len(text)} characters, expected at most {MAX_TEXT}, without NUL."
                )
        product = self._products.setdefault(sku, Product(sku))
        product.title = product.title or title[:MAX_TEXT].replace("\0", "")
        product.category = product.category or category
        return product

    def add_photo(self, place: str, product: Product, address: str) -> None:
        if not address or address in product.addresses:
            return
        self._addresses += 1
        if self._addresses > MAX_PHOTOS:
            raise CatalogError(f"{place}: more than {MAX_PHOTOS} photos. Export fewer products at a time.")
        product.addresses[address] = None

    def all(self) -> list[Product]:
        return list(self._products.values())


def _divided(text: str) -> list[str]:
    """Return the entries of WooCommerce's list `text`: divided by commas, of which one inside is written `\\,`."""
    entries = (entry.replace("\\,", ",").strip() for entry in re.split(r"(?<!\\),", text))
    return [entry for entry in entries if entry]


def _first_address(products: Iterable[Product]) -> str:
    first = next((address for product in products for address in product.addresses), "")
    return repr(first[:MAX_TEXT]) if first else "missing, as no product has one"


def _write(to: Path, rows: Iterable[tuple[str, str, str, str]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(("path", "label", "sku", "title"))
    writer.writerows(rows)
    try:
        write_atomically(to, text.getvalue().encode())
    except OSError as error:
        raise ConfigError(f"{to}: cannot be written ({error.strerror}). Name another with --out.") from None
    except UnicodeEncodeError:
        raise ConfigError(f"{to}: the folder of photos has a name that is not UTF-8. Rename it.") from None


def _lines(path: Path, file: BinaryIO) -> Iterator[str]:
    number, size = 0, 0
    while line := file.readline(MAX_LINE + 1):
        number += 1
        size += len(line)
        if size > MAX_BYTES:
            raise CatalogError(f"{path}: more than {MAX_BYTES} bytes. Export fewer products at a time.")
        if len(line) > MAX_LINE:
            raise CatalogError(
                f"{path}:{number}: longer than {MAX_LINE} bytes, expected a line of a CSV file."
            )
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise CatalogError(f"{path}:{number}: not UTF-8. Export it again as CSV UTF-8.") from None
