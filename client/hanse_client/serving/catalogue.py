"""REST's products: list, get, put, change, remove, their photos, and imports of many.

curl -X PUT -H 'Content-Type: application/json' -d '{"title": "Trail shoe", "price": "59.90"}' … /v1/products/A-17
curl --data-binary @shoe.jpg -H 'Content-Type: image/jpeg' … /v1/products/A-17/photos
"""

from typing import Annotated

from fastapi import APIRouter, Body, Depends, Path, Query
from pydantic import TypeAdapter, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from hanse_client.gallery.faults import EXPECTED
from hanse_client.gallery.gallery import Gallery
from hanse_client.gallery.product import MAX_SKU, Product, Sku
from hanse_client.serving.answers import ImportProgress, PhotoAdded, ProductPage, Shelved
from hanse_client.serving.openapi import NO_CONTENT, problems
from hanse_client.serving.photos import PHOTO_BODY, Photo, content_type, decoded
from hanse_client.serving.problems import Refused
from hanse_client.serving.schemas import ListQuery, ProductChanges, ProductFields
from hanse_client.serving.segments import unquoted
from hanse_client.serving.service import Service

_SKU: TypeAdapter[str] = TypeAdapter(Sku)

LINES = "application/x-ndjson"
LINES_BODY = {
    "requestBody": {
        "required": True,
        "description": "A product a line, in JSON: sku, title, price, currency, category, attributes, photos (base64).",
        "content": {LINES: {"schema": {"type": "string", "format": "binary"}}},
    }
}


def _sku(sku: Annotated[str, Path(json_schema_extra={"minLength": 1, "maxLength": MAX_SKU})]) -> str:
    try:
        return _SKU.validate_python(unquoted(sku))
    except ValidationError:
        raise Refused(422, "invalid", f"sku: expected {EXPECTED['sku']}.") from None


def _digest(photo: Annotated[str, Path(pattern=r"^[0-9a-f]{64}$")]) -> bytes:
    return bytes.fromhex(photo)


SkuInPath = Annotated[str, Depends(_sku)]
DigestInPath = Annotated[bytes, Depends(_digest)]
ImportName = Annotated[str, Path(alias="id", pattern=r"^[0-9a-f]{32}$")]


def require(service: Service, sku: str) -> Product:
    """Return the product. Raises `Refused` (404) when there is none."""
    product = service.product(sku)
    if product is None:
        raise Refused(404, "not_found", "There is no product of that SKU.")
    return product


def require_photo(service: Service, sku: str) -> None:
    """Return if there is the product, with a photo to compare by. Raises `Refused`: 404, or 409 without a photo."""
    if not service.recognition.gallery.photos_of(require(service, sku).sku):
        raise Refused(409, "no_photo", "The product has no photo to compare by.")


