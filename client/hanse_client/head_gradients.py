"""A linear head's clipped gradients in closed form, summed exactly as integers.

    summed = HeadSum(features, labels, classes=10, clipping_norm=0.3, fine_exponent=-47)
    total = summed.sum(weights, sample)           # (classes·(F + 1),) int64

A photo's gradient of the cross-entropy is the outer product r·[x, 1]ᵀ, r = softmax(Wx + b) − y (of any other loss of
the logits, r is its derivative by them, which `vision.loss` has), so its norm is ‖r‖·‖[x, 1]‖ and no gradient needs to
be held: the sum over a sample is one matrix product. The result is what `gradients.ClippedSum` returns, to a millionth
of C (times the largest feature, where that is over 1); it is two orders of magnitude faster.

**Exactness.** Features are rounded once to multiples of 2⁻²⁵, and each residual, scaled to its clipped length, to an
integer ρ in units of u = 2^(fine_exponent + 25). A contribution is ρ·[x, 1]ᵀ·u, an integer matrix in fine units,
whose norm is exactly ‖ρ‖·‖[x, 1]‖·u. ρ is rounded to nearest, or towards zero where nearest would be longer than C
allows; lengths are compared in float64 with 2⁻³⁰ to spare, over a hundred times its error for any F up to 2¹⁷.
Coordinates of a contribution are below 2⁴⁶ fine units, so a product over 128 photos is exact in float64, in any order
of addition, and those products add up in int64.

**Sensitivity.** An example added must not change another's ρ, not even by a bit. ρ comes from its own row, but a
matrix kernel may round a row by its position; see `gradients`, where the property is explained. It is tried out before
the first sum, when a `HeadSum` is made; where it fails, rows are computed one at a time.

References: Goodfellow 2015, "Efficient Per-Example Gradient Computations" (the norm of an outer product); Casacuberta,
Shoemate, Vadhan, Wagaman 2022 (why float sums do not do).
"""

import logging
import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from hanse_common.privacy.encoding import NORM_BITS
from hanse_common.randomness import AesCtrStream
from hanse_common.vision.extraction import full_precision
from hanse_common.vision.loss import Objective
from hanse_common.vision.recipe_model import Loss

log = logging.getLogger(__name__)

MAX_SAMPLE = 1 << (62 - NORM_BITS)
"""Bound of the photos of one sum, which int64 then holds."""

_FEATURE_BITS = 25
_ROWS = 1 << (53 - NORM_BITS)  # whose products add up exactly
_GROUPS = {"cpu": 1, "cuda": 8}  # of so many rows, computed at once: a GPU's kernels take no longer for them
_ALIGNMENT = 16  # numbers: 64 bytes of float32, a cache line and the widest vector register
_SLACK = 1 - 2.0**-30
_TRIALS = 2
_PLAIN = Loss()


