"""A message's tail: where it is, that it is the same bytes as ever, and that nothing else passes for it."""

import hashlib
from typing import Annotated, Any, ClassVar

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from hanse_common import wire
from hanse_common.errors import WireError
from hanse_common.messages import DeclineCode, Declined, Start
from hanse_common.secagg.messages import Upload
from hanse_common.session import Answer, Ask, BlockReport, Challenge, ReportCode
from hanse_common.wire import Message

WORK: dict[str, Any] = {"plan_digest": bytes(range(32)), "round": 3, "attempt": 70000}
WORK_HEX = (
    "ab706c616e5f646967657374c420000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"
    "a5726f756e6403a7617474656d7074ce00011170"
)


class Parcel(Message):
    kind: ClassVar[int] = 103
    tail: ClassVar[str | None] = "body"

    name: Annotated[bytes, Field(max_length=64)]
    count: Annotated[int, Field(ge=0, lt=1 << 63)]
    body: Annotated[bytes, Field(max_length=1 << 17)]


class Whole(Message):
    """The same without a tail: what every message was before there were tails."""

    kind: ClassVar[int] = 103

    name: Annotated[bytes, Field(max_length=64)]
    count: Annotated[int, Field(ge=0, lt=1 << 63)]
    body: Annotated[bytes, Field(max_length=1 << 17)]


class Note(Message):
    kind: ClassVar[int] = 104

    text: str


SIZES = st.one_of(
    st.integers(0, 300), st.sampled_from([0xFF, 0x100, 0xFFFF, 0x10000, (1 << 17) - 1, 1 << 17])
)
# A name may look like the beginning of the tail.
NAMES = st.one_of(
    st.binary(max_size=64), st.sampled_from([b"\xa4body\xc4\x00", b"\xa4body\xc6\0\0\0\x40", b"body"])
)
PARCELS = st.builds(
    lambda name, count, size, fill: Parcel(name=name, count=count, body=bytes([fill]) * size),
    NAMES, st.integers(0, (1 << 63) - 1), SIZES, st.integers(0, 255),
)  # fmt: skip
BOUND = 1 << 20


# -- the same bytes as before --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (Ask(trip=1, payload=b""), "93010c82a47472697001a77061796c6f6164c400"),
        (Ask(trip=300, payload=b"question"), "93010c82a474726970cd012ca77061796c6f6164c4087175657374696f6e"),
        (Answer(trip=7, payload=b"answer"), "93010d82a47472697007a77061796c6f6164c406616e73776572"),
        (Start(**WORK, model=b"\0\0\x80?" * 2), f"93010584{WORK_HEX}a56d6f64656cc4080000803f0000803f"),
        (
            Upload(**WORK, vector=bytes(range(16))),
            f"93010684{WORK_HEX}a6766563746f72c410000102030405060708090a0b0c0d0e0f",
        ),
        (
            Declined(**WORK, code=DeclineCode.BUDGET),
            f"93010485{WORK_HEX}a4636f6465a6627564676574a763756c70726974c400",
        ),
        (
            BlockReport(block=bytes(16), code=ReportCode.DONE, epsilon=0.5, nonce=b"n" * 16),
            "93010984a5626c6f636bc410"
            + "00" * 16
            + "a4636f6465a4646f6e65a7657073696c6f6ecb3fe0000000000000a56e6f6e6365c410"
            + "6e" * 16,
        ),
        (Challenge(nonce=b"c" * 32), "93010a81a56e6f6e6365c420" + "63" * 32),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Message) else "",
)
def test_messages_have_the_bytes_that_they_had_before_there_were_tails(
    message: Message, expected: str
) -> None:
    assert wire.encode(message).hex() == expected
    assert wire.decode(type(message), bytes.fromhex(expected)) == message


