"""What serving costs beside the recognizer's own network, and how fast and how well products are found.

    figures = run(quick=True)

All of it on one core. **Photos**: `CALLERS` threads ask the shop's core (`hanse_client.recognition`) to classify photos
of `SIDES` pixels, the size in which a gallery keeps them, through queue, batches, preprocessing and head. The floor is
the forward pass of the recipe's own backbone, as it is loaded for training, over as many preprocessed photos in batches
of the same size. Both take turns, and `overhead` is the median of their ratios; it may be below 1, since what serves
has its convolutions fused: `fused_over_backbone` tells by how much, `overhead_over_fused` is all of serving over the
network that serves. `overhead_with_decoding` begins with JPEG files. Latencies are those of a caller who is alone.

**Index**: made-up 256-d embeddings in groups, as products of a kind are alike; queries are photos of products, some way
off. `recall_at_10_vs_exact` is the part of the exact ten nearest that the index finds.

**Gallery**: the same products in the shop's database, each with a photo and a title of `TITLE` words, in `CATEGORIES`
categories; the ten nearest by the vector of a photo, the same of one category, and by vector and two words. A search of
the shop's core also embeds the photo: `search_ms` has all of it, for the smallest gallery.

Keys: `overhead`, `overhead_over_fused`, `overhead_with_decoding`, `fused_over_backbone`, `photos_per_second`;
`classify_ms` and `search_ms`, each with `p50` and `p95`; `index`, by number of products, each with `p50_ms`, `p95_ms`,
`recall_at_10_vs_exact`, `bytes_per_product`, `build_seconds` and `approximate`; `recall_at_10_vs_exact`, the least of
these; `gallery`, by number of products, each with `photo_ms`, `category_ms` and `words_ms`, each with `p50` and `p95`,
`first_words_seconds` and `file_bytes_per_product`.
"""

import hashlib
import io
import json
import os
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.table import Table

from hanse_client.config import ClientConfig
from hanse_client.gallery import rows
from hanse_client.gallery.gallery import Gallery
from hanse_client.gallery.index import VectorIndex
from hanse_client.gallery.product import Filter, Product
from hanse_client.gallery.store import Store
from hanse_client.recognition.engine import CPU_BATCH
from hanse_client.recognition.service import Recognition
from hanse_common.vision.backbones import load_backbone
from hanse_common.vision.fused import fuse, fusible
from hanse_common.vision.photo import decode
from hanse_common.vision.preprocessing import preprocess
from hanse_common.vision.recipe import Recipe
from hanse_common.vision.recipe_features import EfficientNetLite0, Preprocessing
from hanse_common.vision.recipe_model import Linear
from hanse_common.vision.recognizer import Recognizer
from hanse_common.vision.taxonomy import Taxonomy
from hanse_simulations.benchmarks.memory import measured_apart
from hanse_simulations.console import console

