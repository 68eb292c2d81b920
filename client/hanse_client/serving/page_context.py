"""What the pages of the recognizer at work stand on: one shop, its photos, and how a page is made.

    context = PageContext(recognition, config)
    context.existing("A-17")                       # the product; 404 where there is none
    context.render(request, "product", product=product)

What somebody asks for by an address is looked up here, so that every page answers alike for what is not there.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote

from PIL import Image
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from hanse_client import templates
from hanse_client.config import ClientConfig
from hanse_client.gallery.product import Product
from hanse_client.page_access import deed
from hanse_client.personal.corrections import Corrections
from hanse_client.recognition.service import Recognition
from hanse_client.serving.page_forms import Take, taking
from hanse_client.serving.page_photos import Photos
from hanse_client.serving.page_view import percent, price
from hanse_common.vision.photo import PhotoLimits, decode
from hanse_common.web.languages import Languages

MAX_FORM_BYTES = 32 * 1024
MAX_PHOTOS = 12
"""Photos that are added to a product at a time."""

LARGEST_AT_ONCE = 4
"""How many photos of the largest size there is room for in one form."""

_DIGEST = re.compile(r"[0-9a-f]{64}")
_QUERY = re.compile(r"[A-Za-z0-9%=&+._~-]{0,2000}")


class PageContext:
    """What all pages over `recognition` share, of the shop whose configuration is `config`.

    Raises `CatalogError` when the owner's corrections cannot be opened.
    """

    def __init__(self, recognition: Recognition, config: ClientConfig) -> None:
        self.recognition = recognition
        self.gallery = recognition.gallery
        self.corrections = Corrections(config.corrections_path)
        self.photos = Photos()
        self.limits = PhotoLimits(max_bytes=config.serve.photo_bytes)
        self.languages = Languages(templates.FOLDER, config.page.language if config.page else "en")

    def render(self, request: Request, template: str, code: int = 200, **values: Any) -> HTMLResponse:
        """Return the page that `template` makes of `values`, in the reader's language."""
        common = {
            "served": True,
            "key": request.state.key,
            "place": request.url.path,
            "here": f"{request.url.path}?{query}" if (query := _query(request)) else request.url.path,
            "price": price,
            "percent": percent,
            "link": product_link,
            "megabytes": self.limits.max_bytes >> 20,
            "most": MAX_PHOTOS,
            "most_megabytes": LARGEST_AT_ONCE * self.limits.max_bytes >> 20,
        }
        page = self.languages.of(request).render(f"recognition-{template}.html", **{**common, **values})
        return HTMLResponse(page, code)

    def chosen(self, fields: Mapping[str, str]) -> Response:
        """Change the language, and go back to where the reader was, with what was asked for there."""
        to, _, query = fields.get("to", "").partition("?")
        answer = self.languages.chosen({**fields, "to": to})
        if query and _QUERY.fullmatch(query):
            answer.headers["location"] += f"?{query}"
        return answer

    def upload(self, path: str, take: Take, most: int, failed: Callable[..., Response]) -> Route:
        """Return the route of a form with up to `most` photos, of as many bytes as `LARGEST_AT_ONCE` of the largest.

        `failed(request, trouble=...)` answers one that is larger, or has more, and whose fields were not read.
        """
        bytes_ = min(most, LARGEST_AT_ONCE) * self.limits.max_bytes + MAX_FORM_BYTES
        trouble = "large" if most == 1 else "many"
        endpoint = taking(take, bytes_, most, lambda request: failed(request, trouble=trouble))
        return Route(path, endpoint, methods=["POST"])

    def existing(self, sku: str) -> Product:
        """Return the product `sku`. Raises `HTTPException` 404 where there is none."""
        product = self.gallery.get(sku) if sku else None
        if product is None:
            raise HTTPException(404)
        return product

    def jpeg(self, digest: bytes) -> bytes | None:
        """Return the photo of that SHA-256, wherever it is kept; None where it is not."""
        return self.photos.get(digest) or self.gallery.photo(digest) or self.corrections.photo(digest)

    def known(self, digest: str) -> bool:
        """Return whether `digest`, in hexadecimal, is that of a photo that is kept."""
        return bool(_DIGEST.fullmatch(digest)) and self.jpeg(bytes.fromhex(digest)) is not None

    def kept(self, digest: bytes) -> bytes:
        """Return the photo of that SHA-256. Raises `HTTPException` 410 when it is not kept any more."""
        found = self.jpeg(digest)
        if found is None:
            raise HTTPException(410)
        return found

    def digest_kept(self, request: Request) -> bytes:
        """Return the digest in the address, of a photo that is kept. Raises `HTTPException`, 404 or 410."""
        digest = digest_of(request.path_params["digest"])
        self.kept(digest)
        return digest

    def shown(self, request: Request) -> tuple[bytes, Image.Image]:
        """Return the digest in the address, and its photo. Raises `HTTPException`, 404 or 410."""
        digest = digest_of(request.path_params["digest"])
        return digest, decode(self.kept(digest))


def act(path: str, do: Callable[[Request, Mapping[str, str]], Response]) -> Route:
    """Return the route of a form without photos."""
    return Route(path, deed(do, MAX_FORM_BYTES), methods=["POST"])


def code_for(trouble: str) -> int:
    """Return the status of a page that tells what is wrong with the photos that were chosen; 200 for nothing."""
    return {"": 200, "large": 413, "many": 413}.get(trouble, 422)


def product_link(product: Product) -> str:
    """Return the address of a product's page."""
    return f"/product?sku={quote(product.sku, safe='')}"


def digest_of(text: str) -> bytes:
    """Return the SHA-256 that `text` is in hexadecimal. Raises `HTTPException` 404 when it is none."""
    if not _DIGEST.fullmatch(text):
        raise HTTPException(404)
    return bytes.fromhex(text)


def _query(request: Request) -> str:
    """Return what was asked for behind the path; nothing where it may not stand in a page."""
    query = request.url.query
    return query if request.method == "GET" and _QUERY.fullmatch(query) else ""
