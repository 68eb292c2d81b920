"""A metric of the shop's own for search: directions in which photos of one product differ count less.

    rows = recognizer.embeddings(features)
    metric = PersonalMetric.load(config.personal_path, recognizer.embedding_digest(), rows.shape[1])
    if metric is not None:                              # None: embeddings are best as they are
        rows, name = metric.apply(rows), metric.embedding

**What it does.** With m the mean of the shop's products and S the covariance of embeddings around their product's mean,
an embedding x becomes Ŝ^(−1/2)·(x−m) at norm 1, where Ŝ = (1−s)·S + s·tr(S)/r·I and r is S's rank: within-class
covariance normalisation [1] with a shrunk covariance [2], s = `SHRINKAGE`. That takes the style of the shop's photos
(background, light, angle) out of the comparison. Ŝ^(−1/2) is a multiple of I outside of S's span, so a metric is some
directions u_i and how much of each stays: y = x−m becomes y − Σ (1−f_i)·(u_i·y)·u_i with
f_i = √(sμ / ((1−s)λ_i + sμ)), λ_i being S's eigenvalues and μ = tr(S)/r.

**How it is judged.** It is learned from at least `MIN_PRODUCTS` products with two photos or more, and judged in
`FOLDS` parts, each by a metric learned from the products of the other parts. An exact test of signs over products says
how often chance alone makes such a difference; below `compare.SIGNIFICANCE` = 0.05 it is *clear*. Two things judge:

- *its own photos*: each searches for its product, known by its other photos, among all of these. They are many, and in
  the shop's own style. Photos that come to be asked with may be in another, in which a metric may do worse.
- *photos that were asked with*, which the owner's corrections are: each searches for its product in the gallery, as it
  did when it came. They are few, and what search is for.

**When it serves.** Where it is clearly better by photos that were asked with. Also where it is clearly better by the
shop's own photos, if those asked with do not speak against it: as soon as one of their products fares otherwise with
it, more of them must find theirs than without it. That is no test, for which few shops correct enough. It errs the less
the more is corrected: docs/search.md has how often.

Labels are not used: photos of different products under one label differ in just what tells products apart.

References
[1] Hatch, Kajarekar, Stolcke 2006, "Within-Class Covariance Normalization for SVM-based Speaker Recognition".
[2] Ledoit, Wolf 2004, "A Well-Conditioned Estimator for Large-Dimensional Covariance Matrices".
"""

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import AwareDatetime, Field

from hanse_client.personal import saved
from hanse_client.personal.head import Judgement
from hanse_client.personal.saved import Saved
from hanse_common.errors import RecognizerError
from hanse_common.wire import HexDigest

log = logging.getLogger(__name__)

NAME: Final = "metric"
"""Of the files in the folder."""

SHRINKAGE: Final = 0.6
"""s. With 2, 4, 10 and about 30 photos each of groceries, 0.6 finds 1.2, 2.7, 4.5 and 6.0 points more in the same style
than the embedding does, 0.3 finds 1.7, 3.5, 4.2 and 4.5. In another style 0.6 loses 5 to 7, and 0.3 loses 12 to 17."""

MAX_DIRECTIONS: Final = 256
"""The most directions that are kept, those of the largest variance."""

MIN_PRODUCTS: Final = 10
"""The fewest products with two photos that a metric is learned from."""

FOLDS: Final = 5

MAX_PHOTOS: Final = 20_000
"""The most photos that a metric is learned from and judged by; more add time and little else."""


class MetricRecord(Saved):
    """What is known of a metric: the embedding that it is for, what it was learned from, and how it did.

    `judgement` is by the shop's own photos, `asked` by photos that were asked with; its `photos` are 0 without any.
    Files of version 1 knew the first alone, and are refused.
    """

    format_version: Literal[2] = 2
    embedding: HexDigest
    products: Annotated[int, Field(ge=0)]
    judgement: Judgement
    asked: Judgement
    created: AwareDatetime

    @property
    def serves(self) -> bool:
        """Whether the metric is used: see the module's text."""
        agreed = self.asked.differing == 0 or self.asked.own_right > self.asked.shared_right
        return self.asked.better or (self.judgement.better and agreed)


@dataclass(frozen=True, eq=False)
class Directions:
    """`mean`, shape (d,), `directions`, (r, d) with orthonormal rows, and `factors`, (r,), all float32."""

    mean: NDArray[np.float32]
    directions: NDArray[np.float32]
    factors: NDArray[np.float32]

    def apply(self, embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return `embeddings`, (n, d) float32, as the metric sees them: the same shape, rows of norm 1.

        A row of zeros stays zero.
        """
        rows = embeddings - self.mean
        moved = rows - ((rows @ self.directions.T) * (1.0 - self.factors)) @ self.directions
        moved[~embeddings.any(axis=1)] = 0.0
        norms = np.linalg.norm(moved, axis=1, keepdims=True)
        unit: NDArray[np.float32] = (moved / np.where(norms > 0, norms, 1.0)).astype(np.float32)
        return unit


@dataclass(frozen=True, eq=False)
class PersonalMetric:
    """A record, and what was learned."""

    record: MetricRecord
    learned: Directions

    @property
    def embedding(self) -> bytes:
        """What names the rows that `apply` returns, 32 bytes: they compare with no others."""
        names = bytes.fromhex(self.record.embedding) + bytes.fromhex(self.record.arrays)
        return hashlib.sha256(b"personal metric" + names).digest()

    def apply(self, embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return `embeddings`, (n, d) float32, as the metric sees them; see `Directions.apply`."""
        return self.learned.apply(embeddings)

    def save(self, folder: Path) -> None:
        """Write it into `folder`. Raises `RecognizerError` when the disk fails."""
        saved.save(folder, NAME, self.record, vars(self.learned))

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Return the metric in `folder`, be it better or not. Raises `RecognizerError` when damaged or missing."""
        record, arrays = saved.read(folder, NAME, MetricRecord)
        shapes = {name: array.shape for name, array in arrays.items()}
        rank, dimension = (*shapes.get("directions", ()), 0, 0)[:2]
        if shapes != {"mean": (dimension,), "directions": (rank, dimension), "factors": (rank,)}:
            raise RecognizerError(
                f"{folder}: metric: found arrays {shapes}, expected mean, directions and factors."
            )
        return cls(record, Directions(**arrays))

    @classmethod
    def load(cls, folder: Path, embedding: bytes, dimension: int) -> Self | None:
        """Return the metric for embeddings of that name and dimension, None where embeddings are best as they are.

        None: there is none, it does not serve, it is for other embeddings, or its files are damaged or an earlier
        release's, which is logged.
        """
        if not saved.exists(folder, NAME):
            return None
        try:
            metric = cls.read(folder)
        except RecognizerError as error:
            log.warning("The personal metric is not used: %s", error)
            return None
        if metric.record.embedding != embedding.hex() or len(metric.learned.mean) != dimension:
            log.warning(
                "The personal metric belongs to another embedding; `hanse-client personalize` learns it anew."
            )
            return None
        return metric if metric.record.serves else None


def forget(folder: Path) -> bool:
    """Remove the metric in `folder`; return whether there was one. Raises `RecognizerError` when the disk fails."""
    return saved.remove(folder, NAME)
