"""What differential privacy costs a training step: the product's own over a plain one, and Opacus' over the same.

    hanse-sim bench dp-step [--quick] [--device cuda:0] [--json FILE]

Three steps on the same photos, in turn, so that they share the machine's mood. `dp` is the product's: draw a Poisson
sample, sum its clipped gradients exactly, round, add noise, move the weights. `plain` gathers as many photos, and does
a forward pass, a backward pass and a step of SGD in float32, in pieces of `PIECE` photos, where it is near its best on
one core, or on a GPU. `opacus` is Opacus out of the box (`GradSampleModule`'s hooks and `DPOptimizer`, float32), in the
same pieces, or in smaller ones where its memory asks for them. On a GPU there are as many times the photos as its piece
is larger, so that a sample fills it.

Each case runs in a process of its own, on a CPU on one thread; so does each way once more, for its peak memory: the
process's resident memory on a CPU, what torch's allocator gave out on a GPU. Keys: `dp_over_plain` and
`opacus_over_plain`, medians of the ratios of samples/s within one repetition (1 is as fast as plain);
`samples_per_second` and `peak_mib`, by case and way; `epsilon`, by case: what `TRAINING` steps as the measured one cost
at `DELTA`, from the very mechanism that added the noise, and so the same on every device; `device`.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from hanse_client.examples import resolve_device
from hanse_client.gradients import ClippedSum
from hanse_client.head_gradients import HeadSum
from hanse_common.privacy.mechanism import Mechanism
from hanse_common.privacy.sampling import poisson_sample
from hanse_common.randomness import OsRandomness
from hanse_common.vision import model as models
from hanse_common.vision.extraction import full_precision
from hanse_common.vision.recipe import Recipe
from hanse_common.vision.recipe_features import Preprocessing
from hanse_common.vision.recipe_model import SmallCnn
from hanse_common.vision.torchvision_compat import models as torchvision_models
from hanse_simulations.console import console

CLASSES = 10
PIECE = {"cpu": 64, "cuda": 512}
TRAINING, DELTA = 100, 1e-5
WAYS = ("plain", "dp", "opacus")
_NORM, _NOISE, _RATE = 1.0, 1.0, 0.1

Step = Callable[[], int]
"""Does one step and returns how many photos were in it."""


class _Block(torchvision_models.resnet.BasicBlock):  # type: ignore[misc]  # torchvision has no types
    """ResNet's block with the shortcut added out of place, as per-example gradients need it."""

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + shortcut)


def _head(features: int) -> nn.Module:
    return nn.Linear(features, CLASSES)


def _cnn(side: int) -> nn.Module:
    preprocessing = Preprocessing(size=side, channels=1)
    recipe = Recipe(preprocessing=preprocessing, backbone=None, model=SmallCnn(width=16))
    model = models.build(recipe, CLASSES)
    models.load_vector(model, models.initial_vector(recipe, CLASSES, seed=1))
    return model


def _resnet18(side: int) -> nn.Module:
    model: nn.Module = torchvision_models.ResNet(
        _Block, [2, 2, 2, 2], num_classes=CLASSES, norm_layer=lambda channels: nn.GroupNorm(32, channels)
    )
    for layer in model.modules():
        if isinstance(layer, nn.ReLU):
            layer.inplace = False
    return model


@dataclass(frozen=True)
class Case:
    """One model, the shape of its photos, how many there are, and Opacus' piece, all for a CPU."""

    build: Callable[[int], nn.Module]
    channels: int
    side: int
    photos: int
    opacus_piece: int

    @property
    def shape(self) -> tuple[int, ...]:
        """One photo's."""
        return (self.channels, self.side, self.side) if self.channels else (self.side,)


