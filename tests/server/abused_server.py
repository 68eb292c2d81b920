"""A server whose league trains on and on, as a process of its own that a test floods: what it holds can be measured.

    python abused_server.py FOLDER PLAN        # keys as by make_keys in FOLDER, the bytes of a signed plan in PLAN

Says one JSON object a line: its ports, then each round as it is over. Ends with its standard input.
"""

import itertools
import json
import sys
import threading
from pathlib import Path
from typing import Any

import hanse_common  # noqa: F401 - sets what flwr reads when it is imported

# isort: split
import numpy as np
from conftest import IDENTITIES, league_directory  # type: ignore[import-not-found]

from hanse_common import signing, wire
from hanse_common.credentials import load_node_public, node_public_pem
from hanse_common.errors import RoundFailed, RunStopped
from hanse_common.plan import Plan, SignedPlan
from hanse_server.blocks import BlockTransport
from hanse_server.config import Admin, AggregatorListener, Blocks, Fleet, Service, Tls
from hanse_server.coordinator import MaskedRounds
from hanse_server.flower_executor import Executor, RunContext
from hanse_server.flower_grid import FlowerMembership
from hanse_server.flower_link import SuperLink
from hanse_server.stream import StreamServer

HONEST = frozenset({"alder", "birch", "cedar"})
ROUNDS = 2


def say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


def serve(folder: Path, signed: SignedPlan) -> None:
    plan = wire.decode(Plan, signed.plan)
    listed = league_directory(plan.league)
    certificate, key = (folder / "server.crt").read_bytes(), (folder / "server.key").read_bytes()
    service = Service(
        plan=folder / "plan",
        directory=folder / "directory",
        charter="0" * 64,
        state=folder / "state",
        tls=Tls(authority=folder / "ca.crt", certificate=folder / "server.crt", key=folder / "server.key"),
        admin=Admin(port=0, token=folder / "admin.token"),
        fleet=Fleet(host="127.0.0.1", port=0),
        aggregator=AggregatorListener(address="localhost:1"),
        page=None,
    )
    # The fourth of the league has keys, and no honest intention; nobody waits for it.
    names = {signing.public_bytes(IDENTITIES[name]): name for name in (*sorted(HONEST), "damson")}
    over = threading.Event()
    streams = StreamServer("127.0.0.1", 0, certificate, key, lambda: names)
    with SuperLink(service) as link, streams:
        pems = {}
        for name in names.values():
            pem = node_public_pem(load_node_public(folder / name / "node.key.pub"))
            link.register(pem)
            if name in HONEST:
                pems[pem] = name

        def run(context: RunContext) -> None:
            membership = FlowerMembership(context.grid, lambda: pems)
            transport = BlockTransport(
                streams, membership, signed, plan, f"localhost:{streams.port}", lambda: HONEST,
                Blocks(rounds=ROUNDS, patience=30, gather=5),
            )  # fmt: skip
            attempts = itertools.count()
            with transport:
                while not over.is_set():
                    rounds = MaskedRounds(
                        transport, signed, plan, lambda: listed, lambda: next(attempts),
                        setup_rounds=ROUNDS, attempts=3, clock=lambda: 0.0,
                    )  # fmt: skip
                    for number in range(ROUNDS):
                        model = np.zeros(plan.dimension, dtype=np.float32)
                        try:
                            outcome = rounds.run(number, model)
                        except RoundFailed as error:
                            say(failed=str(error))
                            break
                        except RunStopped:
                            return
                        say(mean=float(outcome.update.mean()), blamed=dict(outcome.blamed))

        with Executor(link.state, run, streams.abort):
            link.start_run()
            say(admin=link.admin_port, fleet=link.fleet_port, streams=streams.port)
            sys.stdin.read()
            over.set()
            streams.abort()


if __name__ == "__main__":
    serve(Path(sys.argv[1]), wire.decode(SignedPlan, Path(sys.argv[2]).read_bytes()))
