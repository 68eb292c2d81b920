"""What stores do to photos, done to test photos on purpose: something in front, clutter, light, another viewpoint.

    worse = Degraded(photo, "occlusion")     # a Photo again: it has a digest, and opens
    worse.open()

What is done to a photo follows from its own content and the name alone, so it repeats. None of it is an augmentation of
training: fills, shapes and ranges differ from `recipe.Augmentation`'s.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance

from hanse_client.embeddings import Photo

Name = Literal["occlusion", "clutter", "light", "viewpoint"]


@dataclass(frozen=True)
class Degraded:
    """`photo` as `name` leaves it; `clutter` is taken from `other`, and without one from the photo itself."""

    photo: Photo
    name: Name
    other: Photo | None = None

    @property
    def digest(self) -> bytes:
        """SHA-256 of what it is made from, 32 bytes."""
        other = b"" if self.other is None else self.other.digest
        return hashlib.sha256(f"hanse degraded {self.name} ".encode() + self.photo.digest + other).digest()

    def open(self) -> Image.Image:
        """Return the changed photo, of the same size and mode. Raises `PhotoError` as the photo does."""
        rng = np.random.default_rng(int.from_bytes(self.digest[:8], "big"))
        image = self.photo.open()
        if self.name == "clutter":
            return _clutter(image, (self.other or self.photo).open(), rng)
        return _CHANGES[self.name](image, rng)


def _occlusion(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """An ellipse of one colour over about a quarter of the photo, somewhere: a hand, a price tag, a pillar."""
    width, height = image.size
    wide, high = (int(side * rng.uniform(0.45, 0.65)) for side in (width, height))
    left, top = int(rng.integers(0, width - wide + 1)), int(rng.integers(0, height - high + 1))
    colour = tuple(int(value) for value in rng.integers(0, 256, len(image.getbands())))
    changed = image.copy()
    fill = colour if len(colour) > 1 else colour[0]
    ImageDraw.Draw(changed).ellipse((left, top, left + wide, top + high), fill=fill)
    return changed


def _clutter(image: Image.Image, other: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Three pieces of another photo, each over about a twelfth of this one, at its edges."""
    width, height = image.size
    other = other.convert(image.mode).resize(image.size)
    changed = image.copy()
    for corner in rng.permutation(4)[:3]:
        wide, high = (int(side * rng.uniform(0.25, 0.35)) for side in (width, height))
        left, top = (corner % 2) * (width - wide), (corner // 2) * (height - high)
        x, y = int(rng.integers(0, width - wide + 1)), int(rng.integers(0, height - high + 1))
        changed.paste(other.crop((x, y, x + wide, y + high)), (int(left), int(top)))
    return changed


def _light(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Half to one and a half times as bright, and as much contrast, drawn from the outer halves of the range."""
    for enhancer in (ImageEnhance.Brightness, ImageEnhance.Contrast):
        away = rng.uniform(0.25, 0.5) * (1 if rng.random() < 0.5 else -1)
        image = enhancer(image).enhance(1.0 + away)
    return image


def _viewpoint(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Turned by 20 to 45 degrees, then seen aslant: corners move by up to a quarter. What was not seen is grey."""
    width, height = image.size
    angle = float(rng.uniform(20, 45)) * (1 if rng.random() < 0.5 else -1)
    grey = 0 if image.mode == "L" else (128, 128, 128)
    image = image.rotate(angle, Image.Resampling.BILINEAR, fillcolor=grey)
    a, b, c, d, e, f, g, h = rng.uniform(-1 / 4, 1 / 12, 8)
    # Where the corners come from: top left, bottom left, bottom right, top right.
    quad = (
        *(a * width, b * height),
        *(c * width, (1 - d) * height),
        *((1 - e) * width, (1 - f) * height),
        *((1 - g) * width, h * height),
    )
    return image.transform(image.size, Image.Transform.QUAD, quad, Image.Resampling.BILINEAR, fillcolor=grey)


_CHANGES: Mapping[str, Callable[[Image.Image, np.random.Generator], Image.Image]] = {
    "occlusion": _occlusion,
    "light": _light,
    "viewpoint": _viewpoint,
}
