"""Nearest vectors by number: exact while that is fast enough, then inverted lists of one byte a number.

    index = VectorIndex.build(ids, vectors)                    # (n,) int64 and (n, d) float32 unit rows
    found, similarities = index.search(queries, k=10)          # (q, 10) each, best first
    found, similarities = index.search(queries, k=10, exact=lambda ids: vectors_of(ids))

*Exact*: one float32 matrix, one product with it. *Approximate*: faiss's IndexIVFScalarQuantizer. k-means parts the
space into cells [1]; a vector lies in the list of the nearest centre, as one byte a number [2]; a query looks through
the lists of its nearest centres. It is asked for `FETCHED` times as many as are wanted, and whoever has the vectors
themselves orders these exactly: that is `exact`, and in the gallery the database.

docs/search-index.md has the measurement by which this was chosen before graphs (HNSW): better answers at a million
vectors, in a third of the time to build and two thirds of the memory or less, and a removal that removes, while graphs
keep what they mark as deleted. Centres are learned from vectors: one whose list lost a vector is computed anew.

`save` writes the approximate index whole or not at all, with a keyed digest (BLAKE2b [3]): faiss trusts what it reads,
so neither a damaged file nor one that somebody else made must come so far. `load` reads no more than an index of so
many vectors takes. An exact index has nothing to save: it is the vectors.

[1] Jégou, Douze, Schmid: Product quantization for nearest neighbor search, IEEE TPAMI 33, 2011, section IV
[2] github.com/facebookresearch/faiss/wiki/Faiss-indexes
[3] RFC 7693: The BLAKE2 Cryptographic Hash and Message Authentication Code
"""

import hashlib
import hmac
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from hanse_client.gallery.exact import Exact, Ids, Vectors, best
from hanse_common.errors import GalleryError
from hanse_common.files import read_bounded, write_atomically

EXACT_NUMBERS: Final = 1 << 23
"""An exact index holds at most so many numbers, rows times dimension: a query reads them all, some 2 to 3 ms' worth."""

LISTS: Final = 4.0
"""Lists of an approximate index per square root of its vectors, rounded to a power of two."""

TRAINED_ON: Final = 64
"""Vectors a list that its centre is learned from."""

PROBED: Final = 64
"""Lists that a query looks through."""

FETCHED: Final = 4
"""How many times as many vectors as are wanted are fetched, to be ordered exactly."""

GROWTH: Final = 4
"""An approximate index that has grown by this factor has lists too long, and too few; one that shrank, too many."""

KEY_BYTES: Final = 32
"""Size of the key under which an index is kept."""

_FORMAT = 2
_MAC_BYTES = 32
_HEAD_BYTES = 1 << 12  # our own head, and faiss's
_RANGES = 2  # of the code: least value and width in each dimension
_LIST_BYTES = 16  # number and size of a list
_CHUNK = 1 << 16
_SEED = 1234
_GOLDEN = (math.sqrt(5) - 1) / 2


