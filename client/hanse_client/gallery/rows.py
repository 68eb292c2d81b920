# ruff: noqa: S608 - what is put into statements is written here; values are bound
"""The gallery's statements: products, photos and vectors into rows and back. Each is called within a transaction.

    with store.write() as db:
        number = rows.put_product(db, Product(sku="A-17"))
        rows.put_photo(db, number, digest, jpeg)

Numbers are those of the rows; nobody outside the gallery sees them.
"""

import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from hanse_client.gallery.product import MAX_SKU, PRICE_PLACES, Filter, Product
from hanse_client.gallery.spelling import composed
from hanse_client.gallery.store import PAD, damaged
from hanse_common.errors import GalleryError

REMOVALS_KEPT: Final = 1 << 20
"""Removals that are remembered by number; whoever is further behind reads everything again."""

CHUNK: Final = 1 << 14
"""Vectors that are read at once."""

_SCALE = 10**PRICE_PLACES
_COLUMNS = f"product.id, sku, price, currency, substr(words, {PAD + 1})"
_NAMED = "(SELECT id FROM embedding WHERE name = ?)"
_EACH = "(SELECT value FROM json_each(?))"

Vectors = NDArray[np.float32]
Ids = NDArray[np.int64]


def put_product(db: sqlite3.Connection, product: Product) -> int:
    """Insert or update `product` and return its number."""
    (revision,) = db.execute("UPDATE terms SET revision = revision + 1 RETURNING revision").fetchone()
    price = None if product.price is None else _stored(product.price)
    words = (product.title, product.category, product.attributes)
    (number,) = db.execute(
        """INSERT INTO product (sku, revision, price, currency, words) VALUES (?, ?, ?, ?, ?)
        ON CONFLICT (sku) DO UPDATE SET revision = excluded.revision, price = excluded.price,
        currency = excluded.currency, words = excluded.words RETURNING id""",
        (product.sku, revision, price, product.currency, padded(json.dumps(words).encode())),
    ).fetchone()
    db.execute("DELETE FROM tag WHERE product = ?", (number,))
    tags = [(name, value, number, 0) for name, value in product.attributes.items()]
    if product.category is not None:
        tags.append(("", product.category, number, 1))
    db.executemany("INSERT INTO tag VALUES (token(?, ?), ?, ?)", tags)
    return int(number)


def put_photo(db: sqlite3.Connection, product: int, digest: bytes, jpeg: bytes) -> None:
    """Insert the photo, unless it is there, and show it with the product, unless it is shown already."""
    db.execute("INSERT OR IGNORE INTO photo (digest, jpeg) VALUES (?, ?)", (digest, padded(jpeg)))
    db.execute(
        "INSERT OR IGNORE INTO view (product, photo) SELECT ?, id FROM photo WHERE digest = ?",
        (product, digest),
    )


def padded(content: bytes) -> bytes:
    """Return content as it is stored, so that none of it lies in a table's page; see `hanse_client.gallery.store`."""
    return bytes(PAD) + content


def _data(table: str) -> str:
    """Return SQL for the content of a vector's or prototype's row."""
    return f"substr({table}.data, {PAD + 1})"


def photo(db: sqlite3.Connection, digest: bytes) -> bytes | None:
    """Return the JPEG file with this SHA-256, as it was stored, or None."""
    row = db.execute(f"SELECT substr(jpeg, {PAD + 1}) FROM photo WHERE digest = ?", (digest,)).fetchone()
    return None if row is None else row[0]


def categories(db: sqlite3.Connection, limit: int) -> list[str]:
    """Return at most `limit` of the categories that products have, in order."""
    found = db.execute("SELECT min(product) FROM tag WHERE category = 1 GROUP BY token LIMIT ?", (limit,))
    there = products(db, [number for (number,) in found.fetchall()]).values()
    return sorted(product.category for product in there if product.category is not None)


def product_number(db: sqlite3.Connection, sku: str) -> int | None:
    """Return the number of the product, however its SKU is spelt, or None when there is none."""
    try:
        row = db.execute("SELECT id FROM product WHERE sku = ?", (composed(sku, MAX_SKU),)).fetchone()
    except UnicodeEncodeError:  # a word of a command line that is not in the terminal's encoding
        return None
    return None if row is None else row[0]


def products(db: sqlite3.Connection, numbers: Iterable[int]) -> dict[int, Product]:
    """Return the products with these numbers, by number."""
    return _products(db, f"SELECT {_COLUMNS} FROM product WHERE id IN {_EACH}", (each(numbers),))


