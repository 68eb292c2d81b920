"""Per-example gradients by Opacus, clipped one by one, and summed exactly as integers.

    >>> import torch
    >>> model = torch.nn.Linear(3, 2)
    >>> with ClippedSum(model, clipping_norm=1.0, fine_exponent=-30) as clipped:
    ...     total = clipped.sum(torch.ones(5, 3), torch.zeros(5, dtype=torch.int64))
    >>> total.shape, total.dtype
    ((8,), dtype('int64'))

One example's contribution: the gradient of its own cross-entropy, clipped to Euclidean norm C, in units of
2^fine_exponent, each coordinate truncated towards zero. The integers are added as int64, where nothing is
lost, so the sum depends neither on the order of the examples nor on how they are batched.

What is guaranteed
- *Norm.* Every contribution, read as exact integers, has norm at most C. The norm of the float32 gradient is
  computed in float64, where its relative error is below d·2⁻⁵³; the gradient is scaled by
  min(1, C/norm)·(1 − 2⁻²⁰), so rounding cannot reach C for any d < 2³¹; truncation shortens. This holds
  whatever the float32 arithmetic before it did.
- *Sensitivity.* Adding an example changes the sum by its contribution alone, hence by at most C, provided
  that no other example's gradient changes, not even in its last bit. A matrix kernel may add up a row in
  another order when the matrix has another height (here: below four rows) or the row another alignment in
  memory (here: widths that are no multiple of 4, before fewer than 16 outputs). Small as they are, thousands
  of such changes add up to more than C has room for. So the model always runs on exactly `microbatch` rows,
  aligned to 64 bytes, the last ones padded with zeros. That a row's bits then depend neither on the other rows
  nor on its own position is a property of today's kernels, not a promise of theirs. So it is tried out
  before the first sum, on random numbers in every position; where it fails, rows are computed one at a time,
  which is slow and needs no such property. The tests compare bits, too.
- *Dropout* masks come from torch's default generator, one for each row, so the example added shifts the masks
  of those behind it. Masks are identically distributed and independent of the photos: pair each photo with
  its mask, and the bound holds for every outcome of the masks.
- *Non-finite* gradients (a hostile photo, an overflow) contribute exactly zero. An overflow of the float32
  *norm* is none: finite gradients are clipped however long they are.

Opacus' "ghost" modes are not offered: they never hold a clipped per-example gradient, and add up in float32
inside one matrix product, where an added example may change how all the others are rounded.

References: Abadi et al. 2016, "Deep Learning with Differential Privacy", algorithm 1 (clipping); Casacuberta,
Shoemate, Vadhan, Wagaman 2022, "Widespread Underestimation of Sensitivity in Differentially Private Libraries
and How to Fix It" (why float sums do not do); Yousefpour et al. 2021, "Opacus".
"""

import logging
import math
import warnings
from types import TracebackType
from typing import Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from opacus.grad_sample.utils import wrap_model
from opacus.validators import ModuleValidator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from hanse_common.errors import RecognizerError
from hanse_common.randomness import AesCtrStream

log = logging.getLogger(__name__)

GradSampleMode = Literal["hooks", "functorch", "ew"]
"""How Opacus obtains per-example gradients: its own formula for each layer, `torch.func`, or torch's expanded
weights (supports fewer layers). The results differ in rounding only."""

# CPU ms for 500 examples on one core (`hanse_simulations.benchmarks.gradients` measures yours):
#                                         hooks   functorch   ew      with microbatch 32
#   linear head 1500 → 10, d = 15 010       18       26       16
#   MLP 1500 → 64 → 10, d = 96 714         158      214      132
#   CNN 28×28, width 16, d = 26 090        230      305      219
#   CNN 28×28, width 32, d = 98 250        589      693      526
# "hooks" takes any layer, at most a quarter behind "ew", which refuses layers that torch has no rule for.
DEFAULT_MODE: GradSampleMode = "hooks"

