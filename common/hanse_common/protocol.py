"""Versions of the protocol side by side: a message is written in the earliest version that can say it.

    class Ping(Message):
        kind: ClassVar[int] = 1
        count: int
        pause: Annotated[float, Since(2)] = 0.0

    encode(Ping(count=3))              # version 1, without pause: understood by everybody
    encode(Ping(count=3, pause=0.5))   # version 2

What is new in a version is marked: a field by `Since`, a whole model by its `since`. A new field has a default, which
means what went without saying before, and is left out where it has it. So merchants of the version before take part
in whatever does not need the new one, beside merchants and a server that know it, and there is still exactly one
encoding of a value. Server and merchants know `WIRE_VERSION` and all before it.
"""

import typing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import BaseModel

WIRE_VERSION = 3
"""1: the protocol of 0.1. 2: plans of mode `evaluation`, FedProx's `proximal`, releases. 3: a recipe's loss, pooling,
averaging and erasing, a plan's `class_rates`; plans of mode `trends`."""


@dataclass(frozen=True)
class Since:
    """Marks a field, by `Annotated`, as one that versions before `version` do not have."""

    version: int


def trim(value: BaseModel, plain: dict[str, Any]) -> int:
    """Take what goes without saying out of `plain`, the dump of `value`, and return the version that the rest needs."""
    model = type(value)
    version: int = getattr(model, "since", 1)
    if not _has_news(model):
        return version
    for name, field in model.model_fields.items():
        found = getattr(value, name)
        since = next((mark.version for mark in field.metadata if isinstance(mark, Since)), 1)
        if since > 1 and found == field.default:
            del plain[name]
            continue
        version = max(version, since)
        if isinstance(found, BaseModel):
            version = max(version, trim(found, plain[name]))
        elif isinstance(found, tuple):
            for inner, dumped in zip(found, plain[name], strict=True):
                if isinstance(inner, BaseModel):
                    version = max(version, trim(inner, dumped))
    return version


def unsaid(value: BaseModel) -> dict[str, Any]:
    """Return the fields of `value` that go without saying, as pydantic's `exclude` wants them.

    For documents that are named by a digest of their JSON: what was written before a field was known keeps its name.
    """
    found: dict[str, Any] = {}
    for name, field in type(value).model_fields.items():
        inner = getattr(value, name)
        if any(isinstance(mark, Since) for mark in field.metadata) and inner == field.default:
            found[name] = True
        elif isinstance(inner, BaseModel):
            found[name] = unsaid(inner)
        elif isinstance(inner, tuple):
            inside = {index: unsaid(one) for index, one in enumerate(inner) if isinstance(one, BaseModel)}
            found[name] = {index: what for index, what in inside.items() if what}
    return {name: what for name, what in found.items() if what}


@cache
def _has_news(model: type[BaseModel]) -> bool:
    """Return whether the model, or one in it, has anything that version 1 does not have."""
    return any(
        getattr(one, "since", 1) > 1
        or any(isinstance(mark, Since) for field in one.model_fields.values() for mark in field.metadata)
        for one in _models_in(model, set())
    )


def _models_in(annotation: Any, seen: set[type[BaseModel]]) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel) and annotation not in seen:
        seen.add(annotation)
        yield annotation
        for field in annotation.model_fields.values():
            yield from _models_in(field.annotation, seen)
    for inner in typing.get_args(annotation):
        yield from _models_in(inner, seen)
