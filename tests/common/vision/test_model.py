import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus import GradSampleModule
from opacus.validators import ModuleValidator
from torch import nn

from hanse_common.errors import RecognizerError
from hanse_common.vision.model import build, initial_vector, load_vector, to_vector
from hanse_common.vision.recipe import Recipe
from hanse_common.vision.recipe_features import Preprocessing, Projection, Scattering
from hanse_common.vision.recipe_model import Linear, SmallCnn

LINEAR = Recipe(
    preprocessing=Preprocessing(size=8, channels=1),
    backbone=Scattering(scales=1, groups=None, projection=Projection(dimensions=6)),
    model=Linear(initialisation="kaiming", dropout=0.5),
)
CNN = Recipe(
    preprocessing=Preprocessing(size=8, channels=3),
    backbone=None,
    model=SmallCnn(width=4, initialisation="xavier", dropout=0.5),
)
RECIPES = pytest.mark.parametrize("recipe", [LINEAR, CNN], ids=["linear", "cnn"])


def examples(recipe: Recipe, n: int = 5) -> torch.Tensor:
    return torch.randn(n, *recipe.example_shape, generator=torch.Generator().manual_seed(0))


@RECIPES
def test_logits_for_each_class(recipe: Recipe) -> None:
    assert build(recipe, classes=7)(examples(recipe)).shape == (5, 7)


@RECIPES
@given(classes=st.integers(2, 30))
@settings(deadline=None, max_examples=20)
def test_dimension_is_known_without_the_model(recipe: Recipe, classes: int) -> None:
    found = sum(parameter.numel() for parameter in build(recipe, classes).parameters())
    assert recipe.dimension(classes) == found


@RECIPES
def test_vectors_and_models_are_the_same_thing(recipe: Recipe) -> None:
    vector = np.random.default_rng(0).standard_normal(recipe.dimension(3)).astype(np.float32)
    module = build(recipe, 3)
    load_vector(module, vector)
    np.testing.assert_array_equal(to_vector(module), vector)
    wanted = np.concatenate([parameter.detach().numpy().ravel() for parameter in module.parameters()])
    np.testing.assert_array_equal(vector, wanted)
    vector[:] = 0
    assert np.any(to_vector(module))


@RECIPES
def test_what_is_no_vector_of_the_model(recipe: Recipe) -> None:
    module = build(recipe, 3)
    before = initial_vector(recipe, 3, seed=1)
    load_vector(module, before)
    for bad, reason in (
        (before[:-1], "expected float32 of shape"),
        (before[None], "expected float32 of shape"),
        (before.astype(np.float64), "found float64"),
        (
            np.where(np.arange(len(before)) == len(before) - 1, np.nan, before).astype(np.float32),
            "not finite",
        ),
        (np.full_like(before, np.inf), "not finite"),
    ):
        with pytest.raises(RecognizerError, match=reason):
            load_vector(module, bad)
        np.testing.assert_array_equal(to_vector(module), before)


@pytest.mark.parametrize(
    ("recipe", "digest"),
    [
        (LINEAR, "13f06242c8928bea1eb2307e35118ec9fb142b4ec4c74c6559afc2495d84a060"),
        (CNN, "182a15a5c9411156ab51306f0229ed31e35e29a9bee96b87be4f7281783576c7"),
    ],
    ids=["linear", "cnn"],
)
def test_initial_vectors_are_the_same_on_every_machine(recipe: Recipe, digest: str) -> None:
    vector = initial_vector(recipe, 10, seed=1)
    assert hashlib.sha256(vector.astype("<f4").tobytes()).hexdigest() == digest
    assert not np.array_equal(vector, initial_vector(recipe, 10, seed=2))


def test_zeros() -> None:
    recipe = LINEAR.model_copy(update={"model": Linear()})
    assert not initial_vector(recipe, 10, seed=1).any()


@pytest.mark.parametrize(
    ("scheme", "reference"), [("kaiming", nn.init.kaiming_uniform_), ("xavier", nn.init.xavier_uniform_)]
)
def test_initial_weights_are_distributed_as_torchs(scheme: str, reference: object) -> None:
    recipe = Recipe.model_validate(
        {"preprocessing": {"size": 8}, "backbone": None, "model": {"name": "cnn", "initialisation": scheme}}
    )
    module = build(recipe, 10)
    load_vector(module, initial_vector(recipe, 10, seed=1))
    for layer in module.modules():
        if isinstance(layer, nn.GroupNorm):
            assert (layer.weight == 1).all() and (layer.bias == 0).all()
        if isinstance(layer, nn.Conv2d | nn.Linear):
            assert (layer.bias == 0).all()
            wanted = torch.empty_like(layer.weight)
            assert callable(reference)
            if scheme == "kaiming":
                reference(wanted, nonlinearity="relu")
            else:
                reference(wanted)
            assert layer.weight.std().item() == pytest.approx(wanted.std().item(), rel=0.1)
            assert layer.weight.abs().max().item() == pytest.approx(wanted.abs().max().item(), rel=0.05)
            assert layer.weight.mean().abs() < 0.1 * wanted.abs().max()


@RECIPES
def test_opacus_accepts_the_model(recipe: Recipe) -> None:
    assert ModuleValidator.validate(build(recipe, 3), strict=False) == []


def test_per_example_gradients_are_those_of_single_examples() -> None:
    # Examples must not mix: a normalisation across the batch would show here.
    recipe = CNN.model_copy(update={"model": SmallCnn(width=4)})
    module = build(recipe, 3)
    load_vector(module, initial_vector(recipe, 3, seed=1))
    x, y = examples(recipe), torch.tensor([0, 1, 2, 0, 1])
    singles = []
    for one, label in zip(x, y, strict=True):
        module.zero_grad()
        nn.functional.cross_entropy(module(one[None]), label[None]).backward()
        singles.append(
            [parameter.grad.clone() for parameter in module.parameters() if parameter.grad is not None]
        )
    module.zero_grad()
    wrapped = GradSampleModule(module, loss_reduction="sum")
    nn.functional.cross_entropy(wrapped(x), y, reduction="sum").backward()
    for index, parameter in enumerate(module.parameters()):
        wanted = torch.stack([single[index] for single in singles])
        torch.testing.assert_close(parameter.grad_sample, wanted, rtol=1e-4, atol=1e-5)


@RECIPES
def test_dropout_is_for_training_only(recipe: Recipe) -> None:
    module = build(recipe, 3)
    load_vector(module, initial_vector(recipe, 3, seed=1))
    x = examples(recipe)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))
