"""One photo file into RGB pixels, under limits, whatever the file holds.

    image = decode(Path("shelf/shoe.jpg"))
    assert image.mode == "RGB"

A photo is read once, whole, into memory that `PhotoLimits.max_bytes` bounds; the size in its header is checked
before pixels are decoded. What comes out is the first frame, upright by its EXIF orientation, transparency on
white, as RGB. Nothing here depends on Pillow's global settings or on Python's warning filters.
"""

import hashlib
import io
import os
import stat
import struct
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from hanse_common.errors import PhotoMissing, PhotoTooLarge, PhotoUnreadable


@dataclass(frozen=True, slots=True)
class PhotoLimits:
    """What a photo may cost: bytes of the file, pixels of the picture, and the formats that are opened."""

    max_bytes: int = 20 * 1024 * 1024
    max_pixels: int = 40_000_000
    formats: tuple[str, ...] = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")


LIMITS = PhotoLimits()

# What Pillow's decoders raise on damaged files; DecompressionBombError is Pillow's own, global limit.
_DAMAGED = (
    OSError,
    ValueError,
    SyntaxError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    AssertionError,
    OverflowError,
    EOFError,
    RuntimeError,
    ZeroDivisionError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def read(path: Path, limits: PhotoLimits = LIMITS) -> bytes:
    """Return the bytes of the photo file at `path`.

    Raises `PhotoMissing`, `PhotoTooLarge` (after reading at most `max_bytes + 1` bytes), or `PhotoUnreadable`
    for what is no regular file.
    """
    try:
        # Opening a FIFO without O_NONBLOCK would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb", buffering=0) as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise PhotoUnreadable(f"{path}: not a file, expected a photo file. Check the path.")
            data = _read_at_most(file, limits.max_bytes + 1)
    except FileNotFoundError:
        raise PhotoMissing(f"{path}: no such file, expected a photo. Check the path.") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise PhotoUnreadable(f"{path}: cannot be read ({reason}). Check the path and its permissions.") from None
    if len(data) > limits.max_bytes:
        raise PhotoTooLarge(
            f"{path}: found more than {limits.max_bytes} bytes, expected at most that. Save a smaller copy."
        )
    return data
