"""The page of the recognizer at work: a photo in, what it shows out, and the products it is looked up among.

    app = build(recognition, config, cookie="hanse-shop-8766", token=lambda: read_token(config), hosts=("127.0.0.1",))

It is for the shop's owner, as `hanse_client.page` is, and let in by the same gate. It stands beside the service's other
addresses, and calls the same `Recognition`. Every page works without scripts; with them a photo can be dropped and
pasted, and what it shows comes into the page that is open.
"""

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any
from urllib.parse import quote

from PIL import Image
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from hanse_client import templates
from hanse_client.config import ClientConfig
from hanse_client.gallery.gallery import Gallery
from hanse_client.gallery.product import Filter, Product
from hanse_client.page_access import Gate, deed
from hanse_client.personal.corrections import MAX_CORRECTIONS, Correction, Corrections
from hanse_client.recognition.answers import Found
from hanse_client.recognition.service import Recognition
from hanse_client.serving.page_forms import Form, read_product, taking, typed_attributes
from hanse_client.serving.page_photos import Photos
from hanse_client.serving.page_view import bars, certainty, price, views
from hanse_client.serving.photos import decoded, references
from hanse_common.errors import Busy, HanseError, PhotoError, PhotoTooLarge
from hanse_common.vision.photo import PhotoLimits, decode
from hanse_common.web.languages import Languages
from hanse_common.web.security import Guarded
from hanse_common.web.serving import static_routes

COMMAND = "hanse-client serve"
MAX_FORM_BYTES = 32 * 1024
MAX_PHOTOS = 12
"""Photos that are added to a product at a time."""

CLASSES_SHOWN = 5
MATCHES_SHOWN = 6
SIMILAR_SHOWN = 6
PRODUCTS_A_PAGE = 48
CORRECTIONS_SHOWN = 100
MAX_QUERY = 200
SUGGESTIONS = 500

STATIC_FILES = ("shop.css", "recognize.js")

_DIGEST = re.compile(r"[0-9a-f]{64}")
_QUERY = re.compile(r"[A-Za-z0-9%=&+._~-]{0,2000}")