class VectorIndex:
    """Vectors of one dimension, each under a number of its own. Not safe to share between threads.

    `upto` is for whoever keeps the index: two numbers that say what it knows, saved with it.
    """

    def __init__(self, dimension: int) -> None:
        self.dimension = dimension
        self.upto = (0, 0)
        self._inner: Exact | _Lists = Exact(dimension)

    @classmethod
    def build(cls, ids: Ids, vectors: Vectors) -> Self:
        """Return an index of `vectors` (n, d), numbered by the distinct `ids` (n,): exact if it is small enough."""
        if vectors.size <= EXACT_NUMBERS:
            index = cls(vectors.shape[1])
            index.add(ids, vectors)
            return index
        rows = spread(len(ids), sample_size(len(ids)))
        index = cls.trained(vectors[rows], len(ids))
        for start in range(0, len(ids), _CHUNK):
            index.add(ids[start : start + _CHUNK], vectors[start : start + _CHUNK])
        return index

    @classmethod
    def trained(cls, sample: Vectors, count: int) -> Self:
        """Return an empty approximate index for `count` vectors, its lists learned from a `sample` (m, d) of them."""
        index = cls(sample.shape[1])
        index._inner = _Lists.trained(sample, count)
        return index

    def __len__(self) -> int:
        return len(self._inner)

    @property
    def approximate(self) -> bool:
        """Whether a search may miss a vector, and similarities are rounded."""
        return isinstance(self._inner, _Lists)

    @property
    def outgrown(self) -> bool:
        """Whether the index should be built anew: too large to be exact, or far from the size it was made for."""
        numbers = len(self) * self.dimension
        if isinstance(self._inner, Exact):
            return numbers > EXACT_NUMBERS
        made_for = self._inner.made_for
        return numbers < EXACT_NUMBERS // 2 or len(self) > GROWTH * made_for or made_for > GROWTH * len(self)

    @property
    def nbytes(self) -> int:
        """The memory that the index takes, in bytes: vectors or their codes, numbers and centres."""
        return self._inner.nbytes

    def ids(self) -> Ids:
        """Return the numbers of all vectors, in no order."""
        return self._inner.ids()

    def add(self, ids: Ids, vectors: Vectors) -> None:
        """Add `vectors` (n, d) under the new numbers `ids` (n,)."""
        if len(ids):
            self._inner.add(np.ascontiguousarray(ids, np.int64), np.ascontiguousarray(vectors, np.float32))

    def remove(self, ids: Iterable[int]) -> None:
        """Remove the vectors with the numbers `ids`; numbers that are not there are passed over."""
        found = np.fromiter(ids, np.int64)
        if len(found):
            self._inner.remove(found)

    def centre_anew(self) -> None:
        """Compute the centres of an approximate index from what is in its lists, and from nothing else."""
        if isinstance(self._inner, _Lists):
            self._inner.centre_anew(range(self._inner.count))

    def search(
        self, queries: Vectors, k: int, exact: Callable[[Ids], Vectors] | None = None
    ) -> tuple[Ids, Vectors]:
        """Return the numbers (q, m) of the nearest vectors of each query (q, d), best first, and similarities (q, m).

        m is k, or the number of vectors if that is smaller. With `exact`, which gives the vectors (n, d) to numbers
        (n,), an approximate index orders more than k exactly; without it similarities are rounded. Where it found fewer
        than m, number and similarity are −1 and −∞.
        """
        k = min(k, len(self))
        queries = np.ascontiguousarray(queries, np.float32)
        if k == 0:
            return np.empty((len(queries), 0), np.int64), np.empty((len(queries), 0), np.float32)
        if exact is None or not self.approximate:
            return self._inner.search(queries, k)
        found, similarities = self._inner.search(queries, min(FETCHED * k, len(self)))
        for row, query in enumerate(queries):
            there = found[row] >= 0
            similarities[row, there] = exact(found[row, there]) @ query
        return best(found, similarities, k)

    def to_bytes(self, key: bytes) -> bytes:
        """Return an approximate index as bytes, for `from_bytes` with the same `key`.

        Raises ValueError for an exact one, and for a key that has not `KEY_BYTES`.
        """
        if not isinstance(self._inner, _Lists):
            raise ValueError("An exact index is its vectors, and has nothing to keep.")
        head = {
            "format": _FORMAT,
            "dimension": self.dimension,
            "made_for": self._inner.made_for,
            "upto": self.upto,
        }
        content = json.dumps(head).encode() + b"\n" + self._inner.to_bytes()
        return _mac(key, content) + content

    @classmethod
    def from_bytes(cls, data: bytes, key: bytes) -> Self:
        """Return the index of `to_bytes`. Raises ValueError when it is not just what was made with `key`."""
        content = memoryview(data)[_MAC_BYTES:]
        if not hmac.compare_digest(data[:_MAC_BYTES], _mac(key, content)):
            raise ValueError(
                "Expected an index that this gallery kept, found another file or an altered one."
            )
        head = data[_MAC_BYTES : data.find(b"\n", _MAC_BYTES)]
        try:
            fields = json.loads(head)
            if fields["format"] != _FORMAT:
                raise ValueError(f"format {fields['format']}")
            index = cls(fields["dimension"])
            body = content[len(head) + 1 :]
            index._inner = _Lists.from_bytes(body, fields["dimension"], fields["made_for"])
            index.upto = tuple(fields["upto"])
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"Expected an index of format {_FORMAT}, found {error}.") from None
        return index

    def save(self, path: Path, key: bytes) -> None:
        """Write an approximate index to `path`, whole or not at all. Raises OSError, and ValueError as `to_bytes`."""
        write_atomically(path, self.to_bytes(key))

    @classmethod
    def load(cls, path: Path, key: bytes, max_bytes: int) -> Self:
        """Return the index in the file `path`.

        Raises GalleryError when it can't be read or has more than `max_bytes` bytes (see `most_bytes`), and ValueError
        as `from_bytes`.
        """
        return cls.from_bytes(read_bounded(path, max_bytes, "a kept index", GalleryError), key)


def most_bytes(count: int, dimension: int) -> int:
    """Return how many bytes an index of `count` vectors takes that has not to be built anew, at most."""
    lists = _lists(GROWTH * count)
    vector = dimension + np.dtype(np.int64).itemsize
    centre = dimension * np.dtype(np.float32).itemsize
    return _MAC_BYTES + _HEAD_BYTES + count * vector + (lists + _RANGES) * centre + lists * _LIST_BYTES


def sample_size(count: int) -> int:
    """Return how many of `count` vectors the lists are learned from."""
    return TRAINED_ON * _lists(count)


