"""Per-example gradients, from what goes into a model's layers and the gradients of what comes out.

    gradients = LayerGradients(model, "hooks")
    found = gradients.of(rows, lambda logits: F.cross_entropy(logits, labels, reduction="sum"))  # (n, d)
    gradients.close()

The loss is a sum over examples, so a layer's output gradient holds each example's own, row by row, and a formula for
the layer turns its input and that into the example's gradient of the parameters.

Speed. Autograd stops at each layer's output: the batch's own weight gradients, which nobody needs, are not computed,
as they are where Opacus' hooks sit on the model. Linear layers and plain convolutions write the outer products of
their inputs and output gradients into one block of memory that is used again for every microbatch; other layers
take Opacus' formulas.

What formulas cannot see is refused rather than left out: layers that mix examples, numbers changed in place after
a layer saw them, and, by `compare_with_autograd`, parameters that are used outside of their layer.

References: Yousefpour et al. 2021, "Opacus"; Chellapilla, Puri, Simard 2006, "High Performance Convolutional Neural
Networks for Document Processing" (a convolution as a matrix product).
"""

from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Literal, Self

import torch
from opacus.grad_sample import GradSampleModule
from opacus.grad_sample.functorch import ft_compute_per_sample_gradient
from opacus.validators import ModuleValidator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

from hanse_common.errors import RecognizerError

GradSampleMode = Literal["hooks", "functorch", "ew"]
"""How per-example gradients are obtained: by a formula for each layer, `torch.func`, or torch's expanded
weights (supports fewer layers). The results differ in rounding only."""

# "hooks" takes any layer; "ew" refuses those that torch has no rule for. `hanse-sim bench gradients` compares speeds.
DEFAULT_MODE: GradSampleMode = "hooks"

Loss = Callable[[Tensor], Tensor]
"""From a model's output, one row for each example, to a sum over the rows of what depends on one row each."""

_PATCHES = {
    "cpu": 2**17,
    "cuda": 2**27,
}  # numbers of a convolution's unrolled inputs at a time: what a core's L2 cache holds; on a GPU, half a gigabyte
_ALIGNMENT = 16  # numbers: 64 bytes of float32, a cache line and the widest vector register


