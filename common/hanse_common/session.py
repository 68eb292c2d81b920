"""What a merchant and the server say to each other around the rounds: which block, who is there, what is next.

    over Flower       server: Assignment                       merchant: BlockReport, when the block is done
    over the stream   server: Challenge                        merchant: Hello
                      server: Ask (trip 1), Ask (trip 2), …    merchant: Answer to each, in order

A block is some rounds in a row. For each, a merchant opens one gRPC stream to `METHOD` of the aggregator at the
assignment's address and proves who it is: `Hello` is signed with its directory identity over the server's fresh
nonce, the fingerprint of the certificate that it sees and the block, so that a hello can neither be replayed nor
passed on. What an `Ask` and its `Answer` carry are the messages of `hanse_common.messages`, as bytes.

On the stream a record is one message of this module in `wire`'s form, cut into frames, so that neither end ever
holds more than a frame that it did not ask for.

    the other stream  server: Challenge                        merchant: Hello, with `NO_BLOCK`
                      server: Latest                           merchant: Fetch
                      server: a file's bytes, as one record    merchant: Fetch, with the file's digest

By the other stream, to `RELEASE_METHOD` of the same aggregator, a merchant fetches the league's released recognizer
(`hanse_common.release`), whether or not a block is open. It ends when the merchant has said all it wants to say.

A stream of a block that is lost is opened again with the same block. The server then asks its open question again,
byte by byte the same, under the same trip number; the merchant answers with the same bytes as before. Trip numbers
only grow. A block ends when the server ends the stream with status OK.
"""

import mmap
import os
from collections.abc import Iterator
from contextlib import suppress
from enum import StrEnum
from typing import Annotated, ClassVar, Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import Field

from hanse_common import signing, wire
from hanse_common.errors import WireError
from hanse_common.messages import MAX_MESSAGE_BYTES
from hanse_common.plan import SignedPlan
from hanse_common.release import SignedRelease
from hanse_common.secagg.messages import MAX_SETUP_BYTES
from hanse_common.secagg.suite import MAX_SETUP_ROUNDS
from hanse_common.wire import MAX_DOCUMENT_BYTES, Buffer, Bytes32, Digest, Message, Signature

METHOD = "/hanse.Aggregator/Block"
"""The gRPC method, a bidirectional stream of frames."""

RELEASE_METHOD = "/hanse.Aggregator/Release"
"""The method by which released recognizers are fetched, a bidirectional stream of frames, too."""

NO_BLOCK = bytes(16)
"""What a hello on a release's stream has as its block. No block is ever called so: such a hello opens none."""

FRAME_BYTES = 1 << 18
"""Bound of one frame: a byte that says whether the record goes on (1) or ends (0), then a piece of the record."""

MAX_HELLO_BYTES = 1 << 10
"""Bound of the records before a merchant is known, in bytes."""

BlockId = Annotated[bytes, Field(min_length=16, max_length=16)]
Address = Annotated[str, Field(pattern=r"^(\[[0-9a-fA-F:.]{2,45}\]|[A-Za-z0-9.-]{1,253}):[1-9][0-9]{0,4}$")]
Trip = Annotated[int, Field(ge=1, lt=1 << 31)]


def record_bytes(dimension: int) -> int:
    """Return the bound, in bytes, of a record in a block whose longest vector has `dimension` numbers."""
    return 4 * dimension + MAX_SETUP_BYTES + 2 * MAX_DOCUMENT_BYTES


def frames(*pieces: Buffer) -> Iterator[bytes]:
    """Yield the record that `pieces` are, one after the other, as frames of at most `FRAME_BYTES` bytes."""
    views = [memoryview(piece) for piece in pieces if len(piece)]
    left = sum(map(len, views))
    while True:
        parts: list[Buffer] = [b"\0" if left < FRAME_BYTES else b"\1"]
        room = min(left, FRAME_BYTES - 1)
        left -= room
        while room:
            part, views[0] = views[0][:room], views[0][room:]
            room -= len(part)
            parts.append(part)
            if not views[0]:
                del views[0]
        yield b"".join(parts)
        if parts[0] == b"\0":
            return


def piece(frame: bytes) -> tuple[memoryview, bool]:
    """Return the piece of a record in `frame`, and whether the record goes on. Raises `WireError`."""
    if len(frame) > FRAME_BYTES or frame[:1] not in (b"\0", b"\1"):
        raise WireError("A stream's frame: expected 0 or 1 and a piece of a record.")
    more = frame[0] == 1
    if more and len(frame) < FRAME_BYTES:
        raise WireError("A stream's frame: found a short one before the last.")
    return memoryview(frame)[1:], more


