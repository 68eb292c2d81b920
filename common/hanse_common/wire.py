"""Canonical bytes for every message and signed document.

    class Ping(Message):
        kind: ClassVar[int] = 1
        count: Annotated[int, Field(ge=0, le=9)]

    data = encode(Ping(count=3))
    assert decode(Ping, data) == Ping(count=3)

A message is a frozen pydantic model. Its bytes are one MessagePack array `[version, kind, {field: value, …}]`,
fields in the order in which the class names them, integers in their shortest form, floats as 64 bits. There is
exactly one encoding of a value (0.0 and −0.0 are two): `decode` encodes what it understood again and refuses
bytes that differ, so a digest or a signature over the bytes is one over the meaning.

Bytes from outside are bounded before they are parsed (`max_bytes`), typed while they are parsed (no extension
types, no nesting deeper than the models), and validated after (pydantic, strict, no unknown fields).
"""

import hashlib
import itertools
import re
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, TypeVar

import msgpack
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hanse_common.errors import WireError

WIRE_VERSION = 1

MAX_DOCUMENT_BYTES = 1 << 20
"""Bound of a message that carries no vector, in bytes."""

MAX_ITEMS = 1024
"""Bound of the entries of one array or map: a taxonomy's classes are the most that any has."""

MAX_CONTAINERS = 1 << 14
"""Bound of the arrays and maps of one message, however they nest: a full directory has some thousands."""


class Value(BaseModel):
    """Base of what messages are made of: immutable, strictly typed, nothing unknown, nothing infinite."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Message(Value):
    """A `Value` with a kind number of its own, so that no message is ever taken for another."""

    kind: ClassVar[int]


Bytes32 = Annotated[bytes, Field(min_length=32, max_length=32)]
Digest = Bytes32
Signature = Annotated[bytes, Field(min_length=64, max_length=64)]
RoundNumber = Annotated[int, Field(ge=0, lt=1 << 31)]
NAME = re.compile(r"^[a-z0-9][a-z0-9._-]{0,62}$")
Name = Annotated[str, Field(pattern=NAME.pattern)]

M = TypeVar("M", bound=Message)


def encode(message: Message) -> bytes:
    """Return the canonical bytes of `message`."""
    data = msgpack.packb([WIRE_VERSION, message.kind, message.model_dump()], use_bin_type=True)
    return bytes(data)


def digest(message: Message) -> bytes:
    """Return the SHA-256 of the canonical bytes of `message`, 32 bytes."""
    return hashlib.sha256(encode(message)).digest()


def decode(expected: type[M], data: bytes, max_bytes: int = MAX_DOCUMENT_BYTES) -> M:
    """Return the message of type `expected` in `data`, untrusted bytes.

    Raises `WireError` when `data` is longer than `max_bytes`, not of this version and kind, not valid, or not
    in canonical form.
    """
    return decode_any((expected,), data, max_bytes)


def decode_any(expected: Sequence[type[M]], data: bytes, max_bytes: int = MAX_DOCUMENT_BYTES) -> M:
    """Return the message in `data`, untrusted bytes, which must be of one of the types `expected`.

    Raises `WireError` as `decode` does.
    """
    by_kind = {model.kind: model for model in expected}
    names = " or ".join(model.__name__ for model in by_kind.values())
    if len(data) > max_bytes:
        raise WireError(f"{names}: found {len(data)} bytes, expected at most {max_bytes}.")
    version, kind, fields = _unpack(names, data)
    if version != WIRE_VERSION:
        raise WireError(f"{names}: found wire version {version!r:.20}, expected {WIRE_VERSION}.")
    model = by_kind.get(kind) if type(kind) is int else None
    if model is None:
        raise WireError(f"{names}: found a message of kind {kind!r:.20}, expected {sorted(by_kind)}.")
    try:
        message = model.model_validate(fields)
    except ValidationError as error:
        raise WireError(f"{model.__name__}: {_first_fault(error)}") from None
    if encode(message) != data:
        raise WireError(f"{model.__name__}: not in canonical form.")
    return message


def _unpack(names: str, data: bytes) -> tuple[Any, Any, Any]:
    made = itertools.count(1)

    def bounded(container: Any) -> Any:
        if next(made) > MAX_CONTAINERS:
            raise ValueError
        return container

    try:
        parts = msgpack.unpackb(
            data,
            use_list=False,
            raw=False,
            strict_map_key=True,
            max_ext_len=0,
            # An empty map costs one byte here and a hundred in memory.
            max_array_len=MAX_ITEMS,
            max_map_len=MAX_ITEMS,
            list_hook=bounded,
            object_hook=bounded,
        )
    except (ValueError, TypeError, RecursionError, msgpack.exceptions.UnpackException):
        raise WireError(f"{names}: the bytes are not MessagePack.") from None
    if not isinstance(parts, tuple) or len(parts) != 3:
        raise WireError(f"{names}: expected an array of version, kind and fields.")
    return parts


def _first_fault(error: ValidationError) -> str:
    """Name the field and the rule, never the value: a reply must not echo what a merchant sent."""
    fault = error.errors(include_input=False, include_url=False)[0]
    field = ".".join(str(part) for part in fault["loc"]) or "fields"
    return f"field {field}: {fault['msg']} ({error.error_count()} faults in all)"
