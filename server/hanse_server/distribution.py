"""Hands the league's released recognizer to merchants that fetch it, from the disk, a frame at a time.

    distribution = Distribution(versions)
    await distribution.serve("alder", read, write)      # until the merchant has all it asked for

A stream moves each file of one release at most once, and ends when that takes longer than a slow line would. A
merchant has one stream; a new one ends the one before. Nothing here waits for rounds, nor do they wait for it: what
is on its way to a slow merchant is one frame, and the file's other bytes stay on the disk.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import BinaryIO, Protocol

from hanse_common import wire
from hanse_common.errors import WireError
from hanse_common.release import FILES, MAX_RELEASE_BYTES, Release, ReleasedFile, SignedRelease
from hanse_common.session import FRAME_BYTES, MAX_HELLO_BYTES, Fetch, Latest, RecordReader, frames
from hanse_common.wire import Buffer

START_SECONDS = 60.0
"""How long a stream may take beside its files."""

MIN_BYTES_PER_SECOND = 10_000
"""The slowest line on which files are still handed out."""

Read = Callable[[], Awaitable[bytes | None]]
"""Returns the merchant's next frame, None when there is none any more."""

Write = Callable[[bytes], Awaitable[None]]


class Shelf(Protocol):
    """Where releases are: `hanse_server.storage.Versions`. Its methods raise `StorageError`."""

    def current(self) -> SignedRelease | None:
        """Return the league's release, None before the first."""

    def open(self, digest: str) -> BinaryIO:
        """Return the open file with the SHA-256 `digest`, in hexadecimal."""


class Distribution:
    """The streams of all merchants that fetch, for the thread of one loop. Without a shelf there is no release."""

    def __init__(self, shelf: Shelf | None) -> None:
        self._shelf = shelf
        self._talks: dict[str, asyncio.Task[None]] = {}

    async def serve(self, name: str, read: Read, write: Write) -> bool:
        """Serve one stream of the merchant `name`; return whether that came to its end.

        It does not when the stream takes too long or the merchant opens another. Raises `WireError` for what the
        merchant said, `StorageError`.
        """
        talk = asyncio.ensure_future(self._in_time(read, write))
        older, self._talks[name] = self._talks.get(name), talk
        if older is not None:
            older.cancel()
        try:
            await asyncio.wait({talk})
        finally:
            talk.cancel()
            if self._talks.get(name) is talk:
                del self._talks[name]
        if talk.cancelled():
            return False
        try:
            talk.result()
        except TimeoutError:
            return False
        return True

    async def _in_time(self, read: Read, write: Write) -> None:
        async with asyncio.timeout(START_SECONDS) as limit:
            await self._talk(read, write, limit)

    async def _talk(self, read: Read, write: Write, limit: asyncio.Timeout) -> None:
        """Answer what is fetched until the merchant ends the stream."""
        left: dict[bytes, ReleasedFile] = {}
        offered = False
        for _ in range(1 + len(FILES)):
            frame = await read()
            if frame is None:
                return
            fetch = _fetch(frame)
            if fetch.file is None:
                if offered:
                    raise WireError("a release was asked for again on one stream")
                offered = True
                signed, release = await asyncio.to_thread(self._latest, fetch.number)
                for part in frames(wire.encode(Latest(signed=signed))):
                    await write(part)
                if release is not None:
                    left = {file.digest: file for file in release.files}
                    seconds = sum(file.size for file in release.files) / MIN_BYTES_PER_SECOND
                    limit.reschedule(asyncio.get_running_loop().time() + START_SECONDS + seconds)
            else:
                file = left.pop(fetch.file, None)
                if file is None:
                    raise WireError("a file was asked for that is not of the release, or again")
                await self._send(file, write)
        if await read() is not None:
            raise WireError("more was asked for than a release has")

    def _latest(self, number: int) -> tuple[SignedRelease | None, Release | None]:
        signed = None if self._shelf is None else self._shelf.current()
        if signed is None:
            return None, None
        release = wire.decode(Release, signed.release, MAX_RELEASE_BYTES)
        return (signed, release) if release.number > number else (None, None)

    async def _send(self, file: ReleasedFile, write: Write) -> None:
        """Send the file as one record. A disk that is slow keeps nothing else waiting."""
        if self._shelf is None:
            raise WireError("there is no release")
        source = await asyncio.to_thread(self._shelf.open, file.digest.hex())
        with source:
            sent = 0
            while True:
                part = await asyncio.to_thread(source.read, min(FRAME_BYTES - 1, file.size - sent))
                sent += len(part)
                more = len(part) == FRAME_BYTES - 1
                await write(b"\1" + part if more else b"\0" + part)
                if not more:
                    return


def _fetch(frame: Buffer) -> Fetch:
    record = RecordReader(MAX_HELLO_BYTES).add(bytes(frame))
    if record is None:
        raise WireError("a fetch of more than a frame")
    return wire.decode(Fetch, record, MAX_HELLO_BYTES)