class RecordReader:
    """Puts frames together to records of at most `max_bytes` bytes, each in one buffer of its own."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._begin_record()

    def _begin_record(self) -> None:
        self._bound = self.max_bytes
        self._buffer: bytearray | mmap.mmap = bytearray()
        self._begin = self._end = 0
        self._expected = False

    @property
    def received(self) -> memoryview:
        """What is here of a record that goes on."""
        return memoryview(self._buffer)[self._begin : self._end].toreadonly()

    def add(self, frame: bytes) -> memoryview | None:
        """Return the record that `frame` ends, None when it goes on. Raises `WireError` for what is no frame."""
        part, more = piece(frame)
        if self._expected:
            self._move()
        end = self._end + len(frame) - 1
        if end - self._begin > self._bound:
            raise WireError(f"A stream's record: found over {self._bound} bytes.")
        self._buffer[self._end : end] = part
        self._end = end
        if more:
            return None
        record = self.received
        self._begin_record()
        return record

    def expect(self, record_bytes: int) -> None:
        """Let the record that goes on have at most `record_bytes` bytes. Raises `WireError` when that is too many.

        It then lies in pages of its own, large ones where there are, which go back to the system with it. When it has
        just so many bytes, its end is at a multiple of 4, and so is a vector of 32-bit words that it ends with: others
        are added more slowly.
        """
        if not len(self.received) <= record_bytes <= self.max_bytes:
            raise WireError(
                f"A stream's record: found one of {record_bytes} bytes, expected at most {self.max_bytes}."
            )
        self._bound, self._expected = record_bytes, True

    def _move(self) -> None:
        """Let what is here continue in pages of its own: not before more comes, since a large page is whole at once."""
        begun = bytes(self.received)
        self._expected = False
        self._begin = -self._bound % 4
        self._end = self._begin + len(begun)
        self._buffer = _pages(self._begin + self._bound)
        self._buffer[self._begin : self._end] = begun


def _pages(size: int) -> mmap.mmap:
    made = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError, AttributeError):  # a kernel, or a system, without large pages
        made.madvise(mmap.MADV_HUGEPAGE)
    return made


class ReportCode(StrEnum):
    """How a block ended for a merchant. None depends on a photo; no text leaves."""

    DONE = "done"
    LOST = "lost"
    """The stream could not be opened, or was lost and not opened again in time."""
    MALFORMED = "malformed"
    """The message was no assignment."""
    UNKNOWN = "unknown"
    """The message was of a type that this merchant does not serve."""
    SIGNATURE = "signature"
    POLICY = "policy"
    BUDGET = "budget"
    UNAVAILABLE = "unavailable"
    VERSION = "version"
    """The assignment needs a later version of the protocol than this merchant's release knows."""
    LATER = "later"
    """Not yet: photos are being prepared, or the owner is being asked. It may be asked again in the same block."""


class Assignment(Message):
    """The server asks a merchant to take part in a block of at most `rounds` rounds, at the aggregator named."""

    kind: ClassVar[int] = 8

    block: BlockId
    signed_plan: SignedPlan
    rounds: Annotated[int, Field(ge=1, le=MAX_SETUP_ROUNDS)]
    aggregator: Address


class BlockReport(Message):
    """The merchant's only reply to an assignment. An assignment that can't be read is answered with block 0¹⁶.

    `epsilon` is what the merchant has spent in all, where its policy lets it say so. `nonce` makes each report
    another: Flower names objects by their content, keeps equal ones once, and drops one that several merchants send
    at the same time.
    """

    kind: ClassVar[int] = 9

    block: BlockId
    code: Annotated[ReportCode, Field(strict=False)]
    epsilon: Annotated[float, Field(ge=0, le=1e6)] | None = None
    nonce: Annotated[bytes, Field(min_length=16, max_length=16)] = Field(
        default_factory=lambda: os.urandom(16)
    )


class Challenge(Message):
    """The first record of a stream, from the server: a nonce drawn for this stream alone."""

    kind: ClassVar[int] = 10

    nonce: Bytes32


class _Statement(Message):
    """What a hello's signature is over."""

    kind: ClassVar[int] = 14

    nonce: Bytes32
    certificate: Digest
    block: BlockId
    identity: Bytes32


class Hello(Message):
    """The merchant's first record: who it is, by its directory identity (Ed25519), and for which block."""

    kind: ClassVar[int] = 11

    block: BlockId
    identity: Bytes32
    signature: Signature

    DOMAIN: ClassVar[str] = "hello"

    @classmethod
    def sign(cls, key: Ed25519PrivateKey, nonce: bytes, certificate: bytes, block: bytes) -> Self:
        """Return the hello for `block`, answering `nonce`, 32 bytes, of the server that showed `certificate`.

        `certificate` is the SHA-256 of the DER form of the server's own certificate, 32 bytes.
        """
        identity = signing.public_bytes(key)
        statement = _Statement(nonce=nonce, certificate=certificate, block=block, identity=identity)
        signature = signing.sign(key, cls.DOMAIN, wire.encode(statement))
        return cls(block=block, identity=identity, signature=signature)

    def verify(self, nonce: bytes, certificate: bytes) -> None:
        """Raise `SignatureInvalid` unless `identity` signed this hello for that nonce and certificate."""
        statement = _Statement(nonce=nonce, certificate=certificate, block=self.block, identity=self.identity)
        signing.verify(self.identity, self.DOMAIN, wire.encode(statement), self.signature)


class Ask(Message):
    """The server asks the question of one trip."""

    kind: ClassVar[int] = 12
    tail: ClassVar[str | None] = "payload"

    trip: Trip
    payload: Annotated[bytes, Field(max_length=MAX_MESSAGE_BYTES)]


class Answer(Message):
    """The merchant answers it."""

    kind: ClassVar[int] = 13
    tail: ClassVar[str | None] = "payload"

    trip: Trip
    payload: Annotated[bytes, Field(max_length=MAX_MESSAGE_BYTES)]


class Fetch(Message):
    """The merchant asks for a release later than number `number`, or for a file of the one that it was just told of.

    It says nothing else of the merchant, and which files it asks for follows from the release alone.
    """

    kind: ClassVar[int] = 42
    since: ClassVar[int] = 2

    number: Annotated[int, Field(ge=0, lt=1 << 31)]
    file: Digest | None = None


class Latest(Message):
    """The league's release, or None when there is none later than the one that the merchant knows."""

    kind: ClassVar[int] = 43
    since: ClassVar[int] = 2

    signed: SignedRelease | None = None
