"""What the recognizer's page takes from a browser: photos in a form, and the fields of a product.

    form = await uploaded(request, max_bytes=20 << 20, max_files=8)
    form.fields["sku"], form.files            # "A-17", [b"…"]
    product, errors = read_product(form.fields)

A form with photos is one of this session, as every other (`page_access`), bounded as a whole and in each part. What is
over the bound is read on and thrown away, up to a further bound: a browser that is cut off while it sends shows an
error of its own, and not what the page has to say.
"""

import re
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass

from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.responses import Response

from hanse_client.gallery.prices import MarkUnclear, read_price
from hanse_client.gallery.product import Product
from hanse_client.page_access import Endpoint, require_session
from hanse_common.web.forms import MAX_FIELDS, require_own_origin

MAX_FIELD_BYTES = 16 * 1024
"""Bound of one field that is no photo; a product's attributes are the longest."""

DRAINED_BYTES = 256 * 1024 * 1024
"""How much over its bound a form is still read, to be thrown away."""

MAX_CHOSEN = 100
"""Bound of the files in one form, empty ones too: a browser sends one where none is chosen."""

_FORM = "multipart/form-data"
_COLON = re.compile("[:\uff1a]")
"""Also the one that Chinese is typed with."""

Take = Callable[[Request, "Form"], Response]


@dataclass(frozen=True)
class Form:
    """A form's fields, each once, and the files that were chosen, whatever fields they are in."""

    fields: Mapping[str, str]
    files: Sequence[bytes]


async def uploaded(request: Request, max_bytes: int, max_files: int) -> Form:
    """Return a form that a page of this session sent, with at most `max_files` files, `max_bytes` in all.

    Raises `HTTPException`: 403 for another page's, 413 for more than that, 415 for no such form, 400 for damage.
    """
    require_own_origin(request)
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != _FORM:
        raise HTTPException(415, "Found no form.")
    parser = MultiPartParser(
        request.headers,
        _bounded(request, max_bytes),
        max_files=MAX_CHOSEN,
        max_fields=MAX_FIELDS,
        max_part_size=MAX_FIELD_BYTES,
    )
    parser.spool_max_size = max_bytes + 1  # in memory: no photo goes to a disk before somebody says so
    try:
        parsed = await parser.parse()
    except (MultiPartException, ValueError, LookupError) as error:  # what the parser beneath it raises, too
        raise HTTPException(400, "Found a damaged form.") from error
    try:
        pairs = parsed.multi_items()
        fields = [(name, text) for name, text in pairs if isinstance(text, str)]
        files = [await file.read() for _, file in pairs if isinstance(file, UploadFile) and file.filename]
    finally:
        await parsed.close()
    found = dict(fields)
    if len(found) != len(fields):
        raise HTTPException(400, "Found a field twice.")
    require_session(request, found.pop("key", ""))
    if len(files) > max_files:
        raise HTTPException(413, f"Found {len(files)} photos, expected at most {max_files} at a time.")
    return Form(found, files)


def taking(take: Take, max_bytes: int, max_files: int, failed: Callable[[Request], Response]) -> Endpoint:
    """Return an endpoint that does `take`, in a thread, with a form of this session; `failed` answers one too large."""

    async def endpoint(request: Request) -> Response:
        try:
            form = await uploaded(request, max_bytes, max_files)
        except HTTPException as error:
            if error.status_code != 413:
                raise
            return await run_in_threadpool(failed, request)
        return await run_in_threadpool(take, request, form)

    return endpoint


async def _bounded(request: Request, max_bytes: int) -> AsyncGenerator[bytes, None]:
    seen = 0
    async for part in request.stream():
        seen += len(part)
        if seen <= max_bytes:
            yield part
        elif seen > max_bytes + DRAINED_BYTES:
            break
    if seen > max_bytes:
        raise HTTPException(413, f"Found more than {max_bytes} bytes.")


def read_product(fields: Mapping[str, str]) -> tuple[Product | None, dict[str, str]]:
    """Return the product that somebody typed, and which fields are wrong; one of the two is empty.

    What is wrong is "form", and "mark" for a price whose mark may divide thousands. Attributes are lines of a name, a
    colon and a value.
    """
    errors: dict[str, str] = {}
    typed = {
        name: " ".join(fields.get(name, "").split()) for name in ("sku", "title", "currency", "category")
    }
    values: dict[str, object] = {name: text or None for name, text in typed.items()}
    values["title"] = typed["title"]
    values["sku"] = typed["sku"]
    values["currency"] = typed["currency"].upper() or None
    price = fields.get("price", "").strip()
    try:
        values["price"] = read_price(price) if price else None
    except MarkUnclear:
        errors["price"] = "mark"
    except ValueError:
        errors["price"] = "form"
    attributes: dict[str, str] = {}
    for line in fields.get("attributes", "").splitlines():
        name, *value = (each.strip() for each in _COLON.split(line, maxsplit=1))
        if name and value and name not in attributes:
            attributes[name] = value[0]
        elif line.strip():
            errors["attributes"] = "form"
    values["attributes"] = attributes
    try:
        product = Product.model_validate(values | ({"price": None} if "price" in errors else {}))
    except ValidationError as error:
        errors |= {str(each["loc"][0]): "form" for each in error.errors(include_input=False)}
        return None, errors
    return (None, errors) if errors else (product, {})


def typed_attributes(product: Product) -> str:
    """Return a product's attributes as they are typed."""
    return "\n".join(f"{name}: {value}" for name, value in product.attributes.items())
