"""What a photo is trained by, with its derivative: the recipe's `Loss` in numbers.

    objective = Objective(recipe.loss, classes=10)
    losses = objective.of(logits, labels)             # (n,), for autograd
    residuals = objective.residuals(logits, labels)   # (n, 10) float64, their derivative by the logits

Each row follows from its own logits and label alone, and from public numbers. So weights and smoothing leave the
sensitivity of a sum of clipped gradients as it was: whatever a gradient is, it is clipped after.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from hanse_common.errors import RecognizerError
from hanse_common.vision.recipe_model import Loss


class Objective:
    """The loss of `classes` classes. Raises `ValueError` when `loss` has numbers for another number of classes."""

    def __init__(self, loss: Loss, classes: int, device: torch.device | str = "cpu") -> None:
        loss.require(classes)
        self._classes = classes
        self._smoothing = loss.smoothing
        self._weights = _numbers(loss.class_weights, device)
        self._offsets = _numbers(loss.class_offsets, device)

    def of(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the losses, shape (n,), of `logits`, shape (n, K), floating point, with `labels`, shape (n,), int64.

        Raises `RecognizerError` when the logits have another shape.
        """
        if logits.shape != (len(labels), self._classes):
            raise RecognizerError(
                f"Model: expected logits of shape ({len(labels)}, {self._classes}), found {tuple(logits.shape)}."
            )
        if self._offsets is not None:
            logits = logits + self._offsets.to(logits.dtype)
        losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=self._smoothing)
        return losses if self._weights is None else losses * self._weights.to(losses.dtype)[labels]

    def residuals(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return w·(softmax(z + a) − t) for each row, shape (n, K), float64; arguments as in `of`."""
        wide = logits.double()
        residuals = torch.softmax(wide if self._offsets is None else wide + self._offsets, dim=1)
        if self._smoothing:
            residuals -= self._smoothing / self._classes
        residuals[torch.arange(len(labels), device=labels.device), labels] -= 1.0 - self._smoothing
        return residuals if self._weights is None else residuals.mul_(self._weights[labels, None])


def _numbers(values: tuple[float, ...], device: torch.device | str) -> Tensor | None:
    """Return `values` as float64 on `device`; None for none."""
    return torch.tensor(values, dtype=torch.float64, device=device) if values else None
