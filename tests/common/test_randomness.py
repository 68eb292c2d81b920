"""The keystream is NIST's, and a fork never repeats it."""

import os

import numpy as np
import pytest

from hanse_common.randomness import AesCtrStream, OsRandomness


def test_the_keystream_is_aes_256_ctr() -> None:
    # NIST CAVP AESAVS, ECBVarTxt256 with a zero plaintext block is E(0) under a zero key:
    # "dc95c078a2408989ad48a21492842087" (KAT vectors, GFSbox/KeySbox all-zero entry).
    first_block = AesCtrStream(bytes(32)).words(2).astype("<u8").tobytes()
    assert first_block.hex() == "dc95c078a2408989ad48a21492842087"


def test_words_continue_the_stream_whatever_the_chunks() -> None:
    key = bytes(range(32))
    whole = AesCtrStream(key).words(1000)
    stream = AesCtrStream(key)
    chunks = np.concatenate([stream.words(n) for n in (0, 1, 2, 3, 994)])
    assert np.array_equal(whole, chunks)


def test_two_sources_differ() -> None:
    assert not np.array_equal(OsRandomness().words(4), OsRandomness().words(4))


def test_a_forked_child_never_repeats_its_parents_words() -> None:
    source = OsRandomness()
    source.words(1)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, source.words(8).tobytes())
        os._exit(0)
    os.waitpid(child, 0)
    theirs = np.frombuffer(os.read(read, 64), dtype=np.uint64)
    os.close(read)
    os.close(write)
    assert not np.intersect1d(source.words(8), theirs).size


def test_a_key_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        AesCtrStream(bytes(16))