CASES = {
    "head": Case(_head, 0, 3580, 8000, PIECE["cpu"]),  # a sample is about 800 photos
    "cnn": Case(_cnn, 1, 28, 5120, PIECE["cpu"]),
    "resnet18": Case(_resnet18, 3, 64, 640, 16),
}
TINY = {
    "head": Case(_head, 0, 8, 100, PIECE["cpu"]),
    "cnn": Case(_cnn, 1, 8, 100, PIECE["cpu"]),
    "resnet18": Case(_resnet18, 3, 16, 20, 2),
}


def run(quick: bool = False, tiny: bool = False, device: str = "cpu") -> dict[str, Any]:
    """Measure every case on `device` and return the figures. `quick` repeats less; `tiny` is for tests.

    Raises `ConfigError` for a device that is not there.
    """
    device = resolve_device(device)
    found: dict[str, Any] = {
        key: {} for key in ("dp_over_plain", "opacus_over_plain", "samples_per_second", "peak_mib", "epsilon")
    }
    repetitions = 1 if tiny else 3 if quick else 9
    for name in CASES:
        figures = _child(name, WAYS, repetitions, tiny, device)
        for way in ("dp", "opacus"):
            found[f"{way}_over_plain"][name] = figures["over_plain"][way]
        found["samples_per_second"][name] = figures["samples_per_second"]
        found["epsilon"][name] = figures["epsilon"]
        found["peak_mib"][name] = {way: _child(name, (way,), 1, tiny, device)["peak_mib"] for way in WAYS}
    return found | {"device": device}


def show(figures: dict[str, Any]) -> None:
    """Print the figures as a table."""
    where = "on one thread" if figures["device"] == "cpu" else f"on {figures['device']}"
    table = Table(title=f"A training step {where}")
    for heading in ("model", "way", "samples/s", "over plain", "peak MiB", f"ε of {TRAINING} steps"):
        table.add_column(heading, justify="left" if heading in ("model", "way") else "right")
    for name in CASES:
        for way in WAYS:
            ratio = 1.0 if way == "plain" else figures[f"{way}_over_plain"][name]
            speed, peak = figures["samples_per_second"][name][way], figures["peak_mib"][name][way]
            epsilon = f"{figures['epsilon'][name]:.3f}" if way == "dp" else ""
            table.add_row(name, way, f"{speed:,.0f}", f"{ratio:.2f}", f"{peak:,.0f}", epsilon)
    console.print(table)


