"""Photo styles of invented shops: one article of Fashion-MNIST as different shops would show it.

    style = ShopStyle.drawn(seed=7)
    photo = StyledPhoto(pixels, style, shot=0)     # a Photo: it has a digest, and opens
    photo.open()                                   # RGB, `SIDE` pixels a side

A shop has a background, a tint, a light that falls off to one side, a distance, an angle, a sharpness and a JPEG
quality of its own; its single shots differ a little in distance, angle, place and light. All of it follows from seed,
pixels and shot, so that it repeats.
"""

import hashlib
import io
from dataclasses import astuple, dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter

from hanse_client.embeddings import Photo

SIDE = 112
"""Of a styled photo, in pixels."""

_OPAQUE = 6.0
"""How much faster than the article's brightness its opacity rises: Fashion-MNIST's background is black."""


@dataclass(frozen=True)
class ShopStyle:
    """What all photos of one shop have in common.

    Colours are RGB, `background` in 0 to 255, `tint` in 0 to 1; `fall_off` is the light's change from the middle to
    the bottom and the right edge; `blur` is a Gaussian's radius in pixels, `rotation` in degrees.
    """

    background: tuple[float, float, float]
    tint: tuple[float, float, float]
    gamma: float
    scale: float
    rotation: float
    mirrored: bool
    light: float
    fall_off: tuple[float, float]
    blur: float
    quality: int

    @classmethod
    def drawn(cls, seed: int) -> Self:
        """Return a random style, the same for the same seed."""
        rng = np.random.default_rng(seed)
        colour = rng.uniform(0, 255, 3) if rng.random() < 0.6 else np.full(3, rng.uniform(150, 255))
        return cls(
            background=(float(colour[0]), float(colour[1]), float(colour[2])),
            tint=(rng.uniform(0.5, 1.0), rng.uniform(0.5, 1.0), rng.uniform(0.5, 1.0)),
            gamma=rng.uniform(0.6, 1.6),
            scale=rng.uniform(0.65, 1.1),
            rotation=rng.uniform(-15, 15),
            mirrored=bool(rng.random() < 0.3),
            light=rng.uniform(0.7, 1.2),
            fall_off=(rng.uniform(-0.3, 0.3), rng.uniform(-0.3, 0.3)),
            blur=rng.uniform(0, 1.5),
            quality=int(rng.integers(25, 95)),
        )


@dataclass(frozen=True, eq=False)
class StyledPhoto:
    """The article `pixels`, (h, w) uint8, white on black, as a shop shows it; each `shot` is another photo of it."""

    pixels: NDArray[np.uint8]
    style: ShopStyle
    shot: int

    @property
    def digest(self) -> bytes:
        """SHA-256 of what it is made from, 32 bytes."""
        made_from = f"hanse styled photo {astuple(self.style)} {self.shot} {self.pixels.shape} ".encode()
        return hashlib.sha256(made_from + self.pixels.tobytes()).digest()

    def open(self) -> Image.Image:
        """Return the photo."""
        style, rng = self.style, _generator(self.digest)
        side = int(SIDE * style.scale * rng.uniform(0.93, 1.07))
        article = Image.fromarray(self.pixels).resize((side, side), Image.Resampling.BICUBIC)
        article = article.rotate(style.rotation + rng.uniform(-6, 6), Image.Resampling.BICUBIC)
        if style.mirrored:
            article = article.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        corner = (SIDE - side) // 2
        canvas = Image.new("L", (SIDE, SIDE), 0)
        canvas.paste(article, (corner + int(rng.integers(-5, 6)), corner + int(rng.integers(-5, 6))))
        bright = np.asarray(canvas, dtype=np.float64)[..., None] / 255
        opacity = np.clip(_OPAQUE * bright, 0, 1)
        shown = opacity * bright**style.gamma * np.array(style.tint) * 255
        shown = shown + (1 - opacity) * np.array(style.background)
        down, right = np.meshgrid(np.linspace(-1, 1, SIDE), np.linspace(-1, 1, SIDE), indexing="ij")
        light = 1 + style.fall_off[0] * down + style.fall_off[1] * right
        shown = shown * (style.light * rng.uniform(0.93, 1.07) * light)[..., None]
        image = Image.fromarray(np.clip(shown, 0, 255).astype(np.uint8))
        return _compressed(image.filter(ImageFilter.GaussianBlur(style.blur)), style.quality)


@dataclass(frozen=True, eq=False)
class OtherView:
    """`photo` changed at random as any photo can be: cropped, turned, mirrored, other colours and light, blurred."""

    photo: Photo

    @property
    def digest(self) -> bytes:
        """SHA-256 of what it is made from, 32 bytes."""
        return hashlib.sha256(b"hanse other view " + self.photo.digest).digest()

    def open(self) -> Image.Image:
        """Return the changed photo, RGB, of the same size. Raises `PhotoError` as the photo does."""
        rng = _generator(self.digest)
        image = self.photo.open().convert("RGB")
        width, height = image.size
        # The corners that turning leaves are filled with the photo's own.
        corner = tuple(int(value) for value in np.asarray(image)[0, 0])
        image = image.rotate(rng.uniform(-15, 15), Image.Resampling.BILINEAR, fillcolor=corner)
        share = rng.uniform(0.6, 1.0)
        wide, high = max(1, int(width * share)), max(1, int(height * share))
        left, top = int(rng.integers(0, width - wide + 1)), int(rng.integers(0, height - high + 1))
        image = image.crop((left, top, left + wide, top + high))
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        if rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        values = (np.asarray(image, dtype=np.float64) / 255) ** rng.uniform(0.6, 1.7)
        values = values * rng.uniform(0.6, 1.1, 3) * rng.uniform(0.7, 1.3)
        image = Image.fromarray(np.clip(255 * values, 0, 255).astype(np.uint8))
        image = ImageEnhance.Color(image).enhance(rng.uniform(0.2, 1.6))
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.012) * width))
        return _compressed(image, int(rng.integers(25, 95)))


def _compressed(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def _generator(digest: bytes) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(digest[:8], "big"))
