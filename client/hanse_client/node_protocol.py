"""What a node's process and the daemon say to each other, besides assignments and reports."""

from enum import IntEnum

CONNECTED = b"connected"
"""Said by the node once Flower has let it in, before anything else. What follows are assignments."""


class NodeExit(IntEnum):
    """The node's exit codes: why it ended."""

    UNREACHABLE = 40
    UNTRUSTED = 41
    UNKNOWN_KEY = 42
    """The server no longer knows the node."""
    REFUSED = 43
    """The server never knew the node, or takes it for one that is online. Flower gives both one answer."""
    LOST = 44
    ORPHANED = 45
