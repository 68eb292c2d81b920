"""From feature maps to features, and from one photo to the views of it that features are averaged over.

    pooled(torch.ones(2, 1280, 7, 7), "gem").shape       # (2, 1280)
    len(views_of(torch.ones(2, 3, 224, 224), "crops"))   # 10

Which of them a recipe has, and where they come from, is in `recipe.EfficientNetLite0`.
"""

from typing import Literal

import torch
from torch import Tensor

Averaging = Literal["none", "mirror", "crops"]
Pooling = Literal["mean", "gem", "crow"]


def pooled(maps: Tensor, pooling: Pooling) -> Tensor:
    """Return features, (n, c), of feature maps, (n, c, h, w), that are not negative; each row by itself.

    "gem" is (mean x³)^⅓. "crow" weights each place by √(Σ_c x), as the paper's a = b = 2 does but for a factor.
    """
    if pooling == "gem":
        return maps.pow(3).mean(dim=(2, 3)).pow(1 / 3)
    if pooling == "crow":
        weights = maps.sum(dim=1, keepdim=True).sqrt()
        return (maps * weights).sum(dim=(2, 3)) / weights.sum(dim=(2, 3)).clamp_min(1e-12)
    return maps.mean(dim=(2, 3))


def views_of(images: Tensor, averaging: Averaging) -> list[Tensor]:
    """Return the views of `images`, (n, c, s, s), each (n, c, t, t), the images themselves alone for "none"."""
    if averaging == "none":
        return [images]
    shown = [images]
    if averaging == "crops":
        size = images.shape[-1]
        side = 7 * size // 8
        middle, end = (size - side) // 2, size - side
        corners = ((0, 0), (0, end), (end, 0), (end, end), (middle, middle))
        shown = [images[..., top : top + side, left : left + side] for top, left in corners]
    return [*shown, *(torch.flip(view, dims=(-1,)) for view in shown)]
