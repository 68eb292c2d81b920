"""The recognizer's page: who may see it, a photo and what it shows, what is said of it, and the shop's products."""

import functools
import html
import io
import re
import shutil
import sqlite3
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from hanse_client.duplicates import SAME
from hanse_client.gallery.gallery import Gallery, Match
from hanse_client.gallery.open_set import OpenSet
from hanse_client.gallery.product import Product
from hanse_client.gallery.rejection import Rejection
from hanse_client.recognition.batching import Batcher
from hanse_client.serving import page as pages
from hanse_client.serving import page_context, page_forms
from hanse_client.serving.page_catalogue import SIMILAR_SHOWN
from hanse_client.serving.page_context import MAX_PHOTOS, product_link
from hanse_client.serving.page_forms import read_product, typed_attributes
from hanse_client.serving.page_photos import MOST_PHOTOS, Photos
from hanse_client.serving.page_recognizing import OFTEN
from hanse_client.serving.page_view import Alike, alikeness, percent, views
from hanse_common.errors import Busy
from hanse_common.vision.photo import decode
from hanse_common.vision.recipe import Recipe
from hanse_common.vision.recipe_features import Preprocessing
from hanse_common.vision.recipe_model import SmallCnn
from hanse_common.web.languages import Languages
from hanse_common.web.security import HEADERS

from .page_visitor import Shop, Visitor, a_shop, make_recognizer, picture, png, product

MARKUP = "<script>alert(1)</script>"
ODD = f'å"&?#%/\\ {MARKUP} 中文'
NOWHERE = "0" * 64
PAGES = ("/", "/products", "/product/new", "/corrections", "/recognizer", "/recognizer/now")
FORMS = ("/photo/{}/product", "/photo/{}/label", "/photo/{}/reference", "/photo/{}/forget", "/product/change",
         "/product/photo-remove", "/product/remove", "/language")  # fmt: skip
UPLOADS = ("/photo", "/product/new", "/product/photos")
FILLED = 30

_LANGUAGES = functools.cache(Languages)


@pytest.fixture(autouse=True)
def templates_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_context, "Languages", _LANGUAGES)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recognizer, to be copied."""
    folder = tmp_path_factory.mktemp("bare")
    make_recognizer(folder)
    return folder


@pytest.fixture(scope="module")
def stocked(bare: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with products, to be copied."""
    folder = tmp_path_factory.mktemp("stocked") / "shop"
    shutil.copytree(bare, folder)
    with a_shop(folder) as shop:
        shop.fill(FILLED)
        shop.address()
    return folder


@pytest.fixture(scope="module")
def standing(stocked: Path) -> Iterator[Shop]:
    """A shop with products, for those who change nothing."""
    with a_shop(stocked) as shop:
        yield shop
        assert shop.recognition.gallery.count() == FILLED
        assert shop.corrections.count() == 0


@pytest.fixture
def shop(bare: Path, tmp_path: Path) -> Iterator[Shop]:
    """A shop without products."""
    shutil.copytree(bare, tmp_path / "shop")
    with a_shop(tmp_path / "shop") as shop:
        yield shop


@pytest.fixture
def filled(stocked: Path, tmp_path: Path) -> Iterator[Shop]:
    """A shop with products."""
    shutil.copytree(stocked, tmp_path / "filled")
    with a_shop(tmp_path / "filled") as shop:
        yield shop


def let_in(shop: Shop) -> Visitor:
    visitor = Visitor(shop.app())
    assert visitor.get(shop.address()).status_code == 200
    return visitor


@pytest.fixture
def visit(request: pytest.FixtureRequest) -> Visitor:
    """The owner, let in to the shop that the test has, or else to the one that stands."""
    names = [name for name in ("shop", "filled") if name in request.fixturenames]
    return let_in(request.getfixturevalue(names[0] if names else "standing"))


def digest_in(where: str) -> bytes:
    return bytes.fromhex(where.removeprefix("/photo/"))


def digest_of(image: Image.Image) -> str:
    return Photos().keep(Gallery.prepare(image)).hex()


# -- who may see it -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [*PAGES, f"/picture/{NOWHERE}", f"/photo/{NOWHERE}", "/product?sku=A-00"])
def test_a_stranger_sees_nothing(standing: Shop, path: str) -> None:
    standing.address()
    answer = Visitor(standing.app()).get(path)
    assert answer.status_code == 403
    assert "open the address that <code>hanse-client serve</code> showed when it started" in answer.text
    assert "<code>serve.token</code>" in answer.text
    assert "in your browser" not in answer.text  # it opens none
    assert "set-cookie" not in answer.headers


@pytest.mark.parametrize("path", [*FORMS, *UPLOADS])
def test_a_stranger_does_nothing(standing: Shop, path: str) -> None:
    standing.address()
    answer = Visitor(standing.app()).ask(
        "POST",
        path.format(digest_of(picture(0))),
        data={"sku": "A-00"},
        files={"photo": b"x"},
        headers={"Sec-Fetch-Site": "same-origin"},
    )
    assert answer.status_code == 403
    assert standing.recognition.gallery.count() == FILLED


