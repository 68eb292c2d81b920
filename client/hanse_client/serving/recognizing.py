"""REST's questions about photos: classify, embed, search, similar, correct, status.

curl --data-binary @shoe.jpg -H 'Content-Type: image/jpeg' -H "$TOKEN" http://127.0.0.1:8766/v1/search?k=3
"""

from typing import Annotated

from fastapi import APIRouter, Query

from hanse_client.applications.similar import similar_products
from hanse_client.gallery.gallery import Gallery
from hanse_client.serving.answers import (
    Classes,
    Corrected,
    CorrectionPage,
    Listed,
    Matched,
    ServiceStatus,
    Suggested,
    Vector,
)
from hanse_client.serving.catalogue import DigestInPath, SkuInPath, require, require_photo
from hanse_client.serving.openapi import NO_CONTENT, problems
from hanse_client.serving.photos import PHOTO_BODY, Photo, decoded
from hanse_client.serving.problems import Refused, without_folders
from hanse_client.serving.schemas import (
    ClassifyQuery,
    CorrectionQuery,
    CorrectionsQuery,
    SearchQuery,
    SimilarQuery,
    SuggestionsQuery,
    TextQuery,
)
from hanse_client.serving.service import Service


def router(service: Service) -> APIRouter:
    """Return the routes."""
    routes = APIRouter(tags=["recognition"])
    recognition, corrections = service.recognition, service.corrections
    of_photo = problems(408, 413, 415, 422, 503)

    @routes.get("/status", responses=problems())
    def status() -> ServiceStatus:
        """Say what serves now: recognizer, classes, how many products, and what is being rebuilt."""
        told = ServiceStatus.of(recognition.status(), corrections.count())
        return told.model_copy(update={"problem": without_folders(told.problem or "") or None})

    @routes.post("/classify", openapi_extra=PHOTO_BODY, responses=of_photo)
    def classify(photo: Photo, query: Annotated[ClassifyQuery, Query()]) -> Classes:
        """Say what a photo shows: the league's classes, best first."""
        return Classes.of(recognition.classify(decoded(photo), query.top))

    @routes.post("/embed", openapi_extra=PHOTO_BODY, responses=of_photo)
    def embed(photo: Photo) -> Vector:
        """Return a photo as a vector of length 1; alike products have vectors with a large scalar product."""
        return Vector.of(recognition.embed(decoded(photo)))

    @routes.post("/search", openapi_extra=PHOTO_BODY, responses=of_photo)
    def search(photo: Photo, query: Annotated[SearchQuery, Query()]) -> Listed:
        """Find the products that look most like a photo; `text` puts those first whose titles fit, too."""
        where = query.filter()
        return Listed.of(recognition.search(decoded(photo), text=query.text, where=where, k=query.k))

    @routes.get("/search", responses=problems(422, 503))
    def search_text(query: Annotated[TextQuery, Query()]) -> Listed:
        """Find the products whose titles and attributes are most like a text."""
        return Listed.of(recognition.search(text=query.text, where=query.filter(), k=query.k))

    @routes.get("/products/{sku}/similar", responses=problems(404, 409, 422, 503))
    def similar(sku: SkuInPath, query: Annotated[SimilarQuery, Query()]) -> Listed:
        """Find the products that look most like a product, itself left out."""
        require_photo(service, sku)
        where = query.filter()
        found = similar_products(recognition, sku, k=query.k, where=where, diversity=query.diversity)
        return Listed.of(found)

    @routes.get("/suggestions", responses=problems(409, 422, 503))
    def suggest(query: Annotated[SuggestionsQuery, Query()]) -> Suggested:
        """Find products like those that a shopper looked at lately. What was looked at is not kept."""
        found = service.suggest(query.viewed, query.k, query.filter())
        return Suggested(matches=tuple(map(Matched.of, found)))

    @routes.post(
        "/corrections", status_code=201, openapi_extra=PHOTO_BODY, responses=of_photo | problems(409)
    )
    def correct(photo: Photo, query: Annotated[CorrectionQuery, Query()]) -> Corrected:
        """Say what a photo shows, in a few words, where the recognizer was wrong or not fine enough.

        It stays on this machine, and is what the shop's own recognizer learns from.
        """
        return Corrected.of(corrections.add(Gallery.prepare(decoded(photo)), label=query.label))

    @routes.post(
        "/products/{sku}/corrections",
        status_code=201,
        openapi_extra=PHOTO_BODY,
        responses=of_photo | problems(404, 409),
    )
    def correct_product(sku: SkuInPath, photo: Photo) -> Corrected:
        """Say that a photo shows this product, where the recognizer found another or none."""
        require(service, sku)
        jpeg = Gallery.prepare(decoded(photo))
        with service.recognition.changing:
            return Corrected.of(corrections.add(jpeg, sku=require(service, sku).sku))

    @routes.get("/corrections", responses=problems(422))
    def list_corrections(query: Annotated[CorrectionsQuery, Query()]) -> CorrectionPage:
        """List what was said of photos, the last word on each."""
        found = corrections.list(query.after, query.limit + 1)
        shown = tuple(Corrected.of(each) for each in found[: query.limit])
        return CorrectionPage(corrections=shown, next=shown[-1].number if len(found) > query.limit else None)

    @routes.delete(
        "/corrections/{photo}", status_code=204, response_class=NO_CONTENT, responses=problems(404, 422)
    )
    def forget(photo: DigestInPath) -> None:
        """Forget a photo that was corrected, and all that was said of it."""
        if not corrections.remove(photo):
            raise Refused(404, "not_found", "There is no correction of that photo.")

    return routes
