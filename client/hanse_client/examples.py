"""What a merchant trains on, and how a sample of it is drawn: by photo or by product.

    examples = Examples.of(features, labels, "auto", products)
    sample = examples.sample("product", 0.1, randomness)      # indices of photos

**Units of privacy.** By photo, each photo has a coin of its own. By product, each product has one coin, and a product
in the sample sends one of its photos, drawn afresh at random: all its photos are sampled and clipped together, since
whatever they are, they contribute one clipped gradient. Adding or removing a product, with all its photos, then changes
the sum by at most C, as adding or removing a photo does in the other unit.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray

from hanse_client.resources import DEVICES
from hanse_common.errors import ConfigError
from hanse_common.privacy.sampling import poisson_sample, thinned
from hanse_common.randomness import Randomness


@dataclass(frozen=True)
class Examples:
    """What a model trains on.

    `inputs`, shape (n, …), float32, are embeddings, or images for a net trained whole; `labels`, shape (n,), int64, the
    league's class of each; both on the device that trains. `products`, shape (n,), int64, tells which photos show one
    product; without it each photo is a product of its own. `holdout` are the same merchant's photos that nothing is
    trained on, which a federated evaluation tries models on.
    """

    inputs: torch.Tensor
    labels: torch.Tensor
    products: NDArray[np.int64] | None = None
    holdout: "Examples | None" = None

    @classmethod
    def of(
        cls,
        inputs: NDArray[np.float32],
        labels: NDArray[np.integer[Any]],
        device: str,
        products: Sequence[str | None] | None = None,
    ) -> Self:
        """Return arrays as examples on `device`, see `resolve_device`.

        `products` are names; a photo whose product is None is a product of its own.
        """
        chosen = resolve_device(device)
        wide = labels.astype(np.int64)
        numbers = None if products is None else _numbered(products)
        return cls(torch.from_numpy(inputs).to(chosen), torch.from_numpy(wide).to(chosen), numbers)

    @classmethod
    def pooled(cls, shops: Sequence[Self]) -> Self:
        """Return the examples of several shops together, without holdouts; a product of one is none of another's."""
        products, first = [], 0
        for shop in shops:
            own = (
                np.arange(len(shop))
                if shop.products is None
                else np.unique(shop.products, return_inverse=True)[1]
            )
            products.append(first + own)
            first += len(shop)
        return cls(
            torch.cat([shop.inputs for shop in shops]),
            torch.cat([shop.labels for shop in shops]),
            np.concatenate(products),
        )

    def units(self, unit: Literal["photo", "product"]) -> int:
        """Return how many photos, or products, there are."""
        return len(self) if unit == "photo" else len(self._photos_by_product[1])

    def __len__(self) -> int:
        return len(self.labels)

    def sample(
        self,
        unit: Literal["photo", "product"],
        sampling_rate: float,
        randomness: Randomness,
        class_rates: Sequence[float] = (),
    ) -> NDArray[np.intp]:
        """Return the indices of the photos in a Poisson sample of units.

        With `class_rates` a photo of class k that would be in the sample is left out again by a coin of its own, so
        that it is there with probability `class_rates[k]` in all; a photo of no class is always left out.

        Raises `ValueError` unless 0 < sampling_rate ≤ 1 and all class rates are over 0 and at most as large.
        """
        if class_rates:
            found = self._sample(unit, sampling_rate, randomness)
            return thinned(found, self._host_labels[found], class_rates, sampling_rate, randomness)
        return self._sample(unit, sampling_rate, randomness)

    def _sample(
        self, unit: Literal["photo", "product"], sampling_rate: float, randomness: Randomness
    ) -> NDArray[np.intp]:
        if unit == "photo":
            return poisson_sample(len(self), sampling_rate, randomness)
        order, starts, counts = self._photos_by_product
        chosen = poisson_sample(len(counts), sampling_rate, randomness)
        # Which photo stands for a product protects nobody, so a bias of 2⁻⁵³ does no harm.
        uniform = (randomness.words(len(chosen)) >> np.uint64(11)) * 2.0**-53
        photos: NDArray[np.intp] = order[starts[chosen] + (uniform * counts[chosen]).astype(np.intp)]
        return photos

    @cached_property
    def _host_labels(self) -> NDArray[np.int64]:
        labels: NDArray[np.int64] = self.labels.cpu().numpy()
        return labels

    @cached_property
    def _photos_by_product(self) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]]:
        """Photos ordered by product, where each product begins there, and how many photos it has."""
        products = np.arange(len(self)) if self.products is None else self.products
        _, starts, counts = np.unique(np.sort(products), return_index=True, return_counts=True)
        return np.argsort(products, kind="stable"), starts, counts


def resolve_device(name: str) -> str:
    """Return the device that `name` means: "auto" is CUDA when it is there, else the CPU; "cuda:1" the second GPU.

    Raises `ConfigError` for a GPU that is not there, naming those that are, and for any other name.
    """
    if not re.fullmatch(DEVICES, name):
        raise ConfigError(f"device: found {name!r}, expected auto, cpu, cuda or cuda:INDEX, such as cuda:0.")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return "cpu"
    if not torch.cuda.is_available():
        raise ConfigError(f"device: found {name}, but torch sees no CUDA device here; choose auto or cpu.")
    _, _, index = name.partition(":")
    if index and int(index) >= torch.cuda.device_count():
        there = ", ".join(
            f"cuda:{number} ({torch.cuda.get_device_name(number)})"
            for number in range(torch.cuda.device_count())
        )
        raise ConfigError(
            f"device: found {name}, but torch sees {there} here; choose one of these, auto or cpu."
        )
    return f"cuda:{int(index)}" if index else "cuda"


def device_name(name: str) -> str:
    """Return what the device called `name` is, for people. Raises `ConfigError` as `resolve_device` does."""
    device = resolve_device(name)
    return f"{device}, {torch.cuda.get_device_name(device)}" if device.startswith("cuda") else "the CPU"


def _numbered(products: Sequence[str | None]) -> NDArray[np.int64]:
    """Return a number for each photo, equal for equal names; a photo without a name gets one of its own."""
    known: dict[str, int] = {}
    fresh = len(products)
    numbers = []
    for index, name in enumerate(products):
        numbers.append(fresh + index if name is None else known.setdefault(name, len(known)))
    return np.array(numbers, dtype=np.int64)
