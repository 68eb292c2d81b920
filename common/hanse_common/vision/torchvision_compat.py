"""The one place that imports torchvision.

torchvision registers Python counterparts of its compiled operators when it is imported. Where those operators
did not load (a CPU build of torch beside a torchvision built for CUDA), that registration fails because
`torchvision::nms` and `torchvision::qnms` have no schema, and so does the import. Declaring the two schemas
first is enough: Hanse uses models and transforms, which call neither operator. `torchvision.io` stays
unusable; photos are decoded with Pillow.
"""

import importlib.util
from pathlib import Path

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def _compiled_operators_load() -> bool:
    """Load torchvision's operators as its own `extension` module will, and say whether that worked."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return False
    for library in Path(spec.origin).parent.glob("_C.*"):
        try:
            torch.ops.load_library(library)  # type: ignore[no-untyped-call]
        except OSError:
            continue
        return True
    return False


def _declare_missing_operators() -> torch.library.Library | None:
    if _compiled_operators_load():
        return None
    library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for schema in _SCHEMAS:
        library.define(schema)  # type: ignore[no-untyped-call]
    return library


# The schemas live as long as this object.
_library = _declare_missing_operators()

import torchvision  # noqa: E402
from torchvision import models  # noqa: E402
from torchvision.transforms import v2  # noqa: E402

__all__ = ["models", "torchvision", "v2"]
