"""The check of a catalog: on real photos with faults put in, through the command and through its own functions."""

import gzip
import json
import shutil
import stat
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression

from hanse_client import cli
from hanse_client.catalog import Catalog
from hanse_client.catalog_check import FEW, ClassCount, Doubts, Findings, check
from hanse_client.config import ClientConfig, LeagueSettings
from hanse_client.policy import Policy
from hanse_client.shop import Shop
from hanse_common.errors import RecognizerError
from hanse_common.vision.backbones import load_backbone
from hanse_common.vision.extraction import extract
from hanse_common.vision.model import build, load_vector, to_vector
from hanse_common.vision.recipe import Recipe
from hanse_common.vision.recipe_features import Preprocessing, Scattering
from hanse_common.vision.recipe_model import Linear
from hanse_common.vision.recognizer import Recognizer
from hanse_common.vision.taxonomy import Taxonomy

CLASSES = ("T-shirt", "Trouser", "Sneaker", "Hat")
PLACES = {0: "T-shirt", 1: "Trouser", 7: "Sneaker"}
RECIPE = Recipe(
    preprocessing=Preprocessing(size=8, channels=1),
    backbone=Scattering(scales=1, angles=4, groups=None),
    model=Linear(),
)

Read = Callable[..., Findings]


@pytest.fixture(scope="module")
def images(data_folder: Path) -> dict[str, list[Image.Image]]:
    """60 real photos of each of three classes."""
    pixels = gzip.decompress((data_folder / "t10k-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((data_folder / "t10k-labels-idx1-ubyte.gz").read_bytes())
    photos = np.frombuffer(pixels, np.uint8, offset=16).reshape(-1, 28, 28)
    codes = np.frombuffer(labels, np.uint8, offset=8)
    return {
        name: [Image.fromarray(photos[i]).convert("RGB") for i in np.flatnonzero(codes == code)[:60]]
        for code, name in PLACES.items()
    }


@pytest.fixture(scope="module")
def trained(images: dict[str, list[Image.Image]]) -> Recognizer:
    """A recognizer of the three classes and one more, learned from the second halves of the photos."""
    halves = [(CLASSES.index(name), image) for name, all_ in images.items() for image in all_[30:]]
    features = extract(load_backbone(RECIPE), [image for _, image in halves], RECIPE.views, "cpu")
    labels = [label for label, _ in halves]
    model = LogisticRegression(C=100, max_iter=500).fit(features, labels)
    weights, biases = np.zeros((4, features.shape[1])), np.full(4, -9.0)
    weights[:3], biases[:3] = model.coef_, model.intercept_
    module = build(RECIPE, 4)
    load_vector(module, np.concatenate([weights.ravel(), biases]).astype(np.float32))
    return Recognizer.create(RECIPE, Taxonomy(classes=CLASSES), to_vector(module), created=datetime.now(UTC))


@pytest.fixture
def folder(tmp_path: Path, images: dict[str, list[Image.Image]]) -> Path:
    """A shop of 25 photos a class."""
    for name, all_ in images.items():
        place = tmp_path / "photos" / name
        place.mkdir(parents=True)
        for number, image in enumerate(all_[:25]):
            image.save(place / f"{number:02}.png")
    return tmp_path


@pytest.fixture
def config(folder: Path) -> ClientConfig:
    return ClientConfig(
        photos=folder / "photos",
        state=folder / "state",
        recognizer=folder / "recognizer",
        holdout_fraction=0.3,
        device="cpu",
        league=LeagueSettings(operator_key="b1" * 32, charter="a1" * 32, taxonomy=Taxonomy(classes=CLASSES)),
        policy=Policy(league="test", epsilon=4.0, delta=1e-5),
    )


@pytest.fixture
def read(config: ClientConfig) -> Read:
    """A function that checks the shop."""

    def run(**changes: object) -> Findings:
        shop = Shop(config.model_copy(update=changes))
        return check(shop, shop.catalog())

    return run


def names(findings: Findings, kind: str) -> list[list[str]]:
    return [
        [f"{record.path.parent.name}/{record.path.name}" for record in group.records]
        for group in getattr(findings, kind)
    ]


def test_a_shop_in_order_has_no_findings(read: Read) -> None:
    found = read()
    assert (found.copies, found.alike, found.problems, found.doubts) == ((), (), (), None)
    assert [each.name for each in found.empty] == ["Hat"] and found.few == () and found.uneven is None
    assert sum(each.total for each in found.classes) == 75 == len(found.catalog.records)
    assert [each.holdout for each in found.classes] == [
        sum(record.label == code for record in found.catalog.holdout) for code in range(4)
    ]


def test_balance() -> None:
    def findings(*totals: int) -> Findings:
        classes = tuple(
            ClassCount(str(n), total - total // 10, total // 10) for n, total in enumerate(totals)
        )
        return Findings(Catalog((), (), {}), classes, (), (), (), None)

    assert [each.name for each in findings(0, FEW - 1, FEW, 500).few] == ["1"]
    assert [each.name for each in findings(0, 1, 0).empty] == ["0", "2"]
    assert findings(0, 50, 500, 400).uneven is None
    large, small = findings(0, 49, 500, 400).uneven or (None, None)
    assert large is not None and small is not None and (large.name, small.name) == ("2", "1")
    assert findings(0, 0).uneven is None


def test_copies_and_look_alikes_are_told_apart(folder: Path, read: Read) -> None:
    photos = folder / "photos"
    shutil.copy(photos / "T-shirt" / "03.png", photos / "T-shirt" / "again.png")
    shutil.copy(photos / "T-shirt" / "04.png", photos / "Sneaker" / "shirt.png")
    Image.open(photos / "Trouser" / "05.png").save(photos / "Trouser" / "five.jpg", quality=85)
    Image.open(photos / "T-shirt" / "04.png").resize((56, 56)).save(photos / "Trouser" / "large.png")
    found = read()
    assert names(found, "copies") == [
        ["Sneaker/shirt.png", "T-shirt/04.png"],
        ["T-shirt/03.png", "T-shirt/again.png"],
    ]
    assert [group.across_classes for group in found.copies] == [True, False]
    assert names(found, "alike") == [
        ["Sneaker/shirt.png", "T-shirt/04.png", "Trouser/large.png"],
        ["Trouser/05.png", "Trouser/five.jpg"],
    ]
    assert [group.across_classes for group in found.alike] == [True, False]
    assert all(not group.across_border for group in found.copies)


def test_look_alikes_over_the_holdouts_border(folder: Path, read: Read) -> None:
    place = folder / "photos" / "Trouser"
    for number in range(12):
        image = Image.open(place / f"{number:02}.png")
        image.resize((image.width * 2, image.height * 2)).save(place / f"{number:02}-large.png")
    found = read()
    sides = {record.path: record.holdout for record in found.catalog.records}
    assert len(found.alike) >= 10
    for group in found.alike:
        assert group.across_border == (len({sides[record.path] for record in group.records}) == 2)
    assert {group.across_border for group in found.alike} == {True, False}


def test_a_check_changes_nothing(folder: Path, config: ClientConfig, trained: Recognizer) -> None:
    """Neither catalog nor files: a record's fate depends on that record alone."""
    trained.save(folder / "recognizer")
    place = folder / "photos" / "Trouser"
    shutil.copy(place / "01.png", place / "twin.png")
    shop = Shop(config)
    before = shop.catalog()
    files = {path: path.read_bytes() for path in (folder / "photos").rglob("*.*")}
    found = check(shop, before)
    assert found.copies and found.doubts is not None
    assert shop.catalog() == before == found.catalog
    assert {path: path.read_bytes() for path in (folder / "photos").rglob("*.*")} == files
    examples, problems = shop.examples(before, RECIPE)
    assert len(examples) == len(before.train) and problems == ()


def test_damage_that_only_decoding_shows_is_a_problem_for_each_copy(folder: Path, read: Read) -> None:
    place = folder / "photos" / "Trouser"
    torn = (place / "02.png").read_bytes()[:-60]
    (place / "02.png").write_bytes(torn)
    (place / "02-copy.png").write_bytes(torn)
    (place / "notes.txt").write_text("no photo")
    found = read()
    assert [each.path.name for each in found.problems] == ["02-copy.png", "02.png", "notes.txt"]
    assert all(str(each.path) in each.reason for each in found.problems)
    assert "damaged PNG" in found.problems[0].reason


def test_suspects(folder: Path, read: Read, trained: Recognizer) -> None:
    trained.save(folder / "recognizer")
    photos = folder / "photos"
    (photos / "Sneaker" / "07.png").rename(photos / "Trouser" / "wrong.png")
    found = read().doubts
    assert found is not None and found.can_judge and found.agreement > 0.8
    first = found.suspects[0]
    assert (first.record.path.name, first.instead) == ("wrong.png", "Sneaker")
    assert first.given < 0.1 < 0.6 < first.likelier
    assert len(found.suspects) <= 6


def test_a_recognizer_that_knows_too_little_suspects_nothing(
    folder: Path, read: Read, trained: Recognizer
) -> None:
    turned = trained.vector.reshape(-1).copy()
    turned *= -1
    Recognizer.create(RECIPE, trained.card.taxonomy, turned, created=datetime.now(UTC)).save(
        folder / "recognizer"
    )
    found = read().doubts
    assert found is not None and not found.can_judge and found.suspects == ()
    assert not Doubts(0.5, ()).can_judge and Doubts(0.51, ()).can_judge


def test_classes_are_matched_by_name(folder: Path, read: Read, trained: Recognizer) -> None:
    """A recognizer of other classes, in another order: what it does not know is not judged."""
    taxonomy = Taxonomy(classes=("Sneaker", "Boot", "Trouser"))
    weights = trained.vector[:-4].reshape(4, -1)
    chosen = [2, 3, 1]
    vector = np.concatenate([weights[chosen].ravel(), trained.vector[-4:][chosen]])
    Recognizer.create(RECIPE, taxonomy, vector, created=datetime.now(UTC)).save(folder / "recognizer")
    found = read().doubts
    assert found is not None and found.agreement > 0.9
    assert not any(each.record.path.parent.name == "T-shirt" for each in found.suspects)


def test_a_damaged_recognizer_is_an_error_before_photos_are_looked_at(
    folder: Path, config: ClientConfig, trained: Recognizer
) -> None:
    trained.save(folder / "recognizer")
    (folder / "recognizer" / "model.safetensors").write_bytes(b"damaged")
    shop = Shop(config)
    told: list[str] = []
    with pytest.raises(RecognizerError, match=r"model\.safetensors"):
        check(shop, shop.catalog(), lambda what, done, total: told.append(what))
    assert told == []


# The command


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


Run = Callable[..., Result]

CONFIG = f"""\
photos: photos
state: state
recognizer: recognizer
holdout_fraction: 0.3
device: cpu
league:
  operator_key: {"b1" * 32}
  charter: {"a1" * 32}
  taxonomy: {{classes: [T-shirt, Trouser, Sneaker, Hat]}}
policy: {{league: test, epsilon: 4.0, delta: 1e-5}}
"""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], folder: Path) -> Run:
    """A function that calls the command in the shop's folder."""
    monkeypatch.chdir(folder)
    (folder / "hanse-client.yaml").write_text(CONFIG)

    def run(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["hanse-client", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capfd.readouterr()
        return Result(int(caught.value.code or 0), captured.out, captured.err)

    return run


def test_the_command_says_what_it_found(run: Run, folder: Path, trained: Recognizer) -> None:
    photos = folder / "photos"
    result = run("catalog")
    assert (result.code, result.err) == (0, "")
    assert "No photos of: Hat." in result.out
    assert "Duplicates: none. Groups that look the same: none." in result.out
    assert "not looked for, as that takes a recognizer, and there is none in recognizer yet" in result.out
    trained.save(folder / "recognizer")
    shutil.copy(photos / "Trouser" / "01.png", photos / "Sneaker" / "twin.png")
    Image.open(photos / "Trouser" / "05.png").save(photos / "Trouser" / "five.jpg", quality=85)
    for number in range(23):
        (photos / "Sneaker" / f"{number:02}.png").unlink()
    result = run("catalog", "--problems", "1")
    assert (result.code, result.err) == (0, "")
    assert "Few photos, under 20, of: Sneaker (3)." in result.out
    assert "Uneven" not in result.out
    assert "Duplicates: 1. Groups that look the same: 1. Suspect labels: " in result.out
    assert "photos/Sneaker/twin.png, photos/Trouser/01.png  (in different classes)" in result.out
    assert "photos/Trouser/05.png, photos/Trouser/five.jpg" in result.out
    assert "nothing is merged: what happens to a photo may depend on that photo alone" in result.out
    assert (
        "photos/Sneaker/twin.png: filed as Sneaker (" in result.out and "looks like Trouser (" in result.out
    )


def test_uneven_classes_are_said(run: Run, folder: Path) -> None:
    for number in range(1, 25):
        (folder / "photos" / "Sneaker" / f"{number:02}.png").unlink()
    assert "Uneven: T-shirt has 25 times the photos of Sneaker." in run("catalog").out


def test_json_says_all_of_it(run: Run, folder: Path, trained: Recognizer) -> None:
    photos = folder / "photos"
    summary = json.loads(run("catalog", "--json").out)
    assert summary["suspects"] is None and summary["agreement"] is None
    trained.save(folder / "recognizer")
    shutil.copy(photos / "Trouser" / "01.png", photos / "Sneaker" / "twin.png")
    (photos / "Boots").mkdir()
    shutil.copy(photos / "Trouser" / "01.png", photos / "Boots" / "b.png")
    (photos / "Hat").mkdir()
    (photos / "Hat" / "h.png").write_bytes(b"")
    result = run("catalog", "--json", "--html", "sheet.html")
    summary = json.loads(result.out)
    assert [each["name"] for each in summary["classes"]] == list(CLASSES)
    assert sum(each["train"] + each["holdout"] for each in summary["classes"]) == 76
    assert summary["unmapped"] == {"Boots": 1}
    assert [each["photo"] for each in summary["problems"]] == ["photos/Hat/h.png"]
    (copies,) = summary["copies"]
    assert copies["photos"] == ["photos/Sneaker/twin.png", "photos/Trouser/01.png"]
    assert copies["classes"] == ["Sneaker", "Trouser"] and copies["across_classes"] is True
    assert summary["alike"] == [] and summary["agreement"] > 0.8
    assert "photos/Sneaker/twin.png" in [each["photo"] for each in summary["suspects"]]
    assert stat.S_IMODE((folder / "sheet.html").stat().st_mode) == 0o600


def test_the_sheet_is_said_and_a_wrong_place_is_an_error(run: Run, folder: Path) -> None:
    result = run("catalog", "--html", "sheet.html", "--language", "zh")
    assert result.code == 0 and "Wrote sheet.html. It shows your photos" in result.out
    assert 'lang="zh-Hans"' in (folder / "sheet.html").read_text()
    result = run("catalog", "--html", "nowhere/sheet.html")
    assert result.code == 10 and "nowhere/sheet.html: the contact sheet cannot be written" in result.err
    assert run("catalog", "--html", "sheet.html", "--language", "de").code == 2
