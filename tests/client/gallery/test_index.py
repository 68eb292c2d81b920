"""The vector index: exact results while small, near-exact ones when large, and nothing left of what was removed."""

import hashlib
import json

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hanse_client.gallery import index as indexes
from hanse_client.gallery.index import VectorIndex, most_bytes
from hanse_common.errors import GalleryError

KEY = bytes(range(32))

faiss.omp_set_num_threads(1)


def clustered(n: int, seed: int = 0, d: int = 32, centres: int = 60):
    """Unit rows in clusters of different sizes, as embeddings of products in categories lie."""
    chance = np.random.default_rng(seed)
    middles = np.random.default_rng(99).standard_normal((centres, d))
    share = np.random.default_rng(98).dirichlet(np.full(centres, 0.5))
    rows = middles[chance.choice(centres, n, p=share)] + 0.8 * chance.standard_normal((n, d))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def nearest(ids, vectors, queries, k):
    """By the definition, in float64."""
    similarities = queries.astype(np.float64) @ vectors.astype(np.float64).T
    return ids[np.argsort(-similarities, axis=1, kind="stable")[:, :k]]


@pytest.fixture
def small_exact(monkeypatch) -> None:
    """Let an index of more than 64 vectors of 32 numbers be approximate."""
    monkeypatch.setattr(indexes, "EXACT_NUMBERS", 64 * 32)


def test_a_small_index_is_exact() -> None:
    vectors, queries = clustered(500), clustered(20, seed=1)
    ids = np.random.default_rng(2).permutation(5000)[:500]
    index = VectorIndex.build(ids, vectors)
    found, similarities = index.search(queries, 10)
    assert not index.approximate
    assert np.array_equal(found, nearest(ids, vectors, queries, 10))
    assert np.allclose(similarities[:, 0], (queries @ vectors.T).max(axis=1), atol=1e-6)


@pytest.mark.usefixtures("small_exact")
def test_a_large_index_finds_what_an_exact_one_does_nearly_always() -> None:
    vectors, queries = clustered(20_000), clustered(200, seed=1)
    ids = np.arange(20_000) + 7
    index = VectorIndex.build(ids, vectors)
    assert index.approximate
    truth = nearest(ids, vectors, queries, 10)
    found, similarities = index.search(queries, 10, exact=lambda some: vectors[some - 7])
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found.tolist(), truth.tolist(), strict=True)])
    assert recall >= 0.98
    assert np.allclose(similarities, np.einsum("qkd,qd->qk", vectors[found - 7], queries), atol=1e-5)
    assert index.nbytes < 20_000 * (32 + 8) + 1024 * 32 * 4


@pytest.mark.parametrize("limit", [1 << 23, 64 * 32])
def test_what_was_removed_is_not_found_and_what_was_added_is(monkeypatch, limit: int) -> None:
    monkeypatch.setattr(indexes, "EXACT_NUMBERS", limit)
    vectors, ids = clustered(1000), np.arange(1000)
    index = VectorIndex.build(ids[:900], vectors[:900])
    index.remove(range(0, 900, 2))
    index.remove([0, 5000])  # gone, and never there
    index.add(ids[900:], vectors[900:])
    there = np.concatenate([np.arange(1, 900, 2), ids[900:]])
    assert np.array_equal(np.sort(index.ids()), there)
    assert len(index) == len(there)
    found, _ = index.search(vectors, 1)
    assert set(found.ravel().tolist()) <= set(there.tolist())
    hits = found[there, 0] == there
    assert hits.all() if not index.approximate else hits.mean() > 0.9


@pytest.mark.usefixtures("small_exact")
def test_nothing_of_a_removed_vector_is_saved(tmp_path) -> None:
    """Neither number nor code nor, as the centre of a list of its own, the vector."""
    vectors, ids = clustered(300), np.random.default_rng(5).integers(1 << 62, size=300)
    index = VectorIndex.build(ids, vectors)
    before = index.to_bytes(KEY)
    codes = {}
    lists = index._inner._index.invlists
    for number in range(index._inner._index.nlist):
        size = lists.list_size(number)
        if size:
            names = faiss.rev_swig_ptr(lists.get_ids(number), size)
            data = faiss.rev_swig_ptr(lists.get_codes(number), size * 32).reshape(size, 32)
            codes |= {int(name): bytes(code) for name, code in zip(names, data, strict=True)}
    assert all(code in before for code in codes.values())
    assert [vector for vector in vectors[::3] if vector.tobytes() in before]
    gone = ids[::3]
    index.remove(gone)
    after = index.to_bytes(KEY)
    assert not [name for name in gone.tolist() if name.to_bytes(8, "little") in after]
    assert not [name for name in gone.tolist() if codes[name] in after]
    assert not [vector for vector in vectors[::3] if vector.tobytes() in after]
    assert all(codes[name] in after for name in np.setdiff1d(ids, gone).tolist())


