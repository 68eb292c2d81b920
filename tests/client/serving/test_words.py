"""What REST and gRPC say of a wrong product, and of one without a photo: words, and what to do."""

import json
from typing import Any

import grpc
import httpx
import pytest

from hanse_client.gallery.faults import EXPECTED
from hanse_client.serving import recognition_pb2 as pb
from hanse_client.serving.recognition_pb2_grpc import RecognitionStub

from .conftest import WAIT, Served, photo

CATEGORY = "category: found '', expected 1 to 128 characters in one line."
CURRENCY = "currency: found 'EURO', expected three capital letters, such as EUR."


def called(served: Served, method: str, request: Any) -> grpc.RpcError:
    metadata = (("authorization", f"Bearer {served.token}"),)
    with grpc.insecure_channel(served.authority) as channel, pytest.raises(grpc.RpcError) as caught:
        getattr(RecognitionStub(channel), method)(request, metadata=metadata, timeout=WAIT)
    return caught.value


@pytest.mark.parametrize(
    ("method", "path", "body", "detail"),
    [
        ("PUT", "/v1/products/A", {"currency": "EURO"}, CURRENCY),
        ("PUT", "/v1/products/A", {"price": "1,5"}, f"price: found '1,5', expected {EXPECTED['price']}."),
        ("PUT", "/v1/products/A", {"price": True}, f"price: found true, expected {EXPECTED['price']}."),
        ("PUT", "/v1/products/A", {"titel": "x"}, "titel: there is no such field, check how it is spelt."),
        (
            "PUT",
            "/v1/products/A",
            {"title": "a\nb", "category": ""},
            f"title: found 'a\\nb', expected one line of printable characters; {CATEGORY}",
        ),
        (
            "GET",
            "/v1/products?price_min=dear",
            None,
            f"price_min: found 'dear', expected {EXPECTED['price']}.",
        ),
        (
            "GET",
            "/v1/products?attribute=size",
            None,
            f"attribute.0: found 'size', expected {EXPECTED['attribute']}.",
        ),
    ],
)
def test_rest_says_it_in_words(client: httpx.Client, method: str, path: str, body: Any, detail: str) -> None:
    answer = client.request(method, path, json=body)
    assert (answer.status_code, answer.json()["code"], answer.json()["detail"]) == (422, "invalid", detail)


def test_an_imports_line_is_told_in_words(client: httpx.Client) -> None:
    line = json.dumps({"sku": "A", "currency": "EURO"})
    kind = {"Content-Type": "application/x-ndjson"}
    found = client.post("/v1/imports", content=line, headers=kind).json()
    while found["state"] == "running":
        found = client.get(f"/v1/imports/{found['id']}").json()
    assert found["faults"] == [{"line": 1, "message": CURRENCY}]


def test_grpc_says_it_in_words(served: Served) -> None:
    wrong = called(served, "PutProduct", pb.PutProductRequest(product=pb.Product(sku="A", currency="EURO")))
    assert (wrong.code(), wrong.details()) == (grpc.StatusCode.INVALID_ARGUMENT, CURRENCY)
    wrong = called(served, "ListProducts", pb.ListProductsRequest(where=pb.Filter(price_max="1,5")))
    assert wrong.details() == f"price_max: found '1,5', expected {EXPECTED['price']}."


def test_of_a_product_without_a_photo_nothing_is_similar_and_the_help_says_why(
    client: httpx.Client, served: Served
) -> None:
    client.put("/v1/products/A", json={}).raise_for_status()
    client.put("/v1/products/B", json={}).raise_for_status()
    client.post("/v1/products/B/photos", **photo(1)).raise_for_status()
    answer = client.get("/v1/products/A/similar")
    assert (answer.status_code, answer.json()["code"]) == (409, "no_photo")
    assert answer.json()["detail"] == "The product has no photo to compare by."
    assert "/v1/products/SKU/photos" in answer.json()["help"] and "disk" not in answer.json()["help"]
    refused = called(served, "Similar", pb.SimilarRequest(sku="A"))
    assert refused.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert ("hanse-code", "no_photo") in [tuple(pair) for pair in refused.trailing_metadata()]
    client.post("/v1/products/A/photos", **photo(2)).raise_for_status()
    assert client.get("/v1/products/A/similar").json()["matches"][0]["product"]["sku"] == "B"
