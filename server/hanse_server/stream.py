"""The aggregator's end of merchants' streams: gRPC over TLS 1.3, one authenticated stream a merchant.

    with StreamServer(host, port, certificate, key, lambda: {identity: "alder"}) as server:
        server.open_block(block, max_record_bytes)
        server.wait(30, lambda connected: len(connected) >= 3)
        for merchant, reply in server.exchange("join", payloads, deadline=60): ...
        server.close_block()

An asyncio loop in a thread of its own serves the streams; the methods are for one other thread. What is said over a
stream is in `hanse_server.greeting` and `hanse_server.conversation`: one ask, then its answer. Nothing else is read, so
a merchant that floods or dawdles fills its own flow-control window and nobody's memory. The room that a large answer
takes is free again when the next reply is asked for, so memory does not grow with merchants that upload at once.

By a method of its own merchants fetch the league's released recognizer, `releases`, whether a block is open or not.
"""

import asyncio
import logging
import queue
import resource
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self
from urllib.parse import unquote

import grpc

from hanse_common.credentials import fingerprint
from hanse_common.directory import MAX_MEMBERS
from hanse_common.errors import ConfigError, RunStopped, SignatureInvalid, StorageError, WireError
from hanse_common.session import FRAME_BYTES, METHOD, NO_BLOCK, RELEASE_METHOD, frames
from hanse_common.wire import Buffer
from hanse_server.conversation import Block, Ending, Trip, Violation
from hanse_server.distribution import Distribution, Shelf
from hanse_server.greeting import HELLO_SECONDS, MAX_PENDING, Crowded, Greeter
from hanse_server.rates import origin_of
from hanse_server.reception import STALL_SECONDS, Room

log = logging.getLogger(__name__)

STOP_SECONDS = 2.0

_NOBODY = object()
"""What the queue of replies holds when a run was stopped."""

_STATUSES = {Ending.CLOSED: grpc.StatusCode.OK, Ending.LOST: grpc.StatusCode.ABORTED}

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
        self._greeter = Greeter(fingerprint(certificate), identities)
        self._distribution = Distribution(releases)
        self._block: Block | None = None
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
        self._block = Block(block, max_record_bytes, self._room, self._changed)

    def close_block(self) -> None:
        """End the block's streams, with status OK."""
        block, self._block = self._block, None
        if block is not None:
            block.closed = True
            self._loop.call_soon_threadsafe(block.end)

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
        trip = Trip(number, dict(payloads), until, replies)
        self._loop.call_soon_threadsafe(block.ask, trip)
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
            self._loop.call_soon_threadsafe(block.close_trip, trip)

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
        stream = block.join(name)
        try:
            status = _STATUSES[await block.converse(stream, _Line(context))]
        except (WireError, Violation) as error:
            log.warning("%s: the stream was ended: %s", stream.name, error)
            status = grpc.StatusCode.INVALID_ARGUMENT
        finally:
            block.leave(stream)
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
        try:
            with self._greeter.place(address):
                try:
                    return await self._greeter.meet(_Line(context))
                except (TimeoutError, WireError, SignatureInvalid) as error:
                    log.info("A stream from %s was refused: %s", address, _reason(error))
                    await context.abort(grpc.StatusCode.UNAUTHENTICATED, "no valid hello")
                    raise  # never reached: abort raises
        except Crowded:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many streams")
            raise  # never reached: abort raises

    def _slice(self) -> float:
        trip = self._block.trip if self._block else None
        return STALL_SECONDS if trip is None else trip.slice_seconds()


class _Line:
    """One of gRPC's streams, as a `Line`."""

    def __init__(self, context: Any) -> None:
        self._context = context

    async def read(self) -> bytes:
        frame = await self._context.read()
        if frame is grpc.aio.EOF:
            raise WireError("the merchant ended the stream")
        return bytes(frame)

    async def write(self, *pieces: Buffer) -> None:
        for frame in frames(*pieces):
            await self._context.write(frame)


class _Handler(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Routes the methods there are; records stay bytes."""

    def __init__(self, serve: Mapping[str, Callable[..., Any]]) -> None:
        self._methods = {name: grpc.stream_stream_rpc_method_handler(one) for name, one in serve.items()}

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        return self._methods.get(handler_call_details.method)


def _address(peer: str) -> str:
    """Return where a peer of gRPC's comes from, as counted: "ipv6:%5B2001:db8::7%5D:443" is "2001:db8::/64"."""
    return origin_of(unquote(peer).partition(":")[2].rpartition(":")[0].strip("[]"))


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _reason(error: Exception) -> str:
    return "no hello in time" if isinstance(error, TimeoutError) else str(error)
