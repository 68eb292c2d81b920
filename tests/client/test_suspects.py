"""Suspect labels: the rule by hand, and on real photos with labels made wrong; predictions as the recognizer's own."""

import gzip
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from sklearn.linear_model import LogisticRegression

from hanse_client.catalog import Catalog, Record
from hanse_client.embeddings import EmbeddingCache
from hanse_client.suspects import agreement, confident_disagreements, predict
from hanse_common.plan import Plan
from hanse_common.vision.recognizer import Recognizer
from hanse_common.vision.taxonomy import LabelMap, Taxonomy


@pytest.fixture
def records(tmp_path: Path) -> tuple[Record, ...]:
    rng = np.random.default_rng(5)
    for number in range(12):
        path = tmp_path / "photos" / "shirt" / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(256, size=(9, 9, 3), dtype=np.uint8)).save(path)
    torn = tmp_path / "photos" / "shirt" / "03.png"
    torn.write_bytes(torn.read_bytes()[:-40])
    labels = LabelMap(Taxonomy(classes=("shirt", "shoe", "bag")))
    catalog = Catalog.load(tmp_path / "photos", labels, holdout_key=bytes(16), holdout_fraction=0.3)
    return catalog.records


@pytest.fixture
def recognizer(make_plan: Callable[..., Plan]) -> Recognizer:
    plan = make_plan()
    vector = np.random.default_rng(1).normal(size=plan.dimension).astype(np.float32)
    return Recognizer.create(plan.recipe, plan.taxonomy, vector, created=datetime.now(UTC))


def test_predictions_are_the_recognizers_own(
    records: tuple[Record, ...], recognizer: Recognizer, tmp_path: Path
) -> None:
    seen: list[tuple[int, int]] = []
    with EmbeddingCache(tmp_path / "embeddings.sqlite") as cache:
        predicted = predict(
            recognizer, records, cache, progress=lambda done, total: seen.append((done, total))
        )
        again = predict(recognizer, records, cache)
    whole = [record for record in records if record.path.name != "03.png"]
    assert [records[index] for index in predicted.kept] == whole
    expected = recognizer.predict([record.open() for record in whole])
    np.testing.assert_allclose(predicted.probabilities, expected, rtol=1e-5)
    np.testing.assert_allclose(again.probabilities, expected, rtol=1e-5)
    assert seen[-1] == (12, 12)


def test_agreement_counts_each_class_the_same() -> None:
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4], [0.6, 0.4], [0.2, 0.8]])
    assert agreement(probabilities, np.array([0, 0, 0, 0, 1, 1])) == pytest.approx((1 + 1 / 2) / 2)
    assert agreement(np.array([[0.3, 0.7]]), np.array([0])) == 0


def test_the_rule_by_hand() -> None:
    probabilities = np.array(
        [
            [0.80, 0.10, 0.10],
            [0.70, 0.20, 0.10],
            [0.10, 0.85, 0.05],  # labelled 0, surely 1
            [0.45, 0.50, 0.05],  # labelled 0, likelier 1, which just reaches its threshold
            [0.20, 0.70, 0.10],
            [0.05, 0.90, 0.05],
            [0.62, 0.36, 0.02],  # labelled 1, and 0 reaches its threshold
            [0.01, 0.02, 0.97],  # labelled 1, surely of a class without photos
        ]
    )
    labels = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    # Thresholds: 0 → (0.80 + 0.70 + 0.10 + 0.45) / 4 = 0.5125, 1 → 0.495, 2 → their mean.
    doubts = confident_disagreements(probabilities, labels)
    found = [(each.index, each.label, each.instead) for each in doubts]
    assert found == [(7, 1, 2), (2, 0, 1), (6, 1, 0), (3, 0, 1)]
    assert (doubts[0].given, doubts[0].likelier) == (0.02, 0.97)
    surer = np.vstack([probabilities, [[0.0, 1.0, 0.0]] * 4])
    kept = confident_disagreements(surer, np.append(labels, [1] * 4))  # 1 → 0.7475
    assert [each.index for each in kept] == [7, 2, 6]
    assert confident_disagreements(np.empty((0, 3)), np.empty(0, dtype=np.int64)) == ()


def test_a_class_that_is_never_sure_is_not_suspected_whole() -> None:
    """All photos of class 1 look likelier to be 0, but less so than what 0 is like."""
    sure, unsure = [[0.95, 0.05]] * 10, [[0.55, 0.45]] * 10
    labels = np.array([0] * 10 + [1] * 10)
    assert confident_disagreements(np.array(sure + unsure), labels) == ()


def test_a_label_as_probable_as_its_class_usually_is_is_not_suspected() -> None:
    unsure = np.array([[0.38, 0.32, 0.3], [0.42, 0.45, 0.13], [0.3, 0.4, 0.3], [0.35, 0.4, 0.25]])
    labels = np.array([0, 0, 1, 1])  # both thresholds are 0.4
    assert confident_disagreements(unsure, labels) == ()
    unsure[0, 0], unsure[1, 0] = 0.42, 0.38
    assert [each.index for each in confident_disagreements(unsure, labels)] == [1]


def fashion(data_folder: Path, count: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    images = gzip.decompress((data_folder / "train-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((data_folder / "train-labels-idx1-ubyte.gz").read_bytes())
    pixels = (
        np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28)[:count, ::2, ::2].reshape(count, -1)
        / 255
    )
    return pixels, np.frombuffer(labels, np.uint8, offset=8)[:count].astype(np.int64)


def test_wrong_labels_of_real_photos_are_found(data_folder: Path) -> None:
    pixels, labels = fashion(data_folder, 4000)
    model = LogisticRegression(C=0.01, max_iter=200).fit(pixels[:2000], labels[:2000])
    probabilities, labels = model.predict_proba(pixels[2000:]), labels[2000:].copy()
    rng = np.random.default_rng(0)
    wrong = rng.random(2000) < 0.05
    labels[wrong] = (labels[wrong] + rng.integers(1, 10, wrong.sum())) % 10
    found = np.array([each.index for each in confident_disagreements(probabilities, labels)])
    assert wrong[found].sum() / wrong.sum() > 0.6
    assert wrong[found].mean() > 0.25 > 4 * wrong.mean()
    assert wrong[found[: len(found) // 2]].mean() > 0.5
