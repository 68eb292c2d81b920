"""Canonical bytes for every message and signed document.

    class Ping(Message):
        kind: ClassVar[int] = 1
        count: Annotated[int, Field(ge=0, le=9)]

    data = encode(Ping(count=3))
    assert decode(Ping, data) == Ping(count=3)

A message is a frozen pydantic model. Its bytes are one MessagePack array `[version, kind, {field: value, …}]`: the
earliest version of the protocol that can say it (`hanse_common.protocol`), fields in the order in which the class names
them, integers in their shortest form, floats as 64 bits. There is exactly one encoding of a value (0.0 and −0.0 are
two): `decode` encodes what it understood again and refuses bytes that differ, so a digest or a signature over the bytes
is one over the meaning.

Bytes from outside are bounded before they are parsed (`max_bytes`), typed while they are parsed (no extension
types, no nesting deeper than the models), and validated after (pydantic, strict, no unknown fields).

A message's *tail* is its last field where that is bytes of any length, such as a vector: in canonical form it runs to
the message's end. `decode_tailed` leaves it where it is, so that what is large is never copied:

    class Parcel(Message):
        kind: ClassVar[int] = 2
        tail: ClassVar[str] = "body"
        body: Annotated[bytes, Field(max_length=1 << 28)]

    assert decode_tailed((Parcel,), encode(Parcel(body=b"..."))) == (Parcel(body=b""), b"...")
"""

import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Annotated, Any, ClassVar, TypeVar

import msgpack
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from hanse_common.errors import WireError, WireVersionUnknown
from hanse_common.protocol import WIRE_VERSION, trim

MAX_DOCUMENT_BYTES = 1 << 20
"""Bound of a message that carries no vector, in bytes."""

MAX_ITEMS = 1024
"""Bound of the entries of one array or map: a taxonomy's classes are the most that any has."""

MAX_CONTAINERS = 1 << 14
"""Bound of the arrays and maps of one message, however they nest: a full directory has some thousands."""

MAX_HEAD_BYTES = 1 << 12
"""Bound of what comes before a message's tail, in bytes."""

Buffer = bytes | bytearray | memoryview
"""What bytes from outside may be in: a view is of single bytes, in order."""


class Value(BaseModel):
    """Base of what messages are made of: immutable, strictly typed, nothing unknown, nothing infinite."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Message(Value):
    """A `Value` with a kind number of its own, so that no message is ever taken for another.

    `tail` is the name of its last field if that is its tail: bytes with a `max_length` and no other rule.
    """

    kind: ClassVar[int]
    tail: ClassVar[str | None] = None


Bytes32 = Annotated[bytes, Field(min_length=32, max_length=32)]
Digest = Bytes32
HexDigest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
"""A SHA-256 in hexadecimal, as `sha256sum` prints it."""

Signature = Annotated[bytes, Field(min_length=64, max_length=64)]
RoundNumber = Annotated[int, Field(ge=0, lt=1 << 31)]
NAME = re.compile(r"^[a-z0-9][a-z0-9._-]{0,62}$")
Name = Annotated[str, Field(pattern=NAME.pattern)]

FromList = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
"""Takes a list for a tuple: YAML knows lists only, a `Value` holds tuples."""

M = TypeVar("M", bound=Message)


def encode(message: Message) -> bytes:
    """Return the canonical bytes of `message`."""
    if message.tail is not None:
        tail = getattr(message, message.tail)
        return b"".join((head(message, len(tail)), tail))
    fields = message.model_dump()
    version = trim(message, fields)
    return bytes(msgpack.packb([version, message.kind, fields], use_bin_type=True))


def head(message: Message, tail_bytes: int) -> bytes:
    """Return what comes before the tail, of `tail_bytes` bytes, in the canonical bytes of `message`.

    What `message` itself has as its tail does not matter. With the tail behind it, this is the whole message.
    """
    fields: dict[str, Any] = message.model_dump(exclude={message.tail or ""})
    fields[message.tail or ""] = b""
    version = trim(message, fields)
    data = bytes(msgpack.packb([version, message.kind, fields], use_bin_type=True))
    return data[: -len(_EMPTY)] + _length(tail_bytes)


def digest(message: Message) -> bytes:
    """Return the SHA-256 of the canonical bytes of `message`, 32 bytes."""
    return hashlib.sha256(encode(message)).digest()


def decode(expected: type[M], data: Buffer, max_bytes: int = MAX_DOCUMENT_BYTES) -> M:
    """Return the message of type `expected` in `data`, untrusted bytes.

    Raises `WireError` when `data` is longer than `max_bytes`, not of this version and kind, not valid, or not
    in canonical form.
    """
    return decode_any((expected,), data, max_bytes)


def decode_any(expected: Sequence[type[M]], data: Buffer, max_bytes: int = MAX_DOCUMENT_BYTES) -> M:
    """Return the message in `data`, untrusted bytes, which must be of one of the types `expected`.

    Raises `WireError` as `decode` does.
    """
    message, tail = decode_tailed(expected, data, max_bytes)
    return message if message.tail is None else message.model_copy(update={message.tail: bytes(tail)})


def decode_tailed(
    expected: Sequence[type[M]], data: Buffer, max_bytes: int = MAX_DOCUMENT_BYTES
) -> tuple[M, memoryview]:
    """Return the message in `data`, of one of the types `expected`, with an empty tail, and its tail as a view.

    The view is of `data` itself and empty for a message without a tail. Raises `WireError` as `decode` does.
    """
    by_kind = {model.kind: model for model in expected}
    names = " or ".join(model.__name__ for model in by_kind.values())
    if len(data) > max_bytes:
        raise WireError(f"{names}: found {len(data)} bytes, expected at most {max_bytes}.")
    view = memoryview(data)
    head_, tail = _split(view, by_kind)
    version, kind, fields = _unpack(names, head_)
    if type(version) is int and version > WIRE_VERSION:
        raise WireVersionUnknown(
            f"{names}: found version {version!r:.20} of the protocol, expected at most {WIRE_VERSION}; it takes a "
            "later release of Hanse to read it."
        )
    if type(version) is not int or version < 1:
        raise WireError(
            f"{names}: found version {version!r:.20} of the protocol, expected 1 to {WIRE_VERSION}."
        )
    model = by_kind.get(kind) if type(kind) is int else None
    if model is None:
        raise WireError(f"{names}: found a message of kind {kind!r:.20}, expected {sorted(by_kind)}.")
    try:
        message = model.model_validate(fields)
    except ValidationError as error:
        raise WireError(f"{model.__name__}: {_first_fault(error)}") from None
    if encode(message) != head_:
        raise WireError(f"{model.__name__}: not in canonical form.")
    if model.tail is None:
        return message, view[:0]
    if tail is None:
        raise WireError(f"{model.__name__}: found over {MAX_HEAD_BYTES} bytes before field {model.tail}.")
    if len(tail) > _max_tail_bytes(model):
        raise WireError(
            f"{model.__name__}: field {model.tail}: found {len(tail)} bytes, expected at most {_max_tail_bytes(model)}."
        )
    return message, tail


def announced_bytes(expected: type[Message], beginning: Buffer) -> int:
    """Return how many bytes the message of type `expected`, which has a tail, has by its own word.

    `beginning` is untrusted and holds the message's first bytes, `MAX_HEAD_BYTES` of them or all. Raises `WireError`
    when it is no beginning of such a message.
    """
    found = _find_tail(memoryview(beginning), {expected.kind: expected})
    if found is None:
        raise WireError(f"{expected.__name__}: the bytes do not begin like one.")
    _, begins, length = found
    return begins + length


_EMPTY = b"\xc4\x00"
"""An empty tail."""


def _length(count: int) -> bytes:
    """Return MessagePack's shortest header of `count` bytes (bin 8, bin 16, bin 32)."""
    for sign, size in ((b"\xc4", 1), (b"\xc5", 2)):
        if count < 1 << 8 * size:
            return sign + count.to_bytes(size, "big")
    return b"\xc6" + count.to_bytes(4, "big")


