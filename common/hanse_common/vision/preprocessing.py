"""From decoded photos to tensors, as a recipe says.

    inputs = preprocess([photo.decode(path, limits)], recipe.preprocessing)    # (1, c, s, s) float32
    inputs = augment(inputs, recipe, torch.Generator().manual_seed(1))         # nets trained whole only

Preprocessing is deterministic. Resizing rounds to 8 bits a channel, as Pillow does.
"""

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from hanse_common.vision.recipe import Recipe
from hanse_common.vision.recipe_features import Preprocessing
from hanse_common.vision.recipe_model import Augmentation

_FILTER = Image.Resampling.BICUBIC


def preprocess(images: Iterable[Image.Image], preprocessing: Preprocessing) -> Tensor:
    """Return `images`, of any size and of mode RGB or L, as one float32 tensor (n, c, size, size).

    Images are taken one by one, so that an iterator need hold no more than one large photo at a time.
    """
    size, channels = preprocessing.size, preprocessing.channels
    rows = [_pixels(image, preprocessing) for image in images]
    pixels = np.stack(rows) if rows else np.empty((0, size, size, channels), dtype=np.uint8)
    scaled = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(255.0)
    mean, std = _statistics(preprocessing)
    return scaled.sub_(mean).div_(std).contiguous()


def augment(batch: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Return `batch`, preprocessed (n, c, s, s), changed at random, every example by a draw of its own.

    Randomness comes from `generator` alone, and torch's global generator is left as it was. Returns `batch`
    itself when the recipe has no augmentation.
    """
    if recipe.augmentation is None or len(batch) == 0:
        return batch
    mean, std = (values.to(batch.device) for values in _statistics(recipe.preprocessing))
    transform = _transform(recipe.augmentation, recipe.preprocessing)
    seed = int(torch.randint(1 << 62, (), generator=generator, device=generator.device))
    # Colours are changed on the scale from 0 to 1. v2 draws from the global generator only.
    scaled = (batch * std + mean).clamp_(0.0, 1.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        changed = torch.stack([transform(example) for example in scaled])
    return (changed - mean) / std


def _pixels(image: Image.Image, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """One photo as (size, size, channels)."""
    mode = "L" if preprocessing.channels == 1 else "RGB"
    if image.mode != mode:
        image = image.convert(mode)
    size = (preprocessing.size, preprocessing.size)
    if image.size != size or preprocessing.zoom != 1.0:
        if preprocessing.resize == "crop":
            image = _crop(image, preprocessing.size, preprocessing.zoom)
        elif preprocessing.resize == "pad":
            image = _pad(image, preprocessing)
        else:
            image = image.resize(size, _FILTER)
    pixels = np.asarray(image)
    return pixels.reshape(*size, preprocessing.channels)


def _crop(image: Image.Image, size: int, zoom: float) -> Image.Image:
    """Scale the `zoom`-th part of the shorter side to `size` and cut the centre, in one resampling."""
    width, height = image.size
    side = max(1, round(min(width, height) / zoom))
    left, top = (width - side) // 2, (height - side) // 2
    return image.resize((size, size), _FILTER, box=(left, top, left + side, top + side))


def _pad(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """Scale the longer side to size and fill both ends of the other with the mean, which becomes zero."""
    size, longer = preprocessing.size, max(image.size)
    width, height = (max(1, round(side * size / longer)) for side in image.size)
    fill = tuple(min(255, max(0, round(255 * m))) for m in per_channel(preprocessing.mean, preprocessing))
    canvas = Image.new(image.mode, (size, size), fill if len(fill) > 1 else fill[0])
    canvas.paste(image.resize((width, height), _FILTER), ((size - width) // 2, (size - height) // 2))
    return canvas


def per_channel(values: tuple[float, ...], preprocessing: Preprocessing) -> tuple[float, ...]:
    """Return one of `values` for each channel."""
    return values * preprocessing.channels if len(values) == 1 else values


def _statistics(preprocessing: Preprocessing) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, each (c, 1, 1) float32."""
    mean, std = (
        torch.tensor(per_channel(values, preprocessing), dtype=torch.float32).reshape(-1, 1, 1)
        for values in (preprocessing.mean, preprocessing.std)
    )
    return mean, std


def _transform(augmentation: Augmentation, preprocessing: Preprocessing) -> nn.Module:
    # torchvision takes a second to import, and preprocessing does without it.
    from hanse_common.vision.torchvision_compat import v2

    size = preprocessing.size
    fill = [min(1.0, max(0.0, mean)) for mean in per_channel(preprocessing.mean, preprocessing)]
    steps: list[nn.Module] = []
    if augmentation.crop_padding:
        steps.append(v2.RandomCrop(size, padding=augmentation.crop_padding, fill=fill))
    if augmentation.flip:
        steps.append(v2.RandomHorizontalFlip(augmentation.flip))
    if augmentation.rotation:
        steps.append(
            v2.RandomRotation(augmentation.rotation, interpolation=v2.InterpolationMode.BILINEAR, fill=fill)
        )
    colour = {name: getattr(augmentation, name) for name in ("brightness", "contrast", "saturation", "hue")}
    if any(colour.values()):
        steps.append(v2.ColorJitter(**colour))
    if augmentation.erasing:
        steps.append(v2.RandomErasing(augmentation.erasing, value=fill))
    return nn.Sequential(*steps)
