"""How good a model is on the operator's own public test photos. No merchant's photo is ever here."""

import numpy as np
import torch
from numpy.typing import NDArray

from hanse_common.vision import model as models
from hanse_common.vision.metrics import ClassificationReport
from hanse_common.vision.recipe import Recipe
from hanse_common.vision.taxonomy import Taxonomy

BATCH = 4096


class Evaluator:
    """Tries models of one recipe on `inputs`, shape (n, …), float32, with `labels`, shape (n,), int64."""

    def __init__(
        self, recipe: Recipe, taxonomy: Taxonomy, inputs: torch.Tensor, labels: torch.Tensor
    ) -> None:
        self._model = models.build(recipe, len(taxonomy.classes)).to(inputs.device)
        self._inputs = inputs
        self._labels = labels.cpu().numpy()

    def probabilities(self, model: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return each example's class probabilities under `model`, shape (d,), as (n, classes), float64."""
        models.load_vector(self._model, model)
        self._model.eval()
        with torch.inference_mode():
            parts = [self._model(batch).double().softmax(1) for batch in torch.split(self._inputs, BATCH)]
        return torch.cat(parts).cpu().numpy()

    def accuracy(self, model: NDArray[np.float32]) -> float:
        """Return the share of examples whose most probable class is the right one."""
        return float((self.probabilities(model).argmax(1) == self._labels).mean())

    def report(self, model: NDArray[np.float32]) -> ClassificationReport:
        """Return all metrics of `model`, shape (d,)."""
        return ClassificationReport.of(self._labels, self.probabilities(model))
