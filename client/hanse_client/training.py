"""Local training in mode `local`: a few steps of DP-SGD on the merchant's own photos, each with the full noise.

    trainer = LocalTrainer(recipe, taxonomy, examples, randomness)
    update = trainer.update(plan, round_=0, model=model)

One step: Poisson-sample the photos at the plan's rate, clip each photo's gradient, sum exactly, round to the
grid once, add discrete Gaussian noise, divide by the plan's number, step. What leaves is the difference of the
weights, a function of the noisy sums alone.

Nothing observable depends on photos. After the charge nothing here raises: a photo whose gradient is not finite
counts as zero, an empty sample is noise alone, and a step whose gradients cannot be computed at all uploads
noise alone too. The owner finds the reason in the local log. (Leaving out a whole step keeps ε only if no photo
is the cause. So memory does not grow with the sample, and no sum of photos is too large for its integers.) How
long a training takes does depend on the number of photos sampled, and is not covered by ε.

References: Abadi et al. 2016, "Deep Learning with Differential Privacy", algorithm 1; McMahan et al. 2018,
"Learning Differentially Private Recurrent Language Models" (the plan's denominator).
"""

import logging
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray

from hanse_client.gradients import ClippedSum
from hanse_common.errors import ConfigError
from hanse_common.plan import Plan
from hanse_common.privacy.mechanism import Mechanism
from hanse_common.privacy.sampling import poisson_sample
from hanse_common.randomness import Randomness
from hanse_common.vision import model as models
from hanse_common.vision.preprocessing import augment
from hanse_common.vision.recipe import Recipe
from hanse_common.vision.taxonomy import Taxonomy

log = logging.getLogger(__name__)

CHUNK = 512
"""Photos of a sample that are gathered, and augmented, at once."""


@dataclass(frozen=True)
class Examples:
    """What a model trains on: `inputs`, shape (n, …), float32 (embeddings, or images for a net trained whole),
    and `labels`, shape (n,), int64, the league's class of each. Both on the device that trains."""

    inputs: torch.Tensor
    labels: torch.Tensor

    @classmethod
    def of(cls, inputs: NDArray[np.float32], labels: NDArray[np.integer[Any]], device: str) -> Self:
        """Return arrays as examples on `device`, see `resolve_device`."""
        chosen = resolve_device(device)
        wide = labels.astype(np.int64)
        return cls(torch.from_numpy(inputs).to(chosen), torch.from_numpy(wide).to(chosen))

    def __len__(self) -> int:
        return len(self.labels)


def resolve_device(name: str) -> str:
    """Return the device that `name` means: "auto" is CUDA when it is there, else the CPU.

    Raises `ConfigError` for CUDA where there is none.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: found cuda, but torch sees no CUDA device here; choose auto or cpu.")
    return name


class Trainer(Protocol):
    """What a participant needs of training."""

    def accepts(self, plan: Plan) -> bool:
        """Return whether this trainer holds examples made by the plan's recipe, for the plan's classes."""
        ...

    def update(self, plan: Plan, round_: int, model: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return the client update from `model`, both of shape (d,). Touches photos; never raises after that."""
        ...


class LocalTrainer:
    """Trains one recipe's model on one merchant's examples."""

    def __init__(
        self, recipe: Recipe, taxonomy: Taxonomy, examples: Examples, randomness: Randomness
    ) -> None:
        self._recipe = recipe
        self._taxonomy = taxonomy
        self._examples = examples
        self._randomness = randomness
        self._model = models.build(recipe, len(taxonomy.classes)).to(examples.inputs.device)

    def accepts(self, plan: Plan) -> bool:
        """Return whether the plan's recipe, classes and dimension are the ones prepared for."""
        return (
            plan.recipe == self._recipe
            and plan.taxonomy == self._taxonomy
            and plan.dimension == sum(p.numel() for p in self._model.parameters())
        )

    def update(self, plan: Plan, round_: int, model: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return the weights' difference after the plan's local steps, shape (d,), float64."""
        training = plan.training
        mechanism = plan.mechanism(training.local_steps)
        learning_rate = training.learning_rate_of(round_)
        start = model.astype(np.float64)
        weights = start.copy()
        velocity = np.zeros_like(weights)
        with ClippedSum(self._model, mechanism.grid.clipping_norm, mechanism.grid.fine_exponent) as clipped:
            for _ in range(training.local_steps):
                exact = self._exact_sum(clipped, weights, mechanism)
                gradient = mechanism.release(exact, self._randomness) / training.expected_batch
                gradient += self._penalty_gradient(weights)
                velocity = training.momentum * velocity + gradient
                weights = weights - learning_rate * velocity
        return weights - start

    def _exact_sum(
        self, clipped: ClippedSum, weights: NDArray[np.float64], mechanism: Mechanism
    ) -> NDArray[np.int64]:
        """Return the sum over a Poisson sample in fine units, shape (d,), or zeros if it can't be had."""
        try:
            models.load_vector(self._model, weights.astype(np.float32))
            sample = poisson_sample(len(self._examples), mechanism.sampling_rate, self._randomness)
            if len(sample) > mechanism.grid.max_examples:
                raise ValueError(
                    f"{len(sample)} photos in one sample, expected {mechanism.grid.max_examples}."
                )
            chosen = torch.from_numpy(sample).to(self._examples.labels.device)
            seed = int(self._randomness.words(1)[0] >> np.uint64(1))
            generator = torch.Generator().manual_seed(seed)
            total = np.zeros(mechanism.dimension, dtype=np.int64)
            with torch.random.fork_rng():
                torch.manual_seed(seed)  # dropout and augmentation: they protect nobody, but must repeat
                # Memory must not grow with the sample: running out of it would depend on the photos' number.
                for part in torch.split(chosen, CHUNK):
                    inputs = augment(self._examples.inputs[part], self._recipe, generator)
                    total += clipped.sum(inputs, self._examples.labels[part])
            return total
        except Exception:  # whatever went wrong may depend on a photo, so it must not show: noise alone
            log.exception("A training step failed and contributes noise alone.")
            return np.zeros(mechanism.dimension, dtype=np.int64)

    def _penalty_gradient(self, weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the gradient of the recipe's L1 and L2 penalties: of the weights alone, so free of charge."""
        model = self._recipe.model
        return model.l2 * weights + model.l1 * np.sign(weights)
