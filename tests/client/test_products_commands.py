"""`products`: words need no recognizer, and what looks the same is told."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from sklearn.datasets import load_sample_images
from tests.client.released import Made
from tests.client.serving.conftest import release, settings_in
from typer.testing import CliRunner

from hanse_client import cli
from hanse_client.config import ClientConfig
from hanse_common.config import load


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a shop without a recognizer, in which the commands run."""
    (tmp_path / "hanse-client.yaml").write_text(yaml.safe_dump(settings_in(tmp_path)))
    Image.new("RGB", (32, 32), (90, 160, 20)).save(tmp_path / "shoe.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def invoke(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(cli.app, ["products", *words])
    return getattr(done.exception, "exit_code", done.exit_code), f"{done.output}{done.exception or ''}"


def told(*words: str) -> Any:
    code, said = invoke(*words, "--json")
    assert code == 0, said
    return json.loads(said)


def test_a_product_without_a_photo_needs_no_recognizer(shop: Path) -> None:
    added = told("add", "A-17", "--title", "Trail shoe", "--price", "59.90", "-a", "size=42")
    assert (added["title"], added["price"], added["photos"]) == ("Trail shoe", "59.90", [])
    assert told("update", "A-17", "--category", "shoes", "-a", "colour=red") == added | {
        "category": "shoes",
        "attributes": {"size": "42", "colour": "red"},
    }
    assert invoke("add", "B", "--title", "Boot") == (0, "Added B with 0 photos.\n")
    assert invoke("update", "B", "--title", "Boots") == (0, "Changed B; it has 0 photos.\n")
    code, said = invoke("list", "--category", "shoes", "--price-max", "60")
    assert code == 0 and said.startswith("A-17  Trail shoe  59.90")
    assert (
        invoke("add", "A-17")[0] == invoke("update", "C")[0] == invoke("add", "C", "--price", "dear")[0] == 30
    )


def test_a_photo_needs_one_and_without_it_nothing_is_done(shop: Path) -> None:
    code, said = invoke("add", "A-17", "--photo", "shoe.png")
    assert code == 10 and "recognizer" in said
    assert invoke("add", "A-17", "--photo", "nowhere.png")[0] == 21
    assert invoke("show", "A-17")[0] == 30


def test_a_word_that_is_not_in_the_terminals_encoding_names_no_product(shop: Path) -> None:
    for words in (("show", "\udcff"), ("remove", "\udcff"), ("update", "\udcff")):
        code, said = invoke(*words)
        assert code == 30 and r"'\udcff'" in said


def test_a_product_named_twice_is_removed_once(shop: Path) -> None:
    told("add", "Cafe\u0301")
    assert told("remove", "Caf\u00e9", "Cafe\u0301", "Caf\u00e9") == {"removed": {"Caf\u00e9": True}}


def test_the_options_of_a_command_are_in_its_help_once(shop: Path) -> None:
    for command in ("add", "update", "list"):
        _, said = invoke(command, "--help")
        assert said.count("--category") == said.count("--attribute") == 1
        assert "--fields" not in said and "--where" not in said


def test_products_that_look_the_same_under_two_skus_are_named(shop: Path) -> None:
    release(load(ClientConfig, shop / "hanse-client.yaml"), Made(shop / "made"), 1)
    scene = Image.fromarray(load_sample_images().images[0])
    for sku, corner, size in (("A", 0, 200), ("B", 0, 180), ("C", 100, 200)):
        part = scene.crop((corner, corner, corner + 200, corner + 200))
        part.resize((size, size)).save(shop / f"{sku}.jpg")
        assert told("add", sku, "--photo", f"{sku}.jpg")["sku"] == sku
    assert told("check")["twins"] == [["A", "B"]]
    _, said = invoke("check")
    assert "2 products look the same under several SKUs: A and B." in " ".join(said.split())
    told("remove", "B")
    assert told("check")["twins"] == [] and "several SKUs" not in invoke("check")[1]


def test_what_is_named_empty_is_taken_away(shop: Path) -> None:
    price = ("--title", "Shoe", "--price", "59,90", "--currency", "EUR")
    told("add", "A", *price, "--category", "shoes", "-a", "size=42", "-a", "colour=red", "-a", "fit=")
    assert told("update", "A", "-a", "size=")["attributes"] == {"colour": "red"}
    assert told("update", "A", "--category", "")["category"] is None
    assert told("update", "A")["price"] == "59.90"
    left = told("update", "A", "--price", "", "--currency", "", "--title", "")
    assert left == {
        "sku": "A",
        "title": "",
        "price": None,
        "currency": None,
        "category": None,
        "attributes": {"colour": "red"},
        "photos": [],
    }


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("add", "A", "--currency", "EURO"),
            "currency: found 'EURO', expected three capital letters, such as EUR.",
        ),
        (("add", "A", "--price", "1e3"), "--price: found '1e3', expected a number such as 59.90"),
        (("add", "A", "--price", "1,299"), "--price: found '1,299', which may be 1299 or 1.299"),
        (("list", "--price-max", "1.299"), "--price-max: found '1.299', which may be"),
        (("list", "--category", ""), "category: found '', expected 1 to 128 characters in one line."),
    ],
)
def test_what_is_wrong_is_told_in_words(shop: Path, words: tuple[str, ...], said: str) -> None:
    code, text = invoke(*words)
    assert code == 30 and said in text and "command again" in text


