"""The pictures of a result: learning curve, confusion matrix, ROC curves."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hanse_common.errors import ConfigError
from hanse_common.vision.metrics import ClassificationReport
from hanse_simulations.frontier import Frontier

if TYPE_CHECKING:
    from hanse_simulations.robustness import Row

try:
    import matplotlib as mpl
except ImportError:
    raise ConfigError(
        "matplotlib: not installed, and hanse-sim draws with it. Install it: pip install 'hanse[simulations]'."
    ) from None

mpl.use("Agg")  # no screen is needed, and none may be there

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLUE, GREY = "#1f5fa8", "#9aa5b1"
DPI = 130


def learning_curve(rounds: Sequence[int], accuracies: Sequence[float], title: str, path: Path) -> None:
    """Draw accuracy in per cent against the round, counted from 1."""
    figure, axes = _axes(6.4, 4.0)
    axes.plot(rounds, [100 * accuracy for accuracy in accuracies], color=BLUE, linewidth=2)
    axes.annotate(
        f"{100 * accuracies[-1]:.1f} %",
        (rounds[-1], 100 * accuracies[-1]),
        xytext=(-6, -16),
        textcoords="offset points",
        ha="right",
        color=BLUE,
        weight="bold",
    )
    axes.set_xlabel("round")
    axes.set_ylabel("accuracy on public test photos, %")
    axes.set_title(title, loc="left")
    axes.grid(axis="y", color=GREY, alpha=0.3)
    _save(figure, path)


def frontier(frontiers: Sequence[Frontier], path: Path) -> None:
    """Draw accuracy in per cent, with 95 % intervals, against ε, a line for each of `frontiers`."""
    figure, axes = _axes(6.8, 4.6)
    colours = plt.get_cmap("tab10")
    for index, one in enumerate(frontiers):
        epsilons = [point.epsilon for point in one.points]
        means = [100 * point.mean for point in one.points]
        reach = [100 * point.interval for point in one.points]
        axes.errorbar(
            epsilons, means, yerr=reach, color=colours(index), label=one.name, marker="o", markersize=5,
            capsize=3, linewidth=2,
        )  # fmt: skip
    axes.set_xscale("log")
    last = [(100 * one.points[-1].mean, one.points[-1].epsilon) for one in frontiers]
    height = (axes.get_ylim()[1] - axes.get_ylim()[0]) / 25  # of a line of text, about
    above = -math.inf
    for index in sorted(range(len(last)), key=lambda i: last[i][0]):
        mean, epsilon = last[index]
        above = max(mean, above + height)
        axes.annotate(
            f"{mean:.1f}", (epsilon, above), xytext=(7, -3), textcoords="offset points", color=colours(index),
            fontsize=9,
        )  # fmt: skip
    ticks = sorted({round(point.epsilon, 1) for one in frontiers for point in one.points})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("ε that any one photo pays, at most")
    axes.set_ylabel("accuracy on public test photos, %")
    axes.set_title("Accuracy against privacy", loc="left")
    axes.grid(axis="y", color=GREY, alpha=0.3)
    axes.legend(frameon=False, loc="lower right")
    _save(figure, path)


def server_view(upload: NDArray[np.uint32], total: NDArray[np.float64], rows: int, path: Path) -> None:
    """Draw what the server saw of one merchant beside the sum, each of shape (d,), cut into `rows` rows.

    `upload` are residues mod 2³², `total` is the decoded sum.
    """
    figure, both = plt.subplots(2, 1, figsize=(6.4, 4.6), layout="constrained")
    width = -(-upload.size // rows)
    reach = float(np.abs(total).max()) or 1.0
    for axes, values, title, limits in (
        (
            both[0],
            upload.astype(np.float64),
            "What the server saw of one merchant: its masked update",
            (0, 2**32),
        ),
        (both[1], total, "What it saw of all together: the sum", (-reach, reach)),
    ):
        padded = np.full(rows * width, np.nan)
        padded[: values.size] = values
        axes.imshow(
            padded.reshape(rows, width), cmap="RdBu_r", vmin=limits[0], vmax=limits[1], aspect="auto",
            interpolation="nearest",
        )  # fmt: skip
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_ylabel("one class a row", fontsize=9)
    _save(figure, path)


def confusion(report: ClassificationReport, classes: Sequence[str], path: Path) -> None:
    """Draw the confusion matrix, each row in per cent of that class's photos."""
    count = len(classes)
    side = min(4.0 + 0.35 * count, 14.0)
    figure, axes = _axes(side + 0.8, side)
    shares = [[100 * n / max(sum(row), 1) for n in row] for row in report.confusion]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    if count <= 20:
        for i, row in enumerate(shares):
            for j, share in enumerate(row):
                if share >= 0.5:
                    colour = "white" if share > 55 else "black"
                    axes.text(j, i, f"{share:.0f}", ha="center", va="center", color=colour, fontsize=8)
    axes.set_xticks(range(count), classes, rotation=45, ha="right")
    axes.set_yticks(range(count), classes)
    axes.set_xlabel("recognized as")
    axes.set_ylabel("is")
    axes.set_title("Out of 100 photos of a class", loc="left")
    _save(figure, path)


