"""Photos that are the same file, and photos that look the same: found for the merchant's eyes, never merged.

    copies = exact_copies([record.digest for record in records])
    alike = look_alikes(np.stack([thumbnail(record.open()) for record in records]))

Both return groups of indices. Nothing is dropped or moved by what is found here: a record's fate may depend on that
record alone, or one photo more could change what happens to others, which the privacy accounting does not cover.

**How photos that look the same are found.** Each photo has a thumbnail of 32 × 32 pixels and a perceptual hash of 64
bits: which low frequencies of its brightness are above their median [1]. Two photos look the same when their hashes
differ in at most `MAX_DISTANCE` bits *and* their thumbnails, in colour, correlate by `MIN_CORRELATION` or more. A hash
alone is not enough for shelves: among 20 000 photos of Fashion-MNIST (200 million pairs), 21 294 pairs have hashes
within 6 bits, and 7 827 the very same dHash, as 64 bits hardly tell one pair of trousers from another. With the
correlation 28 pairs remain, all of one class, most of which a person takes for the same picture; with a correlation of
0.98 it would be some 200, with different products among them. Of copies of full photos, 99.8 % are found after JPEG at
quality 75, half or twice the size, or more contrast; 98 % after JPEG at quality 30, 97 % with 1 % cropped away, 84 %
with a watermark. Copies in other colours, cropped further, turned or mirrored are other photos here. A photo without
any contrast (below `FLAT`) has nothing to compare and is like no other.

Candidates come from an index over 7 bands of the hash: hashes within 6 bits share at least one band (the pigeonhole
principle [2]). Photos are taken in order, and each opens a group of those after it that look like it and are in no
group yet: so every photo of a group looks like the group's first, and likeness is not handed on in a chain. Memory
grows with the photos, not with the pairs.

[1] Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions", 2010, section 3.2.1.
[2] Norouzi, Punjani, Fleet, "Fast Search in Hamming Space with Multi-Index Hashing", CVPR 2012.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.fft import dctn

EDGE = 32
"""Edge of a thumbnail, in pixels."""

MAX_DISTANCE = 6
"""Bits in which the hashes of photos that look the same may differ."""

MIN_CORRELATION = 0.99
"""Least Pearson correlation of the thumbnails of photos that look the same."""

FLAT = 3.0
"""Standard deviation of a thumbnail's brightness, of 255, below which there is nothing to compare."""

SAME = 0.99
"""Cosine of features from which on two photos are taken for copies of one picture. Of 217 photos of groceries, the
prepared JPEG of each has over 0.999 with its original, and the most alike among 5421 others 0.98 (0.96 centred)."""

_FREQUENCIES = slice(1, 9)
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601
_CHUNK = 1024

Group = tuple[int, ...]


def exact_copies(digests: Sequence[bytes]) -> list[Group]:
    """Return the indices of equal content digests, a group of two or more for each, in order."""
    places: dict[bytes, list[int]] = {}
    for index, digest in enumerate(digests):
        places.setdefault(digest, []).append(index)
    return [tuple(group) for group in places.values() if len(group) > 1]


def thumbnail(image: Image.Image) -> NDArray[np.uint8]:
    """Return `image`, of mode RGB, squeezed to (32, 32, 3) uint8."""
    small = image.resize((EDGE, EDGE), Image.Resampling.BILINEAR, reducing_gap=3.0)
    return np.asarray(small, dtype=np.uint8)


def perceptual_hashes(thumbnails: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Return the hash of each of the thumbnails (n, 32, 32, 3), shape (n,)."""
    parts = [np.empty(0, dtype=np.uint64)]
    for first in range(0, len(thumbnails), _CHUNK):
        brightness = thumbnails[first : first + _CHUNK] @ _LUMA
        spectrum = dctn(brightness, axes=(1, 2), norm="ortho")[:, _FREQUENCIES, _FREQUENCIES]
        low = spectrum.reshape(len(spectrum), 64)
        bits = low > np.median(low, axis=1, keepdims=True)
        parts.append(np.packbits(bits, axis=1).view(">u8")[:, 0].astype(np.uint64))
    return np.concatenate(parts)


def look_alikes(
    thumbnails: NDArray[np.uint8], progress: Callable[[int, int], None] = lambda done, total: None
) -> list[Group]:
    """Return the groups of two or more of the thumbnails (n, 32, 32, 3) that look the same; see the module's text.

    `progress` hears how many photos were compared, and of how many.
    """
    hashes = perceptual_hashes(thumbnails)
    comparable = np.concatenate(
        [np.empty(0, dtype=bool)]
        + [
            (thumbnails[first : first + _CHUNK] @ _LUMA).std(axis=(1, 2)) >= FLAT
            for first in range(0, len(thumbnails), _CHUNK)
        ]
    )
    near = HammingIndex(hashes)
    free = comparable.copy()
    groups: list[Group] = []
    for first in range(len(thumbnails)):
        if first % _CHUNK == 0:
            progress(first, len(thumbnails))
        if not free[first]:
            continue
        others = near.within(first)
        others = others[(others > first) & free[others]]
        others = others[_correlations(thumbnails, first, others) >= MIN_CORRELATION]
        if len(others):
            free[others] = False
            groups.append((first, *others.tolist()))
    progress(len(thumbnails), len(thumbnails))
    return groups


class HammingIndex:
    """An index of 64-bit hashes by each of `MAX_DISTANCE` + 1 bands of their bits."""

    def __init__(self, hashes: NDArray[np.uint64]) -> None:
        self._hashes = hashes
        edges = np.linspace(0, 64, MAX_DISTANCE + 2).astype(int)
        self._bands = []
        for low, high in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            values = (hashes >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)
            order = np.argsort(values, kind="stable")
            starts = np.searchsorted(values[order], np.arange((1 << (high - low)) + 1, dtype=np.uint64))
            self._bands.append((values, order, starts))

    def within(self, index: int) -> NDArray[np.intp]:
        """Return, in order, the indices of all hashes within `MAX_DISTANCE` bits of the one at `index`."""
        found = []
        for values, order, starts in self._bands:
            value = int(values[index])
            candidates = order[starts[value] : starts[value + 1]]
            distance = np.bitwise_count(self._hashes[candidates] ^ self._hashes[index])
            found.append(candidates[distance <= MAX_DISTANCE])
        return np.unique(np.concatenate(found))


def _correlations(thumbnails: NDArray[np.uint8], first: int, others: NDArray[np.intp]) -> NDArray[np.float32]:
    """Return the Pearson correlation of one thumbnail's values with each of the others', (m,)."""
    one = _standardised(thumbnails[[first]])[0]
    parts = [
        _standardised(thumbnails[others[start : start + _CHUNK]]) @ one
        for start in range(0, len(others), _CHUNK)
    ]
    return np.concatenate([np.empty(0, dtype=np.float32), *parts])


def _standardised(thumbnails: NDArray[np.uint8]) -> NDArray[np.float32]:
    values = thumbnails.reshape(len(thumbnails), -1).astype(np.float32)
    values -= values.mean(axis=1, keepdims=True)
    values /= np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-6)
    return values
