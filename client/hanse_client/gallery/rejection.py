"""Open set: whether a photo shows any product of the gallery at all, judged by the similarity of the best match.

    rejection = calibrate(genuine, impostor, Targets(false_accept=0.05, false_reject=0.1))
    rejection.known(matches[0].similarity)               # False: "not in the catalog"
    rejection.false_accept, rejection.false_reject       # measured on the two, as shares

*Genuine* are similarities that photos of products in the gallery reach, *impostor* those that photos of anything else
reach. Where the two overlap no threshold keeps both errors small, and one that turns most of a shop's own products away
is of no use to it. So the threshold is the lesser of two:

- a split-conformal quantile of the impostors, the ⌈(n + 1)(1 − α)⌉-th smallest of n: a new impostor, exchangeable with
  them, is above it with probability at most α, whatever the distribution [1, section 1; 2, equation 1];
- just below the ⌊(m + 1)β⌋-th smallest of the m genuine: by the same argument, a new genuine one, exchangeable
  with them, is turned away with probability at most β.

So β, the `false_reject`, is promised, and α, the `false_accept`, where this leaves room for it. What both shares are on
the given similarities is measured and told.

With fewer than 1/β − 1 genuine, as where each product has one photo, the impostors stand in for them: the best of all
products is at least as similar to a photo as the best of all but its own. Where photos are too few for a quantile, the
largest impostor, if over `DEFAULT_THRESHOLD`, stands in for the first, and that default for the second.

[1] Vovk, Gammerman, Shafer: Algorithmic Learning in a Random World, 2005
[2] Bates, Candès, Lei, Romano, Sesia: Testing for outliers with conformal p-values, Annals of Statistics 51, 2023
"""

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

DEFAULT_THRESHOLD: Final = 0.5
"""Threshold before there is enough to calibrate on; see docs/search-index.md for what it does on real photos."""


@dataclass(frozen=True, slots=True)
class Targets:
    """The most, as shares in (0, 1), that is to be taken for a product, and turned away, by mistake.

    Raises ValueError for a share outside (0, 1).
    """

    false_accept: float = 0.05
    false_reject: float = 0.1

    def __post_init__(self) -> None:
        for name, share in (("accepts", self.false_accept), ("rejects", self.false_reject)):
            if not 0 < share < 1:
                raise ValueError(f"Expected a share of false {name} in (0, 1), found {share}.")


DEFAULT_TARGETS: Final = Targets()
"""The targets where none are named."""


@dataclass(frozen=True, slots=True)
class Rejection:
    """A threshold on the best match's similarity, and what it does to the photos that it was calibrated on.

    `false_accept` is the share of `impostor` photos that it lets in, `false_reject` that of `genuine` photos that it
    turns away; None where there were none. `targets` are what was asked for.
    """

    threshold: float = DEFAULT_THRESHOLD
    false_accept: float | None = None
    genuine: int = 0
    impostor: int = 0
    false_reject: float | None = None
    targets: Targets = DEFAULT_TARGETS

    @property
    def calibrated(self) -> bool:
        """Whether there were impostors enough, so that the threshold comes from photos."""
        return _rank_above(self.impostor, self.targets.false_accept) <= self.impostor

    def known(self, similarity: float) -> bool:
        """Return whether a photo whose best match has this similarity shows a product of the gallery."""
        return similarity > self.threshold


def calibrate(
    genuine: NDArray[np.floating], impostor: NDArray[np.floating], targets: Targets = DEFAULT_TARGETS
) -> Rejection:
    """Return the rejection that turns away at most the targeted share of genuine photos, and lets in few impostors.

    Both are best matches' similarities, (m,) and (n,), in [−1, 1].

    Raises ValueError for similarities that are not numbers in [−1, 1].
    """
    for name, found in (("genuine", genuine), ("impostor", impostor)):
        if found.ndim != 1 or not np.all(np.abs(found) <= 1 + 1e-3):
            raise ValueError(f"Expected {name} similarities in [-1, 1], in one dimension.")
    shown = genuine if _rank_below(len(genuine), targets.false_reject) else impostor
    threshold = min(_above_most(impostor, targets.false_accept), _below_most(shown, targets.false_reject))
    return Rejection(
        threshold,
        float(np.mean(impostor > threshold)) if len(impostor) else None,
        len(genuine),
        len(impostor),
        float(np.mean(genuine <= threshold)) if len(genuine) else None,
        targets,
    )


def _rank_above(count: int, share: float) -> int:
    return math.ceil((count + 1) * (1 - share))


def _rank_below(count: int, share: float) -> int:
    return math.floor((count + 1) * share)


def _above_most(impostor: NDArray[np.floating], share: float) -> float:
    """Return a number above which another impostor is with probability at most `share`.

    With too few impostors to tell, it is the largest of them, but no less than the default.
    """
    rank = _rank_above(len(impostor), share)
    if rank <= len(impostor):
        return float(np.sort(impostor)[rank - 1])
    return float(impostor.max(initial=DEFAULT_THRESHOLD))


def _below_most(genuine: NDArray[np.floating], share: float) -> float:
    """Return a number above which another genuine is not with probability at most `share`, or the default."""
    rank = _rank_below(len(genuine), share)
    return float(np.nextafter(np.sort(genuine)[rank - 1], -np.inf)) if rank else DEFAULT_THRESHOLD


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
