"""One photo file into RGB pixels, under limits, whatever the file holds.

    image = decode(Path("shelf/shoe.jpg"))
    assert image.mode == "RGB"

A photo is read once, whole, into memory that `PhotoLimits.max_bytes` bounds, and the size in its header is
checked before pixels are decoded. What comes out is the first frame, upright by its EXIF orientation, with
transparency on white. Python's warning filters do not matter here, and Pillow's global pixel bound
(`Image.MAX_IMAGE_PIXELS`) can only refuse more.
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
    """What a photo may cost: bytes of its file, pixels of its picture, and the formats that are opened."""

    max_bytes: int = 20 * 1024 * 1024
    max_pixels: int = 40_000_000
    formats: tuple[str, ...] = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")


LIMITS = PhotoLimits()

MAX_SCANS = 128
"""Scans of a JPEG file at most. Each goes over the whole picture, however few bytes it has; programs write 14 at most,
and the small picture in a camera's notes, or a second one of depth, has its own."""

# What Pillow's decoders were seen to raise on damaged files.
_DAMAGE = (
    *(OSError, ValueError, SyntaxError, TypeError, LookupError, AttributeError, AssertionError),
    *(ArithmeticError, EOFError, MemoryError, RuntimeError, struct.error, zlib.error),
)


def read(path: Path, limits: PhotoLimits = LIMITS) -> bytes:
    """Return the bytes of the photo file at `path`, at least one.

    Raises `PhotoMissing`; `PhotoTooLarge`, after reading at most `max_bytes + 1` bytes; or `PhotoUnreadable`
    for an empty file and for what is no regular file.
    """
    name = shown(path)
    try:
        # Without O_NONBLOCK, opening a FIFO would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise PhotoUnreadable(
                    f"{name}: found no regular file, expected a photo file. Check the path."
                )
            with open(descriptor, "rb", closefd=False) as file:
                data = file.read(limits.max_bytes + 1)
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        raise PhotoMissing(f"{name}: found no such file, expected a photo. Check the path.") from None
    except OSError as error:
        raise PhotoUnreadable(
            f"{name}: cannot be opened ({error.strerror}), expected a photo. Check path and permissions."
        ) from None
    except ValueError:
        raise PhotoMissing(
            f"{name}: no path holds a NUL character, expected a photo. Check the path."
        ) from None
    if not data:
        raise PhotoUnreadable(f"{name}: found an empty file, expected a photo. Copy the photo again.")
    if len(data) > limits.max_bytes:
        raise PhotoTooLarge(
            f"{name}: found more than {limits.max_bytes} bytes, expected at most that. Save a smaller copy."
        )
    return data


def content_digest(data: bytes) -> bytes:
    """Return the SHA-256 of a photo file's bytes, 32 bytes: the identity of its content."""
    return hashlib.sha256(data).digest()


def check(data: bytes, limits: PhotoLimits = LIMITS, path: Path | None = None) -> tuple[int, int]:
    """Return width and height by the header of a photo file's bytes, which is checked; no pixels are decoded.

    `path` is for the error's text.

    Raises `PhotoUnreadable` or `PhotoTooLarge`.
    """
    with _open(data, limits, shown(path) if path else "photo") as image:
        return image.size


def decode(source: Path | bytes, limits: PhotoLimits = LIMITS, path: Path | None = None) -> Image.Image:
    """Return the photo at a path, or in a photo file's bytes, in mode RGB.

    `path` says where bytes come from, for the error's text.

    Raises `PhotoMissing`, `PhotoUnreadable` (no image of `limits.formats`, damaged or truncated) or
    `PhotoTooLarge`, each with one line of text.
    """
    if isinstance(source, Path):
        return decode(read(source, limits), limits, source)
    name = shown(path) if path else "photo"
    with _open(source, limits, name) as image:
        try:
            image.load()
            _turn_upright(image)
            return _rgb(image)
        except _DAMAGE as error:
            reason = " ".join(str(error).split())[:80]
            raise PhotoUnreadable(
                f"{name}: found a damaged {image.format} file ({reason}), expected a whole one. Copy again."
            ) from None


def _open(data: bytes, limits: PhotoLimits, name: str) -> Image.Image:
    # What Pillow warns of, errors say here. The filter goes in front of any other, and only once.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    accepted = ", ".join(limits.formats)
    try:
        image = Image.open(io.BytesIO(data), formats=limits.formats)
    except Image.DecompressionBombError:
        raise PhotoTooLarge(
            f"{name}: found far too many pixels, expected at most {limits.max_pixels}. Save a smaller copy."
        ) from None
    except UnidentifiedImageError:
        raise PhotoUnreadable(
            f"{name}: found no image of an accepted format, expected {accepted}. Save it as one of these."
        ) from None
    except _DAMAGE as error:
        reason = " ".join(str(error).split())[:80]
        raise PhotoUnreadable(
            f"{name}: found a damaged header ({reason}), expected {accepted}. Copy the photo again."
        ) from None
    # No marker's bytes stand within a scan (ITU-T T.81, B.1.1.5), so this counts scans.
    if image.format in ("JPEG", "MPO") and data.count(b"\xff\xda") > MAX_SCANS:
        raise PhotoUnreadable(
            f"{name}: found more than {MAX_SCANS} scans, expected a picture that is decoded in seconds. Save a copy."
        )
    width, height = image.size
    if width * height > limits.max_pixels:
        raise PhotoTooLarge(
            f"{name}: found {width} × {height} pixels, expected at most {limits.max_pixels} in all. "
            "Save a smaller copy."
        )
    return image


def _turn_upright(image: Image.Image) -> None:
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except _DAMAGE:
        return  # broken camera notes around a whole picture: shown as it lies


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        gray = np.asarray(image, dtype=np.float32)
        return Image.fromarray(np.round(gray / 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError("32-bit samples have no agreed white")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def shown(path: Path) -> str:
    """Return `path` for a line of text: file names may hold line breaks and bytes that no terminal prints."""
    return str(path) if str(path).isprintable() else repr(str(path))
