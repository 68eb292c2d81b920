"""The lines of a backup's tables, held to the schema before a database sees them.

    rows = list(parsed(table, file))        # a mapping for each line
    require_named({"version": rows, ...})   # files' names and digests are such

A backup may come from anywhere. SQLite takes a text where a number belongs, and one of any length; PostgreSQL stops at
the first of them.
"""

import base64
import json
import math
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from sqlalchemy import JSON, Boolean, Column, Double, Float, Integer, LargeBinary, String, Table

MAX_LINE_BYTES = 1 << 24
_DIGEST = re.compile(r"[0-9a-f]{64}")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_LISTS = ("members", "connected")
"""The columns that hold lists of names; others of that type hold mappings."""

Rows = dict[str, list[dict[str, Any]]]


def parsed(table: Table, file: BinaryIO) -> Iterator[dict[str, Any]]:
    """Yield the rows in `file`, a JSON object a line. Raises `ValueError` for what does not belong into `table`."""
    names = {column.name for column in table.columns}
    while line := file.readline(MAX_LINE_BYTES):
        if not line.endswith(b"\n"):
            raise ValueError(f"a line of {table.name} has no end")
        row = json.loads(line)
        if not isinstance(row, dict) or set(row) != names:
            raise ValueError(f"a line of {table.name} has other fields")
        yield {column.name: _value(column, row[column.name]) for column in table.columns}


def require_named(tables: Rows) -> None:
    """Raise `ValueError` unless what names objects and files does so by digests and plain names."""
    named = [(row["object"],) for row in tables["checkpoint"]]
    named += [(row["update"],) for row in tables["round"]]
    named += [tuple(row["start"].values()) for row in tables["plan"]]
    named += [tuple(row["files"].values()) for row in tables["version"]]
    if not all(isinstance(one, str) and _DIGEST.fullmatch(one) for digests in named for one in digests):
        raise ValueError("an object's name in it is no digest")
    if not all(_FILE.fullmatch(name) for row in tables["version"] for name in row["files"]):
        raise ValueError("a file's name in it is no plain name")


def _value(column: Column[Any], value: Any) -> Any:
    if value is None and column.nullable:
        return None
    kind = column.type
    found: Any = None
    match kind:
        case Boolean():
            found = value if isinstance(value, bool) else None
        case Integer():
            fits = isinstance(value, int) and not isinstance(value, bool) and -1 <= value < 1 << 31
            found = value if fits else None
        case Double() | Float():
            fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            found = float(value) if fits else None
        case LargeBinary():
            found = base64.b64decode(value["base64"], validate=True)
        case JSON() if column.name in _LISTS:
            texts = isinstance(value, list) and all(isinstance(one, str) for one in value)
            found = value if texts else None
        case JSON():
            found = value if isinstance(value, dict) else None
        case String():  # Text, too
            fits = isinstance(value, str) and len(value) <= (kind.length or MAX_LINE_BYTES)
            found = value if fits and "\0" not in value and _unicode(value) else None
    if found is None:
        raise ValueError(f"{column.table.name}.{column.name} holds something else")
    return found


def _unicode(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
