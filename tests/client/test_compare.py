"""The league's recognizer beside one trained alone: real photos, real embeddings, and other libraries' figures."""

import functools
import hashlib
import itertools
import json
import re
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import binomtest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from hanse_client import cli, compare, templates
from hanse_client.catalog import Catalog
from hanse_client.cli.options import photos
from hanse_client.compare import Comparison, judge, sign_test, train_alone, wilson
from hanse_client.config import ClientConfig, LeagueSettings
from hanse_client.shop import Shop
from hanse_common.config import load
from hanse_common.errors import CatalogError, ConfigError
from hanse_common.vision.backbones import load_backbone
from hanse_common.vision.centring import Centre
from hanse_common.vision.extraction import extract
from hanse_common.vision.metrics import ClassificationReport
from hanse_common.vision.recipe import Recipe
from hanse_common.vision.recipe_features import Preprocessing, Projection, PublicWhitening, Scattering
from hanse_common.vision.recipe_model import Linear, SmallCnn
from hanse_common.vision.recognizer import Recognizer
from hanse_common.vision.taxonomy import Taxonomy
from hanse_common.vision.whitening import Whitening
from hanse_common.web.pages import Pages, faults

CLASSES = ("shirt", "shoe", "bag")
RECIPE = Recipe(
    preprocessing=Preprocessing(size=8, channels=1),
    backbone=Scattering(scales=1, angles=2, groups=None, projection=Projection(dimensions=12)),
    model=Linear(),
)
NOISE = 140
"""Of the photos' grey, its standard deviation: enough that nobody gets all right."""

KEYS = {
    name: f"{number:02x}" * 32
    for number, name in enumerate(LeagueSettings.model_fields, 1)
    if name != "taxonomy"
}


def picture(label: int, seed: int) -> Image.Image:
    """Return noise over stripes, the other stripes, or a chessboard."""
    down, across = np.indices((16, 16)) // 4 % 2
    pattern = (down, across, down ^ across)[label]
    noise = np.random.default_rng(seed).normal(scale=NOISE, size=(16, 16))
    return Image.fromarray(np.clip(80 + 90 * pattern + noise, 0, 255).astype(np.uint8))


