"""What a merchant contributes to a round, in each training mode. Read `contribution`, then what it calls.

    trainer = ShopTrainer(recipe, taxonomy, examples, randomness)
    residues = trainer.contribution(plan, round_=0, model=model)      # to be masked

- Mode `distributed`: one step of DP-SGD of the whole league. Poisson-sample at the league's rate, clip each photo's
  gradient, sum exactly, round to the grid once, add this merchant's share of the noise.
- Mode `local`: the same with all of the noise, some steps in a row; what leaves is the difference of the weights, a
  function of the noisy sums alone.
- Mode `mean`: no training, but the sum of the features themselves, once, with a share of the noise.
- Mode `evaluation`: no training, but counts of how the model does on the holdout photos, with a share of the noise.
- Mode `trends`: no training, but counts of what shoppers asked for, with a share of the noise.
- Mode `merchant-level`: by a secret coin, some plain steps; their whole difference is clipped and rounded as if it were
  one photo's gradient, and gets a share of the noise.

Nothing observable depends on photos. After the charge nothing here raises: a photo whose gradient is not finite
counts as zero, an empty sample is noise alone, and a step whose gradients cannot be computed at all uploads
noise alone too. The owner finds the reason in the local log. (Leaving out a whole step keeps ε only if no photo
is the cause. So memory does not grow with the sample, what grows with the catalog is made before the charge, and no
sum of photos is too large for its integers.) How long a training takes does depend on the number of photos sampled;
uploads wait for the plan's slot.

References: Abadi et al. 2016, "Deep Learning with Differential Privacy", algorithm 1; McMahan et al. 2018,
"Learning Differentially Private Recurrent Language Models" (the plan's denominator; merchant-level DP).
"""

import logging
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from hanse_client.exact_sums import ExactSums
from hanse_client.examples import Examples
from hanse_client.holdout_sums import HoldoutSums
from hanse_client.queries import QueryLog
from hanse_common.counting import most_of_a_class
from hanse_common.modes import (
    DistributedTraining,
    EvaluationTraining,
    LocalTraining,
    MeanTraining,
    MerchantLevelTraining,
    TrendsTraining,
)
from hanse_common.plan import Plan
from hanse_common.privacy.mechanism import Mechanism
from hanse_common.privacy.sampling import poisson_sample
from hanse_common.randomness import Randomness
from hanse_common.secagg import ring
from hanse_common.vision.recipe import Recipe
from hanse_common.vision.taxonomy import Taxonomy

log = logging.getLogger(__name__)

_SLACK = 1 - 2.0**-20
"""Room for float64's error in the norm of an update of up to 2²⁶ numbers, which is below d·2⁻⁵³."""


class Trainer(Protocol):
    """What a participant needs of training."""

    def accepts(self, plan: Plan) -> bool:
        """Return whether this trainer holds examples made by the plan's recipe, for the plan's classes."""
        ...

    def contribution(self, plan: Plan, round_: int, model: NDArray[np.float32]) -> NDArray[np.uint32]:
        """Return the residues that are masked, shape (d,), from `model`, shape (plan.model_dimension,).

        Touches photos; never raises after that.
        """
        ...


