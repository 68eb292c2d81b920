"""REST, over a real server on loopback: each address, what it answers, and each way to get it wrong."""

import base64
import hashlib
import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from hanse_client.serving import photos
from hanse_client.serving.photos import Room

from .conftest import Served, photo, picture, quoted, running

Stock = Callable[[int], None]


def problem(answer: httpx.Response, status: int, code: str) -> str:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    found = answer.json()
    assert found["status"] == status and found["code"] == code and found["help"]
    assert "Traceback" not in answer.text and ".py" not in answer.text
    return str(found["detail"])


def test_it_says_what_serves(client: httpx.Client, served: Served, stock: Stock) -> None:
    stock(2)
    found = client.get("/v1/status").json()
    assert found["classes"] == ["shirt", "shoe", "bag"] and found["version"] == 1
    assert (found["products"], found["photos"], found["corrections"]) == (2, 2, 0)
    assert found["problem"] is None
    assert found["rates"].keys() == {"calibrated", "false_accept", "impostor", "false_reject", "genuine"}
    assert client.get("/health").json() == {"ready": True}
    assert client.get("/ready").status_code == 200


def test_it_tells_its_owner_what_is_served_and_where(served: Served) -> None:
    told = "\n".join(served.told)
    assert f"{served.url}/v1 (REST)" in told and f"{served.authority} (gRPC)" in told
    assert "this machine alone" in told and "version 1, 3 classes" in told
    assert f"{served.url}/?token={served.token}" in told


def test_where_others_read_it_the_token_is_not_told(tmp_path: Path) -> None:
    with running(tmp_path, private=False) as served:
        told = "\n".join(served.told)
        assert served.token not in told
        assert f"{served.url}/?token=TOKEN, with what stands in {served.config.state / 'serve.token'}" in told


def test_the_page_is_beside_it_and_needs_the_token_too(served: Served) -> None:
    with httpx.Client(base_url=served.url) as visitor:
        assert visitor.get("/").status_code == 403
        assert visitor.get("/", params={"token": served.token}).status_code == 200
        assert visitor.get("/").status_code == 200
        assert visitor.get("/v1/status").status_code == 401, "the page's cookie does not open REST"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_classify_gives_classes_best_first(client: httpx.Client, kind: str) -> None:
    found = client.post("/v1/classify", params={"top": 2}, **photo(1, kind)).json()
    shares = [each["probability"] for each in found["classes"]]
    assert len(shares) == 2 and shares == sorted(shares, reverse=True)
    assert found["personal"] is None and len(found["recognizer"]) == 64
    everything = client.post("/v1/classify", **photo(1, kind)).json()["classes"]
    assert sum(each["probability"] for each in everything) == pytest.approx(1)


def test_embed_gives_a_vector_of_length_one(client: httpx.Client) -> None:
    found = client.post("/v1/embed", **photo(1)).json()
    assert sum(number**2 for number in found["vector"]) == pytest.approx(1, abs=1e-4)
    assert len(found["embedding"]) == 64


def test_a_photo_finds_its_product(client: httpx.Client, stock: Stock) -> None:
    stock(4)
    for number in range(4):
        found = client.post("/v1/search", params={"k": 3}, **photo(number)).json()
        assert [len(found["matches"]), found["matches"][0]["product"]["sku"]] == [3, f"S-{number}"]
        assert found["known"] is True and found["matches"][0]["similarity"] > found["threshold"]


def test_conditions_hold_of_what_is_found(client: httpx.Client, stock: Stock) -> None:
    stock(4)
    params = {"category": "odd", "price_min": "2"}
    found = client.post("/v1/search", params=params, **photo(0)).json()
    assert [match["product"]["sku"] for match in found["matches"]] == ["S-3"]
    client.put("/v1/products/S-2", json={"attributes": {"size": "4:2", "color": "red"}}).raise_for_status()
    params = {"attribute": ["size:4:2", "color:red"]}  # type: ignore[dict-item]
    found = client.post("/v1/search", params=params, **photo(0)).json()
    assert [match["product"]["sku"] for match in found["matches"]] == ["S-2"]


