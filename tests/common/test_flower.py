"""Bytes in Flower's records, and what is refused to be one."""

from typing import Any

import pytest

from hanse_common.errors import WireError
from hanse_common.flower import ENTRY, RECORD, from_record, to_record

# isort: split
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict


@pytest.mark.parametrize("data", [b"", b"\x00\xff", bytes(range(256)) * 4])
def test_bytes_come_back_as_they_were(data: bytes) -> None:
    record = to_record(data)
    assert from_record(record, len(data)) == data
    # One record and one entry: Flower sends each record as an object of its own.
    assert [len(record), len(record[RECORD])] == [1, 1]


def test_one_byte_over_the_bound_is_refused() -> None:
    with pytest.raises(WireError, match="found 5 bytes, expected at most 4"):
        from_record(to_record(b"12345"), 4)


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"other": ConfigRecord({ENTRY: b"x"})}),
        RecordDict({RECORD: ConfigRecord({ENTRY: b"x"}), "more": ConfigRecord({})}),
        RecordDict({RECORD: ConfigRecord({})}),
        RecordDict({RECORD: ConfigRecord({"other": b"x"})}),
        RecordDict({RECORD: ConfigRecord({ENTRY: b"x", "more": 1})}),
        RecordDict({RECORD: ConfigRecord({ENTRY: "x"})}),
        RecordDict({RECORD: ConfigRecord({ENTRY: [b"x"]})}),
        RecordDict({RECORD: MetricRecord({ENTRY: 1})}),
        RecordDict({RECORD: ArrayRecord({ENTRY: Array("uint8", (1,), "raw", b"x")})}),
    ],
    ids=lambda content: "-".join(f"{key}:{type(value).__name__}" for key, value in content.items()),
)
def test_any_other_content_is_refused(content: Any) -> None:
    with pytest.raises(WireError, match="A Flower message: "):
        from_record(content, 100)


def test_a_refusal_never_quotes_what_was_sent() -> None:
    with pytest.raises(WireError) as refusal:
        from_record(RecordDict({RECORD: ConfigRecord({ENTRY: "a secret"})}), 100)
    assert "secret" not in str(refusal.value)
