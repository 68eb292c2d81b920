"""Large things by the SHA-256 of their bytes: models, sums, recognizers' files.

    objects = Objects(state / "objects")
    digest = objects.put(data)
    assert objects.get(digest) == data

A file is written whole, synced, and renamed before its digest is returned, so what a committed record names is there.
What no record names is left over from a crash; `collect` takes it away.
"""

import hashlib
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO

from hanse_common.errors import StorageError
from hanse_common.files import read_bounded, write_atomically

MAX_OBJECT_BYTES = 1 << 33
_DIGEST = re.compile(r"[0-9a-f]{64}")


class Objects:
    """Objects in the folder `folder`, made when missing, for its owner alone. Raises `StorageError`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            if not folder.is_dir():
                folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                folder.mkdir(mode=0o700, exist_ok=True)
                _sync(folder.parent)
        except OSError as error:
            raise StorageError(
                f"{folder}: cannot be made ({error.strerror}); service.state must be writable."
            ) from None

    def put(self, data: bytes) -> str:
        """Keep `data` and return its digest, 64 hexadecimal digits. Raises `StorageError` when it can't be written.

        What is there already is written once more: it may be damaged, or not yet synced.
        """
        digest = hashlib.sha256(data).hexdigest()
        path = self._path(digest)
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            _sync(self._folder)
            write_atomically(path, data)
        except OSError as error:
            raise StorageError(
                f"{path}: cannot be written ({error.strerror}). Make room, then go on with hanse-server resume."
            ) from None
        return digest

    def get(self, digest: str) -> bytes:
        """Return the object. Raises `StorageError` when it is missing or damaged."""
        path = self._path(digest)
        data = read_bounded(
            path, MAX_OBJECT_BYTES, "what was kept there; restore it from a backup", StorageError
        )
        if hashlib.sha256(data).hexdigest() != digest:
            raise StorageError(f"{path}: its content is damaged; restore it from a backup.")
        return data

    def open(self, digest: str) -> BinaryIO:
        """Return the object's open file, which stays readable when the object is dropped. Raises `StorageError`."""
        path = self._path(digest)
        try:
            return path.open("rb")
        except OSError as error:
            raise StorageError(
                f"{path}: cannot be read ({error.strerror}); restore it from a backup."
            ) from None

    def drop(self, digests: Collection[str]) -> None:
        """Delete objects that no record names any more. One that can't be deleted is left for `collect`."""
        for digest in digests:
            try:
                self._path(digest).unlink(missing_ok=True)
            except OSError:
                continue

    def present(self) -> Iterator[str]:
        """Yield the digests of all objects."""
        for path in self._folder.glob("??/*"):
            if _DIGEST.fullmatch(path.name):
                yield path.name

    def collect(self, kept: Collection[str]) -> int:
        """Delete all objects but `kept`, and what a crash left half written; return how many. Raises `StorageError`."""
        gone = 0
        for path in tuple(self._folder.glob("??/*")):
            if path.name not in kept:
                try:
                    path.unlink(missing_ok=True)
                except OSError as error:
                    raise StorageError(f"{path}: cannot be deleted ({error.strerror}).") from None
                gone += 1
        return gone

    def _path(self, digest: str) -> Path:
        if not _DIGEST.fullmatch(digest):
            raise StorageError(f"{digest[:80]!r}: found no digest of 64 hexadecimal digits.")
        return self._folder / digest[:2] / digest


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
