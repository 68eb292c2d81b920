"""What each gRPC call but the streams answers, from a message to a message: the core that REST asks, too.

    found = search(service, pb.SearchRequest(photo=data, k=3))

None of it knows gRPC. All of them raise `Refused` and what the core raises, which `stream` tells as a status.
"""

from typing import Final

from hanse_client.applications.similar import similar_products
from hanse_client.gallery.gallery import Gallery
from hanse_client.serving import recognition_pb2 as pb
from hanse_client.serving.catalogue import require, require_photo
from hanse_client.serving.messages import (
    classification_message,
    conditions,
    found_message,
    match_message,
    number,
    product_message,
    product_of,
    rates_message,
)
from hanse_client.serving.photos import decoded, references
from hanse_client.serving.problems import Refused, without_folders
from hanse_client.serving.schemas import MAX_RESULTS, CorrectionQuery, ListQuery, SuggestionsQuery, valid
from hanse_client.serving.service import Service

MAX_TOP: Final = 1024
"""How many classes one answer has at most."""

MAX_PAGE: Final = 1000
"""How many products a list has at most."""

MAX_PAGE_BYTES: Final = 3 << 20
"""A page of products ends before it has more bytes: gRPC's clients take 4 MiB unless told otherwise."""


def classify(service: Service, request: pb.ClassifyRequest) -> pb.Classification:
    """Say what is on a photo."""
    top = number(request, "top", 5, MAX_TOP)
    return classification_message(service.recognition.classify(decoded(request.photo), top))


def embed(service: Service, request: pb.EmbedRequest) -> pb.Embedding:
    """Return a photo's vector."""
    found = service.recognition.embed(decoded(request.photo))
    return pb.Embedding(vector=found.vector.tolist(), embedding=found.embedding)


def search(service: Service, request: pb.SearchRequest) -> pb.Found:
    """Find products by a photo, a text, or both."""
    image = decoded(request.photo) if request.HasField("photo") else None
    text = request.text if request.HasField("text") else None
    if image is None and not text:
        raise Refused(422, "invalid", "photo, text: expected one of them.")
    if text is not None and len(text) > 300:
        raise Refused(422, "invalid", "text: expected at most 300 characters.")
    k = number(request, "k", 10, MAX_RESULTS)
    return found_message(service.recognition.search(image, text=text, where=conditions(request.where), k=k))


def similar(service: Service, request: pb.SimilarRequest) -> pb.Found:
    """Find products like a product."""
    if not 0 <= request.diversity <= 1:
        raise Refused(422, "invalid", "diversity: expected 0 to 1.")
    require_photo(service, request.sku)
    k, where = number(request, "k", 10, MAX_RESULTS), conditions(request.where)
    found = similar_products(service.recognition, request.sku, k=k, where=where, diversity=request.diversity)
    return found_message(found)


def suggest(service: Service, request: pb.SuggestRequest) -> pb.Suggestions:
    """Find products like those that a shopper looked at lately."""
    k, where = number(request, "k", 10, MAX_RESULTS), conditions(request.where)
    viewed = valid(SuggestionsQuery, viewed=list(request.viewed)).viewed
    return pb.Suggestions(matches=map(match_message, service.suggest(viewed, k, where)))


def correct(service: Service, request: pb.CorrectRequest) -> pb.Correction:
    """Write down what a photo shows."""
    shows = request.WhichOneof("shows")
    if shows is None:
        raise Refused(422, "invalid", "label, sku: expected one of them.")
    if shows == "label":
        label = valid(CorrectionQuery, label=request.label).label
        made = service.corrections.add(Gallery.prepare(decoded(request.photo)), label=label)
    else:
        require(service, request.sku)
        jpeg = Gallery.prepare(decoded(request.photo))
        with service.recognition.changing:
            made = service.corrections.add(jpeg, sku=require(service, request.sku).sku)
    return pb.Correction(number=made.number, photo=made.photo)


def get_status(service: Service, request: pb.GetStatusRequest) -> pb.Status:
    """Say what serves now."""
    status = service.recognition.status()
    coming = status.rebuild
    return pb.Status(
        recognizer=status.recognizer,
        version=status.version,
        embedding=status.embedding,
        dimension=status.dimension,
        classes=status.classes,
        personal_labels=status.personal_labels,
        products=status.products,
        photos=status.photos,
        corrections=service.corrections.count(),
        threshold=status.threshold,
        rebuild=None if coming is None else pb.Rebuild(done=coming.done, total=coming.total),
        problem=without_folders(status.problem or "") or None,
        rates=rates_message(status.rejection),
    )


def get_product(service: Service, request: pb.GetProductRequest) -> pb.Shelved:
    """Return one product, with the digests of its photos."""
    product = require(service, request.sku)
    photos = service.recognition.gallery.photos_of(product.sku)
    return pb.Shelved(product=product_message(product), photos=photos)


def list_products(service: Service, request: pb.ListProductsRequest) -> pb.ProductPage:
    """List products by SKU."""
    limit, after = number(request, "limit", 100, MAX_PAGE), valid(ListQuery, after=request.after).after
    found = service.recognition.gallery.products(conditions(request.where), after, limit + 1)
    listed: list[pb.Product] = []
    left = MAX_PAGE_BYTES
    for message in map(product_message, found[:limit]):
        left -= message.ByteSize()
        if listed and left < 0:
            break
        listed.append(message)
    following = listed[-1].sku if len(listed) < len(found) else None
    return pb.ProductPage(products=listed, next=following)


def put_product(service: Service, request: pb.PutProductRequest) -> pb.PutProductReply:
    """Add or replace a product, and add photos."""
    product = product_of(request.product)
    images = references(request.photos)
    with service.recognition.changing:
        return pb.PutProductReply(photos=service.recognition.put(product, images))


def remove_product(service: Service, request: pb.RemoveProductRequest) -> pb.RemoveProductReply:
    """Remove a product."""
    return pb.RemoveProductReply(removed=service.remove(request.sku))