_SLACK = 1 - 2.0**-20
_ALIGNMENT = 16  # numbers: 64 bytes of float32, a cache line and the widest vector register
_TRIALS = 2
_EXACT = 2**53  # float64 has no finer steps to offer beyond
_BLOCK = {
    "cpu": 2**15,
    "cuda": 2**24,
}  # numbers quantised at a time: half a core's L2 cache, or a kernel's worth


class ClippedSum:
    """Sums clipped per-example gradients of one model. Close it, or use it as a context manager.

    While open, the model carries Opacus' hooks, and in-place activations compute out of place (hooks need
    their inputs); closing undoes both. Parameters may take other values between sums; `.grad` is cleared.

    Args:
        model: in training mode; maps (n, …) to logits (n, classes), each row from its own row alone. Batch
            normalisation is recognised and refused; a layer of one's own that mixes rows is not.
        clipping_norm: C > 0.
        fine_exponent: the unit of the result is 2**fine_exponent.
        mode: see `GradSampleMode`.
        microbatch: rows computed at once, which takes about 8·d·microbatch bytes. The last, padded one costs
            as much as a full one.

    Raises:
        RecognizerError: the model has layers that mix examples or that Opacus cannot handle, or nothing to
            train; all of them are named.
        ValueError: a number is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        clipping_norm: float,
        fine_exponent: int,
        *,
        mode: GradSampleMode = DEFAULT_MODE,
        microbatch: int = 32,
    ) -> None:
        if not 0 < clipping_norm < math.inf:
            raise ValueError(f"Expected a finite clipping_norm > 0, found {clipping_norm}.")
        if microbatch < 1:
            raise ValueError(f"Expected microbatch ≥ 1, found {microbatch}.")
        self._clipping_norm = clipping_norm
        self._scale = math.ldexp(1.0, -fine_exponent)
        self._largest = math.ceil(clipping_norm * self._scale)  # of one coordinate of one contribution
        if self._largest >= _EXACT:
            raise ValueError(
                f"Expected clipping_norm / 2^fine_exponent < 2^53, found {self._largest}. "
                "Choose a coarser unit."
            )
        _refuse_unsupported(model)
        self._model = model
        self._microbatch = microbatch
        self._tried: tuple[int, ...] = ()
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._wrapped = wrap_model(model, mode, loss_reduction="sum")
        self._in_place = [layer for layer in model.modules() if getattr(layer, "inplace", False) is True]
        for layer in self._in_place:
            layer.inplace = False  # type: ignore[assignment]  # a plain attribute of activations and dropouts

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take Opacus off the model again. Closing twice does nothing."""
        if self._wrapped is not None:
            self._clear()
            self._wrapped.to_standard_module()
            self._wrapped = None
            for layer in self._in_place:
                layer.inplace = True  # type: ignore[assignment]

    @property
    def dimension(self) -> int:
        """d, the number of trainable parameters."""
        return sum(parameter.numel() for parameter in self._parameters)

    def sum(self, inputs: Tensor, targets: Tensor) -> NDArray[np.int64]:
        """Return the sum of the examples' clipped gradients.

        Args:
            inputs: shape (n, …), floating point, on the model's device; n may be 0.
            targets: shape (n,), int64, on the model's device: the class of each input.

        Returns:
            Shape (d,), int64, in units of 2^fine_exponent: parameters in the order of `model.parameters()`,
            frozen ones left out, each in row-major order.

        Raises:
            ValueError: shapes or types do not fit, a target is no class, or n is so large that int64 could
                overflow.
            RecognizerError: the model does not give one row of logits, or one gradient, for each example.
        """
        self._check(inputs, targets)
        device = inputs.device
        total = torch.zeros(self.dimension, dtype=torch.int64, device=device)
        rows = self._rows(inputs)
        labels = torch.zeros(self._microbatch, dtype=torch.int64, device=device)
        for start in range(0, len(inputs), self._microbatch):
            chunk = inputs[start : start + self._microbatch]
            count = len(chunk)
            rows[:count] = chunk
            labels[:count] = targets[start : start + count]
            rows[count:] = 0
            labels[count:] = 0
            gradients = [gradient[:count] for gradient in self._gradients(rows, labels)]
            total += self._quantised_sum(gradients)
        exact: NDArray[np.int64] = total.cpu().numpy()
        return exact

    def _check(self, inputs: Tensor, targets: Tensor) -> None:
        if self._wrapped is None:
            raise ValueError("This ClippedSum is closed. Make a new one.")
        if not all(layer.training for layer in self._model.modules() if _is_trainable(layer)):
            raise RecognizerError("Model: expected every layer with trainable parameters in training mode.")
        if not inputs.is_floating_point() or inputs.ndim < 2:
            raise ValueError(
                "inputs: expected floating point of shape (n, …), "
                f"found {inputs.dtype} {tuple(inputs.shape)}."
            )
        if targets.dtype != torch.int64 or targets.shape != inputs.shape[:1]:
            raise ValueError(
                f"targets: expected int64 of shape ({len(inputs)},), "
                f"found {targets.dtype} {tuple(targets.shape)}."
            )
        if len(inputs) * self._largest >= 2**63:
            raise ValueError(
                f"Expected a sum within int64, found {len(inputs)} examples. Sum fewer at a time."
            )

    def _rows(self, inputs: Tensor) -> Tensor:
        """Return the block of memory for a microbatch of `inputs`, after a trial of what rests on it."""
        if self._tried != inputs.shape[1:] and self._microbatch > 1:
            if self._position_matters(_aligned(self._microbatch, inputs)):
                log.warning("Here a row's gradient depends on its position; rows are computed one at a time.")
                self._microbatch = 1
            self._tried = tuple(inputs.shape[1:])
        return _aligned(self._microbatch, inputs)

    def _position_matters(self, rows: Tensor) -> bool:
        """Return whether equal rows get gradients that differ. Uses random numbers, no photo."""
        kept = [parameter.detach().clone() for parameter in self._parameters]
        dropouts = [
            layer for layer in self._model.modules() if isinstance(layer, _DropoutNd) and layer.training
        ]
        source = AesCtrStream(bytes(32))
        labels = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
        try:
            for layer in dropouts:
                layer.eval()
            for parameter in self._parameters:
                _fill(parameter.data, source, 0.1)
            for _ in range(_TRIALS):
                _fill(rows, source, 1.0)
                rows[1:] = rows[:1]
                if any(
                    not torch.equal(part, part[:1].expand_as(part)) for part in self._gradients(rows, labels)
                ):
                    return True
            return False
        finally:
            for parameter, value in zip(self._parameters, kept, strict=True):
                parameter.data.copy_(value)
            for layer in dropouts:
                layer.train()

    def _gradients(self, rows: Tensor, labels: Tensor) -> list[Tensor]:
        """Return each parameter's per-example gradients, flat: shapes (microbatch, numbers in it)."""
        self._clear()
        with torch.enable_grad(), warnings.catch_warnings():
            # Opacus' hooks use the outputs' gradients only, which is what torch warns they may do.
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            logits = self._wrapped(rows)
            if logits.ndim != 2 or len(logits) != len(rows):
                raise RecognizerError(
                    f"Model: expected logits of shape ({len(rows)}, classes), found {tuple(logits.shape)}."
                )
            if labels.min() < 0 or labels.max() >= logits.shape[1]:
                raise ValueError(f"targets: expected classes 0 to {logits.shape[1] - 1}, found another.")
            F.cross_entropy(logits, labels, reduction="sum").backward()  # type: ignore[no-untyped-call]
        gradients = [_flat_grad_sample(parameter, len(rows)) for parameter in self._parameters]
        self._clear()
        return gradients

    def _clear(self) -> None:
        """Forget the last microbatch, also one that an error broke off between forward and backward."""
        for layer in self._model.modules():
            layer.__dict__.pop("activations", None)
            layer.__dict__.pop("max_batch_len", None)
        for parameter in self._parameters:
            parameter.grad = None
            parameter.grad_sample = None  # type: ignore[attr-defined]  # these three are Opacus' own
            parameter._forward_counter = 0  # type: ignore[attr-defined]
            parameter.__dict__.pop("_current_grad_sample", None)

    def _quantised_sum(self, gradients: list[Tensor]) -> Tensor:
        """Return the sum of the clipped rows in fine units, shape (d,), int64. Rows are examples."""
        norms = torch.linalg.vector_norm(
            torch.stack([torch.linalg.vector_norm(part, dim=1, dtype=torch.float64) for part in gradients]),
            dim=0,
        )
        finite = torch.isfinite(norms)
        if not finite.all():
            gradients = [part[finite] for part in gradients]
            norms = norms[finite]
        factors = (self._clipping_norm / norms).clamp(max=1.0) * (_SLACK * self._scale)
        return torch.cat([_truncated_sum(part, factors) for part in gradients])


