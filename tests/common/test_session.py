"""What merchant and server say around the rounds: hellos that hold for one stream, frames, bounded records."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from hanse_common import session, signing, wire
from hanse_common.charter import (
    MAX_CHARTER_BYTES,
    MAX_CHARTERS,
    MAX_HOLDERS,
    HolderSignature,
    SignedCharter,
)
from hanse_common.directory import MAX_DIRECTORY_BYTES, SignedDirectory
from hanse_common.errors import SignatureInvalid, WireError
from hanse_common.messages import Invitation, Start
from hanse_common.plan import MAX_PLAN_BYTES, Plan, SignedPlan
from hanse_common.secagg.messages import MAX_SETUP_BYTES, Upload
from hanse_common.secagg.suite import MAX_SETUP_ROUNDS
from hanse_common.session import (
    FRAME_BYTES,
    MAX_HELLO_BYTES,
    Answer,
    Ask,
    Assignment,
    BlockReport,
    Challenge,
    Hello,
    RecordReader,
    ReportCode,
    frames,
    record_bytes,
)

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OTHER = Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))
NONCE, CERTIFICATE, BLOCK = b"n" * 32, b"c" * 32, b"b" * 16


def hello(key: Ed25519PrivateKey = KEY) -> Hello:
    return Hello.sign(key, NONCE, CERTIFICATE, BLOCK)


# -- hellos -------------------------------------------------------------------------------------------------------


def test_a_hello_says_who_is_there() -> None:
    hello().verify(NONCE, CERTIFICATE)
    assert hello().identity == signing.public_bytes(KEY)
    assert wire.decode(Hello, wire.encode(hello()), MAX_HELLO_BYTES) == hello()


@given(
    st.sampled_from(["nonce", "certificate", "block", "identity", "signature"]), st.integers(0, 8 * 16 - 1)
)
def test_a_hello_with_any_bit_changed_does_not_verify(part: str, bit: int) -> None:
    genuine = hello()
    parts: dict[str, Any] = genuine.model_dump() | {"nonce": NONCE, "certificate": CERTIFICATE}
    changed = bytearray(parts[part])
    changed[bit // 8] ^= 1 << bit % 8
    parts[part] = bytes(changed)
    nonce, certificate = parts.pop("nonce"), parts.pop("certificate")
    with pytest.raises(SignatureInvalid):
        Hello(**parts).verify(nonce, certificate)


def test_nonce_and_certificate_are_not_one_for_the_other() -> None:
    with pytest.raises(SignatureInvalid):
        hello().verify(CERTIFICATE, NONCE)


def test_a_hello_in_anothers_name_does_not_verify() -> None:
    with pytest.raises(SignatureInvalid):
        hello(OTHER).model_copy(update={"identity": signing.public_bytes(KEY)}).verify(NONCE, CERTIFICATE)


def test_the_identity_is_in_what_is_signed() -> None:
    """Ed25519 does not bind a signature to one key in every case; the statement does."""
    statement = session._Statement(
        nonce=NONCE, certificate=CERTIFICATE, block=BLOCK, identity=signing.public_bytes(KEY)
    )
    signing.verify(signing.public_bytes(KEY), "hello", wire.encode(statement), hello().signature)


def test_a_signature_made_for_something_else_is_no_hello() -> None:
    statement = session._Statement(
        nonce=NONCE, certificate=CERTIFICATE, block=BLOCK, identity=signing.public_bytes(KEY)
    )
    for domain in ("plan", "", "hello "):
        signature = signing.sign(KEY, domain, wire.encode(statement))
        with pytest.raises(SignatureInvalid):
            hello().model_copy(update={"signature": signature}).verify(NONCE, CERTIFICATE)


def test_before_a_merchant_is_known_records_fit_their_bound() -> None:
    assert len(wire.encode(hello())) <= MAX_HELLO_BYTES
    assert len(wire.encode(Challenge(nonce=NONCE))) <= MAX_HELLO_BYTES


# -- frames -------------------------------------------------------------------------------------------------------


@contextmanager
def frames_of(size: int) -> Iterator[None]:
    """Frames of `size` bytes, so that records of many frames are short enough to try many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "FRAME_BYTES", size)
        yield