@functools.cache
def league_vector() -> np.ndarray:
    """Return a head trained on 600 photos of other shops, as the recipe's vector."""
    labels = [number % 3 for number in range(600)]
    images = [picture(label, 1000 + number) for number, label in enumerate(labels)]
    features = extract(load_backbone(RECIPE), images, RECIPE.views, "cpu")
    head = LogisticRegression(C=100, max_iter=1000).fit(features, labels)
    return np.concatenate([head.coef_.ravel(), head.intercept_]).astype(np.float32)


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A shop's folder: 90 photos, 30 of each class, and a league's recognizer."""
    for number in range(90):
        path = tmp_path / "photos" / CLASSES[number % 3] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number % 3, number).save(path)
    made = Recognizer.create(RECIPE, Taxonomy(classes=CLASSES), league_vector(), created=datetime.now(UTC))
    made.save(tmp_path / "league")
    write_config(tmp_path)
    (tmp_path / "state").mkdir(mode=0o700)
    (tmp_path / "state" / "holdout.key").write_bytes(bytes(32))
    return tmp_path


def write_config(folder: Path, classes: tuple[str, ...] = CLASSES, **changes: Any) -> None:
    fields = {
        "photos": "photos",
        "state": "state",
        "recognizer": "league",
        "holdout_fraction": 0.4,
        "device": "cpu",
        "league": KEYS | {"taxonomy": {"classes": list(classes)}},
        "policy": {"league": "test", "epsilon": 3.0},
    }
    (folder / "hanse-client.yaml").write_text(yaml.safe_dump(fields | changes))


def open_shop(folder: Path) -> Shop:
    return Shop(load(ClientConfig, folder / "hanse-client.yaml"))


def compared(folder: Path) -> tuple[Comparison, Catalog, Recognizer]:
    shop, recognizer = open_shop(folder), Recognizer.load(folder / "league")
    return compare.compare(shop, recognizer), shop.catalog(), recognizer


def test_each_is_judged_by_what_it_says_of_the_held_out_photos(shop: Path) -> None:
    found, catalog, recognizer = compared(shop)
    said = recognizer.predict([record.open() for record in catalog.holdout]).argmax(axis=1)
    labels = np.array([record.label for record in catalog.holdout])
    assert found.photos == len(catalog.holdout) > 20
    assert found.league.right == np.sum(said == labels)
    assert found.league.accuracy == np.mean(said == labels) > 0.6
    assert found.alone.accuracy > 0.5
    assert found.league.report.confusion.sum(axis=1).tolist() == np.bincount(labels, minlength=3).tolist()
    assert found.only_league - found.only_alone == found.league.right - found.alone.right
    assert sum(found.trained) == len(catalog.train) == 90 - found.photos
    assert found.strength in compare._STRENGTHS
    assert found.problems == ()


def test_it_is_the_same_every_time(shop: Path) -> None:
    assert compared(shop)[0].to_json() == compared(shop)[0].to_json()


def test_held_out_photos_teach_the_one_trained_alone_nothing(shop: Path) -> None:
    """Other labels of the same held-out photos change what is right, and nothing that is said."""
    before, catalog, _ = compared(shop)
    for record in catalog.holdout:
        record.path.rename(shop / "photos" / "bag" / record.path.name)
    after, moved, _ = compared(shop)
    assert len(moved.holdout) == before.photos == after.alone.report.confusion[2].sum()
    assert (
        after.alone.report.confusion.sum(axis=0).tolist()
        == before.alone.report.confusion.sum(axis=0).tolist()
    )
    assert after.alone.right < before.alone.right


def test_nothing_is_charged_and_the_embeddings_are_kept(shop: Path) -> None:
    compared(shop)
    assert not open_shop(shop).config.ledger_path.exists()
    assert (shop / "state" / "embeddings.sqlite").exists()
    heard: list[tuple[int, int]] = []
    compare.compare(open_shop(shop), Recognizer.load(shop / "league"), lambda *done: heard.append(done))
    assert heard == [(90, 90)]


def test_what_the_recipe_needs_comes_with_the_recognizer(shop: Path) -> None:
    """Whitening and centre, which the configuration does not name, since the recognizer's folder has them."""
    raw = RECIPE.raw_dimension
    source = np.random.default_rng(1)
    whitening = Whitening(np.zeros(raw, dtype=np.float32), source.normal(size=(raw, 12)).astype(np.float32))
    centre = Centre(np.full(12, 0.25, dtype=np.float32), 0.1, 1e-6)
    files = {"whitening": shop / "whitening", "centre": shop / "centre"}
    files["whitening"].write_bytes(whitening.to_bytes())
    files["centre"].write_bytes(centre.to_bytes())
    digest = hashlib.sha256(whitening.to_bytes()).hexdigest()
    backbone = Scattering(
        scales=1, angles=2, groups=None, whitening=PublicWhitening(dimensions=12, weights=digest)
    )
    recipe = RECIPE.model_copy(update={"backbone": backbone, "centre": centre.digest})
    vector = source.normal(size=recipe.dimension(3)).astype(np.float32)
    taxonomy = Taxonomy(classes=CLASSES)
    made = Recognizer.create(recipe, taxonomy, vector, created=datetime.now(UTC), **files)
    made.save(shop / "league")
    found, catalog, recognizer = compared(shop)
    said = recognizer.predict([record.open() for record in catalog.holdout])
    report = ClassificationReport.of(np.array([record.label for record in catalog.holdout]), said)
    assert found.league.report.confusion.tolist() == report.confusion.tolist()
    assert found.league.report.log_loss == pytest.approx(report.log_loss, abs=1e-6)