def _truncated_sum(gradients: Tensor, factors: Tensor) -> Tensor:
    """Return Σᵢ trunc(factorsᵢ·gradientsᵢ), shape (numbers,), int64, exactly."""
    count, numbers = gradients.shape
    device = gradients.device
    height = max(1, min(count, _BLOCK.get(device.type, _BLOCK["cpu"]) // numbers))
    scaled = torch.empty((height, numbers), dtype=torch.float64, device=device)
    truncated = torch.empty((height, numbers), dtype=torch.int64, device=device)
    total = torch.zeros(numbers, dtype=torch.int64, device=device)
    for start in range(0, count, height):
        part = gradients[start : start + height]
        scaled[: len(part)].copy_(part).mul_(factors[start : start + height, None])
        # The conversion truncates towards zero, several times faster than `trunc` does.
        total += truncated[: len(part)].copy_(scaled[: len(part)]).sum(dim=0)
    return total


def _flat_grad_sample(parameter: nn.Parameter, rows: int) -> Tensor:
    """Return Opacus' per-example gradients of one parameter, shape (rows, numbers in it)."""
    found = parameter.grad_sample  # type: ignore[attr-defined]
    if found is None and parameter.grad is None:  # the parameter had no part in the logits
        return torch.zeros((rows, parameter.numel()), dtype=parameter.dtype, device=parameter.device)
    if not isinstance(found, Tensor) or found.shape != (rows, *parameter.shape):
        raise RecognizerError(
            f"Model: Opacus gave no per-example gradients of a parameter of shape {tuple(parameter.shape)}. "
            "Every layer must take and give one row for each example."
        )
    return found.detach().reshape(rows, -1)


def _is_trainable(layer: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in layer.parameters(recurse=False))


def _refuse_unsupported(model: nn.Module) -> None:
    """Raise `RecognizerError` that names every reason why `model` cannot be trained example by example."""
    faults = [str(error) for error in ModuleValidator.validate(model, strict=False)]
    for name, layer in model.named_modules():
        if isinstance(layer, _BatchNorm) and (layer.training or layer.running_mean is None):
            faults.append(f"{name} ({type(layer).__name__}) mixes the examples of a batch; use GroupNorm.")
        elif _is_trainable(layer) and any(True for _ in layer.buffers(recurse=False)):
            faults.append(f"{name} ({type(layer).__name__}) has buffers beside trainable parameters.")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        faults.append("no parameter is trainable.")
    if faults:
        raise RecognizerError(
            "Model: cannot be trained under differential privacy:\n- " + "\n- ".join(faults)
        )


def _aligned(count: int, like: Tensor) -> Tensor:
    """Return zeros of shape (count, …) as `like` has it, each row at a multiple of `_ALIGNMENT` numbers."""
    shape = like.shape[1:]
    stride = -(-math.prod(shape) // _ALIGNMENT) * _ALIGNMENT
    block = torch.zeros((count, stride), dtype=like.dtype, device=like.device)
    rows: Tensor = block[:, : math.prod(shape)].view(count, *shape)
    return rows


def _fill(tensor: Tensor, source: AesCtrStream, scale: float) -> None:
    """Fill `tensor` with numbers in ±scale."""
    uniform = source.words(tensor.numel()) / 2.0**63 - 1.0
    tensor.copy_(torch.from_numpy(scale * uniform).reshape(tensor.shape))