class Pages:
    """The pages over `recognition`, of the shop whose configuration is `config`."""

    def __init__(self, recognition: Recognition, config: ClientConfig) -> None:
        self._recognition = recognition
        self._gallery: Gallery = recognition.gallery
        self._corrections = Corrections(config.corrections_path)
        self._photos = Photos()
        self._limits = PhotoLimits(max_bytes=config.serve.photo_bytes)
        self._currency = ""
        self.languages = Languages(templates.FOLDER, config.page.language if config.page else "en")

    def app(self) -> Starlette:
        """Return the application, without what keeps strangers out."""
        pages = (
            ("/", self._start),
            ("/photo/{digest}", self._photo),
            ("/picture/{digest}", self._picture),
            ("/products", self._products),
            ("/product", self._product),
            ("/product/new", self._new),
            ("/product/change", self._change),
            ("/product/remove", self._confirm),
            ("/corrections", self._corrected),
            ("/recognizer", self._recognizer),
            ("/recognizer/now", self._now),
        )
        deeds = (
            ("/photo/{digest}/product", self._is_product),
            ("/photo/{digest}/label", self._is_label),
            ("/photo/{digest}/reference", self._refer),
            ("/photo/{digest}/forget", self._forget),
            ("/product/change", self._changed),
            ("/product/photo-remove", self._remove_photo),
            ("/product/remove", self._remove),
            ("/language", self._language),
        )
        photo_bytes = self._limits.max_bytes
        uploads: tuple[tuple[str, Callable[[Request, Form], Response], int, Callable[..., Response]], ...] = (
            ("/photo", self._look, 1, self._start),
            ("/product/new", self._add, MAX_PHOTOS, self._new),
            ("/product/photos", self._add_photos, MAX_PHOTOS, self._too_many),
        )
        return Starlette(
            routes=[
                *(Route(path, page) for path, page in pages),
                *(Route(path, deed(act, MAX_FORM_BYTES), methods=["POST"]) for path, act in deeds),
                *(
                    Route(path, self._upload(take, most, photo_bytes, failed), methods=["POST"])
                    for path, take, most, failed in uploads
                ),
                *(_file(name) for name in STATIC_FILES),
                *static_routes(),
            ],
            exception_handlers={
                HTTPException: lambda request, error: self._failed(request, error.status_code),
                Busy: lambda request, error: self._failed(request, 503),
                HanseError: lambda request, error: self._failed(request, 409, str(error)),
            },
        )

    def _upload(
        self,
        take: Callable[[Request, Form], Response],
        most: int,
        photo_bytes: int,
        failed: Callable[..., Response],
    ) -> Callable[[Request], Any]:
        """Return an endpoint that takes up to `most` photos; room for four of the largest is enough for many."""
        bytes_ = min(most, 4) * photo_bytes + MAX_FORM_BYTES
        return taking(take, bytes_, most, lambda request: failed(request, trouble="large"))

    def _page(self, request: Request, template: str, code: int = 200, **values: Any) -> HTMLResponse:
        query = request.url.query if request.method == "GET" and _QUERY.fullmatch(request.url.query) else ""
        common = {
            "served": True,
            "key": request.state.key,
            "place": request.url.path,
            "here": f"{request.url.path}?{query}" if query else request.url.path,
            "price": price,
            "link": product_link,
            "megabytes": self._limits.max_bytes >> 20,
            "most": MAX_PHOTOS,
        }
        page = self.languages.of(request).render(f"recognition-{template}.html", **{**common, **values})
        return HTMLResponse(page, code)

    def _failed(self, request: Request, code: int, text: str = "") -> HTMLResponse:
        return self._page(request, "error", code, here="/", code_shown=code, lines=text.splitlines())

    # A photo, and what it shows

    def _start(self, request: Request, trouble: str = "") -> Response:
        code = {"": 200, "large": 413}.get(trouble, 422)
        return self._page(
            request,
            "start",
            code,
            here="/",
            trouble=trouble,
            status=self._recognition.status(),
            photo=None,
            max_bytes=self._limits.max_bytes,
        )

    def _look(self, request: Request, form: Form) -> Response:
        """Take a photo that somebody chose."""
        if not form.files:
            return self._start(request, "missing")
        try:
            digest = self._photos.keep(Gallery.prepare(self._decoded(form.files[0])))
        except PhotoTooLarge:
            return self._start(request, "large")
        except PhotoError:
            return self._start(request, "unreadable")
        return RedirectResponse(f"/photo/{digest.hex()}", 303)

    def _photo(self, request: Request) -> Response:
        digest, image = self._shown(request)
        status = self._recognition.status()
        found: Found | None = None
        if status.embedding:
            recognized = self._recognition.recognize(image, top=CLASSES_SHOWN, k=MATCHES_SHOWN)
            seen, found = recognized.classification, recognized.found
        else:
            seen = self._recognition.classify(image, top=CLASSES_SHOWN)
        said = self._corrections.of(digest)
        classes = bars(seen.classes)
        return self._page(
            request,
            "start",
            trouble="",
            status=status,
            photo=digest.hex(),
            max_bytes=self._limits.max_bytes,
            classes=classes,
            personal=bars(seen.personal or ()),
            certainty=certainty(classes[0].share) if classes else None,
            searched=found is not None,
            matches=views(found.matches, found.threshold) if found else [],
            known=bool(found and found.known),
            said=said,
            said_product=self._gallery.get(said.sku) if said and said.sku else None,
            reference=bool(said and said.sku and digest in self._gallery.photos_of(said.sku)),
            labels=self._labels(status.classes),
        )

    def _picture(self, request: Request) -> Response:
        found = self._jpeg(_digest(request.path_params["digest"]))
        if found is None:
            raise HTTPException(404)
        return Response(found, media_type="image/jpeg")

    def _is_product(self, request: Request, fields: Mapping[str, str]) -> Response:
        """Write down that a photo shows a product of the catalog."""
        digest, product = self._digest_kept(request), self._existing(fields.get("sku", ""))
        self._corrections.add(self._kept(digest), sku=product.sku)
        return RedirectResponse(f"/photo/{digest.hex()}", 303)

    def _is_label(self, request: Request, fields: Mapping[str, str]) -> Response:
        """Write down what a photo shows, in the owner's words."""
        digest = self._digest_kept(request)
        self._corrections.add(self._kept(digest), label=fields.get("label", ""))
        return RedirectResponse(f"/photo/{digest.hex()}", 303)

    def _refer(self, request: Request, fields: Mapping[str, str]) -> Response:
        """Add a photo to those of a product. What was said of it goes on with the photo as it is kept there."""
        digest, image = self._shown(request)
        product = self._existing(fields.get("sku", ""))
        (kept,) = self._recognition.put(product, [image])
        self._corrections.add(self._kept(kept), sku=product.sku)
        if kept != digest:
            self._corrections.remove(digest)
        return RedirectResponse(f"/photo/{kept.hex()}", 303)

    def _forget(self, request: Request, fields: Mapping[str, str]) -> Response:
        """Take back what was said of a photo; it can still be looked at."""
        digest = self._digest_kept(request)
        self._photos.keep(self._kept(digest))
        self._corrections.remove(digest)
        back = "/corrections" if fields.get("to") == "corrections" else f"/photo/{digest.hex()}"
        return RedirectResponse(back, 303)

    # Products

    def _products(self, request: Request) -> Response:
        asked = request.query_params
        text, category = asked.get("q", "").strip()[:MAX_QUERY], asked.get("category", "").strip()
        photo = asked.get("photo", "")
        where = _of_category(category)
        more = ""
        if text:
            exact = self._gallery.get(text)
            found = self._gallery.search_text(text, PRODUCTS_A_PAGE, where)
            products = [match.product for match in found if exact is None or match.product != exact]
            products = [exact, *products] if exact and (where is None or where.matches(exact)) else products
        else:
            products = self._gallery.products(where, asked.get("after", ""), PRODUCTS_A_PAGE + 1)
            if len(products) > PRODUCTS_A_PAGE:
                products = products[:PRODUCTS_A_PAGE]
                more = products[-1].sku
        return self._page(
            request,
            "products",
            products=[(product, self._first_photo(product.sku)) for product in products],
            text=text,
            category=category,
            categories=self._gallery.categories(),
            more=more,
            after=asked.get("after", ""),
            total=self._gallery.count(),
            photo=photo if self._known(photo) else "",
            quote=quote,
        )

    def _product(self, request: Request, trouble: str = "", sku: str = "") -> Response:
        product = self._existing(sku or request.query_params.get("sku", ""))
        photos = self._gallery.photos_of(product.sku)
        searched = photos and self._recognition.status().embedding
        found = self._recognition.similar(product.sku, k=SIMILAR_SHOWN) if searched else None
        return self._page(
            request,
            "product",
            422 if trouble else 200,
            here=product_link(product),
            product=product,
            photos=[each.hex() for each in photos],
            similar=views(found.matches, found.threshold) if found else [],
            trouble=trouble,
        )

    def _new(
        self,
        request: Request,
        trouble: str = "",
        fields: Mapping[str, str] | None = None,
        errors: Mapping[str, str] | None = None,
    ) -> Response:
        photo = (fields or request.query_params).get("photo", "")
        return self._page(
            request,
            "new",
            422 if trouble or errors else 200,
            here="/product/new",
            photo=photo if self._known(photo) else "",
            fields={"currency": self._usual_currency()} if fields is None else fields,
            errors=errors or {},
            trouble=trouble,
            categories=self._gallery.categories(),
        )

    def _add(self, request: Request, form: Form) -> Response:
        """Add a product, with the photos that were chosen and the one that was looked at."""
        product, errors = read_product(form.fields)
        if product is not None and self._gallery.get(product.sku) is not None:
            errors = {"sku": "taken"}
        if product is None or errors:
            return self._new(request, "", form.fields, errors)
        try:
            images = references(form.files, self._limits)
        except PhotoError as error:
            trouble = "large" if isinstance(error, PhotoTooLarge) else "unreadable"
            return self._new(request, trouble, form.fields)
        photo = form.fields.get("photo", "")
        if self._known(photo):
            images.insert(0, decode(self._kept(bytes.fromhex(photo))))
        self._recognition.put(product, images)
        self._currency = product.currency or self._currency
        return RedirectResponse(product_link(product), 303)

    def _add_photos(self, request: Request, form: Form) -> Response:
        """Add photos to a product."""
        product = self._existing(form.fields.get("sku", ""))
        if not form.files:
            return self._product(request, "missing", product.sku)
        try:
            images = references(form.files, self._limits)
        except PhotoError as error:
            trouble = "large" if isinstance(error, PhotoTooLarge) else "unreadable"
            return self._product(request, trouble, product.sku)
        self._recognition.put(product, images)
        return RedirectResponse(product_link(product), 303)

    def _too_many(self, request: Request, trouble: str) -> Response:
        """Answer a form whose fields were not read: which product it was for is not known."""
        return self._page(request, "error", 413, here="/products", code_shown=413, lines=[])

    def _change(
        self,
        request: Request,
        fields: Mapping[str, str] | None = None,
        errors: Mapping[str, str] | None = None,
    ) -> Response:
        product = self._existing((fields or request.query_params).get("sku", ""))
        if fields is None:
            fields = {
                "sku": product.sku,
                "title": product.title,
                "price": "" if product.price is None else f"{product.price:f}",
                "currency": product.currency or "",
                "category": product.category or "",
                "attributes": typed_attributes(product),
            }
        return self._page(
            request,
            "change",
            422 if errors else 200,
            product=product,
            fields=fields,
            errors=errors or {},
            categories=self._gallery.categories(),
        )

    def _changed(self, request: Request, fields: Mapping[str, str]) -> Response:
        self._existing(fields.get("sku", ""))
        product, errors = read_product(fields)
        if product is None:
            return self._change(request, fields, errors)
        self._recognition.put(product)
        return RedirectResponse(product_link(product), 303)

    def _remove_photo(self, request: Request, fields: Mapping[str, str]) -> Response:
        product = self._existing(fields.get("sku", ""))
        self._recognition.remove_photo(product.sku, _digest(fields.get("digest", "")))
        return RedirectResponse(product_link(product), 303)

    def _confirm(self, request: Request) -> Response:
        product = self._existing(request.query_params.get("sku", ""))
        photos = self._gallery.photos_of(product.sku)
        return self._page(request, "remove", product=product, photos=[each.hex() for each in photos])

    def _remove(self, request: Request, fields: Mapping[str, str]) -> Response:
        sku = self._existing(fields.get("sku", "")).sku
        self._recognition.remove(sku)
        self._corrections.forget(sku)
        return RedirectResponse("/products", 303)

    # What was said, and how the recognizer is

    def _corrected(self, request: Request) -> Response:
        said = self._corrections.list(limit=MAX_CORRECTIONS)
        shown: list[tuple[Correction, Product | None]] = [
            (each, self._gallery.get(each.sku) if each.sku else None)
            for each in reversed(said[-CORRECTIONS_SHOWN:])
        ]
        return self._page(
            request, "corrections", shown=shown, total=len(said), labels=self._corrections.labels()
        )

    def _recognizer(self, request: Request) -> Response:
        return self._page(request, "status", status=self._recognition.status())

    def _now(self, request: Request) -> Response:
        return self._page(request, "now", status=self._recognition.status())

    def _language(self, request: Request, fields: Mapping[str, str]) -> Response:
        """Change the language, and go back to where the reader was, with what was asked for there."""
        to, _, query = fields.get("to", "").partition("?")
        answer = self.languages.chosen({**fields, "to": to})
        if query and _QUERY.fullmatch(query):
            answer.headers["location"] += f"?{query}"
        return answer

    # What several of them need

    def _decoded(self, data: bytes) -> Image.Image:
        return decoded(data, self._limits)

    def _existing(self, sku: str) -> Product:
        product = self._gallery.get(sku) if sku else None
        if product is None:
            raise HTTPException(404)
        return product

    def _jpeg(self, digest: bytes) -> bytes | None:
        return self._photos.get(digest) or self._gallery.photo(digest) or self._corrections.photo(digest)

    def _known(self, digest: str) -> bool:
        return bool(_DIGEST.fullmatch(digest)) and self._jpeg(bytes.fromhex(digest)) is not None

    def _kept(self, digest: bytes) -> bytes:
        found = self._jpeg(digest)
        if found is None:
            raise HTTPException(410)
        return found

    def _digest_kept(self, request: Request) -> bytes:
        digest = _digest(request.path_params["digest"])
        self._kept(digest)
        return digest

    def _shown(self, request: Request) -> tuple[bytes, Image.Image]:
        digest = _digest(request.path_params["digest"])
        return digest, decode(self._kept(digest))

    def _first_photo(self, sku: str) -> str:
        photos = self._gallery.photos_of(sku)
        return photos[0].hex() if photos else ""

    def _labels(self, classes: Collection[str]) -> list[str]:
        """Return what a photo can be said to show: the owner's own words, then the league's classes."""
        return list(dict.fromkeys((*self._corrections.labels(), *classes)))[:SUGGESTIONS]

    def _usual_currency(self) -> str:
        if not self._currency:
            listed = self._gallery.products()
            self._currency = next((each.currency for each in listed if each.currency), "")
        return self._currency


def product_link(product: Product) -> str:
    """Return the address of a product's page."""
    return f"/product?sku={quote(product.sku, safe='')}"


def _of_category(text: str) -> Filter | None:
    """Return the filter that was asked for; None for a name that no category can have."""
    try:
        return Filter(category=text) if text else None
    except ValidationError:
        return None


def _digest(text: str) -> bytes:
    if not _DIGEST.fullmatch(text):
        raise HTTPException(404)
    return bytes.fromhex(text)


def _file(name: str) -> Route:
    file = FileResponse(templates.FOLDER / name)
    return Route(f"/static/{name}", lambda request: file)


def build(
    recognition: Recognition,
    config: ClientConfig,
    *,
    cookie: str,
    token: Callable[[], str | None],
    hosts: Collection[str],
    secure: bool = False,
) -> ASGIApp:
    """Return the page over `recognition`, with all that guards it.

    `cookie` names its session, `token` gives what lets in, `hosts` are the names by which it may be asked for, and
    `secure` is whether TLS is spoken. Raises `CatalogError` when the owner's corrections cannot be opened.
    """
    pages = Pages(recognition, config)
    return Guarded(Gate(pages.app(), cookie, token, pages.languages, COMMAND, secure=secure), hosts)
