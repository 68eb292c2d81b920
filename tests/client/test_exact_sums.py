"""Sums under a bound of memory: what they need is found before the first of them, and the sums stay what they were."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from hanse_client import exact_sums
from hanse_client.exact_sums import ExactSums
from hanse_client.examples import Examples
from hanse_common.errors import RecognizerError
from hanse_common.modes import MerchantLevelTraining
from hanse_common.privacy.encoding import Grid
from hanse_common.vision import model as models
from hanse_common.vision.recipe import Recipe
from hanse_common.vision.recipe_features import Preprocessing
from hanse_common.vision.recipe_model import Augmentation, SmallCnn
from hanse_common.vision.taxonomy import Taxonomy

RECIPE = Recipe(
    preprocessing=Preprocessing(size=12, channels=1),
    backbone=None,
    model=SmallCnn(width=8),
    augmentation=Augmentation(flip=0.5),
)
STILL = RECIPE.model_copy(update={"augmentation": None})
TAXONOMY = Taxonomy(classes=("shirt", "shoe", "bag"))
GRID = Grid(1.0, RECIPE.dimension(3))
SAMPLE = np.arange(50)
MEMORY = 1_300_000
"""What eight photos take here, and sixteen do not."""


def examples(count: int = 60) -> Examples:
    rng = np.random.default_rng(1)
    pictures = rng.normal(size=(count, *RECIPE.input_shape)).astype(np.float32)
    return Examples.of(pictures, rng.integers(0, 3, count), "cpu")


def weights() -> NDArray[np.float64]:
    return models.initial_vector(RECIPE, 3, seed=1).astype(np.float64)


PLAIN = MerchantLevelTraining(
    rounds=1,
    local_steps=2,
    local_rate=0.9,
    sampling_rate=0.5,
    expected_batch=1.0,
    clipping_norm=1.0,
    learning_rate=0.1,
    noise_multiplier=1.0,
)


def test_prepared_sums_try_nothing_out_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tried out before the charge cannot fail after it."""
    sums = ExactSums(RECIPE, TAXONOMY, examples(), MEMORY)
    sums.prepare(GRID)
    monkeypatch.setattr("hanse_client.gradients.fitting_rows", None)
    monkeypatch.setattr("hanse_client.gradients._fill", None)
    assert sums.sum(weights(), SAMPLE, GRID, seed=1).any()


def test_a_prepared_plain_update_tries_nothing_out_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    sums = ExactSums(RECIPE, TAXONOMY, examples(), MEMORY)
    sums.prepare_plain()
    monkeypatch.setattr(exact_sums, "fitting_rows", None)
    assert sums.plain_update(weights(), PLAIN, seed=1).any()


def test_a_bound_of_memory_bounds_the_rows_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    sums = ExactSums(RECIPE, TAXONOMY, examples(), MEMORY)
    heights: list[int] = []
    sums._model.register_forward_pre_hook(lambda _, inputs: heights.append(len(inputs[0])))
    original = exact_sums.augment

    def augment(batch: torch.Tensor, recipe: Recipe, generator: torch.Generator) -> torch.Tensor:
        heights.append(len(batch))
        return original(batch, recipe, generator)

    monkeypatch.setattr(exact_sums, "augment", augment)
    sums.prepare(GRID)
    sums.sum(weights(), SAMPLE, GRID, seed=1)
    assert max(heights) == 8
    heights.clear()
    sums.plain_update(weights(), PLAIN, seed=1)
    assert max(heights) == 32


@pytest.mark.parametrize("photos", [1, 60])
def test_sums_are_what_they_were(photos: int) -> None:
    bounded, free = (ExactSums(STILL, TAXONOMY, examples(), memory) for memory in (MEMORY, None))
    sample = SAMPLE[:photos]
    one, two = (sums.sum(weights(), sample, GRID, seed=1) * GRID.fine_unit for sums in (bounded, free))
    np.testing.assert_allclose(one, two, atol=1e-4)
    one, two = (sums.plain_update(weights(), PLAIN, seed=1) for sums in (bounded, free))
    np.testing.assert_allclose(one, two, atol=1e-5)


def test_too_little_memory_is_told_before_any_charge() -> None:
    sums = ExactSums(RECIPE, TAXONOMY, examples(), 10_000)
    for prepare in (lambda: sums.prepare(GRID), sums.prepare_plain):
        with pytest.raises(RecognizerError, match="One photo at a time takes"):
            prepare()
