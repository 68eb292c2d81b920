"""What tests of the recognizer's page share: a small shop at work, its photos, and who comes to its page."""

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image
from starlette.types import ASGIApp
from tests import browser
from tests.browser import FORM, SCREENSHOTS

from hanse_client.config import ClientConfig
from hanse_client.gallery.product import Product
from hanse_client.page_access import make_token, read_token
from hanse_client.personal.corrections import Corrections
from hanse_client.recognition.service import Recognition
from hanse_client.serving.page import build
from hanse_common.vision.recipe import Recipe
from hanse_common.vision.recipe_features import Preprocessing, Scattering
from hanse_common.vision.recipe_model import Linear
from hanse_common.vision.recognizer import Recognizer
from hanse_common.vision.taxonomy import Taxonomy

GIVE = """([data, kind]) => {
  const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], "photo.png", { type: "image/png" }));
  const event = kind === "paste"
    ? new ClipboardEvent("paste", { clipboardData: transfer, bubbles: true, cancelable: true })
    : new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true });
  document.querySelector("h1").dispatchEvent(event);
}"""
"""Drops or pastes a photo."""

PORT = 8766
CLASSES = ("shirt", "shoe", "bag")
TOKEN_FILE = "serve.token"  # noqa: S105 - a name
RECIPE = Recipe(
    preprocessing=Preprocessing(size=16, channels=3),
    backbone=Scattering(scales=1, angles=2, groups=None),
    model=Linear(),
)


def picture(seed: int, side: int = 48) -> Image.Image:
    """An invented photo: a few blocks of colour, other ones for each seed."""
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((side, side), Image.Resampling.NEAREST)


def png(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def product(number: int, **changes: Any) -> Product:
    fields: dict[str, Any] = {
        "sku": f"A-{number:02}",
        "title": f"Shirt number {number}",
        "price": Decimal("12.50"),
        "currency": "EUR",
        "category": "Tops" if number % 2 else "Shoes",
        "attributes": {"size": "M"},
    }
    return Product(**(fields | changes))


@dataclass
class Shop:
    """A shop whose recognizer is at work."""

    config: ClientConfig
    recognition: Recognition

    @cached_property
    def corrections(self) -> Corrections:
        return Corrections(self.config.corrections_path)

    def app(self, port: int = PORT) -> ASGIApp:
        return build(
            self.recognition,
            self.config,
            cookie=f"hanse-shop-{port}",
            token=lambda: read_token(self.config.state, TOKEN_FILE),
            hosts=("127.0.0.1", "localhost"),
        )

    def address(self, port: int = PORT) -> str:
        return f"http://127.0.0.1:{port}/?token={make_token(self.config.state, TOKEN_FILE)}"

    def fill(self, count: int) -> None:
        """Put products with one photo each, number 0 on; the threshold goes by them."""
        for number in range(count):
            self.recognition.put(product(number), [picture(number)])
        self.recognition.gallery.open_set.calibrate(self.recognition.status().embedding)


def make_recognizer(folder: Path, recipe: Recipe = RECIPE) -> None:
    """Save a recognizer that nobody trained."""
    vector = np.random.default_rng(0).normal(size=recipe.dimension(len(CLASSES))).astype(np.float32)
    created = datetime(2026, 1, 1, tzinfo=UTC)
    Recognizer.create(recipe, Taxonomy(classes=CLASSES), vector, created=created).save(folder / "recognizer")


@contextmanager
def a_shop(folder: Path, *, follow: bool = False, **changes: Any) -> Iterator[Shop]:
    """A shop in `folder`, where its recognizer is. With `follow` it is at work as the service has it."""
    config = ClientConfig.model_validate(
        {
            "photos": folder,
            "state": folder / "state",
            "device": "cpu",
            "recognizer": folder / "recognizer",
            "league": {"operator_key": "00" * 32, "charter": "00" * 32, "taxonomy": {"classes": CLASSES}},
            "policy": {"league": "test", "epsilon": 6.0, "delta": 2e-5},
        }
        | changes
    )
    with Recognition.open(config, follow=follow) as recognition:
        shop = Shop(config, recognition)
        yield shop
        shop.corrections.close()


class Visitor(browser.Visitor):
    """A browser of few words that has photos to send."""

    def __init__(self, app: ASGIApp) -> None:
        super().__init__(app, f"http://127.0.0.1:{PORT}")

    def send(
        self,
        path: str,
        photos: Sequence[bytes],
        field: str = "photo",
        headers: Mapping[str, str] = FORM,
        **fields: str,
    ) -> httpx.Response:
        """Post a form with photos, an empty one where none is chosen, as browsers do."""
        files = [(field, (f"{n}.png" if data else "", data)) for n, data in enumerate(photos or [b""])]
        data = {"key": self.key()} | fields
        return self.ask("POST", path, data=data, files=files, headers=dict(headers))

    def show(self, image: Image.Image) -> str:
        """Have the page look at a photo; return where what it shows stands."""
        answer = self.send("/photo", [png(image)])
        assert answer.status_code == 303
        return str(answer.headers["location"])


class Owner(browser.Person):
    """The owner at a browser, let in to `shop`."""

    def __init__(self, browser: Any, shop: Shop, port: int, **options: Any) -> None:
        super().__init__(browser, f"http://127.0.0.1:{port}", **options)
        self.enter(shop.address(port))

    def look(self, name: str) -> None:
        if SCREENSHOTS:
            self.page.wait_for_load_state("networkidle")  # its photos are there
        super().look(name)

    def choose(self, data: bytes) -> None:
        """Choose a photo, and wait for what it shows."""
        self.page.evaluate("document.querySelector('#result').replaceChildren()")
        file = {"name": "photo.png", "mimeType": "image/png", "buffer": data}
        self.page.get_by_label("Choose a photo").set_input_files(file)
        self.page.locator(".seen, #photo-error").wait_for()

    def give(self, data: bytes, how: str) -> None:
        """Drop or paste a photo."""
        self.page.evaluate("document.querySelector('#result').replaceChildren()")
        self.page.evaluate(GIVE, [base64.b64encode(data).decode(), how])
        self.page.locator(".seen").wait_for()

    def heard(self) -> str:
        """What a screen reader is told."""
        found: str = self.page.inner_text("#said")
        return found
