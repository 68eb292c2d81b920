"""What a round costs the server in messages: Flower's and the stream's, side by side, with real listeners.

    figures = run(merchants=10, quick=False)

The server's side runs in this process, whose CPU time is measured; the merchants, real nodes and real streams that
do no work, run in others. Flower's message is an assignment and its report. The stream's is a question and its
answer, each as long as the demo's upload.

Then a block of masked rounds, with a larger model: the time of a step, all its trips and masks, beside the time of
the one trip that it would take without masks.

The ratios to look at: `flower_to_stream`, how many trips over the stream one message over Flower would pay for, and
`masked_over_plain`.
"""

import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from rich.table import Table

from hanse_common import signing, wire
from hanse_common.credentials import load_node_public, node_public_pem
from hanse_common.directory import Directory, SignedDirectory
from hanse_common.errors import RoundFailed
from hanse_common.modes import LocalTraining
from hanse_common.plan import Cohort, Plan, SignedPlan
from hanse_common.session import Assignment, record_bytes
from hanse_common.vision.recipe import Recipe
from hanse_common.vision.taxonomy import Taxonomy
from hanse_server.config import Service
from hanse_server.coordinator import LeagueDirectory, MaskedRounds
from hanse_server.development_keys import make_keys
from hanse_server.flower_executor import Executor, RunContext
from hanse_server.flower_grid import FlowerMembership
from hanse_server.flower_link import SuperLink
from hanse_server.stream import StreamServer
from hanse_simulations.benchmarks.connected import Connected
from hanse_simulations.benchmarks.round_merchants import ECHO_ROUNDS
from hanse_simulations.console import console
from hanse_simulations.shops import merchant_names

PAYLOAD = 4 * 1930
"""Bytes of the demo's upload."""

MASKED_DIMENSION = 40_000
MASKED_ROUNDS = 20

WAIT_SECONDS = 120.0
IDLE_SECONDS = 4.0
POLL_SECONDS = 0.02


def run(merchants: int, quick: bool) -> dict[str, Any]:
    """Measure with so many `merchants` and return the figures."""
    with tempfile.TemporaryDirectory() as name, console.status("starting listeners and nodes"):
        return _Bench(Path(name), merchants, quick).run()


