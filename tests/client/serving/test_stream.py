"""gRPC, over a real server on loopback: each call, the token, and photos all day over one stream."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from hanse_client.gallery import calibration
from hanse_client.gallery.rejection import Rejection
from hanse_client.gallery.store import Store
from hanse_client.recognition.service import Recognition
from hanse_client.serving import calls, stream
from hanse_client.serving import recognition_pb2 as pb
from hanse_client.serving.recognition_pb2_grpc import RecognitionStub

from .conftest import WAIT, Served, picture, running

Stock = Callable[[int], None]


class Caller:
    """A program of the shop's with a channel and a token."""

    def __init__(self, channel: grpc.Channel, token: str) -> None:
        self._stub = RecognitionStub(channel)
        self._metadata = (("authorization", f"Bearer {token}"),)

    def __call__(self, method: str, request: Any) -> Any:
        return getattr(self._stub, method)(request, metadata=self._metadata, timeout=WAIT)


@pytest.fixture
def call(served: Served) -> Iterator[Caller]:
    with grpc.insecure_channel(served.authority) as channel:
        yield Caller(channel, served.token)


def refused(call: Caller, method: str, request: Any, status: grpc.StatusCode, code: str) -> str:
    with pytest.raises(grpc.RpcError) as caught:
        call(method, request)
    error: Any = caught.value
    assert error.code() is status, error.details()
    assert ("hanse-code", code) in [tuple(pair) for pair in error.trailing_metadata()]
    assert "Traceback" not in error.details()
    return str(error.details())


def test_the_generated_code_is_of_the_proto_file(root: Path, tmp_path: Path) -> None:
    name = "hanse_client/serving/recognition"
    words = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    compiler = [
        sys.executable,
        "-m",
        "grpc_tools.protoc",
        "-I",
        str(root / "client"),
        *words,
        f"{name}.proto",
    ]
    subprocess.run(compiler, check=True, timeout=WAIT)
    for end in ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py"):
        fresh, kept = tmp_path / f"{name}{end}", root / "client" / f"{name}{end}"
        assert fresh.read_text() == kept.read_text(), f"{kept.name}: generate it anew"


def test_classify_and_embed_say_what_rest_says(call: Caller, client: httpx.Client) -> None:
    headers = {"Content-Type": "image/jpeg"}
    rest = client.post("/v1/classify", content=picture(1), headers=headers, params={"top": 2}).json()
    found = call("Classify", pb.ClassifyRequest(photo=picture(1), top=2))
    assert [each.label for each in found.classes] == [each["label"] for each in rest["classes"]]
    assert found.recognizer.hex() == rest["recognizer"] and not found.personal
    vector = call("Embed", pb.EmbedRequest(photo=picture(1)))
    rest = client.post("/v1/embed", content=picture(1), headers=headers).json()
    assert list(vector.vector) == pytest.approx(rest["vector"], abs=1e-5)
    assert vector.embedding.hex() == rest["embedding"]


def test_products_are_put_found_and_removed(call: Caller) -> None:
    for number in range(3):
        product = pb.Product(
            sku=f"S-{number}", title=f"number{number}", price=f"{number}.50", attributes={"n": str(number)}
        )
        assert (
            len(call("PutProduct", pb.PutProductRequest(product=product, photos=[picture(number)])).photos)
            == 1
        )
    found = call("Search", pb.SearchRequest(photo=picture(1), k=2))
    assert [len(found.matches), found.matches[0].product.sku] == [2, "S-1"]
    assert found.matches[0].product.price == "1.50" and found.known and found.matches[0].similarity > 0.9
    where = pb.Filter(price_min="1", price_max="2", attributes={"n": "1"})
    assert [
        match.product.sku for match in call("Search", pb.SearchRequest(photo=picture(0), where=where)).matches
    ] == ["S-1"]
    text = call("Search", pb.SearchRequest(text="number2"))
    assert text.matches[0].product.sku == "S-2" and not text.HasField("known")
    similar = call("Similar", pb.SimilarRequest(sku="S-0", diversity=0.5))
    assert {match.product.sku for match in similar.matches} == {"S-1", "S-2"}
    assert call("RemoveProduct", pb.RemoveProductRequest(sku="S-1")).removed
    assert not call("RemoveProduct", pb.RemoveProductRequest(sku="S-1")).removed


