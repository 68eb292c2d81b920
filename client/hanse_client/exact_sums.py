"""The sum of clipped gradients over a sample of a merchant's photos, whatever the model.

    sums = ExactSums(recipe, taxonomy, examples)
    sums.prepare(grid)                       # before any charge
    fine_sum = sums.sum(weights, sample, grid, seed)

A linear head without dropout has a closed form (`head_gradients`); everything else goes through Opacus
(`gradients`). Either way the sum is exact and each photo's part of it is at most C long.
"""

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from hanse_client.examples import Examples
from hanse_client.gradients import ClippedSum, cuda_devices
from hanse_client.head_gradients import MAX_SAMPLE, HeadSum
from hanse_common.modes import MerchantLevelTraining
from hanse_common.privacy.encoding import FineSum, Grid
from hanse_common.vision import model as models
from hanse_common.vision.extraction import fitting_rows, full_precision
from hanse_common.vision.loss import Objective
from hanse_common.vision.preprocessing import augment
from hanse_common.vision.recipe import Recipe
from hanse_common.vision.recipe_model import Linear, Loss
from hanse_common.vision.taxonomy import Taxonomy

_SLACK = 1 - 2.0**-30
"""Room for float64's error in a norm."""

CHUNK = 512
"""Photos of a sample that are gathered, and augmented, at once; fewer where memory is bounded."""


