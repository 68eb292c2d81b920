"""Structured logs: one JSON object a line, or a line for people, on standard error or in a file that rotates.

    configure("json", Path("state/server.log"))
    log = logging.getLogger("hanse_server.daemon")
    emit(log, "round", "Round 3 of 60: 5 merchants.", round=3, uploaded=["alder", "birch"])

    {"time": "2026-11-26T17:56:30.120Z", "level": "info", "logger": "hanse_server.daemon", "event": "round",
     "text": "Round 3 of 60: 5 merchants.", "fields": {"round": 3, "uploaded": ["alder", "birch"]}}

What is logged is what the operator may know: names, codes, numbers of rounds. Nothing that merchants send is: bytes
become their length, an error that is not one of Hanse's own becomes its type and place, because its text may quote
what was sent. Libraries are heard from warnings on, by name and place alone, for the same reason. A stranger's text
cannot forge a line: control characters, and in JSON all that is not ASCII, are escaped.
"""

import json
import logging
import math
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from traceback import extract_tb
from typing import Any, Literal, TextIO

from hanse_common.errors import ConfigError, HanseError

Form = Literal["text", "json"]

OURS = ("hanse_server", "hanse_common")

MAX_TEXT = 2000
"""Bound of a text in characters; what is longer is cut."""

MAX_ITEMS = 512
"""Bound of a list or mapping: a directory of merchants fits."""

MAX_DEPTH = 4

MAX_FRAMES = 20

ROTATE_BYTES = 16 << 20
ROTATED_FILES = 5


def emit(
    logger: logging.Logger, event: str, text: str = "", *, level: int = logging.INFO, **fields: Any
) -> None:
    """Log that `event` happened, with a text for people and `fields` for programs."""
    logger.log(level, "%s", text, extra={"hanse_event": event, "hanse_fields": fields})


def configure(form: Form, file: Path | None = None, level: int = logging.INFO) -> None:
    """Send this process' log to `file`, or to standard error without one, in place of where it went before.

    The file has mode 0600 and is rotated at 16 MiB; five older ones are kept.

    Raises `ConfigError` when the file can't be written.
    """
    handler = _handler(file)
    handler.setFormatter(JsonLines() if form == "json" else Lines())
    root = logging.getLogger()
    for before in [found for found in root.handlers if isinstance(found, _Standard | _File)]:
        root.removeHandler(before)
        with suppress(OSError):  # a full disk, of which `before` has told
            before.close()
    root.addHandler(handler)
    for name in OURS:
        logging.getLogger(name).setLevel(level)


class JsonLines(logging.Formatter):
    """Formats records as JSON objects (RFC 8259), ASCII alone, one a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without its end."""
        return json.dumps(_parts(record), ensure_ascii=True, allow_nan=False)


class Lines(logging.Formatter):
    """Formats records as lines for people."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without its end."""
        parts = _parts(record)
        fields = "".join(f" {name}={json.dumps(value)}" for name, value in parts["fields"].items())
        line = (
            f"{parts['time']} {parts['level']:8}{parts['logger']} {parts['event']}: {parts['text']}{fields}"
        )
        return "".join(
            char if char.isprintable() else char.encode("unicode_escape").decode() for char in line
        )


def _parts(record: logging.LogRecord) -> dict[str, Any]:
    """Return what a line says of `record`."""
    time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
    fields: dict[str, Any] = _plain(getattr(record, "hanse_fields", {}), 0)
    if record.name.partition(".")[0] in OURS:
        event, text = getattr(record, "hanse_event", "message"), record.getMessage()
    else:
        event, text = "library", ""
        fields["at"] = f"{record.module}:{record.lineno}"
    if record.exc_info and record.exc_info[1] is not None:
        fields |= _failure(record.exc_info[1])
    return {
        "time": time.replace("+00:00", "Z"),
        "level": record.levelname.lower(),
        "logger": record.name,
        "event": _cut(event),
        "text": _cut(text),
        "fields": fields,
    }


def _failure(error: BaseException) -> dict[str, Any]:
    """Return type and place of `error`, and its text where it is one of ours."""
    frames = extract_tb(error.__traceback__)[-MAX_FRAMES:]
    parts: dict[str, Any] = {
        "error": type(error).__name__,
        "trace": [f"{Path(frame.filename).stem}:{frame.lineno} {frame.name}" for frame in frames],
    }
    if isinstance(error, HanseError):
        parts["reason"] = _cut(str(error))
    return parts


def _plain(value: object, depth: int) -> Any:
    """Return `value` as JSON has it, bounded. Bytes, arrays and objects are named, never shown."""
    match value:
        case None | bool() | int():
            return value
        case float():
            return value if math.isfinite(value) else str(value)
        case str():
            return _cut(value)
        case bytes() | bytearray() | memoryview():
            return f"<{len(value)} bytes>"
        case Path():
            return _cut(str(value))
        case Mapping() if depth < MAX_DEPTH:
            items = list(value.items())[:MAX_ITEMS]
            return {_cut(str(key)): _plain(inner, depth + 1) for key, inner in items}
        case Sequence() | set() | frozenset() if depth < MAX_DEPTH:
            members = sorted(value, key=str) if isinstance(value, set | frozenset) else value
            return [_plain(inner, depth + 1) for inner in list(members)[:MAX_ITEMS]]
    return f"<{type(value).__name__}>"


def _cut(text: str) -> str:
    # A lone surrogate could not be written to a file of UTF-8.
    text = text.encode("utf-8", "replace").decode()
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"


class _Patient:
    """What our handlers share: libraries are heard from warnings on, and a log that can't be written harms nobody."""

    _complained = False

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.WARNING or record.name.partition(".")[0] in OURS

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's own name
        if not self._complained:
            self._complained = True
            error = sys.exc_info()[1]
            reason = getattr(error, "strerror", None) or type(error).__name__
            if sys.__stderr__ is not None:
                print(f"The log cannot be written ({reason}); going on without it.", file=sys.__stderr__)


class _Standard(_Patient, logging.StreamHandler[TextIO]):
    pass


class _File(_Patient, RotatingFileHandler):
    def _open(self) -> Any:
        def private(name: str, flags: int) -> int:
            return os.open(name, flags, 0o600)

        return open(self.baseFilename, self.mode, encoding="utf-8", opener=private)


def _handler(file: Path | None) -> _Standard | _File:
    if file is None:
        return _Standard(sys.stderr)
    try:
        return _File(file, maxBytes=ROTATE_BYTES, backupCount=ROTATED_FILES)
    except OSError as error:
        raise ConfigError(
            f"{file}: the log cannot be written ({error.strerror}); name a file in a folder that exists and is "
            "writable."
        ) from None
