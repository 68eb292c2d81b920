"""What a fuzzed parser is, and what it may not do."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack

from . import mutate

Parse = Callable[[bytes], object]


class Broken(AssertionError):
    """A parser took what it must not take, or said what it must not say."""


def require(condition: object, what: str) -> None:
    """Raise `Broken` unless `condition`."""
    if not condition:
        raise Broken(what)


@dataclass(frozen=True)
class Target:
    """One parser. `inputs` is how many `make test-all` tries; `opened` gives it a folder of its own."""

    name: str
    inputs: int
    dialect: mutate.Dialect
    seeds: Callable[[], list[bytes]]
    opened: Callable[[Path], Any]
    refusals: tuple[type[Exception], ...]


def plain(parse: Parse) -> Callable[[Path], Any]:
    """Return what opens a parser that needs nothing."""

    @contextmanager
    def opened(_: Path) -> Iterator[Parse]:
        yield parse

    return opened


def parts_of(data: bytes, *types: type) -> list[Any] | None:
    """Return the values in `data`, a MessagePack array, if there are any, and of `types` where those are given."""
    try:
        parts = msgpack.unpackb(data)
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException):
        return None
    if not isinstance(parts, list) or (types and [type(part) for part in parts] != list(types)):
        return None
    return parts