class ShopTrainer:
    """Trains one recipe's model on one merchant's examples. `memory` bounds a microbatch; see `ExactSums`.

    `queries` is what shoppers asked for; without it plans of mode `trends` are not accepted.
    """

    def __init__(
        self,
        recipe: Recipe,
        taxonomy: Taxonomy,
        examples: Examples,
        randomness: Randomness,
        memory: int | None = None,
        queries: QueryLog | None = None,
    ) -> None:
        self._queries = queries
        self._recipe = recipe
        self._taxonomy = taxonomy
        self._examples = examples
        self._randomness = randomness
        self._sums = ExactSums(recipe, taxonomy, examples, memory)
        self._holdout_sums = HoldoutSums(recipe, taxonomy, examples.holdout, memory)

    def accepts(self, plan: Plan) -> bool:
        """Return whether the plan's recipe, classes and dimension are the ones prepared for.

        Before any charge it prepares what the plan's steps need, as large as the catalog; the owner's log says why
        where that fails.
        """
        if (plan.recipe, plan.taxonomy) != (self._recipe, self._taxonomy):
            return False
        if plan.dimension != plan.expected_dimension:
            return False
        try:
            if isinstance(plan.training, TrendsTraining):
                return self._queries is not None and self._queries.open_to(plan)
            if plan.training.unit != "merchant":
                evaluates = isinstance(plan.training, EvaluationTraining)
                side = self._examples.holdout if evaluates else self._examples
                if side is not None:
                    side.units(plan.training.unit)  # which orders the photos by product
            if isinstance(plan.training, LocalTraining | DistributedTraining):
                self._sums.prepare(plan.mechanism(1).grid)
            elif isinstance(plan.training, MerchantLevelTraining):
                self._sums.prepare_plain()
            elif isinstance(plan.training, EvaluationTraining):
                self._holdout_sums.prepare()
        except Exception:
            log.exception("This plan's training cannot be prepared here.")
            return False
        return True

    def contribution(self, plan: Plan, round_: int, model: NDArray[np.float32]) -> NDArray[np.uint32]:
        """Return the residues that are masked, shape (d,): those of a client update or of a noisy sum."""
        if isinstance(plan.training, LocalTraining):
            return plan.encode(self.local_update(plan, round_, model))
        mechanism = plan.mechanism(1)
        if isinstance(plan.training, MerchantLevelTraining):
            fine = self._clipped_update(plan.training, mechanism, model.astype(np.float64))
        elif isinstance(plan.training, MeanTraining):
            fine = self._exact_sum(None, plan.training.unit, mechanism)
        elif isinstance(plan.training, EvaluationTraining):
            fine = self._holdout_sum(model, plan.training.unit, mechanism)
        elif isinstance(plan.training, TrendsTraining):
            fine = self._query_counts(plan, mechanism)
        else:
            # An update points downhill.
            weights, rates = model.astype(np.float64), plan.training.class_rates
            fine = -self._exact_sum(weights, plan.training.unit, mechanism, rates)
        return ring.residues(mechanism.contribute(fine, plan.limit, self._randomness))

    def local_update(self, plan: Plan, round_: int, model: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return the weights' difference after the local steps of a plan of mode `local`, shape (d,), float64.

        What is added to a noisy gradient, penalties and the proximal term, knows no photo: it is post-processing.
        """
        training = plan.training
        if not isinstance(training, LocalTraining):
            raise ValueError(f"Expected a plan of mode local, found {training.mode}.")
        mechanism = plan.mechanism(training.local_steps)
        learning_rate = training.learning_rate_of(round_)
        start = model.astype(np.float64)
        weights = start.copy()
        velocity = np.zeros_like(weights)
        for _ in range(training.local_steps):
            exact = self._exact_sum(weights, training.unit, mechanism, training.class_rates)
            gradient = mechanism.release(exact, self._randomness) / training.expected_batch
            gradient += self._recipe.model.penalty_gradient(weights)
            if training.proximal:
                gradient += training.proximal * (weights - start)
            velocity = training.momentum * velocity + gradient
            weights = weights - learning_rate * velocity
        return weights - start

    def _exact_sum(
        self,
        weights: NDArray[np.float64] | None,
        unit: Literal["photo", "product"],
        mechanism: Mechanism,
        class_rates: tuple[float, ...] = (),
    ) -> NDArray[np.int64]:
        """Return the sum over a Poisson sample in fine units, shape (d,), or zeros if it can't be had.

        Of clipped gradients at `weights`; without weights, of the features themselves.
        """
        try:
            sample = self._examples.sample(unit, mechanism.sampling_rate, self._randomness, class_rates)
            if weights is None:
                return self._sums.feature_sum(sample, mechanism.grid)
            seed = int(self._randomness.words(1)[0] >> np.uint64(1))
            return self._sums.sum(weights, sample, mechanism.grid, seed)
        except Exception:  # whatever went wrong may depend on a photo, so it must not show: noise alone
            log.exception("A training step failed and contributes noise alone.")
            return np.zeros(mechanism.dimension, dtype=np.int64)

    def _holdout_sum(
        self, model: NDArray[np.float32], unit: Literal["photo", "product"], mechanism: Mechanism
    ) -> NDArray[np.int64]:
        """Return what a Poisson sample of the holdout contributes, in fine units, shape (d,), or zeros, as above."""
        try:
            holdout = self._examples.holdout
            if holdout is not None:
                sample = holdout.sample(unit, mechanism.sampling_rate, self._randomness)
                return self._holdout_sums.sum(model, sample)
        except Exception:  # as in `_exact_sum`
            log.exception("An evaluation failed and contributes noise alone.")
        return np.zeros(mechanism.dimension, dtype=np.int64)

    def _query_counts(self, plan: Plan, mechanism: Mechanism) -> NDArray[np.int64]:
        """Return how many queries of each class there were, in fine units, shape (d,), or zeros, as above."""
        try:
            if self._queries is not None:
                one = round(mechanism.grid.clipping_norm / mechanism.grid.fine_unit)
                # Cut coordinate by coordinate, which moves neighbours no further apart.
                return np.minimum(self._queries.take(plan), most_of_a_class(plan)) * one
        except Exception:  # as in `_exact_sum`
            log.exception("The queries can't be counted, and noise alone is contributed.")
        return np.zeros(mechanism.dimension, dtype=np.int64)

    def _clipped_update(
        self, training: MerchantLevelTraining, mechanism: Mechanism, start: NDArray[np.float64]
    ) -> NDArray[np.int64]:
        """Return this merchant's whole update, clipped, in fine units, shape (d,), or zeros: by the coin, or failed."""
        fine = np.zeros(mechanism.dimension, dtype=np.int64)
        try:
            took_part = bool(len(poisson_sample(1, mechanism.sampling_rate, self._randomness)))
            seed = int(self._randomness.words(1)[0] >> np.uint64(1))
            # Trained whatever the coin says: the time that it takes must not tell.
            update = self._sums.plain_update(start, training, seed)
            norm = float(np.linalg.norm(update))
            if took_part and np.isfinite(norm):
                grid = mechanism.grid
                factor = min(1.0, grid.clipping_norm / max(norm, 1e-300)) * _SLACK
                fine = np.trunc(np.ldexp(update * factor, -grid.fine_exponent)).astype(np.int64)
        except Exception:  # as in `_exact_sum`
            log.exception("A training failed and contributes noise alone.")
            fine = np.zeros(mechanism.dimension, dtype=np.int64)
        return fine
