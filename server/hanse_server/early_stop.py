"""Early stop: when more rounds no longer make the model better.

    state = EarlyStopState()
    state = settings.advance(state, done, accuracy)
    if settings.stops(state):
        ...                                      # no more rounds

It is told a score after some rounds, the higher the better, and stops once `patience` scores in a row were no
gain. A gain is `minimum` or more over the score of the last gain, so that many small steps upwards count, too, once
they add up. A score is from the sum of a federated evaluation, which is private already: what is made of it costs no
privacy. Noise in it makes `minimum` worth setting to a few of its standard deviations.

Reference: Prechelt 1998, "Early Stopping - But When?".
"""

import math
from typing import Annotated

from pydantic import Field

from hanse_common.config import Section
from hanse_common.wire import Value


class EarlyStopState(Value):
    """All that it remembers; it follows from the scores on record.

    `gain_score` is the score of the last gain, `misses` how many scores there were since, `last_round` the latest that
    it was told of. Rounds are how many are done; None stands for none yet.
    """

    gain_score: float | None = None
    misses: Annotated[int, Field(ge=0)] = 0
    last_round: Annotated[int, Field(ge=0)] | None = None


class EarlyStop(Section):
    """Stop after `patience` scores without a gain of `minimum`."""

    patience: Annotated[int, Field(ge=1, le=10_000)] = 5
    minimum: Annotated[float, Field(ge=0, le=1e9)] = 0.002

    def advance(self, state: EarlyStopState, round_: int, score: float) -> EarlyStopState:
        """Return the state after `score` of the model that there is after `round_` rounds.

        A score that is no finite number is no gain. A round that is not later than the last changes nothing, so that
        the same may be said again.
        """
        if state.last_round is not None and round_ <= state.last_round:
            return state
        gain = state.gain_score
        if not math.isfinite(score):
            return state.model_copy(update={"misses": state.misses + 1, "last_round": round_})
        gained = gain is None or (score > gain and score - gain >= self.minimum)
        return EarlyStopState(
            gain_score=score if gained else gain,
            misses=0 if gained else state.misses + 1,
            last_round=round_,
        )

    def stops(self, state: EarlyStopState) -> bool:
        """Return whether the training is to end in `state`."""
        return state.misses >= self.patience
