"""Vectors in one matrix, every one of which is compared: the exact part of `hanse_client.gallery.index`.

    exact = Exact(dimension=256)
    exact.add(ids, vectors)                         # (n,) int64 and (n, 256) float32
    ids, similarities = exact.search(queries, k=10)

It suits as many as a processor's cache holds.
"""

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Vectors = NDArray[np.float32]


def best(ids: Ids, similarities: Vectors, k: int) -> tuple[Ids, Vectors]:
    """Return the `k` best of each row, best first; of equal ones the smaller number comes first."""
    order = np.lexsort((ids, -similarities), axis=1)[:, :k]
    return np.take_along_axis(ids, order, axis=1), np.take_along_axis(similarities, order, axis=1)


class Exact:
    """One matrix, with room to grow; what is removed is overwritten by the last row, and that by zeros.

    Its methods do what those of `hanse_client.gallery.index.VectorIndex` say, for vectors of `dimension` numbers.
    """

    def __init__(self, dimension: int) -> None:
        self._ids = np.empty(0, np.int64)
        self._matrix = np.empty((0, dimension), np.float32)
        self._rows: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def nbytes(self) -> int:
        """The memory that vectors and numbers take, in bytes; the room to grow is not counted."""
        per_vector = self._matrix.itemsize * self._matrix.shape[1] + self._ids.itemsize
        return len(self) * int(per_vector)

    def ids(self) -> Ids:
        """Return the numbers of all vectors, in no order."""
        return self._ids[: len(self)].copy()

    def add(self, ids: Ids, vectors: Vectors) -> None:
        """Add `vectors` (n, d) under the new numbers `ids` (n,)."""
        start, end = len(self), len(self) + len(ids)
        if end > len(self._ids):
            room = max(end, 3 * len(self._ids) // 2)
            self._ids = np.concatenate([self._ids[:start], np.zeros(room - start, np.int64)])
            empty = np.zeros((room - start, self._matrix.shape[1]), np.float32)
            self._matrix = np.concatenate([self._matrix[:start], empty])
        self._ids[start:end], self._matrix[start:end] = ids, vectors
        self._rows.update(zip(ids.tolist(), range(start, end), strict=True))

    def remove(self, ids: Ids) -> None:
        """Remove the vectors with these numbers; numbers that are not there are passed over."""
        for id_ in ids.tolist():
            row = self._rows.pop(id_, None)
            if row is None:
                continue
            last = len(self._rows)
            if row != last:
                self._ids[row], self._matrix[row] = self._ids[last], self._matrix[last]
                self._rows[int(self._ids[row])] = row
            self._matrix[last] = 0

    def search(self, queries: Vectors, k: int) -> tuple[Ids, Vectors]:
        """Return numbers and similarities (q, k) of the `k` nearest of each query (q, d), k at most `len(self)`."""
        similarities = queries @ self._matrix[: len(self)].T
        ids = np.broadcast_to(self._ids[: len(self)], similarities.shape)
        if k < len(self):
            nearest = np.argpartition(similarities, len(self) - k, axis=1)[:, -k:]
            ids = np.take_along_axis(ids, nearest, axis=1)
            similarities = np.take_along_axis(similarities, nearest, axis=1)
        return best(ids, similarities, k)
