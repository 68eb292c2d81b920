import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from hanse_common import config, wire
from hanse_common.vision.recipe import Recipe
from hanse_common.vision.recipe_features import Preprocessing, Projection, Scattering
from hanse_common.vision.recipe_model import Augmentation, Linear, SmallCnn

YAML = """
preprocessing: {size: 28, channels: 1, mean: [0.25], std: [0.5]}
backbone: {name: scattering, projection: {dimensions: 1500, seed: 7}}
model: {name: linear, l2: 0.001}
"""

WANTED = Recipe(
    preprocessing=Preprocessing(size=28, channels=1, mean=(0.25,), std=(0.5,)),
    backbone=Scattering(projection=Projection(dimensions=1500, seed=7)),
    model=Linear(l2=0.001),
)


def test_a_recipe_is_written_in_yaml() -> None:
    assert Recipe.model_validate(yaml.safe_load(YAML)) == WANTED


def test_a_recipe_is_a_configuration_file(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(YAML)
    assert config.load(Recipe, path) == WANTED


def test_yaml_does_not_soften_types() -> None:
    with pytest.raises(ValidationError, match="size"):
        Recipe.model_validate({"preprocessing": {"size": "28"}})


def test_a_recipe_travels_in_canonical_bytes() -> None:
    assert wire.decode(Recipe, wire.encode(WANTED)) == WANTED


def test_numbers_of_one_value_have_one_digest() -> None:
    integers = Recipe.model_validate({"preprocessing": {"mean": [0], "std": [1]}})
    floats = Recipe.model_validate({"preprocessing": {"mean": [0.0], "std": [1.0]}})
    assert integers.digest() == floats.digest()


def test_default_digest_is_known() -> None:
    # Changing a field or a default changes what running leagues agreed on: raise the wire version then.
    assert Recipe().digest().hex() == "9f8d99c3fb8d256ba1417127b44c1c35dbb6471bedd9f1687f3148d6eec6eff0"


@pytest.mark.parametrize(
    "change",
    [
        {"preprocessing": {"size": 32}},
        {"preprocessing": {"resize": "pad"}},
        {"backbone": {"name": "scattering", "angles": 4, "groups": 3}},
        {"backbone": {"name": "scattering", "projection": {"dimensions": 100, "seed": 1}}},
        {"backbone": {"name": "scattering", "normalisation": "none"}},
        {"model": {"name": "linear", "dropout": 0.5}},
    ],
)
def test_every_choice_is_in_the_digest(change: dict[str, Any]) -> None:
    assert Recipe.model_validate(change).digest() != Recipe().digest()


def test_embeddings_outlive_changes_of_the_model() -> None:
    other_model = Recipe(model=Linear(dropout=0.5, initialisation="xavier"))
    other_input = Recipe(preprocessing=Preprocessing(size=32))
    assert other_model.embedding_digest() == Recipe().embedding_digest()
    assert other_input.embedding_digest() != Recipe().embedding_digest()


def test_nothing_to_cache_without_a_backbone() -> None:
    with pytest.raises(ValueError, match="no embeddings"):
        Recipe(backbone=None, model=SmallCnn()).embedding_digest()


def test_shapes() -> None:
    # 1 + 2·8 + 8² = 81 coefficients at 7 × 7 places.
    grey = Recipe(preprocessing=Preprocessing(size=28, channels=1))
    assert (grey.input_shape, grey.raw_dimension, grey.feature_dimension) == ((1, 28, 28), 3969, 3969)
    assert grey.example_shape == (3969,)
    assert grey.dimension(10) == 39700
    assert WANTED.feature_dimension == 1500
    whole = Recipe(backbone=None, model=SmallCnn())
    assert (whole.example_shape, whole.feature_dimension) == ((3, 28, 28), 0)
    efficientnet = Recipe.model_validate(
        {"preprocessing": {"size": 112}, "backbone": {"name": "efficientnet-lite0"}}
    )
    assert efficientnet.feature_dimension == 1280


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        ({"backbone": None}, "needs a backbone"),
        ({"model": {"name": "cnn"}}, "trained whole"),
        ({"model": {"name": "cnn", "initialisation": "zeros"}, "backbone": None}, "initialisation"),
        ({"augmentation": {"flip": 0.5}}, "exclude each other"),
        ({"preprocessing": {"mean": [0.1, 0.2]}}, "mean has 2 numbers; expected 1 or 3"),
        ({"preprocessing": {"std": [0.0]}}, "std is 0.0"),
        ({"preprocessing": {"size": 30}}, "multiple of 4"),
        ({"preprocessing": {"size": 8}, "backbone": {"name": "scattering", "scales": 3}}, "at least 16"),
        ({"backbone": {"name": "scattering", "groups": 10}}, "divisor of 243"),
        ({"backbone": {"name": "scattering", "projection": {"dimensions": 20000}}}, "of only 11907"),
        ({"preprocessing": {"size": 112}}, "add a projection"),
        ({"preprocessing": {"size": 224}}, "holds 12192768 numbers of a photo"),
        ({"backbone": {"name": "efficientnet-lite0"}}, "32 or more"),
        (
            {"preprocessing": {"channels": 1, "size": 96}, "backbone": {"name": "efficientnet-lite0"}},
            "3 channels",
        ),
        ({"backbone": {"name": "torchvision", "architecture": "resnet18", "dimension": 512}}, "weights"),
        ({"backbone": {"name": "resnet"}}, "resnet"),
        ({"backbone": None, "model": {"name": "cnn"}, "augmentation": {"crop_padding": 28}}, "crop_padding"),
        (
            {
                "preprocessing": {"channels": 1},
                "backbone": None,
                "model": {"name": "cnn"},
                "augmentation": {"hue": 0.1},
            },
            "need 3 channels",
        ),
        ({"colour": True}, "colour"),
    ],
)
def test_what_cannot_work_is_refused_with_a_reason(recipe: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        Recipe.model_validate(recipe)


def test_augmentation_goes_with_a_model_trained_whole() -> None:
    recipe = Recipe(backbone=None, model=SmallCnn(), augmentation=Augmentation(flip=0.5, crop_padding=2))
    assert wire.decode(Recipe, wire.encode(recipe)) == recipe


def test_recipes_need_no_torch() -> None:
    code = "import sys, hanse_common.vision.recipe; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "change",
    [
        {"loss": {"smoothing": 0.1}},
        {"loss": {"class_weights": [1.0, 2.0]}},
        {"preprocessing": {"zoom": 2.0}},
        {"preprocessing": {"size": 64}, "backbone": {"name": "efficientnet-lite0", "pooling": "gem"}},
        {"preprocessing": {"size": 64}, "backbone": {"name": "efficientnet-lite0", "averaging": "mirror"}},
        {"backbone": None, "model": {"name": "cnn"}, "augmentation": {"erasing": 0.5}},
    ],
)
def test_options_of_version_3_say_so_and_travel(change: dict[str, Any]) -> None:
    recipe = Recipe.model_validate(change)
    data = wire.encode(recipe)
    assert data[1] == 3
    assert wire.decode(Recipe, data) == recipe


def test_a_loss_changes_no_embedding_and_pooling_does() -> None:
    plain = {"preprocessing": {"size": 64}, "backbone": {"name": "efficientnet-lite0"}}
    recipe = Recipe.model_validate(plain)
    assert wire.encode(recipe)[1] == 1
    assert (
        Recipe.model_validate(plain | {"loss": {"smoothing": 0.1}}).embedding_digest()
        == recipe.embedding_digest()
    )
    other = Recipe.model_validate(plain | {"backbone": {"name": "efficientnet-lite0", "pooling": "crow"}})
    assert other.embedding_digest() != recipe.embedding_digest()
