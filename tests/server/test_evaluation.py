"""The evaluation against the model written out in numpy, and scikit-learn's figures."""

from datetime import UTC, datetime

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.special import softmax
from sklearn.metrics import accuracy_score

from hanse_common.errors import RecognizerError
from hanse_common.vision.preprocessing import preprocess
from hanse_common.vision.recipe import Recipe
from hanse_common.vision.recipe_features import Preprocessing, Projection, Scattering
from hanse_common.vision.recipe_model import Linear, SmallCnn
from hanse_common.vision.recognizer import Recognizer
from hanse_common.vision.taxonomy import Taxonomy
from hanse_server import evaluation
from hanse_server.evaluation import Evaluator

TAXONOMY = Taxonomy(classes=("a", "b", "c"))
LINEAR = Recipe(
    preprocessing=Preprocessing(size=8, channels=1),
    backbone=Scattering(scales=1, angles=2, groups=None, projection=Projection(dimensions=5)),
    model=Linear(dropout=0.5),
)
RNG = np.random.default_rng(5)
INPUTS = RNG.normal(size=(40, 5)).astype(np.float32)
LABELS = RNG.integers(0, 3, 40)
VECTOR = RNG.normal(size=18).astype(np.float32)


@pytest.fixture
def evaluator() -> Evaluator:
    return Evaluator(LINEAR, TAXONOMY, torch.from_numpy(INPUTS), torch.from_numpy(LABELS))


def test_probabilities_are_the_models_without_dropout(evaluator: Evaluator) -> None:
    wanted = softmax(INPUTS @ VECTOR[:15].reshape(3, 5).T + VECTOR[15:], axis=1)
    found = evaluator.probabilities(VECTOR)
    assert found.dtype == np.float64
    assert np.allclose(found, wanted, atol=1e-6)


def test_accuracy_is_the_share_that_is_right(evaluator: Evaluator) -> None:
    predicted = evaluator.probabilities(VECTOR).argmax(1)
    assert evaluator.accuracy(VECTOR) == accuracy_score(LABELS, predicted)
    assert evaluator.report(VECTOR).accuracy == accuracy_score(LABELS, predicted)


def test_batches_do_not_show(evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = evaluator.probabilities(VECTOR)
    monkeypatch.setattr(evaluation, "BATCH", 7)
    assert np.allclose(evaluator.probabilities(VECTOR), whole, atol=1e-12)


def test_models_do_not_leak_into_each_other(evaluator: Evaluator) -> None:
    before = evaluator.probabilities(VECTOR)
    evaluator.probabilities(-VECTOR)
    assert np.array_equal(evaluator.probabilities(VECTOR), before)


def test_a_net_trained_whole_is_tried_on_images_and_agrees_with_the_recognizer() -> None:
    recipe = Recipe(preprocessing=Preprocessing(size=8, channels=1), backbone=None, model=SmallCnn(width=4))
    photos = [Image.fromarray(RNG.integers(0, 256, (8, 8), dtype=np.uint8)) for _ in range(6)]
    vector = (0.3 * RNG.normal(size=recipe.dimension(3))).astype(np.float32)
    inputs = preprocess(photos, recipe.preprocessing)
    evaluator = Evaluator(recipe, TAXONOMY, inputs, torch.zeros(6, dtype=torch.int64))
    recognizer = Recognizer.create(recipe, TAXONOMY, vector, created=datetime.now(UTC))
    assert np.allclose(evaluator.probabilities(vector), recognizer.predict(photos), atol=1e-6)


@pytest.mark.parametrize("wrong", [np.zeros(17, np.float32), np.full(18, np.nan, np.float32)])
def test_a_model_that_is_none_is_refused(evaluator: Evaluator, wrong: np.ndarray) -> None:
    with pytest.raises(RecognizerError, match="Model vector"):
        evaluator.accuracy(wrong)
