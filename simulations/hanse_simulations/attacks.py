"""Merchants that attack: real participants, which train on photos made up for it or upload what they like.

    attack: {name: label-flip, merchants: 2}                    # a section of an experiment
    attack: {name: backdoor, merchants: 1, target: Bag, factor: 10}
    hanse-sim run EXPERIMENT

The last `merchants` of an experiment's shops attack together, in every round. Everything else is as in an honest
league: they sign, mask, help to unmask and charge their ledgers, so that the protocol tells nobody. An attack by photos
(`label-flip`, `backdoor`, `inflated`) changes what a shop has before it is embedded; then `factor` multiplies what it
uploads, in the ring. An attack by upload (`scaling`, `random`, `noise`) needs no photos of its own.

References:
[1] Bagdasaryan, Veit, Hua, Estrin, Shmatikov 2020, "How To Backdoor Federated Learning" (model replacement: `factor`).
[2] Gu, Dolan-Gavitt, Garg 2017, "BadNets" (the trigger, a few bright pixels in a corner).
[3] Tolpegin, Truex, Gursoy, Liu 2020, "Data Poisoning Attacks Against Federated Learning Systems" (label flips).
"""

from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from hanse_common.config import Section
from hanse_common.plan import Plan
from hanse_common.secagg import ring
from hanse_server import plausibility
from hanse_simulations.seeded import seed_for

if TYPE_CHECKING:  # it brings torch, which an experiment is read without
    from hanse_client.training import Trainer

FACTOR_MAX = 1 << 31


class _Attack(Section):
    """`merchants` of the league's attack; 0 leaves all honest. `factor` multiplies what each of them uploads."""

    merchants: Annotated[int, Field(ge=0, le=299)] = 1
    factor: Annotated[int, Field(ge=-FACTOR_MAX, le=FACTOR_MAX)] = 1

    @property
    def targets(self) -> tuple[str, ...]:
        """The league's classes that the attack speaks of."""
        return ()

    @property
    @abstractmethod
    def label(self) -> str:
        """The attack in a few words."""

    def _with_factor(self, text: str) -> str:
        return text if self.factor == 1 else f"{text}, ×{self.factor}"


class Photos(_Attack):
    """An attack by photos. The shop has each of them `copies` times."""

    copies: Annotated[int, Field(ge=1, le=1000)] = 1

    def _with_copies(self, text: str) -> str:
        return self._with_factor(text if self.copies == 1 else f"{text}, {self.copies} copies")


class LabelFlip(Photos):
    """Photos of the class `source` get the label `target`; without them, each gets the label of the next class."""

    name: Literal["label-flip"] = "label-flip"
    source: str | None = None
    target: str | None = None

    @model_validator(mode="after")
    def _both(self) -> "LabelFlip":
        if (self.source is None) != (self.target is None):
            raise ValueError("expected both source and target, or neither")
        return self

    @property
    def targets(self) -> tuple[str, ...]:
        """Source and target, if there are any."""
        return tuple(name for name in (self.source, self.target) if name is not None)

    @property
    def label(self) -> str:
        """The attack in a few words."""
        which = "all labels" if self.source is None else f"{self.source} as {self.target}"
        return self._with_copies(f"label flip, {which}")


class Backdoor(Photos):
    """Of the shop's photos, a share `share` gets a white square of `size` pixels in a corner and the label `target`."""

    name: Literal["backdoor"] = "backdoor"
    target: str
    share: Annotated[float, Field(gt=0, le=1)] = 0.5
    size: Annotated[int, Field(ge=1, le=28)] = 4

    @property
    def targets(self) -> tuple[str, ...]:
        """The class that triggered photos are to be taken for."""
        return (self.target,)

    @property
    def label(self) -> str:
        """The attack in a few words."""
        return self._with_copies("backdoor")


class Inflated(Photos):
    """Honest photos with honest labels, but each of them several times: more say than the others have."""

    name: Literal["inflated"] = "inflated"

    @property
    def label(self) -> str:
        """The attack in a few words."""
        return self._with_copies("honest photos")


class Scaling(_Attack):
    """What an honest merchant would upload, times `factor`: −1 pulls the league back, a large one beyond the ring."""

    name: Literal["scaling"] = "scaling"

    @property
    def label(self) -> str:
        """The attack in a few words."""
        return f"update times {self.factor}"


class Random(_Attack):
    """Uniform residues: the sum is as random as they are."""

    name: Literal["random"] = "random"

    @property
    def label(self) -> str:
        """The attack in a few words."""
        return "random residues"


class Noise(_Attack):
    """Gaussian noise whose expected norm is `of_bound` of what an honest sum of everyone may have."""

    name: Literal["noise"] = "noise"
    of_bound: Annotated[float, Field(gt=0, le=1000)]

    @property
    def label(self) -> str:
        """The attack in a few words."""
        return f"noise of {self.of_bound:g} of the bound"


Attack = Annotated[LabelFlip | Backdoor | Inflated | Scaling | Random | Noise, Field(discriminator="name")]


class Attacker:
    """A `Trainer` that uploads what `attack` makes of what the `honest` one would. Its draws follow from `seed`."""

    def __init__(self, attack: Attack, honest: "Trainer", seed: int, name: str) -> None:
        self._attack = attack
        self._honest = honest
        self._seed = seed
        self._name = name

    def accepts(self, plan: Plan) -> bool:
        """Return whether the honest trainer accepts the plan."""
        return self._honest.accepts(plan)

    def contribution(self, plan: Plan, round_: int, model: NDArray[np.float32]) -> NDArray[np.uint32]:
        """Return the residues that are masked, shape (d,)."""
        rng = np.random.default_rng(seed_for(self._seed, f"attack {self._name} round {round_}"))
        match self._attack:
            case Random():
                found = rng.integers(0, 1 << ring.MODULUS_BITS, plan.dimension, dtype=np.uint32)
            case Noise(of_bound=share):
                start = float(np.linalg.norm(model.astype(np.float64)))
                norm = share * plausibility.bound(plan, round_, start, plan.cohort.max_merchants)
                drawn = rng.normal(size=plan.dimension) * norm / np.sqrt(plan.dimension)
                found = ring.residues(np.rint(drawn / plausibility.unit(plan)).astype(np.int64))
            case _:
                found = self._honest.contribution(plan, round_, model)
        # Products of residues are residues of the products.
        return ring.residues(ring.integers(found).astype(np.int64) * self._attack.factor)


def poisoned(
    attack: Attack, images: NDArray[np.uint8], labels: NDArray[np.integer[Any]], classes: tuple[str, ...]
) -> tuple[NDArray[np.uint8], NDArray[np.integer[Any]]]:
    """Return a shop's photos, shape (n, h, w), and labels, shape (n,), as an attacker makes them of its own."""
    match attack:
        case LabelFlip(source=str(source), target=str(target)):
            flipped = np.where(labels == classes.index(source), classes.index(target), labels)
            return images, flipped.astype(labels.dtype)
        case LabelFlip():
            return images, ((labels + 1) % len(classes)).astype(labels.dtype)
        case Backdoor():
            count = max(1, round(attack.share * len(labels)))  # photos are dealt in random order
            images, labels = images.copy(), labels.copy()
            images[:count] = triggered(images[:count], attack.size)
            labels[:count] = classes.index(attack.target)
    return images, labels


def triggered(images: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Return `images`, shape (n, h, w), each with a white square of `size` pixels in its lower right corner."""
    marked = images.copy()
    marked[:, -size:, -size:] = 255
    return marked
