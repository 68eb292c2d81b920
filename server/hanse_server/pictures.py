"""One merchant's masked upload beside the sum of all, as pictures: what the server saw.

    picture(mask(upload))            # PNG bytes, 64 × 64 greys: noise, whatever the merchant learned
    picture(own_scale(total))        # the sum, which means something
    randomness(upload)               # 7.99 bits a byte

A number is a pixel. Of an upload, the byte that says most is its grey: masked, all of its values are equally likely,
and a picture of anything else would show. The sum is a signed number; black and white are its own extremes, grey is
zero.
"""

import io
import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE = 64
"""Pixels of a picture's side, at most: it holds the first SIDE² numbers, or as many as fill a smaller square."""

_EXTREME = 0.99
"""The part of the numbers that is between black and white; the others are cut off."""


def mask(upload: NDArray[np.uint32]) -> NDArray[np.uint8]:
    """Return the greys of a masked upload, shape (n,) residues mod 2³², as a picture's, shape (s, s), s ≤ 64."""
    return _square((upload >> np.uint32(24)).astype(np.uint8))


def own_scale(total: NDArray[np.uint32]) -> NDArray[np.uint8]:
    """Return the greys of a sum, shape (n,) residues mod 2³² of signed numbers, likewise, shape (s, s), s ≤ 64."""
    signed = total.astype(np.uint32).view(np.int32).astype(np.float64)
    extreme = float(np.quantile(np.abs(signed), _EXTREME)) if signed.size else 0.0
    if extreme == 0.0:
        extreme = 1.0
    return _square(np.rint(127.5 + 127.5 * np.clip(signed / extreme, -1, 1)).astype(np.uint8))


def picture(greys: NDArray[np.uint8]) -> bytes:
    """Return greys, shape (h, w), as a PNG."""
    file = io.BytesIO()
    Image.fromarray(greys).save(file, "PNG")
    return file.getvalue()


def randomness(numbers: NDArray[np.uint32]) -> float:
    """Return the entropy of the bytes of `numbers`, shape (n,), in bits a byte: 8 when all are equally frequent.

    It is the plug-in estimate with Miller's correction (1955, "Note on the bias of information estimates"), which
    counts the values that occur.
    """
    found = np.bincount(numbers.astype("<u4").view(np.uint8), minlength=256)
    shares = found[found > 0] / max(1, found.sum())
    plain = float(-(shares * np.log2(shares)).sum())
    correction = (len(shares) - 1) / (2 * np.log(2) * max(1, found.sum()))
    return float(np.clip(plain + correction, 0.0, 8.0))


def _square(greys: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return as many of the first numbers as fill a square; one grey pixel when there are none."""
    side = min(SIDE, math.isqrt(len(greys)))
    return greys[: side * side].reshape(side, side) if side else np.full((1, 1), 128, dtype=np.uint8)
