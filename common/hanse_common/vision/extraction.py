"""From decoded photos to what a network makes of them, each photo by itself, whatever batch it is in.

    features = extract(load_backbone(recipe), images, recipe.views)    # (n, recipe.feature_dimension)

Differential privacy compares a catalog with the same catalog less one photo, so no photo's embedding may depend on the
others, not even in its last bit. The number of rows that a network sees at once, `fitting_rows`, therefore follows from
the network, the device and the settings, and never from photos.
"""

import logging
import weakref
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hanse_common.errors import RecognizerError
from hanse_common.vision.preprocessing import preprocess
from hanse_common.vision.recipe_features import Preprocessing

log = logging.getLogger(__name__)

BATCH_PIXELS = 1 << 21
"""Bound of the numbers in the batch that a network sees at once on a CPU; more take gigabytes within some networks."""

CUDA_ROWS = 256
"""Bound of the photos that a network sees at once on a GPU."""

GPU_SHARE = 0.25
"""The part of a GPU's allowed memory that one batch may take: embedding and training have one each, photos the rest."""

SCRATCH = 1.25
"""What a CPU's kernels take beside the tensors that can be seen, as a factor: one such copy was seen to add 0.19."""


def batch_rows(views: Sequence[Preprocessing]) -> int:
    """Return how many photos a network sees at once on a CPU: at most 64, fewer large ones. Follows from the recipe."""
    return min(64, *(BATCH_PIXELS // (view.channels * view.size**2) for view in views))


def extract(
    network: nn.Module | None,
    images: Iterable[Image.Image],
    views: Sequence[Preprocessing],
    device: torch.device | str = "cpu",
    memory: int | None = None,
) -> NDArray[np.float32]:
    """Return what `network` makes of decoded `images`, (n, …) float32; without one, the preprocessed images.

    `views` are the recipe's: a network takes one input for each. Images are taken one by one. `memory` bounds what a
    batch may take, in bytes; without it that is `batch_rows` on a CPU and `GPU_SHARE` on a GPU. The network always runs
    on the same number of rows, the last ones padded with zeros: a kernel may round a row differently in a batch of
    another height, and a photo's embedding must not depend on its neighbours. That it does not depend on its own place
    either is tried out first; where it does, photos are embedded one at a time.

    Raises `RecognizerError` when not even one photo fits in `memory`.
    """
    rows = network_rows(network, views, device, memory)
    source = iter(images)
    parts: list[NDArray[np.float32]] = []
    count = rows
    while count == rows:
        inputs = [x.to(device) for x in _seen(islice(source, rows), views)]
        count = len(inputs[0])
        if count == 0 and parts:
            break
        if network is None:
            (found,) = inputs
        else:
            padded = [F.pad(x, (0, 0) * (x.ndim - 1) + (0, rows - count)) for x in inputs]
            with torch.inference_mode():
                found = network(*padded)[:count]
        parts.append(found.float().cpu().numpy())
    return np.concatenate(parts)


def network_rows(
    network: nn.Module | None,
    views: Sequence[Preprocessing],
    device: torch.device | str = "cpu",
    memory: int | None = None,
) -> int:
    """Return how many rows `extract` gives `network` at once. Found out once for each device and `memory`."""
    rows = batch_rows(views)
    if network is None:
        return rows
    known: dict[tuple[str, int | None], int] = network.__dict__.setdefault("_rows", {})
    key = (str(device), memory)
    if key not in known:

        def trial(rows: int) -> Tensor:
            found: Tensor = network(*_noise(views, rows, device))
            return found

        on_gpu = torch.device(device).type == "cuda"
        full_precision()
        with torch.inference_mode():
            if on_gpu or memory is not None:
                rows = fitting_rows(trial, CUDA_ROWS if on_gpu else rows, device, memory)
            found = trial(rows) if rows > 1 else torch.zeros(1)
        if not torch.equal(found, found[:1].expand_as(found)):
            log.warning(
                "Here a photo's embedding depends on its place in a batch; photos are embedded one at a time."
            )
            rows = 1
        known[key] = rows
    return known[key]


def fitting_rows(
    trial: Callable[[int], object], most: int, device: torch.device | str, memory: int | None = None
) -> int:
    """Return how many rows may be computed at once: the largest of 1, 2, 4, … and `most` that fits in `memory` bytes.

    `trial` computes on as many synthetic rows as it is told. What it takes is measured on a GPU, by torch's allocator,
    and added up on a CPU, tensor by tensor; twice the rows are tried only where they are expected to fit. Without
    `memory` the bound is `GPU_SHARE` of the process's part of a GPU, a constant of machine and settings, so that what
    photos fill of it changes nothing; on a CPU it is 1.5 GiB, or what one row takes. A device that runs out of memory
    earlier gets the last number of rows that it could compute.

    Raises `RecognizerError` when one row does not fit in the given `memory`, and what `trial` raises.
    """
    bound = _default_bytes(device) if memory is None else memory
    fitting, before, rows = 1, 0, 1
    while True:
        try:
            peak = _peak_bytes(trial, rows, device)
        except (RuntimeError, MemoryError) as error:
            if rows == 1 or not _out_of_memory(error):
                raise
            log.warning("Memory ran out at %d photos at once; going on with %d.", rows, fitting)
            break
        if rows == 1 and memory is not None and peak > memory:
            raise RecognizerError(
                f"One photo at a time takes {_megabytes(peak)} MB here, found {_megabytes(memory)} MB allowed for it. "
                "Allow more memory, or stay out of this training."
            )
        if peak > bound:
            break
        fitting = rows
        # It grows by at most what the last doubling added, twice.
        expected = 2 * peak if rows == 1 else peak + 2 * (peak - before)
        if rows == most or expected > bound:
            break
        before, rows = peak, min(2 * rows, most)
    return fitting


def full_precision() -> None:
    """Let GPUs compute in whole float32 by kernels that repeat themselves, in this process from now on."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


def _default_bytes(device: torch.device | str) -> int:
    if torch.device(device).type != "cuda":
        return 3 << 29
    total = torch.cuda.get_device_properties(device).total_memory
    allowed = torch.cuda.get_per_process_memory_fraction(device_index(device))
    return int(GPU_SHARE * float(allowed) * int(total))


def device_index(device: torch.device | str) -> int:
    """Return the index of a CUDA device, of torch's current one if `device` names none."""
    index = torch.device(device).index
    return int(torch.cuda.current_device()) if index is None else int(index)


def _peak_bytes(trial: Callable[[int], object], rows: int, device: torch.device | str) -> int:
    """Return the most bytes that `trial(rows)` holds at one time, beside those there were; on a CPU an estimate."""
    if torch.device(device).type != "cuda":
        allocations = _Allocations()
        with allocations:
            trial(rows)
        return int(SCRATCH * allocations.peak)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device)
    trial(rows)
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device)) - int(held)


