"""Merchants for the benchmark of rounds: real nodes and real streams, and no work.

    python -m hanse_simulations.benchmarks.round_merchants CONFIG…

Each configuration is a merchant's. A block of one round is reported at once, without a stream. One of two is served
over its stream by answers as long as the questions; any other by secure aggregation of updates that are zero. Ends
when its standard input does.
"""

import sys
import threading
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hanse_client.config import ClientConfig
from hanse_client.keys import load_node
from hanse_client.node_keeper import NodeKeeper
from hanse_client.stream import Limits, serve_block
from hanse_common import signing, wire
from hanse_common.config import load
from hanse_common.directory import Directory
from hanse_common.messages import MAX_MESSAGE_BYTES, Invitation, Start, model_digest
from hanse_common.plan import Plan
from hanse_common.secagg import ring
from hanse_common.secagg.merchant import Merchant
from hanse_common.secagg.messages import Agreement, Delivery, Roster, Survivors, Upload, Work
from hanse_common.secagg.suite import Setup
from hanse_common.session import Assignment, BlockReport, ReportCode

ECHO_ROUNDS = 2
"""How a block says that it only wants echoes."""

_QUESTIONS: tuple[type[Work], ...] = (Invitation, Roster, Delivery, Start, Survivors, Agreement)

LIMITS = Limits(record_bytes=1 << 24, patience=60.0, deadline=600.0)


class _Masking:
    """A merchant of secure aggregation, and of nothing else: no policy, no ledger, no photos."""

    def __init__(self, identity: Ed25519PrivateKey) -> None:
        self._identity = identity
        self._merchant: Merchant | None = None

    def handle(self, request: bytes) -> bytes:
        """Return the answer to `request`."""
        return wire.encode(self._answer(wire.decode_any(_QUESTIONS, request, MAX_MESSAGE_BYTES)))

    def _answer(self, message: Work) -> Work:
        if isinstance(message, Invitation):
            directory = wire.decode(Directory, message.signed_directory.directory)
            plan = wire.decode(Plan, message.signed_plan.plan)
            setup = Setup(**message.work, rounds=message.rounds, directory_digest=directory.digest)
            parameters, entities = plan.cohort.parameters, directory.entities(0)
            self._merchant = Merchant(setup, parameters, self._identity, entities)
            return self._merchant.join()
        if self._merchant is None:
            raise ValueError("Expected an invitation first.")
        match message:
            case Roster():
                return self._merchant.share(message, 0, {})
            case Delivery():
                return self._merchant.receive(message)[1]
            case Start():
                self._merchant.open_round(message.round, model_digest(message.model))
                residues = np.zeros(len(message.model) // 4, dtype=np.uint32)
                self._merchant.mask(residues)
                return Upload(**message.work, vector=ring.to_bytes(residues))
            case Survivors():
                return self._merchant.agree(message)
            case Agreement():
                return self._merchant.unmask(message)
        raise ValueError("Expected a question of secure aggregation.")


def serve(config: ClientConfig, keeper: NodeKeeper, stop: threading.Event) -> None:
    """Serve assignments of one merchant until the process ends."""
    identity = signing.load_key(config.identity_path)
    authority = config.connection.authority.read_bytes() if config.connection else b""
    while True:
        node, data = keeper.assignments.get()
        assignment = wire.decode(Assignment, data)
        code = ReportCode.DONE
        if assignment.rounds > 1:
            handle = _Masking(identity).handle if assignment.rounds > ECHO_ROUNDS else bytes
            code = serve_block(assignment, identity, authority, handle, stop, LIMITS)
        keeper.report(node, wire.encode(BlockReport(block=assignment.block, code=code)))


def main() -> None:
    """Run the merchants named on the command line."""
    stop = threading.Event()
    with ExitStack() as nodes:
        for path in sys.argv[1:]:
            config = load(ClientConfig, Path(path))
            tell = partial(print, path, flush=True)
            node = nodes.enter_context(NodeKeeper(config, load_node(config), tell))
            threading.Thread(target=serve, args=(config, node, stop), daemon=True).start()
        sys.stdin.read()
        stop.set()


if __name__ == "__main__":
    main()
