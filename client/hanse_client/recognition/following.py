"""A thread that follows the league: another recognizer serves once it is loaded and the gallery is embedded anew.

    follower = Follower(config, wanted, engines, batcher, gallery)
    follower.start()
    follower.rebuild, follower.problem          # for status
    follower.close()

Another recognizer is loaded and warmed beside the one that serves. If its embedding is the same (the head alone was
trained), it serves at once. Else the gallery's photos are embedded for it in the background while the one before
answers, and products that are added meanwhile are embedded for both; when none is left out, requests begin on the new
one, and when the last request on the old one has ended, its vectors are forgotten. One that can't be loaded is left
alone, and the one that serves goes on.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hanse_client.config import ClientConfig
from hanse_client.gallery.gallery import Gallery, PhotoRotted
from hanse_client.gallery.rejection import Targets
from hanse_client.recognition.answers import Rebuild
from hanse_client.recognition.batching import Batcher
from hanse_client.recognition.engines import Engines
from hanse_client.recognition.sources import Wanted, named
from hanse_common.errors import HanseError, PhotoError
from hanse_common.vision.photo import decode

if TYPE_CHECKING:  # torch takes seconds to load
    from hanse_client.recognition.engine import Engine

log = logging.getLogger(__name__)

LOOK_SECONDS = 2.0
"""How often is looked for another recognizer, and for photos that another process added."""

RETRY_SECONDS = 60.0
"""After how long one that could not be loaded is tried again, though nothing changed."""

CHUNK = 32
"""Photos that are embedded anew between two writes."""

Progress = Callable[[int, int], None]
Tell = Callable[[str], None]


class Follower:
    """Changes `engines` as the league and the shop go on. `rebuild` and `problem` are for `RecognitionStatus`.

    `tell` hears a line, in words for the shop's owner, when another recognizer serves and when something goes wrong.
    """

    def __init__(
        self,
        config: ClientConfig,
        first: Wanted,
        engines: Engines,
        batcher: Batcher,
        gallery: Gallery,
        tell: Tell = lambda line: None,
    ) -> None:
        self.rebuild: Rebuild | None = None
        self.problem: str | None = None
        self._config = config
        self._served = first
        self._engines = engines
        self._batcher = batcher
        self._gallery = gallery
        self._tell = tell
        self._told: str | None = None
        self._refused: Wanted | None = None
        self._retry_at = 0.0
        self._photos = 0
        self._damaged: set[bytes] = set()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="following", daemon=True)

    def start(self) -> None:
        """Begin to follow."""
        self._thread.start()

    def close(self) -> None:
        """Stop following; what is half done is done again at the next start."""
        self._ending.set()
        if self._thread.is_alive():
            self._thread.join()

    def _follow(self) -> None:
        words_read = False
        while not self._ending.is_set():
            self._try(self._renew, "Another recognizer cannot serve, so the one before goes on")
            self._try(self._tend, "What changed among your products cannot be followed")
            if not words_read:
                self._try(self._read_words, "Your products' words cannot be read yet")
                words_read = True
            if self.problem is None:
                self._told = None
            self._ending.wait(LOOK_SECONDS)

    def _try(self, step: Callable[[], None], failed: str) -> None:
        try:
            step()
        except HanseError as error:
            self._say(failed, str(error))
        except Exception as error:
            log.exception("Following the recognizer failed; the one that serves goes on.")
            self._say(failed, f"found {type(error).__name__}, which nobody expected; the log says where")

    def _read_words(self) -> None:
        self._gallery.follow_words(self._ending.is_set)

    def _tend(self) -> None:
        """Do for the recognizer that serves what products that came and went ask for."""
        engine = self._engines.serving
        if engine.embedding and self._embed(engine):
            self._forget_others()
            self._calibrate(engine)

    def _renew(self) -> None:
        """Let another recognizer serve if one is wanted, and it can."""
        wanted = Wanted.of(self._config)
        if wanted == self._served:
            self._refused, self.problem = None, None
            return
        if wanted == self._refused and time.monotonic() < self._retry_at:
            return
        self._refused, self._retry_at = wanted, time.monotonic() + RETRY_SECONDS
        engine = wanted.load(self._config)
        before = self._engines.serving
        if engine.embedding and engine.embedding != before.embedding:
            self._engines.announce(engine)
            try:
                ready = self._embed(engine)
                if ready:
                    self._gallery.open_set.calibrate(engine.embedding, None, targets(self._config))
            except BaseException:
                self._engines.announce(None)
                raise
            if not ready:
                self._engines.announce(None)
                return
        self._engines.switch(engine)
        self._served, self._refused, self.problem = wanted, None, None
        log.info("Recognizer %s serves.", engine.digest.hex()[:16])
        if engine.digest == before.digest:
            self._speak("What `personalize` did last holds from now on.")
        else:
            classes = f"{len(engine.classes)} classes"
            self._speak(
                f"Another recognizer serves from now on: {named(self._config, engine.digest)}, {classes}."
            )

    def _calibrate(self, engine: "Engine") -> None:
        """Calibrate the threshold when the gallery has changed enough since, and not while products are coming."""
        before, self._photos = self._photos, self._gallery.count_photos()
        if self._photos == before:
            calibrate_when_stale(self._gallery, engine, self._config)

    def _embed(self, engine: "Engine") -> bool:
        """Embed what `engine` has not; return whether nothing is left out."""

        def tell(done: int, total: int) -> None:
            self.rebuild = Rebuild(done, total)

        try:
            return embed_missing(
                self._gallery,
                engine,
                self._batcher,
                progress=tell,
                stop=self._ending.is_set,
                damaged=self._damaged,
            )
        finally:
            self.rebuild = None

    def _forget_others(self) -> None:
        serving = self._engines.serving.embedding
        for embedding in self._gallery.embeddings():
            if serving and embedding != serving:
                self._gallery.forget(embedding)

    def _say(self, failed: str, problem: str) -> None:
        if problem != self._told:
            log.warning("The recognizer that serves goes on: %s", problem)
            self._speak(f"{failed}: {problem}")
        self.problem = self._told = problem

    def _speak(self, line: str) -> None:
        try:
            self._tell(line)
        except Exception:  # a console that is gone stops nobody who serves
            log.exception("Nobody heard: %s", line)


def targets(config: ClientConfig) -> Targets:
    """Return by what the shop wants its threshold to be calibrated."""
    return Targets(config.search.false_accept, config.search.false_reject)


def calibrate_when_stale(gallery: Gallery, engine: "Engine", config: ClientConfig) -> None:
    """Calibrate the threshold of `engine` when the gallery's photos, or what the shop wants, changed enough since."""
    if gallery.open_set.is_stale(engine.embedding, targets(config)):
        gallery.open_set.calibrate(engine.embedding, None, targets(config))


