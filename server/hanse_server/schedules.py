"""Schedules: how much of the server optimizer's move is made in a round.

    schedule = Cosine(warmup=10)
    model = model + schedule.factor(round_, rounds) * (optimizer.step(model, update) - model)

A factor is between 0 and 1. Each schedule may begin with `warmup` rounds in which the factor rises linearly, by
1/(warmup + 1) a round; the first round after them has the schedule's own beginning, and what is left of the rounds its
whole course. So they are torch's `LinearLR`, `CosineAnnealingLR` and `StepLR`, after a `LinearLR` for the warmup.

Reference: Loshchilov, Hutter 2017, "SGDR: Stochastic Gradient Descent with Warm Restarts", equation 5 (cosine).
"""

import math
from abc import abstractmethod
from typing import Annotated, Literal

from pydantic import Field

from hanse_common.config import Section


class _Schedule(Section):
    """What all schedules share. `warmup` is in rounds; longer than the training, it is a rise all along."""

    warmup: Annotated[int, Field(ge=0, le=100_000)] = 0

    def factor(self, round_: int, rounds: int) -> float:
        """Return the factor of the round `round_`, counted from 0, of `rounds`.

        Raises `ValueError` for a round that is none of them.
        """
        if not 0 <= round_ < rounds:
            raise ValueError(f"Expected a round from 0 to {rounds - 1}, found {round_}.")
        if round_ < self.warmup:
            return (round_ + 1) / (self.warmup + 1)
        return self._after_warmup(round_ - self.warmup, rounds - self.warmup)

    @abstractmethod
    def _after_warmup(self, round_: int, rounds: int) -> float:
        """Return the factor of the round `round_` of the `rounds` after the warmup."""


class Constant(_Schedule):
    """Each move is made whole."""

    name: Literal["constant"] = "constant"

    def _after_warmup(self, round_: int, rounds: int) -> float:
        return 1.0


class Linear(_Schedule):
    """The moves shrink linearly: 1 − r/R."""

    name: Literal["linear"] = "linear"

    def _after_warmup(self, round_: int, rounds: int) -> float:
        return 1 - round_ / rounds


class Cosine(_Schedule):
    """The moves shrink slowly, then fast, then slowly: (1 + cos(πr/R))/2."""

    name: Literal["cosine"] = "cosine"

    def _after_warmup(self, round_: int, rounds: int) -> float:
        return (1 + math.cos(math.pi * round_ / rounds)) / 2


class Step(_Schedule):
    """The moves shrink to `gamma` of what they were, every `every` rounds: gamma^⌊r/every⌋."""

    name: Literal["step"] = "step"
    every: Annotated[int, Field(ge=1, le=100_000)]
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.5

    def _after_warmup(self, round_: int, rounds: int) -> float:
        return float(self.gamma ** (round_ // self.every))


MoveSchedule = Annotated[Constant | Linear | Cosine | Step, Field(discriminator="name")]
"""Any of them, as a configuration names it."""