@pytest.mark.usefixtures("small_exact")
def test_an_index_comes_back_from_its_file_and_goes_on(tmp_path) -> None:
    vectors, ids = clustered(500), np.arange(500)
    index = VectorIndex.build(ids[:400], vectors[:400])
    index.upto = (399, 12)
    index.save(tmp_path / "index", KEY)
    again = VectorIndex.load(tmp_path / "index", KEY, most_bytes(400, 32))
    assert (again.upto, again.dimension, len(again)) == ((399, 12), 32, 400)
    for one in (index, again):
        one.add(ids[400:], vectors[400:])
        one.remove([3])
    for one, other in zip(index.search(vectors[:50], 5), again.search(vectors[:50], 5), strict=True):
        assert np.array_equal(one, other)


@pytest.fixture
def seen_by_library(monkeypatch) -> list[int]:
    """Return what grows when faiss is given bytes to read."""
    read, seen = faiss.deserialize_index, []

    def noted(data):
        seen.append(len(data))
        return read(data)

    monkeypatch.setattr(faiss, "deserialize_index", noted)
    return seen


@pytest.mark.usefixtures("small_exact")
def test_a_file_that_is_not_what_was_kept_is_never_handed_to_the_library(tmp_path, seen_by_library) -> None:
    path = tmp_path / "index"
    index = VectorIndex.build(np.arange(100), clustered(100))
    index.save(path, KEY)
    whole = path.read_bytes()
    chance = np.random.default_rng(0)
    altered = []
    for place in [*range(120), *chance.integers(len(whole), size=60)]:
        one = bytearray(whole)
        one[place] ^= 1 << int(chance.integers(8))
        altered.append(bytes(one))
    # Whoever writes a file can compute a digest without a key, and knows a key of their own.
    content = whole[32:]
    plain = hashlib.blake2b(content, digest_size=32).digest() + content
    ends = (b"", b"\n", b"{}\n", bytes(32), bytes(32) + b"\n", whole[:-1], whole[:40], whole + b"\0", content)
    for data in (*altered, plain, index.to_bytes(bytes(32)), *ends):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="this gallery kept, found another file or an altered one"):
            VectorIndex.load(path, KEY, 1 << 20)
    assert not seen_by_library
    path.write_bytes(whole)
    assert len(VectorIndex.load(path, KEY, 1 << 20)) == 100
    assert len(seen_by_library) == 1


@pytest.mark.usefixtures("small_exact")
@pytest.mark.parametrize("field", ["format", "dimension", "made_for"])
def test_a_head_that_does_not_fit_the_lists_is_refused(field: str) -> None:
    """As of another release, whose files were kept with the same key."""
    whole = VectorIndex.build(np.arange(100), clustered(100)).to_bytes(KEY)
    head, _, body = whole[32:].partition(b"\n")
    fields = json.loads(head) | {field: 31}
    if field == "made_for":
        del fields[field]
    content = json.dumps(fields).encode() + b"\n" + body
    mac = hashlib.blake2b(content, digest_size=32, key=KEY).digest()
    with pytest.raises(ValueError, match="Expected an index of format 2, found"):
        VectorIndex.from_bytes(mac + content, KEY)


@pytest.mark.usefixtures("small_exact")
def test_an_index_of_another_kind_is_refused() -> None:
    whole = VectorIndex.build(np.arange(100), clustered(100)).to_bytes(KEY)
    flat = faiss.IndexFlatIP(32)
    flat.add(clustered(100))
    content = whole[32 : whole.index(b"\n", 32) + 1] + bytes(faiss.serialize_index(flat))
    mac = hashlib.blake2b(content, digest_size=32, key=KEY).digest()
    with pytest.raises(ValueError, match="found a IndexFlatIP"):
        VectorIndex.from_bytes(mac + content, KEY)