class _Bench:
    def __init__(self, folder: Path, merchants: int, quick: bool) -> None:
        self._folder = folder
        self._names = merchant_names(merchants)
        self._blocks = 3 if quick else 10
        self._trips = 50 if quick else 500
        self._keys = make_keys(folder / "keys", ("localhost", "127.0.0.1"), self._names)
        self._figures: dict[str, Any] = {}
        self._failure: Exception | None = None
        self._done = threading.Event()

    def run(self) -> dict[str, Any]:
        identities = {
            signing.load_public(own / "identity.key.pub"): name for name, own in self._keys.merchants.items()
        }
        nodes = {
            node_public_pem(load_node_public(own / "node.key.pub")): name
            for name, own in self._keys.merchants.items()
        }
        certificate, key = self._keys.certificate.read_bytes(), self._keys.key.read_bytes()
        with (
            StreamServer("127.0.0.1", 0, certificate, key, lambda: identities) as streams,
            SuperLink(self._service(streams.port)) as link,
        ):
            for pem in nodes:
                link.register(pem)
            configs = [str(self._config(name, link.fleet_port)) for name in self._names]
            words = [sys.executable, "-m", "hanse_simulations.benchmarks.round_merchants", *configs]
            peers = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
            try:
                with Executor(link.state, lambda context: self._measure(context, streams, nodes)):
                    link.start_run()
                    if not self._done.wait(10 * WAIT_SECONDS):
                        raise RoundFailed("The benchmark took too long.")
            finally:
                peers.communicate()
        if self._failure is not None:
            raise self._failure
        return self._figures

    def _measure(self, context: RunContext, streams: StreamServer, nodes: dict[bytes, str]) -> None:
        try:
            membership = FlowerMembership(context.grid, lambda: nodes)
            everyone = frozenset(self._names)
            _until(lambda: membership.online() == everyone)
            time.sleep(2.0)  # connections that were made are cleaned up
            idle = self._idle()
            flower = self._flower(membership, everyone, streams.port, idle)
            setup = [self._set_up(membership, everyone, streams, number) for number in range(self._blocks)]
            stream, trips = self._stream(everyone, streams)
            plain = self._plain(everyone, streams)
            masked = self._masked(membership, everyone, streams)
            streams.close_block()
            self._figures = {
                "merchants": len(everyone),
                "payload_bytes": PAYLOAD,
                "flower_cpu_ms_per_message": 1000 * flower,
                "stream_cpu_ms_per_message": 1000 * stream,
                "flower_to_stream": flower / stream,
                "trip_seconds_p50": statistics.median(trips),
                "trip_seconds_p95": float(np.quantile(trips, 0.95)),
                "block_setup_seconds": statistics.median(setup),
                "idle_cpu_percent": 100 * idle,
                "masked_dimension": MASKED_DIMENSION,
                "masked_step_seconds": masked,
                "masked_over_plain": masked / plain,
            }
        except Exception as error:
            self._failure = error
        finally:
            self._done.set()

    def _idle(self) -> float:
        """Return the share of a core that nodes cost which only ask for messages."""
        cpu, began = time.process_time(), time.perf_counter()
        time.sleep(IDLE_SECONDS)
        return (time.process_time() - cpu) / (time.perf_counter() - began)

    def _flower(
        self, membership: FlowerMembership, everyone: frozenset[str], port: int, idle: float
    ) -> float:
        """Return the CPU seconds of one Flower message and its reply, beyond what idle nodes cost."""
        cpu, began = time.process_time(), time.perf_counter()
        for number in range(self._blocks):
            membership.assign(_assignment(bytes([1, number]) * 8, 1, port), everyone)
            _until(lambda: len(membership.reports()) == len(everyone))
        spent = time.process_time() - cpu - idle * (time.perf_counter() - began)
        return max(spent, 0.0) / (self._blocks * len(everyone))

    def _set_up(
        self, membership: FlowerMembership, everyone: frozenset[str], streams: StreamServer, number: int
    ) -> float:
        """Return the seconds from an assignment to everyone's stream."""
        block = bytes([2, number]) * 8
        streams.open_block(block, 1 << 24)
        began = time.perf_counter()
        membership.assign(_assignment(block, ECHO_ROUNDS, streams.port), everyone)
        if not streams.wait(WAIT_SECONDS, lambda connected: connected == everyone):
            missing = sorted(everyone - set(streams.connected()))
            raise RoundFailed(f"No stream of: {missing}.")
        return time.perf_counter() - began

    def _stream(self, everyone: frozenset[str], streams: StreamServer) -> tuple[float, list[float]]:
        """Return the CPU seconds of a question and its answer, and the seconds of each trip to everyone."""
        payloads = dict.fromkeys(everyone, bytes(PAYLOAD))
        trips = []
        cpu = time.process_time()
        for _ in range(self._trips):
            began = time.perf_counter()
            if len(list(streams.exchange("bench", payloads, WAIT_SECONDS))) != len(everyone):
                raise RoundFailed("Some merchants did not answer.")
            trips.append(time.perf_counter() - began)
        return (time.process_time() - cpu) / (self._trips * len(everyone)), trips

    def _plain(self, everyone: frozenset[str], streams: StreamServer) -> float:
        """Return the seconds of one trip that carries a model to everyone and as much back."""
        payloads = dict.fromkeys(everyone, bytes(4 * MASKED_DIMENSION))
        taken = []
        for _ in range(MASKED_ROUNDS):
            began = time.perf_counter()
            if len(list(streams.exchange("bench", payloads, WAIT_SECONDS))) != len(everyone):
                raise RoundFailed("Some merchants did not answer.")
            taken.append(time.perf_counter() - began)
        return statistics.median(taken)

    def _masked(self, membership: FlowerMembership, everyone: frozenset[str], streams: StreamServer) -> float:
        """Return the seconds of a masked round, its share of the block's set-up included."""
        block = bytes([3]) * 16
        streams.open_block(block, record_bytes(MASKED_DIMENSION))
        membership.assign(_assignment(block, MASKED_ROUNDS, streams.port), everyone)
        if not streams.wait(WAIT_SECONDS, lambda connected: connected == everyone):
            raise RoundFailed("Some merchants did not come.")
        signed = wire.decode(SignedDirectory, self._keys.directory.read_bytes())
        directory = LeagueDirectory(signed, wire.decode(Directory, signed.directory))
        plan = _plan(len(everyone))
        rounds = MaskedRounds(
            Connected(streams),
            SignedPlan.sign(plan, Ed25519PrivateKey.generate()),
            plan,
            lambda: directory,
            lambda: 0,
            setup_rounds=MASKED_ROUNDS,
            attempts=1,
        )
        model = np.zeros(MASKED_DIMENSION, dtype=np.float32)
        began = time.perf_counter()
        for round_ in range(MASKED_ROUNDS):
            if rounds.run(round_, model).update.any():
                raise RoundFailed("The masks did not cancel.")
        return (time.perf_counter() - began) / MASKED_ROUNDS

    def _service(self, stream_port: int) -> Service:
        keys = self._keys
        return Service.model_validate(
            {
                "plan": self._folder / "plan.hanse",
                "directory": keys.directory,
                "charter": keys.pinned,
                "state": self._folder / "state",
                "tls": {"authority": keys.authority, "certificate": keys.certificate, "key": keys.key},
                "admin": {"port": 0, "token": keys.token},
                "fleet": {"host": "127.0.0.1", "port": 0},
                "aggregator": {"host": "127.0.0.1", "port": 0, "address": f"localhost:{stream_port}"},
            },
            strict=False,
        )

    def _config(self, name: str, port: int) -> Path:
        own = self._keys.merchants[name]
        path = own / "hanse-client.yaml"
        (own / "state").mkdir()
        settings = {
            "photos": "photos",
            "state": "state",
            "league": {"operator_key": "0" * 64, "charter": "1" * 64, "taxonomy": {"classes": ["a", "b"]}},
            "policy": {"league": "bench", "epsilon": 1.0},
            "connection": {
                "server": f"localhost:{port}",
                "authority": str(self._keys.authority),
                "identity": "identity.key",
                "node_key": "node.key",
            },
        }
        path.write_text(yaml.safe_dump(settings))
        return path


