"""A recognizer at the edge: size and time of its ONNX files beside torch, and how well they agree with it.

    hanse-sim bench edge [--quick] [--json FILE]

Heads are trained on product photos of Fashion-MNIST, and judged on others (`FULL`, `QUICK`). One photo of `FRAME`
pixels goes in at a time, on one thread, in turn by each way, so that they share the machine's mood: `torch` is Pillow's
resizing and the recognizer's own network and head; `float32` and `int8` are onnxruntime on the exported files, resizing
included. Keys, each by recipe: `megabytes`, `milliseconds` (medians) and `agreement` (the part of photos of which a
file names the recognizer's class first) by way; `float32_over_torch` and `int8_over_torch`, medians of the ratios of
times within one repetition; `difference`, the largest of any probability or coordinate between float32 and the
recognizer.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.table import Table
from sklearn.linear_model import LogisticRegression

from hanse_common.vision import edge
from hanse_common.vision.backbones import load_backbone
from hanse_common.vision.preprocessing import preprocess
from hanse_common.vision.recipe import Recipe
from hanse_common.vision.recipe_features import (
    Concatenation,
    EfficientNetLite0,
    Part,
    Preprocessing,
    Projection,
    Scattering,
)
from hanse_common.vision.recognizer import Recognizer
from hanse_common.vision.taxonomy import Taxonomy
from hanse_simulations.console import console
from hanse_simulations.datasets import default_folder, fashion_mnist

FRAME = (640, 480)
WAYS = ("torch", "float32", "int8")


@dataclass(frozen=True)
class Size:
    """How many photos train the head, calibrate and test, how often times are taken, and which `RECIPES`."""

    trained: int
    calibrated: int
    tested: int
    repetitions: int
    recipes: tuple[str, ...]


FULL = Size(1000, 64, 300, 50, ("scattering", "efficientnet-lite0", "both"))
QUICK = Size(200, 32, 100, 20, ("scattering", "efficientnet-lite0"))
TINY = Size(30, 16, 5, 2, ("efficientnet-lite0",))
"""For tests."""

_SCATTER = Part(
    preprocessing=Preprocessing(size=28, channels=1),
    backbone=Scattering(projection=Projection(dimensions=1500)),
)
_LITE = Part(preprocessing=Preprocessing(size=112), backbone=EfficientNetLite0())
RECIPES = {
    "scattering": Recipe.of_part(_SCATTER),
    "efficientnet-lite0": Recipe.of_part(_LITE),
    "both": Recipe(backbone=Concatenation(parts=(_SCATTER, _LITE))),
}


def run(quick: bool = False, size: Size | None = None) -> dict[str, Any]:
    """Return the figures, by `size`, or by `QUICK` or `FULL`."""
    size = size or (QUICK if quick else FULL)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found: dict[str, Any] = {
        key: {}
        for key in (
            "megabytes",
            "milliseconds",
            "agreement",
            "float32_over_torch",
            "int8_over_torch",
            "difference",
        )
    }
    try:
        for name in size.recipes:
            with console.status(name):
                for key, value in _measured(RECIPES[name], size).items():
                    found[key][name] = value
    finally:
        torch.set_num_threads(threads)
    return found


def _measured(recipe: Recipe, size: Size) -> dict[str, Any]:
    data = fashion_mnist(default_folder())
    seen = data.train_images[: size.trained + size.calibrated]
    photos = [Image.fromarray(image).convert("RGB") for image in seen]
    others = [Image.fromarray(image).convert("RGB") for image in data.test_images[: size.tested]]
    recognizer = _trained(recipe, photos[: size.trained], data.train_labels[: size.trained])
    model = edge.to_onnx(recognizer)
    small = edge.quantised(model, photos[size.trained :])
    parity, small_parity = (edge.parity(recognizer, each, others) for each in (model, small))
    frame = others[0].resize(FRAME)
    ways = {
        "torch": _torch(recognizer, frame),
        "float32": _onnxruntime(model, frame),
        "int8": _onnxruntime(small, frame),
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    for repetition in range(size.repetitions + 2):
        for way, answer in ways.items():
            begin = time.perf_counter()
            answer()
            if repetition >= 2:  # the first ones warm up
                times[way].append(time.perf_counter() - begin)
    ratios = {
        way: statistics.median(a / b for a, b in zip(times[way], times["torch"], strict=True))
        for way in WAYS[1:]
    }
    return {
        "megabytes": {"float32": len(model) / 1e6, "int8": len(small) / 1e6},
        "milliseconds": {way: 1e3 * statistics.median(times[way]) for way in WAYS},
        "agreement": {"float32": parity.agreement, "int8": small_parity.agreement},
        "float32_over_torch": ratios["float32"],
        "int8_over_torch": ratios["int8"],
        "difference": parity.difference,
    }


def _trained(recipe: Recipe, photos: list[Image.Image], labels: np.ndarray[Any, Any]) -> Recognizer:
    taxonomy = Taxonomy(classes=tuple(f"class {number}" for number in range(10)))
    empty = np.zeros(recipe.dimension(10), dtype=np.float32)
    features = Recognizer.create(recipe, taxonomy, empty, created=datetime.now(UTC)).features(photos)
    head = LogisticRegression(C=100.0, max_iter=200).fit(features, labels)
    vector = np.concatenate([head.coef_.ravel(), head.intercept_]).astype(np.float32)
    return Recognizer.create(recipe, taxonomy, vector, created=datetime.now(UTC))


def _torch(recognizer: Recognizer, frame: Image.Image) -> Callable[[], object]:
    recipe = recognizer.card.recipe
    network = load_backbone(recipe)

    def answer() -> object:
        with torch.inference_mode():
            features = network(*(preprocess([frame], view) for view in recipe.views))
        return recognizer.probabilities(features.numpy())

    return answer


def _onnxruntime(model: bytes, frame: Image.Image) -> Callable[[], object]:
    session = edge.open_session(model)
    return lambda: edge.answers(session, frame)


def show(figures: dict[str, Any]) -> None:
    """Print the figures as a table."""
    table = Table(title=f"One photo of {FRAME[0]} × {FRAME[1]} pixels on one thread")
    for heading in ("recipe", "way", "MB", "ms", "over torch", "agreement"):
        table.add_column(heading, justify="left" if heading in ("recipe", "way") else "right")
    for name, times in figures["milliseconds"].items():
        for way in WAYS:
            exported = way != "torch"
            ratio = figures[f"{way}_over_torch"][name] if exported else 1.0
            size = f"{figures['megabytes'][name][way]:.1f}" if exported else ""
            agreement = f"{100 * figures['agreement'][name][way]:.1f} %" if exported else ""
            table.add_row(name, way, size, f"{times[way]:.1f}", f"{ratio:.2f}", agreement)
    console.print(table)
