"""The audit log: whatever is changed, taken out, put in, moved or cut off is found, and found where it is."""

import hashlib
import json
import math
from dataclasses import replace
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mnemonic import Mnemonic

from hanse_common.errors import ConfigError, StorageError
from hanse_server.audit import GENESIS, MAX_FACTS, AuditBroken, AuditEntry, Head, link, verify

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 60), 1 << 60) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip
facts = st.dictionaries(st.text(max_size=6), values, max_size=3)
events = st.tuples(st.from_regex(r"[a-z0-9][a-z0-9._-]{0,62}", fullmatch=True), facts, st.floats(0, 4e9))
few = settings(max_examples=40)
logs = st.lists(events, min_size=1, max_size=6)


def chained(written: list[tuple[str, dict[str, Any], float]]) -> list[AuditEntry]:
    entries: list[AuditEntry] = []
    for kind, told, time in written:
        entries.append(link(entries[-1] if entries else None, kind, told, time))
    return entries


def first_bad(entries: list[AuditEntry], head: Head | None = None) -> int:
    with pytest.raises(AuditBroken) as broken:
        verify(entries, head)
    assert f"entry {broken.value.sequence}:" in str(broken.value)
    return broken.value.sequence


@few
@given(logs)
def test_what_was_written_verifies_and_reads_as_it_was_told(
    written: list[tuple[str, dict[str, Any], float]],
) -> None:
    entries = chained(written)
    assert verify(entries) == verify(entries, Head.of(entries[-1])) == len(written)
    assert [json.loads(entry.facts) for entry in entries] == [told for _, told, _ in written]
    assert [(entry.kind, entry.time) for entry in entries] == [(kind, time) for kind, _, time in written]


def test_no_entries_are_a_whole_log_unless_a_head_was_noted() -> None:
    assert verify([]) == 0
    head = Head.of(link(None, "begun", {}, 0.0))
    assert first_bad([], head) == 1


def test_a_hash_can_be_computed_from_the_description_alone() -> None:
    entry = link(None, "round", {"b": [1, 2.5], "a": "é\x00"}, 12.0)
    assert entry.facts == '{"a":"\\u00e9\\u0000","b":[1,2.5]}'
    assert hashlib.sha256(b"hanse audit genesis 1\0").hexdigest() == GENESIS
    body = msgpack.packb([1, 12.0, "round", entry.facts, GENESIS])
    assert entry.hash == hashlib.sha256(b"hanse audit entry 1\0" + body).hexdigest()


changes = st.one_of(
    st.builds(lambda value: ("sequence", value), st.integers(-3, 9)),
    st.builds(lambda value: ("time", value), st.floats() | st.integers(0, 9) | st.none()),
    st.builds(lambda value: ("kind", value), st.text(max_size=5)),
    st.builds(lambda value: ("facts", value), st.text(max_size=9) | st.just("{}") | st.just("null")),
    st.builds(lambda value: ("previous", value), st.text(max_size=5) | st.just(GENESIS)),
    st.builds(lambda value: ("hash", value), st.text(max_size=5) | st.just(GENESIS)),
)


def same(one: object, other: object) -> bool:
    return type(one) is type(other) and one == other and str(one) == str(other)


@few
@given(logs, st.data(), changes)
def test_any_change_is_found_at_its_entry(
    written: list[tuple[str, dict[str, Any], float]], data: st.DataObject, change: tuple[str, Any]
) -> None:
    entries = chained(written)
    place = data.draw(st.integers(0, len(entries) - 1))
    name, value = change
    if not same(getattr(entries[place], name), value):
        changed = [*entries]
        changed[place] = replace(entries[place], **{name: value})
        assert first_bad(changed) == place + 1


@few
@given(logs, st.data())
def test_a_changed_entry_whose_hash_was_made_to_fit_breaks_the_next(
    written: list[tuple[str, dict[str, Any], float]], data: st.DataObject
) -> None:
    entries = chained(written)
    place = data.draw(st.integers(0, len(entries) - 1))
    forged = link(entries[place - 1] if place else None, "forged", {}, 0.0)
    changed = [*entries[:place], forged, *entries[place + 1 :]]
    if place + 1 < len(entries):
        assert first_bad(changed) == place + 2
    else:
        assert verify(changed) == len(entries)  # alone, a chain cannot show it ...
        assert first_bad(changed, Head.of(entries[-1])) == place + 1  # ... a noted head does


