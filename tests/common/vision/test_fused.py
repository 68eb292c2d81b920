"""Fused convolutions compute what the network as it is written computes."""

from typing import Any

import pytest
import torch

from hanse_common.vision.backbones import load_backbone
from hanse_common.vision.fused import fuse, fusible
from hanse_common.vision.recipe import Recipe
from hanse_common.vision.recipe_features import Concatenation, EfficientNetLite0, Part, Preprocessing
from hanse_common.vision.recipe_model import Linear

pytestmark = pytest.mark.skipif(not fusible(), reason="this torch has no oneDNN")


def recipe(size: int, **changes: Any) -> Recipe:
    preprocessing = Preprocessing(size=size, channels=3)
    return Recipe(preprocessing=preprocessing, backbone=EfficientNetLite0(**changes), model=Linear())


@pytest.mark.parametrize(
    ("size", "rows", "changes"),
    [
        (48, 1, {}),
        (75, 3, {}),  # sides that halve unevenly
        (64, 5, {"layers": "stages"}),
        (48, 2, {"averaging": "mirror"}),
    ],
)
def test_features_are_the_same_but_for_their_last_bits(size: int, rows: int, changes: dict[str, str]) -> None:
    wanted = recipe(size, **changes)
    network = load_backbone(wanted)
    torch.manual_seed(size)
    photos = torch.randn(rows, 3, size, size)
    before = network(photos)
    assert fuse(network) == 1
    after = network(photos)
    assert after.shape == before.shape and after.dtype == before.dtype
    assert ((after - before).norm(dim=1) / before.norm(dim=1)).max() < 1e-5
    kinds = {type(module).__name__ for module in network.modules()}
    assert "_FusedConvolution" in kinds and "_SameConv2d" not in kinds
    assert fuse(network) == 0, "there is nothing left to fuse"
    graph = next(module for module in network.modules() if isinstance(module, torch.fx.GraphModule))
    assert "relu6" not in graph.code, "every clamp is in its convolution"


def test_parts_that_share_a_trunk_share_its_fused_form() -> None:
    view = Preprocessing(size=48, channels=3)
    parts = tuple(
        Part(preprocessing=view, backbone=EfficientNetLite0(layers=layers)) for layers in ("head", "stages")
    )
    wanted = Recipe(backbone=Concatenation(parts=parts), model=Linear())
    network = load_backbone(wanted)
    photos = [torch.randn(2, 3, 48, 48) for _ in wanted.views]
    before = network(*photos)
    assert fuse(network) == 1
    assert ((network(*photos) - before).norm() / before.norm()) < 1e-5
