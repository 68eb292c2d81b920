"""The merchant's end of a stream: open it, prove who we are, and in a block answer what is asked, one trip at a time.

    code = serve_block(assignment, identity, authority, participant.handle, stop, limits)

    with open_stream(address, authority, METHOD, stop.is_set, seconds) as stream: ...

The server's certificate is fetched and verified first, and the gRPC channel then trusts that one certificate and
no other: its fingerprint is in our signature, so that nobody with another certificate, be it of the same
authority, can pass our hello on. A lost stream is opened again; a question that was answered already gets the
same answer, byte by byte, without asking `handle` again.
"""

import hashlib
import logging
import queue
import secrets
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hanse_common import wire
from hanse_common.errors import WireError
from hanse_common.session import (
    FRAME_BYTES,
    MAX_HELLO_BYTES,
    METHOD,
    NO_BLOCK,
    Answer,
    Ask,
    Assignment,
    Challenge,
    Hello,
    RecordReader,
    ReportCode,
    frames,
)

log = logging.getLogger(__name__)

CONNECT_SECONDS = 10.0
FIRST_PAUSE = 0.1
LONGEST_PAUSE = 5.0
POLL_SECONDS = 0.2
MAX_REPEATS = 2
"""How often one question may be asked on one stream."""

_JITTER = secrets.SystemRandom()

_FINAL = {
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.INVALID_ARGUMENT,
}
"""How the server says that trying again is of no use."""

_OPTIONS = (
    ("grpc.max_receive_message_length", FRAME_BYTES),
    ("grpc.max_metadata_size", 8192),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.enable_retries", 0),
)


@dataclass(frozen=True)
class Limits:
    """Bounds of a block: bytes of one record, seconds without a working stream, seconds in all."""

    record_bytes: int
    patience: float
    deadline: float


def serve_block(
    assignment: Assignment,
    identity: Ed25519PrivateKey,
    authority: bytes,
    handle: Callable[[bytes], bytes],
    stop: threading.Event,
    limits: Limits,
    tell: Callable[[str], None] = log.warning,
    count: Callable[[int], None] = lambda moved: None,
) -> ReportCode:
    """Serve the block to its end and return DONE, or LOST when it could not be served to its end.

    `authority` is the PEM of the certificate authority that the server's certificate must come from. `handle` is
    called in this thread. `stop` ends the block, though not a `handle` that runs. `tell` hears why it is LOST,
    `count` the bytes of each question and answer.
    """
    return _Block(assignment, identity, authority, handle, stop, limits, tell, count).serve()


class Lost(Exception):
    """A stream is lost, or could not be opened; another may be tried. The text says why."""


class Refused(Exception):
    """Trying again is of no use, for the reason in the text."""


class NotServed(Refused):
    """The server does not know this kind of stream."""


class _Block:
    def __init__(
        self,
        assignment: Assignment,
        identity: Ed25519PrivateKey,
        authority: bytes,
        handle: Callable[[bytes], bytes],
        stop: threading.Event,
        limits: Limits,
        tell: Callable[[str], None],
        count: Callable[[int], None],
    ) -> None:
        self._assignment = assignment
        self._identity = identity
        self._authority = authority
        self._handle = handle
        self._stop = stop
        self._limits = limits
        self._tell = tell
        self._count = count
        self._trip = 0
        self._asked = b""
        self._answer = b""

    def serve(self) -> ReportCode:
        if self._assignment.block == NO_BLOCK:  # a hello for it would open a stream of another kind
            self._tell("The server broke the protocol: a block has the number that none has.")
            return ReportCode.LOST
        ends = time.monotonic() + self._limits.deadline
        worked = time.monotonic()
        pause = FIRST_PAUSE
        while not self._stop.is_set():
            before = self._trip
            try:
                self._stream(ends)
                return ReportCode.DONE
            except Refused as refusal:
                self._tell(str(refusal))
                return ReportCode.LOST
            except Lost as loss:
                log.info("The stream was lost: %s", loss)
            now = time.monotonic()
            if self._trip > before:
                worked, pause = now, FIRST_PAUSE
            if now - worked > self._limits.patience or now > ends:
                break
            self._stop.wait(pause * _JITTER.uniform(0.5, 1.5))
            pause = min(2 * pause, LONGEST_PAUSE)
        if not self._stop.is_set():
            self._tell(f"No stream to {self._assignment.aggregator} could be kept open.")
        return ReportCode.LOST

    def _stream(self, ends: float) -> None:
        """Open one stream and serve it to the block's end. Raises `Lost`, `Refused`."""
        aggregator, over = self._assignment.aggregator, self._stop.is_set
        with open_stream(aggregator, self._authority, METHOD, over, ends - time.monotonic()) as stream:
            stream.greet(self._identity, self._assignment.block)
            self._converse(stream)

    def _converse(self, stream: "Stream") -> None:
        """Answer until the server ends the stream."""
        asked: Counter[int] = Counter()
        for record in stream.records(RecordReader(self._limits.record_bytes)):
            ask = wire.decode(Ask, record, self._limits.record_bytes)
            asked[ask.trip] += 1
            if asked[ask.trip] > MAX_REPEATS:  # each answer may be megabytes that the merchant pays for
                raise WireError("a trip was asked again and again on one stream.")
            answer = self._answer_to(ask)
            self._count(len(record) + len(answer))
            stream.say(answer)

    def _answer_to(self, ask: Ask) -> bytes:
        """Return the record that answers `ask`: a new trip is handled, the last one is repeated.

        Raises `WireError` for an earlier trip, or the last one with another question.
        """
        asked = hashlib.sha256(ask.payload).digest()
        if ask.trip > self._trip:
            answer = self._handle(ask.payload)
            self._trip, self._asked = ask.trip, asked
            self._answer = wire.encode(Answer(trip=ask.trip, payload=answer))
        elif ask.trip < self._trip or asked != self._asked:
            raise WireError("a trip was asked again with another question.")
        return self._answer


