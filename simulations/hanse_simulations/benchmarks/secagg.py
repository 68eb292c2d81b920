"""Secure aggregation's cost beside Flower's own SecAgg+ and beside the floor, measured in one run.

    figures = run(quick=True)

For one merchant and for the server: CPU seconds to mask one update, and to take all masks out of the sum, with
everybody's secrets dealt and recovered for real. The peer is Flower 1.41's own code for the same stages, on the
complete graph as ours, where that ends in reasonable time. The floor is what nobody can avoid: the AES keystream of
all masks, and their addition.

Ratios: `client_speedup_vs_flower`, `server_speedup_vs_flower`, `client_over_floor`, the best of five, and
`server_over_floor`. A server at its floor cannot be faster against Flower's than Flower's generator is slow: where
numpy's Mersenne Twister is quick, the speedup is what AES leaves of it.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray
from rich.table import Table

from hanse_common import signing
from hanse_common.secagg import ring
from hanse_common.secagg.aggregator import Aggregator, MaskedSum
from hanse_common.secagg.masking import CHUNK_WORDS
from hanse_common.secagg.merchant import Merchant
from hanse_common.secagg.messages import Upload
from hanse_common.secagg.parameters import Parameters
from hanse_common.secagg.suite import Setup
from hanse_simulations.benchmarks.flower_secagg import FlowerPeer
from hanse_simulations.console import console

REPEATS = 5
PEER_WORDS = 3.2e9
"""Words of masks up to which Flower's code is run: half a minute's work for it."""

MODEL = bytes(32)
ROUND = 0


@dataclass(frozen=True)
class Case:
    """One row: n merchants, d numbers, so many of the merchants dropped after the set-up."""

    merchants: int
    dimension: int
    dropped: int


def cases(quick: bool) -> tuple[Case, ...]:
    """Return what is measured."""
    sizes = (10, 50) if quick else (10, 50, 100)
    dimensions = (100_000, 1_000_000) if quick else (100_000, 1_000_000, 11_000_000)
    return tuple(Case(n, d, share * n // 10) for d in dimensions for n in sizes for share in (0, 1))


def run(quick: bool) -> dict[str, Any]:
    """Measure all cases and return the figures; the ratios are those of the largest case the peer was run for."""
    rows = []
    with console.status("measuring") as status:
        for case in cases(quick):
            status.update(f"{case.merchants} merchants, {case.dimension:,} numbers, {case.dropped} dropped")
            rows.append(_measure(case))
    with_client = [row for row in rows if row["flower_client_seconds"] is not None]
    with_server = [row for row in rows if row["flower_server_seconds"] is not None]
    largest = max(case.dimension for case in cases(quick))
    return {
        "exact": all(row["exact"] for row in rows),
        "client_speedup_vs_flower": _ratio(with_client[-1], "flower_client_seconds", "client_seconds"),
        "server_speedup_vs_flower": _ratio(with_server[-1], "flower_server_seconds", "server_seconds"),
        "client_over_floor": min(row["client_over_floor"] for row in rows if row["dimension"] == largest),
        "server_over_floor": min(row["server_over_floor"] for row in rows if row["dimension"] == largest),
        "bytes_per_coordinate": rows[-1]["upload_bytes"] / rows[-1]["dimension"],
        "aggregator_bytes_by_n": {
            str(row["merchants"]): row["aggregator_bytes"]
            for row in rows
            if row["dimension"] == largest and not row["dropped"]
        },
        "rows": rows,
    }


def _measure(case: Case) -> dict[str, Any]:
    league = _League(case)
    expected = np.zeros(case.dimension, dtype=np.uint32)
    update = np.frombuffer(os.urandom(4 * case.dimension), dtype=np.uint32)
    floor, client = [], []
    for number in range(REPEATS):
        floor.append(_cpu(lambda: _floor(case.dimension, case.merchants)))
        first = league.merchants[0]
        first.open_round(ROUND + number, MODEL)
        masked = update.copy()
        client.append(_cpu(lambda first=first, masked=masked: first.mask(masked)))  # type: ignore[misc]
    sum_ = league.aggregator.open_round(ROUND + REPEATS, MODEL, case.dimension)
    upload_bytes = league.upload(sum_, update, expected)
    aggregator_bytes = sum_._total.nbytes
    league.agree(sum_)
    total: list[NDArray[np.uint32]] = []
    server = _cpu(lambda: total.append(sum_.total()))
    flower_client, flower_server = _peer(case)
    streams = case.merchants - case.dropped + case.dropped * (case.merchants - case.dropped)
    server_floor = min(floor) * streams / case.merchants
    return {
        "merchants": case.merchants,
        "dimension": case.dimension,
        "dropped": case.dropped,
        "exact": bool(np.array_equal(total[0], expected)),
        "client_seconds": min(client),
        "floor_seconds": min(floor),
        "client_over_floor": min(client) / min(floor),
        "server_seconds": server,
        "server_over_floor": server / server_floor,
        "flower_client_seconds": flower_client,
        "flower_server_seconds": flower_server,
        "upload_bytes": upload_bytes,
        "aggregator_bytes": aggregator_bytes,
    }


class _League:
    """Merchants and aggregator of one case, set up for as many rounds as are measured."""

    def __init__(self, case: Case) -> None:
        keys = [Ed25519PrivateKey.generate() for _ in range(case.merchants)]
        entities = {signing.public_bytes(key): str(number) for number, key in enumerate(keys)}
        parameters = Parameters(3, 1)
        digest = bytes(32)
        setup = Setup(plan_digest=digest, round=ROUND, rounds=REPEATS + 1, attempt=0, directory_digest=digest)
        merchants = {
            identity: Merchant(setup, parameters, key, entities)
            for identity, key in zip(entities, keys, strict=True)
        }
        self.aggregator = Aggregator(setup, parameters, entities)
        for identity, merchant in merchants.items():
            self.aggregator.add_member(identity, merchant.join())
        roster = self.aggregator.roster()
        for identity, merchant in merchants.items():
            self.aggregator.add_shares(identity, merchant.share(roster, 0, {}))
        for identity, merchant in merchants.items():
            merchant.receive(self.aggregator.delivery(identity))
        self._by_identity = merchants
        self.merchants = list(merchants.values())
        self._survivors = list(merchants)[case.dropped :]

    def upload(self, sum_: MaskedSum, update: NDArray[np.uint32], expected: NDArray[np.uint32]) -> int:
        """Mask and add every survivor's update; return the bytes of one upload."""
        size = 0
        for merchant in self.merchants:
            merchant.open_round(ROUND + REPEATS, MODEL)
        for identity in self._survivors:
            masked = update.copy()
            self._by_identity[identity].mask(masked, threads=os.cpu_count() or 1)
            vector = ring.to_bytes(masked)
            sum_.add_upload(identity, Upload(**sum_.work, vector=vector))
            np.add(expected, update, out=expected)
            size = len(vector)
        return size

    def agree(self, sum_: MaskedSum) -> None:
        """Let the survivors sign who they are, and open the masks."""
        survivors = sum_.survivors()
        for identity in self._survivors:
            sum_.add_agreed(identity, self._by_identity[identity].agree(survivors))
        agreement = sum_.agreement()
        for identity in self._survivors:
            sum_.add_unmasked(identity, self._by_identity[identity].unmask(agreement))


