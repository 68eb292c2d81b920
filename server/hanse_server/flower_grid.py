"""Who is there and takes part, by Flower: one message to each merchant's node for a block, and one reply.

    membership = FlowerMembership(context.grid, lambda: {node_public_pem: "alder"})

Implements `hanse_server.blocks.Membership`. A node counts by its public key, which Flower has checked.
"""

import logging
import secrets
from collections.abc import Callable, Mapping

from flwr.app import Message
from flwr.common.constant import ErrorCode
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

NO_REPLY = frozenset(
    {ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE, ErrorCode.NODE_UNAVAILABLE}
)
"""Errors by which Flower itself says that no reply will come."""


class FlowerMembership:
    """The merchants on Flower's `grid`. `names` returns them as of now, by their nodes' public keys (PEM).

    `on_spent` hears a merchant's name and the ε that it spent in all, where its policy lets it say so.
    """

    def __init__(
        self,
        grid: Grid,
        names: Callable[[], Mapping[bytes, str]],
        on_spent: Callable[[str, float], None] = lambda name, epsilon: None,
    ) -> None:
        self._grid = grid
        self._names = names
        self._on_spent = on_spent
        self._block = b""
        self._waiting: dict[str, str] = {}
        self._reports: dict[str, ReportCode] = {}

    def online(self) -> frozenset[str]:
        """Return the league's merchants whose nodes are online."""
        return frozenset(self._nodes())

    def assign(self, assignment: Assignment, names: frozenset[str]) -> None:
        """Send the assignment to each of `names`; one whose node is gone counts as lost.

        A new block forgets the one before; a merchant asked again for the same block, what it said before.
        """
        if assignment.block != self._block:
            self._block, self._waiting, self._reports = assignment.block, {}, {}
        self._waiting = {asked: name for asked, name in self._waiting.items() if name not in names}
        self._reports = {name: code for name, code in self._reports.items() if name not in names}
        nodes = self._nodes()
        data = wire.encode(assignment)
        # A group drawn at random keeps the message's id, a hash, from being guessed by another merchant, who could
        # then answer in this one's place: Flower does not tie a reply to the node that is logged in.
        messages = {
            name: Message(
                to_record(data), nodes[name], MESSAGE_TYPE, ttl=TTL_SECONDS, group_id=secrets.token_hex(16)
            )
            for name in sorted(names & nodes.keys())
        }
        sent = self._grid.push_messages(list(messages.values())) if messages else ()
        self._waiting |= {asked: name for asked, name in zip(sent, messages, strict=True) if asked}
        self._reports |= dict.fromkeys(names - set(self._waiting.values()), ReportCode.LOST)

    def reports(self) -> Mapping[str, ReportCode]:
        """Return how the present block ended for those that said so.

        What is no report of this block counts as malformed; what Flower says will never come, as lost.
        """
        for asked, name in tuple(self._waiting.items()):
            code = self._pull(asked, name)
            if code is not None:
                del self._waiting[asked]
                self._reports[name] = code
        return dict(self._reports)

    def _nodes(self) -> dict[str, int]:
        names = self._names()
        found = {names.get(node.public_key): node.node_id for node in self._grid.get_nodes()}
        return {name: node for name, node in found.items() if name is not None}

    def _pull(self, asked: str, name: str) -> ReportCode | None:
        """Return what the reply to one message says, None while there is none. It is released before the next."""
        try:
            replies = list(self._grid.pull_messages([asked]))
            return self._code(replies[0], name) if replies else None
        except Exception as error:
            # flwr puts a reply together out of what its sender chose to upload, and fails in many ways.
            log.info("A reply could not be read (%s).", type(error).__name__)
            return ReportCode.MALFORMED

    def _code(self, reply: Message, name: str) -> ReportCode:
        if reply.has_error():
            return ReportCode.LOST if reply.error.code in NO_REPLY else ReportCode.MALFORMED
        try:
            report = wire.decode(BlockReport, from_record(reply.content, MAX_REPORT_BYTES), MAX_REPORT_BYTES)
        except WireError:
            return ReportCode.MALFORMED
        if report.epsilon is not None:
            self._on_spent(name, report.epsilon)
        return report.code if report.block in (self._block, bytes(16)) else ReportCode.MALFORMED
