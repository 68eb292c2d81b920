"""Reading files no further than a bound, and writing them so that a crash leaves the old content or the new."""

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hanse_common.errors import ConfigError, HanseError

PUBLIC = 0o644
"""Mode of files that are made to be handed out."""


def read_bounded(path: Path, max_bytes: int, expected: str, error: type[HanseError]) -> bytes:
    """Return the content of the file `path`, which is to be `expected` ("a plan file").

    Raises `error`, with a text that names the file, when it cannot be read or has more than `max_bytes` bytes.
    """
    try:
        # Without O_NONBLOCK, opening a FIFO that somebody packed into a folder would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise error(f"{path}: found no regular file, expected {expected}.")
            with open(descriptor, "rb", closefd=False) as file:
                data = file.read(max_bytes + 1)
        finally:
            os.close(descriptor)
    except OSError as fault:
        raise error(f"{path}: cannot be read ({fault.strerror}), expected {expected}.") from None
    if len(data) > max_bytes:
        raise error(f"{path}: found more than {max_bytes} bytes, expected {expected}.")
    return data


def create_secret(path: Path, data: bytes) -> None:
    """Write the new file `path` with mode 0600, whole or not at all, and sync it and its folder.

    Raises `ConfigError` when `path` exists: a key that was used is never overwritten.
    """
    try:
        with _beside(path, data, 0o600) as temporary:
            path.hardlink_to(temporary)  # unlike a rename it replaces nothing
    except FileExistsError:
        raise ConfigError(f"{path}: there is a key already; move it away to make another.") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot write a key here ({error.strerror}).") from None


def write_atomically(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Replace the file `path` by `data`: temporary file beside it, fsync, rename, fsync of the folder.

    The file's `mode` lets nobody else read it unless told otherwise.

    Raises `OSError` as the file system does; the old content is then still there.
    """
    with _beside(path, data, mode) as temporary:
        temporary.replace(path)


@contextmanager
def _beside(path: Path, data: bytes, mode: int) -> Iterator[Path]:
    """Yield a temporary file with `data` beside `path`, synced; take it away then, and sync the folder."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            os.fchmod(file.fileno(), mode)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
