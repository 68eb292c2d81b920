"""One file with all records and objects, whatever database they are in; and back.

    write_backup(state, Path("hanse-2026-11-26.tar"))
    read_backup(empty_state, Path("hanse-2026-11-26.tar"))

All tables are read at one moment, and what a training may replace is opened then, so a backup made while the server
runs is one moment of it. It is an ordinary tar file: `backup.json`, then `tables/NAME.jsonl`, a record a line, then
`objects/DIGEST`. Equal states give equal bytes. No key is in it.

What was done after the backup is forgotten by it, not by the merchants. So restoring leaves out `SKIPPED_ATTEMPTS`
numbers of attempts: those that were used since must not be used again, or merchants would decline. Rounds that were run
since must be left out, too, as merchants have paid for them (`Progress.leave_out`).
"""

import base64
import hashlib
import io
import json
import os
import tarfile
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

from sqlalchemy import func, insert, select, text, update
from sqlalchemy.exc import DataError, IntegrityError
from sqlalchemy.orm import Session

from hanse_common.errors import StorageError
from hanse_server.storage.audit_log import append
from hanse_server.storage.backup_rows import Rows, parsed, require_named
from hanse_server.storage.objects import MAX_OBJECT_BYTES
from hanse_server.storage.schema import AttemptRecord, PlanRecord, Record
from hanse_server.storage.scripts import newest
from hanse_server.storage.state import State

FORMAT = 1
HEADER = "backup.json"
MAX_HEADER_BYTES = 1 << 20
MAX_TABLE_BYTES = 1 << 30
CHUNK_BYTES = 1 << 20
SKIPPED_ATTEMPTS = 100_000
MAX_ATTEMPT = (1 << 31) - 1
TRIES = 200


def write_backup(state: State, path: Path) -> int:
    """Write everything in `state` to the new file `path`, for its owner alone, and return how many records that is.

    Raises `StorageError` when something is damaged, or `path` is there or can't be written.
    """
    if path.exists():
        raise StorageError(f"{path}: there is a file already; name another.")
    with ExitStack() as opened:
        tables, replaced = _moment(state, opened)
        needed = sorted(state.named(tables))
        count = sum(map(len, tables.values()))
        try:
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            partial = Path(name)
            opened.callback(partial.unlink, missing_ok=True)
            with os.fdopen(handle, "wb") as file:
                with tarfile.open(fileobj=file, mode="w") as tar:
                    _add(tar, HEADER, _header(tables, needed))
                    for table, rows in tables.items():
                        _add(tar, f"tables/{table}.jsonl", b"".join(_line(row) for row in rows))
                    for digest in needed:
                        with ExitStack() as one:
                            source = replaced.get(digest) or one.enter_context(state.objects.open(digest))
                            _add_object(tar, digest, source)
                file.flush()
                os.fsync(file.fileno())
            partial.rename(path)
        except OSError as error:
            raise StorageError(f"{path}: cannot be written ({error.strerror or error}).") from None
    return count


