"""What a browser posts to a page of ours: bounded, and sent by one of our own pages.

    fields = await posted(request, max_bytes=4096)     # {"length": "1h"}

A page elsewhere can have a browser post here, with our cookies: a server on another port of this machine even counts as
the same site. So a post must say that it is from our own origin, by `Sec-Fetch-Site`, which no page can forge, or in a
browser that does not send that, by `Origin`. Our pages send no referrer, and then a browser's `Origin` is "null".
"""

from collections.abc import Mapping
from urllib.parse import parse_qsl

from starlette.exceptions import HTTPException
from starlette.requests import Request

MAX_FIELDS = 40

_FORM = "application/x-www-form-urlencoded"


async def posted(request: Request, max_bytes: int) -> Mapping[str, str]:
    """Return the fields of a form, each once.

    Raises `HTTPException`: 403 for another page's, 413 for more than `max_bytes`, 415 for no form, 400 for damage.
    """
    require_own_origin(request)
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != _FORM:
        raise HTTPException(415, "Found no form.")
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > max_bytes:
            raise HTTPException(413, f"Found more than {max_bytes} bytes.")
    try:
        pairs = parse_qsl(
            data.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=MAX_FIELDS
        )
    except ValueError:
        raise HTTPException(400, "Found a damaged form.") from None
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise HTTPException(400, "Found a field twice.")
    return fields


def require_own_origin(request: Request) -> None:
    """Return if one of our own pages sent `request`. Raises `HTTPException` otherwise, also when nothing tells."""
    site = request.headers.get("sec-fetch-site")
    own = f"{request.url.scheme}://{request.headers.get('host', '')}"
    if site != "same-origin" if site is not None else request.headers.get("origin") != own:
        raise HTTPException(403, "Another page sent this.")
