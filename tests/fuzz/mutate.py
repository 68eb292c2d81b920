"""Changes to valid inputs, by a seed: bits and lengths, and the structure of MessagePack, JSON, safetensors and PNG.

    mutator = Mutator(random.Random(1), corpus, MESSAGEPACK)
    data = mutator.next()

Half of the work of a parser's attacker is to be wrong in one place and right in all others. So a tree is changed in
one place or a few and written again, with its lengths and checksums right; only then, at times, bytes are damaged.
"""

import functools
import json
import random
import struct
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import msgpack

MAX_BYTES = 1 << 16
"""Bound of what a mutator makes, in bytes; what is larger by design is among the bombs in `test_malicious_server`."""

INTEGERS = sorted(
    {
        sign * (1 << bits) + off
        for bits in (0, 7, 8, 15, 16, 31, 32, 63)
        for sign in (1, -1)
        for off in (-1, 0, 1)
    }
)
REALS = [0.0, -0.0, 1.0, -1.0, 0.5, 5e-324, 1e-9, 1e9, 1e300, float("inf"), float("-inf"), float("nan")]
TEXTS = [
    "",
    "a",
    "a" * 64,
    "../../etc/passwd",
    "/dev/zero",
    "\0",
    "\x1b[2J",
    "\u202e",
    "é",
    "e\u0301",
    "\U0001f600",
    "__class__",
    "localhost:1",
    "nan",
    "1e999",
    "x" * 5000,
]
DTYPES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "C64": 8,
    "X": 1,
}
"""Types of safetensors, and their bytes."""

Tree = Any
Dialect = Callable[[random.Random, bytes, bytes], bytes | None]
"""Returns a change of the first bytes, which may take a part from the second ones; None where it has no idea."""


class Mutator:
    """An endless source of inputs that are near those of `corpus`."""

    def __init__(self, rng: random.Random, corpus: Sequence[bytes], dialect: Dialect) -> None:
        self._rng = rng
        self._corpus = list(corpus)
        self._dialect = dialect

    def next(self) -> bytes:
        """Return the next input, at most `MAX_BYTES` bytes."""
        rng = self._rng
        data = rng.choice(self._corpus)
        for _ in range(1 if rng.random() < 0.7 else rng.randint(2, 5)):
            other = rng.choice(self._corpus)
            changed = self._dialect(rng, data, other) if rng.random() < 0.8 else None
            data = damaged(rng, data, other) if changed is None else changed
        return data[:MAX_BYTES]


# -- bytes --------------------------------------------------------------------------------------------------------