def _out_of_memory(error: Exception) -> bool:
    # A CPU's allocator has no exception of its own.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error)


def _megabytes(count: int) -> int:
    return -(-count // 2**20)


class _Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own is not typed
    """Adds up the memory of the tensors that are made while it is entered, until each is freed; `peak`, in bytes.

    The same on every run, unlike a process's resident memory. Kernels' scratch space is not seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._held = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            name = storage._cdata
            if name not in given and name not in self._sizes:
                self._sizes[name] = storage.nbytes()
                self._held += self._sizes[name]
                self.peak = max(self.peak, self._held)
                weakref.finalize(storage, self._freed, name)
        return result

    def _freed(self, name: int) -> None:
        self._held -= self._sizes.pop(name)


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _seen(images: Iterable[Image.Image], views: Sequence[Preprocessing]) -> list[Tensor]:
    """Return the images as each view wants them. No more than one decoded image is held at a time."""
    if len(views) == 1:
        return [preprocess(images, views[0])]
    rows = [[preprocess([image], view) for view in views] for image in images]
    return [torch.cat(column) for column in zip(*rows, strict=True)] or [
        preprocess([], view) for view in views
    ]


def _noise(views: Sequence[Preprocessing], rows: int, device: torch.device | str) -> list[Tensor]:
    """Return equal rows of noise for each view."""
    source = np.random.PCG64(0)
    inputs = []
    for view in views:
        shape = (1, view.channels, view.size, view.size)
        noise = source.random_raw(int(np.prod(shape))) / 2.0**63 - 1.0
        one = torch.from_numpy(noise.astype(np.float32)).reshape(shape)
        inputs.append(one.expand(rows, -1, -1, -1).contiguous().to(device))
    return inputs