def embed_missing(
    gallery: Gallery,
    engine: "Engine",
    batcher: Batcher,
    *,
    progress: Progress = lambda done, total: None,
    stop: Callable[[], bool] = lambda: False,
    damaged: set[bytes] | None = None,
) -> bool:
    """Give all photos of `gallery` that lack one a vector of `engine`; return False when stopped before.

    A photo that can't be decoded any more is passed over, and its SHA-256 added to `damaged`; those in it are not tried
    again. `progress` hears (done, total) before each chunk. Raises `GalleryError`, and `Busy` when `batcher` is closed.
    """
    damaged = set() if damaged is None else damaged
    total = 0
    while True:
        wanting = gallery.missing(engine.embedding, CHUNK + len(damaged))
        todo = [digest for digest in wanting if digest not in damaged][:CHUNK]
        if not todo:
            return True
        if stop():
            return False
        total = total or gallery.count_photos()
        progress(min(gallery.count_vectors(engine.embedding), total), total)
        images, digests = [], []
        for digest in todo:
            try:
                data = gallery.photo(digest)
                if data is None:  # removed meanwhile
                    continue
                images.append(decode(data))
                digests.append(digest)
            except (PhotoError, PhotoRotted) as error:
                log.warning("A reference photo, SHA-256 %s, cannot be read any more: %s", digest.hex(), error)
                damaged.add(digest)
        seen = batcher.see_all(engine, images)
        vectors: dict[bytes, NDArray[np.float32]] = {
            digest: one.embedding for digest, one in zip(digests, seen, strict=True)
        }
        gallery.put_vectors(engine.embedding, vectors)