def listed(db: sqlite3.Connection, where: Filter | None, after: str, limit: int) -> list[Product]:
    """Return at most `limit` products that match, by SKU, from the first one later than `after`."""
    condition, values = matching(where)
    query = f"SELECT {_COLUMNS} FROM product WHERE sku > ? AND {condition} ORDER BY sku LIMIT ?"
    return list(_products(db, query, (composed(after, MAX_SKU), *values, limit)).values())


def revised(db: sqlite3.Connection, revision: int, limit: int) -> tuple[int, dict[int, Product]]:
    """Return at most `limit` products written since `revision`, by number, and the revision up to which these are all.

    A product that is written has a revision of its own, the last one.
    """
    query = f"SELECT {_COLUMNS} FROM product WHERE revision > ? ORDER BY revision LIMIT ?"
    found = _products(db, query, (revision, limit))
    if not found:
        return revision, found
    (last,) = db.execute("SELECT revision FROM product WHERE id = ?", (next(reversed(found)),)).fetchone()
    return last, found


def _products(db: sqlite3.Connection, query: str, values: Sequence[Any]) -> dict[int, Product]:
    found = {}
    for number, sku, price, currency, words in db.execute(query, values):
        try:
            title, category, attributes = json.loads(words)
        except ValueError:
            raise damaged(f"the words of product {sku!r} are not what was written") from None
        # The rest was validated when it came, and a list of thousands is validated no second time.
        found[number] = Product.model_construct(
            sku=sku,
            title=title,
            price=None if price is None else _price(price),
            currency=currency,
            category=category,
            attributes=attributes,
        )
    return found


def _stored(price: Decimal) -> int:
    return int(price.scaleb(PRICE_PLACES))


def _price(stored: int) -> Decimal:
    """Return a price with two digits after the point, or as many as it needs."""
    price = Decimal(stored).scaleb(-PRICE_PLACES)
    cents = price.quantize(Decimal("0.01"))
    return cents if cents == price else price.normalize()


def matching(where: Filter | None) -> tuple[str, list[Any]]:
    """Return an SQL condition on `product`, and its values, that says what `where.matches` does."""
    parts: list[str] = ["TRUE"]
    values: list[Any] = []
    if where is not None:
        for value, part in (
            (where.price_min, "product.price >= ?"),
            (where.price_max, "product.price <= ?"),
        ):
            if value is not None:
                parts.append(part)
                values.append(_stored(value))
        tags = list(where.attributes.items())
        if where.category is not None:
            tags.append(("", where.category))
        for name, text in tags:
            parts.append("product.id IN (SELECT tag.product FROM tag WHERE tag.token = token(?, ?))")
            values.extend((name, text))
    return " AND ".join(parts), values


def matching_numbers(db: sqlite3.Connection, where: Filter | None, limit: int) -> list[int]:
    """Return the numbers of at most `limit` products that match."""
    condition, values = matching(where)
    found = db.execute(f"SELECT id FROM product WHERE {condition} LIMIT ?", (*values, limit))
    return [number for (number,) in found]


def matching_among(db: sqlite3.Connection, numbers: Iterable[int], where: Filter | None) -> set[int]:
    """Return those of the products with these numbers that are there, and match."""
    condition, values = matching(where)
    query = f"SELECT id FROM product WHERE id IN {_EACH} AND {condition}"
    return {number for (number,) in db.execute(query, (each(numbers), *values))}


def first_photos(db: sqlite3.Connection, numbers: Iterable[int]) -> dict[int, bytes]:
    """Return the SHA-256 of the first photo of each of these products that has one."""
    found = db.execute(
        f"""SELECT product, digest FROM view JOIN photo ON photo.id = view.photo
        WHERE product IN {_EACH} ORDER BY +view.id DESC""",
        (each(numbers),),
    )
    return dict(found.fetchall())


def each(numbers: Iterable[int]) -> str:
    """Return numbers as the JSON array that `json_each` takes apart: any number of them in one statement."""
    return json.dumps(list(numbers))


def remove_product(db: sqlite3.Connection, number: int) -> None:
    """Delete the product, its attributes and prototypes, and photos that no other product shows."""
    photos = [row[0] for row in db.execute("SELECT photo FROM view WHERE product = ?", (number,))]
    remove_photos(db, number, photos)
    db.execute("DELETE FROM product WHERE id = ?", (number,))
    db.execute("INSERT INTO removal (product) VALUES (?)", (number,))


