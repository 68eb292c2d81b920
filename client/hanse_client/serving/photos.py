"""A photo as a request's body: bounded, named as what it is, decoded in a thread of its own, where there is room.

    @router.post("/classify")
    def classify(photo: Photo) -> ...:         # the bytes; image = decoded(photo)

A file of two kilobytes may be a picture of 40 megapixels, which take 160 MB. So of all requests together only so many
pixels are in memory: who comes beyond that waits, and is told to come again when it takes long.

The body is the file itself, so that one line sends it (`curl --data-binary @shoe.jpg -H 'Content-Type: image/jpeg'`),
and what describes it is in the address. There are no forms with parts, whose parsers have limits of their own.
"""

import threading
import weakref
from collections.abc import Sequence
from typing import Annotated, Any, Final

from fastapi import Depends
from PIL.Image import Image
from starlette.requests import Request

from hanse_client.gallery.bounds import MAX_VIEWS
from hanse_client.gallery.gallery import Gallery
from hanse_client.serving.problems import Refused
from hanse_common.errors import Busy, PhotoTooLarge
from hanse_common.vision.photo import LIMITS, PhotoLimits, check, decode

PHOTO_TYPES: Final = (
    *("image/jpeg", "image/png", "image/webp", "image/gif", "image/bmp", "image/tiff"),
    "application/octet-stream",
)
PHOTO_BODY: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "description": "The photo's file, as it is. How it is encoded is read from the file itself.",
        "content": {kind: {"schema": {"type": "string", "format": "binary"}} for kind in PHOTO_TYPES},
    }
}
"""What OpenAPI says of such a request."""


async def received(request: Request, max_bytes: int) -> bytes:
    """Return a request's content. Raises `Refused` (413) when it is longer than `max_bytes`."""
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > max_bytes:
            raise Refused(413, "too_large", f"Found more than {max_bytes} bytes, expected at most that.")
    return bytes(content)


def content_type(request: Request) -> str:
    """Return what a request says it sends, without parameters, in lower case."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def _photo(request: Request) -> bytes:
    found = content_type(request)
    if found not in PHOTO_TYPES:
        raise Refused(
            415,
            "wrong_content_type",
            f"Content-Type: found {found[:60]!r}, expected one of {', '.join(PHOTO_TYPES)}.",
        )
    return await received(request, LIMITS.max_bytes)


Photo = Annotated[bytes, Depends(_photo)]
"""A photo's file, not decoded yet."""


class Room:
    """Room for photos of `pixels` in all, being decoded or decoded. Threads share it.

    A photo takes its place until nobody holds it any more.
    """

    def __init__(self, pixels: int, seconds: float) -> None:
        self._free = pixels
        self._seconds = seconds
        self._changed = threading.Condition()

    def decoded(self, photo: bytes, limits: PhotoLimits) -> Image:
        """Return the photo in a file's bytes. Raises `PhotoError`, and `Busy` when no room comes in time."""
        width, height = check(photo, limits)
        pixels = width * height
        with self._changed:
            if not self._changed.wait_for(lambda: self._free >= pixels, self._seconds):
                raise Busy("Too many large photos at once. Send smaller ones, or fewer at a time.")
            self._free -= pixels
        try:
            image = decode(photo, limits)
        except BaseException:
            self._give(pixels)
            raise
        weakref.finalize(image, self._give, pixels)
        return image

    def _give(self, pixels: int) -> None:
        with self._changed:
            self._free += pixels
            self._changed.notify_all()


ROOM: Final = Room(pixels=2 * LIMITS.max_pixels, seconds=20.0)
"""All requests' room: a photo takes up to 15 bytes a pixel while it is decoded and made small, as measured."""


def decoded(photo: bytes, limits: PhotoLimits = LIMITS) -> Image:
    """Return the photo in a file's bytes. Raises `PhotoError`, and `Busy` when there are too many large ones."""
    if len(photo) > limits.max_bytes:
        raise PhotoTooLarge(
            f"photo: found {len(photo)} bytes, expected at most {limits.max_bytes}. Save a smaller copy."
        )
    return ROOM.decoded(photo, limits)


def references(files: Sequence[bytes], limits: PhotoLimits = LIMITS) -> list[Image]:
    """Return the photos in files of a product, as small as they are stored, and only one of them large at a time.

    Raises `PhotoError`, and `Refused` (422) for more than a product has.
    """
    if len(files) > MAX_VIEWS:
        raise Refused(422, "invalid", f"photos: found {len(files)}, expected at most {MAX_VIEWS}.")
    return [Gallery.reduced(decoded(file, limits)) for file in files]
