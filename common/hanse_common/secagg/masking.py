"""Masks: AES-256-CTR keystreams added to a vector mod 2³², many at once.

    apply_masks(vector, [Mask(key), Mask(other, subtract=True)])

The vector is walked in chunks that stay in the processor's cache, each stream adding its words to a chunk before the
next chunk is touched, with one buffer a thread. OpenSSL and numpy both let other threads run meanwhile. A key makes
one stream from a zero counter, so it must serve one vector only.

Reference: NIST SP 800-38A section 6.5 (CTR mode).
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

CHUNK_WORDS = 1 << 15
"""Words of a chunk: 128 KiB of vector and as much of keystream."""

_WORDS_A_BLOCK = 4


@dataclass(frozen=True)
class Mask:
    """One keystream, by its 32-byte key, to be added or subtracted."""

    key: bytes
    subtract: bool = False


def apply_masks(vector: NDArray[np.uint32], masks: Sequence[Mask], threads: int = 1) -> None:
    """Add every mask to `vector`, shape (d,), dtype uint32, contiguous, in place.

    `threads` share the work by parts of the vector; the result is the same for any number.
    """
    chunks = -(-vector.size // CHUNK_WORDS)
    parts = max(1, min(threads, chunks))
    borders = [chunks * part // parts * CHUNK_WORDS for part in range(parts)] + [vector.size]
    spans = [(first, vector[first:last]) for first, last in pairwise(borders)]
    if len(spans) == 1:
        _apply_to_span(*spans[0], masks)
        return
    with ThreadPoolExecutor(parts) as pool:
        for done in [pool.submit(_apply_to_span, *span, masks) for span in spans]:
            done.result()


def _apply_to_span(first: int, span: NDArray[np.uint32], masks: Sequence[Mask]) -> None:
    """Add the masks to `span`, which begins at word `first` of its vector, a multiple of `CHUNK_WORDS`."""
    counter = (first // _WORDS_A_BLOCK).to_bytes(16, "big")
    streams = [(_encryptor(mask.key, counter), np.subtract if mask.subtract else np.add) for mask in masks]
    zeros = bytes(4 * min(CHUNK_WORDS, span.size))
    buffer = bytearray(len(zeros))
    words = np.frombuffer(buffer, dtype="<u4")
    for start in range(0, span.size, CHUNK_WORDS):
        chunk = span[start : start + CHUNK_WORDS]
        if chunk.size < words.size:
            zeros, words = zeros[: 4 * chunk.size], words[: chunk.size]
        for encryptor, operation in streams:
            encryptor.update_into(zeros, buffer)
            operation(chunk, words, out=chunk)


def _encryptor(key: bytes, counter: bytes) -> Any:
    return Cipher(algorithms.AES256(key), modes.CTR(counter)).encryptor()