@given(st.lists(st.binary(max_size=100), min_size=1, max_size=4), st.integers(2, 40))
def test_records_are_put_together_again(records: list[bytes], size: int) -> None:
    with frames_of(size):
        reader = RecordReader(100)
        found = []
        for record in records:
            for frame in frames(record):
                assert 1 <= len(frame) <= size
                found.append(reader.add(frame))
            assert found[-1] == record
        assert [record for record in found if record is not None] == records


@given(st.binary(max_size=200), st.integers(2, 40), st.integers(0, 200))
def test_a_reader_never_holds_more_than_its_bound(record: bytes, size: int, bound: int) -> None:
    with frames_of(size):
        reader = RecordReader(bound)
        try:
            found = [reader.add(frame) for frame in frames(record)][-1]
        except WireError as error:
            assert len(record) > bound
            assert f"over {bound} bytes" in str(error)
        else:
            assert found == record
            assert len(record) <= bound
        assert len(reader.received) <= bound


@given(st.lists(st.binary(max_size=60), max_size=5), st.integers(2, 40))
def test_pieces_make_the_frames_of_the_whole(pieces: list[bytes], size: int) -> None:
    with frames_of(size):
        views = [memoryview(bytearray(piece)) for piece in pieces]
        assert list(frames(*views)) == list(frames(b"".join(pieces)))


@given(st.binary(min_size=1, max_size=200), st.integers(2, 40), st.integers(0, 250))
def test_a_record_that_is_expected_ends_at_a_word_and_within_its_bound(
    record: bytes, size: int, expected: int
) -> None:
    with frames_of(size):
        first, *others = frames(record)
        reader = RecordReader(220)
        found = reader.add(first)
        if found is not None:
            return
        try:
            reader.expect(expected)
            for frame in others:
                found = reader.add(frame)
        except WireError:
            assert expected < len(record) or expected > 220
            return
        assert found == record
        if len(record) == expected:
            begin = np.frombuffer(found, dtype=np.uint8).ctypes.data
            assert (begin + len(record)) % 4 == 0
        for frame in frames(bytes(220)):  # the next one is bounded as ever
            found = reader.add(frame)
        assert found == bytes(220)


def test_a_record_cannot_be_changed_by_who_gets_it() -> None:
    reader = RecordReader(1 << 20)
    small, large = reader.add(b"\0small"), None
    for frame in frames(bytes(2 * FRAME_BYTES)):
        large = reader.add(frame)
    assert small is not None and small.readonly
    assert large is not None and large.readonly


def test_the_bound_is_of_each_record_and_not_of_all_together() -> None:
    reader = RecordReader(10)
    for _ in range(5):
        assert reader.add(b"\0" + bytes(10)) == bytes(10)


@given(st.lists(st.binary(max_size=50), max_size=20), st.integers(2, 40))
def test_any_frames_are_records_or_refused(pieces: list[bytes], size: int) -> None:
    with frames_of(size):
        reader = RecordReader(60)
        for piece in pieces:
            try:
                record = reader.add(piece)
            except WireError:
                return
            assert record is None or len(record) <= 60


def test_a_record_of_a_real_frame_and_a_byte_takes_two() -> None:
    assert [len(frame) for frame in frames(bytes(FRAME_BYTES - 1))] == [FRAME_BYTES]
    assert [len(frame) for frame in frames(bytes(FRAME_BYTES))] == [FRAME_BYTES, 2]
    assert list(frames(b"")) == [b"\0"]


@pytest.mark.parametrize("frame", [b"", b"\2x", b"x", b"\1short", b"\1", b"\0" + bytes(FRAME_BYTES)])
def test_what_is_no_frame_is_refused(frame: bytes) -> None:
    with pytest.raises(WireError, match="A stream's frame"):
        RecordReader(1 << 30).add(frame)


# -- messages -----------------------------------------------------------------------------------------------------


MESSAGES = st.one_of(
    st.builds(Ask, trip=st.integers(1, (1 << 31) - 1), payload=st.binary(max_size=50)),
    st.builds(Answer, trip=st.integers(1, (1 << 31) - 1), payload=st.binary(max_size=50)),
    st.builds(Challenge, nonce=st.binary(min_size=32, max_size=32)),
    st.builds(
        BlockReport,
        block=st.binary(min_size=16, max_size=16),
        code=st.sampled_from(ReportCode),
        nonce=st.binary(min_size=16, max_size=16),
    ),
)