@pytest.mark.parametrize(
    ("message", "size", "expected"),
    [
        (Answer(trip=1, payload=bytes(255)), 275, "5a1219660bb04654f3a9e6ee1096f1ab"),
        (Answer(trip=1, payload=bytes(256)), 277, "c3fefc07103f88c294f5c272c9da08a7"),
        (Answer(trip=1, payload=bytes(65535)), 65556, "25b34844555da893593cd466ed82bf5a"),
        (Answer(trip=1, payload=bytes(65536)), 65559, "c6f113fdf659d5da61a0d6b23d53faa3"),
        (Upload(**WORK, vector=bytes(400_000)), 400_082, "6946a5eb98c01afa102f3c18a04f2fdd"),
    ],
    ids=["bin 8", "bin 16", "the longest of bin 16", "bin 32", "an upload"],
)  # fmt: skip
def test_so_have_long_ones(message: Message, size: int, expected: str) -> None:
    assert len(wire.encode(message)) == size
    assert hashlib.sha256(wire.encode(message)).hexdigest()[:32] == expected
    assert wire.digest(message).hex()[:32] == expected


@given(PARCELS)
def test_a_tail_changes_nothing_of_the_encoding(parcel: Parcel) -> None:
    whole = Whole(**parcel.model_dump())
    assert wire.encode(parcel) == wire.encode(whole)
    assert wire.head(parcel, len(parcel.body)) + parcel.body == wire.encode(whole)
    assert wire.decode(Parcel, wire.encode(whole), BOUND) == parcel


# -- decoding ------------------------------------------------------------------------------------------------------


@given(PARCELS, st.sampled_from([bytes, bytearray, memoryview]))
def test_decoding_with_the_tail_apart_gives_the_same_message(parcel: Parcel, container: Any) -> None:
    data = container(wire.encode(parcel))
    message, tail = wire.decode_tailed((Parcel, Note), data, BOUND)
    assert message == parcel.model_copy(update={"body": b""})
    assert tail == parcel.body
    assert wire.decode(Parcel, data, BOUND) == parcel
    assert type(wire.decode(Parcel, data, BOUND).body) is bytes


def test_the_tail_is_a_view_and_no_copy() -> None:
    data = bytearray(wire.encode(Parcel(name=b"", count=1, body=b"before")))
    _, tail = wire.decode_tailed((Parcel,), data)
    data[-6:] = b"after!"
    assert tail == b"after!"


def test_a_message_without_a_tail_has_an_empty_one() -> None:
    message, tail = wire.decode_tailed((Parcel, Note), wire.encode(Note(text="x")))
    assert message == Note(text="x")
    assert tail == b""


def accepted(data: bytes, model: type[Message]) -> bool:
    try:
        wire.decode_tailed((model,), data, BOUND)
    except WireError:
        return False
    return True


@given(PARCELS, st.data())
def test_what_is_refused_of_the_whole_is_refused_of_the_parts(parcel: Parcel, data: st.DataObject) -> None:
    """The decoder that knows no tails is the oracle."""
    encoded = bytearray(wire.encode(parcel))
    head = len(encoded) - len(parcel.body)
    match data.draw(st.sampled_from(["change", "cut", "add", "insert"])):
        case "change":
            encoded[data.draw(st.integers(0, head - 1))] = data.draw(st.integers(0, 255))
        case "cut":
            del encoded[data.draw(st.integers(0, len(encoded) - 1)) :]
        case "add":
            encoded += data.draw(st.binary(min_size=1, max_size=5))
        case _:
            at = data.draw(st.integers(0, head))
            encoded[at:at] = data.draw(st.binary(min_size=1, max_size=5))
    assert accepted(bytes(encoded), Parcel) == accepted(bytes(encoded), Whole)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused_alike(data: bytes) -> None:
    assert not accepted(data, Parcel)


def raw(*fields: tuple[str, Any], header: bytes = b"\x93\x01\x67") -> bytes:
    packer = msgpack.Packer()
    return header + packer.pack_map_header(len(fields)) + b"".join(
        packer.pack(name) + (value if isinstance(value, _Raw) else packer.pack(value)) for name, value in fields
    )  # fmt: skip


