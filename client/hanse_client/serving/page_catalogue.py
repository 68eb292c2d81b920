"""The page's catalog: products to look through, to add, to change and to remove, with their photos.

    routes = CataloguePages(context).routes()

A form that somebody filled in wrongly comes back as it was typed, with what is wrong beside each field.
"""

from collections.abc import Mapping
from urllib.parse import quote

from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from hanse_client.gallery.prices import written_price
from hanse_client.gallery.product import Filter, Product
from hanse_client.personal.corrections import MAX_CORRECTIONS
from hanse_client.serving.page_context import MAX_PHOTOS, PageContext, act, code_for, digest_of, product_link
from hanse_client.serving.page_forms import Form, read_product, typed_attributes
from hanse_client.serving.page_view import views
from hanse_client.serving.photos import references
from hanse_common.errors import PhotoError, PhotoTooLarge
from hanse_common.vision.photo import decode

PRODUCTS_A_PAGE = 48
SIMILAR_SHOWN = 5
MAX_QUERY = 200


class CataloguePages:
    """The pages of products."""

    def __init__(self, context: PageContext) -> None:
        self._context = context
        self._recognition = context.recognition
        self._gallery = context.gallery
        self._corrections = context.corrections
        self._limits = context.limits
        self._currency = ""

    def routes(self) -> list[Route]:
        """Return the addresses of these pages."""
        return [
            Route("/products", self._products),
            Route("/product", self._product),
            Route("/product/new", self._new),
            Route("/product/change", self._change),
            Route("/product/remove", self._confirm),
            act("/product/change", self._changed),
            act("/product/photo-remove", self._remove_photo),
            act("/product/remove", self._remove),
            self._context.upload("/product/new", self._add, MAX_PHOTOS, self._new),
            self._context.upload("/product/photos", self._add_photos, MAX_PHOTOS, self._product),
        ]

    def _products(self, request: Request) -> Response:
        asked = request.query_params
        text, category = asked.get("q", "").strip()[:MAX_QUERY], asked.get("category", "").strip()
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
        return self._context.render(
            request,
            "products",
            products=[(product, self._first_photo(product.sku)) for product in products],
            text=text,
            category=category,
            categories=self._gallery.categories(),
            more=more,
            after=asked.get("after", ""),
            total=self._gallery.count(),
            photo=self._looked_at(request),
            quote=quote,
        )

    def _product(self, request: Request, trouble: str = "") -> Response:
        product = self._asked_for(request)
        photos = self._gallery.photos_of(product.sku)
        searched = photos and self._recognition.status().embedding
        found = self._recognition.similar(product.sku, k=SIMILAR_SHOWN) if searched else None
        return self._context.render(
            request,
            "product",
            code_for(trouble),
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
        photo = self._looked_at(request)
        return self._context.render(
            request,
            "new",
            422 if errors else code_for(trouble),
            here=f"/product/new?photo={photo}" if photo else "/product/new",
            photo=photo,
            fields={"currency": self._usual_currency()} if fields is None else fields,
            errors=errors or {},
            trouble=trouble,
            categories=self._gallery.categories(),
        )

    def _add(self, request: Request, form: Form) -> Response:
        """Add a product, with the photos that were chosen and the one that was looked at."""
        product, errors = read_product(form.fields)
        sku = " ".join(form.fields.get("sku", "").split())
        if sku and "sku" not in errors and self._gallery.get(sku) is not None:
            errors = {**errors, "sku": "taken"}
        if product is None or errors:
            return self._new(request, "", form.fields, errors)
        try:
            images = references(form.files, self._limits)
        except PhotoError as error:
            trouble = "large" if isinstance(error, PhotoTooLarge) else "unreadable"
            return self._new(request, trouble, form.fields)
        if photo := self._looked_at(request):
            images.insert(0, decode(self._context.kept(bytes.fromhex(photo))))
        with self._recognition.changing:
            if self._gallery.get(product.sku) is not None:  # somebody added it meanwhile
                return self._new(request, "", form.fields, {"sku": "taken"})
            self._recognition.put(product, images)
        self._currency = product.currency or self._currency
        return RedirectResponse(product_link(product), 303)

    def _add_photos(self, request: Request, form: Form) -> Response:
        """Add photos to a product."""
        self._asked_for(request)
        if not form.files:
            return self._product(request, "missing")
        try:
            images = references(form.files, self._limits)
        except PhotoError as error:
            trouble = "large" if isinstance(error, PhotoTooLarge) else "unreadable"
            return self._product(request, trouble)
        with self._recognition.changing:
            product = self._asked_for(request)  # as it is now that the photos are read
            self._recognition.put(product, images)
        return RedirectResponse(product_link(product), 303)

    def _change(
        self,
        request: Request,
        fields: Mapping[str, str] | None = None,
        errors: Mapping[str, str] | None = None,
    ) -> Response:
        product = self._context.existing((fields or request.query_params).get("sku", ""))
        if fields is None:
            fields = {
                "sku": product.sku,
                "title": product.title,
                "price": "" if product.price is None else written_price(product.price),
                "currency": product.currency or "",
                "category": product.category or "",
                "attributes": typed_attributes(product),
            }
        return self._context.render(
            request,
            "change",
            422 if errors else 200,
            here=product_link(product).replace("/product?", "/product/change?", 1),
            product=product,
            fields=fields,
            errors=errors or {},
            categories=self._gallery.categories(),
        )

    def _changed(self, request: Request, fields: Mapping[str, str]) -> Response:
        self._context.existing(fields.get("sku", ""))
        product, errors = read_product(fields)
        if product is None:
            return self._change(request, fields, errors)
        with self._recognition.changing:
            self._context.existing(product.sku)
            self._recognition.put(product)
        return RedirectResponse(product_link(product), 303)

    def _remove_photo(self, request: Request, fields: Mapping[str, str]) -> Response:
        """Take a photo from a product; who looks at it just then goes on doing so."""
        product = self._context.existing(fields.get("sku", ""))
        digest = digest_of(fields.get("digest", ""))
        back = product_link(product)
        if fields.get("to") == "photo":
            self._context.photos.keep(self._context.kept(digest))
            back = f"/photo/{digest.hex()}"
        self._recognition.remove_photo(product.sku, digest)
        return RedirectResponse(back, 303)

    def _confirm(self, request: Request) -> Response:
        product = self._asked_for(request)
        photos = self._gallery.photos_of(product.sku)
        said = sum(each.sku == product.sku for each in self._corrections.list(limit=MAX_CORRECTIONS))
        return self._context.render(
            request, "remove", product=product, photos=[each.hex() for each in photos], said=said
        )

    def _remove(self, request: Request, fields: Mapping[str, str]) -> Response:
        sku = fields.get("sku", "")
        with self._recognition.changing:
            # The product goes last, and need not be there: a removal that did not end can be asked for once more.
            self._corrections.forget(sku)
            removed = self._recognition.remove(sku)
        if not removed:
            raise HTTPException(404)
        return RedirectResponse("/products", 303)

    def _asked_for(self, request: Request) -> Product:
        """Return the product that the address names: known even where a form was too large to be read."""
        return self._context.existing(request.query_params.get("sku", ""))

    def _looked_at(self, request: Request) -> str:
        """Return the digest in the address, of a photo that is kept; empty without one."""
        photo = request.query_params.get("photo", "")
        return photo if self._context.known(photo) else ""

    def _first_photo(self, sku: str) -> str:
        photos = self._gallery.photos_of(sku)
        return photos[0].hex() if photos else ""

    def _usual_currency(self) -> str:
        if not self._currency:
            listed = self._gallery.products()
            self._currency = next((each.currency for each in listed if each.currency), "")
        return self._currency


def _of_category(text: str) -> Filter | None:
    """Return the filter that was asked for; None for a name that no category can have."""
    try:
        return Filter(category=text) if text else None
    except ValidationError:
        return None
