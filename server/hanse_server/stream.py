"""The aggregator's end of merchants' streams: gRPC over TLS 1.3, one authenticated stream a merchant.

    with StreamServer(host, port, certificate, key, {identity: "alder"}, max_record_bytes) as server:
        server.open_block(block, max_record_bytes)
        server.wait(30, lambda connected: len(connected) >= 3)
        for merchant, reply in server.exchange("join", payloads, deadline=60): ...
        server.close_block()

An asyncio loop in a thread of its own serves the streams; the methods are for one other thread. Each stream
alternates: one ask, then its answer. Nothing else is read, so a merchant that floods or dawdles fills its own
flow-control window and nobody's memory. Of an answer longer than a frame no more than the first is read before
`hanse_server.reception` has room for all of it; that room is free again when the next reply is asked for, so memory
does not grow with merchants that upload at once. See `hanse_common.session` for what is said.

By a method of its own merchants fetch the league's released recognizer, `releases`, whether a block is open or not.
"""

import asyncio
import logging
import os
import queue
import resource
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self
from urllib.parse import unquote

import grpc

from hanse_common import wire
from hanse_common.credentials import fingerprint
from hanse_common.directory import MAX_MEMBERS
from hanse_common.errors import ConfigError, RunStopped, SignatureInvalid, StorageError, WireError
from hanse_common.session import (
    FRAME_BYTES,
    MAX_HELLO_BYTES,
    METHOD,
    NO_BLOCK,
    RELEASE_METHOD,
    Answer,
    Ask,
    Challenge,
    Hello,
    RecordReader,
    frames,
)
from hanse_common.wire import Buffer
from hanse_server.distribution import Distribution, Shelf
from hanse_server.rates import origin_of
from hanse_server.reception import STALL_SECONDS, Place, Room

log = logging.getLogger(__name__)

HELLO_SECONDS = 10.0
"""How long a stream may take to say who it is."""

MAX_PENDING = 512
"""Streams at once that have not said who they are."""

MAX_PENDING_PER_ADDRESS = 32
"""Of these, from one network address: a flood from one place shuts nobody else out."""

STOP_SECONDS = 2.0

_NOBODY = object()
"""What the queue of replies holds when a run was stopped."""

_OPTIONS = (
    ("grpc.max_receive_message_length", FRAME_BYTES),
    ("grpc.max_concurrent_streams", 4),
    # Identity alone: nobody here compresses, and what unpacks costs more than it weighs.
    ("grpc.compression_enabled_algorithms_bitset", 1),
    # A merchant's stream lasts as long as its connection. A connection without one holds a file for nothing.
    ("grpc.max_connection_idle_ms", 10_000),
    ("grpc.max_metadata_size", 8192),
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.so_reuseport", 0),
    # What a merchant may send unread is some of a frame, and not what the line would bear: else memory grows by
    # megabytes with each merchant. With a round trip of 50 ms one stream then carries some 30 Mbit/s.
    ("grpc.http2.bdp_probe", 0),
    # Both ends notice within half a minute that the other is gone.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 4),
)


@dataclass
class _Stream:
    """One authenticated stream. `over` is done when it must end, with the status that the merchant is to see.

    `place` is where its answer comes in, if that is large.
    """

    name: str
    over: "asyncio.Future[grpc.StatusCode]"
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    last_trip: int = 0
    place: Place | None = None


@dataclass
class _Trip:
    """The question that is open: what each merchant is asked, who has answered, and where large answers are."""

    number: int
    payloads: Mapping[str, bytes]
    until: float
    replies: "queue.SimpleQueue[Any]"
    answered: set[str] = field(default_factory=set)
    places: list[Place] = field(default_factory=list)


@dataclass
class _Block:
    """The open block and its streams by merchant."""

    id: bytes
    max_record_bytes: int
    streams: dict[str, _Stream] = field(default_factory=dict)
    trip: _Trip | None = None
    trips: int = 0


