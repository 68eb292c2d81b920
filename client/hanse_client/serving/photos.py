"""A photo as a request's body: bounded, named as what it is, decoded in a thread of its own.

    @router.post("/classify")
    def classify(photo: Photo) -> ...:         # the bytes; image = decoded(photo, limits)

The body is the file itself, so that one line sends it (`curl --data-binary @shoe.jpg -H 'Content-Type: image/jpeg'`),
and what describes it is in the address. There are no forms with parts, whose parsers have limits of their own.
"""

from typing import Annotated, Any, Final

from fastapi import Depends
from PIL.Image import Image
from starlette.requests import Request

from hanse_client.serving.problems import Refused
from hanse_common.vision.photo import LIMITS, decode

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


def decoded(photo: bytes) -> Image:
    """Return the photo in a file's bytes. Raises `PhotoError`."""
    return decode(photo)