def remove_photos(db: sqlite3.Connection, product: int, photos: Sequence[int]) -> None:
    """Take `photos` from the product; those that no product shows any more go, with their vectors."""
    numbers = each(photos)
    db.execute(f"DELETE FROM view WHERE product = ? AND photo IN {_EACH}", (product, numbers))
    db.execute(
        f"DELETE FROM photo WHERE id IN {_EACH} AND NOT EXISTS (SELECT 1 FROM view WHERE view.photo = photo.id)",
        (numbers,),
    )
    for (embedding,) in db.execute("SELECT id FROM embedding").fetchall():
        refresh_prototypes(db, embedding, [product])


def put_vectors(
    db: sqlite3.Connection, embedding: bytes, vectors: Iterable[tuple[bytes, Vectors]], dimension: int
) -> int:
    """Insert vectors by their photos' SHA-256, where the photo is there and has none; return the embedding's number.

    Prototypes are as before. Raises `GalleryError` when the embedding has another dimension.
    """
    db.execute("INSERT OR IGNORE INTO embedding (name, dimension) VALUES (?, ?)", (embedding, dimension))
    number, wanted = db.execute("SELECT id, dimension FROM embedding WHERE name = ?", (embedding,)).fetchone()
    if wanted != dimension:
        raise GalleryError(f"Vectors: found {dimension} numbers a row, but this embedding has {wanted}.")
    db.executemany(
        "INSERT OR IGNORE INTO vector (embedding, photo, data) SELECT ?, id, ? FROM photo WHERE digest = ?",
        ((number, padded(vector.astype("<f4").tobytes()), digest) for digest, vector in vectors),
    )
    return int(number)


def products_showing(db: sqlite3.Connection, digests: Iterable[bytes]) -> set[int]:
    """Return the products that show one of the photos with these SHA-256."""
    query = "SELECT product FROM view WHERE photo = (SELECT id FROM photo WHERE digest = ?)"
    return {number for digest in digests for (number,) in db.execute(query, (digest,))}


def refresh_prototypes(db: sqlite3.Connection, embedding: int, numbers: Iterable[int]) -> None:
    """Replace the prototypes of the products that have other photos, or other vectors of them, than before.

    A prototype is the mean of the vectors, scaled to length one: the nearest-class-mean rule (Mensink, Verbeek,
    Perronnin, Csurka, IEEE TPAMI 35, 2013), as in prototypical networks (Snell, Swersky, Zemel, NeurIPS
    2017, equation 1).
    """
    for number in numbers:
        found = db.execute(
            f"""SELECT {_data("vector")} FROM view JOIN vector ON vector.photo = view.photo AND vector.embedding = ?
            WHERE view.product = ? ORDER BY +view.id""",
            (embedding, number),
        ).fetchall()
        new = mean([data for (data,) in found]) if found else None
        old = db.execute(
            f"SELECT id, {_data('prototype')} FROM prototype WHERE product = ? AND embedding = ?",
            (number, embedding),
        ).fetchone()
        if old is not None and old[1] != new:
            db.execute("DELETE FROM prototype WHERE id = ?", (old[0],))
            db.execute("INSERT INTO removal (prototype) VALUES (?)", (old[0],))
        if new is not None and (old is None or old[1] != new):
            db.execute(
                "INSERT INTO prototype (embedding, product, data) VALUES (?, ?, ?)",
                (embedding, number, padded(new)),
            )
    db.execute("DELETE FROM removal WHERE number <= (SELECT max(number) FROM removal) - ?", (REMOVALS_KEPT,))


def mean(vectors: list[bytes]) -> bytes:
    """Return the mean of vectors (d,), float32 as bytes, scaled to length one; zeros where they cancel out."""
    if len(vectors) == 1:
        return vectors[0]
    found = np.frombuffer(b"".join(vectors), "<f4").reshape(len(vectors), -1).mean(axis=0, dtype=np.float64)
    length = np.linalg.norm(found)
    return bytes((found / length if length > 0 else found).astype("<f4").tobytes())


# CROSS JOIN and "+" keep SQLite from walking all vectors, or all views in order, instead of looking up a few.


def views(
    db: sqlite3.Connection, embedding: bytes, numbers: Iterable[int]
) -> list[tuple[int, bytes, Vectors]]:
    """Return product, photo's SHA-256 and vector (d,) of each photo of these products that has one, in order."""
    found = db.execute(
        f"""SELECT view.product, photo.digest, {_data("vector")} FROM view CROSS JOIN photo ON photo.id = view.photo
        CROSS JOIN vector ON vector.photo = photo.id AND vector.embedding = {_NAMED}
        WHERE view.product IN {_EACH} ORDER BY +view.id""",
        (embedding, each(numbers)),
    )
    return [(product, digest, np.frombuffer(data, "<f4")) for product, digest, data in found]