class Stream:
    """One open stream. Its methods raise `Lost` and `Refused`, as `open_stream` says."""

    def __init__(self, heard: Any, said: "queue.SimpleQueue[bytes | None]", certificate: bytes) -> None:
        self.frames: Iterator[bytes] = heard
        self._said = said
        self._certificate = certificate

    def greet(self, identity: Ed25519PrivateKey, block: bytes) -> None:
        """Say who we are, and that it is for `block`."""
        first = next(self.records(RecordReader(MAX_HELLO_BYTES)), None)
        if first is None:
            raise Lost("the server ended it before its challenge")
        challenge = wire.decode(Challenge, first, MAX_HELLO_BYTES)
        self.say(wire.encode(Hello.sign(identity, challenge.nonce, self._certificate, block)))

    def say(self, record: bytes) -> None:
        """Send one record."""
        for frame in frames(record):
            self._said.put(frame)

    def end(self) -> None:
        """Say that there is nothing more to say."""
        self._said.put(None)

    def records(self, reader: RecordReader) -> Iterator[memoryview]:
        """Yield records until the server ends the stream."""
        for frame in self.frames:
            record = reader.add(frame)
            if record is not None:
                yield record


@contextmanager
def open_stream(
    address: str, authority: bytes, method: str, over: Callable[[], bool], seconds: float
) -> Iterator[Stream]:
    """Open a stream to `method` at `address`, for at most `seconds`, and cancel it once `over` says so.

    Inside, gRPC's errors and `WireError` become `Lost` or `Refused`. Raises `Lost` when there is no connection,
    `Refused` when the server's certificate is not to be believed.
    """
    leaf = _certificate(address, authority)
    pinned = grpc.ssl_channel_credentials(ssl.DER_cert_to_PEM_cert(leaf).encode())
    said: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    closed = threading.Event()
    with grpc.secure_channel(address, pinned, options=_OPTIONS) as channel:
        heard = channel.stream_stream(method)(iter(said.get, None), timeout=max(0.1, seconds))
        watcher = threading.Thread(target=_cancel_when, args=(heard, over, closed), daemon=True)
        watcher.start()
        try:
            yield Stream(heard, said, hashlib.sha256(leaf).digest())
        except grpc.RpcError as error:
            raise _meaning(error) from None
        except WireError as error:
            raise Refused(f"The server broke the protocol: {error}") from None
        finally:
            closed.set()
            said.put(None)
            heard.cancel()
            watcher.join()


def _certificate(address: str, authority: bytes) -> bytes:
    """Return the server's own certificate, DER, verified for the host and the authority. Raises `Lost`, `Refused`."""
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    context = ssl.create_default_context(cadata=authority.decode("ascii", "replace"))
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS) as plain,
            context.wrap_socket(plain, server_hostname=host) as secured,
        ):
            certificate = secured.getpeercert(binary_form=True)
    except ssl.SSLCertVerificationError as error:
        raise Refused(
            f"The certificate of {address} is not to be believed: {error.verify_message}."
        ) from None
    except (OSError, OverflowError, UnicodeError) as error:  # a port, or a name, that there cannot be
        raise Lost(str(error)) from None
    if not certificate:
        raise Lost("the server showed no certificate")
    return certificate


def _meaning(error: Any) -> Exception:
    code = error.code()
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return NotServed("The server does not serve this kind of stream.")
    if code in _FINAL:
        return Refused(f"The server refused the stream ({code.name.lower()}).")
    return Lost(f"{code.name.lower()}")


def _cancel_when(heard: Any, over: Callable[[], bool], closed: threading.Event) -> None:
    while not closed.wait(POLL_SECONDS):
        if over():
            heard.cancel()
            return
