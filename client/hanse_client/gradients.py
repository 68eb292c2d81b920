"""Per-example gradients, clipped one by one, and summed exactly as integers.

    >>> import torch
    >>> model = torch.nn.Linear(3, 2)
    >>> with ClippedSum(model, clipping_norm=1.0, fine_exponent=-30) as clipped:
    ...     total = clipped.sum(torch.ones(5, 3), torch.zeros(5, dtype=torch.int64))
    >>> total.shape, total.dtype
    ((8,), dtype('int64'))

One example's contribution: the gradient of its own cross-entropy, clipped to Euclidean norm C, in units of
2^fine_exponent, each coordinate truncated towards zero. The integers are added exactly, so the sum depends neither
on the order of the examples nor on how they are batched.

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

Speed. Autograd stops at each layer's output: the batch's own weight gradients, which nobody needs, are not computed,
as they are where Opacus' hooks sit on the model. Linear layers and plain convolutions write the outer products of
their inputs and output gradients into one block of memory that is used again for every microbatch; other layers
take Opacus' formulas.

Opacus' "ghost" modes are not offered: they never hold a clipped per-example gradient, and add up in float32
inside one matrix product, where an added example may change how all the others are rounded.

References: Abadi et al. 2016, "Deep Learning with Differential Privacy", algorithm 1 (clipping); Casacuberta,
Shoemate, Vadhan, Wagaman 2022, "Widespread Underestimation of Sensitivity in Differentially Private Libraries
and How to Fix It" (why float sums do not do); Yousefpour et al. 2021, "Opacus"; Chellapilla, Puri, Simard 2006,
"High Performance Convolutional Neural Networks for Document Processing" (a convolution as a matrix product).
"""

import logging
import math
from collections.abc import Iterator
from types import TracebackType
from typing import Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from opacus.grad_sample import GradSampleModule
from opacus.grad_sample.functorch import ft_compute_per_sample_gradient
from opacus.validators import ModuleValidator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

from hanse_common.errors import RecognizerError
from hanse_common.randomness import AesCtrStream

log = logging.getLogger(__name__)

GradSampleMode = Literal["hooks", "functorch", "ew"]
"""How per-example gradients are obtained: by a formula for each layer, `torch.func`, or torch's expanded
weights (supports fewer layers). The results differ in rounding only."""

# "hooks" takes any layer; "ew" refuses those that torch has no rule for. `hanse-sim bench gradients` compares speeds.
DEFAULT_MODE: GradSampleMode = "hooks"

_SLACK = 1 - 2.0**-20
_ALIGNMENT = 16  # numbers: 64 bytes of float32, a cache line and the widest vector register
_TRIALS = 2
_EXACT = 2**53  # float64 has no finer steps to offer beyond
_BLOCK = {
    "cpu": 2**16,
    "cuda": 2**24,
}  # numbers quantised at a time: what a core's L2 cache holds, or a kernel's worth
_PATCHES = 2**17  # numbers of a convolution's unrolled inputs at a time: likewise
_STORE = 2**28  # numbers of a microbatch's gradients: a GiB of float32


