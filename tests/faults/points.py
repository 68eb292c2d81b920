"""Places of execution at which a process can be told to kill itself: lines, and calls that touch the disk.

    seen = Points(files)                  # notes every place
    deadly = Points(files, at=place)      # kill -9 at the first arrival there
    with deadly.watched():
        deadly.phase = "upload"
        work()

A place is (phase, via, file, line, what). `via` is the line of the first of `files` on whose behalf it happens, 0 for
none: what serves several callers is a place for each. `what` is "" for the line itself, before it runs, or "before" or
"after" with the name of a C function that was called from there and touches the disk: SQLite's, the system's, a file's.

Between two of these calls lines change nothing that outlives the process. Where they are many, `lines=False` leaves
them out, and what is "before" a call, which is "after" the one before it.
"""

import os
import signal
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import BuiltinFunctionType, FrameType
from typing import Any

Place = tuple[str, int, str, int, str]

_SQLITE = {"connect", "execute", "executemany", "commit", "rollback", "close"}
_SYSTEM = {
    "open", "write", "fsync", "rename", "replace", "link", "unlink", "remove", "mkdir", "rmdir", "chmod", "fchmod",
    "ftruncate", "utime", "close",
}  # fmt: skip
_FILE = {"write", "flush", "close", "truncate"}


def die() -> None:
    """kill -9 of this very process."""
    os.kill(os.getpid(), signal.SIGKILL)


class Points:
    """Watches this process while it runs code of `files`.

    `at` is where it dies, or None. `seen` are the places met so far, each once, in their order; `phase` is what its
    owner says that it is doing, and nothing is watched in phases in which nobody dies.
    """

    def __init__(self, files: tuple[Path, ...], at: Place | None = None, lines: bool = True) -> None:
        self._names = {str(file): "/".join(file.parts[-2:]) for file in files}
        self._at = at
        self._lines = lines
        self._events = {"c_call", "c_return", "c_exception"} if lines else {"c_return", "c_exception"}
        self._phase = ""
        self._last: Place | None = None
        self._first = str(files[0]) if files else ""
        self.seen: dict[Place, None] = {}

    @contextmanager
    def watched(self, phase: str) -> Iterator[None]:
        """Watch this thread inside."""
        self.move(phase)
        try:
            yield
        finally:
            sys.settrace(None)
            sys.setprofile(None)

    def move(self, phase: str) -> None:
        """Go on as `phase`. Of functions that are running already, lines are not watched."""
        self._phase = phase
        if not self._names or (self._at is not None and self._at[0] != phase):
            sys.settrace(None)
            sys.setprofile(None)
            return
        sys.setprofile(self._profile)
        if self._lines:
            sys.settrace(self._trace)

    def arrive(self, what: str, frame: FrameType | None = None) -> None:
        """Note the place, and die if it is the one."""
        place = (self._phase, 0, "", 0, what)
        if frame is not None:
            name = self._names[frame.f_code.co_filename]
            place = (self._phase, self._via(frame), name, frame.f_lineno, what)
        if place == self._at:
            die()
        # Between a line's beginning and the first call in it nothing happens: these are one place.
        if not (what.startswith("before") and self._last == (*place[:-1], "")):
            self.seen.setdefault(place)
        self._last = place

    def _via(self, frame: FrameType) -> int:
        caller: FrameType | None = frame.f_back
        while caller is not None and caller.f_code.co_filename != self._first:
            caller = caller.f_back
        return 0 if caller is None or frame.f_code.co_filename == self._first else caller.f_lineno

    def _trace(self, frame: FrameType, event: str, arg: Any) -> Any:
        return self._line if frame.f_code.co_filename in self._names else None

    def _line(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line":
            self.arrive("", frame)
        return self._line

    def _profile(self, frame: FrameType, event: str, arg: Any) -> None:
        if event in self._events and _touches_the_disk(arg):
            caller: FrameType | None = frame
            while caller is not None and caller.f_code.co_filename not in self._names:
                caller = caller.f_back
            if caller is not None:
                when = "before" if event == "c_call" else "after"
                self.arrive(f"{when} {arg.__name__}", caller)


def _touches_the_disk(function: BuiltinFunctionType) -> bool:
    owner = getattr(function, "__self__", None)
    name = function.__name__
    if isinstance(owner, sqlite3.Connection | sqlite3.Cursor):
        return name in _SQLITE and not (isinstance(owner, sqlite3.Cursor) and name == "close")
    module = getattr(owner, "__name__", function.__module__)
    if module == "posix":
        return name in _SYSTEM
    if module == "_sqlite3":
        return name in _SQLITE
    return name in _FILE and hasattr(owner, "fileno")
