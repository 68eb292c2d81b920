"""The log: each line one object, whatever strangers write; nothing of theirs, and nothing of libraries', in it."""

import io
import json
import logging
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hanse_common.errors import ConfigError, RoundFailed
from hanse_server import logs
from hanse_server.logs import JsonLines, Lines, configure, emit

LOG = logging.getLogger("hanse_server.test")


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    root, ours = logging.getLogger(), [logging.getLogger(name) for name in logs.OURS]
    handlers, levels = list(root.handlers), [found.level for found in ours]
    yield
    for handler in [handler for handler in root.handlers if handler not in handlers]:
        root.removeHandler(handler)
        handler.close()
    for found, level in zip(ours, levels, strict=True):
        found.setLevel(level)


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What reaches standard error as JSON."""
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    configure("json")
    return stream


def objects(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_says_when_how_bad_who_what_and_the_facts(lines: io.StringIO) -> None:
    emit(LOG, "round", "Round 3.", round=3, uploaded=("alder", "birch"), seconds=1.5, late=None, done=True)
    (line,) = objects(lines)
    assert list(line) == ["time", "level", "logger", "event", "text", "fields"]
    assert line["time"].endswith("Z")
    assert abs(datetime.fromisoformat(line["time"]).timestamp() - datetime.now().timestamp()) < 60
    assert (line["level"], line["logger"], line["event"]) == ("info", "hanse_server.test", "round")
    assert line["text"] == "Round 3."
    told = {"round": 3, "uploaded": ["alder", "birch"], "seconds": 1.5, "late": None, "done": True}
    assert line["fields"] == told


def test_an_ordinary_call_of_logging_is_a_line_too(lines: io.StringIO) -> None:
    logging.getLogger("hanse_server.stream").warning("A stream from %s was refused.", "192.0.2.1")
    (line,) = objects(lines)
    assert (line["event"], line["text"]) == ("message", "A stream from 192.0.2.1 was refused.")


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.sets(st.text()),
    max_leaves=10,
)


@example("\x7f", "\x00\x85\u2028\u202e\ud800", {"\n": "\x1b[2J"})
@given(st.text(), st.text(), st.dictionaries(st.text(), anything, max_size=4))
def test_whatever_is_told_stays_one_line_of_printable_ascii(
    event: str, text: str, fields: dict[str, Any]
) -> None:
    extra = {"hanse_event": event, "hanse_fields": fields}
    # Not logged, as pytest keeps what is, and its report takes no lone surrogates.
    record = LOG.makeRecord(LOG.name, logging.INFO, __file__, 1, "%s", (text,), None, extra=extra)
    written = JsonLines().format(record)
    assert all(" " <= char <= "~" for char in written)
    assert json.loads(written)["logger"] == "hanse_server.test"


def test_a_line_for_people_cannot_be_forged(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    configure("text")
    emit(LOG, "round", "a\n2026-01-01 info all is well\x1b[2J\u202e\x85", name="b\r\n\x7f")
    written = stream.getvalue()
    assert written.count("\n") == 1
    assert written[:-1].isprintable()
    assert "round: a\\n2026" in written


class Photo:
    def __repr__(self) -> str:
        return "SECRET"


def test_payloads_and_objects_are_named_and_never_shown(lines: io.StringIO) -> None:
    emit(LOG, "upload", vector=b"SECRET" * 9, update=np.full(3, 7.25), photo=Photo(), deep=[[[[["SECRET"]]]]])
    written = lines.getvalue()
    assert "SECRET" not in written and "7.25" not in written
    fields = objects(lines)[0]["fields"]
    assert (fields["vector"], fields["update"], fields["photo"]) == ("<54 bytes>", "<ndarray>", "<Photo>")


def test_a_strangers_length_is_bounded(lines: io.StringIO) -> None:
    emit(LOG, "x", "y" * 1_000_000, names=["n" * 1_000_000] * 3, many=list(range(100_000)))
    assert len(lines.getvalue()) < 6 * logs.MAX_TEXT + 8 * logs.MAX_ITEMS


def test_an_error_of_ours_tells_its_reason_and_any_other_only_type_and_place(lines: io.StringIO) -> None:
    for error in (RoundFailed("Round 3 failed."), ValueError("SECRET")):
        try:
            raise error
        except (RoundFailed, ValueError):
            LOG.exception("It failed.")
    ours, other = (line["fields"] for line in objects(lines))
    assert (ours["error"], ours["reason"]) == ("RoundFailed", "Round 3 failed.")
    assert other["error"] == "ValueError"
    assert "test_logs:" in other["trace"][-1]
    assert "SECRET" not in lines.getvalue()


def test_libraries_are_heard_from_warnings_on_without_their_words(lines: io.StringIO) -> None:
    library = logging.getLogger("some.library")
    library.setLevel(logging.DEBUG)
    library.info("SECRET")
    assert not lines.getvalue()
    library.warning("found %s", "SECRET")
    (line,) = objects(lines)
    assert (line["event"], line["logger"], line["text"]) == ("library", "some.library", "")
    assert line["fields"]["at"].startswith("test_logs:")
    assert "SECRET" not in lines.getvalue()


def test_the_level_is_of_our_own_loggers(lines: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", lines)  # pytest has put its own there
    configure("json", level=logging.WARNING)
    emit(LOG, "quiet")
    emit(LOG, "loud", level=logging.ERROR)
    assert [line["event"] for line in objects(lines)] == ["loud"]


def test_configured_twice_it_says_everything_once(
    lines: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", lines)
    configure("json")
    emit(LOG, "once")
    assert len(objects(lines)) == 1


def test_flower_and_uvicorn_stay_quiet(lines: io.StringIO) -> None:
    from hanse_server.flower_link import _quiet

    _quiet()
    logging.getLogger("flwr").error("SECRET")
    assert not lines.getvalue()


def test_a_file_is_private_and_rotates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "ROTATE_BYTES", 2000)
    path = tmp_path / "server.log"
    configure("json", path)
    for number in range(200):
        emit(LOG, "round", number=number)
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["server.log", *(f"server.log.{place}" for place in range(1, 6))]
    for file in files:
        assert file.stat().st_mode & 0o777 == 0o600
        assert file.stat().st_size <= 2000
    newest = json.loads(path.read_text().splitlines()[-1])
    assert newest["fields"]["number"] == 199


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere/server\.log: the log cannot be written"):
        configure("json", tmp_path / "nowhere" / "server.log")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_full_disk_is_said_once_and_stops_nobody(capfd: pytest.CaptureFixture[str]) -> None:
    configure("json", Path("/dev/full"))
    for _ in range(3):
        emit(LOG, "round")
    configure("json")
    assert capfd.readouterr().err.count("The log cannot be written (No space left on device)") == 1


def test_both_forms_say_the_same() -> None:
    record = logging.LogRecord("hanse_server.x", logging.INFO, "x.py", 1, "text %d", (3,), None)
    said = json.loads(JsonLines().format(record))
    people = Lines().format(record)
    assert all(part in people for part in (said["time"], said["level"], said["logger"], "message: text 3"))