def spread(count: int, size: int) -> Ids:
    """Return about `size` of the places 0 to `count` − 1, in order, spread evenly but with no period: a Weyl sequence.

    Places are multiples of the golden ratio, modulo 1, of `count`. Data with a period would be sampled badly by steps
    of one length.
    """
    if size >= count:
        return np.arange(count)
    return np.unique((np.arange(size) * _GOLDEN % 1.0 * count).astype(np.int64))


def _mac(key: bytes, content: bytes | memoryview) -> bytes:
    if len(key) != KEY_BYTES:
        raise ValueError(f"Expected a key of {KEY_BYTES} bytes, found {len(key)}.")
    return hashlib.blake2b(content, digest_size=_MAC_BYTES, key=key).digest()


def _lists(count: int) -> int:
    return 1 << max(4, round(math.log2(LISTS * math.sqrt(count))))


class _Lists:
    """faiss's inverted lists. faiss takes a third of a second to load, so only a gallery of this size loads it."""

    def __init__(self, index: Any, made_for: int) -> None:
        self._index = index
        self.made_for = made_for

    @classmethod
    def trained(cls, sample: Vectors, count: int) -> Self:
        import faiss

        dimension, lists = sample.shape[1], _lists(count)
        index = faiss.IndexIVFScalarQuantizer(
            faiss.IndexFlatIP(dimension),
            dimension,
            lists,
            faiss.ScalarQuantizer.QT_8bit,
            faiss.METRIC_INNER_PRODUCT,
            False,  # codes of the vectors themselves, not of what is left beside the centre: so centres may move
        )
        index.cp.spherical = True
        index.cp.niter = 10
        index.cp.max_points_per_centroid = TRAINED_ON
        index.cp.min_points_per_centroid = 1
        index.cp.seed = _SEED
        index.nprobe = PROBED
        index.train(np.ascontiguousarray(sample, np.float32))
        return cls(index, count)

    def __len__(self) -> int:
        return int(self._index.ntotal)

    @property
    def nbytes(self) -> int:
        code = self._index.sq.code_size + np.dtype(np.int64).itemsize
        centres = self._index.nlist * self._index.d * np.dtype(np.float32).itemsize
        return len(self) * int(code) + int(centres)

    def ids(self) -> Ids:
        import faiss

        lists = self._index.invlists
        found = [
            faiss.rev_swig_ptr(lists.get_ids(number), lists.list_size(number)).copy()
            for number in range(self._index.nlist)
            if lists.list_size(number)
        ]
        return np.concatenate(found) if found else np.empty(0, np.int64)

    def add(self, ids: Ids, vectors: Vectors) -> None:
        self._index.add_with_ids(vectors, ids)

    def remove(self, ids: Ids) -> None:
        before = self._sizes()
        self._index.remove_ids(ids)
        self.centre_anew(np.flatnonzero(self._sizes() < before).tolist())

    def _sizes(self) -> NDArray[np.int64]:
        lists = self._index.invlists
        return np.array([lists.list_size(number) for number in range(self._index.nlist)])

    @property
    def count(self) -> int:
        return int(self._index.nlist)

    def centre_anew(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            self._centre_anew(number)

    def _centre_anew(self, number: int) -> None:
        """Let the list's centre be the mean of what is left in it: a centre learned from one vector would keep it."""
        import faiss

        lists, dimension = self._index.invlists, self._index.d
        size, width = lists.list_size(number), self._index.code_size
        centre = np.zeros(dimension, np.float32)
        if size:
            codes = faiss.rev_swig_ptr(lists.get_codes(number), size * width).reshape(size, width)
            mean = self._index.sq.decode(codes.copy()).mean(axis=0, dtype=np.float64)
            length = np.linalg.norm(mean)
            centre[:] = mean / length if length > 0 else mean
        quantizer: Any = faiss.downcast_index(self._index.quantizer)
        centres = faiss.rev_swig_ptr(quantizer.get_xb(), self._index.nlist * dimension)
        centres[number * dimension : (number + 1) * dimension] = centre

    def search(self, queries: Vectors, k: int) -> tuple[Ids, Vectors]:
        similarities, ids = self._index.search(queries, k)
        similarities[ids < 0] = -np.inf
        return ids, similarities

    def to_bytes(self) -> bytes:
        import faiss

        return bytes(faiss.serialize_index(self._index))

    @classmethod
    def from_bytes(cls, data: memoryview, dimension: int, made_for: int) -> Self:
        """Return what `to_bytes` wrote. Raises ValueError when it is of another kind or size than is said of it."""
        import faiss

        index = faiss.deserialize_index(np.frombuffer(data, np.uint8))
        if not isinstance(index, faiss.IndexIVFScalarQuantizer):
            raise ValueError(f"a {type(index).__name__}")
        found = cls(index, made_for)
        shape = (index.d, index.code_size, index.quantizer.d, index.quantizer.ntotal, index.ntotal)
        if shape != (dimension, dimension, dimension, index.nlist, found._sizes().sum()):
            raise ValueError(f"lists that do not fit: {shape}")
        index.nprobe = PROBED
        return found