@pytest.mark.parametrize("headers", [
    {}, {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"}, {"Origin": "http://evil.example"},
    {"Origin": "null"},
])  # fmt: skip
@pytest.mark.parametrize("path", ["/product/remove", "/product/photos"])
def test_another_pages_form_does_nothing(
    standing: Shop, visit: Visitor, headers: dict[str, str], path: str
) -> None:
    send = visit.post if path == "/product/remove" else functools.partial(visit.send, photos=[b"x"])
    assert send(f"{path}?sku=A-00", headers=headers, sku="A-00").status_code == 403
    assert send(f"{path}?sku=A-00", sku="A-00", key="x").status_code == 403
    assert standing.recognition.gallery.count() == FILLED


@pytest.mark.parametrize("path", [*FORMS, *UPLOADS])
def test_looking_changes_nothing(standing: Shop, visit: Visitor, path: str) -> None:
    answer = visit.get(path.format(digest_of(picture(0))))
    assert answer.status_code in (404, 405) or path in ("/product/new", "/product/change", "/product/remove")
    assert standing.recognition.gallery.count() == FILLED


@pytest.mark.parametrize(
    "path", [*PAGES, "/nowhere", "/static/shop.css", "/static/recognize.js", "/favicon.ico"]
)
def test_every_answer_has_the_headers(visit: Visitor, path: str) -> None:
    answer = visit.get(path)
    for name, value in HEADERS.items():
        assert answer.headers[name] == value
    assert not re.search(r"<script(?! src=\"/static/)|style=|onclick", answer.text)


def test_over_tls_the_cookie_is_for_tls_alone(shop: Shop) -> None:
    app = pages.build(
        shop.recognition, shop.config, cookie="c", token=lambda: "t" * 43, hosts=("127.0.0.1",), secure=True
    )
    answer = Visitor(app).get(f"/?token={'t' * 43}")
    assert "secure" in answer.headers["set-cookie"].lower().split("; ")


# -- a photo, and what it shows -----------------------------------------------------------------------------------


def test_a_photo_of_a_product_is_found(standing: Shop, visit: Visitor) -> None:
    where = visit.show(picture(3))
    seen = standing.recognition.recognize(decode(Gallery.prepare(picture(3))), top=5, k=6)
    assert seen.found.known
    assert seen.found.matches[0].product.sku == "A-03"
    text = visit.get(where).text
    assert "This looks like a product of yours: <bdi>Shirt number 3</bdi>." in text
    shown = re.findall(r'<li[^>]*>\s*<a href="/product\?sku=(A-\d\d)"', text)
    assert shown == [match.product.sku for match in seen.found.matches]
    assert "looks the same" in text
    assert "12.50 EUR" in text
    for guess in seen.classification.classes:
        assert re.search(
            rf">{guess.label}</bdi> <span class=\"number\">{percent(guess.probability)}<", html.unescape(text)
        )
    for digest in re.findall(r'src="/picture/([0-9a-f]{64})"', text):
        answer = visit.get(f"/picture/{digest}")
        assert answer.headers["content-type"] == "image/jpeg"
        Image.open(io.BytesIO(answer.content)).verify()


def test_where_other_things_are_often_taken_for_products_nothing_is_claimed(
    standing: Shop, visit: Visitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    often = Rejection(threshold=-1.0, false_accept=OFTEN + 0.01, genuine=50, impostor=50)
    monkeypatch.setattr(OpenSet, "rejection", lambda self, embedding: often)
    best = standing.recognition.search(picture(150), k=1).matches[0].product.title
    text = visit.get(visit.show(picture(150))).text
    assert f"Most like it of your products: <bdi>{best}</bdi>." in text
    assert "look as much alike" in html.unescape(text) and "This looks like a product of yours" not in text
    assert "This looks like a product of yours" in visit.get(visit.show(picture(3))).text  # the same picture


def test_what_is_not_in_the_catalog_is_said(standing: Shop, visit: Visitor) -> None:
    def known(seed: int) -> bool | None:
        return standing.recognition.search(picture(seed), k=6).known

    unknown = next(seed for seed in range(100, 200) if not known(seed))
    text = visit.get(visit.show(picture(unknown))).text
    assert "Probably not in your catalog." in text
    assert "This looks like a product of yours" not in text
    assert "a little alike" in text or "does not look alike" in text
    assert "badge good" not in text


def test_an_empty_catalog(shop: Shop, visit: Visitor) -> None:
    assert "Your catalog has no products yet." in visit.get("/").text
    where = visit.show(picture(0))
    text = visit.get(where).text
    assert "Your catalog has no products yet." in text
    assert f'href="/product/new?photo={where.removeprefix("/photo/")}"' in text
    assert "shirt</bdi>" in text


def test_a_recognizer_that_cannot_search_still_classifies(tmp_path: Path) -> None:
    recipe = Recipe(preprocessing=Preprocessing(size=28, channels=1), backbone=None, model=SmallCnn(width=4))
    make_recognizer(tmp_path, recipe)
    with a_shop(tmp_path) as shop:
        visitor = let_in(shop)
        shop.recognition.put(product(0), [picture(0)])
        text = visitor.get(visitor.show(picture(0))).text
        assert "can't find products" in html.unescape(text)
        assert "shirt</bdi>" in text
        assert visitor.get("/product?sku=A-00").status_code == 200


@pytest.mark.parametrize(
    "data", [b"hello", b"\x89PNG\r\n\x1a\n broken", png(picture(0))[:200], b"\xff\xd8\xff\xe0"]
)
def test_what_is_no_photo_is_told_beside_the_form(visit: Visitor, data: bytes) -> None:
    answer = visit.send("/photo", [data])
    assert answer.status_code == 422
    assert "This file can't be read as a photo." in html.unescape(answer.text)
    assert 'aria-invalid="true" aria-describedby="photo-error"' in answer.text
    assert 'id="photo-error"' in answer.text


def test_no_photo_was_chosen(visit: Visitor) -> None:
    answer = visit.send("/photo", [])
    assert answer.status_code == 422
    assert "No photo was chosen." in answer.text


def test_too_large_photos_are_told_and_nothing_beyond_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_recognizer(tmp_path)
    with a_shop(tmp_path, serve={"photo_megabytes": 1}) as shop:
        visitor = let_in(shop)
        shop.recognition.put(product(0), [])
        over = b"x" * ((1 << 20) + (64 << 10))
        for data in (b"x" * ((1 << 20) + 1), over):
            answer = visitor.send("/photo", [data])
            assert answer.status_code == 413
            assert "This photo is too large." in answer.text
        for photos in ([over] * 4, [b"x"] * (MAX_PHOTOS + 1)):
            answer = visitor.send("/product/photos?sku=A-00", photos, "photos")
            assert answer.status_code == 413
            assert "Choose up to 12 photos at a time, of at most 4 MB together." in answer.text
            assert "<h1>Shirt number 0</h1>" in answer.text  # and the form to choose again
            assert answer.text.index("photo-error") < answer.text.index("<dl")
            assert 'href="#photos"' in answer.text and 'id="photos"' in answer.text
            answer = visitor.send("/product/new", photos, "photos", sku="A-01")
            assert answer.status_code == 413
            assert "Choose up to 12 photos" in answer.text and "fill it in again" in answer.text
        assert visitor.send("/product/photos?sku=A-01", [over] * 4).status_code == 404
        monkeypatch.setattr(page_forms, "DRAINED_BYTES", 0)  # one who sends on and on is not read to the end
        assert visitor.send("/photo", [over]).status_code == 413


def test_a_photo_of_too_many_pixels(visit: Visitor) -> None:
    answer = visit.send("/photo", [png(Image.new("1", (8000, 8000)))])
    assert answer.status_code == 413
    assert "40 million pixels" in answer.text


@pytest.mark.parametrize(("body", "kind", "code"), [
    (b"photo=x", "application/x-www-form-urlencoded", 415),
    (b"{}", "application/json", 415),
    (b"x", "multipart/form-data", 400),
    (b"no boundary", "multipart/form-data; boundary=b", 400),
    (b'--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--\r\n', "multipart/form-data; boundary=b", 400),
    (b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n' * 2 + b"--b--\r\n",
     "multipart/form-data; boundary=b", 400),
    (b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\n' + b"x" * 20_000 + b"\r\n--b--\r\n",
     "multipart/form-data; boundary=b", 400),
    (b"".join(b'--b\r\nContent-Disposition: form-data; name="f%d"\r\n\r\n1\r\n' % n for n in range(60)) + b"--b--\r\n",
     "multipart/form-data; boundary=b", 400),
    (b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\n\xff\r\n--b--\r\n',
     "multipart/form-data; boundary=b; charset=nonsense", 403),
    (b"", "multipart/form-data; boundary=b", 403),
    (b'--b\r\nContent-Disposition: form-data; name="key"\r\n\r\nx\r\n--b--\r\n',
     "multipart/form-data; boundary=b", 403),
])  # fmt: skip
def test_damaged_forms_are_refused(visit: Visitor, body: bytes, kind: str, code: int) -> None:
    headers = {"Sec-Fetch-Site": "same-origin", "Content-Type": kind}
    answer = visit.ask("POST", "/photo", content=body, headers=headers)
    assert answer.status_code == code
    assert "<h1>" in answer.text


def test_a_photo_that_was_only_looked_at_is_forgotten_in_time(visit: Visitor) -> None:
    first = visit.show(picture(200))
    for seed in range(201, 201 + MOST_PHOTOS):
        visit.show(picture(seed))
    answer = visit.get(first)
    assert answer.status_code == 410
    assert "is kept for a short while" in answer.text
    assert visit.post(f"{first}/label", label="x").status_code == 410
    for path in ("/photo/x", f"/photo/{NOWHERE[:-1]}", "/picture/x", f"/picture/{NOWHERE}", "/nowhere"):
        assert visit.get(path).status_code == 404


def test_no_photo_that_was_only_looked_at_is_on_the_disk(
    filled: Shop, visit: Visitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("starlette.formparsers.MultiPartParser.spool_max_size", 1)
    written: list[Any] = []
    monkeypatch.setattr("tempfile.SpooledTemporaryFile.rollover", lambda self: written.append(self))
    visit.get(visit.show(picture(77)))
    assert not written
    jpeg = Gallery.prepare(picture(77))
    for path in filled.config.state.rglob("*"):
        assert not path.is_file() or jpeg not in path.read_bytes()


def test_too_busy_is_told(visit: Visitor, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Batcher, *arguments: Any, **named: Any) -> None:
        raise Busy("Too many photos wait.")

    where = visit.show(picture(0))
    monkeypatch.setattr(Batcher, "submit", full)
    answer = visit.get(where)
    assert answer.status_code == 503
    assert "Too busy just now" in answer.text


def test_what_the_owner_looks_at_is_no_search_of_a_shopper(bare: Path, tmp_path: Path) -> None:
    shutil.copytree(bare, tmp_path / "shop")
    policy = {"league": "test", "epsilon": 6.0, "delta": 2e-5, "modes": ("local", "trends")}
    with a_shop(tmp_path / "shop", follow=True, policy=policy) as shop:
        shop.recognition.put(product(0), [picture(0)])
        visitor = let_in(shop)

        def counted() -> int:
            with sqlite3.connect(shop.config.state / "queries.sqlite") as db:
                return int(db.execute("SELECT total(count) FROM query").fetchone()[0])

        where = visitor.show(picture(0))
        for _ in range(4):
            assert "Shirt number 0" in visitor.get(where).text
        assert (
            visitor.get(visitor.post(f"{where}/label", label="blocks").headers["location"]).status_code == 200
        )
        assert visitor.get("/product?sku=A-00").status_code == 200
        assert counted() == 0
        shop.recognition.search(picture(0))
        assert counted() == 1  # as a shopper's is


# -- what is said of it -------------------------------------------------------------------------------------------


def test_another_product_is_said_and_taken_back(filled: Shop, visit: Visitor) -> None:
    where = visit.show(picture(3))
    answer = visit.post(f"{where}/product", sku="A-07")
    assert (answer.status_code, answer.headers["location"]) == (303, where)
    (said,) = filled.corrections.list()
    assert (said.sku, said.label, said.photo) == ("A-07", None, digest_in(where))
    text = visit.get(where).text
    assert 'You said: this is <a href="/product?sku=A-07"><bdi>Shirt number 7</bdi></a>.' in text
    assert "This looks like a product of yours" not in text
    assert "Shirt number 7" in visit.get("/corrections").text
    visit.post(f"{where}/forget")
    assert filled.corrections.count() == 0
    assert "You said" not in visit.get(where).text


def test_a_photo_that_was_said_to_show_a_product_is_added_to_it(filled: Shop, visit: Visitor) -> None:
    where = visit.show(picture(500))
    visit.post(f"{where}/product", sku="A-07")
    assert "Add this photo to the product" in visit.get(where).text
    after = visit.post(f"{where}/reference", sku="A-07").headers["location"]
    assert digest_in(after) in filled.recognition.gallery.photos_of("A-07")
    text = visit.get(after).text
    assert "This photo is one of the product's photos." in html.unescape(text)
    assert "Add this photo to the product" not in text
    assert [said.photo for said in filled.corrections.list()] == [digest_in(after)]


def test_a_photo_that_went_to_the_wrong_product_leaves_it_again(filled: Shop, visit: Visitor) -> None:
    gallery = filled.recognition.gallery

    def wrong(seed: int) -> str:
        where = visit.show(picture(seed))
        visit.post(f"{where}/product", sku="A-07")
        return str(visit.post(f"{where}/reference", sku="A-07").headers["location"])

    both, words, other, listed = map(wrong, range(500, 504))
    assert "Take it back and remove the photo" in visit.get(both).text
    assert visit.post(f"{both}/forget", photo="remove").headers["location"] == both
    assert digest_in(both) not in gallery.photos_of("A-07")
    assert gallery.photo(digest_in(both)) is None
    assert filled.corrections.of(digest_in(both)) is None
    text = visit.get(both).text  # it can still be looked at, and be said to show another
    assert "You said" not in text and "This photo is among those of" not in text

    visit.post(f"{words}/forget")  # what was said is taken back alone
    assert digest_in(words) in gallery.photos_of("A-07")
    held = 'This photo is among those of <a href="/product?sku=A-07"><bdi>Shirt number 7</bdi></a>.'
    assert held in visit.get(words).text

    visit.post(f"{other}/product", sku="A-08")  # what is said later leaves it where it was, and says so
    text = visit.get(other).text
    assert held in text and "Add this photo to the product" in text
    assert "Take it back and remove" not in text
    where = visit.post(
        "/product/photo-remove", sku="A-07", digest=digest_in(other).hex(), to="photo"
    ).headers["location"]
    assert where == other
    assert digest_in(other) not in gallery.photos_of("A-07")
    text = visit.get(other).text
    assert "This photo is among those of" not in text and "Shirt number 8</bdi></a>." in text

    assert "This photo is one of the product's photos." in html.unescape(visit.get("/corrections").text)
    answer = visit.post(f"{listed}/forget", photo="remove", to="corrections")
    assert answer.headers["location"] == "/corrections"
    assert digest_in(listed) not in gallery.photos_of("A-07")
    assert [said.sku for said in filled.corrections.list()] == ["A-08"]


def test_a_photo_of_two_products_is_said_to_be(shop: Shop, visit: Visitor) -> None:
    jpeg = Gallery.prepare(picture(0))
    for number in (2, 1):
        (digest,) = shop.recognition.gallery.put(product(number), [jpeg])
    text = visit.get(f"/photo/{digest.hex()}").text
    assert re.findall(r"among those of <a href=\"([^\"]+)", text) == [
        "/product?sku=A-02",
        "/product?sku=A-01",
    ]
    visit.post("/product/photo-remove", sku="A-02", digest=digest.hex(), to="photo")
    assert shop.recognition.gallery.showing(digest) == [product(1)]
    visit.post("/product/photo-remove", sku="A-01", digest=digest.hex(), to="photo")
    assert shop.recognition.gallery.photo(digest) is None
    answer = visit.get(f"/photo/{digest.hex()}")
    assert answer.status_code == 200  # it can still be looked at
    assert "among those of" not in answer.text


def test_a_word_of_ones_own_is_said(filled: Shop, visit: Visitor) -> None:
    where = visit.show(picture(3))
    assert visit.post(f"{where}/label", label="  Herrenhemd,  kariert ").status_code == 303
    assert filled.corrections.labels() == {"Herrenhemd, kariert": 1}
    assert "You said: this is <bdi>Herrenhemd, kariert</bdi>." in visit.get(where).text
    other = visit.get(visit.show(picture(4))).text
    options = re.findall(r'<option value="([^"]+)">', other)
    assert options == ["Herrenhemd, kariert", "shirt", "shoe", "bag"]
    text = visit.get("/corrections").text
    assert "<bdi>Herrenhemd, kariert</bdi> (1)" in text
    answer = visit.post(f"{where}/forget", to="corrections")
    assert answer.headers["location"] == "/corrections"
    assert "None yet." in visit.get("/corrections").text


@pytest.mark.parametrize("label", ["", " ", "x" * 129, "a\x00b"])
def test_what_is_no_word_is_refused(shop: Shop, visit: Visitor, label: str) -> None:
    where = visit.show(picture(3))
    answer = visit.post(f"{where}/label", label=label)
    assert answer.status_code == 409
    assert shop.corrections.count() == 0


def test_a_product_that_is_gone_is_said_so(filled: Shop, visit: Visitor) -> None:
    where = visit.show(picture(3))
    visit.post(f"{where}/product", sku="A-07")
    filled.recognition.remove("A-07")
    assert "It is no longer in your catalog." in visit.get(where).text
    assert "(no longer in your catalog)" in visit.get("/corrections").text
    assert visit.post(f"{where}/product", sku="A-07").status_code == 404


# -- products -----------------------------------------------------------------------------------------------------


def test_a_product_is_added_from_a_photo_and_found_at_once(shop: Shop, visit: Visitor) -> None:
    where = visit.show(picture(3))
    name = where.removeprefix("/photo/")
    text = visit.get(f"/product/new?photo={name}").text
    assert f'src="/picture/{name}"' in text
    for kept in (f'action="/product/new?photo={name}"', f'name="to" value="/product/new?photo={name}"'):
        assert kept in text
    answer = visit.send(
        f"/product/new?photo={name}",
        [png(picture(4)), png(picture(5))],
        "photos",
        sku="A 17/ü",
        title="  Trail   shoe ",
        price="59,90",
        currency="eur",
        category="Shoes",
        attributes="size: 42\r\n\r\n颜色：红",
    )
    assert answer.status_code == 303
    made = shop.recognition.gallery.get("A 17/ü")
    assert made == Product(
        sku="A 17/ü",
        title="Trail shoe",
        price=Decimal("59.90"),
        currency="EUR",
        category="Shoes",
        attributes={"size": "42", "颜色": "红"},
    )
    assert len(shop.recognition.gallery.photos_of(made.sku)) == 3
    assert answer.headers["location"] == product_link(made)
    text = visit.get(answer.headers["location"]).text
    for said in ("Trail shoe", "59.90 EUR", "颜色", "红"):
        assert said in text
    assert "This looks like a product of yours: <bdi>Trail shoe</bdi>." in visit.get(where).text
    assert 'value="EUR"' in visit.get("/product/new").text  # as the last one


@pytest.mark.parametrize(("field", "typed", "code"), [
    ("sku", "", "form"), ("sku", "x" * 65, "form"), ("sku", "A-00", "taken"), ("title", "x" * 301, "form"),
    ("price", "much", "form"), ("price", "-1", "form"), ("price", "nan", "form"), ("price", "1.23456", "form"),
    ("price", "1e99", "form"), ("price", "1,2,3", "form"), ("currency", "EURO", "form"), ("currency", "€", "form"),
    ("category", "x" * 129, "form"), ("attributes", "no colon", "form"), ("attributes", "a: 1\na: 2", "form"),
    ("attributes", ": 1", "form"), ("attributes", "\n".join(f"{n}: 1" for n in range(33)), "form"),
])  # fmt: skip
def test_an_error_stands_beside_its_field_and_loses_nothing(
    shop: Shop, visit: Visitor, field: str, typed: str, code: str
) -> None:
    shop.recognition.put(product(0))
    fields: dict[str, Any] = {
        "sku": "B-1",
        "title": MARKUP,
        "price": "1",
        "currency": "EUR",
        "category": "Tops",
        "attributes": "a: b",
    }
    answer = visit.send("/product/new", [], "photos", **(fields | {field: typed}))
    assert answer.status_code == 422
    assert re.findall(r'class="error" id="([\w-]+)"', answer.text) == [f"{field}-error"]
    assert ("already" in answer.text) == (code == "taken")
    for name, value in (fields | {field: typed}).items():
        kept = re.search(
            rf'id="{name}"[^>]*? value="([^"]*)"|id="{name}".*?>\n([^<]*)</textarea>', answer.text, re.S
        )
        assert kept
        assert html.unescape(kept[1] or kept[2] or "") == value
    assert MARKUP not in answer.text
    assert shop.recognition.gallery.count() == 1
    assert visit.send("/product/new", [], "photos", **fields).status_code == 303


def test_a_product_with_a_file_that_is_no_photo_is_not_added(shop: Shop, visit: Visitor) -> None:
    answer = visit.send("/product/new", [png(picture(0)), b"no photo"], "photos", sku="B-1")
    assert answer.status_code == 422
    assert "This file can't be read as a photo." in html.unescape(answer.text)
    assert 'value="B-1"' in answer.text
    assert shop.recognition.gallery.count() == 0


def test_a_product_is_changed(filled: Shop, visit: Visitor) -> None:
    text = visit.get("/product/change?sku=A-03").text
    assert re.search(r'id="sku"[^>]*value="A-03"[^>]*readonly', text)
    assert "size: M" in text
    answer = visit.post("/product/change", sku="A-03", title="New", price="", attributes="size: L")
    assert answer.headers["location"] == "/product?sku=A-03"
    gallery = filled.recognition.gallery
    assert gallery.get("A-03") == Product(sku="A-03", title="New", attributes={"size": "L"})
    assert len(gallery.photos_of("A-03")) == 1
    answer = visit.post("/product/change", sku="A-03", title="Newer", price="x")
    assert answer.status_code == 422
    assert 'id="price-error"' in answer.text
    assert 'name="to" value="/product/change?sku=A-03"' in answer.text
    assert gallery.get("A-03") == Product(sku="A-03", title="New", attributes={"size": "L"})


def test_photos_are_added_and_removed(filled: Shop, visit: Visitor) -> None:
    gallery = filled.recognition.gallery
    adding = "/product/photos?sku=A-03"
    assert f'action="{adding}"' in visit.get("/product?sku=A-03").text
    assert visit.send(adding, [png(picture(90)), png(picture(91))], "photos").status_code == 303
    first, second, _ = gallery.photos_of("A-03")
    visit.post("/product/photo-remove", sku="A-03", digest=second.hex())
    assert len(gallery.photos_of("A-03")) == 2
    assert gallery.photo(second) is None
    assert first in gallery.photos_of("A-03")
    for photos, said in (([], "No photo was chosen."), ([b"x"], "can't be read")):
        answer = visit.send(adding, photos, "photos")
        assert answer.status_code == 422
        text = html.unescape(answer.text)
        assert (
            text.index("<h1>") < text.index(said) < text.index("<dl")
        )  # on a phone, too, it is seen at once
        assert 'name="to" value="/product?sku=A-03"' in text
    assert len(gallery.photos_of("A-03")) == 2


def test_a_number_that_is_taken_is_told_with_what_else_is_wrong(shop: Shop, visit: Visitor) -> None:
    shop.recognition.put(product(0))
    answer = visit.send("/product/new", [], "photos", sku=" A-00 ", price="much")
    assert answer.status_code == 422
    assert re.findall(r'class="error" id="([\w-]+)"', answer.text) == ["sku-error", "price-error"]
    assert "There is a product with this number already." in answer.text


def test_what_was_said_to_show_a_product_goes_with_it(filled: Shop, visit: Visitor) -> None:
    assert "of which you said" not in visit.get("/product/remove?sku=A-03").text
    shown, other, named = (visit.show(picture(seed)) for seed in (500, 501, 502))
    visit.post(f"{shown}/product", sku="A-03")
    visit.post(f"{other}/product", sku="A-04")
    visit.post(f"{named}/label", label="blocks")
    jpeg = filled.corrections.photo(digest_in(shown))
    assert jpeg is not None
    assert "So is the 1 photo of which you said" in visit.get("/product/remove?sku=A-03").text
    visit.post("/product/remove", sku="A-03")
    assert [(said.photo, said.sku) for said in filled.corrections.list()] == [
        (digest_in(other), "A-04"),
        (digest_in(named), None),
    ]
    assert filled.corrections.photo(digest_in(shown)) is None
    kept = [path for path in filled.config.state.rglob("*") if path.is_file()]
    assert filled.config.corrections_path in kept
    assert not [path for path in kept if jpeg[-200:] in path.read_bytes()]


def test_a_product_is_removed_after_a_question(filled: Shop, visit: Visitor) -> None:
    text = visit.get("/product/remove?sku=A-03").text
    assert "The product and its 1 photo are deleted" in text
    assert filled.recognition.gallery.get("A-03") is not None
    assert visit.post("/product/remove", sku="A-03").headers["location"] == "/products"
    assert filled.recognition.gallery.get("A-03") is None
    assert visit.get("/product?sku=A-03").status_code == 404
    assert visit.post("/product/remove", sku="A-03").status_code == 404


def test_similar_products_are_those_of_the_recognizer(standing: Shop, visit: Visitor) -> None:
    text = visit.get("/product?sku=A-03").text
    shown = re.findall(r'href="/product\?sku=(A-\d\d)"', text)
    assert shown == [
        match.product.sku for match in standing.recognition.similar("A-03", k=SIMILAR_SHOWN).matches
    ]


def test_products_are_browsed_page_by_page(shop: Shop, visit: Visitor) -> None:
    for number in range(60):
        shop.recognition.put(product(number))
    found: list[str] = []
    where = "/products"
    while where:
        text = visit.get(where).text
        found += re.findall(r'href="/product\?sku=(A-\d\d)"', text)
        more = re.search(r'href="(/products\?after=[^"]+)"', text)
        where = html.unescape(more[1]) if more else ""
    assert found == [f"A-{number:02}" for number in range(60)]
    text = visit.get("/products?category=Shoes").text
    assert len(re.findall(r'href="/product\?sku=', text)) == 30
    assert '<option selected value="Shoes">' in text


def test_products_are_searched_by_text(shop: Shop, visit: Visitor) -> None:
    shop.recognition.put(product(1, title="Red trail shoe"))
    shop.recognition.put(product(2, title="Blue shirt"))
    shop.recognition.put(product(3, title="Green shirt"))
    text = visit.get("/products", params={"q": "red shoes"}).text
    assert re.findall(r'href="/product\?sku=(A-\d\d)"', text)[0] == "A-01"
    text = visit.get("/products", params={"q": "A-02"}).text
    assert re.findall(r'href="/product\?sku=(A-\d\d)"', text)[0] == "A-02"
    text = visit.get("/products", params={"q": "shirt", "category": "Shoes"}).text
    assert re.findall(r'href="/product\?sku=(A-\d\d)"', text) == ["A-02"]
    assert "No product of yours fits." in visit.get("/products", params={"q": "zzz"}).text
    for odd in ("x" * 5000, ODD, "\x00", "'"):
        assert (
            visit.get("/products", params={"q": odd, "after": odd, "category": odd, "photo": odd}).status_code
            == 200
        )


def test_the_right_product_is_found_by_its_name(filled: Shop, visit: Visitor) -> None:
    where = visit.show(picture(300))
    name = where.removeprefix("/photo/")
    text = visit.get("/products", params={"photo": name, "q": "A-11"}).text
    assert "Which product is it?" in text
    assert f'action="{where}/product"' in text
    assert f'name="photo" value="{name}"' in text
    assert "Which product is it?" not in visit.get("/products", params={"photo": NOWHERE}).text


def test_odd_names_are_shown_as_text_and_can_be_linked(shop: Shop, visit: Visitor) -> None:
    odd = Product(sku=ODD[:64], title=ODD, category=ODD, attributes={ODD: ODD})
    shop.recognition.put(odd, [picture(0)])
    shop.recognition.put(product(1), [picture(1)])
    where = visit.show(picture(0))
    visit.post(f"{where}/product", sku=odd.sku)
    visit.post(f"{visit.show(picture(1))}/label", label=ODD)
    link = product_link(odd)
    for language in ("en", "zh"):
        visit.post("/language", language=language, to="/")
        changing = [link.replace("product?", f"product/{each}?") for each in ("change", "remove")]
        for path in (
            link,
            *changing,
            where,
            "/products",
            "/corrections",
            "/product/new",
            f"/products?q={ODD}",
        ):
            answer = visit.get(path)
            assert answer.status_code == 200
            assert MARKUP not in answer.text
            assert "&lt;script&gt;" in answer.text
    assert visit.post("/language", language="en", to=link).headers["location"] == link
    assert visit.post("/product/remove", sku=odd.sku).status_code == 303


# -- the recognizer, and languages --------------------------------------------------------------------------------


def test_the_recognizers_state(standing: Shop, visit: Visitor) -> None:
    status = standing.recognition.status()
    for path in ("/recognizer", "/recognizer/now"):
        text = visit.get(path).text
        assert status.recognizer.hex() in text
        assert f"<dd>{FILLED}</dd>" in text
        assert "shirt, shoe, bag" in text
        assert "Ready." in text
        rejection = status.rejection
        assert rejection.false_accept is not None
        assert (
            f"{percent(rejection.false_accept)}, measured on {rejection.impostor} photos of yours"
            in html.unescape(text)
        )
        assert "not measured yet: it takes products with two photos or more" in text  # they have one each


@pytest.mark.parametrize("path", [*PAGES, "/product?sku=A-00", "/product/remove?sku=A-00", "/nowhere"])
def test_every_page_in_chinese(standing: Shop, visit: Visitor, path: str) -> None:
    visit.post("/language", language="zh", to="/")
    text = visit.get(path).text
    assert re.search(r"[\u4e00-\u9fff]", re.sub(r"<[^>]*>", " ", text))
    assert "None" not in text


@pytest.mark.parametrize(("to", "where"), [
    ("/products?q=a%20b&after=A-01", "/products?q=a%20b&after=A-01"), ("/photo/00", "/photo/00"),
    ("//evil.example", "/"),
    ("/products?x=\r\nSet-Cookie: a", "/products"), ("https://evil.example?x", "/"), ("/?x=<", "/"),
])  # fmt: skip
def test_a_choice_of_language_leads_back(visit: Visitor, to: str, where: str) -> None:
    answer = visit.post("/language", language="zh", to=to)
    assert (answer.status_code, answer.headers["location"].partition("?x")[0]) == (303, where)


# -- small parts --------------------------------------------------------------------------------------------------


def test_percentages_are_never_more_certain_than_they_are() -> None:
    shares = (0.0, 1e-9, 0.004, 0.006, 0.5, 0.994, 0.996, 1.0)
    assert [percent(each) for each in shares] == [
        "0 %",
        "<1 %",
        "<1 %",
        "1 %",
        "50 %",
        "99 %",
        ">99 %",
        "100 %",
    ]


def test_words_for_similarity_rise_with_it_and_agree_with_the_threshold() -> None:
    order = [Alike.NOT, Alike.LITTLE, Alike.ENOUGH, Alike.VERY, Alike.SAME]
    for threshold in (-0.2, 0.0, 0.3, 0.7, 0.99, 1.0):
        words = [order.index(alikeness(n / 100, threshold)) for n in range(-100, 101)]
        assert words == sorted(words)
        for n in range(-100, 101):
            assert (alikeness(n / 100, threshold) in order[2:]) == (n / 100 > threshold)
    assert alikeness(1.0, 0.7) is Alike.SAME


def test_the_same_picture_looks_the_same_whatever_the_threshold() -> None:
    for nearest, words, share in ((1.0, Alike.SAME, 1.0), (SAME, Alike.SAME, SAME), (0.9, Alike.LITTLE, 0.6)):
        (shown,) = views([Match(product(1), 0.6, b"", 0.6, nearest)], 0.7)
        assert (shown.alike, shown.share) == (words, share)


def test_attributes_are_read_as_they_are_shown() -> None:
    made = product(1, attributes={"size": "42: wide", "颜色": "红"})
    read, errors = read_product({"sku": made.sku, "attributes": typed_attributes(made)})
    assert errors == {}
    assert read
    assert read.attributes == made.attributes


def test_photos_are_forgotten_the_oldest_first() -> None:
    photos = Photos(2)
    first, second = photos.keep(b"1"), photos.keep(b"2")
    assert photos.get(first) == b"1"  # so the second is the oldest
    third = photos.keep(b"3")
    assert [photos.get(each) for each in (first, second, third)] == [b"1", None, b"3"]