RECIPE = Recipe(
    preprocessing=Preprocessing(size=112, channels=3, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
    backbone=EfficientNetLite0(),
    model=Linear(),
)
CLASSES = tuple(f"class {number}" for number in range(10))
SIDES = (512, 384)
CALLERS = CPU_BATCH
DIMENSION, NEAREST = 256, 10
SIZES = {"full": (1_000, 100_000, 1_000_000), "quick": (1_000, 10_000), "tiny": (100, 200)}
ROUNDS = {"full": 15, "quick": 7, "tiny": 1}
"""Repetitions, each of `PHOTOS` photos."""
PHOTOS = {"full": 4 * CPU_BATCH, "quick": 4 * CPU_BATCH, "tiny": 2}
IN_GALLERY = {"full": (1_000, 100_000), "quick": (1_000, 10_000), "tiny": (100,)}
QUERIES = {"full": 500, "quick": 200, "tiny": 10}
ALONE = {"full": 200, "quick": 50, "tiny": 3}
"""Requests of the caller who is alone."""

GROUP = 50
"""Products of a kind."""

CATEGORIES, TITLE, VOCABULARY = 20, 5, 5_000
"""Categories of the gallery, words of a title, and words in all."""

WITHIN, AWAY = 0.7, 0.5
"""How far a product is from its group's middle, and a photo from its product; the middle has norm 1."""


_NAME = hashlib.sha256(b"bench serve").digest()
_TOGETHER = 10_000


def run(quick: bool, tiny: bool = False) -> dict[str, Any]:
    """Measure in a process of its own, on one core, and return the figures. `tiny` is for tests."""
    with _one_core():
        found: dict[str, Any] = measured_apart(__name__, 2 if tiny else int(quick))
    return found


def show(figures: dict[str, Any]) -> None:
    """Print the figures for a person."""
    table = Table("what", "measured", "goal", box=None, pad_edge=False)
    classify, search = figures["classify_ms"], figures["search_ms"]
    lines = [
        ("photos a second, on one core", f"{figures['photos_per_second']:.0f}", ""),
        ("serving over the backbone's own forward pass", f"{figures['overhead']:.2f}", "1.15"),
        ("the same over the fused network that serves", f"{figures['overhead_over_fused']:.2f}", ""),
        ("the first, with decoding of JPEG", f"{figures['overhead_with_decoding']:.2f}", ""),
        ("fused network over the backbone's own", f"{figures['fused_over_backbone']:.2f}", ""),
        ("classify, p50 and p95", f"{classify['p50']:.1f} and {classify['p95']:.1f} ms", ""),
        ("search, p50 and p95", f"{search['p50']:.1f} and {search['p95']:.1f} ms", ""),
    ]
    for count, one in figures["index"].items():
        kind = "approximate" if one["approximate"] else "exact"
        lines += [
            (
                f"index of {int(count):,} ({kind}), p50 and p95",
                f"{one['p50_ms']:.2f} and {one['p95_ms']:.2f} ms",
                "",
            ),
            ("  recall of the exact ten nearest", f"{one['recall_at_10_vs_exact']:.4f}", "0.98"),
            (
                "  bytes a product, and build",
                f"{one['bytes_per_product']:.0f}, {one['build_seconds']:.1f} s",
                "",
            ),
        ]
    for count, one in figures["gallery"].items():
        lines += [
            (f"gallery of {int(count):,}, {what}, p50 and p95", f"{ms['p50']:.1f} and {ms['p95']:.1f} ms", "")
            for what, ms in (
                ("by photo", one["photo_ms"]),
                ("of a category", one["category_ms"]),
                ("by photo and words", one["words_ms"]),
            )
        ]
        lines += [
            ("  first search by words", f"{one['first_words_seconds']:.1f} s", ""),
            ("  database, bytes a product", f"{one['file_bytes_per_product']:.0f}", ""),
        ]
    for line in lines:
        table.add_row(*line)
    console.print(table)


def measure(size: str) -> dict[str, Any]:
    """Return the figures for the `SIZES` of that name, measured in this process."""
    torch.set_num_threads(1)
    index = {str(count): _index(count, QUERIES[size]) for count in SIZES[size]}
    figures = _photos(SIZES[size][0], PHOTOS[size], ROUNDS[size], ALONE[size])
    recall = min(one["recall_at_10_vs_exact"] for one in index.values())
    gallery = {str(count): _gallery(count, ALONE[size]) for count in IN_GALLERY[size]}
    return figures | {"index": index, "recall_at_10_vs_exact": recall, "gallery": gallery}


# Photos


def _photos(products: int, photos: int, rounds: int, alone: int) -> dict[str, Any]:
    files = [_jpeg(seed) for seed in range(photos)]
    images = [decode(data) for data in files]
    inputs = [
        preprocess(images[start : start + CPU_BATCH], RECIPE.preprocessing)
        for start in range(0, photos, CPU_BATCH)
    ]
    backbone, fused = load_backbone(RECIPE), load_backbone(RECIPE)
    if fusible():
        fuse(fused)
    with (
        tempfile.TemporaryDirectory() as folder,
        Recognition.open(_shop(Path(folder))) as recognition,
        ThreadPoolExecutor(CALLERS) as callers,
    ):
        ways: dict[str, Callable[[], Any]] = {
            "backbone": lambda: _forward(backbone, inputs),
            "fused": lambda: _forward(fused, inputs),
            "served": lambda: list(callers.map(recognition.classify, images)),
            "decoded": lambda: list(callers.map(lambda data: recognition.classify(decode(data)), files)),
        }
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for repetition in range(rounds + 1):
            for way, work in ways.items():
                taken = _timed(work)
                if repetition:  # the first one warms up
                    seconds[way].append(taken)
        classify = [_timed(lambda: recognition.classify(images[0])) for _ in range(alone)]
        _fill(recognition, products, images)
        recognition.search(images[0])
        search = [_timed(lambda: recognition.search(images[0], k=NEAREST)) for _ in range(alone)]

    def over(way: str, floor: str = "backbone") -> float:
        pairs = zip(seconds[way], seconds[floor], strict=True)
        return statistics.median(own / least for own, least in pairs)

    return {
        "photos_per_second": photos / statistics.median(seconds["served"]),
        "overhead": over("served"),
        "overhead_over_fused": over("served", "fused"),
        "overhead_with_decoding": over("decoded"),
        "fused_over_backbone": over("fused"),
        "classify_ms": _percentiles(classify),
        "search_ms": _percentiles(search),
    }


def _jpeg(seed: int) -> bytes:
    """Return a picture with large shapes and fine grain, which takes a decoder as long as a photo does."""
    source = np.random.default_rng(seed)
    coarse = Image.fromarray(source.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(
        SIDES, Image.Resampling.BICUBIC
    )
    grain = source.normal(scale=6, size=(SIDES[1], SIDES[0], 3))
    data = io.BytesIO()
    Image.fromarray(np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8)).save(
        data, "JPEG", quality=90
    )
    return data.getvalue()


def _forward(network: torch.nn.Module, inputs: list[torch.Tensor]) -> None:
    with torch.inference_mode():
        for batch in inputs:
            network(batch)


def _shop(folder: Path) -> ClientConfig:
    vector = np.zeros(RECIPE.dimension(len(CLASSES)), np.float32)
    taxonomy = Taxonomy(classes=CLASSES)
    Recognizer.create(RECIPE, taxonomy, vector, created=datetime.now(UTC)).save(folder / "recognizer")
    return ClientConfig.model_validate(
        {
            "photos": folder / "photos",
            "state": folder / "state",
            "device": "cpu",
            "recognizer": folder / "recognizer",
            "league": {"operator_key": "00" * 32, "charter": "00" * 32, "taxonomy": {"classes": CLASSES}},
            "policy": {"league": "bench", "epsilon": 1.0},
        }
    )


def _fill(recognition: Recognition, products: int, images: list[Image.Image]) -> None:
    """Fill the gallery with products that look like points near the photos."""
    status, gallery = recognition.status(), recognition.gallery
    source = np.random.default_rng(0)
    photos = [gallery.prepare(image) for image in images]
    vectors = np.stack([recognition.embed(image).vector for image in images])
    for number in range(products):
        place = number % len(images)
        jpeg = photos[place] + number.to_bytes(4, "big")  # another photo, as its digest says
        row = vectors[place] + source.normal(scale=0.2 / status.dimension**0.5, size=status.dimension)
        unit = (row / np.linalg.norm(row)).astype(np.float32)[np.newaxis]
        product = Product(sku=f"sku-{number}", title=f"Product {number}")
        gallery.put(product, [jpeg], {status.embedding: unit})


# Products


def _products(count: int, queries: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return vectors of products (count, 256), and of photos of some of them (queries, 256)."""
    source = np.random.default_rng(count)
    middles = _unit(source.standard_normal((max(2, count // GROUP), DIMENSION), np.float32))
    vectors = np.empty((count, DIMENSION), np.float32)
    for start in range(0, count, 10_000):
        part = slice(start, min(start + 10_000, count))
        kinds = source.integers(len(middles), size=part.stop - part.start)
        vectors[part] = _near(middles[kinds], WITHIN, source)
    return vectors, _near(vectors[source.choice(count, queries)], AWAY, source)


def _index(count: int, queries: int) -> dict[str, Any]:
    vectors, asked = _products(count, queries)
    ids = np.arange(count, dtype=np.int64)
    began = time.perf_counter()
    index = VectorIndex.build(ids, vectors)
    build_seconds = time.perf_counter() - began
    taken, right = [], 0
    for query in asked:
        exact = np.argpartition(-(vectors @ query), NEAREST)[:NEAREST]
        began = time.perf_counter()
        found, _ = index.search(query[np.newaxis], NEAREST, vectors.__getitem__)
        taken.append(time.perf_counter() - began)
        right += len(np.intersect1d(exact, found[0]))
    return {
        "p50_ms": _percentiles(taken)["p50"],
        "p95_ms": _percentiles(taken)["p95"],
        "recall_at_10_vs_exact": right / (NEAREST * queries),
        "bytes_per_product": index.nbytes / count,
        "build_seconds": build_seconds,
        "approximate": index.approximate,
    }


def _gallery(count: int, queries: int) -> dict[str, Any]:
    vectors, asked = _products(count, queries)
    source = np.random.default_rng(count)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(source.choice(letters, length)) for length in source.integers(4, 12, size=VOCABULARY)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with Store(folder / "gallery.sqlite") as store:
            for start in range(0, count, _TOGETHER):
                with store.write() as db:
                    for number in range(start, min(start + _TOGETHER, count)):
                        title = " ".join(words[place] for place in source.integers(VOCABULARY, size=TITLE))
                        _put(db, number, title, vectors[number])
        with Gallery.open(folder) as gallery:
            gallery.search(_NAME, asked[:1], NEAREST)
            gallery.settle()
            where = Filter(category="category 7")
            first = _timed(lambda: gallery.search(_NAME, asked[:1], NEAREST, text=words[0]))

            def taken(**more: Any) -> dict[str, float]:
                return _percentiles(
                    [_timed(partial(gallery.search, _NAME, query[None], NEAREST, **more)) for query in asked]
                )

            return {
                "photo_ms": taken(),
                "category_ms": taken(where=where),
                "words_ms": taken(text=f"{words[1]} {words[2]}"),
                "first_words_seconds": first,
                "file_bytes_per_product": (folder / "gallery.sqlite").stat().st_size / count,
            }


def _put(db: sqlite3.Connection, number: int, title: str, vector: NDArray[np.float32]) -> None:
    """Put a product into the gallery with many others in one transaction, as no shop does: only reading is measured."""
    product = Product(sku=f"sku-{number}", title=title, category=f"category {number % CATEGORIES}")
    place, digest = rows.put_product(db, product), hashlib.sha256(number.to_bytes(4, "big")).digest()
    rows.put_photo(db, place, digest, digest)
    embedding = rows.put_vectors(db, _NAME, [(digest, vector)], DIMENSION)
    rows.refresh_prototypes(db, embedding, [place])


def _near(middles: NDArray[np.float32], distance: float, source: np.random.Generator) -> NDArray[np.float32]:
    noise = _unit(source.standard_normal(middles.shape, np.float32))
    return _unit(middles + np.float32(distance) * noise)


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    scaled: NDArray[np.float32] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return scaled


# Time


def _timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _percentiles(seconds: list[float]) -> dict[str, float]:
    p50, p95 = np.percentile(seconds, (50, 95))
    return {"p50": 1000 * float(p50), "p95": 1000 * float(p95)}


@contextmanager
def _one_core() -> Iterator[None]:
    """Hold this thread, and processes that it starts, to one core, where the system can."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


if __name__ == "__main__":
    print(json.dumps(measure(("full", "quick", "tiny")[int(sys.argv[1])])))
