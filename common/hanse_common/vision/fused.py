"""EfficientNet-Lite0 for answers on a CPU: convolution, bias and ReLU6 as one kernel, and no copy to add zeros around.

    network = load_backbone(recipe)
    fuse(network)                 # in place; a third less time on one core
    network(inputs)               # the same features, but for their last bits

Between two convolutions a network as it is written reads and writes its largest tensors two more times: to cut them off
at 0 and 6, and to add zeros around. oneDNN does both within the convolution [1]: torch's compiler has kernels for it,
which need no compiler to be called. What is trained on is computed without: an embedding's bits are a contract there.

References:
[1] oneDNN Developer Guide, "Primitive Attributes: post-ops".
"""

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from hanse_common.vision.efficientnet_lite import EfficientNetLite0, _SameConv2d


def fusible() -> bool:
    """Return whether this build of torch has the kernels."""
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return available and hasattr(torch.ops.mkldnn, "_convolution_pointwise")


def fuse(network: nn.Module) -> int:
    """Replace each `EfficientNetLite0` within `network`, on a CPU and folded, by its fused form; return how many."""
    known: dict[int, _FusedTrunk] = {}
    for module in list(network.modules()):
        trunk = module._modules.get("trunk")
        if isinstance(trunk, EfficientNetLite0):
            module._modules["trunk"] = known.setdefault(id(trunk), _FusedTrunk(trunk))
    return len(known)


class _FusedTrunk(nn.Module):
    """Stands where an `EfficientNetLite0` stood."""

    def __init__(self, trunk: EfficientNetLite0) -> None:
        super().__init__()
        self._graph = _fused(trunk)

    def maps(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return what `EfficientNetLite0.maps` does."""
        found: tuple[Tensor, Tensor] = self._graph(images)
        return found


class _Maps(nn.Module):
    def __init__(self, trunk: EfficientNetLite0) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.trunk.maps(images)


class _FusedConvolution(nn.Module):
    """A `_SameConv2d`, and a ReLU6 after it where `clamped`."""

    def __init__(self, conv: nn.Conv2d, clamped: bool) -> None:
        super().__init__()
        self.register_buffer("weight", conv.weight.detach(), persistent=False)
        self.register_buffer("bias", None if conv.bias is None else conv.bias.detach(), persistent=False)
        self._kernel, self._stride, self._groups = conv.kernel_size[0], conv.stride[0], conv.groups
        self._after: tuple[Any, ...] = ("hardtanh", [0.0, 6.0], "") if clamped else ("none", [], "")

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self._kernel, self._stride
        height, width = (max(0, (-(-side // stride) - 1) * stride + kernel - side) for side in x.shape[-2:])
        around = [height // 2, width // 2]
        if height % 2 or width % 2:  # oneDNN adds as much at both ends
            x = F.pad(x, [width // 2, width - width // 2, height // 2, height - height // 2])
            around = [0, 0]
        found: Tensor = torch.ops.mkldnn._convolution_pointwise(
            x, self.weight, self.bias, around, [stride, stride], [1, 1], self._groups, *self._after
        )
        return found


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _SameConv2d) or super().is_leaf_module(m, module_qualified_name)


def _fused(trunk: EfficientNetLite0) -> fx.GraphModule:
    root = _Maps(trunk)
    graph = _Tracer().trace(root)
    modules = dict(root.named_modules())
    for node in list(graph.nodes):
        if node.op == "call_module" and isinstance(
            modules[node.target], nn.Identity
        ):  # a norm that is folded
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    fused: dict[str, nn.Module] = {}
    for node in list(graph.nodes):
        if node.op == "call_module" and isinstance(modules[node.target], _SameConv2d):
            after = next(iter(node.users)) if len(node.users) == 1 else None
            clamped = after is not None and after.target is F.relu6
            if after is not None and clamped:
                after.replace_all_uses_with(node)
                graph.erase_node(after)
            name = node.target.replace(".", "_")
            fused[name] = _FusedConvolution(modules[node.target], clamped)
            node.target = name
    return fx.GraphModule(fused, graph)
