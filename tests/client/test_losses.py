"""Recipes with a loss of their own: exact sums in each path against single examples, and no longer than they may be."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from hanse_client.exact_sums import ExactSums
from hanse_client.examples import Examples
from hanse_common.modes import MerchantLevelTraining
from hanse_common.privacy.encoding import Grid
from hanse_common.vision import model as models
from hanse_common.vision.recipe import Recipe
from hanse_common.vision.recipe_features import Preprocessing, Scattering
from hanse_common.vision.recipe_model import Linear, Loss, Mlp, Model, SmallCnn
from hanse_common.vision.taxonomy import Taxonomy

TAXONOMY = Taxonomy(classes=("shirt", "shoe", "bag"))
LOSS = Loss(class_weights=(0.02, 1.0, 60.0), class_offsets=(-0.1, -2.0, -5.0), smoothing=0.2)
NORM = 0.7
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def recipe(model: Model, loss: Loss = LOSS) -> Recipe:
    if isinstance(model, SmallCnn):
        return Recipe(preprocessing=Preprocessing(size=8, channels=1), backbone=None, model=model, loss=loss)
    backbone = Scattering(groups=None, angles=2, scales=1)
    return Recipe(preprocessing=Preprocessing(size=8, channels=1), backbone=backbone, model=model, loss=loss)


def examples(made: Recipe, device: str = "cpu") -> Examples:
    rng = np.random.default_rng(1)
    inputs = rng.normal(size=(40, *made.example_shape)) / np.sqrt(np.prod(made.example_shape))
    return Examples.of(inputs.astype(np.float32), np.arange(40) % 3, device)


def start(made: Recipe) -> NDArray[np.float64]:
    drawn = np.random.default_rng(2).normal(scale=0.3, size=made.dimension(3))
    return drawn.astype(np.float32).astype(np.float64)


def single(made: Recipe, weights: NDArray[np.float64], x: torch.Tensor, label: int) -> NDArray[np.float64]:
    """One example's clipped gradient: the loss as the papers write it, by plain autograd."""
    model = models.build(made, 3)
    models.load_vector(model, weights.astype(np.float32))
    z = model(x[None].cpu())[0].double() + torch.tensor(made.loss.class_offsets or (0.0,) * 3)
    target = torch.full((3,), made.loss.smoothing / 3, dtype=torch.float64)
    target[label] += 1 - made.loss.smoothing
    loss = -(made.loss.class_weights or (1.0,) * 3)[label] * (target * torch.log_softmax(z, 0)).sum()
    parts = torch.autograd.grad(loss, list(model.parameters()))
    gradient = torch.cat([part.reshape(-1) for part in parts]).double().numpy()
    return np.asarray(gradient * min(1.0, NORM / np.linalg.norm(gradient)))


MODELS = [Linear(), Mlp(hidden=5), SmallCnn(width=4)]
LOSSES = [
    LOSS,
    Loss(class_weights=(0.02, 1.0, 60.0)),
    Loss(class_offsets=(-0.1, -2.0, -5.0)),
    Loss(smoothing=0.2),
]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
def test_sums_equal_a_loop_over_single_examples(model: Model, loss: Loss, device: str) -> None:
    made = recipe(model, loss)
    own, weights = examples(made, device), start(made)
    grid = Grid(NORM, made.dimension(3))
    sample = np.arange(3, 37)
    found = ExactSums(made, TAXONOMY, own).sum(weights, sample, grid, seed=1) * grid.fine_unit
    expected = sum(single(made, weights, own.inputs[i], int(own.labels[i])) for i in sample)
    np.testing.assert_allclose(found, expected, atol=4e-5)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_no_photo_is_longer_than_c_whatever_its_class_weighs(model: Model) -> None:
    made = recipe(model)
    own, weights = examples(made), start(made)
    grid = Grid(NORM, made.dimension(3))
    sums = ExactSums(made, TAXONOMY, own)
    clipped = 0
    for index in range(9):
        alone = sums.sum(weights, np.array([index]), grid, seed=1)
        length = sum(Fraction(int(value)) ** 2 for value in alone) * Fraction(grid.fine_unit) ** 2
        assert length <= Fraction(NORM) ** 2
        clipped += length > (Fraction(NORM) * Fraction(999, 1000)) ** 2
    assert 0 < clipped < 9


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_a_photo_more_changes_a_sum_by_its_own_part_alone(model: Model) -> None:
    made = recipe(model)
    own, weights = examples(made), start(made)
    grid = Grid(NORM, made.dimension(3))
    sums = ExactSums(made, TAXONOMY, own)
    without, alone, both = (
        sums.sum(weights, np.array(sample), grid, seed=1)
        for sample in (list(range(20)), [20], list(range(21)))
    )
    np.testing.assert_array_equal(both, without + alone)


def test_a_plain_update_follows_the_loss_too() -> None:
    made = recipe(Linear())
    training: dict[str, Any] = {
        "rounds": 1, "local_steps": 1, "local_rate": 1.0, "sampling_rate": 0.5, "expected_batch": 1.0,
        "clipping_norm": 1.0, "learning_rate": 0.1, "noise_multiplier": 1.0,
    }  # fmt: skip
    own, weights = examples(made), start(made)
    found = ExactSums(made, TAXONOMY, own).plain_update(weights, MerchantLevelTraining(**training), seed=1)
    grid = Grid(300.0, made.dimension(3))  # clips nothing
    total = ExactSums(made, TAXONOMY, own).sum(weights, np.arange(40), grid, seed=1) * grid.fine_unit
    np.testing.assert_allclose(found, -0.1 * total / 40, atol=1e-5)


def test_a_loss_for_other_classes_is_refused_before_any_sum() -> None:
    made = recipe(Linear(), Loss(class_weights=(1.0, 2.0)))
    with pytest.raises(ValueError, match=r"loss.class_weights: found 2 numbers, expected one for each of 3"):
        ExactSums(made, TAXONOMY, examples(made))
