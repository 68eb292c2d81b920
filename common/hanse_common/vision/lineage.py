"""Where a recognizer comes from, and what its photos have paid since the first of its ancestors.

    line = inherited(parent_digest, parent_plan, parent_lineage, parent_cost=(2.0, 1e-5), own_cost=(0.7, 1e-6))
    line.epsilon, line.delta     # 2.7, 1.1e-05
    line.lineage[0].digest       # the parent's

A recognizer that training went on from holds what its photos told it. A photo that took part in both trainings is
protected by both guarantees one after the other, which is the sum of each (basic composition: Dwork, Roth 2014,
"The Algorithmic Foundations of Differential Privacy", theorem 3.16). It holds for trainings that were planned after
looking at earlier results, too. Where the units of privacy differ, the sum is said of the smallest: a product's ε
covers each of its photos.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from hanse_common.wire import HexDigest, Value

MAX_ANCESTORS = 64
"""Bound of the ancestors that a card names: the nearest. Older ones are named by the cards of those."""

Cost = tuple[float, float]
"""ε and δ."""


class Ancestor(Value):
    """A recognizer that training began from: its digest, and that of the plan it was trained by, where known."""

    digest: HexDigest
    plan_digest: HexDigest | None = None


@dataclass(frozen=True)
class Inheritance:
    """What a successor's card says beside its own: ε and δ in all, and its ancestors, the parent first.

    ε and δ are None where the parent, or the training itself, has no guarantee: then the successor has none either.
    """

    epsilon: float | None
    delta: float | None
    lineage: tuple[Ancestor, ...]

    @property
    def parent_digest(self) -> bytes:
        """The parent's digest, 32 bytes."""
        return bytes.fromhex(self.lineage[0].digest)


def inherited(
    digest: HexDigest,
    plan_digest: HexDigest | None,
    ancestors: Sequence[Ancestor],
    *,
    parent_cost: Cost | None,
    own_cost: Cost | None,
) -> Inheritance:
    """Return what a recognizer inherits whose training began from the one of `digest`.

    `plan_digest` and `ancestors` are the parent's, the nearest first. `parent_cost` is what the parent's card says,
    `own_cost` what the training from there on costs. At most `MAX_ANCESTORS` are kept; δ is at most 1, where it says
    nothing any more.

    Raises `ValueError` for a cost below zero or not a number.
    """
    for cost in (parent_cost, own_cost):
        if cost is not None and not (cost[0] >= 0 and 0 <= cost[1] <= 1):
            raise ValueError(f"found ε = {cost[0]} and δ = {cost[1]}, expected ε from 0 and δ from 0 to 1")
    lineage = (Ancestor(digest=digest, plan_digest=plan_digest), *ancestors)[:MAX_ANCESTORS]
    if parent_cost is None or own_cost is None:
        return Inheritance(None, None, lineage)
    return Inheritance(parent_cost[0] + own_cost[0], min(1.0, parent_cost[1] + own_cost[1]), lineage)
