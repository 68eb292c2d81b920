"""One at a time changes products: whoever reads a product, changes it and writes it back, in whichever process.

    with gallery.changing:
        product = gallery.get("A-17")
        gallery.put(product.model_copy(update={"title": "Trail shoe"}))

A transaction alone does not do: between reading and writing photos are embedded, for seconds, and the database is not
locked for that long. Else a product comes back that somebody removes meanwhile, or an edit is undone.
"""

import fcntl
import os
import threading
import time
from pathlib import Path
from typing import Final

from hanse_common.errors import GalleryError

WAIT_SECONDS: Final = 60.0
"""How long a change waits for others': longer than a removal waits for readers."""

_POLL_SECONDS: Final = 0.01


class Changing:
    """A lock among the threads of this process and of others that open the same `folder`; no file is made.

    It is not reentrant, and is let go when a process ends, however it does. Entering raises `GalleryError` after
    `WAIT_SECONDS`, and where the folder cannot be locked.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._threads = threading.Lock()
        self._descriptor = -1

    def __enter__(self) -> None:
        until = time.monotonic() + WAIT_SECONDS
        if not self._threads.acquire(timeout=WAIT_SECONDS):
            raise self._in_use()
        try:
            self._descriptor = self._locked(until)
        except BaseException:
            self._threads.release()
            raise

    def _locked(self, until: float) -> int:
        try:
            descriptor = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                while not _taken(descriptor):
                    if time.monotonic() > until:
                        raise self._in_use()
                    time.sleep(_POLL_SECONDS)
            except BaseException:
                os.close(descriptor)
                raise
        except OSError as error:
            raise GalleryError(
                f"{self._folder}: cannot be locked ({error.strerror}); put it on a local disk, where the user who runs "
                "hanse-client may read it."
            ) from None
        return descriptor

    def __exit__(self, *raised: object) -> None:
        try:
            os.close(self._descriptor)
        finally:
            self._threads.release()

    def _in_use(self) -> GalleryError:
        return GalleryError(
            f"{self._folder}: somebody else has changed products for {WAIT_SECONDS:g} s and goes on; try again later, "
            "or stop it."
        )


def _taken(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
