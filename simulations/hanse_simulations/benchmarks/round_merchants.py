"""Merchants for the benchmark of rounds: real nodes and real streams, and no work.

    python -m hanse_simulations.benchmarks.round_merchants CONFIG…

Each configuration is a merchant's. A block of one round is reported at once, without a stream; any other is served
over its stream, by answers as long as the questions. Ends when its standard input does.
"""

import sys
import threading
from pathlib import Path

from hanse_client.config import ClientConfig
from hanse_client.daemon import NodeKeeper
from hanse_client.stream import Limits, serve_block
from hanse_common import signing, wire
from hanse_common.config import load
from hanse_common.session import Assignment, BlockReport, ReportCode

LIMITS = Limits(record_bytes=1 << 24, patience=60.0, deadline=600.0)


def serve(config: ClientConfig, node: NodeKeeper, stop: threading.Event) -> None:
    """Serve assignments of one merchant until the process ends."""
    identity = signing.load_key(config.identity_path)
    authority = config.connection.authority.read_bytes() if config.connection else b""
    while True:
        assignment = wire.decode(Assignment, node.assignments.get())
        code = ReportCode.DONE
        if assignment.rounds > 1:
            code = serve_block(assignment, identity, authority, lambda request: request, stop, LIMITS)
        node.report(wire.encode(BlockReport(block=assignment.block, code=code)))


def main() -> None:
    """Run the merchants named on the command line."""
    stop = threading.Event()
    nodes = []
    for path in sys.argv[1:]:
        config = load(ClientConfig, Path(path))
        node = NodeKeeper(config, lambda text, path=path: print(path, text, flush=True))  # type: ignore[misc]
        node.start()
        nodes.append(node)
        threading.Thread(target=serve, args=(config, node, stop), daemon=True).start()
    sys.stdin.read()
    stop.set()
    for node in nodes:
        node.stop()


if __name__ == "__main__":
    main()