class _Raw(bytes):
    pass


FIELDS = (("name", b"n"), ("count", 1))


@pytest.mark.parametrize(
    "data",
    [
        raw(*FIELDS, ("body", _Raw(b"\xc5\x00\x03abc"))),
        raw(*FIELDS, ("body", _Raw(b"\xc6\x00\x00\x00\x03abc"))),
        raw(*FIELDS, ("body", _Raw(b"\xc4\x04abc"))),
        raw(*FIELDS, ("body", _Raw(b"\xc4\x02abc"))),
        raw(*FIELDS, ("body", "abc")),
        raw(*FIELDS, ("body", [b"abc"])),
        raw(*FIELDS, ("corpse", b"abc")),
        raw(*FIELDS, ("body", b"abc"), ("body", b"abc")),
        raw(FIELDS[1], FIELDS[0], ("body", b"abc")),
        raw(("body", b"abc"), *FIELDS),
        raw(("name", b"n"), ("body", b"abc")),
        raw(*FIELDS),
        raw(),
        raw(*FIELDS, ("body", b"abc"), header=b"\x93\x02\x67"),
        raw(*FIELDS, ("body", b"abc"), header=b"\x94\x01\x67"),
        raw(*FIELDS, ("body", b"abc"), header=b"\x93\x01\xcc\x67"),
        raw(*FIELDS, ("body", b"abc"), header=b"\x93\x01\x68"),
        raw(*FIELDS, ("body", _Raw(b"\xc6" + (1 << 20).to_bytes(4, "big")))),
        raw(*FIELDS, ("body", b"x" * ((1 << 17) + 1))),
        raw(("name", b"n" * 65), ("count", 1), ("body", b"abc")),
        b"\x93\x01\x67\xdf\xff\xff\xff\xff",
        b"\x93\x01" + b"\x91" * 3000,
    ],
)
def test_nothing_else_passes_for_a_tail(data: bytes) -> None:
    for model in (Parcel, Whole):
        assert not accepted(data, model)
        with pytest.raises(WireError):
            wire.decode(model, data, BOUND)


def test_a_tail_beyond_its_bound_is_named() -> None:
    data = raw(*FIELDS, ("body", b"x" * ((1 << 17) + 1)))
    with pytest.raises(
        WireError, match=f"field body: found {(1 << 17) + 1} bytes, expected at most {1 << 17}"
    ):
        wire.decode(Parcel, data, BOUND)


def test_every_tail_is_the_last_field_and_bounded() -> None:
    def tailed(base: type[Message]) -> list[type[Message]]:
        found = [model for model in base.__subclasses__() if model.__module__.startswith("hanse_")]
        return [model for model in found if model.tail] + [one for model in found for one in tailed(model)]

    models = tailed(Message)
    assert {Ask, Answer, Start, Upload} <= set(models)
    for model in models:
        assert [*model.model_fields][-1] == model.tail
        assert wire._max_tail_bytes(model) > 0


# -- how long it will be -------------------------------------------------------------------------------------------


@given(PARCELS)
def test_a_message_says_at_once_how_long_it_is(parcel: Parcel) -> None:
    data = wire.encode(parcel)
    assert wire.announced_bytes(Parcel, data[: wire.MAX_HEAD_BYTES]) == len(data)
    assert wire.announced_bytes(Parcel, data) == len(data)


@pytest.mark.parametrize(
    "data", [b"", b"\x93\x01\x68", b"\x93\x01\x67\x83", raw(*FIELDS, ("body", "text")), b"\xff" * 99]
)
def test_what_begins_otherwise_says_nothing(data: bytes) -> None:
    with pytest.raises(WireError, match="Parcel: the bytes do not begin like one"):
        wire.announced_bytes(Parcel, data)
