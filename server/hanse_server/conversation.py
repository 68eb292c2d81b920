"""What is said over merchants' streams in one block: one question at a time, and its answer, whatever carries it.

    block = Block(block_id, max_record_bytes, room, changed)
    stream = block.join("alder")
    ending = await block.converse(stream, line)     # asks and hears until the stream is over
    block.leave(stream)

    block.ask(trip)                                 # to all who are there, and to all who come back
    trip.replies.get()                              # ("alder", its answer, the place that this takes)
    block.close_trip(trip)

All of it is for the thread of one loop, but for `Block.closed`, and for `Block.streams` under `changed`. Each stream
alternates: one ask, then its answer. Nothing else is read. Of an answer longer than a frame no more than the first is
read before `hanse_server.reception` has room for all of it.
"""

import asyncio
import queue
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import partial
from typing import Any, Protocol

from hanse_common import wire
from hanse_common.session import Answer, Ask, RecordReader
from hanse_common.wire import Buffer
from hanse_server.reception import Place, Room


class Line(Protocol):
    """A stream, as frames."""

    async def read(self) -> bytes:
        """Return the merchant's next frame. Raises `WireError` when the merchant ends the stream."""
        ...

    async def write(self, *pieces: Buffer) -> None:
        """Send the record that the pieces make."""
        ...


class Ending(Enum):
    """Why a stream is over: its block is, or the stream was given up, for a newer one or for being slow."""

    CLOSED = auto()
    LOST = auto()


@dataclass
class Stream:
    """One merchant's stream. `over` is done when it must end.

    `place` is where its answer comes in, if that is large.
    """

    name: str
    over: "asyncio.Future[Ending]"
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    last_trip: int = 0
    place: Place | None = None

    def end(self, ending: Ending) -> None:
        """Have the stream end; a second time does nothing."""
        if not self.over.done():
            self.over.set_result(ending)
            self.wake.set()


@dataclass
class Trip:
    """One question: what each merchant is asked, who has answered, and where large answers are.

    `until` is when it ends, by `time.monotonic`. A reply is a merchant's name, its payload, and the `Place` to leave
    when that is dealt with, or None.
    """

    number: int
    payloads: Mapping[str, bytes]
    until: float
    replies: "queue.SimpleQueue[Any]"
    answered: set[str] = field(default_factory=set)
    places: list[Place] = field(default_factory=list)

    def slice_seconds(self) -> float:
        """Return the length of a merchant's turn to upload, in seconds: its share of the time that is left."""
        left = len(self.payloads) - len(self.answered)
        return (self.until - time.monotonic()) / max(left, 1)


class Violation(Exception):
    """A merchant broke the stream's rules."""


@dataclass
class Block:
    """A block, its streams by merchant, and the question that is open.

    `changed` is notified when a merchant comes or goes. Once it is `closed`, streams that come end at once.
    """

    id: bytes
    max_record_bytes: int
    room: Room
    changed: threading.Condition
    closed: bool = False
    streams: dict[str, Stream] = field(default_factory=dict)
    trip: Trip | None = None
    trips: int = 0

    def join(self, name: str) -> Stream:
        """Make a stream, the merchant's only one: a reconnect must not wait until the old one is missed."""
        stream = Stream(name, asyncio.get_running_loop().create_future())
        with self.changed:
            older = self.streams.get(name)
            self.streams[name] = stream
            self.changed.notify_all()
        if older is not None:
            older.end(Ending.LOST)
        if self.closed:
            stream.end(Ending.CLOSED)  # closed since the hello
        return stream

    def leave(self, stream: Stream) -> None:
        """Forget the stream, and give back the place that it holds."""
        with self.changed:
            if self.streams.get(stream.name) is stream:
                del self.streams[stream.name]
                self.changed.notify_all()
        if stream.place is not None:
            self.room.leave(stream.place)

    def end(self) -> None:
        """End all streams."""
        self.trip = None
        for stream in self.streams.values():
            stream.end(Ending.CLOSED)

    def ask(self, trip: Trip) -> None:
        """Open a question."""
        self.trip = trip
        self.room.forget()
        for name in trip.payloads:
            if name in self.streams:
                self.streams[name].wake.set()

    def close_trip(self, trip: Trip) -> None:
        """Close a question, and give back what its answers hold."""
        if self.trip is trip:
            self.trip = None
        for place in trip.places:
            self.room.leave(place)

    async def converse(self, stream: Stream, line: Line) -> Ending:
        """Ask and hear answers until the stream is over, and return why it is.

        Raises `WireError` and `Violation` for what the merchant said.
        """
        reader = RecordReader(self.max_record_bytes)
        while True:
            trip = await self._next_trip(stream)
            if trip is None:
                return stream.over.result()
            stream.last_trip = trip.number
            talk = asyncio.ensure_future(self._question(line, stream, trip, reader))
            talk.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody else may look
            either: set[asyncio.Future[Any]] = {talk, stream.over}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not talk.done():
                # Cancelling it would cancel the stream, and the merchant would not see the status.
                return stream.over.result()
            answer, payload = wire.decode_tailed((Answer,), talk.result(), self.max_record_bytes)
            if answer.trip != trip.number:
                raise Violation(f"answered trip {answer.trip}, was asked {trip.number}")
            place, stream.place = stream.place, None
            if place is not None:
                place.done = True
            if trip is self.trip and stream.name not in trip.answered:
                trip.answered.add(stream.name)
                trip.places += [] if place is None else [place]
                trip.replies.put((stream.name, payload, place))
            elif place is not None:
                self.room.leave(place)
            del talk, either, payload  # while the next question is waited for

    async def _question(self, line: Line, stream: Stream, trip: Trip, reader: RecordReader) -> memoryview:
        """Ask the merchant the trip's question and return the record that it answers, read in its turn."""
        payload = trip.payloads[stream.name]
        await line.write(wire.head(Ask(trip=trip.number, payload=b""), len(payload)), payload)
        while True:
            record = reader.add(await line.read())
            if record is not None:
                return record
            if stream.place is None:
                size = wire.announced_bytes(Answer, reader.received)
                reader.expect(size)
                stream.place = self.room.line_up(stream.name, size, partial(stream.end, Ending.LOST))
                await stream.place.granted
            else:
                stream.place.progress()

    async def _next_trip(self, stream: Stream) -> Trip | None:
        """Return the next question for this stream, or None when it is over."""
        while not stream.over.done():
            trip = self.trip
            if (
                trip
                and trip.number > stream.last_trip
                and stream.name in trip.payloads.keys() - trip.answered
            ):
                return trip
            stream.wake.clear()
            await stream.wake.wait()
        return None