def _child(
    name: str, ways: tuple[str, ...], repetitions: int, tiny: bool, device: str = "cpu"
) -> dict[str, Any]:
    words = [
        sys.executable,
        "-m",
        __name__,
        name,
        *ways,
        f"--repetitions={repetitions}",
        f"--device={device}",
    ]
    done = subprocess.run(words + ["--tiny"] * tiny, stdout=subprocess.PIPE, check=True)
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def _measure(case: Case, ways: list[str], repetitions: int, device: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    full_precision()
    torch.manual_seed(1)
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        case = replace(case, photos=case.photos * PIECE["cuda"] // PIECE["cpu"])
    inputs = torch.randn(case.photos, *case.shape).to(device)
    labels = torch.randint(0, CLASSES, (case.photos,)).to(device)
    makers = {"plain": _plain, "dp": _dp, "opacus": _opacus}
    steps = {way: makers[way](case, inputs, labels) for way in ways}
    seconds: dict[str, list[float]] = {way: [] for way in ways}  # for one photo
    for repetition in range(repetitions + 1):
        for way, step in steps.items():
            began = time.perf_counter()
            count = step()
            if on_gpu:
                torch.cuda.synchronize(device)
            if repetition:  # the first one warms up
                seconds[way].append((time.perf_counter() - began) / max(count, 1))
    return {
        "samples_per_second": {way: 1 / statistics.median(taken) for way, taken in seconds.items()},
        "over_plain": {
            way: statistics.median(
                plain / own for plain, own in zip(seconds.get("plain", taken), taken, strict=True)
            )
            for way, taken in seconds.items()
        },
        "peak_mib": torch.cuda.max_memory_allocated(device) / 2**20
        if on_gpu
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "epsilon": replace(_mechanism(case.build(case.side)), steps=TRAINING).epsilon(DELTA),
    }


def _mechanism(model: nn.Module) -> Mechanism:
    """Return the mechanism of one step of `model`."""
    return Mechanism(_NORM, sum(p.numel() for p in model.parameters()), _NOISE, sampling_rate=_RATE, steps=1)


def _piece(inputs: Tensor, opacus: int | None = None) -> int:
    """Return how many photos a pass takes; on a GPU, as many times Opacus' number as it is of plain training's."""
    own = PIECE["cuda" if inputs.device.type == "cuda" else "cpu"]
    return own if opacus is None else opacus * own // PIECE["cpu"]


def _pieces(inputs: Tensor, labels: Tensor, piece: int) -> tuple[int, list[tuple[Tensor, Tensor]]]:
    """Return how many photos a sample has, and them in pieces."""
    chosen = torch.randperm(len(inputs))[: round(_RATE * len(inputs))].to(inputs.device)
    gathered, targets = inputs[chosen], labels[chosen]
    parts = range(0, len(chosen), piece)
    return len(chosen), [(gathered[i : i + piece], targets[i : i + piece]) for i in parts]


def _plain(case: Case, inputs: Tensor, labels: Tensor) -> Step:
    model = case.build(case.side).to(inputs.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def step() -> int:
        count, pieces = _pieces(inputs, labels, _piece(inputs))
        optimizer.zero_grad()
        for rows, targets in pieces:
            (F.cross_entropy(model(rows), targets, reduction="sum") / count).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return count

    return step


def _opacus(case: Case, inputs: Tensor, labels: Tensor) -> Step:
    model = GradSampleModule(case.build(case.side).to(inputs.device), loss_reduction="sum")
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.01),
        noise_multiplier=_NOISE,
        max_grad_norm=_NORM,
        expected_batch_size=round(_RATE * case.photos),
        loss_reduction="sum",
    )

    def step() -> int:
        count, pieces = _pieces(inputs, labels, _piece(inputs, case.opacus_piece))
        optimizer.zero_grad()
        for number, (rows, targets) in enumerate(pieces, start=1):
            optimizer.signal_skip_step(do_skip=number < len(pieces))
            F.cross_entropy(model(rows), targets, reduction="sum").backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
        return count

    return step


def _dp(case: Case, inputs: Tensor, labels: Tensor) -> Step:
    model = case.build(case.side).to(inputs.device)
    weights = models.to_vector(model).astype(np.float64)
    mechanism = _mechanism(model)
    norm, unit = mechanism.grid.clipping_norm, mechanism.grid.fine_exponent
    randomness = OsRandomness()
    summed: HeadSum | ClippedSum
    if isinstance(model, nn.Linear):
        summed = HeadSum(inputs, labels, CLASSES, norm, unit)
    else:
        summed = ClippedSum(model, norm, unit)

    def step() -> int:
        sample = poisson_sample(len(inputs), _RATE, randomness)
        if isinstance(summed, HeadSum):
            exact = summed.sum(weights, sample)
        else:
            models.load_vector(model, weights.astype(np.float32))
            chosen = torch.from_numpy(sample).to(inputs.device)
            exact = summed.sum(inputs[chosen], labels[chosen])
        weights[:] -= 0.01 * mechanism.release(exact, randomness) / (_RATE * len(inputs))
        return len(sample)

    return step


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="Full backward hook is firing")  # Opacus means it to
    parser = argparse.ArgumentParser()
    parser.add_argument("case", choices=CASES)
    parser.add_argument("ways", nargs="+", choices=WAYS)
    parser.add_argument("--repetitions", type=int, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tiny", action="store_true")
    words = parser.parse_args()
    case = (TINY if words.tiny else CASES)[words.case]
    print(json.dumps(_measure(case, words.ways, words.repetitions, words.device)))
