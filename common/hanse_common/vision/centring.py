"""The mean of the league's features, learnt under privacy, and features seen from it.

    centre = Centre(mean, epsilon=0.05, delta=1e-6)    # what a plan of mode `mean` gave, and what it cost
    data = centre.to_bytes()                     # a file; its SHA-256 is what a recipe names under centre
    centre.apply(features, norm=1.0)             # (n, F) float32

All photos of a catalog have much in common, and a head under differential privacy wastes its few noisy steps on it.
Subtracting the mean takes that away. The mean is a sum over private photos, so it is released once, through the same
mechanism and into the same ledgers as everything else. The file says what that cost, so that whoever publishes
something that was trained with it can add it to the training's own ε and δ.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from hanse_common.errors import RecognizerError
from hanse_common.files import read_bounded
from hanse_common.vision.recipe import Recipe
from hanse_common.vision.recipe_features import MAX_FEATURES

MAX_BYTES = 4 * MAX_FEATURES + (1 << 16)
"""Bound of a centre's file."""


@dataclass(frozen=True)
class Centre:
    """`mean`, shape (F,), float32, of features scaled to norm 1; `epsilon` and `delta` are what it cost."""

    mean: NDArray[np.float32]
    epsilon: float
    delta: float

    def apply(self, features: NDArray[np.float32], norm: float) -> NDArray[np.float32]:
        """Return norm·v/‖v‖ with v = x/‖x‖ − mean for each row x of `features`, shape (n, F), float32.

        A row that is zero stays zero.
        """
        moved = _unit(features) - self.mean
        moved[~features.any(axis=1)] = 0.0
        return np.float32(norm) * _unit(moved)

    def to_bytes(self) -> bytes:
        """Return the file's content: safetensors."""
        return bytes(save({"mean": self.mean, "cost": np.array([self.epsilon, self.delta])}))

    @property
    def digest(self) -> str:
        """The SHA-256 of the file, in hexadecimal."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @classmethod
    def read(cls, path: Path, dimension: int) -> Self:
        """Return the centre in the file `path`. Raises `RecognizerError` unless it holds `dimension` finite numbers."""
        return cls.from_bytes(read_bounded(path, MAX_BYTES, "a centre", RecognizerError), dimension)

    @classmethod
    def from_bytes(cls, data: bytes, dimension: int) -> Self:
        """Return the centre in `data`, untrusted. Raises as `read` does."""
        try:
            arrays = load(data)
        except (SafetensorError, KeyError, ValueError) as error:  # KeyError: a type that numpy does not have
            raise RecognizerError(f"Centre: not a safetensors file of numpy's types ({error}).") from None
        mean = arrays.get("mean")
        if mean is None or mean.dtype != np.float32 or mean.shape != (dimension,):
            raise RecognizerError(f"Centre: expected the array mean, float32 of shape ({dimension},).")
        cost = arrays.get("cost")
        if cost is None or cost.dtype != np.float64 or cost.shape != (2,):
            raise RecognizerError("Centre: expected the array cost, float64 of shape (2,).")
        if not (np.isfinite(mean).all() and np.isfinite(cost).all() and (cost >= 0).all()):
            raise RecognizerError("Centre: found numbers that are not finite, or a cost below zero.")
        return cls(mean, float(cost[0]), float(cost[1]))


def load_centre(recipe: Recipe, path: Path | None) -> Centre | None:
    """Return the centre that `recipe` names, from its local file; None when it names none.

    Raises `RecognizerError` when the file is missing or another.
    """
    if recipe.centre is None:
        return None
    if path is None:
        raise RecognizerError(
            f"The recipe centres features by the file with SHA-256 {recipe.centre}; name that file."
        )
    data = read_bounded(path, MAX_BYTES, "a centre", RecognizerError)
    found = hashlib.sha256(data).hexdigest()
    if found != recipe.centre:
        raise RecognizerError(f"{path}: found SHA-256 {found}, the recipe names {recipe.centre}.")
    return Centre.from_bytes(data, recipe.feature_dimension)


def centred(features: NDArray[np.float32], recipe: Recipe, centre: Centre | None) -> NDArray[np.float32]:
    """Return `features`, shape (n, F), as the recipe wants them: seen from `centre` where it names one."""
    if centre is None or recipe.backbone is None:
        return features
    return centre.apply(features, recipe.backbone.norm)


def _unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    unit: NDArray[np.float32] = rows / np.maximum(norms, np.float32(1e-12))
    return unit