def test_a_class_that_the_shop_has_no_photo_of(shop: Path) -> None:
    before, catalog, _ = compared(shop)
    for record in catalog.train:
        if record.label == 0:
            record.path.unlink()
    found, _, _ = compared(shop)
    assert before.unknown == ()
    assert found.unknown == ("shirt",)
    assert found.trained == (0, *before.trained[1:])
    assert found.alone.report.confusion[:, 0].tolist() == [0, 0, 0]
    assert (found.league.report.per_class[0].recall or 0.0) > 0.5
    for known in (1, 2):
        assert (found.alone.report.per_class[known].recall or 0.0) > 0.5
    assert found.only_league > found.only_alone


def test_one_class_alone(shop: Path) -> None:
    for name in ("shoe", "bag"):
        for path in (shop / "photos" / name).iterdir():
            path.unlink()
    found, _, _ = compared(shop)
    assert found.alone.accuracy == 1.0
    assert found.strength is None
    assert found.unknown == ("shoe", "bag")
    assert found.shown == (0,)


def test_few_photos(shop: Path) -> None:
    _, catalog, _ = compared(shop)
    kept = {
        record.path
        for side in (catalog.train, catalog.holdout)
        for record in (side[0], side[len(side) // 2], side[-1])
    }
    for record in catalog.records:
        if record.path not in kept:
            record.path.unlink()
    found, _, _ = compared(shop)
    assert (found.photos, sum(found.trained), found.strength, found.verdict) == (3, 3, None, "too few")


def test_a_photo_that_cannot_be_decoded_is_left_out_by_name(shop: Path) -> None:
    _, catalog, _ = compared(shop)
    (shop / "state" / "embeddings.sqlite").unlink()
    data = catalog.holdout[0].path.read_bytes()
    catalog.holdout[0].path.write_bytes(data[:60] + bytes(20) + data[80:])
    damaged = open_shop(shop).catalog()
    found = compared(shop)[0]
    assert len(damaged.records) == 90
    assert found.photos + sum(found.trained) == 89
    assert len(found.problems) == 1
    assert catalog.holdout[0].path.name in found.problems[0]


def test_nothing_held_out_and_nothing_to_train_on(shop: Path) -> None:
    write_config(shop, holdout_fraction=0.0)
    with pytest.raises(CatalogError, match=r"none of 90 usable photos is held out.*holdout_fraction: 0\)"):
        compared(shop)
    write_config(shop)
    for record in open_shop(shop).catalog().train:
        record.path.unlink()
    with pytest.raises(CatalogError, match="none is left to train on"):
        compared(shop)


def test_a_recognizer_of_other_classes(shop: Path) -> None:
    write_config(shop, classes=("shoe", "shirt", "bag"))
    with pytest.raises(
        ConfigError, match=r"found one of the classes shirt, shoe, bag; expected .* shoe, shirt, bag"
    ):
        compared(shop)


def test_a_net_trained_whole_has_no_fair_opponent(shop: Path) -> None:
    recipe = Recipe(preprocessing=RECIPE.preprocessing, backbone=None, model=SmallCnn(width=4))
    vector = np.zeros(recipe.dimension(3), dtype=np.float32)
    made = Recognizer.create(recipe, Taxonomy(classes=CLASSES), vector, created=datetime.now(UTC))
    with pytest.raises(ConfigError, match="trained whole"):
        compare.compare(open_shop(shop), made)


# The figures


@given(st.integers(0, 400), st.integers(1, 400))
def test_the_interval_is_wilsons(right: int, of: int) -> None:
    right = min(right, of)
    other = binomtest(right, of).proportion_ci(method="wilson")
    assert wilson(right, of) == pytest.approx((other.low, other.high), abs=1e-9)


@given(st.integers(0, 300), st.integers(0, 300))
def test_one_photo_a_product_is_mcnemars_exact_test(league: int, alone: int) -> None:
    expected = binomtest(league, league + alone).pvalue if league + alone else 1.0
    assert sign_test([1] * league + [-1] * alone + [0] * 5) == pytest.approx(expected, rel=1e-9)


@given(st.lists(st.integers(-4, 4), max_size=9))
def test_products_are_judged_together(gains: list[int]) -> None:
    """Against every way to choose the signs."""
    sums = [
        sum(s * g for s, g in zip(signs, gains, strict=True))
        for signs in itertools.product((1, -1), repeat=len(gains))
    ]
    expected = np.mean([abs(one) >= abs(sum(gains)) for one in sums])
    assert sign_test(gains) == pytest.approx(expected)


def judged(league: int, alone: int, both: int = 30, products: list[str | None] | None = None) -> Comparison:
    """Return a comparison in which so many photos are got right by one, by the other, and by both."""
    photos = league + alone + both
    right, wrong = np.array([0.9, 0.1]), np.array([0.2, 0.8])
    says = [
        np.array([right if index in got else wrong for index in range(photos)])
        for got in ({*range(league), *range(league + alone, photos)}, set(range(league, photos)))
    ]
    labels = np.zeros(photos, dtype=np.int64)
    taxonomy = Taxonomy(classes=("[red]<b>hat", "shoe"))
    return judge(taxonomy, labels, *says, products=products or [None] * photos, trained=(50, 0))


@pytest.mark.parametrize(
    ("league", "alone", "verdict"),
    [
        (6, 0, "league"),
        (5, 0, "too few"),
        (0, 6, "alone"),
        (30, 5, "league"),
        (5, 30, "alone"),
        (12, 8, "even"),
        (0, 0, "too few"),
    ],
)
def test_the_verdict(league: int, alone: int, verdict: str) -> None:
    found = judged(league, alone)
    assert found.verdict == verdict
    assert (found.only_league, found.only_alone) == (league, alone)
    assert found.difference == pytest.approx((league - alone) / (30 + league + alone))


def test_many_photos_of_one_product_decide_nothing() -> None:
    assert judged(20, 0).verdict == "league"
    assert judged(20, 0, products=["one"] * 20 + [None] * 30).verdict == "too few"
    assert judged(20, 0, products=[f"{n // 2}" for n in range(20)] + [None] * 30).verdict == "league"


@pytest.mark.parametrize(
    ("league", "both", "more"), [(12, 88, "12"), (12, 388, "3"), (7, 200, "3.4"), (1, 999, "0.1")]
)
def test_the_difference_is_told_of_100_photos(league: int, both: int, more: str) -> None:
    assert judged(league, 0, both).more == more


def test_the_regularisation_is_the_one_that_cross_validation_likes_best() -> None:
    source = np.random.default_rng(0)
    labels = source.integers(3, size=150)
    features = (0.5 * np.eye(3)[labels] @ np.ones((3, 40)) * source.normal(size=40)).astype(np.float32)
    features += np.eye(3, 40, dtype=np.float32)[labels] + source.normal(size=(150, 40)).astype(np.float32)
    folds = StratifiedKFold(5, shuffle=True, random_state=compare._SEED)
    scores = {
        strength: cross_val_score(
            make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000)),
            features,
            labels,
            cv=folds,
        ).mean()
        for strength in (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0)
    }
    said, strength = train_alone(features, labels, features[:20], 5)
    assert strength == max(scores, key=scores.__getitem__)
    assert scores[strength] > max(scores[1e-4], scores[100.0])
    assert said.shape == (20, 5)
    assert said.sum(axis=1) == pytest.approx(1)
    assert not said[:, 3:].any(), "classes that were never seen"


