"""One file with all records and objects, whatever database they are in; and back.

    write_backup(state, Path("hanse-2026-11-26.tar"))
    read_backup(empty_state, Path("hanse-2026-11-26.tar"))

All tables are read in one transaction, so that a backup made while the server runs is one moment. It is an ordinary tar
file: `backup.json`, then `tables/NAME.jsonl`, a record a line, then `objects/DIGEST`. No key is in it.

What was done after the backup is forgotten by it, not by the merchants. So restoring leaves out `SKIPPED_ATTEMPTS`
numbers of attempts: those that were used since must not be used again, or merchants would decline.
"""

import base64
import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import LargeBinary, Table, func, insert, select

from hanse_common.errors import StorageError
from hanse_server.storage.audit_log import append
from hanse_server.storage.database import newest
from hanse_server.storage.objects import MAX_OBJECT_BYTES
from hanse_server.storage.schema import AttemptRecord, Record
from hanse_server.storage.state import State

FORMAT = 1
MAX_TABLE_BYTES = 1 << 32
SKIPPED_ATTEMPTS = 100_000
TRIES = 3


def write_backup(state: State, path: Path) -> int:
    """Write everything in `state` to the new file `path`, and return how many records that is.

    Raises `StorageError` when something is damaged, or `path` can't be written.
    """
    for last in range(TRIES - 1, -1, -1):
        with state.database.transaction() as session:
            tables = {
                table.name: [dict(row) for row in session.execute(select(table)).mappings()]
                for table in Record.metadata.sorted_tables
            }
        try:
            objects = {digest: state.objects.get(digest) for digest in sorted(state.named(tables))}
            break
        except StorageError:
            if not last:  # else the server replaced a checkpoint just now
                raise
    partial = path.with_name(f".{path.name}.partial")
    try:
        with tarfile.open(partial, "w") as tar:
            header = {
                "format": FORMAT,
                "schema": newest(),
                "tables": {name: len(rows) for name, rows in tables.items()},
            }
            _add(tar, "backup.json", json.dumps(header).encode())
            for name, rows in tables.items():
                _add(tar, f"tables/{name}.jsonl", b"".join(_line(row) for row in rows))
            for digest, data in objects.items():
                _add(tar, f"objects/{digest}", data)
        partial.chmod(0o600)
        partial.rename(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise StorageError(f"{path}: cannot be written ({error.strerror}).") from None
    return sum(map(len, tables.values()))


def read_backup(state: State, path: Path) -> int:
    """Bring the backup `path` into `state`, which must be empty, and return how many records that is.

    Raises `StorageError` when the state is not empty, or the file is not a whole backup of this release's schema; the
    state is then empty still.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            header = json.loads(_member(tar, "backup.json", 1 << 20))
            if header.get("format") != FORMAT or header.get("schema") != newest():
                raise StorageError(
                    f"{path}: found a backup of schema {header.get('schema')!r:.40}, this release has {newest()}; "
                    "restore it with the release that made it, then hanse-server migrate."
                )
            tables = {table: _rows(tar, table) for table in Record.metadata.sorted_tables}
            needed = state.named({table.name: rows for table, rows in tables.items()})
            for digest in sorted(needed):
                data = _member(tar, f"objects/{digest}", MAX_OBJECT_BYTES)
                if hashlib.sha256(data).hexdigest() != digest:
                    raise StorageError(f"{path}: objects/{digest} is damaged.")
                state.objects.put(data)
    except (tarfile.TarError, OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise StorageError(f"{path}: found no whole backup ({type(error).__name__}); name another.") from None
    with state.database.transaction() as session:
        for table in tables:
            if session.scalar(select(func.count()).select_from(table)):
                raise StorageError(
                    f"{state.database.name}: holds records already; name an empty storage and state folder."
                )
        for table, rows in tables.items():
            if rows:
                session.execute(insert(table), rows)
        for plan, last in session.execute(
            select(AttemptRecord.plan, func.max(AttemptRecord.number)).group_by(AttemptRecord.plan)
        ).all():
            now = state.database.clock()
            session.add(
                AttemptRecord(plan=plan, number=last + SKIPPED_ATTEMPTS, state="lost", begun=now, ended=now)
            )
        append(session, state.database.clock(), "restored", {"records": sum(map(len, tables.values()))})
    return sum(map(len, tables.values()))


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(data), 0o600
    tar.addfile(entry, io.BytesIO(data))


def _member(tar: tarfile.TarFile, name: str, max_bytes: int) -> bytes:
    entry = tar.getmember(name)
    file = tar.extractfile(entry)
    if file is None or entry.size > max_bytes:
        raise KeyError(name)
    return file.read()


def _line(row: dict[str, Any]) -> bytes:
    plain = {
        name: {"base64": base64.b64encode(value).decode()} if isinstance(value, bytes) else value
        for name, value in row.items()
    }
    return json.dumps(plain, sort_keys=True).encode() + b"\n"


def _rows(tar: tarfile.TarFile, table: Table) -> list[dict[str, Any]]:
    return list(_parsed(table, _member(tar, f"tables/{table.name}.jsonl", MAX_TABLE_BYTES)))


def _parsed(table: Table, data: bytes) -> Iterator[dict[str, Any]]:
    for line in data.splitlines():
        row = json.loads(line)
        if set(row) != {column.name for column in table.columns}:
            raise ValueError(table.name)
        for column in table.columns:
            if isinstance(column.type, LargeBinary) and row[column.name] is not None:
                row[column.name] = base64.b64decode(row[column.name]["base64"], validate=True)
        yield row