class ClippedSum:
    """Sums clipped per-example gradients of one model. Close it, or use it as a context manager.

    While open, in-place activations compute out of place (formulas need the layers' outputs); closing undoes
    it. Parameters may take other values between sums; `.grad` is left alone.

    Args:
        model: in training mode; maps (n, …) to logits (n, classes), each row from its own row alone. Batch
            normalisation is recognised and refused; a layer of one's own that mixes rows is not.
        clipping_norm: C > 0.
        fine_exponent: the unit of the result is 2**fine_exponent.
        mode: see `GradSampleMode`.
        microbatch: rows computed at once, which takes about 4·d·microbatch bytes; by default up to 32, and a
            GiB. The last, padded one costs as much as a full one.

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
        microbatch: int | None = None,
    ) -> None:
        if not 0 < clipping_norm < math.inf:
            raise ValueError(f"Expected a finite clipping_norm > 0, found {clipping_norm}.")
        if microbatch is not None and microbatch < 1:
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
        self._mode = mode
        self._layers = [] if mode == "ew" else list(_layers_with_formulas(model))
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._microbatch = microbatch or max(1, min(32, _STORE // self.dimension))
        self._tried: tuple[int, ...] = ()
        self._store = torch.empty(0)
        self._slots: dict[Tensor, Tensor] = {}
        self._open = True
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
        """Leave the model as it was. Closing twice does nothing."""
        if self._open:
            self._open = False
            self._store, self._slots = torch.empty(0), {}
            for layer in self._layers:
                layer.__dict__.pop("ft_compute_sample_grad", None)  # Opacus' own, in mode functorch
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
            self._add_quantised(total, self._gradients(rows, labels)[:count])
        exact: NDArray[np.int64] = torch.cat([part.reshape(-1) for part in self._parts(total)]).cpu().numpy()
        return exact

    def _check(self, inputs: Tensor, targets: Tensor) -> None:
        if not self._open:
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
        if self._tried != inputs.shape[1:]:
            if self._position_matters(_aligned(self._microbatch, inputs)):
                log.warning("Here a row's gradient depends on its position; rows are computed one at a time.")
                self._microbatch = 1
            self._tried = tuple(inputs.shape[1:])
        return _aligned(self._microbatch, inputs)

    def _position_matters(self, rows: Tensor) -> bool:
        """Return whether equal rows get gradients that differ. Uses random numbers, no photo.

        Raises `RecognizerError` if the gradients do not add up to autograd's own: then a layer's parameters are
        used outside of the layer.
        """
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
                found = self._gradients(rows, labels)
                if not torch.equal(found, found[:1].expand_as(found)):
                    return True
            self._compare_with_autograd(rows, labels)
            return False
        finally:
            for parameter, value in zip(self._parameters, kept, strict=True):
                parameter.data.copy_(value)
            for layer in dropouts:
                layer.train()

    def _compare_with_autograd(self, rows: Tensor, labels: Tensor) -> None:
        """Raise `RecognizerError` unless what is in the store adds up, roughly, to autograd's own gradients."""
        with torch.enable_grad():
            loss = _loss(self._model(rows), labels)
            expected = torch.autograd.grad(loss, self._parameters, allow_unused=True, materialize_grads=True)
        # Of all of it, since one parameter's gradient may be zero but for rounding: a bias before a normalisation.
        tolerance = 1e-3 * torch.linalg.vector_norm(torch.stack([part.norm() for part in expected]))
        for parameter, gradient in zip(self._parameters, expected, strict=True):
            if torch.dist(self._slots[parameter].sum(dim=0), gradient) > tolerance:
                raise RecognizerError(
                    f"Model: found wrong per-example gradients of a parameter of shape {tuple(parameter.shape)}. "
                    "A layer's parameters must be used by calling that layer and by nothing else."
                )

    def _gradients(self, rows: Tensor, labels: Tensor) -> Tensor:
        """Return the per-example gradients, shape (microbatch, d), in the store: the next call overwrites them."""
        if len(self._store) != len(rows):
            # Float32 holds the numbers of every shorter type.
            wide = any(parameter.dtype == torch.float64 for parameter in self._parameters)
            dtype = torch.float64 if wide else torch.float32
            self._store = torch.empty((len(rows), self.dimension), dtype=dtype, device=rows.device)
            self._slots = dict(zip(self._parameters, self._parts(self._store), strict=True))
        missing: set[Tensor] = set(self._parameters)
        with torch.enable_grad():
            if self._mode == "ew":
                self._write_expanded_weights(rows, labels, missing)
            else:
                with _Calls(self._layers) as calls:
                    loss = _loss(self._model(rows), labels)
                for layer, inputs, gradient in calls.with_gradients(loss):
                    if len(inputs) != len(rows) or len(gradient) != len(rows):
                        raise RecognizerError(
                            "Model: every layer must take and give one row for each example."
                        )
                    self._write(layer, inputs, gradient, missing)
        for parameter in missing:  # the logits do not depend on it
            self._slots[parameter].zero_()
        return self._store

    def _parts(self, flat: Tensor) -> list[Tensor]:
        """Return each parameter's part of `flat`, shape (…, d), as a view of shape (…, *parameter.shape).

        Weights of convolutions lie in `flat` with channels last, as their formula makes them.
        """
        parts = []
        sizes = [parameter.numel() for parameter in self._parameters]
        for parameter, part in zip(self._parameters, torch.split(flat, sizes, dim=-1), strict=True):
            if parameter.ndim == 4:
                outputs, channels, height, width = parameter.shape
                last = part.view(*part.shape[:-1], outputs, height, width, channels)
                parts.append(last.movedim(-1, -3))
            else:
                parts.append(part.view(*part.shape[:-1], *parameter.shape))
        return parts

    def _write_expanded_weights(self, rows: Tensor, labels: Tensor, missing: set[Tensor]) -> None:
        try:
            expanded = call_for_per_sample_grads(  # type: ignore[no-untyped-call]
                self._model, batch_size=len(rows), loss_reduction="sum"
            )
            _loss(expanded(rows), labels).backward()  # type: ignore[no-untyped-call]
            for parameter in self._parameters:
                if getattr(parameter, "grad_sample", None) is not None:
                    self._put({parameter: parameter.grad_sample}, missing)  # type: ignore[attr-defined]
        finally:
            for parameter in self._parameters:
                parameter.__dict__.pop("grad_sample", None)

    def _write(self, layer: nn.Module, inputs: Tensor, gradient: Tensor, missing: set[Tensor]) -> None:
        """Write one call's per-example gradients into the store, or add them to those of an earlier call."""
        with torch.no_grad():
            if self._mode == "functorch" or type(layer) not in GradSampleModule.GRAD_SAMPLERS:
                self._put(ft_compute_per_sample_gradient(layer, [inputs], gradient), missing)
            elif isinstance(layer, nn.Linear | nn.Conv2d) and _is_plain(layer):
                self._write_products(layer, inputs, gradient, missing)
            else:
                formula = GradSampleModule.GRAD_SAMPLERS[type(layer)]
                self._put(formula(layer, [inputs], gradient), missing)

    def _put(self, found: dict[Tensor, Tensor], missing: set[Tensor]) -> None:
        for parameter, part in found.items():
            if parameter in missing:
                self._slots[parameter].copy_(part)
                missing.remove(parameter)
            elif parameter.requires_grad:
                self._slots[parameter].add_(part)

    def _write_products(
        self, layer: nn.Linear | nn.Conv2d, inputs: Tensor, gradient: Tensor, missing: set[Tensor]
    ) -> None:
        """Write a layer's gradients, which for each example are a product of output gradients and inputs."""
        weight, bias = layer.weight, layer.bias
        count = len(inputs)
        if isinstance(layer, nn.Conv2d):
            patches = _patches(layer, inputs)
            gradient = gradient.permute(0, 2, 3, 1)
        else:
            patches = inputs.reshape(count, -1, inputs.shape[-1])
        gradient = gradient.reshape(count, -1, gradient.shape[-1])
        if bias is not None and bias.requires_grad:
            self._put({bias: gradient.sum(dim=1)}, missing)
        if weight.requires_grad:
            slot = self._slots[weight]
            slot = slot if slot.ndim == 3 else slot.permute(0, 1, 3, 4, 2).view(count, len(weight), -1)
            kept = 0 if weight in missing else 1
            height = max(1, _PATCHES // patches[0].numel())
            for rows in (slice(start, start + height) for start in range(0, count, height)):
                unrolled = patches[rows].reshape(-1, gradient.shape[1], slot.shape[2])
                torch.baddbmm(slot[rows], gradient[rows].mT, unrolled, beta=kept, out=slot[rows])
            missing.discard(weight)

    def _add_quantised(self, total: Tensor, gradients: Tensor) -> None:
        """Add the clipped rows in fine units to `total`, shape (d,), int64. Rows are examples, and may be spoilt."""
        block = _BLOCK.get(gradients.device.type, _BLOCK["cpu"])
        columns = torch.split(gradients, max(1, block // len(gradients)), dim=1)
        wide = torch.empty(columns[0].shape, dtype=torch.float64, device=gradients.device).view(-1)
        squares = torch.zeros(len(gradients), dtype=torch.float64, device=gradients.device)
        for part in columns:
            widened = wide[: part.numel()].view(part.shape).copy_(part)
            squares += torch.linalg.vecdot(widened, widened)
        norms = squares.sqrt()
        finite = torch.isfinite(norms)
        if not finite.all():
            gradients[~finite] = 0
            norms[~finite] = 0
        factors = (self._clipping_norm / norms).clamp(max=1.0)[:, None] * (_SLACK * self._scale)
        # So many truncated numbers add up in float64 without rounding, in any order.
        exactly = _EXACT // self._largest
        for part, sums in zip(columns, torch.split(total, columns[0].shape[1]), strict=True):
            truncated = wide[: part.numel()].view(part.shape).copy_(part).mul_(factors).trunc_()
            for some in torch.split(truncated, exactly):
                sums += some.sum(dim=0).to(torch.int64)


class _Calls:
    """Notes the calls of `layers` while it is entered: what went in, and what came out."""

    def __init__(self, layers: list[nn.Module]) -> None:
        self._layers = layers
        self._made: list[tuple[nn.Module, Tensor, Tensor]] = []
        self._versions: list[tuple[int, int]] = []

    def __enter__(self) -> Self:
        self._hooks = [layer.register_forward_hook(self._note) for layer in self._layers]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    def _note(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._made.append((layer, inputs[0].detach(), output))
        self._versions.append((inputs[0]._version, output._version))

    def with_gradients(self, loss: Tensor) -> Iterator[tuple[nn.Module, Tensor, Tensor]]:
        """Yield each call's layer, its input, and the loss's gradient of its output, if it has one.

        Raises `RecognizerError` if an input or output was changed in place, which would make them wrong.
        """
        if self._versions != [(inputs._version, output._version) for _, inputs, output in self._made]:
            raise RecognizerError(
                "Model: a layer's input or output is changed in place. Compute out of place."
            )
        outputs = [output for _, _, output in self._made]
        gradients = torch.autograd.grad(loss, outputs, allow_unused=True) if outputs else ()
        for (layer, inputs, _), gradient in zip(self._made, gradients, strict=True):
            if gradient is not None:
                yield layer, inputs, gradient


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the sum of the rows' cross-entropies."""
    if logits.ndim != 2 or len(logits) != len(labels):
        raise RecognizerError(
            f"Model: expected logits of shape ({len(labels)}, classes), found {tuple(logits.shape)}."
        )
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(f"targets: expected classes 0 to {logits.shape[1] - 1}, found another.")
    return F.cross_entropy(logits, labels, reduction="sum")


def _patches(layer: nn.Conv2d, inputs: Tensor) -> Tensor:
    """Return what each output of a plain convolution reads, shape (n, height, width, *kernel, channels): a view."""
    vertical, horizontal = (int(padding) for padding in layer.padding)
    padded = F.pad(
        inputs.permute(0, 2, 3, 1), (0, 0, horizontal, horizontal, vertical, vertical)
    ).contiguous()
    steps, gaps, kernel = layer.stride, layer.dilation, layer.kernel_size
    height, width = (
        (padded.shape[1 + axis] - gaps[axis] * (kernel[axis] - 1) - 1) // steps[axis] + 1 for axis in (0, 1)
    )
    row, down, right, channel = padded.stride()
    return padded.as_strided(
        (len(inputs), height, width, *kernel, inputs.shape[1]),
        (row, down * steps[0], right * steps[1], down * gaps[0], right * gaps[1], channel),
    )


def _is_plain(layer: nn.Linear | nn.Conv2d) -> bool:
    """Return whether `_write_products` knows `layer`."""
    if isinstance(layer, nn.Linear):
        return type(layer) is nn.Linear
    zeros = layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return type(layer) is nn.Conv2d and layer.groups == 1 and zeros


def _layers_with_formulas(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the layers that have parameters of their own; those that Opacus does not know, as a whole."""
    if _is_trainable(module):
        yield module
        if type(module) not in GradSampleModule.GRAD_SAMPLERS:
            return
    for child in module.children():
        yield from _layers_with_formulas(child)


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
