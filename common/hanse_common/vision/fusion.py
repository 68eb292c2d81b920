"""Several photos of one product, one answer.

fused(recognizer.predict([front, back, label]))      # (K,), from (3, K)
"""

import numpy as np
from numpy.typing import NDArray


def fused(probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the class probabilities, (K,), of a product whose m photos have `probabilities`, (m, K), m ≥ 1.

    They are proportional to the photos' geometric mean, which the softmax of their mean logits is, so that a photo
    that rules a class out counts for more than one that does not know (Kittler, Hatef, Duin, Matas 1998, "On Combining
    Classifiers", equation 8, with equal priors and each photo's vote shortened to an m-th, as views of one product are
    not independent).

    Raises `ValueError` for no photos.
    """
    if probabilities.ndim != 2 or not len(probabilities):
        raise ValueError(f"Expected probabilities of shape (m, K), m >= 1, found {probabilities.shape}.")
    logarithms = np.log(np.maximum(probabilities, np.finfo(np.float64).tiny)).mean(axis=0)
    shares: NDArray[np.float64] = np.exp(logarithms - logarithms.max())
    shares /= shares.sum()
    return shares