class LayerGradients:
    """Computes the per-example gradients of one model. Close it.

    While open, in-place activations compute out of place (formulas need the layers' outputs); closing undoes
    it. Parameters may take other values between calls; `.grad` is left alone.

    Attributes:
        parameters: the trainable ones, in the order of `model.parameters()`.

    Raises:
        RecognizerError: the model has layers that mix examples or that Opacus cannot handle, or nothing to
            train; all of them are named.
    """

    def __init__(self, model: nn.Module, mode: GradSampleMode) -> None:
        _refuse_unsupported(model)
        self._model = model
        self._mode = mode
        self._layers = [] if mode == "ew" else list(_layers_with_formulas(model))
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._store = torch.empty(0)
        self._slots: dict[Tensor, Tensor] = {}
        self._missing: set[Tensor] = set()  # parameters whose slots still hold the last call's gradients
        self._in_place = [layer for layer in model.modules() if getattr(layer, "inplace", False) is True]
        for layer in self._in_place:
            layer.inplace = False  # type: ignore[assignment]  # a plain attribute of activations and dropouts

    def close(self) -> None:
        """Leave the model as it was."""
        self.release()
        for layer in self._layers:
            layer.__dict__.pop("ft_compute_sample_grad", None)  # Opacus' own, in mode functorch
        for layer in self._in_place:
            layer.inplace = True  # type: ignore[assignment]

    def release(self) -> None:
        """Give back the block of memory; the next call of `of` takes another."""
        self._store, self._slots = torch.empty(0), {}

    @property
    def dimension(self) -> int:
        """d, the number of trainable parameters."""
        return sum(parameter.numel() for parameter in self.parameters)

    @property
    def width(self) -> int:
        """How wide the rows of `of` are: d, and zeros, so that all of them begin alike in memory."""
        return -(-self.dimension // _ALIGNMENT) * _ALIGNMENT

    @property
    def in_training_mode(self) -> bool:
        """Whether every layer with trainable parameters is."""
        return all(layer.training for layer in self._model.modules() if _is_trainable(layer))

    def of(self, rows: Tensor, loss: Loss) -> Tensor:
        """Return the gradients of `loss`, shape (len(rows), `width`), in one block: the next call overwrites it.

        Columns are in an order of their own; see `in_order`.

        Raises:
            RecognizerError: a layer does not take and give one row for each example, or changes in place what
                another layer took or gave.
        """
        if len(self._store) != len(rows):
            # Float32 holds the numbers of every shorter type.
            wide = any(parameter.dtype == torch.float64 for parameter in self.parameters)
            dtype = torch.float64 if wide else torch.float32
            self.release()
            self._store = torch.empty((len(rows), self.width), dtype=dtype, device=rows.device)
            self._store[:, self.dimension :] = 0
            self._slots = dict(zip(self.parameters, self._parts(self._store), strict=True))
        self._missing = set(self.parameters)
        with torch.enable_grad():
            if self._mode == "ew":
                self._write_expanded_weights(rows, loss)
            else:
                with _Calls(self._layers) as calls:
                    total = loss(self._model(rows))
                for layer, inputs, gradient in calls.with_gradients(total):
                    if len(inputs) != len(rows) or len(gradient) != len(rows):
                        raise RecognizerError(
                            "Model: every layer must take and give one row for each example."
                        )
                    self._write(layer, inputs, gradient)
        for parameter in self._missing:  # the logits do not depend on it
            self._slots[parameter].zero_()
        return self._store

    def in_order(self, flat: Tensor) -> Tensor:
        """Return (d,) numbers of `flat`, (width,), columns as `of` has them, ordered as `parameters`, row-major."""
        return torch.cat([part.reshape(-1) for part in self._parts(flat)])

    def compare_with_autograd(self, rows: Tensor, loss: Loss) -> None:
        """Raise `RecognizerError` unless what `of` found last adds up, roughly, to autograd's own gradients.

        If it does not, a layer's parameters are used outside of the layer.
        """
        with torch.enable_grad():
            total = loss(self._model(rows))
            expected = torch.autograd.grad(total, self.parameters, allow_unused=True, materialize_grads=True)
        # Of all of it, since one parameter's gradient may be zero but for rounding: a bias before a normalisation.
        tolerance = 1e-3 * torch.linalg.vector_norm(torch.stack([part.norm() for part in expected]))
        for parameter, gradient in zip(self.parameters, expected, strict=True):
            if torch.dist(self._slots[parameter].sum(dim=0), gradient) > tolerance:
                raise RecognizerError(
                    f"Model: found wrong per-example gradients of a parameter of shape {tuple(parameter.shape)}. "
                    "A layer's parameters must be used by calling that layer and by nothing else."
                )

    def _parts(self, flat: Tensor) -> list[Tensor]:
        """Return each parameter's part of `flat`, shape (…, width), as a view of shape (…, *parameter.shape).

        Weights of convolutions lie in `flat` with channels last, as their formula makes them.
        """
        parts = []
        sizes = [parameter.numel() for parameter in self.parameters]
        columns = torch.split(flat[..., : self.dimension], sizes, dim=-1)
        for parameter, part in zip(self.parameters, columns, strict=True):
            if parameter.ndim == 4:
                outputs, channels, height, width = parameter.shape
                last = part.view(*part.shape[:-1], outputs, height, width, channels)
                parts.append(last.movedim(-1, -3))
            else:
                parts.append(part.view(*part.shape[:-1], *parameter.shape))
        return parts

    def _write_expanded_weights(self, rows: Tensor, loss: Loss) -> None:
        try:
            expanded = call_for_per_sample_grads(  # type: ignore[no-untyped-call]
                self._model, batch_size=len(rows), loss_reduction="sum"
            )
            loss(expanded(rows)).backward()  # type: ignore[no-untyped-call]
            for parameter in self.parameters:
                if getattr(parameter, "grad_sample", None) is not None:
                    self._put({parameter: parameter.grad_sample})  # type: ignore[attr-defined]
        finally:
            for parameter in self.parameters:
                parameter.__dict__.pop("grad_sample", None)

    def _write(self, layer: nn.Module, inputs: Tensor, gradient: Tensor) -> None:
        """Write one call's per-example gradients into the store, or add them to those of an earlier call."""
        with torch.no_grad():
            if self._mode == "functorch" or type(layer) not in GradSampleModule.GRAD_SAMPLERS:
                self._put(ft_compute_per_sample_gradient(layer, [inputs], gradient))
            elif isinstance(layer, nn.Linear | nn.Conv2d) and _is_plain(layer):
                self._write_products(layer, inputs, gradient)
            else:
                formula = GradSampleModule.GRAD_SAMPLERS[type(layer)]
                self._put(formula(layer, [inputs], gradient))

    def _put(self, found: dict[Tensor, Tensor]) -> None:
        for parameter, part in found.items():
            if parameter in self._missing:
                self._slots[parameter].copy_(part)
                self._missing.remove(parameter)
            elif parameter.requires_grad:
                self._slots[parameter].add_(part)

    def _write_products(self, layer: nn.Linear | nn.Conv2d, inputs: Tensor, gradient: Tensor) -> None:
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
            self._put({bias: gradient.sum(dim=1)})
        if weight.requires_grad:
            slot = self._slots[weight]
            slot = slot if slot.ndim == 3 else slot.permute(0, 1, 3, 4, 2).view(count, len(weight), -1)
            kept = 0 if weight in self._missing else 1
            most = max(1, _PATCHES["cuda" if inputs.device.type == "cuda" else "cpu"] // patches[0].numel())
            height = count if most >= count else 1 << (most.bit_length() - 1)
            for rows in (slice(start, start + height) for start in range(0, count, height)):
                unrolled = patches[rows].reshape(-1, gradient.shape[1], slot.shape[2])
                torch.baddbmm(slot[rows], gradient[rows].mT, unrolled, beta=kept, out=slot[rows])
            self._missing.discard(weight)


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
    """Return whether `LayerGradients._write_products` knows `layer`."""
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
