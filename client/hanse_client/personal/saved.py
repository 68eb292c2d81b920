"""Arrays and what is known of them, as two files: `NAME.safetensors`, and `NAME.json` which names its SHA-256.

    save(folder, "head", record, {"weight": weight})     # `record` has the field `arrays`, see `digest_of`
    record, arrays = read(folder, "head", HeadRecord)

The JSON is written last: after a crash between the two, `read` refuses the folder. Neither file is trusted.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from hanse_common.errors import RecognizerError
from hanse_common.files import read_bounded, write_atomically
from hanse_common.wire import HexDigest, Value

MAX_RECORD_BYTES: Final = 1 << 20
"""Bound of the JSON."""

MAX_ARRAYS_BYTES: Final = 1 << 30
"""Bound of the arrays' file."""


class Saved(Value):
    """Base of what is known of arrays; `arrays` is their file's SHA-256."""

    arrays: HexDigest


R = TypeVar("R", bound=Saved)


def digest_of(arrays: Mapping[str, NDArray[Any]]) -> str:
    """Return the SHA-256, in hexadecimal, of the file that holds `arrays`."""
    return hashlib.sha256(_bytes(arrays)).hexdigest()


def save(folder: Path, name: str, record: Saved, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write both files into `folder`, which is made when missing. Raises `RecognizerError` when the disk fails."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomically(folder / f"{name}.safetensors", _bytes(arrays))
        write_atomically(folder / f"{name}.json", record.model_dump_json(indent=2).encode() + b"\n")
    except OSError as error:
        raise RecognizerError(f"{folder}: cannot save what was learned ({error.strerror}).") from None


def exists(folder: Path, name: str) -> bool:
    """Return whether something was saved under `name`."""
    return (folder / f"{name}.json").exists()


def read(folder: Path, name: str, kind: type[R]) -> tuple[R, dict[str, NDArray[np.float32]]]:
    """Return what was saved under `name`. Raises `RecognizerError` for files that are missing, altered or malformed."""
    path = folder / f"{name}.json"
    try:
        record = kind.model_validate_json(read_bounded(path, MAX_RECORD_BYTES, "a record", RecognizerError))
    except ValidationError as error:
        fault = error.errors(include_input=False, include_url=False)[0]
        field = ".".join(str(part) for part in fault["loc"]) or "the record"
        raise RecognizerError(f"{path}: {field}: {fault['msg']}. {_REMEDY}") from None
    path = folder / f"{name}.safetensors"
    data = read_bounded(path, MAX_ARRAYS_BYTES, "arrays in safetensors", RecognizerError)
    found = hashlib.sha256(data).hexdigest()
    if found != record.arrays:
        raise RecognizerError(f"{path}: found SHA-256 {found}, {name}.json names {record.arrays}. {_REMEDY}")
    try:
        arrays = load_arrays(data)
    except (SafetensorError, KeyError, ValueError) as error:  # KeyError: a type that numpy does not have
        raise RecognizerError(
            f"{path}: not a safetensors file of numpy's types ({error}). {_REMEDY}"
        ) from None
    if not all(array.dtype == np.float32 and np.isfinite(array).all() for array in arrays.values()):
        raise RecognizerError(f"{path}: expected float32 numbers that are finite. {_REMEDY}")
    return record, arrays


def remove(folder: Path, name: str) -> bool:
    """Remove both files, the JSON first; return whether there was any. Raises `RecognizerError` when the disk fails."""
    found = False
    for ending in ("json", "safetensors"):
        try:
            (folder / f"{name}.{ending}").unlink()
            found = True
        except FileNotFoundError:
            continue
        except OSError as error:
            raise RecognizerError(f"{folder}: cannot remove what was learned ({error.strerror}).") from None
    return found


_REMEDY = "Learn it again with `hanse-client personalize`."


def _bytes(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    return bytes(save_arrays({name: np.ascontiguousarray(array) for name, array in arrays.items()}))