def prototypes(
    db: sqlite3.Connection, ids: Iterable[int], where: Filter | None, dimension: int
) -> tuple[list[int], Vectors]:
    """Return product numbers (n) and vectors (n, d) of those of the prototypes whose products match."""
    condition, values = matching(where)
    found = db.execute(
        f"""SELECT product.id, {_data("prototype")} FROM prototype JOIN product ON product.id = prototype.product
        WHERE prototype.id IN {_EACH} AND {condition}""",
        (each(ids), *values),
    ).fetchall()
    return [number for number, _ in found], _matrix([data for _, data in found], dimension)


def prototypes_of(
    db: sqlite3.Connection, embedding: bytes, numbers: Iterable[int], dimension: int
) -> tuple[list[int], Vectors]:
    """Return product numbers (n) and vectors (n, d) of those of these products that have a prototype."""
    found = db.execute(
        f"SELECT product, {_data('prototype')} FROM prototype WHERE embedding = {_NAMED} AND product IN {_EACH}",
        (embedding, each(numbers)),
    ).fetchall()
    return [number for number, _ in found], _matrix([data for _, data in found], dimension)


def matching_prototypes(
    db: sqlite3.Connection, embedding: bytes, where: Filter | None, dimension: int
) -> Iterator[tuple[list[int], Vectors]]:
    """Yield numbers (n) and vectors (n, d) of all products that match and have a prototype, a chunk at a time."""
    condition, values = matching(where)
    found = db.execute(
        f"""SELECT product.id, {_data("prototype")} FROM prototype JOIN product ON product.id = prototype.product
        WHERE prototype.embedding = {_NAMED} AND {condition}""",
        (embedding, *values),
    )
    while part := found.fetchmany(CHUNK):
        yield [number for number, _ in part], _matrix([data for _, data in part], dimension)


def prototype_ids(db: sqlite3.Connection, embedding: int) -> Ids:
    """Return the numbers of the embedding's prototypes, in order."""
    found = db.execute("SELECT id FROM prototype WHERE embedding = ? ORDER BY id", (embedding,))
    return np.fromiter((id_ for (id_,) in found), np.int64)


def prototypes_after(
    db: sqlite3.Connection, embedding: int, after: int, dimension: int
) -> tuple[Ids, Vectors] | None:
    """Return the next `CHUNK` of the embedding's prototypes in order of their numbers, or None when there is none."""
    found = db.execute(
        f"SELECT id, {_data('prototype')} FROM prototype WHERE embedding = ? AND id > ? ORDER BY id LIMIT ?",
        (embedding, after, CHUNK),
    ).fetchall()
    return _numbered(found, dimension) if found else None


def prototypes_by_id(db: sqlite3.Connection, ids: Ids, dimension: int) -> Vectors:
    """Return the vectors (n, d) of the prototypes with these numbers, in order of their numbers."""
    parts = [np.empty((0, dimension), np.float32)]
    for start in range(0, len(ids), CHUNK):
        found = db.execute(
            f"SELECT id, {_data('prototype')} FROM prototype WHERE id IN {_EACH} ORDER BY id",
            (each(ids[start : start + CHUNK].tolist()),),
        ).fetchall()
        parts.append(_numbered(found, dimension)[1])
    return np.concatenate(parts)


def forget(db: sqlite3.Connection, embedding: bytes) -> None:
    """Delete the embedding with its vectors, its prototypes and its rejection."""
    for table in ("vector", "prototype"):
        db.execute(f"DELETE FROM {table} WHERE embedding = {_NAMED}", (embedding,))
    db.execute("DELETE FROM embedding WHERE name = ?", (embedding,))
    db.execute("DELETE FROM rejection WHERE embedding = ?", (embedding,))


def _numbered(found: list[tuple[int, bytes]], dimension: int) -> tuple[Ids, Vectors]:
    ids = np.array([id_ for id_, _ in found], np.int64)
    return ids, _matrix([data for _, data in found], dimension)


def _matrix(data: list[bytes], dimension: int) -> Vectors:
    if any(len(one) != 4 * dimension for one in data):
        raise damaged(f"a vector has not the {dimension} numbers of its embedding")
    found = np.frombuffer(b"".join(data), "<f4").reshape(len(data), dimension)
    if not np.isfinite(found).all():
        raise damaged("a vector has a number that is none")
    return found