class ExactSums:
    """One model over one merchant's examples. What is prepared for a grid is kept for the next step on it.

    `memory` bounds what a microbatch may take, in bytes; for the default see `extraction.fitting_rows`. How many
    photos that are is found out on synthetic ones, and depends on no photo.
    """

    def __init__(
        self, recipe: Recipe, taxonomy: Taxonomy, examples: Examples, memory: int | None = None
    ) -> None:
        self._recipe = recipe
        self._classes = len(taxonomy.classes)
        # A photo of no class counts as zero. Left to the models, it would break a whole sum.
        labels = examples.labels
        usable = (labels >= 0) & (labels < self._classes)
        self._usable: NDArray[np.bool_] = usable.cpu().numpy()
        self._examples = replace(examples, labels=torch.where(usable, labels, 0))
        self._model = models.build(recipe, self._classes).to(examples.inputs.device)
        self._objective = Objective(recipe.loss, self._classes, examples.inputs.device)
        self._closed_form = isinstance(recipe.model, Linear) and recipe.model.dropout == 0
        self._memory = memory
        self._prepared: tuple[Grid, HeadSum | ClippedSum] | None = None
        self._plain_rows = 0

    def prepare(self, grid: Grid) -> None:
        """Make what sums on `grid` need, which may be as large as the examples, and find the microbatch.

        Raises what a model may, and `RecognizerError` when one photo's gradient does not fit in `memory`.
        """
        self._summed(grid)

    def prepare_plain(self) -> None:
        """Find how many photos `plain_update` computes at once. Raises as `prepare` does."""
        if self._plain_rows:
            return
        self._close()
        inputs = self._examples.inputs

        def trial(count: int) -> None:
            rows = torch.zeros((count, *inputs.shape[1:]), device=inputs.device)
            loss = self._plain_loss(rows, torch.zeros(count, dtype=torch.int64, device=inputs.device))
            torch.autograd.grad(loss, list(self._model.parameters()))

        full_precision()
        if self._memory is None and inputs.device.type == "cpu":
            self._plain_rows = CHUNK
        else:
            with torch.random.fork_rng(devices=cuda_devices(inputs.device)):
                self._plain_rows = fitting_rows(trial, CHUNK, inputs.device, self._memory)

    def sum(
        self, weights: NDArray[np.float64], sample: NDArray[np.intp], grid: Grid, seed: int
    ) -> NDArray[np.int64]:
        """Return the sum of the clipped gradients at `weights` of the photos `sample`.

        Args:
            weights: shape (d,), float64.
            sample: indices of examples.
            grid: gives clipping norm and unit.
            seed: of dropout and augmentation, which protect nobody.

        Returns:
            Shape (d,), int64, in the grid's fine units.

        Raises whatever a model, or its kernels, may.
        """
        summed = self._summed(grid)
        sample = sample[self._usable[sample]]
        total = FineSum(grid.dimension)
        if isinstance(summed, HeadSum):
            for start in range(0, len(sample), MAX_SAMPLE):
                total.add(summed.sum(weights, sample[start : start + MAX_SAMPLE]))
            return total.value()
        models.load_vector(self._model, weights.astype(np.float32))
        chosen = torch.from_numpy(sample).to(self._examples.labels.device)
        generator = torch.Generator().manual_seed(seed)
        chunk = CHUNK if self._memory is None else min(CHUNK, summed.microbatch)
        with torch.random.fork_rng(devices=cuda_devices(chosen.device)):
            torch.manual_seed(seed)
            # Memory must not grow with the sample: running out of it would depend on the photos' number.
            for part in torch.split(chosen, chunk):
                inputs = augment(self._examples.inputs[part], self._recipe, generator)
                total.add(summed.sum(inputs, self._examples.labels[part]))
        return total.value()

    def feature_sum(self, sample: NDArray[np.intp], grid: Grid) -> NDArray[np.int64]:
        """Return the sum of the features of the photos `sample`, each scaled to norm C, in fine units, (F,) int64.

        A photo whose features are zero or not finite counts as zero.
        """
        total = FineSum(grid.dimension)
        for start in range(0, len(sample), CHUNK):
            chosen = torch.from_numpy(sample[start : start + CHUNK]).to(self._examples.inputs.device)
            rows = self._examples.inputs[chosen].double().cpu().numpy()
            norms = np.linalg.norm(rows, axis=1, keepdims=True)
            usable = np.isfinite(norms[:, 0]) & (norms[:, 0] > 0)
            scaled = rows[usable] / norms[usable] * (grid.clipping_norm * _SLACK)
            total.add(np.trunc(np.ldexp(scaled, -grid.fine_exponent)).astype(np.int64).sum(axis=0))
        return total.value()

    def plain_update(
        self, start: NDArray[np.float64], training: MerchantLevelTraining, seed: int
    ) -> NDArray[np.float64]:
        """Return the weights' difference, shape (d,), after plain steps of SGD on a random `local_rate` of the photos.

        Nothing in it is private: the whole is clipped and hidden later. Arguments are as in `sum`.
        """
        self._close()
        self.prepare_plain()
        models.load_vector(self._model, start.astype(np.float32))
        generator = torch.Generator().manual_seed(seed)
        l1 = self._recipe.model.l1
        optimizer = torch.optim.SGD(
            self._model.parameters(), lr=training.learning_rate, weight_decay=self._recipe.model.l2
        )
        with torch.random.fork_rng(devices=cuda_devices(self._examples.inputs.device)):
            torch.manual_seed(seed)
            for _ in range(training.local_steps):
                coins = torch.rand(len(self._examples), generator=generator) < training.local_rate
                batch = torch.nonzero(coins & torch.from_numpy(self._usable)).flatten()
                optimizer.zero_grad()
                for part in torch.split(batch, self._plain_rows):
                    chosen = part.to(self._examples.labels.device)
                    inputs = augment(self._examples.inputs[chosen], self._recipe, generator)
                    loss = self._plain_loss(inputs, self._examples.labels[chosen]) / len(batch)
                    loss.backward()  # type: ignore[no-untyped-call]
                penalty = l1 * torch.stack([p.abs().sum() for p in self._model.parameters()]).sum()
                penalty.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        return models.to_vector(self._model).astype(np.float64) - start

    def _plain_loss(self, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self._objective.of(self._model(inputs), labels).sum()

    def _summed(self, grid: Grid) -> HeadSum | ClippedSum:
        if self._prepared is None or self._prepared[0] != grid:
            self._close()
            norm, unit = grid.clipping_norm, grid.fine_exponent
            summed: HeadSum | ClippedSum
            if self._closed_form:
                inputs, labels = self._examples.inputs, self._examples.labels
                summed = HeadSum(inputs, labels, self._classes, norm, unit, self._recipe.loss)
            else:
                loss = None if self._recipe.loss == Loss() else self._objective
                summed = ClippedSum(self._model, norm, unit, loss=loss, memory=self._memory)
                summed.prepare(self._examples.inputs)
            self._prepared = (grid, summed)
        return self._prepared[1]

    def _close(self) -> None:
        """Let go of the model."""
        if self._prepared is not None and isinstance(self._prepared[1], ClippedSum):
            self._prepared[1].close()
        self._prepared = None