def _floor(dimension: int, streams: int) -> None:
    """Make so many keystreams as long as the vector and add them to it, in chunks that stay in the cache."""
    vector = np.zeros(dimension, dtype=np.uint32)
    zeros, buffer = bytes(4 * CHUNK_WORDS), bytearray(4 * CHUNK_WORDS)
    words = np.frombuffer(buffer, dtype=np.uint32)
    ciphers = [
        Cipher(algorithms.AES256(os.urandom(32)), modes.CTR(bytes(16))).encryptor() for _ in range(streams)
    ]
    for first in range(0, dimension, CHUNK_WORDS):
        chunk = vector[first : first + CHUNK_WORDS]
        for cipher in ciphers:
            cipher.update_into(zeros[: chunk.nbytes], buffer)
            np.add(chunk, words[: chunk.size], out=chunk)


def _peer(case: Case) -> tuple[float | None, float | None]:
    """Return the CPU seconds of Flower's client and server, None where they would take too long."""
    words = float(case.merchants) * case.dimension
    if words > PEER_WORDS:
        return None, None
    peer = FlowerPeer(case.merchants, case.dimension)
    client = _cpu(peer.mask)
    streams = case.merchants - case.dropped + case.dropped * (case.merchants - 1)
    if streams * case.dimension > PEER_WORDS:
        return client, None
    return client, _cpu(lambda: peer.unmask(case.dropped))


def _cpu(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def _ratio(row: dict[str, Any], above: str, below: str) -> float:
    return float(row[above]) / float(row[below])


def show(figures: dict[str, Any]) -> None:
    """Print the figures for a person."""
    table = Table(
        "merchants",
        "numbers",
        "dropped",
        "a merchant",
        "floor",
        "Flower's",
        "the server",
        "Flower's",
        box=None,
    )
    for row in figures["rows"]:
        seconds = [
            "–" if row[key] is None else f"{row[key]:.3f} s"
            for key in (
                "client_seconds",
                "floor_seconds",
                "flower_client_seconds",
                "server_seconds",
                "flower_server_seconds",
            )
        ]
        table.add_row(str(row["merchants"]), f"{row['dimension'] / 1e6:g} M", str(row["dropped"]), *seconds)
    console.print(table)
    console.print(
        f"\nCPU seconds. Sums exact: {figures['exact']}. Over the floor: {figures['client_over_floor']:.2f} for a "
        f"merchant (goal 1.35), {figures['server_over_floor']:.2f} for the server. Faster than Flower's: a merchant "
        f"{figures['client_speedup_vs_flower']:.0f} times (goal 10), the server "
        f"{figures['server_speedup_vs_flower']:.0f} times (goal 20). "
        f"Bytes a coordinate: {figures['bytes_per_coordinate']:g}."
    )