def test_a_text_finds_titles_alone_and_beside_a_photo(client: httpx.Client, stock: Stock) -> None:
    stock(4)
    found = client.get("/v1/search", params={"text": "number2"}).json()
    assert found["matches"][0]["product"]["sku"] == "S-2" and found["known"] is None
    both = client.post("/v1/search", params={"text": "number2"}, **photo(2)).json()
    assert both["matches"][0]["product"]["sku"] == "S-2"


def test_similar_leaves_the_product_itself_out(client: httpx.Client, stock: Stock) -> None:
    stock(4)
    found = client.get("/v1/products/S-1/similar", params={"k": 2}).json()
    assert len(found["matches"]) == 2
    assert "S-1" not in {match["product"]["sku"] for match in found["matches"]}
    mixed = client.get("/v1/products/S-1/similar", params={"k": 2, "diversity": 0.9}).json()
    assert len(mixed["matches"]) == 2 and mixed["matches"][0] == found["matches"][0]
    problem(client.get("/v1/products/S-1/similar", params={"diversity": 1.1}), 422, "invalid")
    problem(client.get("/v1/products/S-9/similar"), 404, "not_found")


def skus(answer: httpx.Response) -> list[str]:
    return [match["product"]["sku"] for match in answer.raise_for_status().json()["matches"]]


def test_similar_products_differ_from_one_another_as_far_as_is_asked(
    client: httpx.Client, twins: None
) -> None:
    def similar(diversity: float) -> list[str]:
        params = {"k": 2, "diversity": diversity}
        return skus(client.get("/v1/products/A/similar", params=params))

    assert set(similar(0)) == {"B", "C"}
    first, second = similar(0.9)
    assert first in "BC" and second.startswith("O-")


FILTERS: list[tuple[dict[str, str], set[str]]] = [
    ({"category": "others"}, {"O-0", "O-1", "O-2", "O-3", "O-4"}),
    ({"price_min": "4"}, {"O-1", "O-2", "O-3", "O-4"}),
    ({"price_max": "4"}, {"B", "C", "O-0", "O-1"}),
    ({"attribute": "parity:odd"}, {"B", "O-0", "O-2", "O-4"}),
    ({"category": "others", "price_max": "5", "attribute": "parity:odd"}, {"O-0", "O-2"}),
    ({"category": "hats"}, set()),
]
"""Conditions, and the products of `twins` but A of which they hold."""


@pytest.mark.parametrize(("where", "expected"), FILTERS)
def test_conditions_hold_of_all_that_is_suggested_or_similar(
    client: httpx.Client, twins: None, where: dict[str, str], expected: set[str]
) -> None:
    assert set(skus(client.get("/v1/suggestions", params={"viewed": "A"} | where))) == expected
    assert set(skus(client.get("/v1/products/A/similar", params=where))) == expected
    everything = skus(client.post("/v1/search", params=where, **photo(1)))
    assert set(everything) - {"A"} == expected


def test_what_was_viewed_last_counts_most(client: httpx.Client, twins: None) -> None:
    """Of two products viewed, the first one named is the one viewed last."""
    client.put("/v1/products/P", json={}).raise_for_status()
    client.post("/v1/products/P/photos", **photo(12, "PNG")).raise_for_status()  # looks like O-2
    for viewed, expected in ((["A", "P"], "BC"), (["P", "A"], ["O-2"])):
        found = skus(client.get("/v1/suggestions", params={"viewed": viewed, "k": 1}))
        assert found[0] in expected, viewed


def test_with_a_product_goes_what_was_said_to_show_it(client: httpx.Client, stock: Stock) -> None:
    stock(2)
    client.post("/v1/products/S-1/corrections", **photo(7)).raise_for_status()
    client.post("/v1/corrections", params={"label": "clog"}, **photo(8)).raise_for_status()
    assert client.delete("/v1/products/S-1").status_code == 204
    assert [each["label"] for each in client.get("/v1/corrections").json()["corrections"]] == ["clog"]