def damaged(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Return `data` with a bit, a piece or what may be a length changed."""
    size = len(data)
    at = rng.randrange(size + 1)
    piece = rng.choice((1, 2, 3, 4, 8, 16, 64))
    match rng.randrange(9):
        case 0 | 1 if at < size:
            return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        case 2:
            return data[:at]
        case 3:
            return data[:at] + data[at + piece :]
        case 4:
            return data[:at] + rng.randbytes(piece) + data[at:]
        case 5:
            start = rng.randrange(len(other) + 1)
            return data[:at] + other[start : start + rng.choice((piece, 256))] + data[at + piece :]
        case 6:
            return data[:at] + data[at : at + piece] * rng.choice((2, 3, 300)) + data[at + piece :]
        case 7:
            form = rng.choice(("<B", ">H", "<H", ">I", "<I", ">Q", "<Q"))
            width = struct.calcsize(form)
            number = rng.choice(INTEGERS) % (1 << 8 * width)
            return data[:at] + struct.pack(form, number) + data[at + width :]
    return data[:at] + rng.choice((b"\0", b"\xff", b"\x80")) * piece + data[at + piece :]


BYTES: Dialect = damaged


# -- trees --------------------------------------------------------------------------------------------------------


def changed_tree(rng: random.Random, tree: Tree, other: Tree) -> Tree:
    """Return `tree` with one of its nodes replaced; containers on the way are copied, nothing is changed in place."""
    if isinstance(tree, dict | list) and tree and rng.random() < 0.85:
        keys = list(tree) if isinstance(tree, dict) else range(len(tree))
        key = rng.choice(keys)
        copy = tree.copy()
        copy[key] = changed_tree(rng, tree[key], other)
        return copy
    return _instead(rng, tree, other)


def _instead(rng: random.Random, node: Tree, other: Tree) -> Tree:
    """Return something to stand where `node` stood: mostly of its type, at a border of it, or of another type."""
    choice = rng.random()
    if choice < 0.1:
        return rng.choice(_nodes(other))
    if choice < 0.25:
        return rng.choice((None, True, False, 0, -1, 0.5, "", b"", [], {}, [node], {"a": node}, [node] * 3))
    match node:
        case bool():
            return not node
        case int():
            return rng.choice(
                (rng.choice(INTEGERS), node + 1, node - 1, float(node % (1 << 64)), rng.getrandbits(31))
            )
        case float():
            return rng.choice(
                (
                    rng.choice(REALS),
                    -node,
                    node * 2,
                    node / 2,
                    node * 1.0000001,
                    int(node) if node == node and abs(node) < 1e9 else 0,
                )
            )
        case str():
            at = rng.randrange(len(node) + 1)
            return rng.choice(
                (rng.choice(TEXTS), node[:at], node + node, node[:at] + rng.choice(TEXTS) + node[at:])
            )
        case bytes():
            return _other_bytes(rng, node)
        case list():
            return _other_list(rng, node, _nodes(other))
        case dict():
            return _other_map(rng, node, _nodes(other))
    return rng.choice((0, "", b"", rng.choice(INTEGERS), rng.choice(REALS), rng.choice(TEXTS)))


def _other_bytes(rng: random.Random, node: bytes) -> Tree:
    start = node.find(b"\x93\x01", 0, 3)  # a message inside a message, or inside a frame
    if start >= 0 and rng.random() < 0.8 and (inner := messagepack(rng, node[start:], node[start:])):
        return node[:start] + inner
    return rng.choice(
        (
            damaged(rng, node, node),
            b"",
            bytes(len(node)),
            node + node,
            node[:-1],
            node + b"\0",
            bytes(32),
            bytes(64),
            b"\xff" * len(node),
        )
    )


def _other_list(rng: random.Random, node: list[Tree], others: list[Tree]) -> Tree:
    if not node:
        return [rng.choice(others)]
    at = rng.randrange(len(node))
    return rng.choice(
        (
            node[:at],
            node[:at] + node[at + 1 :],
            [*node[:at], *node[at - 1 :]],
            node[::-1],
            [*node, rng.choice(others)],
            node * rng.choice((2, 10)),
            rng.sample(node, len(node)),
            dict(enumerate(node)),
        )
    )


def _other_map(rng: random.Random, node: dict[Any, Tree], others: list[Tree]) -> Tree:
    if not node:
        return {rng.choice(TEXTS): rng.choice(others)}
    key = rng.choice(list(node))
    match rng.randrange(5):
        case 0:
            return {name: value for name, value in node.items() if name != key}
        case 1:
            return node | {rng.choice(TEXTS): rng.choice(others)}
        case 2:
            return dict(rng.sample(list(node.items()), len(node)))
        case 3:
            return {(f"{name}_" if name == key else name): value for name, value in node.items()}
    return list(node.values())


def _nodes(tree: Tree) -> list[Tree]:
    """Return some of the nodes of `tree`, itself among them."""
    found, border = [tree], [tree]
    while border and len(found) < 60:
        node = border.pop()
        children = list(node.values()) if isinstance(node, dict) else node if isinstance(node, list) else []
        found += children
        border += children
    return found


# -- MessagePack --------------------------------------------------------------------------------------------------

_LIES = [
    b"\xdd\xff\xff\xff\xff",
    b"\xdf\xff\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff",
    b"\xdb\x7f\xff\xff\xff",
    b"\xdc\xff\xff",
    b"\xde\x04\x01",
    b"\xc1",
    b"\xd4\x01\0",
    b"\xc9\xff\xff\xff\xff\x01",
    b"\xd6\xff\0\0\0\0",
    b"\xcc\x01",
    b"\xd1\0\x01",
    b"\xca\0\0\0\0",
    b"\xd9\x01a",
    b"\xc5\0\x01a",
    b"\x91" * 300,
    b"\x81\xa1a" * 300,
    b"\x90" * 1025,
    b"\xcf" + b"\xff" * 8,
]


@functools.lru_cache(4096)
def _unpacked(data: bytes) -> Tree:
    with suppress(ValueError, TypeError, RecursionError, msgpack.UnpackException):
        return msgpack.unpackb(data, strict_map_key=False, unicode_errors="replace")
    return None


def messagepack(rng: random.Random, data: bytes, other: bytes) -> bytes | None:
    """A `Dialect`: a value changed, or an item that lies about its length or is not in its shortest form."""
    if rng.random() < 0.15:
        at = rng.randrange(len(data) + 1)
        if rng.random() < 0.3:
            return data[:at] + b"\xcc" + data[at:]
        return data[:at] + rng.choice(_LIES) + data[at + rng.choice((0, 1, 1, 2, 5)) :]
    tree = _unpacked(data)
    if tree is None:
        return None
    with suppress(ValueError, TypeError, OverflowError, RecursionError, UnicodeError):
        packed: bytes = msgpack.packb(changed_tree(rng, tree, _unpacked(other)), use_bin_type=True)
        return packed
    return None


# -- JSON, and what begins with it --------------------------------------------------------------------------------

_JSON_LIES = [
    "[" * 3000,
    '{"a":' * 3000,
    "1e999",
    "-0",
    "NaN",
    "Infinity",
    '"\\ud800"',
    "1" * 400,
    "0x1",
    "'a'",
    "nul",
    '"\\u0000"',
    "//",
    ",",
]


@functools.lru_cache(1024)
def _loaded(data: bytes) -> Tree:
    with suppress(ValueError, RecursionError):
        return json.loads(data)
    return None


def json_text(rng: random.Random, data: bytes, other: bytes) -> bytes | None:
    """A `Dialect`: a value changed, a key given twice, or text that is JSON to some readers only."""
    tree = _loaded(data)
    if tree is None or rng.random() < 0.1:
        at = rng.randrange(len(data) + 1)
        return data[:at] + rng.choice(_JSON_LIES).encode() + data[at + rng.choice((0, 1, 4)) :]
    changed = changed_tree(rng, tree, _loaded(other))
    if isinstance(changed, dict) and changed and rng.random() < 0.1:
        key = json.dumps(rng.choice(list(changed)), default=str)
        return b"{" + key.encode() + b":1," + json.dumps(changed, default=repr, skipkeys=True).encode()[1:]
    with suppress(ValueError, RecursionError):
        return json.dumps(changed, default=repr, skipkeys=True).encode()
    return None


def _extent(entry: dict[str, Tree]) -> int:
    """Return how many bytes a tensor has, as its header says."""
    match entry.get("data_offsets"):
        case [int(first), int(last)]:
            return last - first
    return 0


def safetensors(rng: random.Random, data: bytes, other: bytes) -> bytes | None:
    """A `Dialect`: another header with its length right, types and offsets at borders, or a length that lies."""
    if len(data) < 8:
        return None
    (length,) = struct.unpack("<Q", data[:8])
    header, body = data[8 : 8 + length], data[8 + length :]
    tree = _loaded(header)
    match rng.randrange(6):
        case 0:
            return struct.pack("<Q", rng.choice(INTEGERS) % (1 << 64)) + data[8:]
        case 1:
            return data[: 8 + length] + damaged(rng, body, other)
        case 2 if isinstance(tree, dict) and tree:
            name = rng.choice(list(tree))
            entry = tree[name]
            if isinstance(entry, dict):
                dtype = rng.choice(list(DTYPES))
                changes = [
                    {"dtype": dtype, "shape": [max(_extent(entry) // DTYPES[dtype], 0)]},
                    {"dtype": dtype},
                    {
                        "shape": [
                            rng.choice((0, 1, 3, 21, 1 << 31, 1 << 62, -1)) for _ in range(rng.randrange(4))
                        ]
                    },
                    {
                        "data_offsets": [
                            rng.choice((0, 4, len(body), 1 << 62, -1)),
                            rng.choice((0, 4, len(body), 1 << 62)),
                        ]
                    },
                ]
                tree = tree | {name: entry | rng.choice(changes)}
            header = json.dumps(tree).encode()
        case _:
            header = json_text(rng, header, b"{}") or b""
    return struct.pack("<Q", len(header)) + header + body


# -- pictures, text -----------------------------------------------------------------------------------------------


def picture(rng: random.Random, data: bytes, other: bytes) -> bytes | None:
    """A `Dialect`: bytes damaged; of a PNG a chunk damaged, dropped or repeated, with its checksum right."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return None
    chunks, at = [], 8
    while at + 12 <= len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    if not chunks:
        return None
    at = rng.randrange(len(chunks))
    name, body = chunks[at]
    match rng.randrange(6):
        case 0:
            chunks.insert(rng.randrange(len(chunks)), chunks[at])
        case 1:
            del chunks[at]
        case 2:
            text = zlib.compress(bytes(rng.choice((10, 1 << 16, 1 << 22))))
            chunks.insert(
                at,
                (
                    rng.choice((b"iCCP", b"zTXt", b"iTXt", b"eXIf", b"PLTE", b"tRNS", b"acTL", b"fcTL")),
                    b"a\0\0" + text,
                ),
            )
        case _:
            chunks[at] = (name, damaged(rng, body, other))
    return data[:8] + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )


