"""The table of search: its figures by scikit-learn, what is noisy, and the command."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from sklearn.metrics import roc_auc_score, top_k_accuracy_score
from sklearn.preprocessing import normalize
from typer.testing import CliRunner

from hanse_client.exact_sums import ExactSums
from hanse_client.examples import Examples
from hanse_common.errors import DatasetUnavailable
from hanse_common.privacy.encoding import Grid
from hanse_common.vision.recipe import Recipe
from hanse_common.vision.taxonomy import Taxonomy
from hanse_simulations.cli import app
from hanse_simulations.search_quality import (
    COLUMNS,
    Scores,
    learned_centre,
    learned_projection,
    measured,
    scored,
    table,
    unit,
)
from hanse_simulations.search_styles import SIDE, OtherView, ShopStyle, StyledPhoto
from hanse_simulations.search_trials import League, Study, Trial, grocery_trials
from hanse_simulations.seeded import SeededRandomness

CLEAR = replace(Study.quick(), centre_epsilon=2.5, projection_epsilon=2.5, dimensions=6)
"""So little noise that what is learned from thousands agrees with what it would be without."""


def rows(count: int, seed: int, width: int = 12) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)


def trial(views: int = 2) -> Trial:
    centres = rows(30, 0)
    products = np.repeat(np.arange(20), views)
    rng = np.random.default_rng(1)
    asked = rng.integers(0, 20, 60)
    return Trial(
        gallery=centres[products] + 0.7 * rows(len(products), 2),
        gallery_products=products,
        queries=centres[asked] + 0.9 * rows(60, 3),
        query_products=asked,
        strangers=centres[20 + np.arange(40) % 10] + 0.9 * rows(40, 4),
        own=centres[products] + 0.7 * rows(len(products), 5),
        own_products=products,
        corrections=centres[:20] + 0.9 * rows(20, 6),
        corrected_products=np.arange(20),
    )


def test_scores_are_scikit_learns() -> None:
    one = trial()
    found = scored(one, unit)
    prototypes = normalize([normalize(one.gallery)[one.gallery_products == k].sum(axis=0) for k in range(20)])
    cosines = normalize(one.queries) @ prototypes.T
    for k, recall in ((1, found.recall_at_1), (5, found.recall_at_5)):
        expected = top_k_accuracy_score(one.query_products, cosines, k=k, labels=np.arange(20))
        assert recall == pytest.approx(expected, abs=1e-9)
    assert 0.3 < found.recall_at_1 < found.recall_at_5 < 1
    best = np.concatenate([cosines.max(axis=1), (normalize(one.strangers) @ prototypes.T).max(axis=1)])
    known = np.concatenate([np.ones(60), np.zeros(40)])
    assert found.rejection_auroc == pytest.approx(roc_auc_score(known, best), abs=1e-9)


def test_an_embedding_that_sees_nothing_finds_nothing() -> None:
    found = scored(trial(), lambda seen: np.ones((len(seen), 2), dtype=np.float32))
    assert found == Scores(0.0, 0.0, 0.5)


def test_the_centre_is_the_mean_of_unit_features() -> None:
    features = rows(4000, 0) + 2
    centre = learned_centre(CLEAR, features, SeededRandomness(1, "centre"))
    np.testing.assert_allclose(centre.mean, normalize(features).mean(axis=0), atol=2e-3)
    noisy = learned_centre(replace(CLEAR, centre_epsilon=0.5), features, SeededRandomness(1, "centre"))
    assert np.abs(noisy.mean - centre.mean).max() > 2e-3


def test_the_projection_whitens_what_changes_between_views() -> None:
    directions = np.linalg.qr(np.random.default_rng(3).standard_normal((12, 12)))[0]
    photos = unit(rows(4000, 0))
    change = rows(4000, 1) * np.array([4.0, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1], dtype=np.float32)
    views = photos + 0.1 * change @ directions.astype(np.float32)
    study = replace(CLEAR, dimensions=12)
    matrix = learned_projection(study, photos, views, SeededRandomness(1, "projection"))
    differences = normalize(views - photos)
    scatter = differences.T @ differences / 4000
    expected = np.linalg.inv(scatter + 0.3 / 12 * np.eye(12))
    np.testing.assert_allclose(matrix @ matrix.T, expected, rtol=0.05, atol=0.05 * expected.max())
    few = photos[:200], views[:200]
    clear, noisy = (
        learned_projection(
            replace(study, projection_epsilon=epsilon), *few, SeededRandomness(1, "projection")
        )
        for epsilon in (2.5, 0.5)
    )
    assert np.abs(noisy @ noisy.T - clear @ clear.T).max() > 0.1 * expected.max()


@given(st.integers(1, 12), st.integers(0, 1000), st.floats(-6, 6))
def test_what_a_photo_contributes_to_the_projection_is_no_longer_than_1(
    width: int, seed: int, exponent: float
) -> None:
    difference = np.random.default_rng(seed).standard_normal(width) * 10.0**exponent
    upper = np.triu_indices(width)
    outer = np.outer(difference, difference)
    vector = outer[upper] * np.where(upper[0] == upper[1], 1.0, np.sqrt(2))
    assert np.linalg.norm(vector) == pytest.approx(np.linalg.norm(outer), rel=1e-9)
    grid = Grid(1.0, len(vector))
    examples = Examples.of(vector[None].astype(np.float32), np.zeros(1, dtype=np.int64), "cpu")
    fine = ExactSums(Recipe(), Taxonomy(classes=("a", "b")), examples).feature_sum(np.arange(1), grid)
    assert sum(int(step) ** 2 for step in fine) <= int(2**-grid.fine_exponent) ** 2


def test_all_columns_are_measured_and_repeat() -> None:
    league = League(rows(500, 0), rows(500, 1))
    found = measured(CLEAR, league, trial(), "here")
    assert tuple(found.scores) == COLUMNS
    assert found == measured(CLEAR, league, trial(), "here")
    assert found.scores["backbone"] == scored(trial(), unit)


def blurred(count: int, seed: int) -> NDArray[np.float32]:
    """Photos of a shop whose style changes three of the features."""
    noise = 0.1 * rows(count, seed)
    noise[:, :3] *= 30
    return noise


@pytest.mark.parametrize("style", ["own", "another"])
def test_the_personal_metric_serves_unless_corrections_speak_against_it(style: str) -> None:
    looks = rows(60, 0) * np.array([3, 3, 3, *[1] * 9], dtype=np.float32)
    products = np.repeat(np.arange(60), 4)

    def photos(shown: NDArray[np.int64], seed: int) -> NDArray[np.float32]:
        if style == "own":
            return looks[shown] + blurred(len(shown), seed)
        return looks[shown] * np.array([1, 1, 1, *[0] * 9], dtype=np.float32) + 0.5 * rows(len(shown), seed)

    taught, asked = products[products < 40], np.repeat(np.arange(40, 60), 10)
    one = Trial(
        gallery=looks[products] + blurred(240, 1),
        gallery_products=products,
        queries=photos(asked, 2),
        query_products=asked,
        strangers=rows(20, 3),
        own=looks[taught] + blurred(160, 4),
        own_products=taught,
        corrections=photos(np.arange(30), 5),
        corrected_products=np.arange(30),
    )
    found = measured(CLEAR, League(rows(2000, 6), rows(2000, 7)), one, "here")
    league, personal, always = (found.scores[column] for column in ("league", "personal", "always"))
    assert found.serves == (style == "own")
    assert personal == (always if style == "own" else league)
    assert (always.recall_at_1 > league.recall_at_1) == (style == "own")
    uncorrected = replace(one, corrections=one.corrections[:0], corrected_products=asked[:0])
    assert measured(CLEAR, League(rows(2000, 6), rows(2000, 7)), uncorrected, "here").serves


def test_a_shop_is_one_style_and_each_shot_another_photo() -> None:
    pixels = np.zeros((28, 28), dtype=np.uint8)
    pixels[8:20, 10:18] = 200
    style = ShopStyle.drawn(1)
    assert style == ShopStyle.drawn(1) != ShopStyle.drawn(2)
    photos: list[StyledPhoto] = [
        StyledPhoto(pixels, style, 0),
        StyledPhoto(pixels, style, 1),
        StyledPhoto(pixels, ShopStyle.drawn(2), 0),
    ]
    assert len({photo.digest for photo in photos} | {OtherView(photos[0]).digest}) == 4
    first, second, other = (np.asarray(photo.open(), dtype=np.float64) for photo in photos)
    assert first.shape == (SIDE, SIDE, 3)
    np.testing.assert_array_equal(first, np.asarray(StyledPhoto(pixels.copy(), style, 0).open()))
    assert 0 < np.abs(first - second).mean() < np.abs(first - other).mean()
    assert OtherView(photos[0]).open().size == (SIDE, SIDE)


def groceries(folder: Path) -> Path:
    """A dataset of 12 groceries in 6 coarse classes, with five photos each."""
    lines = [
        "Class Name (str),Class ID (int),Coarse Class Name (str),Coarse Class ID (int),Iconic Image Path (str)"
    ]
    lists: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    rng = np.random.default_rng(0)
    for fine in range(12):
        lines.append(f"product {fine},{fine},class {fine // 2},{fine // 2},/web/{fine}.png")
        for name, count in (("web", 1), ("train", 2), ("val", 1), ("test", 2)):
            (folder / name).mkdir(exist_ok=True)
            for number in range(count):
                path = f"{name}/{fine}.png" if name == "web" else f"{name}/{fine}-{number}.png"
                Image.fromarray(rng.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(folder / path)
                if name in lists:
                    lists[name].append(f"{path}, {fine}, {fine // 2}")
    (folder / "classes.csv").write_text("\n".join(lines) + "\n")
    for name, own in lists.items():
        (folder / f"{name}.txt").write_text("\n".join(own) + "\n")
    return folder


def test_neither_league_nor_shop_learned_from_the_groceries_that_are_asked_for(tmp_path: Path) -> None:
    study = Study.quick()
    trials = list(grocery_trials(study, tmp_path / "cache.sqlite", groceries(tmp_path)))
    assert [situation for situation, _, _ in trials] == ["same shop", "across shops"] * 2
    for situation, league, one in trials:
        asked = set(one.query_products.tolist())
        assert asked <= set(one.gallery_products.tolist())
        assert not asked & set(one.own_products.tolist())
        assert set(one.own_products.tolist()) <= set(one.gallery_products.tolist())
        assert len(one.strangers) == 2 * (12 - len(set(one.gallery_products.tolist()))) > 0
        corrected = one.corrected_products.tolist()
        assert len(corrected) == len(one.corrections) == study.corrections
        assert set(corrected) <= set(one.own_products.tolist())
        asked_with = {row.tobytes() for row in one.corrections}
        assert len(asked_with) == study.corrections
        assert not asked_with & {row.tobytes() for row in (*one.queries, *one.own, *one.gallery)}
        taught = {row.tobytes() for row in league.photos}
        assert taught <= {row.tobytes() for row in one.own}
        assert not taught & {row.tobytes() for row in (*one.queries, *one.strangers)}
        assert (len(one.gallery) > len(set(one.gallery_products.tolist()))) == (situation == "same shop")


def test_a_folder_without_groceries_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetUnavailable, match="not the Grocery Store Dataset"):
        next(grocery_trials(Study.quick(), tmp_path / "cache.sqlite", tmp_path))


@pytest.mark.slow
def test_the_command_prints_a_table_and_writes_it(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    folder = str(tmp_path / "search")
    found = CliRunner().invoke(
        app,
        [
            "search",
            "--quick",
            "--grocery",
            str(groceries(tmp_path)),
            "--folder",
            folder,
            "--json",
            str(figures),
        ],
    )
    assert found.exit_code == 0, found.output
    read = json.loads(figures.read_text())
    assert table(read).splitlines()[-1] in found.output
    assert [(row["data"].split(",")[0], row["situation"]) for row in read["rows"][::3]] == [
        ("Fashion-MNIST", "same shop"),
        ("Fashion-MNIST", "across shops"),
        ("groceries", "same shop"),
        ("groceries", "across shops"),
    ]
    for row in read["rows"]:
        assert set(row["means"]) == set(COLUMNS)
        assert all(0 <= mean <= 1 for mean in row["means"].values())
    assert read["study"]["centre_epsilon"] == 0.5
    assert [each["repetitions"] for each in read["personal"]] == [2, 2, 2, 2]
    assert all(0 <= each["serves"] <= 2 for each in read["personal"])
    assert f"- groceries, same shop: in {read['personal'][2]['serves']} of 2" in found.output
