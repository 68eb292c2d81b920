"""A server with so many merchants for so many rounds, in a process of its own, and what that costs it.

    python -m hanse_simulations.benchmarks.scale_server 50 13000 3        # merchants, numbers, rounds

Prints one line of JSON. The merchants, in another process, are real but for their training. Their number is the
roster's, so the server's share of secure aggregation is in what is measured: signatures, commitments, the masks.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hanse_common import signing, wire
from hanse_common.directory import Directory, SignedDirectory
from hanse_common.errors import RoundFailed
from hanse_common.modes import LocalTraining
from hanse_common.plan import Cohort, Plan, SignedPlan
from hanse_common.session import record_bytes
from hanse_common.vision.recipe import Recipe
from hanse_common.vision.taxonomy import Taxonomy
from hanse_server.coordinator import LeagueDirectory, MaskedRounds
from hanse_server.development_keys import make_keys
from hanse_server.stream import StreamServer
from hanse_simulations.benchmarks.connected import Connected
from hanse_simulations.benchmarks.memory import peak_bytes

TRIPS = 3
"""Questions, each with its answer, that a merchant gets in a round, and as many in a set-up."""

WAIT_SECONDS = 300.0

BLOCK = b"benchmark-block."


def measure(merchants: int, dimension: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Run a set-up and `rounds` rounds and return the figures. `folder` is empty; keys are made there."""
    names = [f"m{number:03}" for number in range(merchants)]
    keys = make_keys(folder, ("localhost", "127.0.0.1"), names)
    identities = {signing.load_public(own / "identity.key.pub"): name for name, own in keys.merchants.items()}
    certificate, key = keys.certificate.read_bytes(), keys.key.read_bytes()
    with StreamServer("127.0.0.1", 0, certificate, key, lambda: identities) as streams:
        streams.open_block(BLOCK, record_bytes(dimension))
        words = [sys.executable, "-m", "hanse_simulations.benchmarks.stream", str(streams.port), BLOCK.hex()]
        words += [str(keys.certificate), *(str(own / "identity.key") for own in keys.merchants.values())]
        peers = subprocess.Popen(words)
        try:
            if not streams.wait(WAIT_SECONDS, lambda connected: len(connected) == merchants):
                raise RoundFailed(f"Only {len(streams.connected())} merchants came.")
            figures = _rounds(streams, _plan(merchants, dimension, rounds), keys.directory.read_bytes())
            streams.close_block()
        finally:
            peers.kill()
            peers.wait()
    return {"merchants": merchants, "dimension": dimension} | figures


def _rounds(streams: StreamServer, plan: Plan, directory: bytes) -> dict[str, Any]:
    signed = wire.decode(SignedDirectory, directory)
    listed = LeagueDirectory(signed, wire.decode(Directory, signed.directory))
    rounds = MaskedRounds(
        Connected(streams),
        SignedPlan.sign(plan, Ed25519PrivateKey.generate()),
        plan,
        lambda: listed,
        lambda: 0,
        setup_rounds=plan.training.rounds,
        attempts=1,
    )
    model = np.zeros(plan.dimension, dtype=np.float32)
    messages = TRIPS * plan.cohort.max_merchants
    cpu, wall = [time.process_time()], [time.perf_counter()]
    for round_ in range(plan.training.rounds):
        outcome = rounds.run(round_, model)
        if outcome.update.any() or len(outcome.uploaded) != plan.cohort.max_merchants:
            raise RoundFailed("Somebody was lost, or the masks did not cancel.")
        cpu.append(time.process_time())
        wall.append(time.perf_counter())
    # The set-up is in the first.
    return {
        "cpu_ms_per_message": 1000 * float(np.min(np.diff(cpu)[1:])) / messages,
        "round_cpu_seconds": float(np.min(np.diff(cpu)[1:])),
        "round_seconds": float(np.min(np.diff(wall)[1:])),
        "setup_cpu_ms_per_message": 1000 * (cpu[1] - cpu[0]) / (2 * messages),
        "setup_seconds": wall[1] - wall[0],
        "peak_mib": peak_bytes() / (1 << 20),
    }


def _plan(merchants: int, dimension: int, rounds: int) -> Plan:
    return Plan(
        league="demo",
        serial=bytes(16),
        recipe=Recipe(),
        taxonomy=Taxonomy(classes=("a", "b")),
        dimension=dimension,
        training=LocalTraining(
            rounds=rounds,
            local_steps=1,
            sampling_rate=0.1,
            expected_batch=1.0,
            clipping_norm=1.0,
            learning_rate=1.0,
            update_bound=1.0,
            noise_multiplier=1.0,
        ),
        cohort=Cohort(
            min_merchants=3,
            max_merchants=merchants,
            join_deadline=WAIT_SECONDS,
            upload_deadline=WAIT_SECONDS,
        ),
        delta=1e-5,
    )


def main() -> None:
    """Run with the numbers on the command line."""
    merchants, dimension, rounds = map(int, sys.argv[1:])
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(merchants, dimension, rounds, Path(folder) / "keys")))


if __name__ == "__main__":
    main()