_WORDS = [
    b"&a ",
    b"*a",
    b"<<: *a",
    b"!!python/object:os.system ",
    b"!!binary ",
    b"- " * 40,
    b"[" * 40,
    b"{" * 40,
    b"? ",
    b": ",
    b"|\n",
    b"---\n",
    b"\t",
    b"\xef\xbb\xbf",
    b"\xff",
    b"0x" + b"f" * 70,
    b"1e9999",
    b".nan",
    b"-.inf",
    b"~",
    b"yes",
    b"'",
    b'"\\ud800"',
    b'"\\x00"',
    b"%YAML 1.1\n",
    b"-----BEGIN CERTIFICATE-----\n",
    b"-----END CERTIFICATE-----\n",
    b"MIIB",
    b"#",
    b"\r",
    b"\xc2\x85",
    b"\xe2\x80\xa8",
    b"\0",
]


def text(rng: random.Random, data: bytes, other: bytes) -> bytes | None:
    """A `Dialect`: lines dropped, repeated, swapped, and words that mean something to YAML or PEM."""
    lines = data.splitlines(keepends=True)
    if not lines or rng.random() < 0.4:
        at = rng.randrange(len(data) + 1)
        return data[:at] + rng.choice(_WORDS) + data[at + rng.choice((0, 0, 1, 5)) :]
    at = rng.randrange(len(lines))
    match rng.randrange(4):
        case 0:
            del lines[at]
        case 1:
            lines.insert(rng.randrange(len(lines)), lines[at])
        case 2:
            lines[at] = rng.choice((b" ", b"  ", b"    ")) + lines[at]
        case _:
            lines[at] = rng.choice(other.splitlines(keepends=True) or [b""])
    return b"".join(lines)