def scene(corner: int, size: int) -> Image.Image:
    """A part of a photo, as large as `size`."""
    part = Image.fromarray(load_sample_images().images[0]).crop((corner, corner, corner + 200, corner + 200))
    return part.resize((size, size))


@pytest.fixture
def released(shop: Path) -> Path:
    """A shop with a recognizer, and photos 0.png to 5.png, each of another part of a scene."""
    release(load(ClientConfig, shop / "hanse-client.yaml"), Made(shop / "made"), 1)
    for number in range(6):
        scene(40 * number, 100).save(shop / f"{number}.png")
    return shop


def test_one_photo_is_removed_and_the_product_stays(released: Path) -> None:
    told("add", "A", "-p", "0.png", "-p", "1.png", "-p", "2.png")
    first, second, third = told("show", "A")["photos"]
    code, said = invoke("show", "A")
    assert code == 0 and f"3 photos: {first[:8]}, {second[:8]}, {third[:8]}" in " ".join(said.split())
    for words in (
        ("remove", "A", "--photo", "00000000"),
        ("remove", "A", "-p", first[:7]),
        ("remove", "A", "-p", ""),
    ):
        code, said = invoke(*words)
        assert code == 30 and "expected" in said
    assert invoke("remove", "A", "-p", first, "-p", "00000000")[0] == 30
    assert invoke("remove", "A", "B", "-p", first)[0] == invoke("remove", "B", "-p", first)[0] == 30
    assert told("show", "A")["photos"] == [first, second, third]
    assert invoke("remove", "A", "--photo", second[:8].upper()) == (
        0,
        "Removed 1 photo of A; it has 2 photos.\n",
    )
    assert told("remove", "A", "-p", first[:9], "-p", first)["photos"] == [third]
    assert told("show", "A")["photos"] == [third]


def test_an_import_says_what_it_did(released: Path) -> None:
    file = released / "products.csv"
    file.write_text("sku,title,photo\nA,Shoe,0.png\nA,,1.png\nB,Boot,none.png\n,no sku,\n")
    code, said = invoke("import", "products.csv")
    assert code == 30 and said.startswith("Took in 2 products with 2 photos.")
    assert "products.csv: left out 1 row and 1 photo:" in said
    assert (
        "products.csv:4: none.png: found no such file" in said
        and "'B' was taken in without this photo." in said
    )
    assert str(released) not in said
    code, said = invoke("import", "products.csv")
    assert code == 30 and said.startswith("Nothing new.") and "Took in" not in said
    file.write_text("sku,title,photo\nA,Shoe,0.png\n")
    assert invoke("import", "products.csv") == (0, "Nothing new: your products are as the file has them.\n")
    assert told("import", "products.csv")["rows"] == 1
    file.write_text("sku,title,photo\n")
    assert invoke("import", "products.csv") == (0, "The file has no row below the names of its columns.\n")


def test_an_import_that_is_stopped_says_that_it_can_go_on(
    released: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (released / "products.csv").write_text("sku,title\nA,Shoe\n")

    def stop(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hanse_client.recognition.service.import_products", stop)
    monkeypatch.setattr("sys.argv", ["hanse-client", "products", "import", "products.csv"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 130
    said = " ".join(capsys.readouterr().err.split())
    assert (
        "What was taken in by now stays. Call the command again, and it goes on from there. stopped" in said
    )


def test_a_photo_at_two_products_is_named_once_and_where_it_is_wrong(released: Path) -> None:
    """A photo of A's got to B, too: each product has more of its own, that look like one another."""
    for sku, corner, name in (("A", 0, "0.png"), ("B", 200, "5.png")):
        for number in range(2):
            scene(corner + 1 + number, 100).save(released / f"{sku}{number}.png")
        told("add", sku, "-p", f"{sku}0.png", "-p", f"{sku}1.png", "-p", name)
    told("update", "B", "-p", "0.png")
    photo = told("show", "B")["photos"][-1]
    assert photo in told("show", "A")["photos"]
    found = told("check")["misplaced"]
    assert [(one["sku"], one["photo"], one["instead"]) for one in found] == [("B", photo, "A")]
    _, said = invoke("check")
    said = " ".join(said.split())
    assert f"Perhaps at the wrong product: {photo[:8]} of B looks like A." in said
    assert f"{photo[:8]} of A and B" in said
    (summary,) = [line for line in invoke("check")[1].splitlines() if line.startswith("Looked at")]
    assert summary.startswith("Looked at 6 photos of 2 products: 1 perhaps at the wrong product, ")


def test_check_tells_how_often_photos_are_wrongly_not_in_the_catalog(released: Path) -> None:
    assert told("check")["rates"]["genuine"] == 0 and "tried on your photos" not in invoke("check")[1]
    for sku, first in (("A", 0), ("B", 90), ("C", 180)):
        for number in range(3):
            scene(first + 15 * number, 100).save(released / f"{sku}{number}.png")
        told("add", sku, "-p", f"{sku}0.png", "-p", f"{sku}1.png", "-p", f"{sku}2.png")
    found = told("check")
    rates = found["rates"]
    assert rates["genuine"] > 3 < rates["impostor"] and not rates["calibrated"]
    said = " ".join(invoke("check")[1].split())
    assert f"said of {100 * rates['false_reject']:.0f} % of {rates['genuine']} that show a product" in said
    assert (
        f"not said of {100 * rates['false_accept']:.0f} % of {rates['impostor']}, each without its product"
        in said
    )