def test_suggestions_are_like_what_was_viewed_and_not_that_itself(client: httpx.Client, stock: Stock) -> None:
    stock(5)
    found = client.get("/v1/suggestions", params={"viewed": ["S-1", "S-3", "gone"], "k": 2}).json()
    assert len(found["matches"]) == 2
    assert not {match["product"]["sku"] for match in found["matches"]} & {"S-1", "S-3"}
    nearest = client.get("/v1/products/S-1/similar", params={"k": 1}).json()["matches"][0]
    found = client.get("/v1/suggestions", params={"viewed": "S-1", "k": 1}).json()
    assert found["matches"][0]["product"] == nearest["product"]
    problem(client.get("/v1/suggestions"), 422, "invalid")
    problem(client.get("/v1/suggestions", params={"viewed": ["x"] * 51}), 422, "invalid")


def test_a_product_is_put_changed_and_removed(client: httpx.Client) -> None:
    fields = {"title": "Trail shoe", "price": "59.90", "currency": "EUR", "attributes": {"size": "42"}}
    made = client.put("/v1/products/A-17", json=fields)
    assert made.status_code == 201 and made.json() == fields | {
        "sku": "A-17",
        "category": None,
        "photos": [],
    }
    assert client.put("/v1/products/A-17", json=fields).status_code == 200
    changed = client.patch("/v1/products/A-17", json={"price": 49.9, "currency": None}).json()
    assert changed["price"] == "49.90" and changed["currency"] is None and changed["title"] == "Trail shoe"
    assert client.get("/v1/products/A-17").json() == changed
    assert client.delete("/v1/products/A-17").status_code == 204
    problem(client.delete("/v1/products/A-17"), 404, "not_found")
    problem(client.get("/v1/products/A-17"), 404, "not_found")
    problem(client.patch("/v1/products/A-17", json={}), 404, "not_found")


@pytest.mark.parametrize("sku", ["A/17", "A%2F17", "100%", "ä ö", "a?b#c", "…"])
def test_any_sku_has_an_address(client: httpx.Client, sku: str) -> None:
    client.put(f"/v1/products/{quoted(sku)}", json={}).raise_for_status()
    assert [each["sku"] for each in client.get("/v1/products").json()["products"]] == [sku]
    assert client.get(f"/v1/products/{quoted(sku)}").json()["sku"] == sku


def test_photos_of_a_product_come_and_go(client: httpx.Client) -> None:
    client.put("/v1/products/A", json={}).raise_for_status()
    digest = client.post("/v1/products/A/photos", **photo(1)).json()["photo"]
    assert client.get("/v1/products/A").json()["photos"] == [digest]
    stored = client.get(f"/v1/products/A/photos/{digest}")
    assert stored.headers["content-type"] == "image/jpeg"
    assert hashlib.sha256(stored.content).hexdigest() == digest
    assert Image.open(io.BytesIO(stored.content)).size == (48, 48)
    assert client.post("/v1/search", **photo(1)).json()["matches"]
    assert client.delete(f"/v1/products/A/photos/{digest}").status_code == 204
    problem(client.delete(f"/v1/products/A/photos/{digest}"), 404, "not_found")
    problem(client.get(f"/v1/products/A/photos/{digest}"), 404, "not_found")
    assert not client.post("/v1/search", **photo(1)).json()["matches"]
    problem(client.post("/v1/products/B/photos", **photo(1)), 404, "not_found")


def test_products_are_listed_page_by_page(client: httpx.Client, stock: Stock) -> None:
    stock(5)
    found: list[str] = []
    after: str | None = ""
    while after is not None:
        page = client.get("/v1/products", params={"after": after, "limit": 2}).json()
        found += [each["sku"] for each in page["products"]]
        after = page["next"]
    assert found == [f"S-{number}" for number in range(5)]
    odd = client.get("/v1/products", params={"category": "odd"}).json()["products"]
    assert [each["sku"] for each in odd] == ["S-1", "S-3"]


