"""A shop owner at the recognizer's page, in a real browser: with scripts and without, by keyboard, on a phone."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hanse_client.gallery.gallery import Gallery
from hanse_client.gallery.product import Product
from hanse_client.serving.page_context import product_link
from hanse_common.vision.photo import decode
from hanse_common.web.serving import listen, serving

from .page_visitor import Owner, Shop, a_shop, make_recognizer, picture, png, product

FILLED = 24

pytestmark = pytest.mark.slow


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    make_recognizer(tmp_path)
    with a_shop(tmp_path, serve={"photo_megabytes": 1}) as shop:
        yield shop


@pytest.fixture
def port(shop: Shop) -> Iterator[int]:
    with listen(0) as listening:
        port = listening.getsockname()[1]
        with serving(shop.app(port), listening):
            yield port


def found(shop: Shop, seed: int) -> tuple[bool | None, str]:
    """What the recognizer itself says of a photo: whether it is known, and what it is most like."""
    answer = shop.recognition.search(decode(Gallery.prepare(picture(seed))))
    return answer.known, answer.matches[0].product.sku


def test_an_owner_at_the_page(browser: Any, shop: Shop, port: int) -> None:
    ada = Owner(browser, shop, port)
    assert "Your catalog has no products yet." in ada.text()
    ada.look("shop-empty")
    ada.choose(png(picture(1000)))
    assert "Add this one, and Hanse finds it the next time." in ada.text()
    ada.look("shop-empty-seen")
    ada.page.get_by_role("link", name="Add it as a new product").click()
    ada.page.get_by_label("Product number (SKU)").fill("N 1/ö")
    ada.page.get_by_label("Name", exact=True).fill("Blocks")
    ada.page.get_by_label("Price").fill("x")
    ada.press("Add this product")
    assert "Write a number such as 12.50" in ada.text()
    ada.look("shop-new-wrong")
    ada.page.get_by_label("Price").fill("3,50")
    more = {"name": "2.png", "mimeType": "image/png", "buffer": png(picture(1001))}
    ada.page.get_by_label("More photos of it").set_input_files(more)
    ada.press("Add this product")
    assert ada.page.inner_text("h1") == "Blocks"
    assert len(shop.recognition.gallery.photos_of("N 1/ö")) == 2
    ada.look("shop-product")
    ada.press("Remove (Photo 2)")
    assert len(shop.recognition.gallery.photos_of("N 1/ö")) == 1
    shop.fill(FILLED)
    ada.page.goto(f"{ada.origin}/")
    ada.choose(png(picture(1000)))
    assert found(shop, 1000) == (True, "N 1/ö")
    assert ada.heard() == "This looks like a product of yours: Blocks."
    assert ada.page.get_attribute("#said", "role") == "status"
    ada.look("shop-known")
    ada.press("It is this one (N 1/ö)")
    assert [said.sku for said in shop.corrections.list()] == ["N 1/ö"]
    ada.page.get_by_text("This is wrong").click()
    ada.page.get_by_label("What is it really?").fill("a wall of blocks")
    ada.press("Save")
    assert shop.corrections.labels() == {"a wall of blocks": 1}
    ada.look("shop-said")
    ada.page.get_by_role("link", name="Find it in your catalog").click()
    ada.page.get_by_label("Search").fill("number 7")
    ada.press("Show")
    ada.look("shop-find")
    ada.press("It is this one (A-07)")
    assert [said.sku for said in shop.corrections.list()] == ["A-07"]
    ada.press("Add this photo to the product")
    assert len(shop.recognition.gallery.photos_of("A-07")) == 2
    ada.follow("Your corrections")
    ada.look("shop-corrections")
    ada.press("Take it back and remove the photo")
    assert shop.corrections.count() == 0
    assert len(shop.recognition.gallery.photos_of("A-07")) == 1
    ada.follow("Products")
    ada.look("shop-products")
    ada.page.get_by_role("link", name="Shirt number 9").click()
    ada.follow("Change these")
    ada.page.get_by_label("Name", exact=True).fill("Shirt of many colours")
    ada.look("shop-change")
    ada.press("Save")
    ada.follow("Remove this product")
    ada.look("shop-remove")
    ada.follow("No, keep it")
    ada.follow("Remove this product")
    ada.press("Yes, remove it")
    assert shop.recognition.gallery.get("A-09") is None
    ada.follow("Recognizer")
    ada.look("shop-recognizer")
    assert [each for each in ada.complaints if "422" not in each] == []  # Chromium tells of the slip


def test_photos_are_dropped_and_pasted_and_the_page_goes_back(browser: Any, shop: Shop, port: int) -> None:
    shop.fill(FILLED)
    ada = Owner(browser, shop, port)
    for seed, how in ((2, "drop"), (3, "paste"), (4, "drop")):
        ada.give(png(picture(seed)), how)
        assert ada.heard() == f"This looks like a product of yours: Shirt number {seed}."
        where = ada.page.url
        assert where.startswith(f"{ada.origin}/photo/")
    ada.press("中文")
    assert ada.page.url == where
    assert "Shirt number 4" in ada.page.inner_text("#verdict")
    ada.press("English")
    ada.page.go_back()
    ada.page.wait_for_function("() => document.querySelector('.language input[name=to]').value !== '/'")
    unknown = next(seed for seed in range(1000, 1100) if not found(shop, seed)[0])
    ada.give(png(picture(unknown)), "drop")
    assert ada.heard().startswith("Probably not in your catalog.")
    ada.look("shop-unknown")
    assert ada.complaints == []


def test_what_is_no_photo_is_said_at_once(browser: Any, shop: Shop, port: int) -> None:
    ada = Owner(browser, shop, port)
    ada.choose(b"hello")
    assert "This file can't be read as a photo." in ada.heard()
    assert ada.page.get_attribute("#file", "aria-describedby") == "photo-error"
    ada.look("shop-unreadable")
    ada.choose(b"x" * ((1 << 20) + 1))  # the page knows without sending it
    assert "This photo is too large." in ada.heard()
    ada.look("shop-too-large")
    ada.choose(png(picture(1)))
    assert ada.page.get_attribute("#file", "aria-invalid") is None
    assert [each for each in ada.complaints if "422" not in each] == []


def test_a_service_that_is_gone_is_said(browser: Any, shop: Shop) -> None:
    with listen(0) as listening:
        port = listening.getsockname()[1]
        with serving(shop.app(port), listening):
            ada = Owner(browser, shop, port)
    ada.choose(png(picture(1)))
    assert "The recognizer does not answer." in ada.heard()
    ada.look("shop-gone")


def test_without_scripts(browser: Any, shop: Shop, port: int) -> None:
    shop.fill(FILLED)
    ada = Owner(browser, shop, port, java_script_enabled=False, color_scheme="dark")
    assert "Drop a photo" not in ada.text()
    ada.press("Look at it")
    assert "No photo was chosen." in ada.text()
    file = {"name": "5.png", "mimeType": "image/png", "buffer": png(picture(5))}
    ada.page.get_by_label("Choose a photo").set_input_files(file)
    ada.press("Look at it")
    assert "This looks like a product of yours: Shirt number 5." in ada.text()
    ada.press("It is this one (A-05)")
    assert "You said: this is Shirt number 5." in ada.text()
    ada.press("Take back only what I said")
    ada.press("中文")
    assert "这看起来是您的商品：Shirt number 5。" in ada.text()
    assert [each for each in ada.complaints if "422" not in each] == []


@pytest.mark.parametrize(("scheme", "language"), [("light", "zh"), ("dark", "en")])
def test_on_a_phone(browser: Any, shop: Shop, port: int, scheme: str, language: str) -> None:
    shop.fill(FILLED)
    viewport = {"width": 400, "height": 800}
    ada = Owner(browser, shop, port, viewport=viewport, color_scheme=scheme, has_touch=True, is_mobile=True)
    assert ada.page.get_by_text("Take a photo").is_visible()
    assert ada.page.get_attribute("#camera", "capture") == "environment"
    taken = {"name": "image.jpg", "mimeType": "image/png", "buffer": png(picture(6))}
    ada.page.get_by_label("Take a photo").set_input_files(taken)
    ada.page.locator(".seen").wait_for()
    if language == "zh":
        ada.press("中文")
    ada.look(f"shop-400-{scheme}-known")
    where = ada.page.url
    for name, path in (
        ("products", "/products"),
        ("find", where.removeprefix(ada.origin).replace("/photo/", "/products?photo=")),
        ("product", "/product?sku=A-03"),
        ("change", "/product/change?sku=A-03"),
        ("remove", "/product/remove?sku=A-03"),
        ("new", "/product/new"),
        ("corrections", "/corrections"),
        ("recognizer", "/recognizer"),
        ("nowhere", "/nowhere"),
    ):
        ada.page.goto(f"{ada.origin}{path}")
        ada.look(f"shop-400-{scheme}-{name}")
    assert [each for each in ada.complaints if "404" not in each] == []


@pytest.mark.parametrize("width", [1280, 390])
def test_a_name_of_one_long_word_breaks(browser: Any, shop: Shop, port: int, width: int) -> None:
    word = "Donaudampfschifffahrt" * 6
    long = Product(sku=word[:64], title=word + word, category=word, attributes={word[:64]: word})
    (photo,) = shop.recognition.put(long, [picture(1)])
    (other,) = shop.recognition.put(product(2, category=word), [picture(2)])
    jpegs = [shop.recognition.gallery.photo(each) or b"" for each in (photo, other)]
    shop.corrections.add(jpegs[0], sku=long.sku)
    shop.corrections.add(jpegs[1], label=word)
    ada = Owner(browser, shop, port, viewport={"width": width, "height": 800})
    link = product_link(long)
    for name, path in (
        ("product", link),
        ("change", link.replace("product?", "product/change?")),
        ("remove", link.replace("product?", "product/remove?")),
        ("said", f"/photo/{photo.hex()}"),
        ("labelled", f"/photo/{other.hex()}"),
        ("products", "/products"),
        ("corrections", "/corrections"),
    ):
        ada.page.goto(f"{ada.origin}{path}")
        ada.look(f"shop-long-{width}-{name}")  # no page is wider than its window
    assert ada.complaints == []


@pytest.mark.parametrize("width", [1280, 390])
def test_what_is_wrong_with_photos_is_in_sight(browser: Any, shop: Shop, port: int, width: int) -> None:
    shop.recognition.put(product(1), [picture(seed) for seed in range(12)])
    ada = Owner(browser, shop, port, viewport={"width": width, "height": 800})
    text = {"name": "notes.txt", "mimeType": "image/png", "buffer": b"hello"}
    for path, button, files, said in (
        ("/product?sku=A-01", "Add these photos", [text], "This file can't be read as a photo."),
        ("/product?sku=A-01", "Add these photos", [text] * 13, "Choose up to 12 photos at a time"),
        ("/product/new", "Add this product", [text], "This file can't be read as a photo."),
    ):
        ada.page.goto(f"{ada.origin}{path}")
        if path == "/product/new":
            ada.page.get_by_label("Product number (SKU)").fill("B-1")
        ada.page.locator("#photos").set_input_files(files)
        ada.press(button)
        box = ada.page.get_by_text(said).bounding_box()
        assert box and box["y"] + box["height"] < 800
        ada.look(f"shop-trouble-{width}-{len(files)}-{button.split()[1]}")
        ada.follow("Choose again")
        ada.page.wait_for_function(
            "document.querySelector('#photos').getBoundingClientRect().bottom <= innerHeight"
        )
    assert [each for each in ada.complaints if "422" not in each and "413" not in each] == []


def test_by_keyboard_alone(browser: Any, shop: Shop, port: int) -> None:
    shop.fill(FILLED)
    ada = Owner(browser, shop, port)
    choosers: list[Any] = []
    ada.page.on("filechooser", lambda chooser: choosers.append(chooser))

    def tab_to(name: str, what: str = "innerText") -> None:
        for _ in range(60):
            ada.page.keyboard.press("Tab")
            if ada.page.evaluate(f"document.activeElement.{what} ?? ''").split("\n")[0].startswith(name):
                return
        raise AssertionError(f"no way to {name}")

    tab_to("To the content")
    ada.page.keyboard.press("Enter")
    ada.page.wait_for_function("location.hash !== ''")
    tab_to("file", "id")
    outline = "getComputedStyle(document.querySelector('label[for=file]')).outlineStyle"
    assert ada.page.evaluate(outline) == "solid"
    ada.page.keyboard.press("Enter")
    while not choosers:
        ada.page.wait_for_timeout(50)
    choosers[0].set_files({"name": "8.png", "mimeType": "image/png", "buffer": png(picture(8))})
    ada.page.locator(".seen").wait_for()
    tab_to("It is this one")
    ada.page.keyboard.press("Enter")
    ada.page.get_by_text("You said: this is").wait_for()
    assert [said.sku for said in shop.corrections.list()] == ["A-08"]
    tab_to("This is wrong")
    ada.page.keyboard.press("Enter")
    tab_to("label", "id")
    ada.page.keyboard.type("blocks")
    ada.page.keyboard.press("Enter")
    ada.page.get_by_text("You said: this is blocks.").wait_for()
    assert ada.complaints == []


def test_the_state_keeps_itself_up_to_date(browser: Any, shop: Shop, port: int) -> None:
    ada = Owner(browser, shop, port)
    ada.page.goto(f"{ada.origin}/recognizer")
    shop.fill(3)
    ada.page.locator("#figures").get_by_text("3", exact=True).first.wait_for()
    assert ada.complaints == []
