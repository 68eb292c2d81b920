"""`search`, `similar`, `inventory` and `products remove` on a small shop: what options do, what is said of nothing."""

import json
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import pytest
import yaml
from tests.client.recognition.shop import picture, recipe
from tests.client.released import Made
from tests.client.serving.conftest import release, settings_in
from typer.testing import CliRunner

from hanse_client import cli
from hanse_client.config import ClientConfig
from hanse_client.gallery.gallery import Gallery
from hanse_client.gallery.product import Product
from hanse_client.personal.corrections import Corrections
from hanse_client.recognition.service import Recognition
from hanse_common.config import load

SOURCE = "hanse-client.yaml"
TWINS = {"A": 90, "B": 92, "C": 94}
"""Products that show one picture, as JPEGs of different size."""

OTHERS = {f"O-{number}": number for number in range(5)}


def opened(folder: Path) -> ClientConfig:
    """A shop with a recognizer and no product."""
    (folder / SOURCE).write_text(yaml.safe_dump(settings_in(folder)))
    config = load(ClientConfig, folder / SOURCE)
    release(config, Made(folder / "made", recipe=recipe(0)), 1)
    picture(1000).save(folder / "twin.png")
    return config


@pytest.fixture(scope="module")
def stocked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shop")
    with Recognition.open(opened(folder)) as recognition:
        for place, (sku, shown) in enumerate((TWINS | OTHERS).items()):
            image = picture(shown) if sku in OTHERS else picture(1000, 4 * shown, 4 * shown)
            product = Product(
                sku=sku,
                title="twin" if sku in TWINS else "other",
                price=Decimal(place),
                category="others" if sku in OTHERS else "twins",
                attributes={"parity": "odd" if place % 2 else "even"},
            )
            recognition.put(product, [image])
    return folder


@pytest.fixture
def shop(stocked: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(stocked)
    return stocked


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ClientConfig]:
    monkeypatch.chdir(tmp_path)
    yield opened(tmp_path)


def said(*words: str) -> str:
    done = CliRunner().invoke(cli.app, words)
    assert done.exit_code == 0, f"{done.output} {done.exception!r}"
    return done.output


def found(*words: str) -> list[str]:
    return [match["product"]["sku"] for match in json.loads(said(*words, "-k", "50", "--json"))["matches"]]


FILTERS: list[tuple[tuple[str, ...], set[str]]] = [
    (("--category", "others"), {"O-0", "O-1", "O-2", "O-3", "O-4"}),
    (("--price-min", "4"), {"O-1", "O-2", "O-3", "O-4"}),
    (("--price-max", "4"), {"B", "C", "O-0", "O-1"}),
    (("-a", "parity=odd"), {"B", "O-0", "O-2", "O-4"}),
    (("--category", "others", "--price-max", "5", "-a", "parity=odd"), {"O-0", "O-2"}),
]
"""Conditions, and the products but A of which they hold."""


@pytest.mark.parametrize(("where", "expected"), FILTERS)
def test_conditions_hold_of_what_is_found(shop: Path, where: tuple[str, ...], expected: set[str]) -> None:
    assert set(found("similar", "A", *where)) == expected
    assert set(found("search", "twin.png", *where)) - {"A"} == expected
    assert set(found("search", "--text", "other", *where)) == expected - set(TWINS)


def test_similar_products_differ_as_far_as_is_asked(shop: Path) -> None:
    def similar(*words: str) -> list[str]:
        return [
            match["product"]["sku"] for match in json.loads(said("similar", "A", *words, "--json"))["matches"]
        ]

    assert set(similar("-k", "2")) == {"B", "C"}
    first, second = similar("-k", "2", "--diversity", "0.9")
    assert first in "BC" and second.startswith("O-")


def test_that_no_product_fits_the_conditions_is_said(shop: Path) -> None:
    for words in (("search", "twin.png"), ("search", "--text", "twin"), ("similar", "A")):
        told = said(*words, "--category", "hats")
        text = "--text, " if "--text" in words else ""
        assert f"nothing: none of your products fits {text}--category, --price-min" in told
        assert "A  twin" not in told
        assert "nothing" not in said(*words, "--category", "twins")


def test_without_a_photo_of_a_product_it_is_said(bare: ClientConfig) -> None:
    none, bare_ones = (
        f"There is no product {what}yet: hanse-client products add." for what in ("", "with a photo ")
    )
    assert f"nothing. {none}" in said("search", "twin.png")
    assert f"nothing. {none}" in said("search", "--text", "clog")
    told = said("inventory", "twin.png")
    assert "Looked at 1 photo; unknown: 1." in told and bare_ones in told
    assert json.loads(said("inventory", "twin.png", "--json"))["counts"] == []
    with Gallery.open(bare.gallery_path) as gallery:
        gallery.put(Product(sku="bare"))
    assert f"nothing. {bare_ones}" in said("search", "twin.png")
    assert bare_ones in said("inventory", "twin.png") and "yet" not in said("search", "--text", "clog")
    with Recognition.open(bare) as recognition:
        recognition.put(Product(sku="A"), [picture(1000)])
    for words in (("inventory", "twin.png"), ("search", "twin.png")):
        assert "yet" not in said(*words)


def test_with_a_product_goes_what_was_said_to_show_it(bare: ClientConfig) -> None:
    with Gallery.open(bare.gallery_path) as gallery:
        for sku in ("A", "B"):
            gallery.put(Product(sku=sku))
    with Corrections(bare.corrections_path) as corrections:
        for seed, sku in enumerate(("A", "A", "B")):
            corrections.add(Gallery.prepare(picture(seed)), sku=sku)
        corrections.add(Gallery.prepare(picture(7)), label="clog")
    assert said("products", "remove", "A") == "Removed A.\n"
    with Corrections(bare.corrections_path) as corrections:
        assert [(one.sku, one.label) for one in corrections.list()] == [("B", None), (None, "clog")]
        assert corrections.count() == 2
