"""Who is there and takes part, by Flower: one message to each merchant's node for a block, and one reply.

    membership = FlowerMembership(context.grid, {node_public_pem: "alder"})

Implements `hanse_server.blocks.Membership`. A node counts by its public key, which Flower has checked.
"""

import logging
from collections.abc import Mapping

from flwr.app import Message
from flwr.serverapp import Grid

from hanse_common import wire
from hanse_common.errors import WireError
from hanse_common.flower import from_record, to_record
from hanse_common.session import Assignment, BlockReport, ReportCode

log = logging.getLogger(__name__)

MESSAGE_TYPE = "train"
TTL_SECONDS = 24 * 3600.0
"""How long an assignment may wait for its node, and its reply for us. Blocks are shorter."""

MAX_REPORT_BYTES = 1024


class FlowerMembership:
    """The merchants of `names`, by their nodes' public keys (PEM), on Flower's `grid`."""

    def __init__(self, grid: Grid, names: Mapping[bytes, str]) -> None:
        self._grid = grid
        self._names = dict(names)
        self._block: bytes | None = None
        self._waiting: dict[str, str] = {}
        self._reports: dict[str, ReportCode] = {}

    def online(self) -> frozenset[str]:
        """Return the league's merchants whose nodes are online."""
        return frozenset(self._nodes())

    def assign(self, assignment: Assignment, names: frozenset[str]) -> None:
        """Send the assignment to each of `names` that is online. A new block forgets the one before."""
        if assignment.block != self._block:
            self._block, self._waiting, self._reports = assignment.block, {}, {}
        nodes = self._nodes()
        data = wire.encode(assignment)
        for name in sorted(names & nodes.keys()):
            message = Message(to_record(data), nodes[name], MESSAGE_TYPE, ttl=TTL_SECONDS)
            for message_id in self._grid.push_messages([message]):
                if message_id:
                    self._waiting[message_id] = name

    def reports(self) -> Mapping[str, ReportCode]:
        """Return how the present block ended for those that said so."""
        for message_id, name in tuple(self._waiting.items()):
            for reply in self._grid.pull_messages([message_id]):
                del self._waiting[message_id]
                self._reports[name] = self._code(reply)
                break
        return dict(self._reports)

    def _nodes(self) -> dict[str, int]:
        found = {self._names.get(node.public_key): node.node_id for node in self._grid.get_nodes()}
        return {name: node for name, node in found.items() if name is not None}

    def _code(self, reply: Message) -> ReportCode:
        """Return what a reply says. What is no report of this block counts as malformed."""
        if reply.has_error():
            return ReportCode.MALFORMED
        try:
            report = wire.decode(BlockReport, from_record(reply.content, MAX_REPORT_BYTES), MAX_REPORT_BYTES)
        except WireError as error:
            log.info("A reply was no report: %s", error)
            return ReportCode.MALFORMED
        return report.code if report.block in (self._block, bytes(16)) else ReportCode.MALFORMED
