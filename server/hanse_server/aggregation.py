"""The seam behind which client updates become one sum."""

import numpy as np
from numpy.typing import NDArray

from hanse_common.secagg import ring


class PlainAggregator:
    """Sums uploads as they arrive, in O(d) memory. They are not masked: whoever runs this process can read them.

    What a merchant uploads in mode `local` is differentially private by itself, so this hides nothing beyond
    the stated ε; secure aggregation is to take this place.
    """

    def __init__(self, dimension: int) -> None:
        self._total = np.zeros(dimension, dtype=np.uint32)

    def add(self, upload: bytes) -> None:
        """Add one upload, 4·d bytes. Raises `ValueError` when its length is wrong."""
        self._total += ring.from_bytes(upload, self._total.size)

    def total(self) -> NDArray[np.uint32]:
        """Return the sum of the uploads mod 2³², shape (d,)."""
        return self._total