class StreamServer:
    """Implements `hanse_server.blocks.Streams`. `identities` returns the merchants' names, as of now, by their
    directory identities.

    `certificate` and `key` are PEM. `port` may be 0; the bound one is in `port` once started. Raises
    `ConfigError` when certificate, key, host or port can't be used. `releases` is where released recognizers are.
    """

    def __init__(
        self,
        host: str,
        port: int,
        certificate: bytes,
        key: bytes,
        identities: Callable[[], Mapping[bytes, str]],
        releases: Shelf | None = None,
    ) -> None:
        self.port = port
        self._host = host
        self._certificate = certificate
        self._key = key
        self._fingerprint = fingerprint(certificate)
        self._identities = identities
        self._distribution = Distribution(releases)
        self._pending: Counter[str] = Counter()
        self._block: _Block | None = None
        self._room = Room(self._slice)
        self._replies: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._stopped = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="streams", daemon=True)
        self._server: grpc.aio.Server | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        try:
            self._call(self._start())
            self._require_tls_1_3()
        except BaseException:
            self._end_loop()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.close_block()
        if self._server is not None:
            self._call(self._server.stop(STOP_SECONDS))
        self._end_loop()

    def open_block(self, block: bytes, max_record_bytes: int) -> None:
        """Let merchants open streams for `block`, with records of at most `max_record_bytes` bytes.

        The block before is closed first. Raises `ValueError` for a block called `NO_BLOCK`.
        """
        if block == NO_BLOCK:
            raise ValueError("Expected a block's own number.")
        self.close_block()
        self._block = _Block(block, max_record_bytes)

    def close_block(self) -> None:
        """End the block's streams, with status OK."""
        block, self._block = self._block, None
        if block is not None:
            self._loop.call_soon_threadsafe(_end_all, block)

    def connected(self) -> tuple[str, ...]:
        """Return the merchants that have a stream now, sorted."""
        with self._changed:
            return tuple(sorted(self._block.streams)) if self._block else ()

    def wait(self, seconds: float, until: Callable[[frozenset[str]], bool]) -> bool:
        """Wait until the connected merchants satisfy `until`; return whether they did within `seconds`.

        Raises `RunStopped` after `abort`.
        """
        with self._changed:
            done = self._changed.wait_for(
                lambda: self._stopped or until(frozenset(self._block.streams if self._block else ())),
                timeout=seconds,
            )
            self._raise_if_stopped()
        return done

    def exchange(
        self, kind: str, payloads: Mapping[str, bytes], deadline: float
    ) -> Iterator[tuple[str, Buffer]]:
        """As `Transport.exchange`: a stream lost meanwhile is asked again, byte by byte, when it is back.

        Raises `RunStopped` after `abort`.
        """
        until = time.monotonic() + deadline
        block = self._block
        if block is None:
            return
        replies: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._replies = replies
        block.trips += 1
        number = block.trips
        trip = _Trip(number, dict(payloads), until, replies)
        self._loop.call_soon_threadsafe(self._ask, block, trip)
        left = len(payloads)
        try:
            while left:
                self._raise_if_stopped()
                try:
                    reply = replies.get(timeout=max(0.0, until - time.monotonic()))
                except queue.Empty:
                    return
                if reply is _NOBODY:
                    continue
                name, payload, place = reply
                left -= 1
                yield name, payload
                del reply, payload
                if place is not None:
                    self._loop.call_soon_threadsafe(self._room.leave, place)
        finally:
            self._loop.call_soon_threadsafe(self._close_trip, block, trip)

    def abort(self) -> None:
        """Make `wait` and `exchange`, running or later, raise `RunStopped` until `resume`. For any thread."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._replies.put(_NOBODY)

    def resume(self) -> None:
        """Take `abort` back, for another run."""
        self._stopped = False

    def _raise_if_stopped(self) -> None:
        if self._stopped:
            raise RunStopped("The run was stopped. The checkpoint of its last round is kept.")

    def _call(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _require_tls_1_3(self) -> None:
        """Fail closed unless a handshake of TLS 1.2 fails here: the switch for it works at gRPC's import only."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        host = "127.0.0.1" if self._host == "0.0.0.0" else self._host  # noqa: S104 - a comparison
        with socket.create_connection((host, self.port), timeout=HELLO_SECONDS) as plain:
            try:
                context.wrap_socket(plain).close()
            except OSError:
                return
        raise ConfigError(
            "service.aggregator: the listener would speak TLS 1.2; expected 1.3 alone. Something imported grpc "
            "before hanse_common; start the server with the command hanse-server."
        )

    async def _start(self) -> None:
        # Beyond every merchant, in a block and fetching, one replaced stream of each, and those that have not said who
        # they are, there is nobody to serve.
        limit = 4 * MAX_MEMBERS + MAX_PENDING
        # gRPC does not count connections by address; this leaves files for everything else that this process does.
        connections = min(limit, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)
        options = (*_OPTIONS, ("grpc.max_allowed_incoming_connections", connections))
        self._server = grpc.aio.server(options=options, maximum_concurrent_rpcs=limit)
        self._server.add_generic_rpc_handlers(
            (_Handler({METHOD: self._serve, RELEASE_METHOD: self._serve_release}),)
        )
        try:
            credentials = grpc.ssl_server_credentials([(self._key, self._certificate)])
            self.port = self._server.add_secure_port(f"{_bracketed(self._host)}:{self.port}", credentials)
            await self._server.start()
        except (RuntimeError, ValueError):
            raise ConfigError(
                f"service.aggregator: cannot listen on {self._host}:{self.port}; expected a free port, an address "
                "of this machine, and under service.tls a certificate with its own key."
            ) from None

    async def _serve(self, frames_in: object, context: Any) -> None:
        """Serve one stream of a block, from the challenge to its end."""
        name, wanted = await self._met(context)
        block = self._block
        if block is None or block.id != wanted:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such block")
            return  # never reached: abort raises
        stream = self._join(block, name)
        try:
            status = await self._converse(block, stream, context)
        except (WireError, _Violation) as error:
            log.warning("%s: the stream was ended: %s", stream.name, error)
            status = grpc.StatusCode.INVALID_ARGUMENT
        finally:
            self._leave(block, stream)
            if stream.place is not None:
                self._room.leave(stream.place)
        if status is not grpc.StatusCode.OK:
            await context.abort(status, "")

    async def _serve_release(self, frames_in: object, context: Any) -> None:
        """Serve one stream by which a merchant fetches the release, from the challenge to its end."""
        name, wanted = await self._met(context)
        if wanted != NO_BLOCK:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a hello for a block")

        async def read() -> bytes | None:
            frame = await context.read()
            return None if frame is grpc.aio.EOF else bytes(frame)

        try:
            status = grpc.StatusCode.OK if await self._distribution.serve(name, read, context.write) else None
        except WireError as error:
            log.warning("%s: the fetch of a release was ended: %s", name, error)
            status = grpc.StatusCode.INVALID_ARGUMENT
        except StorageError as error:
            log.error("A release can't be handed out: %s", error)
            status = grpc.StatusCode.UNAVAILABLE
        if status is not grpc.StatusCode.OK:
            await context.abort(status or grpc.StatusCode.ABORTED, "")

    async def _met(self, context: Any) -> tuple[str, bytes]:
        """Return who opened the stream, once it has proven it, and for which block. Aborts the stream otherwise."""
        address = _address(context.peer())
        if self._pending[address] >= MAX_PENDING_PER_ADDRESS or self._pending.total() >= MAX_PENDING:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many streams")
        self._pending[address] += 1
        try:
            return await asyncio.wait_for(self._meet(context), HELLO_SECONDS)
        except (TimeoutError, WireError, SignatureInvalid) as error:
            log.info("A stream from %s was refused: %s", address, _reason(error))
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "no valid hello")
            raise  # never reached: abort raises
        finally:
            self._pending[address] -= 1
            if not self._pending[address]:
                del self._pending[address]  # addresses are not collected

    async def _meet(self, context: Any) -> tuple[str, bytes]:
        """Return the merchant's name, once it has proven who it is, and the block that it is here for.

        Raises `SignatureInvalid`, `WireError`.
        """
        nonce = os.urandom(32)
        await _write(context, wire.encode(Challenge(nonce=nonce)))
        record = RecordReader(MAX_HELLO_BYTES).add(await _read(context))
        if record is None:
            raise WireError("a hello of more than a frame")
        hello = wire.decode(Hello, record, MAX_HELLO_BYTES)
        name = self._identities().get(hello.identity)
        if name is None:
            raise SignatureInvalid("not a merchant of this league")
        hello.verify(nonce, self._fingerprint)
        return name, hello.block

    def _join(self, block: _Block, name: str) -> _Stream:
        """Make the stream the merchant's only one: a reconnect must not wait until the old one is missed."""
        stream = _Stream(name, asyncio.get_running_loop().create_future())
        with self._changed:
            older = block.streams.get(name)
            block.streams[name] = stream
            self._changed.notify_all()
        if older is not None:
            _end(older, grpc.StatusCode.ABORTED)
        if block is not self._block:
            _end(stream, grpc.StatusCode.OK)  # closed since the hello
        return stream

    def _leave(self, block: _Block, stream: _Stream) -> None:
        with self._changed:
            if block.streams.get(stream.name) is stream:
                del block.streams[stream.name]
                self._changed.notify_all()

    async def _converse(self, block: _Block, stream: _Stream, context: Any) -> grpc.StatusCode:
        """Ask and hear answers until the stream is over, and return the status to end it with.

        Raises `WireError` and `_Violation` for what the merchant said.
        """
        reader = RecordReader(block.max_record_bytes)
        while True:
            trip = await self._next_trip(block, stream)
            if trip is None:
                return stream.over.result()
            stream.last_trip = trip.number
            talk = asyncio.ensure_future(self._question(context, stream, trip, reader))
            talk.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody else may look
            await asyncio.wait({talk, stream.over}, return_when=asyncio.FIRST_COMPLETED)
            if not talk.done():
                # Cancelling it would cancel the stream, and the merchant would not see the status.
                return stream.over.result()
            answer, payload = wire.decode_tailed((Answer,), talk.result(), block.max_record_bytes)
            if answer.trip != trip.number:
                raise _Violation(f"answered trip {answer.trip}, was asked {trip.number}")
            place, stream.place = stream.place, None
            if place is not None:
                place.done = True
            if trip is block.trip and stream.name not in trip.answered:
                trip.answered.add(stream.name)
                trip.places += [] if place is None else [place]
                trip.replies.put((stream.name, payload, place))
            elif place is not None:
                self._room.leave(place)
            del talk, payload  # while the next question is waited for

    async def _question(self, context: Any, stream: _Stream, trip: _Trip, reader: RecordReader) -> memoryview:
        """Ask the merchant the trip's question and return the record that it answers, read in its turn."""
        payload = trip.payloads[stream.name]
        await _write(context, wire.head(Ask(trip=trip.number, payload=b""), len(payload)), payload)
        while True:
            record = reader.add(await _read(context))
            if record is not None:
                return record
            if stream.place is None:
                size = wire.announced_bytes(Answer, reader.received)
                reader.expect(size)
                lose = partial(_end, stream, grpc.StatusCode.ABORTED)
                stream.place = self._room.line_up(stream.name, size, lose)
                await stream.place.granted
            else:
                stream.place.progress()

    async def _next_trip(self, block: _Block, stream: _Stream) -> _Trip | None:
        """Return the next question for this stream, or None when it is over."""
        while not stream.over.done():
            trip = block.trip
            if (
                trip
                and trip.number > stream.last_trip
                and stream.name in trip.payloads.keys() - trip.answered
            ):
                return trip
            stream.wake.clear()
            await stream.wake.wait()
        return None

    def _ask(self, block: _Block, trip: _Trip) -> None:
        block.trip = trip
        self._room.forget()
        for name in trip.payloads:
            if name in block.streams:
                block.streams[name].wake.set()

    def _close_trip(self, block: _Block, trip: _Trip) -> None:
        if block.trip is trip:
            block.trip = None
        for place in trip.places:
            self._room.leave(place)

    def _slice(self) -> float:
        """Return the length of a merchant's turn to upload, in seconds: its share of the time that is left."""
        trip = self._block.trip if self._block else None
        if trip is None:
            return STALL_SECONDS
        left = len(trip.payloads) - len(trip.answered)
        return (trip.until - time.monotonic()) / max(left, 1)