@pytest.mark.usefixtures("small_exact")
def test_no_more_is_read_than_an_index_of_so_many_vectors_takes(tmp_path, seen_by_library) -> None:
    path = tmp_path / "index"
    for count in (65, 100, 1000, 5000):
        index = VectorIndex.build(np.arange(count), clustered(count))
        assert len(index.to_bytes(KEY)) <= most_bytes(count, 32) < 1.5 * len(index.to_bytes(KEY)) + 8000
        index.remove(range(3 * count // 4))
        assert len(index.to_bytes(KEY)) <= most_bytes(len(index), 32)
    index.save(path, KEY)
    with pytest.raises(GalleryError, match=f"more than {most_bytes(100, 32)} bytes, expected a kept index"):
        VectorIndex.load(path, KEY, most_bytes(100, 32))
    path.unlink()
    with path.open("wb") as file:
        file.truncate(1 << 40)  # a hole: reading it all would take the memory
    with pytest.raises(GalleryError, match="expected a kept index"):
        VectorIndex.load(path, KEY, most_bytes(1000, 32))
    assert not seen_by_library


@pytest.mark.usefixtures("small_exact")
def test_a_key_too_short_is_refused() -> None:
    with pytest.raises(ValueError, match="a key of 32 bytes, found 16"):
        VectorIndex.build(np.arange(100), clustered(100)).to_bytes(KEY[:16])


def test_an_exact_index_has_nothing_to_save(tmp_path) -> None:
    with pytest.raises(ValueError, match="nothing to keep"):
        VectorIndex.build(np.arange(3), clustered(3)).save(tmp_path / "index", KEY)


def test_an_empty_index_finds_nothing() -> None:
    found, similarities = VectorIndex(32).search(clustered(3), 5)
    assert found.shape == similarities.shape == (3, 0)


@pytest.mark.usefixtures("small_exact")
def test_an_index_says_when_it_should_be_built_anew() -> None:
    exact = VectorIndex(32)
    exact.add(np.arange(64), clustered(64))
    assert not exact.outgrown
    exact.add(np.array([64]), clustered(1))
    assert exact.outgrown
    large = VectorIndex.build(np.arange(100), clustered(100))
    assert not large.outgrown
    large.add(np.arange(100, 401), clustered(301))
    assert large.outgrown
    shrunk = VectorIndex.build(np.arange(100), clustered(100))
    shrunk.remove(range(70))
    assert shrunk.outgrown
    sparse = VectorIndex.build(np.arange(1000), clustered(1000))
    sparse.remove(range(750))
    assert not sparse.outgrown
    sparse.remove([999])
    assert sparse.outgrown


@settings(max_examples=40)
@given(
    steps=st.lists(st.tuples(st.booleans(), st.integers(0, 30)), max_size=40),
    k=st.integers(1, 12),
)
def test_an_exact_index_is_what_a_plain_dict_is(steps, k) -> None:
    """Whole numbers leave no rounding, so ties are ties, and go to the smaller number."""
    vectors = np.random.default_rng(3).integers(-2, 3, (31, 4)).astype(np.float32)
    index, model = VectorIndex(4), {}
    for adds, number in steps:
        if adds and number not in model:
            index.add(np.array([number]), vectors[number : number + 1])
            model[number] = vectors[number]
        elif not adds:
            index.remove([number])
            model.pop(number, None)
    query = np.array([[1, -1, 2, 0]], np.float32)
    found, similarities = index.search(query, len(model))
    wanted = sorted(((-float(query[0] @ vector), number) for number, vector in model.items()))
    assert (
        list(zip((-similarities[0]).tolist(), found[0].tolist(), strict=True)) == wanted
        if model
        else not found.size
    )
    top, values = index.search(query, k)
    assert (-values[0]).tolist() == [value for value, _ in wanted[:k]]
    assert len(set(top[0].tolist())) == min(k, len(model))


@pytest.mark.parametrize("count", [1, 7, 1000, 5502, 1 << 20])
def test_a_sample_is_spread_evenly_and_has_no_period(count: int) -> None:
    size = min(count, 4096)
    places = indexes.spread(count, size)
    assert np.array_equal(places, np.unique(places))
    assert places[0] == 0
    assert places[-1] < count
    assert len(places) > 0.6 * size
    assert np.diff(places, append=count).max() <= 3 * max(1, count // size) + 1
    for period in (2, 10, 64):
        if count > 100 * period:
            assert np.bincount(places % period, minlength=period).min() > 0.5 * len(places) / period
