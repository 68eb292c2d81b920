"""The canonical encoding: one for each value, bounded, strict."""

from typing import Annotated, ClassVar

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, TypeAdapter, ValidationError

from hanse_common import wire
from hanse_common.errors import WireError
from hanse_common.wire import Bytes32, Digest, Message, Name, Signature, Value


class Part(Value):
    name: str
    ratio: float


class Letter(Message):
    kind: ClassVar[int] = 101

    count: Annotated[int, Field(ge=0, lt=1 << 63)]
    parts: Annotated[tuple[Part, ...], Field(max_length=5)] = ()
    body: Annotated[bytes, Field(max_length=64)] = b""
    note: str | None = None


class Other(Message):
    kind: ClassVar[int] = 102

    count: int


parts = st.builds(Part, name=st.text(max_size=8), ratio=st.floats(allow_nan=False, allow_infinity=False))
letters = st.builds(
    Letter,
    count=st.integers(0, (1 << 63) - 1),
    parts=st.lists(parts, max_size=5).map(tuple),
    body=st.binary(max_size=64),
    note=st.none() | st.text(max_size=8),
)


def raw(kind: object = 101, version: object = 1, **fields: object) -> bytes:
    return msgpack.packb([version, kind, {"count": 1, "parts": [], "body": b"", "note": None} | fields])


@given(letters)
def test_what_is_encoded_decodes_to_the_same_value_and_bytes(letter: Letter) -> None:
    data = wire.encode(letter)
    again = wire.decode(Letter, data)
    assert again == letter
    assert wire.encode(again) == data


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused_with_one_error_class(data: bytes) -> None:
    with pytest.raises(WireError):
        wire.decode(Letter, data)


@given(letters, st.data())
def test_a_changed_byte_never_gives_the_same_value(letter: Letter, data: st.DataObject) -> None:
    encoded = bytearray(wire.encode(letter))
    position = data.draw(st.integers(0, len(encoded) - 1))
    encoded[position] ^= data.draw(st.integers(1, 255))
    try:
        changed = wire.decode(Letter, bytes(encoded))
    except WireError:
        return
    assert wire.encode(changed) == bytes(encoded)
    assert wire.encode(changed) != wire.encode(letter)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (raw(version=99), "version 99 of the protocol"),
        (raw(version=2), "canonical"),
        (raw(kind=102), "kind 102"),
        (raw(kind="x"), "kind"),
        (raw(kind=True), "kind"),
        (raw(extra=1), "extra"),
        (raw(count="1"), "count"),
        (raw(count=-1), "count"),
        (raw(count=1.0), "count"),
        (raw(parts=[{"name": "a", "ratio": float("nan")}]), "ratio"),
        (raw(parts=[{"name": "a", "ratio": float("inf")}]), "ratio"),
        (raw(parts=[{"name": "a", "ratio": 0.5}] * 6), "parts"),
        (raw(body=bytes(65)), "body"),
        (msgpack.packb([1, 101]), "array of version"),
        (msgpack.packb({"count": 1}), "array of version"),
        (b"", "not MessagePack"),
        (b"\x93\x01\x65", "not MessagePack"),
        (raw() + b"\x00", "not MessagePack"),
        (b"\xdd\xff\xff\xff\xff", "not MessagePack"),
        (b"\x91" * 100_000, "not MessagePack"),
        (b"\xd4\x01\x00", "not MessagePack"),
    ],
)
def test_malformed_messages_are_refused_by_name(data: bytes, reason: str) -> None:
    with pytest.raises(WireError, match=reason):
        wire.decode(Letter, data)


@pytest.mark.parametrize(
    "data",
    [
        msgpack.packb([1, 101, {"parts": [], "count": 1, "body": b"", "note": None}]),  # another order
        b"\x93\x01\xcc\x65" + raw()[3:],  # the kind in two bytes, where one would do
        msgpack.packb([1, 101, {"count": 1}]),  # defaults left out
        raw(parts=[{"name": "a", "ratio": 1}]),  # an integer for a float
    ],
)
def test_a_second_encoding_of_a_value_is_refused(data: bytes) -> None:
    with pytest.raises(WireError, match="canonical"):
        wire.decode(Letter, data)


def test_a_duplicate_field_is_refused() -> None:
    fields = {"count": 1, "parts": [], "body": b"", "note": None}
    packer = msgpack.Packer()
    data = b"\x93\x01\x65" + packer.pack_map_header(5) + packer.pack("count") + packer.pack(2)
    data += b"".join(packer.pack(key) + packer.pack(value) for key, value in fields.items())
    with pytest.raises(WireError, match="canonical"):
        wire.decode(Letter, data)


def test_oversized_bytes_are_refused_unparsed() -> None:
    with pytest.raises(WireError, match="at most 10"):
        wire.decode(Letter, wire.encode(Letter(count=1)), max_bytes=10)


def test_an_error_never_echoes_the_value() -> None:
    with pytest.raises(WireError) as caught:
        wire.decode(Letter, raw(count="secret shelf"))
    assert "secret" not in str(caught.value)


def test_decode_any_tells_types_apart() -> None:
    for message in (Letter(count=3), Other(count=3)):
        assert wire.decode_any((Letter, Other), wire.encode(message)) == message


def test_digest_is_the_sha256_of_the_bytes() -> None:
    assert wire.digest(Other(count=1)) != wire.digest(Other(count=2))
    assert len(wire.digest(Other(count=1))) == 32


@pytest.mark.parametrize("item", [b"\x80", b"\xc0", b"\x90"])
def test_a_small_bomb_of_many_small_items_is_refused_unbuilt(item: bytes) -> None:
    """A megabyte of empty maps would take a hundred in memory."""
    count = 1_000_000
    with pytest.raises(WireError, match="not MessagePack"):
        wire.decode(Letter, b"\xdd" + count.to_bytes(4, "big") + item * count, 1 << 28)


def test_a_kind_that_is_no_number_is_refused_without_being_looked_up() -> None:
    with pytest.raises(WireError, match="kind"):
        wire.decode(Letter, raw(kind={}))


def test_a_map_of_too_many_entries_is_refused_unbuilt() -> None:
    entries = b"".join(msgpack.packb(str(i)) + b"\x80" for i in range(wire.MAX_ITEMS + 1))
    with pytest.raises(WireError, match="not MessagePack"):
        wire.decode(Letter, b"\xdf" + (wire.MAX_ITEMS + 1).to_bytes(4, "big") + entries)


def test_a_message_of_just_the_bound_is_taken() -> None:
    data = wire.encode(Letter(count=1))
    assert wire.decode(Letter, data, max_bytes=len(data)) == Letter(count=1)


@pytest.mark.parametrize("name", ["a", "0", "alder", "a.b-c_d", "a" * 63])
def test_names_that_are_names(name: str) -> None:
    assert TypeAdapter(Name).validate_python(name) == name


@pytest.mark.parametrize("name", ["", "A", "-a", ".a", "a b", "a/b", "a\n", "\na", "ä", "a" * 64, "a\0"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(Name).validate_python(name)


@pytest.mark.parametrize(("kind", "size"), [(Bytes32, 32), (Digest, 32), (Signature, 64)])
def test_bytes_of_one_length(kind: type[bytes], size: int) -> None:
    assert TypeAdapter(kind).validate_python(bytes(size)) == bytes(size)
    for wrong in (0, size - 1, size + 1):
        with pytest.raises(ValidationError):
            TypeAdapter(kind).validate_python(bytes(wrong))
