"""Photos from many threads through one engine, in batches: one thread computes, and what comes meanwhile goes together.

    with Batcher() as batcher:
        future = batcher.submit(engine, image)     # raises Busy when too many wait
        seen = future.result()

Photos are made small on the callers' own threads, so that what waits takes little memory, and other cores have work.
A photo that finds the thread idle is not kept waiting for company. While a batch is computed others gather, and go
together as the next one; then the thread waits up to `WAIT_SECONDS` for as many as there were in the last batch, since
callers who were answered together often ask again together. Whoever came first is served first. A photo that can't be
computed fails its own caller alone.

A photo that is to be computed `alone` goes in no batch: kernels may round a row of a batch by the batch's height, and
what is counted of a photo under differential privacy must not depend on others (`hanse_client.queries`).

Work that can wait (`see_all`) goes in small pieces, each queued when the one before is done: so a request never waits
for more than one piece of it.
"""

import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from PIL import Image

from hanse_common.errors import Busy

if TYPE_CHECKING:  # torch takes seconds to load
    from hanse_client.recognition.engine import Engine, Prepared, Seen

WAIT_SECONDS = 0.002

QUEUE = 256
"""Photos that may wait."""

PIECE = 8
"""Photos of work that can wait that are computed at once."""


@dataclass(frozen=True, eq=False)
class _Asked:
    engine: "Engine"
    photo: "Prepared"
    future: "Future[Seen]"
    alone: bool


class Batcher:
    """Computes what is submitted, on a thread of its own, until closed."""

    def __init__(self, *, wait_seconds: float = WAIT_SECONDS, queue: int = QUEUE) -> None:
        self._wait_seconds = wait_seconds
        self._room = queue
        self._waiting: deque[_Asked] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="recognition", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def submit(self, engine: "Engine", image: Image.Image, *, alone: bool = False) -> "Future[Seen]":
        """Return the future answer of `engine` about the decoded `image`. One that is cancelled in time costs nothing.

        Computed `alone`, it is the same to the last bit whatever else is asked.

        Raises `Busy` when too many wait already, or the batcher is closed.
        """
        (future,) = self.submit_all(engine, [image], alone=alone)
        return future

    def submit_all(
        self, engine: "Engine", images: Sequence[Image.Image], *, alone: bool = False
    ) -> "list[Future[Seen]]":
        """Return the future answers about all `images`, which wait together. Raises `Busy` as `submit` does."""
        with self._changed:
            self._require_room(len(images))
        photos = [engine.prepare(image) for image in images]
        with self._changed:
            self._require_room(len(photos))
            return self._add(engine, photos, alone)

    def see_all(self, engine: "Engine", images: Sequence[Image.Image]) -> "list[Seen]":
        """Return the answers about all `images`, computed in pieces when there is room; waits for it.

        Raises `Busy` when the batcher is closed meanwhile, and what the first photo that fails raises.
        """
        found: list[Seen] = []
        for start in range(0, len(images), PIECE):
            piece = [engine.prepare(image) for image in images[start : start + PIECE]]
            with self._changed:
                self._changed.wait_for(
                    lambda: self._closed or len(self._waiting) + len(piece) <= self._room  # noqa: B023 - at once
                )
                self._require_open()
                futures = self._add(engine, piece)
            found += [future.result() for future in futures]
        return found

    def close(self) -> None:
        """Answer what waits, take nothing more, and return when all is done."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _require_room(self, count: int) -> None:
        self._require_open()
        if len(self._waiting) + count > self._room:
            raise Busy(
                f"{len(self._waiting)} photos wait already, found {count} more, expected at most {self._room} in all. "
                "Try again in a second."
            )

    def _require_open(self) -> None:
        if self._closed:
            raise Busy("The recognizer is about to end; ask again when it runs again.")

    def _add(
        self, engine: "Engine", photos: "Sequence[Prepared]", alone: bool = False
    ) -> "list[Future[Seen]]":
        asked = [_Asked(engine, photo, Future(), alone) for photo in photos]
        self._waiting.extend(asked)
        self._changed.notify_all()
        return [one.future for one in asked]

    def _work(self) -> None:
        last = 0
        while batch := self._gather(last):
            last = len(batch)
            running = [one for one in batch if one.future.set_running_or_notify_cancel()]
            if running:
                _compute(running)
            del batch, running  # while nothing comes

    def _gather(self, last: int) -> list[_Asked]:
        """Return what to compute next, all of one engine; nothing once closed and empty. `last` is the last's size."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            largest = 0
            if self._waiting:
                largest = 1 if self._waiting[0].alone else self._waiting[0].engine.largest
            wanted = min(last, largest)
            until = time.monotonic() + self._wait_seconds
            while len(self._waiting) < wanted and not self._closed:
                left = until - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
            batch: list[_Asked] = []
            while (
                self._waiting
                and len(batch) < largest
                and (not batch or (self._waiting[0].engine is batch[0].engine and not self._waiting[0].alone))
            ):
                batch.append(self._waiting.popleft())
            self._changed.notify_all()
            return batch


def _compute(batch: list[_Asked]) -> None:
    """Answer the batch; if that fails, one by one, so that each photo answers for itself."""
    try:
        found = batch[0].engine.see([one.photo for one in batch])
    except Exception as error:
        if len(batch) == 1:
            batch[0].future.set_exception(error)
        else:
            for one in batch:
                _compute([one])
        return
    for one, seen in zip(batch, found, strict=True):
        one.future.set_result(seen)
