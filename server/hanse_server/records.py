"""Blocks, as they come and go, in the records, the metrics and on the page.

    records = BlockRecords(history, reporter, run, plan.digest)
    transport = BlockTransport(..., journal=records)

A block is recorded before anybody is asked, so that a crash leaves it as lost.
"""

from collections.abc import Collection
from typing import Any

from hanse_server.reporting import Reporter
from hanse_server.selection import Draw
from hanse_server.storage import History


class BlockRecords:
    """Implements `hanse_server.blocks.BlockJournal` for one plan in one run."""

    def __init__(self, history: History, reporter: Reporter, run: int, plan_digest: bytes) -> None:
        self._history = history
        self._reporter = reporter
        self._run = run
        self._plan_digest = plan_digest
        self._draw: dict[str, Any] = {}

    def next(self) -> int:
        """Return the number of the block that is drawn next."""
        return self._history.blocks(self._plan_digest)

    def drawn(self, draw: Draw) -> None:
        """Keep a draw, for the record of its block."""
        self._draw = {
            "block": draw.block,
            "seed": draw.seed,
            "order": list(draw.order),
            "late": list(draw.late),
            "asked": draw.asked,
        }

    def opened(self, block: bytes) -> None:
        """Record a block before anybody is asked."""
        self._history.open_block(self._run, self._plan_digest, block, self._draw)
        self._reporter.live.note(connected=(), trips=(), trip="")

    def gathering(self, online: Collection[str], connected: Collection[str]) -> None:
        """Show who is there."""
        snapshot = self._reporter.live.snapshot()
        self._reporter.live.note(online=tuple(sorted(online)), connected=tuple(sorted(connected)))
        self._reporter.metrics.merchants(len(online), len(snapshot.listed))

    def gathered(self, block: bytes, asked: int, connected: Collection[str]) -> None:
        """Record who came."""
        self._history.move_block(block, "open", connected)
        self._reporter.live.note(connected=tuple(sorted(connected)))
        self._reporter.metrics.block(asked, len(connected))

    def closed(self, block: bytes, *, failed: bool) -> None:
        """Record the end of a block."""
        self._history.move_block(block, "failed" if failed else "closed")