class HeadSum:
    """Sums clipped gradients of a linear head over samples of one merchant's features.

    Args:
        features: shape (n, F), float32. Rows that are not finite contribute zero. A rounded copy is kept.
        labels: shape (n,), int64, on the same device: classes from 0.
        classes: K, how many there are.
        clipping_norm: C > 0.
        fine_exponent: the unit of the result is 2**fine_exponent; C is less than 2⁴⁶ of them.
        loss: what photos are trained by; the cross-entropy, by default.

    Raises:
        ValueError: a shape, a type, a number or a label is out of range.
    """

    def __init__(
        self,
        features: Tensor,
        labels: Tensor,
        classes: int,
        clipping_norm: float,
        fine_exponent: int,
        loss: Loss = _PLAIN,
    ) -> None:
        if features.ndim != 2 or features.dtype != torch.float32:
            raise ValueError(
                f"features: expected float32 of shape (n, F), found {features.dtype} {tuple(features.shape)}."
            )
        if labels.dtype != torch.int64 or labels.shape != features.shape[:1]:
            raise ValueError(
                f"labels: expected int64 of shape ({len(features)},), found {labels.dtype} {tuple(labels.shape)}."
            )
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise ValueError(f"labels: expected classes 0 to {classes - 1}, found another.")
        if not 0 < math.ldexp(clipping_norm, -fine_exponent) <= 1 << NORM_BITS:
            raise ValueError(
                f"Expected 0 < clipping_norm ≤ 2^{NORM_BITS} fine units, found "
                f"{math.ldexp(clipping_norm, -fine_exponent):g}."
            )
        self._objective = Objective(loss, classes, features.device)
        self._labels = labels
        self._classes = classes
        self._width = features.shape[1]
        # C in the unit of ρ: exact, as all units are powers of two.
        self._longest = math.ldexp(clipping_norm, -fine_exponent - _FEATURE_BITS)
        self._scale = math.ldexp(1.0, -fine_exponent - _FEATURE_BITS)
        self._examples, self._norms, self._usable = _prepared(features)
        full_precision()
        self._groups = _GROUPS["cuda" if features.device.type == "cuda" else "cpu"]
        self._rows = self._groups * _ROWS
        if not self._positions_do_not_matter():
            self._groups = self._rows = 1

    def sum(self, weights: NDArray[np.float64], sample: NDArray[np.intp]) -> NDArray[np.int64]:
        """Return the sum of the sampled photos' clipped gradients.

        Args:
            weights: shape (K·(F + 1),), float64: the head's weight, row-major, then its bias.
            sample: indices of photos; at most `MAX_SAMPLE` of them.

        Returns:
            Shape (K·(F + 1),), int64, in units of 2^fine_exponent, ordered as `weights`.

        Raises:
            ValueError: `weights` has another shape, or `sample` is too large for int64.
        """
        expected = self._classes * (self._width + 1)
        if weights.shape != (expected,):
            raise ValueError(f"weights: expected shape ({expected},), found {weights.shape}.")
        if len(sample) > MAX_SAMPLE:
            raise ValueError(f"Expected at most {MAX_SAMPLE} photos in a sample, found {len(sample)}.")
        head = self._padded(weights)
        device = self._examples.device
        chosen = torch.from_numpy(sample).to(device)
        total = torch.zeros((self._classes, self._width + 1), dtype=torch.int64, device=device)
        rows = torch.zeros((self._rows, self._examples.shape[1]), device=device)
        labels = torch.zeros(self._rows, dtype=torch.int64, device=device)
        wide = torch.empty_like(rows, dtype=torch.float64)
        norms = torch.ones(self._rows, dtype=torch.float64, device=device)
        usable = torch.zeros(self._rows, dtype=torch.bool, device=device)
        for part in torch.split(chosen, self._rows):
            count = len(part)
            torch.index_select(self._examples, 0, part, out=rows[:count])
            labels[:count] = self._labels[part]
            norms[:count] = self._norms[part]
            usable[:count] = self._usable[part]
            usable[count:] = False
            scaled = self._scaled_residuals(self._residuals(rows, labels, head), norms, usable)
            product = _products(scaled, wide.copy_(rows), self._groups)[..., : self._width + 1]
            total += product.mul_(1 << _FEATURE_BITS).to(torch.int64).sum(dim=0)
        return torch.cat([total[:, :-1].reshape(-1), total[:, -1]]).cpu().numpy()

    def _padded(self, weights: NDArray[np.float64]) -> Tensor:
        """Return the head as rows [w, b, 0, …], float32, as wide as the examples'."""
        split = self._classes * self._width
        head = torch.zeros((self._classes, self._examples.shape[1]), device=self._examples.device)
        vector = torch.from_numpy(weights.astype(np.float32))
        head[:, : self._width] = vector[:split].view(self._classes, self._width)
        head[:, self._width] = vector[split:]
        return head

    def _residuals(self, rows: Tensor, labels: Tensor, head: Tensor) -> Tensor:
        """Return the loss's derivative by the logits head·row for each row, shape (rows, K), float64."""
        return self._objective.residuals(F.linear(rows, head), labels)

    def _scaled_residuals(self, residuals: Tensor, norms: Tensor, usable: Tensor) -> Tensor:
        """Return ρ for each row, shape (rows, K), float64 integers; zero where a row is not usable."""
        lengths = torch.linalg.vector_norm(residuals, dim=1) * norms
        usable = usable & torch.isfinite(lengths)
        factors = (self._longest / (lengths * self._scale)).clamp(max=1.0) * self._scale
        exact = residuals * factors[:, None]
        nearest = exact.round()
        longest = self._longest * _SLACK
        too_long = torch.linalg.vector_norm(nearest, dim=1) * norms > longest
        shorter = (exact * _SLACK).trunc_()
        chosen = torch.where(too_long[:, None], shorter, nearest)
        return torch.where(usable[:, None], chosen, torch.zeros_like(chosen))

    def _positions_do_not_matter(self) -> bool:
        """Return whether equal rows get equal residuals. Uses random numbers, no photo."""
        source = AesCtrStream(bytes(32))
        device, width = self._examples.device, self._examples.shape[1]
        rows = torch.zeros((self._rows, width), device=device)
        labels = torch.zeros(self._rows, dtype=torch.int64, device=device)
        for _ in range(_TRIALS):
            head = _random((self._classes, width), source).to(device)
            rows[:] = _random((1, width), source).to(device)
            found = self._residuals(rows, labels, head)
            if not torch.equal(found, found[:1].expand_as(found)):
                log.warning("Here a row's residual depends on its position; rows are computed one at a time.")
                return False
        return True


def _prepared(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows [x, 1, 0, …] rounded to the unit, the norms of [x, 1] in float64, and which rows are usable."""
    count, width = features.shape
    padded = -(-(width + 1) // _ALIGNMENT) * _ALIGNMENT
    rows = torch.zeros((count, padded), device=features.device)
    unit = float(1 << _FEATURE_BITS)
    norms = torch.ones(count, dtype=torch.float64, device=features.device)
    for start in range(0, count, 1024):
        part = rows[start : start + 1024]
        part[:, :width] = (features[start : start + 1024] * unit).round_().div_(unit)
        part[:, width] = 1.0
        norms[start : start + 1024] = torch.linalg.vector_norm(part, dim=1, dtype=torch.float64)
    usable = torch.isfinite(norms)
    rows[~usable] = 0.0
    norms[~usable] = 1.0
    return rows, norms, usable


def _products(scaled: Tensor, rows: Tensor, groups: int) -> Tensor:
    """Return scaledᵀ·rows of each group of rows, (groups, K, padded). One group is one product, faster on a CPU."""
    if groups == 1:
        return (scaled.T @ rows)[None]
    return torch.bmm(scaled.view(groups, -1, scaled.shape[1]).mT, rows.view(groups, -1, rows.shape[1]))


def _random(shape: torch.Size | tuple[int, int], source: AesCtrStream) -> Tensor:
    words = source.words(math.prod(shape)) / 2.0**63 - 1.0
    return torch.from_numpy(words.astype(np.float32)).reshape(shape)