def _plan(merchants: int) -> Plan:
    return Plan(
        league="demo",
        serial=bytes(16),
        recipe=Recipe(),
        taxonomy=Taxonomy(classes=("a", "b")),
        dimension=MASKED_DIMENSION,
        training=LocalTraining(
            rounds=MASKED_ROUNDS,
            local_steps=1,
            sampling_rate=0.1,
            expected_batch=1.0,
            clipping_norm=1.0,
            learning_rate=1.0,
            update_bound=1.0,
            noise_multiplier=1.0,
        ),
        cohort=Cohort(min_merchants=3, max_merchants=max(merchants, 3)),
        delta=1e-5,
    )


def _assignment(block: bytes, rounds: int, port: int) -> Assignment:
    nothing = SignedPlan(plan=b"", signature=bytes(64))
    return Assignment(block=block, signed_plan=nothing, rounds=rounds, aggregator=f"localhost:{port}")


def _until(true: Any) -> None:
    given_up = time.monotonic() + WAIT_SECONDS
    while not true():
        if time.monotonic() > given_up:
            raise RoundFailed("Some merchants' nodes did not come or did not report.")
        time.sleep(POLL_SECONDS)


def show(figures: dict[str, Any]) -> None:
    """Print the figures for a person."""
    table = Table("what", "measured", "goal", box=None, pad_edge=False)
    rows = (
        ("CPU of a stream's question and answer", f"{figures['stream_cpu_ms_per_message']:.2f} ms", "2 ms"),
        (
            f"a trip of {figures['merchants']} merchants",
            f"{1000 * figures['trip_seconds_p50']:.1f} ms",
            "50 ms",
        ),
        ("CPU of a Flower message and reply", f"{figures['flower_cpu_ms_per_message']:.1f} ms", ""),
        ("one Flower message, in stream trips", f"{figures['flower_to_stream']:.0f}", ""),
        ("from an assignment to all streams", f"{figures['block_setup_seconds']:.2f} s", ""),
        (
            f"a masked step of {MASKED_DIMENSION:,} numbers",
            f"{1000 * figures['masked_step_seconds']:.0f} ms",
            "500 ms",
        ),
        ("the same, over one trip without masks", f"{figures['masked_over_plain']:.1f}", ""),
        ("CPU of idle nodes, of one core", f"{figures['idle_cpu_percent']:.1f} %", ""),
    )
    for row in rows:
        table.add_row(*row)
    console.print(table)
