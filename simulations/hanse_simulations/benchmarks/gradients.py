"""How fast exact clipped sums are, beside training without privacy and beside Opacus' own optimizer.

    hanse-sim bench gradients [--quick] [--json FILE] [--device cpu]

Three ways through the same photos, in one process and in turn, so that they share the machine's mood:
`plain`, a forward and a backward pass without privacy; `opacus`, the same with hooks and
`DPOptimizer.clip_and_accumulate`, whose sum is made in float32; and ours in each mode. A figure is the median
over the repetitions; a ratio is the median of the ratios within one repetition. Keys:
`<model>_<way>_samples_per_second`, `<model>_<mode>_over_plain` and `<model>_<mode>_over_opacus` (above 1:
faster than that).
"""

import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from hanse_client.gradients import ClippedSum, GradSampleMode
from hanse_simulations.console import console

_CLASSES = 10
_CLIPPING_NORM = 1.0
_FINE_EXPONENT = -31
_BASELINE_BATCH = 64  # where the baselines are near their best on one core
MODES: tuple[GradSampleMode, ...] = get_args(GradSampleMode)


@dataclass(frozen=True)
class Case:
    """One model, and how many random photos of which shape go through it."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    examples: int


def _head() -> nn.Module:
    return nn.Linear(1500, _CLASSES)


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(1500, 64), nn.ReLU(), nn.Linear(64, _CLASSES))


def _cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.GroupNorm(4, 64), nn.ReLU(), nn.AdaptiveAvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(256, _CLASSES)),
    )


CASES = {
    "head": Case(_head, (1500,), 512),
    "mlp": Case(_mlp, (1500,), 256),
    "cnn": Case(_cnn, (1, 28, 28), 256),
}


def run(quick: bool = False, device: str = "cpu") -> dict[str, float]:
    """Measure every case on `device`, print a table, and return the figures. `quick` repeats less."""
    figures: dict[str, float] = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing")  # Opacus means it to
        for name, case in CASES.items():
            figures |= _measure(name, case, repetitions=3 if quick else 15, device=device)
    _print(figures, device)
    return figures


def _measure(name: str, case: Case, repetitions: int, device: str) -> dict[str, float]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(case.examples, *case.shape, generator=generator).to(device)
    targets = torch.randint(0, _CLASSES, (case.examples,), generator=generator).to(device)
    ways = {"plain": _plain(case, device), "opacus": _opacus(case, device)}
    ways |= {mode: _ours(case, device, mode) for mode in MODES}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for repetition in range(repetitions + 1):
        for way, step in ways.items():
            start = time.perf_counter()
            step(inputs, targets)
            if device != "cpu":
                torch.cuda.synchronize(device)
            if repetition:  # the first one warms up
                seconds[way].append(time.perf_counter() - start)
    figures = {
        f"{name}_{way}_samples_per_second": case.examples / statistics.median(taken)
        for way, taken in seconds.items()
    }
    for mode in MODES:
        for base in ("plain", "opacus"):
            ratios = [theirs / ours for theirs, ours in zip(seconds[base], seconds[mode], strict=True)]
            figures[f"{name}_{mode}_over_{base}"] = statistics.median(ratios)
    return figures


def _plain(case: Case, device: str) -> Callable[[Tensor, Tensor], None]:
    model = case.build().to(device)

    def step(inputs: Tensor, targets: Tensor) -> None:
        model.zero_grad()
        for rows, labels in _batches(inputs, targets):
            F.cross_entropy(model(rows), labels, reduction="sum").backward()  # type: ignore[no-untyped-call]

    return step


def _opacus(case: Case, device: str) -> Callable[[Tensor, Tensor], None]:
    model = GradSampleModule(case.build().to(device), loss_reduction="sum")
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        noise_multiplier=1.0,
        max_grad_norm=_CLIPPING_NORM,
        expected_batch_size=case.examples,
        loss_reduction="sum",
    )

    def step(inputs: Tensor, targets: Tensor) -> None:
        optimizer.zero_grad()
        for rows, labels in _batches(inputs, targets):
            F.cross_entropy(model(rows), labels, reduction="sum").backward()  # type: ignore[no-untyped-call]
            optimizer.clip_and_accumulate()
            model.set_grad_sample_to_none()
        for parameter in optimizer.params:
            parameter.summed_grad = None

    return step


def _ours(case: Case, device: str, mode: GradSampleMode) -> Callable[[Tensor, Tensor], None]:
    clipped = ClippedSum(case.build().to(device), _CLIPPING_NORM, _FINE_EXPONENT, mode=mode)

    def step(inputs: Tensor, targets: Tensor) -> None:
        clipped.sum(inputs, targets)

    return step


def _batches(inputs: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor]]:
    starts = range(0, len(inputs), _BASELINE_BATCH)
    return [(inputs[i : i + _BASELINE_BATCH], targets[i : i + _BASELINE_BATCH]) for i in starts]


def _print(figures: dict[str, float], device: str) -> None:
    table = Table(title=f"Clipped sums on {device}, {torch.get_num_threads()} threads")
    for heading in ("model", "way", "samples/s", "over plain", "over Opacus' step"):
        table.add_column(heading, justify="left" if heading in ("model", "way") else "right")
    for name in CASES:
        for way in ("plain", "opacus", *MODES):
            ratios = [figures.get(f"{name}_{way}_over_{base}") for base in ("plain", "opacus")]
            shown = ["" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
            table.add_row(name, way, f"{figures[f'{name}_{way}_samples_per_second']:,.0f}", *shown)
    console.print(table)
