"""A product is one, however its SKU is spelt, whichever way it is asked for: REST, gRPC, commands, the page."""

import json

import grpc
import httpx
import pytest
from tests.client.serving.conftest import WAIT, Served, photo, quoted
from typer.testing import CliRunner

from hanse_client import cli
from hanse_client.serving import recognition_pb2 as pb
from hanse_client.serving.page_forms import read_product
from hanse_client.serving.recognition_pb2_grpc import RecognitionStub

COMPOSED, APART = "Caf\u00e9/1", "Cafe\u0301/1"
SHOES = "\u06a9\u0641\u0634\u200c\u0647\u0627"


def command(served: Served, *words: str) -> str:
    done = CliRunner().invoke(cli.app, [*words, "--config", str(served.source), "--json"])
    assert done.exit_code == 0, (done.output, done.exception)
    return done.stdout


def test_one_product_in_two_spellings_is_one_for_all(served: Served, client: httpx.Client) -> None:
    apart, composed = (f"/v1/products/{quoted(sku)}" for sku in (APART, COMPOSED))
    assert (
        client.put(apart, json={"title": SHOES, "attributes": {"gro\u0308\u00dfe": "4"}}).status_code == 201
    )
    assert client.put(composed, json={"title": SHOES}).status_code == 200
    digest = client.post(f"{apart}/photos", **photo(1)).json()["photo"]
    for address in (apart, composed):
        found = client.get(address).json()
        assert (found["sku"], found["title"], found["photos"]) == (COMPOSED, SHOES, [digest])
        assert client.get(f"{address}/photos/{digest}").status_code == 200
    assert client.post(f"{apart}/corrections", **photo(2)).json()["sku"] == COMPOSED
    client.put("/v1/products/other", json={}).raise_for_status()
    client.post("/v1/products/other/photos", **photo(3)).raise_for_status()
    similar = client.get(f"{apart}/similar").json()["matches"]
    assert [each["product"]["sku"] for each in similar] == ["other"]
    suggested = client.get("/v1/suggestions", params={"viewed": APART}).json()["matches"]
    assert [each["product"]["sku"] for each in suggested] == ["other"]
    with grpc.insecure_channel(served.authority) as channel:
        stub, sent = RecognitionStub(channel), (("authorization", f"Bearer {served.token}"),)
        found = stub.Similar(pb.SimilarRequest(sku=APART), metadata=sent, timeout=WAIT)
        assert [each.product.sku for each in found.matches] == ["other"]
        for sku in (APART, COMPOSED):
            stub.PutProduct(
                pb.PutProductRequest(product=pb.Product(sku=sku, title=SHOES)), metadata=sent, timeout=WAIT
            )
    command(served, "products", "update", APART, "-a", "Gr\u00f6\u00dfe=4")
    command(served, "products", "update", COMPOSED, "-a", "Gro\u0308\u00dfe=5")
    shown = json.loads(command(served, "products", "show", APART))
    assert (shown["sku"], shown["attributes"], shown["photos"]) == (
        COMPOSED,
        {"Gr\u00f6\u00dfe": "5"},
        [digest],
    )
    listed = command(served, "products", "list", "-a", "Gro\u0308\u00dfe=5")
    assert [json.loads(line)["sku"] for line in listed.splitlines()] == [COMPOSED]
    typed, errors = read_product({"sku": APART, "title": SHOES})
    assert (typed and typed.sku, errors) == (COMPOSED, {})
    assert command(served, "products", "remove", APART).startswith('{"removed": {')
    assert client.get(composed).status_code == 404
    assert client.get("/v1/corrections").json()["corrections"] == []


@pytest.mark.parametrize(
    "sku", ["a\u200db", "a\u3164b", "\u202eb", " a", "e\u0301" * 65, "e" + "\u0301\u0323" * 2000]
)
def test_a_sku_that_would_look_like_another_is_refused(client: httpx.Client, sku: str) -> None:
    answer = client.put(f"/v1/products/{quoted(sku)}", json={})
    assert answer.status_code == 422 and "sku: expected 1 to 64" in answer.json()["detail"]


def test_a_label_may_have_joiners(client: httpx.Client) -> None:
    made = client.post("/v1/corrections", params={"label": SHOES}, **photo(1))
    assert made.status_code == 201 and made.json()["label"] == SHOES
    assert client.post("/v1/corrections", params={"label": "\u202e"}, **photo(1)).status_code == 422
