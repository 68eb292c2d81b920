"""Per-example gradients, clipped one by one, and summed exactly as integers.

    >>> import torch
    >>> model = torch.nn.Linear(3, 2)
    >>> with ClippedSum(model, clipping_norm=1.0, fine_exponent=-30) as clipped:
    ...     total = clipped.sum(torch.ones(5, 3), torch.zeros(5, dtype=torch.int64))
    >>> total.shape, total.dtype
    ((8,), dtype('int64'))

One example's contribution: the gradient of its own loss (`vision.loss`; cross-entropy by default), clipped to Euclidean
norm C, in units of 2^fine_exponent, each coordinate truncated towards zero. The integers are added exactly, so the sum
depends neither on the order of the examples nor on how they are batched.

What is guaranteed
- *Norm.* Every contribution, read as exact integers, has norm at most C. The norm of the float32 gradient is
  computed in float64, where its relative error is below 2⁻²²; the gradient is scaled by
  min(1, C/norm)·(1 − 2⁻²⁰) in one float32 division, whose divisor and result are each off by 2⁻²⁴ at most, so
  rounding cannot reach C for any d < 2³¹; truncation shortens, and every float32 beyond 2²⁴ is an integer. This
  holds whatever the float32 arithmetic before it did.
- *Sensitivity.* Adding an example changes the sum by its contribution alone, hence by at most C, provided
  that no other example's gradient changes, not even in its last bit. A matrix kernel may add up a row in
  another order when the matrix has another height (here: below four rows) or the row another alignment in
  memory (here: widths that are no multiple of 4, before fewer than 16 outputs). Small as they are, thousands
  of such changes add up to more than C has room for. So the model always runs on exactly `microbatch` rows,
  aligned to 64 bytes, the last ones padded with zeros. How many they are is found out on random numbers before
  the first sum (`extraction.fitting_rows`), and never again. That a row's bits then depend neither on the other rows
  nor on its own position is a property of today's kernels, not a promise of theirs. So it is tried out
  before the first sum, on random numbers in every position; where it fails, rows are computed one at a time,
  which is slow and needs no such property. The tests compare bits, too.
- *Dropout* masks come from torch's default generator, one for each row, so the example added shifts the masks
  of those behind it. Masks are identically distributed and independent of the photos: pair each photo with
  its mask, and the bound holds for every outcome of the masks.
- *Non-finite* gradients (a hostile photo, an overflow) contribute exactly zero. An overflow of the float32
  *norm* is none: finite gradients are clipped however long they are.

How an example's gradient is computed, and fast, is the concern of `layer_gradients`.

Opacus' "ghost" modes are not offered: they never hold a clipped per-example gradient, and add up in float32
inside one matrix product, where an added example may change how all the others are rounded.

References: Abadi et al. 2016, "Deep Learning with Differential Privacy", algorithm 1 (clipping); Casacuberta,
Shoemate, Vadhan, Wagaman 2022, "Widespread Underestimation of Sensitivity in Differentially Private Libraries
and How to Fix It" (why float sums do not do).
"""

import logging
import math
from functools import partial
from types import TracebackType
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.dropout import _DropoutNd

from hanse_client import cuda_sums
from hanse_client.layer_gradients import DEFAULT_MODE, GradSampleMode, LayerGradients
from hanse_common.errors import RecognizerError
from hanse_common.randomness import AesCtrStream
from hanse_common.vision.extraction import device_index, fitting_rows, full_precision
from hanse_common.vision.loss import Objective

__all__ = ["ClippedSum", "GradSampleMode"]

log = logging.getLogger(__name__)

_SLACK = 1 - 2.0**-20
_ALIGNMENT = 16  # numbers: 64 bytes of float32, a cache line and the widest vector register
_TRIALS = 2
_EXACT = 2**53  # float64 has no finer steps to offer beyond
_FLOAT32_EXPONENTS = 100  # a fine unit within 2^±100 leaves a divisor room in float32
_BLOCK = {
    "cpu": 2**16,
    "cuda": 2**28,
}  # numbers quantised at a time: what a core's L2 cache holds; on a GPU, little beside the gradients themselves
_ROWS = {
    "cpu": 32,
    "cuda": 1024,
}  # more are hardly faster, and the last, padded microbatch costs as much as a full one
_GRADIENTS = (
    2**31
)  # numbers of a microbatch's gradients: so much keeps a GPU busy, and more only adds padding


