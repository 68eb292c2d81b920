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
