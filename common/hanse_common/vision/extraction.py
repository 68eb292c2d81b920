"""From decoded photos to what a network makes of them, each photo by itself, whatever batch it is in.

    features = extract(load_backbone(recipe), images, recipe.views)    # (n, recipe.feature_dimension)

Differential privacy compares a catalog with the same catalog less one photo, so no photo's embedding may depend on the
others, not even in its last bit.
"""

import logging
from collections.abc import Iterable, Sequence
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from hanse_common.vision.preprocessing import preprocess
from hanse_common.vision.recipe import Preprocessing

log = logging.getLogger(__name__)

BATCH_PIXELS = 1 << 21
"""Bound of the numbers in the batch that a network sees at once; more take gigabytes within some networks."""


def batch_rows(views: Sequence[Preprocessing]) -> int:
    """Return how many photos a network sees at once: 64, fewer of large ones. Follows from the recipe alone."""
    return min(64, *(BATCH_PIXELS // (view.channels * view.size**2) for view in views))


def extract(
    network: nn.Module | None,
    images: Iterable[Image.Image],
    views: Sequence[Preprocessing],
    device: torch.device | str = "cpu",
) -> NDArray[np.float32]:
    """Return what `network` makes of decoded `images`, (n, …) float32; without one, the preprocessed images.

    `views` are the recipe's: a network takes one input for each. Images are taken one by one. The network always runs
    on the same number of rows, the last ones padded with zeros: a kernel may round a row differently in a batch of
    another height, and a photo's embedding must not depend on its neighbours. That it does not depend on its own place
    either is tried out first; where it does, photos are embedded one at a time.
    """
    source, parts = iter(images), []
    rows = batch_rows(views)
    if network is not None and rows > 1 and _position_matters(network, views, rows, device):
        log.warning(
            "Here a photo's embedding depends on its place in a batch; photos are embedded one at a time."
        )
        rows = 1
    count = rows
    while count == rows:
        inputs = [x.to(device) for x in _seen(islice(source, rows), views)]
        count = len(inputs[0])
        if network is None:
            (found,) = inputs
        else:
            padded = [F.pad(x, (0, 0) * (x.ndim - 1) + (0, rows - count)) for x in inputs]
            with torch.inference_mode():
                found = network(*padded)[:count]
        parts.append(found.float().cpu().numpy())
    return np.concatenate(parts)


def _seen(images: Iterable[Image.Image], views: Sequence[Preprocessing]) -> list[Tensor]:
    """Return the images as each view wants them. No more than one decoded image is held at a time."""
    if len(views) == 1:
        return [preprocess(images, views[0])]
    rows = [[preprocess([image], view) for view in views] for image in images]
    return [torch.cat(column) for column in zip(*rows, strict=True)] or [
        preprocess([], view) for view in views
    ]


def _position_matters(
    network: nn.Module, views: Sequence[Preprocessing], rows: int, device: torch.device | str
) -> bool:
    """Return whether equal rows of noise get features that differ. Tried out once for each network and device."""
    tried: dict[str, bool] = network.__dict__.setdefault("_tried", {})
    if str(device) not in tried:
        source = np.random.PCG64(0)
        inputs = []
        for view in views:
            shape = (1, view.channels, view.size, view.size)
            noise = source.random_raw(int(np.prod(shape))) / 2.0**63 - 1.0
            one = torch.from_numpy(noise.astype(np.float32)).reshape(shape)
            inputs.append(one.expand(rows, -1, -1, -1).contiguous().to(device))
        with torch.inference_mode():
            found = network(*inputs)
        tried[str(device)] = not torch.equal(found, found[:1].expand_as(found))
    return tried[str(device)]
