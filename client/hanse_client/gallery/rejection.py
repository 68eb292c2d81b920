"""Open set: whether a photo shows any product of the gallery at all, judged by the similarity of the best match.

    rejection = calibrate(genuine, impostor, false_accept=0.05)
    rejection.known(matches[0].similarity)    # False: "not in the catalog"

*Genuine* are similarities that photos of products in the gallery reach, *impostor* those that photos of anything else
reach. The threshold is a split-conformal quantile of the impostors: the ⌈(n + 1)(1 − α)⌉-th smallest of n. A new
impostor that is exchangeable with them is then taken for a product with probability at most α, whatever the
distribution [1, section 1; 2, equation 1]. With fewer than 1/α − 1 impostors no threshold can promise that, and the
default stays. How many genuine photos the threshold turns away is measured, not promised.

[1] Vovk, Gammerman, Shafer: Algorithmic Learning in a Random World, 2005
[2] Bates, Candès, Lei, Romano, Sesia: Testing for outliers with conformal p-values, Annals of Statistics 51, 2023
"""

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

FALSE_ACCEPT: Final = 0.05
"""Share of photos of other things that may be taken for a product: the target where none is named."""

DEFAULT_THRESHOLD: Final = 0.5
"""Threshold before there is enough to calibrate on; see docs/search-index.md for what it does on real photos."""


@dataclass(frozen=True, slots=True)
class Rejection:
    """A threshold on the best match's similarity, and what it was calibrated on.

    `genuine` and `impostor` are counts of photos; `false_reject` is the share of the genuine that it turns away, None
    when there were none.
    """

    threshold: float = DEFAULT_THRESHOLD
    false_accept: float = FALSE_ACCEPT
    genuine: int = 0
    impostor: int = 0
    false_reject: float | None = None

    @property
    def calibrated(self) -> bool:
        """Whether the threshold comes from photos, and is not the default."""
        return self.impostor > 0

    def known(self, similarity: float) -> bool:
        """Return whether a photo whose best match has this similarity shows a product of the gallery."""
        return similarity > self.threshold


def calibrate(
    genuine: NDArray[np.floating], impostor: NDArray[np.floating], false_accept: float = FALSE_ACCEPT
) -> Rejection:
    """Return the rejection that takes at most `false_accept` of photos like the impostors for a product.

    Both are best matches' similarities, (m,) and (n,), in [−1, 1]. With too few impostors the threshold is the default.

    Raises ValueError for a `false_accept` outside (0, 1), and for similarities that are not numbers in [−1, 1].
    """
    if not 0 < false_accept < 1:
        raise ValueError(f"Expected a share of false accepts in (0, 1), found {false_accept}.")
    for name, found in (("genuine", genuine), ("impostor", impostor)):
        if found.ndim != 1 or not np.all(np.abs(found) <= 1 + 1e-3):
            raise ValueError(f"Expected {name} similarities in [-1, 1], in one dimension.")
    rank = math.ceil((len(impostor) + 1) * (1 - false_accept))
    if rank > len(impostor):
        return Rejection(false_accept=false_accept)
    threshold = float(np.sort(impostor)[rank - 1])
    turned_away = float(np.mean(genuine <= threshold)) if len(genuine) else None
    return Rejection(threshold, false_accept, len(genuine), len(impostor), turned_away)


def auroc(genuine: NDArray[np.floating], impostor: NDArray[np.floating]) -> float:
    """Return the probability that a genuine similarity is above an impostor's, ties counting half.

    This is the area under the ROC curve, as the Mann-Whitney statistic (Hanley, McNeil, Radiology 143, 1982). Raises
    ValueError when one of the two is empty.
    """
    m, n = len(genuine), len(impostor)
    if not m or not n:
        raise ValueError(f"Expected genuine and impostor similarities, found {m} and {n}.")
    ranks = rankdata(np.concatenate([genuine, impostor]))
    return float((ranks[:m].sum() - m * (m + 1) / 2) / (m * n))
