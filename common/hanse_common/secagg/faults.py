"""Why somebody does not go on: a merchant's refusals, and what an aggregator blames a merchant for."""

from enum import StrEnum


class Fault(StrEnum):
    """Why a merchant does not go on. None depends on a photo."""

    ROSTER = "roster"
    """Too few, an outsider, one entity twice, a key twice or forged, or this merchant is missing."""
    SHARES = "shares"
    """A roster member's shares are missing, forged, unreadable, or contradict their commitments."""
    LEDGER = "ledger"
    """A peer holds this merchant's own signature under a later ledger."""
    SURVIVORS = "survivors"
    """The survivor set is too small, lacks this merchant, or is a second one."""
    AGREEMENT = "agreement"
    """Too few valid signatures over the survivor set."""
    ORDER = "order"
    """Something was asked out of order, or twice."""


class Refusal(Exception):
    """The merchant does not do what was asked. `culprit` is the place of the roster member to blame, if any."""

    def __init__(self, fault: Fault, reason: str, culprit: int | None = None) -> None:
        super().__init__(reason)
        self.fault = fault
        self.culprit = culprit


class Misbehaviour(Exception):
    """A merchant's message breaks the protocol: it is dropped, and noted against its sender."""


class SumLost(Exception):
    """A round's sum cannot be had. `culprits` are the identities to blame, if it is anybody's fault."""

    def __init__(self, reason: str, culprits: tuple[bytes, ...] = ()) -> None:
        super().__init__(reason)
        self.culprits = culprits


def require(condition: bool, fault: Fault, reason: str, culprit: int | None = None) -> None:
    """Raise `Refusal` unless `condition`."""
    if not condition:
        raise Refusal(fault, reason, culprit)
