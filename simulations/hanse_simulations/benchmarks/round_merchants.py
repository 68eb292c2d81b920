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

from hanse_client.config import ClientConfig
from hanse_client.keys import load_node
from hanse_client.node_keeper import NodeKeeper
from hanse_client.stream import Limits, serve_block
from hanse_common import signing, wire
from hanse_common.config import load
from hanse_common.session import Assignment, BlockReport, ReportCode
from hanse_simulations.benchmarks.masking_merchant import MaskingMerchant

ECHO_ROUNDS = 2
"""How a block says that it only wants echoes."""

LIMITS = Limits(record_bytes=1 << 24, patience=60.0, deadline=600.0)


def serve(config: ClientConfig, keeper: NodeKeeper, stop: threading.Event) -> None:
    """Serve assignments of one merchant until the process ends."""
    identity = signing.load_key(config.identity_path)
    authority = config.connection.authority.read_bytes() if config.connection else b""
    while True:
        node, data = keeper.assignments.get()
        assignment = wire.decode(Assignment, data)
        code = ReportCode.DONE
        if assignment.rounds > 1:
            handle = MaskingMerchant(identity).handle if assignment.rounds > ECHO_ROUNDS else bytes
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