@few
@given(logs, st.data())
def test_an_entry_taken_out_is_missed(
    written: list[tuple[str, dict[str, Any], float]], data: st.DataObject
) -> None:
    entries = chained(written)
    place = data.draw(st.integers(0, len(entries) - 1))
    left = entries[:place] + entries[place + 1 :]
    assert first_bad(left, Head.of(entries[-1])) == place + 1
    if place + 1 < len(entries):
        assert first_bad(left) == place + 1


@few
@given(logs, events, st.data())
def test_an_entry_put_in_is_found(
    written: list[tuple[str, dict[str, Any], float]],
    extra: tuple[str, dict[str, Any], float],
    data: st.DataObject,
) -> None:
    entries = chained(written)
    place = data.draw(st.integers(0, len(entries) - 1))
    forged = link(entries[place - 1] if place else None, *extra)
    if forged != entries[place]:
        assert first_bad([*entries[:place], forged, *entries[place:]]) == place + 2


@few
@given(logs.filter(lambda written: len(written) > 1), st.data())
def test_entries_that_were_swapped_are_found(
    written: list[tuple[str, dict[str, Any], float]], data: st.DataObject
) -> None:
    entries = chained(written)
    one, other = sorted(
        data.draw(
            st.lists(st.integers(0, len(entries) - 1), min_size=2, max_size=2, unique=True), label="swapped"
        )
    )
    entries[one], entries[other] = entries[other], entries[one]
    assert first_bad(entries) == one + 1


@few
@given(logs, st.data())
def test_a_log_that_was_cut_off_misses_its_noted_head_and_one_that_grew_does_not(
    written: list[tuple[str, dict[str, Any], float]], data: st.DataObject
) -> None:
    entries = chained(written)
    kept = data.draw(st.integers(0, len(entries) - 1))
    assert first_bad(entries[:kept], Head.of(entries[-1])) == kept + 1
    assert verify(entries, Head.of(entries[kept])) == len(entries)


def test_numbers_that_do_not_count_up_are_found_though_the_hashes_fit() -> None:
    ninth = link(replace(link(None, "a", {}, 1.0), sequence=8, hash=GENESIS), "b", {}, 2.0)
    assert (ninth.sequence, ninth.previous, ninth.computed()) == (9, GENESIS, ninth.hash)
    assert first_bad([ninth]) == 1


def test_a_log_written_anew_is_not_the_one_that_was_noted() -> None:
    noted = Head.of(chained([("a", {}, 1.0), ("b", {}, 2.0)])[1])
    anew = chained([("a", {}, 1.0), ("c", {}, 2.0), ("b", {}, 2.0)])
    assert first_bad(anew, noted) == 2


def test_a_head_reads_as_twelve_words_of_the_hash_and_comes_back_from_what_was_typed() -> None:
    entry = link(None, "begun", {}, 0.0)
    head = Head.of(entry)
    assert str(head) == "1 " + Mnemonic("english").to_mnemonic(bytes.fromhex(entry.hash)[:16])
    assert Head.parse(str(head)) == Head.parse(f"  {str(head).upper().replace(' ', '  ')}\n") == head


@pytest.mark.parametrize(
    "text", ["", "12", "0 " + "a " * 12, "1 " + "a " * 11, "one " + "a " * 12, "1 " * 500]
)
def test_what_is_no_head_is_said_to_be_none(text: str) -> None:
    with pytest.raises(ConfigError, match="a number and twelve words"):
        Head.parse(text)


@pytest.mark.parametrize(
    ("kind", "told", "time"),
    [
        ("", {}, 0.0),
        ("Round", {}, 0.0),
        ("round\n", {}, 0.0),
        ("r" * 64, {}, 0.0),
        ("round", {"x": math.nan}, 0.0),
        ("round", {"x": b"bytes"}, 0.0),
        ("round", {1: "a", "1": "b"}, 0.0),
        ("round", {"x": "y" * MAX_FACTS}, 0.0),
        ("round", {}, math.inf),
    ],
)
def test_what_cannot_be_written_down_is_refused(kind: str, told: Any, time: float) -> None:
    with pytest.raises(ValueError, match="found"):
        link(None, kind, told, time)


def test_a_broken_log_is_a_fault_of_the_storage() -> None:
    assert issubclass(AuditBroken, StorageError)
