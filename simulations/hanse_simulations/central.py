"""The yardstick: one trusted curator holds all photos and trains on them by DP-SGD, at the plan's own ε.

    league = CentralLeague.assemble(experiment, shops.merchants, folder)
    model = league.train(on_round=print)

The same sums, rounding and noise multiplier as in mode `distributed`, without merchants: no masks, no shares of noise,
no dropouts, no ledgers. What a league reaches is measured against it.

With `uploads` the noise is what a league's sum has that so many merchants are in, each with its share: then this is how
accurate that league would be, and much faster than to rehearse its masks.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hanse_client.exact_sums import ExactSums
from hanse_client.examples import Examples
from hanse_client.ledger import Ledger
from hanse_common.errors import ConfigError
from hanse_common.modes import DistributedTraining, MeanTraining
from hanse_common.plan import Plan, SignedPlan
from hanse_server.coordinator import RoundOutcome
from hanse_server.league import RoundReport
from hanse_server.storage import Progress, State
from hanse_simulations.experiment import Experiment
from hanse_simulations.seeded import RoundRandomness
from hanse_simulations.simulation import make_signed_plan, stream_name, train_with


class CentralRounds:
    """Rounds of a trusted curator; implements `hanse_server.league.Rounds`. Each is one step with the full noise.

    With `uploads`, that is the noise of so many merchants' shares together.
    """

    def __init__(
        self, plan: Plan, examples: Examples, randomness: RoundRandomness, uploads: int | None = None
    ) -> None:
        self._plan = plan
        self._examples = examples
        self._sums = ExactSums(plan.recipe, plan.taxonomy, examples)
        self._randomness = randomness
        whole = plan.mechanism(1)
        # A share's variance is a part of the whole; so many of them have a whole one that is larger.
        more = 1.0 if uploads is None else math.sqrt(uploads / whole.shares)
        self._mechanism = replace(whole, shares=1, noise_multiplier=whole.noise_multiplier * more)

    def run(self, round_: int, model: NDArray[np.float32]) -> RoundOutcome:
        """Return the outcome of one step from `model`, shape (d,)."""
        self._randomness.begin(round_)
        training, mechanism = self._plan.training, self._mechanism
        unit: Literal["photo", "product"] = "product" if training.unit == "product" else "photo"
        rates = training.class_rates if isinstance(training, DistributedTraining) else ()
        sample = self._examples.sample(unit, training.sampling_rate, self._randomness, rates)
        if isinstance(training, MeanTraining):
            total = mechanism.release(self._sums.feature_sum(sample, mechanism.grid), self._randomness)
            return RoundOutcome(total / training.expected_batch, (), (), {}, {})
        seed = int(self._randomness.words(1)[0] >> np.uint64(1))
        exact = self._sums.sum(model.astype(np.float64), sample, mechanism.grid, seed)
        noisy = mechanism.release(exact, self._randomness)
        return RoundOutcome(-noisy / training.expected_batch, (), (), {}, {})


@dataclass(frozen=True)
class CentralLeague:
    """All merchants' photos in one place."""

    experiment: Experiment
    plan: Plan
    signed_plan: SignedPlan
    examples: Examples
    progress: Progress
    uploads: int | None = None

    @property
    def ledgers(self) -> dict[str, Ledger]:
        """None: nobody keeps accounts but the curator, who is trusted."""
        return {}

    @classmethod
    def assemble(
        cls,
        experiment: Experiment,
        shops: Mapping[str, Examples],
        folder: Path,
        uploads: int | None = None,
    ) -> "CentralLeague":
        """Return the pool of `shops`. Raises `ConfigError` unless the experiment's mode is `distributed`."""
        plan, signed_plan = make_signed_plan(experiment)
        if not isinstance(plan.training, DistributedTraining | MeanTraining):
            raise ConfigError(
                f"plan.training.mode: found {plan.training.mode}; the central yardstick is that of mode distributed."
            )
        progress = State.open(folder / "server").progress(signed_plan, plan)
        return cls(experiment, plan, signed_plan, Examples.pooled(tuple(shops.values())), progress, uploads)

    def train(self, on_round: Callable[[RoundReport], None] = lambda report: None) -> NDArray[np.float32]:
        """Run the rounds that are left and return the published model, shape (d,)."""
        randomness = RoundRandomness(self.experiment.seed, stream_name(self.experiment, "curator"))
        rounds = CentralRounds(self.plan, self.examples, randomness, self.uploads)
        return train_with(rounds, self.experiment, self.progress, on_round)
