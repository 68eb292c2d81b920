"""How many queries of one class a merchant contributes at most to a plan of mode `trends`: from the plan alone.

    most = most_of_a_class(plan)
    contributed = np.minimum(counts, most)

Both sides know it before anything is charged. A merchant cuts each of its counts there, so that the sum over the league
has a bound that no number of queries exceeds: no sum that honest merchants make is ever thrown away. Each count is cut
by itself, which moves the counts of neighbouring logs no further apart, so the sensitivity stays what it is. A sum that
stays clearly below it was not cut: no merchant's count is larger than the sum over all.

Where the sum's integers, or one merchant's, have room for less than `ABUNDANCE` allows, it is what they have room for.
"""

import math
from typing import Final

from hanse_common.modes import TrendsTraining
from hanse_common.plan import Plan
from hanse_common.privacy.encoding import FineSum

ABUNDANCE: Final = 2.0
"""One merchant may have so many times the queries, in one class, that `expected_batch` says the whole league has."""


def most_of_a_class(plan: Plan) -> int:
    """Return the most queries of one class that one merchant contributes; 0 where the noise leaves the sum no room.

    Raises `ValueError` for a plan of another mode.
    """
    if not isinstance(plan.training, TrendsTraining):
        raise ValueError(f"Expected a plan of mode trends, found {plan.training.mode}.")
    mechanism = plan.mechanism(1)
    grid = mechanism.grid
    # A query is a power of two of grid steps and of fine units, since clipping_norm is 1.
    in_sum = mechanism.room(plan.limit) // round(grid.clipping_norm / grid.step)
    in_log = FineSum.LARGEST // round(grid.clipping_norm / grid.fine_unit)
    return max(0, min(math.ceil(ABUNDANCE * plan.training.expected_batch), in_sum, in_log))