def test_products_are_shown_listed_and_suggested_as_rest_does(
    call: Caller, client: httpx.Client, stock: Stock
) -> None:
    stock(5)
    shown = call("GetProduct", pb.GetProductRequest(sku="S-1"))
    rest = client.get("/v1/products/S-1").json()
    assert (shown.product.title, shown.product.price) == (rest["title"], rest["price"])
    assert [photo.hex() for photo in shown.photos] == rest["photos"]

    first = call("ListProducts", pb.ListProductsRequest(limit=3))
    rest_page = client.get("/v1/products", params={"limit": 3}).json()
    assert [each.sku for each in first.products] == [each["sku"] for each in rest_page["products"]]
    assert first.next == rest_page["next"] == "S-2"
    last = call("ListProducts", pb.ListProductsRequest(limit=3, after=first.next))
    assert [each.sku for each in last.products] == ["S-3", "S-4"] and not last.HasField("next")
    even = call("ListProducts", pb.ListProductsRequest(where=pb.Filter(category="even")))
    assert [each.sku for each in even.products] == ["S-0", "S-2", "S-4"]

    found = call("Suggest", pb.SuggestRequest(viewed=["S-3", "S-0"], k=2))
    rest = client.get("/v1/suggestions", params={"viewed": ["S-3", "S-0"], "k": 2}).json()
    assert [match.product.sku for match in found.matches] == [
        each["product"]["sku"] for each in rest["matches"]
    ]
    assert len(found.matches) == 2
    odd = call("Suggest", pb.SuggestRequest(viewed=["S-3"], where=pb.Filter(category="odd")))
    assert [match.product.sku for match in odd.matches] == ["S-1"]


