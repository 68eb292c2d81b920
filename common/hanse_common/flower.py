"""Our messages as Flower carries them: one `ConfigRecord` with one entry of bytes.

    message = Message(to_record(wire.encode(assignment)), dst_node_id=node, message_type="train")
    assignment = wire.decode(Assignment, from_record(message.content, MAX_DOCUMENT_BYTES))

One entry costs the fewest of Flower's objects and requests; arrays would be an object each.
"""

from flwr.app import ConfigRecord, RecordDict

from hanse_common.errors import WireError

RECORD = "hanse"
ENTRY = "message"


def to_record(data: bytes) -> RecordDict:
    """Return the Flower content that carries `data`."""
    return RecordDict({RECORD: ConfigRecord({ENTRY: data})})


def from_record(content: RecordDict, max_bytes: int) -> bytes:
    """Return the bytes in `content`, which may come from anyone. Raises `WireError` unless it is `to_record`'s."""
    record = content.get(RECORD)
    if len(content) != 1 or not isinstance(record, ConfigRecord) or set(record) != {ENTRY}:
        raise WireError(f"A Flower message: expected one record {RECORD!r} with one entry {ENTRY!r}.")
    data = record[ENTRY]
    if not isinstance(data, bytes):
        raise WireError(f"A Flower message: found an entry of type {type(data).__name__}, expected bytes.")
    if len(data) > max_bytes:
        raise WireError(f"A Flower message: found {len(data)} bytes, expected at most {max_bytes}.")
    return data