def roc(report: ClassificationReport, classes: Sequence[str], path: Path) -> None:
    """Draw each class's ROC curve, one against the rest; classes without photos are left out."""
    figure, axes = _axes(6.4, 5.2)
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle=":")
    colours = plt.get_cmap("tab10")
    for index, (name, figures) in enumerate(zip(classes, report.per_class, strict=True)):
        if figures.roc is not None:
            x, y = figures.roc.false_positive_rate, figures.roc.true_positive_rate
            axes.plot(x, y, color=colours(index % 10), label=f"{name} ({figures.auc:.3f})")
    axes.set_xlabel("false positive rate")
    axes.set_ylabel("true positive rate")
    axes.set_title("ROC, one class against the rest (area)", loc="left")
    axes.legend(fontsize=7, frameon=False, loc="lower right", ncols=1 + len(classes) // 12)
    _save(figure, path)


def robustness(rows: Sequence["Row"], path: Path) -> None:
    """Draw each row's accuracy in per cent as a bar, a panel for each mode; attacks that were stopped have none."""
    modes = list(dict.fromkeys(row.mode for row in rows))
    tallest = max(sum(row.mode == mode for row in rows) for mode in modes)
    figure, panels = plt.subplots(
        1, len(modes), figsize=(2.6 + 3.4 * len(modes), 1.2 + 0.27 * tallest), layout="constrained",
        sharex=True, squeeze=False,
    )  # fmt: skip
    for axes, mode in zip(panels[0], modes, strict=True):
        own = [row for row in rows if row.mode == mode]
        honest = next((row.accuracy for row in own if row.merchants == 0), None)
        if honest is not None:
            axes.axvline(100 * honest, color=GREY, linewidth=1, linestyle=":")
        for place, row in enumerate(own):
            if row.accuracy is None:
                axes.text(1, place, "stopped", va="center", fontsize=8)
                continue
            axes.barh(place, 100 * row.accuracy, color=BLUE if row.merchants else GREY, height=0.7)
            axes.text(100 * row.accuracy + 1, place, f"{100 * row.accuracy:.1f}", va="center", fontsize=8)
            if row.success is not None and row.merchants:
                works = f"backdoor works: {100 * row.success:.0f} %"
                axes.text(1, place, works, va="center", fontsize=8, color="white")
        labels = [f"{row.attack}, by {row.merchants}" if row.merchants else "nobody attacks" for row in own]
        axes.set_yticks(range(len(own)), labels if axes is panels[0][0] else [""] * len(own), fontsize=8)
        axes.set_ylim(len(own) - 0.5, -0.5)
        axes.set_xlim(0, 100)
        axes.set_xlabel("accuracy, %")
        axes.set_title(mode, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
