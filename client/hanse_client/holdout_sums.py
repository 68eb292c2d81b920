"""A model is tried on the photos that a merchant holds out; what a federated evaluation adds up is their exact sum.

    sums = HoldoutSums(recipe, taxonomy, examples.holdout)
    sums.prepare()
    total = sums.sum(model, sample)          # (Layout(K).dimension,) int64, for a sample of indices

What one photo contributes is in `hanse_common.evaluation`; its exact norm is at most 1 by construction. A photo added
must not change another's bins, not even where a score lies on an edge: the model runs on the same number of rows each
time, the last ones padded with zeros, and whether a row's scores depend on its place is tried out first (see
`gradients`, where the property is explained). Where they do, photos are computed one at a time.
"""

import logging
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from hanse_client.examples import Examples
from hanse_common.evaluation import Layout
from hanse_common.privacy.encoding import FineSum
from hanse_common.vision import model as models
from hanse_common.vision.extraction import fitting_rows, full_precision
from hanse_common.vision.recipe import Recipe
from hanse_common.vision.taxonomy import Taxonomy

log = logging.getLogger(__name__)

CHUNK = 256
"""Photos that are computed at once; fewer where memory is bounded."""

_TRIALS = 2


class HoldoutSums:
    """One recipe's model over one merchant's holdout photos; None are no photos.

    `memory` bounds what a chunk may take, in bytes; for the default see `extraction.fitting_rows`.
    """

    def __init__(
        self, recipe: Recipe, taxonomy: Taxonomy, holdout: Examples | None, memory: int | None = None
    ) -> None:
        self._recipe = recipe
        self._classes = len(taxonomy.classes)
        self._holdout = holdout
        self._memory = memory
        self._rows = 0

    def prepare(self) -> None:
        """Make the model and find, on random numbers, how many photos it computes at once.

        Raises what a model may, and `RecognizerError` when one photo does not fit in `memory`.
        """
        if self._holdout is None or self._rows:
            return
        full_precision()
        inputs = self._holdout.inputs
        generator = torch.Generator().manual_seed(0)

        def trial(count: int) -> torch.Tensor:
            row = torch.rand((1, *inputs.shape[1:]), generator=generator) - 0.5
            return self._scores(row.expand(count, *inputs.shape[1:]).to(inputs.device))

        with torch.no_grad():
            for parameter in self._model.parameters():
                parameter.copy_(torch.rand(parameter.shape, generator=generator) - 0.5)
        rows = CHUNK
        if self._memory is not None or inputs.device.type == "cuda":
            rows = fitting_rows(trial, CHUNK, inputs.device, self._memory)
        found = [trial(rows) for _ in range(_TRIALS)]
        if any(not torch.equal(x, x[:1].expand_as(x)) for x in found):
            log.warning(
                "Here a photo's scores depend on its place; holdout photos are computed one at a time."
            )
            rows = 1
        self._rows = rows

    def sum(self, weights: NDArray[np.float32], sample: NDArray[np.intp]) -> NDArray[np.int64]:
        """Return the sum of what the holdout photos `sample`, indices, contribute under the model `weights`, (d,).

        A photo whose scores are not finite, or whose label is no class, counts as zero. Shape (dimension of the
        layout,), int64, in fine units. Raises whatever a model, or its kernels, may.
        """
        layout = Layout(self._classes)
        total = FineSum(layout.dimension)
        if self._holdout is None:
            return total.value()
        self.prepare()
        models.load_vector(self._model, weights)
        inputs, labels = self._holdout.inputs, self._holdout.labels
        chunk = torch.zeros((self._rows, *inputs.shape[1:]), device=inputs.device)
        for start in range(0, len(sample), self._rows):
            chosen = torch.from_numpy(sample[start : start + self._rows]).to(inputs.device)
            count = len(chosen)
            chunk[:count] = inputs[chosen]
            chunk[count:] = 0
            scores = self._scores(chunk)[:count].cpu().numpy()
            total.add(layout.sum(labels[chosen].cpu().numpy(), scores))
        return total.value()

    @cached_property
    def _model(self) -> nn.Module:
        device = None if self._holdout is None else self._holdout.inputs.device
        return models.build(self._recipe, self._classes).to(device).eval()

    def _scores(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the class probabilities of `rows`, (n, …), as (n, K), float64."""
        with torch.inference_mode():
            scores: torch.Tensor = self._model(rows).double().softmax(1)
            return scores
