"""Public whitening: features are centred and decorrelated by statistics of photos that are nobody's secret.

    whitening = Whitening.fit(features, dimensions=192)      # (n, raw) float32, of public reference photos
    data = whitening.to_bytes()
    hashlib.sha256(data).hexdigest()                         # what a recipe names

A head trained under differential privacy has few, noisy steps to spend; a feature that all photos share wastes
them. Centring and whitening by *private* statistics would have to be paid for in ε, so these come from photos
that are public, and the file is public too. Each photo's raw features are first scaled to norm 1. With mean μ
and covariance Σ = VΛVᵀ of the reference, a photo x becomes (x − μ)·V·(Λ + ρI)^(−1/2), restricted to the
largest eigenvalues; ρ keeps directions alone that the reference hardly knows.

References: Kessy, Lewin, Strimmer 2018, "Optimal Whitening and Decorrelation" (PCA whitening).
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

MAX_BYTES = 1 << 30
"""Bound of a whitening's file."""

RIDGE = 1e-3
"""ρ, on the scale of the covariance of features with norm 1, whose eigenvalues sum to at most 1."""


@dataclass(frozen=True)
class Whitening:
    """`mean`, shape (raw,), and `matrix`, shape (raw, dimensions), both float32."""

    mean: NDArray[np.float32]
    matrix: NDArray[np.float32]

    @classmethod
    def fit(cls, features: NDArray[np.float32], dimensions: int) -> Self:
        """Return the whitening of raw features, shape (n, raw), of n public photos, to `dimensions` numbers.

        Raises `RecognizerError` when there are fewer photos, or fewer features, than dimensions.
        """
        # scikit-learn takes a second to import, and whoever only applies a whitening does without it.
        from sklearn.decomposition import PCA

        if min(features.shape) < dimensions:
            raise RecognizerError(
                f"Whitening to {dimensions} dimensions: found {features.shape[0]} photos of "
                f"{features.shape[1]} features, expected at least {dimensions} of each."
            )
        norms = np.linalg.norm(features, axis=1, keepdims=True)
        unit = features / np.maximum(norms, 1e-12)
        pca = PCA(dimensions, svd_solver="randomized", random_state=0).fit(unit)
        scale = 1 / np.sqrt(pca.explained_variance_ + RIDGE)
        return cls(pca.mean_.astype(np.float32), (pca.components_.T * scale).astype(np.float32))

    def to_bytes(self) -> bytes:
        """Return the file's content: safetensors."""
        return bytes(save({"mean": self.mean, "matrix": np.ascontiguousarray(self.matrix)}))

    @classmethod
    def from_bytes(cls, data: bytes, digest: str, raw: int, dimensions: int) -> Self:
        """Return the whitening in `data`, untrusted, whose SHA-256 must be `digest`, in hexadecimal.

        Raises `RecognizerError` unless it is, and fits `raw` features and `dimensions` numbers, all finite.
        """
        found = hashlib.sha256(data).hexdigest()
        if found != digest:
            raise RecognizerError(f"Whitening: found SHA-256 {found}, the recipe names {digest}.")
        try:
            arrays = load(data)
        except (SafetensorError, KeyError, ValueError) as error:  # KeyError: a type that numpy does not have
            raise RecognizerError(f"Whitening: not a safetensors file of numpy's types ({error}).") from None
        expected = {"mean": (raw,), "matrix": (raw, dimensions)}
        shapes = {name: array.shape for name, array in arrays.items() if array.dtype == np.float32}
        if shapes != expected:
            raise RecognizerError(f"Whitening: found {shapes}, expected float32 arrays {expected}.")
        if not all(np.isfinite(array).all() for array in arrays.values()):
            raise RecognizerError("Whitening: found numbers that are not finite.")
        return cls(arrays["mean"], arrays["matrix"])

    @classmethod
    def load(cls, path: Path, digest: str, raw: int, dimensions: int) -> Self:
        """Return the whitening in the file `path`. Raises `RecognizerError` as `from_bytes` does."""
        data = read_bounded(path, MAX_BYTES, "a whitening", RecognizerError)
        return cls.from_bytes(data, digest, raw, dimensions)