class ClippedSum:
    """Sums clipped per-example gradients of one model. Close it, or use it as a context manager.

    While open, in-place activations compute out of place (formulas need the layers' outputs); closing undoes
    it. Parameters may take other values between sums; `.grad` is left alone.

    Args:
        model: in training mode; maps (n, …) to logits (n, classes), each row from its own row alone. Batch
            normalisation is recognised and refused; a layer of one's own that mixes rows is not.
        clipping_norm: C > 0.
        fine_exponent: the unit of the result is 2**fine_exponent.
        loss: see `vision.loss`; the classes' cross-entropy, by default.
        mode: see `GradSampleMode`.
        microbatch: rows computed at once; by default as many as fit in `memory`, up to 32, on a GPU 1024 (fewer of a
            large net's).
        memory: what a microbatch may take, in bytes; for the default see `fitting_rows`.

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
        loss: Objective | None = None,
        mode: GradSampleMode = DEFAULT_MODE,
        microbatch: int | None = None,
        memory: int | None = None,
    ) -> None:
        if not 0 < clipping_norm < math.inf:
            raise ValueError(f"Expected a finite clipping_norm > 0, found {clipping_norm}.")
        if microbatch is not None and microbatch < 1:
            raise ValueError(f"Expected microbatch ≥ 1, found {microbatch}.")
        self._clipping_norm = clipping_norm
        if abs(fine_exponent) > _FLOAT32_EXPONENTS:
            raise ValueError(
                f"Expected a fine_exponent within ±{_FLOAT32_EXPONENTS}, found {fine_exponent}. "
                "Choose another clipping norm."
            )
        self._scale = math.ldexp(1.0, -fine_exponent)
        self._largest = math.ceil(clipping_norm * self._scale)  # of one coordinate of one contribution
        if self._largest >= _EXACT:
            raise ValueError(
                f"Expected clipping_norm / 2^fine_exponent < 2^53, found {self._largest}. "
                "Choose a coarser unit."
            )
        self._model = model
        self._loss = loss
        self._gradients = LayerGradients(model, mode)
        self._wanted = microbatch
        self._memory = memory
        self._microbatch = 0
        self._tried: tuple[int, ...] = ()
        self._open = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave the model as it was. Closing twice does nothing."""
        if self._open:
            self._open = False
            self._gradients.close()

    @property
    def dimension(self) -> int:
        """d, the number of trainable parameters."""
        return self._gradients.dimension

    @property
    def microbatch(self) -> int:
        """How many rows are computed at once; 0 before `prepare`."""
        return self._microbatch

    def prepare(self, like: Tensor) -> None:
        """Find out, on random numbers alone, how many rows like those of `like`, (n, …), are computed at once.

        `sum` does it where it was not done before. Raises `RecognizerError` as `sum` does, and when not even one row
        fits in `memory`; what torch raises when memory runs out at one row.
        """
        shape = tuple(like.shape[1:])
        if self._tried == shape:
            return
        full_precision()
        # Dropout masks must not shift with what is tried out here.
        with torch.random.fork_rng(devices=cuda_devices(like.device)):
            self._microbatch = self._wanted or self._fitting(like)
            if self._position_matters(_aligned(self._microbatch, like)):
                log.warning("Here a row's gradient depends on its position; rows are computed one at a time.")
                self._microbatch = 1
                self._position_matters(_aligned(1, like))
        self._tried = shape

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
        total = torch.zeros(self._gradients.width, dtype=torch.int64, device=device)
        self.prepare(inputs)
        rows = _aligned(self._microbatch, inputs)
        labels = torch.zeros(self._microbatch, dtype=torch.int64, device=device)
        loss = partial(self._losses, labels=labels)
        for start in range(0, len(inputs), self._microbatch):
            chunk = inputs[start : start + self._microbatch]
            count = len(chunk)
            rows[:count] = chunk
            labels[:count] = targets[start : start + count]
            rows[count:] = 0
            labels[count:] = 0
            self._add_quantised(total, self._gradients.of(rows, loss), count)
        return _on_host(self._gradients.in_order(total))

    def _losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the sum of the rows' losses."""
        if logits.ndim != 2 or len(logits) != len(labels):
            raise RecognizerError(
                f"Model: expected logits of shape ({len(labels)}, classes), found {tuple(logits.shape)}."
            )
        if labels.min() < 0 or labels.max() >= logits.shape[1]:
            raise ValueError(f"targets: expected classes 0 to {logits.shape[1] - 1}, found another.")
        if self._loss is None:
            return F.cross_entropy(logits, labels, reduction="sum")
        return self._loss.of(logits, labels).sum()

    def _check(self, inputs: Tensor, targets: Tensor) -> None:
        if not self._open:
            raise ValueError("This ClippedSum is closed. Make a new one.")
        if not self._gradients.in_training_mode:
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

    def _fitting(self, like: Tensor) -> int:
        """Return how many rows like those of `like` fit in the memory there is for them."""

        def trial(count: int) -> None:
            rows = _aligned(count, like)
            labels = torch.zeros(count, dtype=torch.int64, device=like.device)
            total = torch.zeros(self._gradients.width, dtype=torch.int64, device=like.device)
            self._add_quantised(total, self._gradients.of(rows, partial(self._losses, labels=labels)), count)
            self._gradients.in_order(total)
            self._gradients.release()

        most = _ROWS["cuda" if like.device.type == "cuda" else "cpu"]
        most = min(most, 1 << max(0, (_GRADIENTS // self.dimension).bit_length() - 1))
        return fitting_rows(trial, most, like.device, self._memory)

    def _position_matters(self, rows: Tensor) -> bool:
        """Return whether equal rows get gradients, or norms, that differ. Uses random numbers, no photo.

        Raises `RecognizerError` if the gradients do not add up to autograd's own: then a layer's parameters are
        used outside of the layer.
        """
        parameters = self._gradients.parameters
        kept = [parameter.detach().clone() for parameter in parameters]
        dropouts = [
            layer for layer in self._model.modules() if isinstance(layer, _DropoutNd) and layer.training
        ]
        source = AesCtrStream(bytes(32))
        loss = partial(self._losses, labels=torch.zeros(len(rows), dtype=torch.int64, device=rows.device))
        try:
            for layer in dropouts:
                layer.eval()
            for parameter in parameters:
                _fill(parameter.data, source, 0.1)
            for _ in range(_TRIALS):
                _fill(rows, source, 1.0)
                rows[1:] = rows[:1]
                found = self._gradients.of(rows, loss)
                norms = _norms(found)
                if any(not torch.equal(x, x[:1].expand_as(x)) for x in (found, norms)):
                    return True
            self._gradients.compare_with_autograd(rows, loss)
            return False
        finally:
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.data.copy_(value)
            for layer in dropouts:
                layer.train()

    def _add_quantised(self, total: Tensor, gradients: Tensor, count: int) -> None:
        """Add the first `count` rows, clipped, in fine units to `total`, shape (width,), int64. Rows may be spoilt."""
        # Of all rows, the padding too: how a norm is added up may depend on how many there are.
        norms = _norms(gradients)[:count]
        finite = torch.isfinite(norms)
        factors = (self._clipping_norm / norms).clamp(max=1.0) * (_SLACK * self._scale)
        divisors = (1.0 / factors).to(gradients.dtype)
        kernels = _kernels(gradients)
        if kernels is not None:
            kernels.add(total, gradients[:count], torch.where(finite, divisors, 0.0))
            return
        if not finite.all():
            gradients[:count][~finite] = 0
            divisors[~finite] = 1
        # So many truncated numbers add up in float64 without rounding, in any order.
        exactly = _EXACT // self._largest
        for part, sums in zip(_blocks(gradients[:count]), _blocks(total, count), strict=True):
            truncated = part.div_(divisors[:, None], rounding_mode="trunc")
            for some in torch.split(truncated, exactly):
                sums += some.sum(dim=0, dtype=torch.float64).to(torch.int64)


def _kernels(gradients: Tensor) -> cuda_sums.CudaSums | None:
    on_gpu = gradients.device.type == "cuda" and gradients.dtype == torch.float32
    return cuda_sums.load(gradients.device) if on_gpu else None


def _norms(gradients: Tensor) -> Tensor:
    """Return each row's Euclidean norm, float64."""
    kernels = _kernels(gradients)
    if kernels is not None:
        return kernels.norms(gradients)
    parts = [torch.linalg.vector_norm(part, dim=1, dtype=torch.float64) for part in _blocks(gradients)]
    norms: Tensor = torch.linalg.vector_norm(torch.stack(parts), dim=0)
    return norms


def _blocks(numbers: Tensor, rows: int | None = None) -> tuple[Tensor, ...]:
    """Return `numbers`, shape (…, width), in blocks of columns; one has few numbers in `rows` rows, by default all."""
    block = _BLOCK["cuda" if numbers.device.type == "cuda" else "cpu"] // max(1, rows or len(numbers))
    return torch.split(numbers, max(_ALIGNMENT, block // _ALIGNMENT * _ALIGNMENT), dim=-1)


def _on_host(exact: Tensor) -> NDArray[np.int64]:
    """Return `exact` as an array. From a GPU it goes through memory that is kept and pinned, thirty times as fast."""
    if exact.device.type != "cuda":
        return exact.numpy()
    host = torch.empty(exact.shape, dtype=exact.dtype, pin_memory=True)
    return host.copy_(exact).numpy()


def cuda_devices(device: torch.device) -> list[int]:
    """Return the GPUs whose random generator a computation on `device` moves."""
    return [device_index(device)] if device.type == "cuda" else []


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