@given(MESSAGES)
def test_messages_are_what_their_bytes_say(message: wire.Message) -> None:
    assert wire.decode(type(message), wire.encode(message)) == message


def kinds(base: type[wire.Message]) -> Iterator[int]:
    """Yield the kind of each message that a package of ours defines."""
    for model in base.__subclasses__():
        if model.__module__.startswith("hanse_") and "kind" in vars(model):
            yield model.kind
        yield from kinds(model)


def test_no_message_is_taken_for_another() -> None:
    found = list(kinds(wire.Message))
    assert {Ask.kind, Invitation.kind, Upload.kind, SignedDirectory.kind} <= set(found)
    assert len(set(found)) == len(found)


def assignment(**changes: Any) -> Assignment:
    fields: dict[str, Any] = {
        "block": BLOCK,
        "signed_plan": SignedPlan(plan=b"", signature=bytes(64)),
        "rounds": 1,
        "aggregator": "localhost:9093",
    }
    return Assignment(**(fields | changes))


@pytest.mark.parametrize(
    "address", ["localhost:1", "192.0.2.7:9093", "[2001:db8::1]:443", "a-b.example:65535"]
)
def test_addresses(address: str) -> None:
    assert wire.decode(Assignment, wire.encode(assignment(aggregator=address))).aggregator == address


@pytest.mark.parametrize(
    "changes",
    [
        {"aggregator": "localhost"},
        {"aggregator": "localhost:0"},
        {"aggregator": "localhost:123456"},
        {"aggregator": "http://localhost:1"},
        {"aggregator": "unix:/run/x:1"},
        {"aggregator": "localhost:1\n"},
        {"aggregator": "local host:1"},
        {"aggregator": "x" * 254 + ":1"},
        {"aggregator": ":1"},
        {"rounds": 0},
        {"rounds": MAX_SETUP_ROUNDS + 1},
        {"rounds": True},
        {"block": bytes(15)},
        {"block": bytes(17)},
    ],
)
def test_what_is_no_assignment(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        assignment(**changes)


@pytest.mark.parametrize("trip", [0, -1, 1 << 31])
def test_trips_are_bounded(trip: int) -> None:
    for kind in (Ask, Answer):
        with pytest.raises(ValidationError):
            kind(trip=trip, payload=b"")


def test_reports_are_codes_and_no_two_are_alike() -> None:
    """Flower keeps equal objects once, and drops what several merchants send at the same time."""
    one, other = (BlockReport(block=BLOCK, code=ReportCode.DONE) for _ in range(2))
    assert wire.encode(one) != wire.encode(other)
    with pytest.raises(ValidationError):
        BlockReport(block=BLOCK, code="a sentence about photos")  # type: ignore[arg-type]
    with pytest.raises(ValidationError):
        BlockReport(block=BLOCK, code=ReportCode.DONE, text="x")  # type: ignore[call-arg]


def test_a_blocks_records_hold_its_messages_and_little_more(make_plan: Callable[..., Plan]) -> None:
    plan = make_plan()
    work = {"plan_digest": plan.digest, "round": 0, "attempt": 0}
    vector = bytes(4 * plan.dimension)
    largest = Invitation(
        **work,  # type: ignore[arg-type]
        rounds=MAX_SETUP_ROUNDS,
        signed_plan=SignedPlan(plan=bytes(MAX_PLAN_BYTES), signature=bytes(64)),
        signed_directory=SignedDirectory(
            charters=(
                SignedCharter(
                    charter=bytes(MAX_CHARTER_BYTES),
                    signatures=(HolderSignature(holder=bytes(32), signature=bytes(64)),) * 2 * MAX_HOLDERS,
                ),
            )
            * MAX_CHARTERS,
            directory=bytes(MAX_DIRECTORY_BYTES),
            signatures=(HolderSignature(holder=bytes(32), signature=bytes(64)),) * 2 * MAX_HOLDERS,
        ),
    )
    bound = record_bytes(plan.dimension)
    for message in (largest, Start(**work, model=vector), Upload(**work, vector=vector)):  # type: ignore[arg-type]
        for kind in (Ask, Answer):
            assert len(wire.encode(kind(trip=(1 << 31) - 1, payload=wire.encode(message)))) <= bound
    assert bound <= len(vector) + MAX_SETUP_BYTES + (2 << 20)
