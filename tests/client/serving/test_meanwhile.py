"""Whoever changes a product waits for others who do, and then looks at what they left: on the page, by REST and gRPC.

Else a product comes back that was removed meanwhile, one takes another's number, or a field is as it was before.
"""

import base64
import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests import browser
from tests.client.serving.conftest import Served
from typer.testing import CliRunner

from hanse_client import cli
from hanse_client.gallery import changing
from hanse_client.gallery.changing import Changing
from hanse_client.gallery.gallery import Gallery
from hanse_client.serving import app, calls, photos
from hanse_client.serving import recognition_pb2 as pb
from hanse_client.serving.imports import Imports
from hanse_client.serving.photos import Room
from hanse_client.serving.problems import Refused, without_folders
from hanse_client.serving.service import Service
from hanse_common.errors import GalleryError
from hanse_common.vision.photo import LIMITS

from .page_visitor import PORT, Shop, Visitor, a_shop, make_recognizer, picture, png, product

IMAGE = {"content": png(picture(700)), "headers": {"content-type": "image/png"}}


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    make_recognizer(tmp_path)
    with a_shop(tmp_path) as shop:
        shop.fill(2)
        yield shop


@pytest.fixture
def visit(shop: Shop) -> Visitor:
    visitor = Visitor(shop.app())
    visitor.get(shop.address())
    return visitor


@pytest.fixture
def service(shop: Shop, tmp_path: Path) -> Iterator[Service]:
    imports = Imports(tmp_path / "imports", shop.recognition)
    yield Service(shop.config, shop.recognition, shop.corrections, imports)
    imports.close()


@pytest.fixture
def rest(service: Service) -> browser.Visitor:
    return browser.Visitor(app.build(service, None), f"http://127.0.0.1:{PORT}")


def after(shop: Shop, change: Callable[[], object], wait: Callable[[], Any]) -> Any:
    """Return what `wait` returns, which was asked first, and has to wait until `change` is done."""
    with ThreadPoolExecutor(1) as pool:
        with shop.recognition.changing:
            waiting: Future[Any] = pool.submit(wait)
            with pytest.raises(TimeoutError):
                waiting.result(0.5)
            change()
        return waiting.result(60)


def test_a_number_that_another_took_meanwhile_is_taken(shop: Shop, visit: Visitor) -> None:
    theirs = product(7, title="Theirs")
    answer = after(
        shop,
        lambda: shop.recognition.put(theirs),
        lambda: visit.send("/product/new", [], "photos", sku=theirs.sku, title="Mine"),
    )
    assert answer.status_code == 422 and "There is a product with this number already." in answer.text
    assert shop.recognition.gallery.get(theirs.sku) == theirs


def test_a_product_that_was_removed_meanwhile_does_not_come_back(
    shop: Shop, visit: Visitor, service: Service, rest: browser.Visitor
) -> None:
    shown = visit.show(picture(600))

    def refused(call: Callable[[], object]) -> int:
        try:
            call()
        except Refused as error:
            return error.status_code
        return 200

    ways: list[Callable[[], int]] = [
        lambda: visit.post("/product/change", sku="A-01", title="New").status_code,
        lambda: visit.send("/product/photos?sku=A-01", [png(picture(601))], "photos").status_code,
        lambda: visit.post(f"{shown}/product", sku="A-01").status_code,
        lambda: visit.post(f"{shown}/reference", sku="A-01").status_code,
        lambda: rest.ask("PATCH", "/v1/products/A-01", json={"title": "New"}).status_code,
        lambda: rest.ask("POST", "/v1/products/A-01/photos", **IMAGE).status_code,
        lambda: rest.ask("POST", "/v1/products/A-01/corrections", **IMAGE).status_code,
        lambda: refused(
            lambda: calls.correct(service, pb.CorrectRequest(photo=png(picture(602)), sku="A-01"))
        ),
    ]
    for way in ways:
        shop.recognition.put(product(1), [picture(1)])
        assert after(shop, lambda: shop.recognition.remove("A-01"), way) == 404
        assert shop.recognition.gallery.get("A-01") is None
        assert shop.corrections.count() == 0, "nothing is said of a product that is gone"


def test_what_another_changed_meanwhile_stays(shop: Shop, visit: Visitor, rest: browser.Visitor) -> None:
    shown = visit.show(picture(600))
    ways: list[Callable[[], int]] = [
        lambda: visit.send("/product/photos?sku=A-01", [png(picture(601))], "photos").status_code,
        lambda: visit.post(f"{shown}/reference", sku="A-01").status_code,
        lambda: rest.ask("PATCH", "/v1/products/A-01", json={"category": "Hats"}).status_code,
        lambda: rest.ask("POST", "/v1/products/A-01/photos", **IMAGE).status_code,
    ]
    for number, way in enumerate(ways):
        theirs = product(1, title=f"Change {number}", category="Hats")
        assert after(shop, lambda theirs=theirs: shop.recognition.put(theirs), way) in (200, 201, 303)
        assert shop.recognition.gallery.get("A-01") == theirs


def test_what_was_said_of_a_product_meanwhile_goes_with_it(
    shop: Shop, visit: Visitor, service: Service, rest: browser.Visitor
) -> None:
    jpeg = shop.recognition.gallery.prepare(picture(600))
    ways: list[Callable[[], object]] = [
        lambda: visit.post("/product/remove", sku="A-01"),
        lambda: rest.ask("DELETE", "/v1/products/A-01"),
        lambda: calls.remove_product(service, pb.RemoveProductRequest(sku="A-01")),
    ]
    for way in ways:
        shop.recognition.put(product(1), [picture(1)])
        after(shop, lambda: shop.corrections.add(jpeg, sku="A-01"), way)
        assert shop.recognition.gallery.get("A-01") is None and shop.corrections.count() == 0


