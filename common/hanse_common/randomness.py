"""Randomness that protects someone: one interface, and its product implementation over AES-256-CTR.

    >>> from hanse_common.randomness import OsRandomness
    >>> OsRandomness().words(3).dtype
    dtype('uint64')

Sampling, rounding and noise take a `Randomness`; nothing that protects a photo may use numpy's, torch's or
Python's default generators. The product has one implementation, keyed by the operating system. The seeded one,
which makes experiments repeat, lives in `hanse_simulations` and nowhere else.

References: NIST SP 800-38A section 6.5 (CTR mode).
"""

import os
import threading
from typing import Protocol

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from numpy.typing import NDArray


class Randomness(Protocol):
    """A source of independent, uniformly random 64-bit words."""

    def words(self, count: int) -> NDArray[np.uint64]:
        """Return `count` words, shape (count,), dtype uint64, never handed out before."""
        ...


class AesCtrStream:
    """The keystream of AES-256-CTR as 64-bit words, from a 32-byte key and a zero counter.

    Not for direct use in the product: whoever chooses the key chooses the noise.
    """

    def __init__(self, key: bytes) -> None:
        if len(key) != 32:
            raise ValueError(f"Expected a key of 32 bytes, found {len(key)}.")
        self._encryptor = _encryptor(key)
        self._lock = threading.Lock()

    def words(self, count: int) -> NDArray[np.uint64]:
        """Return the next `count` words of the keystream, shape (count,), dtype uint64."""
        out = np.zeros(count, dtype="<u8")
        if count:
            view = memoryview(out.data).cast("B")
            with self._lock:
                self._encryptor.update_into(view, view)
        return out.astype(np.uint64, copy=False)


class OsRandomness(AesCtrStream):
    """AES-256-CTR keyed by the operating system's CSPRNG, keyed afresh in every forked child.

    A child that kept its parent's counter would repeat the parent's noise, and two noisy sums with the same
    noise differ by the data alone.
    """

    def __init__(self) -> None:
        super().__init__(os.urandom(32))
        self._process = os.getpid()

    def words(self, count: int) -> NDArray[np.uint64]:
        """Return `count` fresh words, shape (count,), dtype uint64."""
        if os.getpid() != self._process:
            self.__init__()  # type: ignore[misc]
        return super().words(count)


def secret_bytes(count: int) -> bytes:
    """Return `count` bytes of the operating system's CSPRNG: for keys, seeds and shares."""
    return os.urandom(count)


def _encryptor(key: bytes) -> CipherContext:
    return Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()
