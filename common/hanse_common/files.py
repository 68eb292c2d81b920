"""Reading files no further than a bound, and writing them so that a crash leaves the old content or the new."""

import os
import tempfile
from pathlib import Path

from hanse_common.errors import ConfigError, HanseError

PUBLIC = 0o644
"""Mode of files that are made to be handed out."""


def read_bounded(path: Path, max_bytes: int, expected: str, error: type[HanseError]) -> bytes:
    """Return the content of the file `path`, which is to be `expected` ("a plan file").

    Raises `error`, with a text that names the file, when it cannot be read or has more than `max_bytes` bytes.
    """
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as fault:
        raise error(f"{path}: cannot be read ({fault.strerror}), expected {expected}.") from None
    if len(data) > max_bytes:
        raise error(f"{path}: found more than {max_bytes} bytes, expected {expected}.")
    return data


def create_secret(path: Path, data: bytes) -> None:
    """Write the new file `path` with mode 0600 and sync it.

    Raises `ConfigError` when `path` exists: a key that was used is never overwritten.
    """
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise ConfigError(f"{path}: there is a key already; move it away to make another.") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot write a key here ({error.strerror}).") from None
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_atomically(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Replace the file `path` by `data`: temporary file beside it, fsync, rename, fsync of the folder.

    The file's `mode` lets nobody else read it unless told otherwise.

    Raises `OSError` as the file system does; the old content is then still there.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            os.fchmod(file.fileno(), mode)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
