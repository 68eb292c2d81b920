"""How many must take part, may be corrupt, must agree, and must help: n_min, c, q and t, from one place.

    parameters = Parameters(n_min=4, c=1)
    parameters.quorum(5), parameters.threshold(5), parameters.required(5)    # 4, 3, 4

`n_min` and `c` stand in the signed plan and are judged by every merchant's policy; q and t follow from them and
from the roster's size, at every merchant by itself. The server chooses nothing.

- **c**: how many members of the league's whole directory may be corrupt and share all they see with the server. Of
  the directory, not of one roster, because the server picks rosters. At least 1: nobody vouches for everyone.
- **n_min**: the least survivors of a released sum. Their noise alone must suffice, and n_min − c ≥ 2: the sum of one
  honest update would be that update.
- **q** = ⌊(n + c)/2⌋ + 1, the merchants that must have signed one survivor set before anyone helps to unmask it. Two
  sets with q signatures each would share 2q − n > c signers, an honest one among them; and an honest merchant signs
  one set only. So there is one survivor set a round, whatever the server tells whom [1, section 6].
- **t** = ⌊n/2⌋ + 1, the shares that recover a secret. With one survivor set, a merchant's seed and its key are never
  both asked of honest merchants, so the server gets at most c shares of one of them: t > c is what is needed, and
  n ≥ n_min ≥ 2c gives it. A majority is asked rather than c + 1, so that more than c corrupt merchants who cannot
  forge the agreement still recover nothing by shares alone; and not q, so that some who agreed may then fall silent.

A round ends with a sum when max(n_min, q) survivors agree and t of them help. A merchant holds a share of its own
secrets and counts.

Reference: [1] Bonawitz et al. 2017, "Practical Secure Aggregation for Privacy-Preserving Machine Learning".
"""

from dataclasses import dataclass

MAX_ROSTER = 300
"""Largest roster. The complete graph costs each merchant O(n) keys and the server O(n²) shares."""


@dataclass(frozen=True)
class Parameters:
    """n_min, c and the largest roster of one plan. Raises ValueError when they can't be met by any roster."""

    n_min: int
    c: int
    n_max: int = MAX_ROSTER

    def __post_init__(self) -> None:
        if self.c < 1:
            raise ValueError(f"Expected c ≥ 1 corrupt merchants to be assumed, found {self.c}.")
        if self.n_min - self.c < 2:
            raise ValueError(
                f"Expected n_min − c ≥ 2, found n_min = {self.n_min} and c = {self.c}: a sum with one honest "
                "update in it would be that update."
            )
        if not self.n_min <= self.n_max <= MAX_ROSTER:
            raise ValueError(
                f"Expected n_min ≤ n_max ≤ {MAX_ROSTER}, found n_min = {self.n_min} and n_max = {self.n_max}."
            )
        if self.threshold(self.n_min) <= self.c:
            raise ValueError(
                f"Expected more than c = {self.c} shares to be needed, found {self.threshold(self.n_min)} of "
                f"{self.n_min}; raise n_min to {2 * self.c} or more."
            )

    def quorum(self, n: int) -> int:
        """Return q, the signatures over one survivor set that make it the only one, in a roster of `n`."""
        return (n + self.c) // 2 + 1

    def threshold(self, n: int) -> int:
        """Return t, the shares that recover a secret, in a roster of `n`."""
        return n // 2 + 1

    def required(self, n: int) -> int:
        """Return the least survivors that a round needs for its sum, in a roster of `n`."""
        return max(self.n_min, self.quorum(n))

    def dropouts(self, n: int) -> int:
        """Return how many merchants of a roster of `n` may drop out without costing the round its sum."""
        return n - self.required(n)

    def check_roster(self, n: int) -> None:
        """Raise `ValueError` unless a roster of `n` may start a set-up. Sums of more than n_max have no head room."""
        if not self.n_min <= n <= self.n_max:
            raise ValueError(f"Expected a roster of {self.n_min} to {self.n_max} merchants, found {n}.")