@pytest.mark.parametrize("labels", [[0, 1], [0, 0, 0, 0, 0, 1], [0, 0, 0, 1, 1, 1], [0, 1, 2, 3]])
def test_with_too_few_photos_nothing_is_chosen(labels: list[int]) -> None:
    features = np.eye(len(labels), dtype=np.float32)
    said, strength = train_alone(features, np.array(labels), features, 4)
    assert strength is None
    assert said.argmax(axis=1).tolist() == labels


def test_classes_beyond_the_picture_are_counted_together() -> None:
    classes = 60
    labels = np.concatenate([np.arange(classes), np.arange(45)])
    says = np.eye(classes)[np.roll(labels, 7)]
    taxonomy = Taxonomy(classes=tuple(f"c{n}" for n in range(classes)))
    found = judge(taxonomy, labels, says, says, products=[None] * len(labels), trained=[1] * classes)
    seen = found.confusion()
    assert len(seen.rows) == 40
    assert seen.columns == (*seen.rows, None)
    assert seen.hits == tuple(range(40))
    assert seen.league == seen.alone
    for name, row in zip(seen.rows, seen.league, strict=True):
        index = int(name[1:])
        assert sum(row) == np.sum(labels == index) == 2
        assert row[:-1] == [
            found.league.report.confusion[index, int(other[1:])] for other in seen.columns[:-1]
        ]