def test_a_page_of_large_products_ends_where_a_client_would_refuse_it(
    call: Caller, stock: Stock, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock(5)
    every = call("ListProducts", pb.ListProductsRequest())
    size = max(product.ByteSize() for product in every.products)
    for most, pages in ((2 * size, 3), (1, 5)):
        monkeypatch.setattr(calls, "MAX_PAGE_BYTES", most)
        found = [call("ListProducts", pb.ListProductsRequest())]
        while found[-1].HasField("next"):
            found.append(call("ListProducts", pb.ListProductsRequest(after=found[-1].next)))
        assert [each for answer in found for each in answer.products] == list(every.products)
        assert len(found) == pages


def test_similar_products_differ_and_conditions_hold_as_with_rest(
    call: Caller, client: httpx.Client, twins: None
) -> None:
    def skus(answer: Any) -> list[str]:
        return [match.product.sku for match in answer.matches]

    nearest = call("Similar", pb.SimilarRequest(sku="A", k=2))
    first, second = skus(call("Similar", pb.SimilarRequest(sku="A", k=2, diversity=0.9)))
    assert set(skus(nearest)) == {"B", "C"} and first in "BC" and second.startswith("O-")
    rest = client.get("/v1/products/A/similar", params={"k": 2, "diversity": 0.9}).json()["matches"]
    assert [each["product"]["sku"] for each in rest] == [first, second]
    where = pb.Filter(category="others", price_max="5", attributes={"parity": "odd"})
    for answer in (
        call("Similar", pb.SimilarRequest(sku="A", where=where)),
        call("Suggest", pb.SuggestRequest(viewed=["A"], where=where)),
        call("Search", pb.SearchRequest(photo=picture(1), where=where)),
    ):
        assert set(skus(answer)) == {"O-0", "O-2"}
    (answer,) = call("Recognize", iter([pb.Photo(photo=picture(1), where=where)]))
    assert set(skus(answer.recognized.found)) == {"O-0", "O-2"}


def test_corrections_and_status_are_those_of_rest(call: Caller, client: httpx.Client, stock: Stock) -> None:
    stock(1)
    labelled = call("Correct", pb.CorrectRequest(photo=picture(5), label="trail shoe"))
    shelved = call("Correct", pb.CorrectRequest(photo=picture(6), sku="S-0"))
    kept = client.get("/v1/corrections").json()["corrections"]
    assert [(each["number"], each["photo"]) for each in kept] == [
        (made.number, made.photo.hex()) for made in (labelled, shelved)
    ]
    assert [(each["label"], each["sku"]) for each in kept] == [("trail shoe", None), (None, "S-0")]
    status, rest = call("GetStatus", pb.GetStatusRequest()), client.get("/v1/status").json()
    for name in ("version", "dimension", "products", "photos", "corrections", "threshold"):
        assert getattr(status, name) == rest[name], name
    assert (status.recognizer.hex(), status.embedding.hex()) == (rest["recognizer"], rest["embedding"])
    assert (list(status.classes), list(status.personal_labels)) == (rest["classes"], rest["personal_labels"])
    assert not status.HasField("rebuild") and not status.HasField("problem")
    assert not status.rates.HasField("false_accept") and rest["rates"]["false_accept"] is None
    assert (status.products, status.corrections, status.version) == (1, 2, 1)


def test_status_tells_how_often_the_threshold_is_wrong(
    call: Caller, client: httpx.Client, served: Served
) -> None:
    embedding = bytes.fromhex(client.get("/v1/status").json()["embedding"])
    with Store(served.config.gallery_path / "gallery.sqlite") as store, store.write() as db:
        rejection = Rejection(0.6, 0.25, 8, 40, 0.125)
        calibration.store(db, embedding, rejection, calibration.extent(db, embedding))
    status, rest = call("GetStatus", pb.GetStatusRequest()), client.get("/v1/status").json()
    assert status.threshold == rest["threshold"] == 0.6
    told = {name: getattr(status.rates, name) for name in rest["rates"]}
    assert told == rest["rates"]
    assert told == {
        "calibrated": True, "false_accept": 0.25, "impostor": 40, "false_reject": 0.125, "genuine": 8,
    }  # fmt: skip


def test_each_call_of_the_proto_file_is_answered(served: Served) -> None:
    with grpc.insecure_channel(served.authority) as channel:
        for method in pb.DESCRIPTOR.services_by_name["Recognition"].methods:
            assert method.name in vars(stream._Calls), f"{method.name}: in the proto file alone"
            assert hasattr(RecognitionStub(channel), method.name)


@pytest.mark.parametrize(
    ("method", "request_", "status", "code"),
    [
        ("Classify", pb.ClassifyRequest(photo=b"x"), "INVALID_ARGUMENT", "photo_unreadable"),
        ("Classify", pb.ClassifyRequest(photo=picture(1), top=0), "INVALID_ARGUMENT", "invalid"),
        ("Similar", pb.SimilarRequest(sku="S-0", diversity=2), "INVALID_ARGUMENT", "invalid"),
        ("Search", pb.SearchRequest(), "INVALID_ARGUMENT", "invalid"),
        ("Search", pb.SearchRequest(text="x" * 301), "INVALID_ARGUMENT", "invalid"),
        ("Search", pb.SearchRequest(text="x", k=101), "INVALID_ARGUMENT", "invalid"),
        (
            "Search",
            pb.SearchRequest(text="x", where=pb.Filter(price_min="1e9")),
            "INVALID_ARGUMENT",
            "invalid",
        ),
        ("Similar", pb.SimilarRequest(sku="none"), "NOT_FOUND", "not_found"),
        ("Suggest", pb.SuggestRequest(), "INVALID_ARGUMENT", "invalid"),
        ("Suggest", pb.SuggestRequest(viewed=["S"] * 51), "INVALID_ARGUMENT", "invalid"),
        ("Suggest", pb.SuggestRequest(viewed=["S"], k=0), "INVALID_ARGUMENT", "invalid"),
        ("Correct", pb.CorrectRequest(photo=picture(1)), "INVALID_ARGUMENT", "invalid"),
        ("Correct", pb.CorrectRequest(photo=picture(1), label="\u0007"), "INVALID_ARGUMENT", "invalid"),
        ("Correct", pb.CorrectRequest(photo=b"x", label="shoe"), "INVALID_ARGUMENT", "photo_unreadable"),
        ("Correct", pb.CorrectRequest(photo=picture(1), sku="none"), "NOT_FOUND", "not_found"),
        ("GetProduct", pb.GetProductRequest(sku="none"), "NOT_FOUND", "not_found"),
        ("ListProducts", pb.ListProductsRequest(limit=1001), "INVALID_ARGUMENT", "invalid"),
        ("ListProducts", pb.ListProductsRequest(after="x" * 65), "INVALID_ARGUMENT", "invalid"),
        ("PutProduct", pb.PutProductRequest(), "INVALID_ARGUMENT", "invalid"),
        (
            "PutProduct",
            pb.PutProductRequest(product=pb.Product(sku="A", currency="€")),
            "INVALID_ARGUMENT",
            "invalid",
        ),
    ],
)
def test_each_mistake_has_its_status(
    call: Caller, method: str, request_: Any, status: str, code: str
) -> None:
    assert refused(call, method, request_, grpc.StatusCode[status], code)


def test_more_photos_than_a_product_has_are_refused_before_any_is_decoded(call: Caller) -> None:
    request = pb.PutProductRequest(product=pb.Product(sku="A"), photos=[b"no photo"] * 65)
    assert "photos" in refused(call, "PutProduct", request, grpc.StatusCode.INVALID_ARGUMENT, "invalid")


@pytest.mark.parametrize("token", ["", "x" * 43])
def test_without_the_token_nothing_is_answered_but_health(served: Served, token: str) -> None:
    with grpc.insecure_channel(served.authority) as channel:
        stub, metadata = RecognitionStub(channel), (("authorization", f"Bearer {token}"),)
        calls = (
            lambda: stub.Embed(pb.EmbedRequest(photo=picture(1)), metadata=metadata, timeout=WAIT),
            lambda: stub.RemoveProduct(pb.RemoveProductRequest(sku="A"), timeout=WAIT),
            # A stream that never says anything is refused, too.
            lambda: next(stub.Recognize(iter(threading.Event().wait, None), metadata=metadata, timeout=WAIT)),
        )
        for each in calls:
            with pytest.raises(grpc.RpcError) as caught:
                each()
            error: Any = caught.value
            assert error.code() is grpc.StatusCode.UNAUTHENTICATED
        asked = health_pb2_grpc.HealthStub(channel)
        # Whoever waits for news of it takes room for as long as they like.
        with pytest.raises(grpc.RpcError) as caught:
            next(asked.Watch(health_pb2.HealthCheckRequest(service=""), timeout=WAIT))
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        for name in ("", stream.SERVICE):
            found = asked.Check(health_pb2.HealthCheckRequest(service=name), timeout=WAIT)
            assert found.status == health_pb2.HealthCheckResponse.SERVING


def test_a_stream_answers_in_order_and_outlives_bad_photos(
    call: Caller, served: Served, client: httpx.Client
) -> None:
    client.put("/v1/products/S", json={}).raise_for_status()
    client.post(
        "/v1/products/S/photos", content=picture(7), headers={"Content-Type": "image/jpeg"}
    ).raise_for_status()
    photos = [
        pb.Photo(id=str(number), photo=b"broken" if number % 5 == 3 else picture(number), k=1, top=1)
        for number in range(40)
    ]
    answers = list(call("Recognize", iter(photos)))
    assert [answer.id for answer in answers] == [photo.id for photo in photos]
    for number, answer in enumerate(answers):
        if number % 5 == 3:
            assert answer.problem.code == "photo_unreadable" and "no image" in answer.problem.message
        else:
            assert len(answer.recognized.classification.classes) == 1
            assert answer.recognized.found.matches[0].product.sku == "S"
    assert answers[7].recognized.found.matches[0].similarity == pytest.approx(1, abs=1e-3)


def test_products_are_imported_by_a_stream_and_bad_ones_told(call: Caller, client: httpx.Client) -> None:
    products = [
        pb.PutProductRequest(product=pb.Product(sku="I-1", price="1.50"), photos=[picture(1), picture(2)]),
        pb.PutProductRequest(product=pb.Product(sku="I-2", price="dear")),
        pb.PutProductRequest(product=pb.Product(sku="I-3"), photos=[b"broken"]),
        pb.PutProductRequest(product=pb.Product(sku="I-4")),
    ]
    answers = list(call("ImportProducts", iter(products)))
    assert [answer.sku for answer in answers] == ["I-1", "I-2", "I-3", "I-4"]
    assert len(answers[0].done.photos) == 2 and answers[3].HasField("done")
    assert [answer.problem.code for answer in answers[1:3]] == ["invalid", "photo_unreadable"]
    kept = client.get("/v1/products").json()["products"]
    assert [product["sku"] for product in kept] == ["I-1", "I-4"]


def test_answers_come_while_the_sender_still_waits(call: Caller) -> None:
    go_on = threading.Event()

    def slow() -> Iterator[pb.Photo]:
        yield pb.Photo(id="first", photo=picture(1))
        assert go_on.wait(WAIT), "the first answer did not come before the second photo"
        yield pb.Photo(id="second", photo=picture(2))

    answers = call("Recognize", slow())
    assert next(answers).id == "first"
    go_on.set()
    assert [answer.id for answer in answers] == ["second"]


def test_a_sender_that_is_faster_than_the_recognizer_is_held_back(
    call: Caller, wait_until: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, taken, sent = threading.Event(), [], 0
    recognize = Recognition.recognize

    def slow(*words: Any, **options: Any) -> Any:
        taken.append(None)
        assert go_on.wait(WAIT)
        return recognize(*words, **options)

    monkeypatch.setattr(Recognition, "recognize", slow)
    large = picture(1, "BMP", size=600)  # a megabyte, so that the connection's own buffers are soon full

    def many() -> Iterator[pb.Photo]:
        nonlocal sent
        for number in range(60):
            sent = number + 1
            yield pb.Photo(id=str(number), photo=large)

    answers = call("Recognize", many())
    wait_until("the first photos", lambda: len(taken) == stream.IN_FLIGHT)
    before = -1
    while before != sent:  # until it stands still
        before = sent
        time.sleep(0.3)
    assert len(taken) == stream.IN_FLIGHT and sent < 50
    go_on.set()
    assert [answer.id for answer in answers] == [str(number) for number in range(60)]


def test_streams_are_bounded_and_given_back(tmp_path: Path) -> None:
    with running(tmp_path, streams=1) as served, grpc.insecure_channel(served.authority) as channel:
        call = Caller(channel, served.token)
        over = threading.Event()

        def open_() -> Iterator[pb.Photo]:
            yield pb.Photo(id="1", photo=picture(1))
            over.wait(WAIT)

        first = call("Recognize", open_())
        assert next(first).id == "1"
        with pytest.raises(grpc.RpcError) as caught:
            next(call("Recognize", iter([pb.Photo(photo=picture(1))])))
        error: Any = caught.value
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        first.cancel()
        over.set()
        for _ in range(200):
            try:
                assert len(list(call("Recognize", iter([pb.Photo(photo=picture(1))])))) == 1
                break
            except grpc.RpcError:
                time.sleep(0.05)
        else:
            raise AssertionError("the stream that ended still has its place")


def test_a_stream_that_is_open_at_the_end_is_told_to_connect_again(tmp_path: Path) -> None:
    over = threading.Event()

    def open_() -> Iterator[pb.Photo]:
        yield pb.Photo(id="1", photo=picture(1))
        over.wait(WAIT)

    with running(tmp_path) as served:
        channel = grpc.insecure_channel(served.authority)
        answers = Caller(channel, served.token)("Recognize", open_())
        assert next(answers).id == "1"
    over.set()
    with pytest.raises(grpc.RpcError) as caught:
        next(answers)
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.UNAVAILABLE and "Connect again" in error.details()
    channel.close()
