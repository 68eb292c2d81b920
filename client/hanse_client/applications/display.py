"""A shop's photos on display: the best one of each product, photos that look the same, and photos at the wrong product.

    best = best_photo(recognition, "A-17")            # the digest of the photo to show first
    for group in look_alike_photos(recognition.gallery): ...
    for misplaced in misplaced_photos(recognition): ...

All of it is for the owner's eyes: nothing is moved or removed.

**The best photo** is the most typical of those that are large and sharp enough: of all photos of the product with at
least `LARGE` of the largest one's pixels and, among these, `SHARP` of the sharpest one's sharpness, the one whose
vector is most similar to the others' mean. Sharpness is how much of the difference between neighbouring pixels goes
when a photo is blurred: of one that is blurred already, little [1]. So photos of smooth and of rough things compare.

**Misplaced photos.** A photo is suspect when some photo of another product is more similar to it than every other one
of its own product, by `MARGIN`. It is the nearest-neighbour rule for data that was labelled wrongly [2]; what is
suspect need not be wrong, as two products may well look the same. A product's only photo can't be judged. A photo that
two products have is compared with the other photos of each alone: so it is suspect at one of the two, not at both.
Whether a photo shows the *class* that its label says is for `hanse_client.suspects`.

[1] Crété, Dolmiere, Ladret, Nicolas, "The Blur Effect: Perception and Estimation with a New No-Reference Perceptual
    Blur Metric", SPIE 6492, 2007, section 3.
[2] Wilson, "Asymptotic Properties of Nearest Neighbor Rules Using Edited Data", IEEE Trans. SMC, 1972.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import uniform_filter1d

from hanse_client.duplicates import look_alikes, thumbnail

if TYPE_CHECKING:  # it brings torch
    from hanse_client.gallery.gallery import Gallery
    from hanse_client.recognition.service import Recognition

LARGE = 0.5
"""Share of the largest photo's pixels that is large enough."""

SHARP = 0.75
"""Share of the sharpest photo's sharpness that is sharp enough."""

MARGIN = 0.02
"""By how much, in cosine, another product must be nearer."""

_EDGE = 256  # longest side, in pixels, at which sharpness is measured
_BLUR = 9  # pixels that are averaged
_OTHERS = 5  # products near a photo whose photos are looked at


@dataclass(frozen=True, slots=True)
class Placed:
    """A photo, by its SHA-256, at one of the products that show it."""

    sku: str
    photo: bytes


@dataclass(frozen=True, slots=True)
class Misplaced:
    """The photo of `placed` looks like `instead`: its similarity to the nearest photo of its own and of that."""

    placed: Placed
    instead: str
    own: float
    other: float


def best_photo(recognition: "Recognition", sku: str) -> bytes | None:
    """Return the SHA-256 of the best photo of `sku`, or None when it has none."""
    gallery, embedding = recognition.gallery, recognition.status().embedding
    photos = gallery.photos_of(sku)
    if not photos:
        return None
    images = [_decoded(gallery, digest) for digest in photos]
    pixels = np.array([image.width * image.height for image in images])
    fine = np.array([sharpness(image) for image in images])
    fit = pixels >= LARGE * pixels.max()
    fit &= fine >= SHARP * fine[fit].max()
    vectors = gallery.vectors_of(sku, embedding)
    typical = vectors @ vectors.mean(axis=0) if len(vectors) == len(photos) else fine
    return photos[int(np.argmax(np.where(fit, typical, -np.inf)))]


def sharpness(image: Image.Image) -> float:
    """Return the share of the differences between neighbours that goes by a blur, at one size, from 0 to 1.

    Along rows or columns, whichever is less: a photo that was moved is sharp along the way. It is one minus the blur
    of [1].
    """
    small = image.convert("L")
    small.thumbnail((_EDGE, _EDGE))
    brightness = np.asarray(small, dtype=np.float64)
    shares = []
    for axis in (0, 1):
        before = np.abs(np.diff(brightness, axis=axis))
        after = np.abs(np.diff(uniform_filter1d(brightness, _BLUR, axis=axis), axis=axis))
        shares.append(np.maximum(before - after, 0.0).sum() / max(before.sum(), 1.0))
    return float(min(shares))


def look_alike_photos(gallery: "Gallery") -> list[tuple[Placed, ...]]:
    """Return groups of photos that look the same, or are, within one product or across; see `duplicates`."""
    placed = list(_all_photos(gallery))
    if not placed:
        return []
    groups = look_alikes(np.stack([thumbnail(_decoded(gallery, one.photo)) for one in placed]))
    return [tuple(placed[index] for index in group) for group in groups]


def twins(groups: Sequence[tuple[Placed, ...]]) -> list[tuple[str, ...]]:
    """Return the SKUs of each of the `groups` of photos that look the same, where these are several products'."""
    found = {tuple(sorted({one.sku for one in group})) for group in groups}
    return sorted(skus for skus in found if len(skus) > 1)


def misplaced_photos(recognition: "Recognition") -> list[Misplaced]:
    """Return the photos that are nearer to another product than to their own, the clearest first."""
    gallery, embedding = recognition.gallery, recognition.status().embedding
    found = []
    for sku in gallery.skus():
        vectors, photos = gallery.vectors_of(sku, embedding), gallery.photos_of(sku)
        if len(vectors) < 2 or len(vectors) != len(photos):
            continue
        among = vectors @ vectors.T
        np.fill_diagonal(among, -np.inf)
        for index, matches in enumerate(gallery.search(embedding, vectors, 1 + _OTHERS)):
            others = {
                match.product.sku: _nearest(
                    gallery, embedding, match.product.sku, vectors[index], photos[index]
                )
                for match in matches
                if match.product.sku != sku
            }
            own, nearest = float(among[index].max()), max(others, key=lambda one: others[one], default=None)
            if nearest is not None and others[nearest] > own + MARGIN:
                found.append(Misplaced(Placed(sku, photos[index]), nearest, own, others[nearest]))
    return sorted(found, key=lambda one: one.own - one.other)


def _nearest(
    gallery: "Gallery", embedding: bytes, sku: str, vector: NDArray[np.float32], photo: bytes
) -> float:
    """Return the similarity of the `vector` (d,) of `photo` to the nearest other photo of `sku`, −1 without any."""
    vectors, photos = gallery.vectors_of(sku, embedding), gallery.photos_of(sku)
    if len(vectors) == len(photos):
        vectors = vectors[[digest != photo for digest in photos]]
    return float((vectors @ vector).max(initial=-1.0)) if len(vectors) else -1.0


def _all_photos(gallery: "Gallery") -> Iterator[Placed]:
    for sku in gallery.skus():
        yield from (Placed(sku, photo) for photo in gallery.photos_of(sku))


def _decoded(gallery: "Gallery", digest: bytes) -> Image.Image:
    data = gallery.photo(digest)
    if data is None:  # removed by somebody else in between
        return Image.new("RGB", (1, 1))
    return Image.open(io.BytesIO(data)).convert("RGB")
