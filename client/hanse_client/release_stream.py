"""The merchant's end of the stream by which it fetches the league's released recognizer.

    with open_release_stream(address, identity, authority, stop.is_set) as stream:
        signed = stream.latest(number)                  # the last release that we know; None: there is no later one
        for piece in stream.pieces(file): ...           # a file of it

Nothing that comes is believed here: who uses it checks the signature and each file's digest. What is bounded here is
how much comes, and how long it may take: no longer than by a slow line.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hanse_client.stream import Lost, Stream, open_stream
from hanse_common import wire
from hanse_common.errors import WireError
from hanse_common.release import MAX_RELEASE_BYTES, ReleasedFile, SignedRelease
from hanse_common.session import NO_BLOCK, RELEASE_METHOD, Fetch, Latest, RecordReader, piece

ANSWER_SECONDS = 30.0
"""How long an answer may take beside the time for its bytes."""

MIN_BYTES_PER_SECOND = 10_000
"""The slowest line on which a recognizer is fetched."""

MAX_SECONDS = 7 * 86_400.0

_MAX_LATEST_BYTES = MAX_RELEASE_BYTES + (1 << 10)


class ReleaseStream:
    """One open stream. Its methods raise `stream.Lost` and `stream.Refused`; `count` hears of the bytes that came."""

    def __init__(self, over: Callable[[], bool], count: Callable[[int], None]) -> None:
        self._over = over
        self._count = count
        self._stream: Stream | None = None
        self._number = 0
        self._until = 0.0
        self._allow(0)

    @contextmanager
    def opened(self, address: str, identity: Ed25519PrivateKey, authority: bytes) -> Iterator[None]:
        """Be open inside."""
        with open_stream(address, authority, RELEASE_METHOD, self._is_over, MAX_SECONDS) as stream:
            stream.greet(identity, NO_BLOCK)
            self._stream = stream
            yield
            stream.end()

    def latest(self, number: int) -> SignedRelease | None:
        """Return the league's release, None when there is none after the one with the number `number`. Once only."""
        self._number = number
        stream = self._ask(Fetch(number=number), 0)
        record = next(stream.records(RecordReader(_MAX_LATEST_BYTES)), None)
        if record is None:
            raise Lost("the server ended it before its answer")
        self._count(len(record))
        return wire.decode(Latest, record, _MAX_LATEST_BYTES).signed

    def pieces(self, file: ReleasedFile) -> Iterator[memoryview]:
        """Yield the content of a file of the release; no more of it is read than the release announces."""
        stream = self._ask(Fetch(number=self._number, file=file.digest), file.size)
        left = file.size
        for frame in stream.frames:
            part, more = piece(frame)
            left -= len(part)
            if left < 0:
                raise WireError(f"{file.name} has more than the {file.size} bytes that were announced.")
            self._count(len(frame))
            yield part
            if not more:
                return
        raise Lost(f"{file.name} ended {left} bytes early")

    def _ask(self, fetch: Fetch, expected: int) -> Stream:
        if self._stream is None:
            raise ValueError("Expected an open stream.")
        self._allow(expected)
        self._stream.say(wire.encode(fetch))
        return self._stream

    def _allow(self, expected: int) -> None:
        self._until = time.monotonic() + ANSWER_SECONDS + expected / MIN_BYTES_PER_SECOND

    def _is_over(self) -> bool:
        return self._over() or time.monotonic() > self._until


@contextmanager
def open_release_stream(
    address: str,
    identity: Ed25519PrivateKey,
    authority: bytes,
    over: Callable[[], bool],
    count: Callable[[int], None] = lambda moved: None,
) -> Iterator[ReleaseStream]:
    """Open a stream to the aggregator at `address`, as `stream.open_stream` does, until `over` says so."""
    made = ReleaseStream(over, count)
    with made.opened(address, identity, authority):
        yield made
