"""A hash-chained audit log: what the operator's server did, in an order that nobody can change unnoticed.

    first = link(None, "plan-signed", {"plan": plan.digest.hex()}, time.time())
    second = link(first, "round", {"round": 1, "uploaded": ["alder", "birch"]}, time.time())
    verify([first, second])                            # 2
    head = Head.of(second)
    print(head)                                        # "2 abandon amount liar amount expire …", to be noted down
    verify([first], Head.parse(noted))                 # AuditBroken: the log ends after entry 1, …

Each entry carries the hash of the one before, so that an entry changed, taken out, put in or moved breaks the chain at
that place. The hash of an entry is the SHA-256 of

    "hanse audit entry 1" ‖ 0 ‖ MessagePack [sequence, time, kind, facts, previous]

with `facts` as canonical JSON and `previous` as 64 hexadecimal digits; before the first entry stands `GENESIS`. This
is the linear linking of Haber and Stornetta [1]. Integers are in MessagePack's shortest form, time is a 64-bit float.

**What a chain cannot show by itself** is that its last entries are missing, or that all of it was written anew. For
that somebody outside must remember its head: its length and the twelve words of its hash, 128 bits, on paper or with a
merchant.

This module knows neither files nor databases nor clocks.

[1] S. Haber, W. S. Stornetta: How to time-stamp a digital document. Journal of Cryptology 3, 1991.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import msgpack

from hanse_common.errors import ConfigError, StorageError
from hanse_common.fingerprint import words

_DOMAIN = b"hanse audit entry 1\0"

GENESIS = hashlib.sha256(b"hanse audit genesis 1\0").hexdigest()
"""What stands before the first entry, 64 hexadecimal digits."""

MAX_FACTS = 20_000
"""Bound of an entry's facts as canonical JSON, in characters, all of them ASCII."""

_KIND = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_HEAD = re.compile(r"([1-9][0-9]{0,17}) ((?:[a-z]+ ){11}[a-z]+)")


class AuditBroken(StorageError):
    """The log is not what was written. `sequence` is the first bad entry's place, from 1."""

    def __init__(self, sequence: int, found: str) -> None:
        super().__init__(
            f"audit log, entry {sequence}: {found} What stands before it is sound; keep the damaged log, and compare "
            "it with a backup."
        )
        self.sequence = sequence


@dataclass(frozen=True)
class AuditEntry:
    """One entry. `sequence` counts from 1, `time` is in seconds since 1970, hashes are 64 hexadecimal digits."""

    sequence: int
    time: float
    kind: str
    facts: str
    previous: str
    hash: str

    def computed(self) -> str:
        """Return the hash that belongs to the other fields."""
        return _hash(self.sequence, self.time, self.kind, self.facts, self.previous)


@dataclass(frozen=True)
class Head:
    """What to remember of a log: how many entries it has, and its last one's hash in twelve words."""

    sequence: int
    words: str

    @classmethod
    def of(cls, last: AuditEntry) -> Self:
        """Return the head of the log that ends with `last`."""
        return cls(last.sequence, words(bytes.fromhex(last.hash)))

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the head that `str` gave as `text`; case and spaces do not matter. Raises `ConfigError`."""
        found = _HEAD.fullmatch(" ".join(text.lower().split()))
        if found is None:
            raise ConfigError(
                f"Found {text[:60]!r}, expected the head of an audit log as it was printed: a number and twelve words."
            )
        return cls(int(found[1]), found[2])

    def __str__(self) -> str:
        return f"{self.sequence} {self.words}"


def link(previous: AuditEntry | None, kind: str, facts: Mapping[str, Any], time: float) -> AuditEntry:
    """Return the entry after `previous`, None before the first. `time` is in seconds since 1970.

    `kind` is a name of lower-case letters, digits, dots, dashes and underscores; `facts` are what JSON can say.

    Raises `ValueError` when kind, time or facts cannot be written down, or are over their bounds: whoever calls
    decides what is logged, and no text of a stranger's is.
    """
    if not _KIND.fullmatch(kind):
        raise ValueError(f"found the kind {kind[:80]!r}, expected a short name of lower-case letters")
    if not math.isfinite(time):
        raise ValueError(f"found the time {time}, expected seconds since 1970")
    try:
        text = _canonical(facts)
        same = _canonical(json.loads(text)) == text  # False for keys that are no texts
    except (TypeError, ValueError, RecursionError):
        same = False
    if not same:
        raise ValueError(
            "found facts that JSON cannot say, expected texts, numbers, lists and mappings by text"
        )
    if len(text) > MAX_FACTS:
        raise ValueError(f"found facts of {len(text)} characters, expected at most {MAX_FACTS}")
    sequence = 1 if previous is None else previous.sequence + 1
    before = GENESIS if previous is None else previous.hash
    time = float(time)
    return AuditEntry(sequence, time, kind, text, before, _hash(sequence, time, kind, text, before))


def verify(entries: Iterable[AuditEntry], head: Head | None = None) -> int:
    """Return how many `entries` there are, when they are a whole log in its order.

    With a `head` that was noted earlier the log must still have that entry; it may have grown since.

    Raises `AuditBroken` that names the first entry that is bad or missing.
    """
    count, before = 0, GENESIS
    for count, entry in enumerate(entries, start=1):
        if entry.sequence != count:
            raise AuditBroken(count, f"missing; found entry {entry.sequence} in its place.")
        if entry.previous != before:
            raise AuditBroken(count, "does not follow the entry before it.")
        if not _sound(entry):
            raise AuditBroken(count, "changed since it was written: its hash is another.")
        if head is not None and head.sequence == count and Head.of(entry) != head:
            raise AuditBroken(count, "is not the one whose words were noted: the log was written anew.")
        before = entry.hash
    if head is not None and head.sequence > count:
        raise AuditBroken(count + 1, f"missing; the head that was noted is of {head.sequence} entries.")
    return count


def _sound(entry: AuditEntry) -> bool:
    """Return whether the hash is the entry's own, whatever a damaged table may hold."""
    try:
        return entry.computed() == entry.hash
    except (ValueError, TypeError, OverflowError):
        return False


def _canonical(facts: Any) -> str:
    """Return `facts` as JSON: keys sorted, no spaces, ASCII, floats in their shortest form."""
    return json.dumps(facts, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def _hash(sequence: int, time: float, kind: str, facts: str, previous: str) -> str:
    body = msgpack.packb([sequence, time, kind, facts, previous], use_bin_type=True)
    return hashlib.sha256(_DOMAIN + body).hexdigest()
