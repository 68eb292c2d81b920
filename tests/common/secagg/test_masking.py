"""Masks: the standard's keystream, the same for any number of threads, uniform, and not Flower's."""

from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import chisquare, norm

from hanse_common.secagg import suite
from hanse_common.secagg.masking import CHUNK_WORDS, Mask, apply_masks

keys = st.binary(min_size=32, max_size=32)
masks = st.lists(st.builds(Mask, keys, st.booleans()), max_size=4)

BORDERS = [0, 1, 3, 4, 5] + [k * CHUNK_WORDS + by for k in (1, 2, 3) for by in (-5, -4, -1, 0, 1, 4, 5)]

STANDARD_KEY = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")


def keystream(key: bytes, first: int, blocks: int) -> bytes:
    """SP 800-38A section 6.5, spelled out: each counter block encrypted by the block cipher alone."""
    counters = b"".join((first + k).to_bytes(16, "big") for k in range(blocks))
    return Cipher(algorithms.AES256(key), modes.ECB()).encryptor().update(counters)  # noqa: S305


def words(key: bytes, count: int) -> NDArray[np.uint32]:
    """Return the first `count` words of the mask of `key`, by the definition."""
    return np.frombuffer(keystream(key, 0, -(-count // 4)), dtype="<u4")[:count].astype(np.uint32)


def test_the_definition_gives_the_vector_of_sp_800_38a_f_5_5() -> None:
    first = int.from_bytes(bytes.fromhex("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff"), "big")
    stream = keystream(STANDARD_KEY, first, 4)
    assert stream == bytes.fromhex(
        "0bdf7df1591716335e9a8b15c860c502"
        "5a6e699d536119065433863c8f657b94"
        "1bc12c9c01610d5d0d8bd6a3378eca62"
        "2956e1c8693536b1bee99c73a31576b6"
    )
    plain = bytes.fromhex(
        "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51"
        "30c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710"
    )
    assert bytes(one ^ other for one, other in zip(plain, stream, strict=True)) == bytes.fromhex(
        "601ec313775789a5b7a7f504bbf3d228f443e3ca4d62b59aca84e990cacaf5c5"
        "2b0930daa23de94ce87017ba2d84988ddfc9c58db67aada613c2dd08457941a6"
    )


def test_a_mask_is_the_keystream_from_counter_zero_in_little_endian_words() -> None:
    # GCM's specification, test case 13, prints the zero block under the zero key.
    vector = np.zeros(4, dtype=np.uint32)
    apply_masks(vector, [Mask(bytes(32))])
    assert vector.astype("<u4").tobytes() == bytes.fromhex("dc95c078a2408989ad48a21492842087")
    vector = np.zeros(3 * CHUNK_WORDS + 7, dtype=np.uint32)
    apply_masks(vector, [Mask(STANDARD_KEY)])
    assert np.array_equal(vector, words(STANDARD_KEY, vector.size))


@settings(deadline=None, max_examples=40)
@given(masks, st.sampled_from(BORDERS) | st.integers(0, 3 * CHUNK_WORDS + 9), st.integers(0, 1 << 32))
def test_any_number_of_threads_adds_the_same_by_the_definition(
    masks: list[Mask], size: int, seed: int
) -> None:
    start = np.random.default_rng(seed).integers(0, 1 << 32, size, dtype=np.uint32)
    expected = start.copy()
    for mask in masks:
        expected = expected - words(mask.key, size) if mask.subtract else expected + words(mask.key, size)
    for threads in (1, 2, 3, 9):
        vector = start.copy()
        apply_masks(vector, masks, threads)
        assert vector.dtype == np.uint32
        assert np.array_equal(vector, expected)


@settings(deadline=None)
@given(masks, st.integers(0, 99), st.integers(0, 1 << 32))
def test_what_is_added_is_taken_away_again(masks: list[Mask], size: int, seed: int) -> None:
    start = np.random.default_rng(seed).integers(0, 1 << 32, size, dtype=np.uint32)
    vector = start.copy()
    apply_masks(vector, masks)
    apply_masks(vector, [Mask(mask.key, not mask.subtract) for mask in masks])
    assert np.array_equal(vector, start)


def test_masks_do_not_repeat_across_chunks() -> None:
    vector = np.zeros(4 * CHUNK_WORDS, dtype=np.uint32)
    apply_masks(vector, [Mask(STANDARD_KEY)], threads=2)
    assert len({chunk.tobytes() for chunk in vector.reshape(4, CHUNK_WORDS)}) == 4
    blocks = vector.reshape(-1, 4)
    assert len(np.unique(blocks, axis=0)) == len(blocks)


# Fixed keys: these p-values never change.


def masked(plain: NDArray[np.uint32], *seeds: bytes) -> NDArray[np.uint32]:
    """Return `plain` under one mask for each seed, alternately added and subtracted."""
    vector = plain.copy()
    keys = [suite.self_mask_key(seed * 32, bytes(32), bytes(32)) for seed in seeds]
    apply_masks(vector, [Mask(key, subtract=k % 2 == 1) for k, key in enumerate(keys)])
    return vector


@pytest.mark.parametrize("seeds", [(b"1",), (b"1", b"2"), (b"1", b"2", b"3", b"4")])
@pytest.mark.parametrize("plain", ["zeros", "constant", "ramp", "small"])
def test_masked_vectors_are_uniform(plain: str, seeds: tuple[bytes, ...]) -> None:
    size = 1 << 18
    updates = {
        "zeros": np.zeros(size, dtype=np.uint32),
        "constant": np.full(size, 0xFFFFFFFE, dtype=np.uint32),
        "ramp": np.arange(size, dtype=np.uint32),
        "small": np.random.default_rng(0).integers(0, 3, size, dtype=np.uint32),
    }
    vector = masked(updates[plain], *seeds)
    found = [chisquare(np.bincount(vector >> shift & 0xFF, minlength=256)).pvalue for shift in (0, 8, 16, 24)]
    differences = np.diff(vector)
    found += [chisquare(np.bincount(differences >> shift & 0xFF, minlength=256)).pvalue for shift in (0, 24)]
    pairs = (vector[:-1] & 0xF) << 4 | vector[1:] & 0xF
    found.append(chisquare(np.bincount(pairs[::2], minlength=256)).pvalue)
    ones = np.array([np.count_nonzero(vector >> bit & 1) for bit in range(32)])
    found += list(2 * norm.sf(np.abs(ones - size / 2) / np.sqrt(size / 4)))
    # 39 p-values, each uniform: the least of them is below this once in 25,000 times.
    assert min(found) > 1e-6
    assert np.median(found) > 0.05


def test_the_tests_above_see_what_is_not_uniform() -> None:
    vector = masked(np.zeros(1 << 18, dtype=np.uint32), b"1") // np.uint32(3)
    assert chisquare(np.bincount(vector >> 24, minlength=256)).pvalue < 1e-6


# Flower 1.41's SecAgg+ folds a key into a 32-bit seed by exclusive or; of base64 keys only 28 bits of it vary.


def folded(key: bytes) -> int:
    """Return the number that seeds Flower's generator."""
    return int(np.bitwise_xor.reduce(np.frombuffer(key, dtype="<u4")))


def flower_mask(key: bytes, count: int = 8) -> NDArray[Any]:
    """Return the first words of Flower's mask of `key`, by Flower's own code."""
    from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen

    return pseudo_rand_gen(key, 1 << 24, [(count,)])[0]


def test_a_search_breaks_flowers_pair_masks_and_not_ours() -> None:
    from cryptography.hazmat.primitives.asymmetric import ec
    from flwr.common.secure_aggregation.crypto.symmetric_encryption import generate_shared_key

    pairs = [[ec.generate_private_key(ec.SECP384R1()) for _ in range(2)] for _ in range(20)]
    shared = [generate_shared_key(one, other.public_key()) for one, other in pairs]
    seeds = [folded(key) for key in shared]
    assert all(seed & 0x80808080 == 0 for seed in seeds)  # 28 bits are all there is to search
    # The search for one of them, through the 2¹⁰ of its 2²⁸ candidates that share its other bits.
    seen, around = flower_mask(shared[0]), seeds[0] & ~0x707F
    candidates = (around | high << 12 | low for high in range(8) for low in range(128))
    hits = [seed for seed in candidates if np.array_equal(flower_mask(seed.to_bytes(4, "little")), seen)]
    assert hits == [seeds[0]]
    # Ours of the same key and of the number that it folds to are unrelated, and so are those of keys that fold alike.
    for mask in (Mask((shared[0] * 2)[:32]), Mask(seeds[0].to_bytes(32, "little"))):
        ours = np.zeros(8, dtype=np.uint32)
        apply_masks(ours, [mask])
        assert not np.array_equal(ours & 0xFFFFFF, seen)


def test_keys_that_flower_folds_alike_have_one_mask_there_and_two_here() -> None:
    one = bytearray(range(32))
    for first, second in ((0, 4), (3, 31), (16, 28)):
        other = bytearray(one)
        other[first] ^= 0x80
        other[second] ^= 0x80
        assert np.array_equal(flower_mask(bytes(one), 64), flower_mask(bytes(other), 64))
        ours = np.zeros((4, 64), dtype=np.uint32)
        for row, key in zip(ours[:2], (one, other), strict=True):
            apply_masks(row, [Mask(bytes(key))])
        for row, key in zip(ours[2:], (one, other), strict=True):
            apply_masks(row, [Mask(suite.self_mask_key(bytes(key), bytes(32), bytes(32)))])
        assert len(np.unique(ours)) == ours.size