def read_backup(state: State, path: Path) -> int:
    """Bring the backup `path` into `state`, which must be empty, and return how many records that is.

    Raises `StorageError` when the state is not empty, or the file is not a whole backup of this release's schema; the
    state is then empty still.
    """
    with state.database.reading() as session:
        _require_empty(session, state)
    try:
        with tarfile.open(path, "r:") as tar:
            return _restored(state, path, tar)
    except (
        tarfile.TarError,
        OSError,
        KeyError,
        ValueError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:
        raise StorageError(f"{path}: found no whole backup ({_why(error)}); name another.") from None


def _restored(state: State, path: Path, tar: tarfile.TarFile) -> int:
    members = _members(tar, path.stat().st_size)
    header = json.loads(_read(tar, members[HEADER]))
    if header["format"] != FORMAT or header["schema"] != newest():
        raise StorageError(
            f"{path}: found a backup of schema {header['schema']!r:.40}, this release has {newest()}; restore it with "
            "the release that made it, then hanse-server migrate."
        )
    tables: Rows = {
        table.name: list(parsed(table, _file(tar, members[f"tables/{table.name}.jsonl"])))
        for table in Record.metadata.sorted_tables
    }
    require_named(tables)
    needed = state.named(tables)
    if header != json.loads(_header(tables, sorted(needed))):
        raise ValueError("its records are not as many as it says")
    if needed != {name.removeprefix("objects/") for name in members if name.startswith("objects/")}:
        raise ValueError("its objects are not those that its records name")
    for digest in sorted(needed):  # all of them, before the first is kept
        if _digest(_file(tar, members[f"objects/{digest}"])) != digest:
            raise StorageError(f"{path}: objects/{digest} is damaged; name another backup.")
    added = needed - set(state.objects.present())
    try:
        for digest in sorted(needed):
            if state.objects.put(_read(tar, members[f"objects/{digest}"])) != digest:
                raise ValueError("it changed while it was read")
        with state.database.transaction() as session:
            _require_empty(session, state)
            try:
                for table in Record.metadata.sorted_tables:
                    if tables[table.name]:
                        session.execute(insert(table), tables[table.name])
            except (IntegrityError, DataError):
                raise StorageError(f"{path}: its records do not fit together; name another backup.") from None
            count = sum(map(len, tables.values()))
            now = state.database.clock()
            _skip_attempts(session, now)
            _go_on_counting(session)
            append(session, now, "restored", {"records": count})
    except BaseException:
        state.objects.drop(added)
        raise
    return count


def _moment(state: State, opened: ExitStack) -> tuple[Rows, dict[str, BinaryIO]]:
    """Return all records at one moment, and the open files of what a training may replace after it."""
    before: Rows | None = None
    for _ in range(TRIES):
        with state.database.reading() as session:
            tables: Rows = {
                table.name: [
                    dict(row)
                    for row in session.execute(select(table).order_by(*table.primary_key)).mappings()
                ]
                for table in Record.metadata.sorted_tables
            }
        lasting = state.named({**tables, "checkpoint": [], "round": []})
        try:
            with ExitStack() as now:
                files = {
                    digest: now.enter_context(state.objects.open(digest))
                    for digest in state.named(tables) - lasting
                }
                opened.enter_context(now.pop_all())
                return tables, files
        except StorageError:
            if tables == before:  # else the training replaced something just now
                raise
            before = tables
    raise StorageError(f"{state.folder}: changes too fast for a backup; try again.")


def _require_empty(session: Session, state: State) -> None:
    for table in Record.metadata.sorted_tables:
        if session.scalar(select(func.count()).select_from(table)):
            raise StorageError(
                f"{state.database.name}: holds records already; name an empty storage and state folder."
            )


def _skip_attempts(session: Session, now: float) -> None:
    """End all attempts, and leave out numbers that may have been used since, of plans without any as well."""
    for state, after in (("begun", "lost"), ("released", "spent")):
        ended = update(AttemptRecord).where(AttemptRecord.state == state)
        session.execute(ended.values(state=after, ended=now))
    of_plan = select(func.max(AttemptRecord.number)).where(AttemptRecord.plan == PlanRecord.digest)
    wanted = select(PlanRecord.digest, of_plan.scalar_subquery())
    for plan, last in session.execute(wanted).all():
        number = SKIPPED_ATTEMPTS + (0 if last is None else last)
        if number >= MAX_ATTEMPT:
            raise ValueError("its attempts are used up")
        session.add(AttemptRecord(plan=plan, number=number, state="lost", begun=now, ended=now))


def _go_on_counting(session: Session) -> None:
    """Let the numbers that PostgreSQL gives follow those that were restored. SQLite's do anyway."""
    if session.get_bind().dialect.name != "postgresql":
        return
    for table in ("run", "evaluation"):
        session.execute(
            text(
                f"SELECT setval(pg_get_serial_sequence('{table}', 'number'), max(number)) "  # noqa: S608 - our own names
                f"FROM {table} HAVING count(*) > 0"
            )
        )


def _header(tables: Mapping[str, Any], objects: list[str]) -> bytes:
    header = {
        "format": FORMAT,
        "schema": newest(),
        "tables": {name: len(rows) for name, rows in tables.items()},
        "objects": len(objects),
    }
    return json.dumps(header).encode()


def _line(row: dict[str, Any]) -> bytes:
    plain = {
        name: {"base64": base64.b64encode(value).decode()} if isinstance(value, bytes) else value
        for name, value in row.items()
    }
    return json.dumps(plain, sort_keys=True, allow_nan=False).encode() + b"\n"


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    tar.addfile(_entry(name, len(data)), io.BytesIO(data))


def _add_object(tar: tarfile.TarFile, digest: str, file: BinaryIO) -> None:
    if _digest(file) != digest:
        raise StorageError(f"object {digest}: its content is damaged; restore an earlier backup.")
    file.seek(0)
    tar.addfile(_entry(f"objects/{digest}", os.fstat(file.fileno()).st_size), file)


def _entry(name: str, size: int) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = size, 0o600
    return entry


def _members(tar: tarfile.TarFile, file_bytes: int) -> dict[str, tarfile.TarInfo]:
    """Return the entries by name, once each is a plain file of a name and size that a backup has."""
    bounds = {HEADER: MAX_HEADER_BYTES}
    bounds |= {f"tables/{table}.jsonl": MAX_TABLE_BYTES for table in Record.metadata.tables}
    found: dict[str, tarfile.TarInfo] = {}
    for entry in tar:
        limit = bounds.get(entry.name, MAX_OBJECT_BYTES if entry.name.startswith("objects/") else -1)
        if entry.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or entry.issparse():
            raise ValueError("an entry in it is no plain file")
        if not 0 <= entry.size <= limit or entry.offset_data + entry.size > file_bytes:
            raise ValueError("an entry in it is none of a backup, or too long")
        if entry.name in found:
            raise ValueError("an entry in it is there twice")
        found[entry.name] = entry
    return found


def _file(tar: tarfile.TarFile, entry: tarfile.TarInfo) -> BinaryIO:
    file = tar.extractfile(entry)
    if file is None:
        raise KeyError(entry.name)
    return file  # type: ignore[return-value]  # tarfile promises the reading half alone


def _read(tar: tarfile.TarFile, entry: tarfile.TarInfo) -> bytes:
    return _file(tar, entry).read()


def _digest(file: BinaryIO) -> str:
    hasher = hashlib.sha256()
    while chunk := file.read(CHUNK_BYTES):
        hasher.update(chunk)
    return hasher.hexdigest()


def _why(error: BaseException) -> str:
    """Return what is wrong with a backup, where that is our own word; a hostile file's text is not repeated."""
    return str(error) if type(error) is ValueError and len(str(error)) < 100 else type(error).__name__