def test_what_is_taken_back_waits_for_what_is_said(shop: Shop, visit: Visitor) -> None:
    where = visit.show(picture(600))
    visit.post(f"{where}/product", sku="A-01")
    kept = visit.post(f"{where}/reference", sku="A-01").headers["location"]
    digest = bytes.fromhex(kept.removeprefix("/photo/"))
    jpeg = shop.recognition.gallery.photo(digest)
    assert jpeg is not None
    after(
        shop,
        lambda: shop.corrections.add(jpeg, sku="A-00"),
        lambda: visit.post(f"{kept}/forget", photo="remove"),
    )
    assert digest in shop.recognition.gallery.photos_of("A-01"), "by the last word it shows another product"
    assert shop.corrections.count() == 0


def test_who_replaces_a_product_waits_for_who_changes_it(
    shop: Shop, service: Service, rest: browser.Visitor
) -> None:
    mine = product(1, title="Mine")
    message = pb.PutProductRequest(product=pb.Product(sku=mine.sku, title="Mine"))
    ways: list[Callable[[], object]] = [
        lambda: rest.ask("PUT", "/v1/products/A-01", json={"title": "Mine"}),
        lambda: calls.put_product(service, message),
        lambda: service.imports._put(json.dumps({"sku": mine.sku, "title": "Mine"}).encode()),
    ]
    for way in ways:
        after(shop, lambda: shop.recognition.put(product(1, title="Theirs")), way)
        found = shop.recognition.gallery.get("A-01")
        assert found is not None and found.title == "Mine" and found.category is None


def test_who_waits_keeps_nobody_from_decoding(
    shop: Shop, rest: browser.Visitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(photos, "ROOM", Room(pixels=48 * 48, seconds=0.05))
    told: list[int] = []
    answer = after(
        shop,
        lambda: told.append(rest.ask("POST", "/v1/classify", **IMAGE).status_code),
        lambda: rest.ask("POST", "/v1/products/A-01/photos", **IMAGE),
    )
    assert told == [200] and answer.status_code == 201


def test_a_line_of_an_import_waits_for_room_to_decode(
    shop: Shop, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = Room(pixels=48 * 48, seconds=0.01)
    monkeypatch.setattr(photos, "ROOM", room)
    held = room.decoded(png(picture(1)), LIMITS)
    line = json.dumps({"sku": "B-1", "photos": [base64.b64encode(png(picture(2))).decode()]}).encode()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(service.imports._put, line)
        with pytest.raises(TimeoutError):
            waiting.result(0.3)
        del held
        assert waiting.result(60) == ""
    assert len(shop.recognition.gallery.photos_of("B-1")) == 1


def test_commands_wait_for_who_changes_the_product(served: Served) -> None:
    def command(*words: str) -> Callable[[], str]:
        line = ["products", *words, "--config", str(served.source)]
        return lambda: str(CliRunner().invoke(cli.app, line).exception or "")

    with Gallery.open(served.config.gallery_path) as gallery, ThreadPoolExecutor(1) as pool:
        ways = [
            (command("update", "C-1", "--title", "New"), "", "New"),
            (command("add", "C-1"), "there is one already", "Old"),
            (command("remove", "C-1"), "", None),
        ]
        for way, said, title in ways:
            with gallery.changing:
                waiting = pool.submit(way)
                with pytest.raises(TimeoutError):
                    waiting.result(1.0)
                gallery.put(product(1, sku="C-1", title="Old", category="Hats"))
            answer = waiting.result(60)
            assert said in answer and bool(said) == bool(answer), answer
            found = gallery.get("C-1")
            assert (found and found.title) == title
            assert found is None or found.category == "Hats", "what another changed meanwhile stays"


def test_a_removal_that_did_not_end_is_asked_for_once_more(
    shop: Shop, visit: Visitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    gallery = shop.recognition.gallery
    shop.corrections.add(gallery.prepare(picture(600)), sku="A-01")
    scrub, tried = gallery._store.scrub, []

    def stopped() -> None:
        tried.append(1)
        if len(tried) == 1:
            raise GalleryError("another process still reads")
        scrub()

    monkeypatch.setattr(gallery._store, "scrub", stopped)
    visit.post("/product/remove", sku="A-01")
    assert gallery.get("A-01") is None and shop.corrections.count() == 0
    assert visit.post("/product/remove", sku="A-01").status_code == 404
    assert len(tried) == 2, "the journal is emptied"


def test_a_change_that_others_keep_waiting_gives_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changing, "WAIT_SECONDS", 0.1)
    one, other = Changing(tmp_path), Changing(tmp_path)
    with one:
        for waiting in (one, other):  # another thread of this process, and another process
            with pytest.raises(GalleryError, match="somebody else has changed products"), waiting:
                raise AssertionError("two at once")
    with other:
        pass
    assert list(tmp_path.iterdir()) == [], "no file that somebody else may own"
    with pytest.raises(GalleryError, match="cannot be locked"), Changing(tmp_path / "none"):
        raise AssertionError("without a folder")


@pytest.mark.parametrize(
    "folder", ["/home/me/O'Brien shop/state", "/var/lib/a:b", '/srv/12"screens/x', "/a b/c.d"]
)
def test_no_name_of_a_folder_leaves_the_machine(folder: str) -> None:
    for said in (
        "{}/gallery.sqlite: is full.",
        "The file '{}/gallery.sqlite': is full.",
        "({}/gallery.sqlite)",
    ):
        assert without_folders(said.format(folder)) == said.replace("{}/", "")