class _Violation(Exception):
    """A merchant broke the stream's rules."""


class _Handler(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Routes the methods there are; records stay bytes."""

    def __init__(self, serve: Mapping[str, Callable[..., Any]]) -> None:
        self._methods = {name: grpc.stream_stream_rpc_method_handler(one) for name, one in serve.items()}

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        return self._methods.get(handler_call_details.method)


def _end_all(block: _Block) -> None:
    block.trip = None
    for stream in block.streams.values():
        _end(stream, grpc.StatusCode.OK)


def _end(stream: _Stream, status: grpc.StatusCode) -> None:
    if not stream.over.done():
        stream.over.set_result(status)
        stream.wake.set()


async def _write(context: Any, *pieces: Buffer) -> None:
    for frame in frames(*pieces):
        await context.write(frame)


async def _read(context: Any) -> bytes:
    """Return the next frame. Raises `WireError` when the merchant ends the stream."""
    frame = await context.read()
    if frame is grpc.aio.EOF:
        raise WireError("the merchant ended the stream")
    return bytes(frame)


def _address(peer: str) -> str:
    """Return where a peer of gRPC's comes from, as counted: "ipv6:%5B2001:db8::7%5D:443" is "2001:db8::/64"."""
    return origin_of(unquote(peer).partition(":")[2].rpartition(":")[0].strip("[]"))


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _reason(error: Exception) -> str:
    return "no hello in time" if isinstance(error, TimeoutError) else str(error)