def _split(view: memoryview, by_kind: Mapping[int, type[Message]]) -> tuple[Buffer, memoryview | None]:
    """Return the message without its tail, and the tail.

    Where the tail is not at once found, in canonical form and of just the length that is left, all of `view` is
    returned and None, so that the usual checks say what is wrong.
    """
    found = _find_tail(view, by_kind)
    if found is None:
        return view, None
    ends, begins, length = found
    if length != len(view) - begins or view[ends:begins] != _length(length):
        return view, None
    return bytes(view[:ends]) + _EMPTY, view[begins:]


def _find_tail(view: memoryview, by_kind: Mapping[int, type[Message]]) -> tuple[int, int, int] | None:
    """Return where the tail's header and the tail begin in `view`, and the tail's length by its header.

    Returns None where there is no message that has a tail. Nothing is believed of the bytes: whoever uses what is
    returned parses and checks what is before the tail.
    """
    unpacker = msgpack.Unpacker(max_buffer_size=MAX_HEAD_BYTES, max_ext_len=0)
    unpacker.feed(view[:MAX_HEAD_BYTES])
    try:
        if unpacker.read_array_header() != 3:
            return None
        unpacker.skip()
        kind = unpacker.unpack()
        model = by_kind.get(kind) if type(kind) is int else None
        if model is None or model.tail is None:
            return None
        for _ in range(2 * unpacker.read_map_header() - 1):
            unpacker.skip()
    except (ValueError, TypeError, RecursionError, msgpack.exceptions.UnpackException):
        return None
    header = unpacker.tell()
    size = {0xC4: 1, 0xC5: 2, 0xC6: 4}.get(view[header] if header < len(view) else 0)
    if size is None or header + 1 + size > len(view):
        return None
    begins = header + 1 + size
    return header, begins, int.from_bytes(view[header + 1 : begins], "big")


@cache
def _max_tail_bytes(model: type[Message]) -> int:
    """Return the `max_length` of the model's tail."""
    rules = model.model_fields[model.tail or ""].metadata
    return next(int(rule.max_length) for rule in rules if hasattr(rule, "max_length"))


def _unpack(names: str, data: Buffer) -> tuple[Any, Any, Any]:
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
