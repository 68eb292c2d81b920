"""Flower 1.41's own `aggregate_arrayrecords`, to measure an aggregator against.

    python -m hanse_simulations.benchmarks.flower_aggregation 10 1000000        # merchants, numbers

prints, as JSON, by how many megabytes a fresh process grows from the first reply of as many merchants to the end of
their aggregation. Flower's strategies hand over all replies at once, so all are in memory.
"""

import json
import sys

import numpy as np
from flwr.app import ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords
from numpy.typing import NDArray

from hanse_simulations.benchmarks.memory import MEGABYTE, Growth

WEIGHT = "num-examples"


def reply(vector: NDArray[np.float32]) -> RecordDict:
    """Return a merchant's reply with `vector`, shape (d,), and the weight of one example."""
    return RecordDict({"arrays": ArrayRecord([vector]), "metrics": MetricRecord({WEIGHT: 1.0})})


def aggregate(replies: list[RecordDict]) -> ArrayRecord:
    """Return the weighted mean of `replies`, as Flower's FedAvg gets it."""
    return aggregate_arrayrecords(replies, WEIGHT)


def main() -> None:
    """Measure with the numbers on the command line."""
    merchants, dimension = map(int, sys.argv[1:])
    vector = np.ones(dimension, dtype=np.float32)
    aggregate([reply(vector[:1])])
    growth = Growth()
    aggregate([reply(vector) for _ in range(merchants)])
    print(json.dumps({"megabytes": growth.peak_bytes() / MEGABYTE}))


if __name__ == "__main__":
    main()
