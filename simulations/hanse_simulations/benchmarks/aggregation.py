"""What the server's sum of masked uploads costs, beside bare addition and beside Flower's own aggregation.

    figures = run(quick=True)

Ours begins with records as `RecordReader` hands them over and ends with the sum: both messages decoded and checked,
the vector added. The floor is numpy's addition of as many vectors, and the peer Flower's `aggregate_arrayrecords` of
as many replies, all in one run and one thread, from a few distinct vectors each. Floor and ours take turns with every
single upload, which counts by its best repetition; Flower's aggregation is one call, and counts by its best, too.

Memory is that of fresh processes. Ours is a real server to which all merchants upload at once over TLS; Flower's is
the replies and their aggregation, without what brought them.

The ratios to look at: `over_floor` beside `peer_over_floor`, and `aggregator_models_in_memory` beside
`peer_megabytes_per_merchant`. How many models are in memory is by how much the peak grows when vectors are twice as
long, so that a connection's own buffers, some hundred kilobytes a merchant, are told apart from models; they are in
`aggregator_megabytes_beside_models`, and both together in `aggregator_peak_over_model`.
"""

import math
import time
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from rich.table import Table

from hanse_common import signing, wire
from hanse_common.errors import RoundFailed
from hanse_common.messages import MAX_MESSAGE_BYTES, Declined
from hanse_common.secagg.messages import Upload, Work
from hanse_common.session import Answer, RecordReader, frames, record_bytes
from hanse_simulations.benchmarks import flower_aggregation
from hanse_simulations.benchmarks.aggregation_memory import open_aggregator
from hanse_simulations.benchmarks.memory import measured_apart
from hanse_simulations.console import console

DISTINCT = 4
"""Vectors that take turns."""

MEMORY_DIMENSION = 11_200_000
PEER_MEMORY = (2, 6)
"""Replies that Flower aggregates where its memory is measured: what it grows by in between is the merchants'."""

ANSWERS: tuple[type[Work], ...] = (Upload, Declined)


def run(quick: bool) -> dict[str, Any]:
    """Measure and return the figures."""
    merchants, dimension, repeats = (20, 4_000_000, 10) if quick else (100, 11_200_000, 4)
    with console.status("adding"):
        figures = _times(merchants, dimension, repeats)
    peaks, models, beside, peer = {}, {}, {}, []
    with console.status("measuring memory"):
        for count in (5, 20) if quick else (10, 50, 100):
            whole, half = (_peak(count, dimension) for dimension in (MEMORY_DIMENSION, MEMORY_DIMENSION // 2))
            model = 4 * MEMORY_DIMENSION
            peaks[str(count)] = whole / model
            models[str(count)] = (whole - half) / (model / 2)
            beside[str(count)] = (2 * half - whole) / 1e6
        for count in PEER_MEMORY:
            found = measured_apart("hanse_simulations.benchmarks.flower_aggregation", count, MEMORY_DIMENSION)
            peer.append(found["megabytes"])
    return figures | {
        "aggregator_models_in_memory": max(models.values()),
        "aggregator_models_by_merchants": models,
        "aggregator_megabytes_beside_models": beside,
        "aggregator_peak_over_model": peaks,
        "peer_megabytes_per_merchant": (peer[1] - peer[0]) / (PEER_MEMORY[1] - PEER_MEMORY[0]),
        "memory_dimension": MEMORY_DIMENSION,
    }


def _peak(merchants: int, dimension: int) -> float:
    """Return by how many bytes a fresh server grows while `merchants` upload vectors of `dimension` numbers."""
    found = measured_apart("hanse_simulations.benchmarks.aggregation_memory", merchants, dimension)
    return float(found["models"]) * 4 * dimension


class Best:
    """Seconds of a work in parts, of each part the best that was seen: what else the machine does falls out."""

    def __init__(self) -> None:
        self._parts: dict[Hashable, float] = {}

    @contextmanager
    def part(self, name: Hashable) -> Iterator[None]:
        """Time the part `name` once more."""
        began = time.perf_counter()
        yield
        self._parts[name] = min(time.perf_counter() - began, self._parts.get(name, math.inf))

    @property
    def seconds(self) -> float:
        """The sum of all parts."""
        return sum(self._parts.values())


def _times(merchants: int, dimension: int, repeats: int) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    vectors = [generator.integers(1 << 32, size=dimension, dtype=np.uint32) for _ in range(DISTINCT)]
    keys = [Ed25519PrivateKey.generate() for _ in range(merchants)]
    identities = [signing.public_bytes(key) for key in keys]
    aggregator = open_aggregator(keys)
    work = aggregator.setup.work
    records = [_record(Upload(**work, vector=vector.tobytes())) for vector in vectors]
    bound = record_bytes(dimension)
    floats = [generator.standard_normal(dimension, dtype=np.float32) for _ in range(DISTINCT)]
    replies = [flower_aggregation.reply(vector) for vector in floats]
    total = np.zeros(dimension, dtype=np.uint32)
    floor, ours, peer = Best(), Best(), Best()
    for _ in range(repeats):
        with ours.part("open"):
            sum_ = aggregator.open_round(0, bytes(32), dimension)
        for place, identity in enumerate(identities):
            vector, record = vectors[place % DISTINCT], records[place % DISTINCT]
            with floor.part(place):
                np.add(total, vector, out=total)
            with ours.part(place):
                _, payload = wire.decode_tailed((Answer,), record, bound)
                _, tail = wire.decode_tailed(ANSWERS, payload, MAX_MESSAGE_BYTES)
                sum_.add_vector(identity, tail)
        with peer.part("all"):
            flower_aggregation.aggregate([replies[place % DISTINCT] for place in range(merchants)])
    return {
        "merchants": merchants,
        "dimension": dimension,
        "over_floor": ours.seconds / floor.seconds,
        "peer_over_floor": peer.seconds / floor.seconds,
        "floor_seconds": floor.seconds,
        "ours_seconds": ours.seconds,
        "peer_seconds": peer.seconds,
    }


def _record(upload: Upload) -> memoryview:
    """Return the record that brings `upload`, as a stream's server has it once its frames are read."""
    reader = RecordReader(record_bytes(len(upload.vector) // 4))
    announced = False
    for frame in frames(wire.encode(Answer(trip=1, payload=wire.encode(upload)))):
        record = reader.add(frame)
        if record is not None:
            return record
        if not announced:
            announced = True
            reader.expect(wire.announced_bytes(Answer, reader.received))
    raise RoundFailed("The record has no end.")


def show(figures: dict[str, Any]) -> None:
    """Print the figures for a person."""
    table = Table("what", "measured", "goal", box=None, pad_edge=False)
    size = f"{figures['merchants']} × {figures['dimension']:,}"
    rows = [
        (f"our sum of {size}, over bare addition", f"{figures['over_floor']:.2f}", "1.2"),
        ("Flower's aggregation, over bare addition", f"{figures['peer_over_floor']:.2f}", ""),
        ("memory with Flower, a merchant", f"{figures['peer_megabytes_per_merchant']:.1f} MB", ""),
    ]
    rows += [
        (
            f"models in our memory with {count} merchants, and all else",
            f"{found:.2f}, {figures['aggregator_megabytes_beside_models'][count]:.0f} MB",
            "4",
        )
        for count, found in figures["aggregator_models_by_merchants"].items()
    ]
    for row in rows:
        table.add_row(*row)
    console.print(table)