# The command


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], shop: Path
) -> Callable[..., tuple[int, str, str]]:
    """Return a function that calls the command in the shop's folder."""
    monkeypatch.chdir(shop)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["hanse-client", "compare", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capfd.readouterr()
        return int(caught.value.code or 0), captured.out, captured.err

    return run


def test_the_command(run: Callable[..., tuple[int, str, str]], shop: Path) -> None:
    found = compared(shop)[0]
    code, out, _ = run()
    assert code == 0
    assert f"Only the league's gets {photos(found.only_league)} right" in out
    assert f"{100 * found.league.accuracy:.1f} %" in out
    assert "nothing was charged" in out
    code, out, _ = run("--json")
    assert json.loads(out) == json.loads(json.dumps(found.to_json()))


def test_the_report(run: Callable[..., tuple[int, str, str]], shop: Path) -> None:
    found = compared(shop)[0]
    code, out, _ = run("--html", "report.html")
    assert code == 0
    assert "Wrote report.html." in out
    report = shop / "report.html"
    assert report.stat().st_mode & 0o777 == 0o600
    page = report.read_text(encoding="utf-8")
    assert f"{100 * found.league.accuracy:.1f} %" in page
    recalls = [
        [score.report.per_class[index].recall for score in (found.league, found.alone)] for index in range(3)
    ]
    assert any(league != alone for league, alone in recalls)
    for pair in recalls:
        assert "".join(f'<td class="number">{100 * share:.1f} %</td>' for share in pair) in page
    league, alone = page.split('<table class="confusion">')[1:]
    for table, score in ((league, found.league), (alone, found.alone)):
        counts = re.findall(r'<td class="s\d+[^"]*">(\d*)</td>', table.split("</table>")[0])
        assert [int(count or 0) for count in counts] == score.report.confusion.ravel().tolist()
    code, _, err = run("--html", "report.html", "--language", "zh")
    assert code == 10
    assert "there is a file already" in err
    assert report.read_text(encoding="utf-8") == page
    assert run("--html", "zh.html", "--language", "zh")[0] == 0
    assert "加入联盟值得吗" in (shop / "zh.html").read_text(encoding="utf-8")


def test_a_report_that_is_there_is_noticed_before_the_work(
    run: Callable[..., tuple[int, str, str]], shop: Path
) -> None:
    (shop / "mine.html").write_text("mine")
    assert run("--html", "mine.html")[0] == 10
    assert (shop / "mine.html").read_text() == "mine"
    assert not (shop / "state" / "embeddings.sqlite").exists()


@pytest.mark.parametrize("language", ["en", "zh"])
def test_names_are_shown_as_they_are(language: str) -> None:
    page = Pages(templates.FOLDER, language).render(
        "comparison.html", c=judged(9, 1), chance="1 %", digest="00", date="2026-01-01"
    )
    assert "<b>hat" not in page
    assert "[red]&lt;b&gt;hat" in page
    assert "shoe" in page.split("</dl>")[0]  # no photo to train on


def test_without_a_recognizer(run: Callable[..., tuple[int, str, str]], shop: Path) -> None:
    write_config(shop, recognizer=None)
    code, _, err = run()
    assert code == 10
    assert "recognizer: missing" in err


def test_every_text_of_the_clients_pages_has_its_chinese() -> None:
    assert faults(templates.FOLDER) == []