def done(client: httpx.Client, started: httpx.Response) -> dict[str, Any]:
    assert started.status_code == 202, started.text
    until = time.monotonic() + 60
    while time.monotonic() < until:
        found: dict[str, Any] = client.get(f"/v1/imports/{started.json()['id']}").json()
        if found["state"] != "running":
            return found
        time.sleep(0.02)
    raise AssertionError(found)


def line(sku: str, *photos: bytes, **fields: Any) -> bytes:
    coded = [base64.b64encode(each).decode() for each in photos]
    return json.dumps({"sku": sku, "photos": coded} | fields).encode() + b"\n"


NDJSON = {"Content-Type": "application/x-ndjson"}


def test_an_import_takes_in_what_is_right_and_tells_what_is_not(client: httpx.Client) -> None:
    lines = [
        line("A", picture(1), title="one", price=3.5),
        b"\n",
        b"{not json}\n",
        line("B", b"no photo"),
        line("C", picture(2), picture(3)),
        line("D", price=-1),
        line("E\nF"),
        line("G").rstrip(b"\n"),
    ]
    found = done(client, client.post("/v1/imports", content=b"".join(lines), headers=NDJSON))
    assert (found["state"], found["lines"], found["done"], found["failed"]) == ("done", 8, 8, 4)
    assert [fault["line"] for fault in found["faults"]] == [3, 4, 6, 7]
    assert "no image" in found["faults"][1]["message"] and "price" in found["faults"][2]["message"]
    skus = [each["sku"] for each in client.get("/v1/products").json()["products"]]
    assert skus == ["A", "C", "G"]
    assert len(client.get("/v1/products/C").json()["photos"]) == 2
    assert client.post("/v1/search", **photo(1)).json()["matches"][0]["product"]["sku"] == "A"


