"""What schemathesis can't know: what a photo is, what a line of an import is, and which rules OpenAPI can't say."""

import io
import json
from typing import Any

import schemathesis
from hypothesis import strategies as st
from PIL import Image

RULES = (
    "printable",
    "expected one line",
    "no space at either end",
    "found a name twice",
    "expected at most 4 digits after the point",
    "expected at most 16 digits in all",
)
"""Words by which a request that OpenAPI allows is refused all the same."""


def _photo(kind: str) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (9, 9), "gray").save(data, kind)
    return data.getvalue()


for _kind in ("jpeg", "png", "webp", "gif", "bmp", "tiff"):
    schemathesis.openapi.media_type(f"image/{_kind}", st.just(_photo(_kind)))
schemathesis.openapi.media_type("application/octet-stream", st.just(_photo("png")))
schemathesis.openapi.media_type(
    "application/x-ndjson",
    st.lists(st.builds(lambda sku: json.dumps({"sku": sku}).encode(), st.text(max_size=9))).map(b"\n".join),
)


@schemathesis.serializer("application/x-ndjson")
def _lines(ctx: Any, value: Any) -> Any:
    return value if isinstance(value, bytes) else json.dumps(value).encode()


@schemathesis.check
def is_refused_by_a_rule_or_not_at_all(ctx: Any, response: Any, case: Any) -> None:
    """What OpenAPI allows is answered, but for `RULES`."""
    if response.status_code == 422 and case.meta and case.meta.generation.mode.is_positive:
        detail = response.json()["detail"]
        assert any(rule in detail for rule in RULES), detail