def router(service: Service) -> APIRouter:
    """Return the routes of products."""
    routes = APIRouter(tags=["products"])
    recognition, gallery = service.recognition, service.recognition.gallery

    def shelved(product: Product) -> Shelved:
        return Shelved.on(product, gallery.photos_of(product.sku))

    @routes.get("/products", responses=problems(422))
    def list_products(query: Annotated[ListQuery, Query()]) -> ProductPage:
        """List products by SKU, those that match all conditions."""
        found = gallery.products(query.filter(), query.after, query.limit + 1)
        shown = tuple(found[: query.limit])
        return ProductPage(products=shown, next=shown[-1].sku if len(found) > query.limit else None)

    @routes.get("/products/{sku}", responses=problems(404, 422))
    def get_product(sku: SkuInPath) -> Shelved:
        """Return one product, with the digests of its photos."""
        return shelved(require(service, sku))

    @routes.put(
        "/products/{sku}",
        responses=problems(408, 409, 413, 422, 503) | {201: {"description": "Created", "model": Shelved}},
    )
    def put_product(sku: SkuInPath, fields: Annotated[ProductFields, Body()], response: Response) -> Shelved:
        """Add a product, or replace all its fields. Its photos stay."""
        product = fields.product(sku)
        with service.recognition.changing:
            if service.product(sku) is None:
                response.status_code = 201
            recognition.put(product)
            return shelved(require(service, sku))

    @routes.patch("/products/{sku}", responses=problems(404, 408, 409, 413, 422, 503))
    def change_product(sku: SkuInPath, changes: Annotated[ProductChanges, Body()]) -> Shelved:
        """Change the fields that are given, and no others. null takes a field away."""
        with service.recognition.changing:
            product = changes.applied(require(service, sku))
            recognition.put(product)
            return shelved(require(service, sku))

    @routes.delete(
        "/products/{sku}", status_code=204, response_class=NO_CONTENT, responses=problems(404, 409, 422)
    )
    def remove_product(sku: SkuInPath) -> None:
        """Remove a product with its photos, for good, and the photos that were said to show it."""
        if not service.remove(sku):
            raise Refused(404, "not_found", "There is no product of that SKU.")

    @routes.post(
        "/products/{sku}/photos",
        status_code=201,
        openapi_extra=PHOTO_BODY,
        responses=problems(404, 408, 409, 413, 415, 422, 503),
    )
    def add_photo(sku: SkuInPath, photo: Photo) -> PhotoAdded:
        """Add a reference photo to a product: it is found by it from now on."""
        require(service, sku)
        image = Gallery.reduced(decoded(photo))  # who waits keeps nobody from decoding
        with service.recognition.changing:
            (digest,) = recognition.put(require(service, sku), [image])
        return PhotoAdded(photo=digest.hex())

    @routes.get(
        "/products/{sku}/photos/{photo}",
        response_class=Response,
        responses=problems(404, 422)
        | {
            200: {
                "description": "The photo, as it is stored.",
                "content": {"image/jpeg": {"schema": {"type": "string", "format": "binary"}}},
            }
        },
    )
    def get_photo(sku: SkuInPath, photo: DigestInPath) -> Response:
        """Return a product's photo."""
        found = gallery.photo(photo) if photo in gallery.photos_of(sku) else None
        if found is None:
            raise Refused(404, "not_found", "The product has no such photo.")
        return Response(found, media_type="image/jpeg")

    @routes.delete(
        "/products/{sku}/photos/{photo}",
        status_code=204,
        response_class=NO_CONTENT,
        responses=problems(404, 409, 422),
    )
    def remove_photo(sku: SkuInPath, photo: DigestInPath) -> None:
        """Take a photo from a product."""
        if not recognition.remove_photo(sku, photo):
            raise Refused(404, "not_found", "The product has no such photo.")

    return routes


def imports_router(service: Service) -> APIRouter:
    """Return the routes of imports."""
    routes = APIRouter(tags=["imports"])
    imports = service.imports

    def known(progress: ImportProgress | None) -> ImportProgress:
        if progress is None:
            raise Refused(404, "not_found", "There is no such import.")
        return progress

    @routes.post(
        "/imports",
        status_code=202,
        openapi_extra=LINES_BODY,
        responses=problems(408, 409, 413, 415, 422, 503, 507),
    )
    async def start_import(request: Request) -> ImportProgress:
        """Take in many products: a line each, in JSON, with photos in base64. Ask by the answer's id how far it is.

        One import goes on at once. Lines that can't be used are left out and told.
        """
        if content_type(request) != LINES:
            found = content_type(request)[:60]
            raise Refused(415, "wrong_content_type", f"Content-Type: found {found!r}, expected {LINES}.")
        incoming = await run_in_threadpool(imports.begin)
        try:
            async for part in request.stream():
                await run_in_threadpool(incoming.write, part)
        except BaseException:
            imports.abandon(incoming)
            raise
        return imports.start(incoming)

    @routes.get("/imports/{id}", responses=problems(404, 422))
    def get_import(name: ImportName) -> ImportProgress:
        """Say how far an import is, and which lines were left out."""
        return known(imports.progress(name))

    @routes.post("/imports/{id}/cancel", status_code=202, responses=problems(404, 422))
    def cancel_import(name: ImportName) -> ImportProgress:
        """Have an import end. What it has taken in stays."""
        return known(imports.cancel(name))

    return routes