def test_of_a_lines_photos_one_is_large_at_a_time(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(photos, "ROOM", Room(pixels=900 * 900, seconds=0.05))
    many = line("A", *(picture(seed, size=900) for seed in range(4)))
    assert done(client, client.post("/v1/imports", content=many, headers=NDJSON))["failed"] == 0


def test_one_import_at_a_time_and_it_can_be_cancelled(client: httpx.Client) -> None:
    many = b"".join(line(f"P-{number}", picture(number, size=400)) for number in range(60))
    started = client.post("/v1/imports", content=many, headers=NDJSON)
    problem(client.post("/v1/imports", content=line("X"), headers=NDJSON), 409, "conflict")
    name = started.json()["id"]
    assert client.post(f"/v1/imports/{name}/cancel").status_code == 202
    found = done(client, started)
    assert found["state"] == "cancelled" and found["done"] < 60
    problem(client.get(f"/v1/imports/{'0' * 32}"), 404, "not_found")
    problem(client.post(f"/v1/imports/{'0' * 32}/cancel"), 404, "not_found")
    assert done(client, client.post("/v1/imports", content=line("X"), headers=NDJSON))["state"] == "done"


def test_an_import_that_breaks_off_leaves_room_for_the_next(client: httpx.Client) -> None:
    def broken() -> Any:
        yield line("A")
        raise RuntimeError("the shop's machine died")

    with pytest.raises(RuntimeError):
        client.post("/v1/imports", content=broken(), headers=NDJSON)
    until = time.monotonic() + 30
    while (again := client.post("/v1/imports", content=line("B"), headers=NDJSON)).status_code == 409:
        assert time.monotonic() < until
    assert done(client, again)["state"] == "done"
    assert [each["sku"] for each in client.get("/v1/products").json()["products"]] == ["B"]


def test_what_a_photo_shows_is_corrected_listed_and_forgotten(client: httpx.Client) -> None:
    first = client.post("/v1/corrections", params={"label": "Hemd,  kariert"}, **photo(1))
    assert first.status_code == 201 and first.json()["label"] == "Hemd, kariert"
    problem(client.post("/v1/products/A-1/corrections", **photo(2)), 404, "not_found")
    client.put("/v1/products/A-1", json={}).raise_for_status()
    second = client.post("/v1/products/A-1/corrections", **photo(2)).json()
    assert (second["sku"], second["label"]) == ("A-1", None)
    page = client.get("/v1/corrections", params={"limit": 1}).json()
    assert page["corrections"] == [first.json()] and page["next"] == first.json()["number"]
    rest = client.get("/v1/corrections", params={"after": page["next"]}).json()
    assert rest == {"corrections": [second], "next": None}
    assert client.delete(f"/v1/corrections/{second['photo']}").status_code == 204
    problem(client.delete(f"/v1/corrections/{second['photo']}"), 404, "not_found")
    for params in ({}, {"label": ""}, {"label": " "}, {"label": "a\nb"}):
        problem(client.post("/v1/corrections", params=params, **photo(1)), 422, "invalid")


def test_what_is_no_photo_is_told_as_that(client: httpx.Client) -> None:
    image = {"Content-Type": "image/jpeg"}
    assert "no image" in problem(
        client.post("/v1/classify", content=b"hello", headers=image), 422, "photo_unreadable"
    )
    problem(client.post("/v1/classify", content=picture(1)[:300], headers=image), 422, "photo_unreadable")
    problem(client.post("/v1/classify", content=b"", headers=image), 422, "photo_unreadable")
    detail = problem(client.post("/v1/classify", content=picture(1)), 415, "wrong_content_type")
    assert "image/jpeg" in detail
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    problem(client.post("/v1/classify", content=picture(1), headers=form), 415, "wrong_content_type")


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("GET", "/v1/nothing", None, 404, "not_found"),
        ("GET", "/v1", None, 404, "not_found"),
        ("POST", "/v1/status", None, 405, "method_not_allowed"),
        ("GET", "/v1/products?limit=0", None, 422, "invalid"),
        ("GET", "/v1/products?limt=1", None, 422, "invalid"),
        ("GET", "/v1/products?price_min=dear", None, 422, "invalid"),
        ("GET", "/v1/products?attribute=size", None, 422, "invalid"),
        ("GET", "/v1/products?attribute=a:1&attribute=a:2", None, 422, "invalid"),
        ("GET", "/v1/products/%00", None, 422, "invalid"),
        ("GET", f"/v1/products/{'x' * 65}", None, 422, "invalid"),
        ("PUT", "/v1/products/A", {"price": True}, 422, "invalid"),
        ("PUT", "/v1/products/A", {"price": -1}, 422, "invalid"),
        ("PUT", "/v1/products/A", {"price": "1.23456"}, 422, "invalid"),
        ("PUT", "/v1/products/A", {"currency": "euro"}, 422, "invalid"),
        ("PUT", "/v1/products/A", {"title": "two\nlines"}, 422, "invalid"),
        ("PUT", "/v1/products/A", {"titel": "typo"}, 422, "invalid"),
        ("PUT", "/v1/products/A", {"sku": "B"}, 422, "invalid"),
        ("PUT", "/v1/products/A", [], 422, "invalid"),
        ("GET", "/v1/search", None, 422, "invalid"),
        ("GET", "/v1/search?text=", None, 422, "invalid"),
    ],
)
def test_each_mistake_has_its_status(
    client: httpx.Client, method: str, path: str, body: Any, status: int, code: str
) -> None:
    assert problem(client.request(method, path, json=body), status, code)


def test_broken_json_is_told_as_that(client: httpx.Client) -> None:
    kind = {"Content-Type": "application/json"}
    for content in (b"{", b"\xff", b"[" * 50_000):
        answer = client.put("/v1/products/A", content=content, headers=kind)
        assert problem(answer, answer.status_code, "invalid" if answer.status_code == 422 else "bad_request")
        assert answer.status_code in (400, 422)
