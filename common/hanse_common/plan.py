"""The plan: what the operator signs and every merchant judges before a photo is touched.

    signed = SignedPlan.sign(plan, operator_key)
    plan = signed.open(pinned_public_key)

A plan fixes the recipe, the classes, and every number on which privacy depends. It is frozen, has one canonical
encoding, a digest that names it in every message, and an Ed25519 signature. Nothing the server sends later can
widen it; a merchant computes ε from it alone.

All fields are public information.
"""

import math
from typing import Annotated, ClassVar, Self

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray
from pydantic import Field, model_validator

from hanse_common import signing, wire
from hanse_common.evaluation import Layout
from hanse_common.modes import (
    EvaluationSchedule,
    EvaluationTraining,
    LocalSchedule,
    LocalTraining,
    MeanSchedule,
    MeanTraining,
    Schedule,
    Thinned,
    Training,
    TrendsSchedule,
    TrendsTraining,
)
from hanse_common.privacy.mechanism import Mechanism
from hanse_common.secagg import ring
from hanse_common.secagg.parameters import MAX_ROSTER, Parameters
from hanse_common.secagg.ring import MAX_DIMENSION, Ring
from hanse_common.vision.recipe import Recipe
from hanse_common.vision.taxonomy import Taxonomy
from hanse_common.wire import Message, Name, Signature, Value

MAX_PLAN_BYTES = 256 * 1024

_PIECE = 1 << 16
"""Numbers of a sum that are decoded at once: beside the result there is room for little more."""

_HEADROOM = 4
"""The ring must have room for so many times the photos that a merchant samples on average, all pulling one way."""


class Cohort(Value):
    """Who must take part for a round to count, and how long each trip waits, in seconds.

    `min_merchants` is n_min, `max_corrupt` is c; what follows from them is in `hanse_common.secagg.parameters`.
    `join_deadline` is for every trip but the upload, which `upload_deadline` is for. An upload leaves `upload_slot`
    seconds after its question came, or a whole multiple of that, however long the training took; 0 is at once.
    """

    min_merchants: Annotated[int, Field(ge=3, le=MAX_ROSTER)]
    max_merchants: Annotated[int, Field(ge=3, le=MAX_ROSTER)]
    max_corrupt: Annotated[int, Field(ge=1, le=MAX_ROSTER)] = 1
    join_deadline: Annotated[float, Field(gt=0, le=86_400)] = 60.0
    upload_deadline: Annotated[float, Field(gt=0, le=86_400)] = 600.0
    upload_slot: Annotated[float, Field(ge=0, le=86_400)] = 1.0

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.min_merchants > self.max_merchants:
            raise ValueError("min_merchants must not be over max_merchants")
        if self.upload_slot > self.upload_deadline / 2:
            raise ValueError("upload_slot must leave room for two of them in upload_deadline")
        _ = self.parameters
        return self

    @property
    def parameters(self) -> Parameters:
        """Secure aggregation's parameters."""
        return Parameters(self.min_merchants, self.max_corrupt, self.max_merchants)


class Plan(Message):
    """One training of one recognizer. `serial` keeps two plans of equal content apart."""

    kind: ClassVar[int] = 1

    league: Name
    serial: Annotated[bytes, Field(min_length=16, max_length=16)]
    recipe: Recipe
    taxonomy: Taxonomy
    dimension: Annotated[int, Field(ge=1, le=MAX_DIMENSION)]
    training: Training
    cohort: Cohort
    delta: Annotated[float, Field(gt=0, lt=1e-3)]

    @model_validator(mode="after")
    def _has_features(self) -> Self:
        if isinstance(self.training, MeanTraining) and (
            self.recipe.backbone is None or self.recipe.centre is not None
        ):
            raise ValueError("mode mean: expected a recipe with a backbone and without a centre")
        return self

    @model_validator(mode="after")
    def _can_be_evaluated(self) -> Self:
        if isinstance(self.training, EvaluationTraining):
            Layout(len(self.taxonomy.classes))
        return self

    @model_validator(mode="after")
    def _fits_the_classes(self) -> Self:
        classes = len(self.taxonomy.classes)
        self.recipe.loss.require(classes)
        found = len(self.training.class_rates) if isinstance(self.training, Thinned) else 0
        if found not in (0, classes):
            raise ValueError(
                f"class_rates: found {found} numbers, expected one for each of {classes} classes"
            )
        return self

    @model_validator(mode="after")
    def _has_a_model(self) -> Self:
        # Where `dimension` is not the model's own, nothing else bounds what a merchant builds for it.
        found = self.recipe.dimension(len(self.taxonomy.classes))
        if found > MAX_DIMENSION:
            raise ValueError(f"recipe: its model has {found} numbers, expected at most {MAX_DIMENSION}")
        return self

    @property
    def expected_dimension(self) -> int:
        """How many numbers this recipe and mode have for these classes."""
        return dimension_of(self.training, self.recipe, len(self.taxonomy.classes))

    @property
    def model_dimension(self) -> int:
        """How many numbers the model has that the server sends; as many as are uploaded but in mode `evaluation`."""
        if isinstance(self.training, EvaluationTraining):
            return self.recipe.dimension(len(self.taxonomy.classes))
        return self.dimension

    def mechanism(self, steps: int) -> Mechanism:
        """Return the mechanism that `steps` steps of this plan are."""
        training = self.training
        return Mechanism(
            clipping_norm=training.clipping_norm,
            dimension=self.dimension,
            noise_multiplier=training.noise_multiplier,
            sampling_rate=training.sampling_rate,
            steps=steps,
            shares=noise_shares(training, self.cohort),
        )

    def epsilon(self) -> float:
        """Return the ε of all steps at the plan's δ; may be infinite.

        Raises `ValueError` when the mechanism's arithmetic does not allow the plan's numbers.
        """
        return self.mechanism(self.training.total_steps).epsilon(self.delta)

    @property
    def limit(self) -> int:
        """The largest magnitude of one merchant's integers in the masked sum."""
        return ring.share(self.cohort.max_merchants)

    def require_room(self) -> None:
        """Raise `ValueError` unless what merchants usually add up has room in the ring."""
        training = self.training
        if isinstance(training, LocalTraining):
            _ = Ring(training.update_bound, self.cohort.max_merchants).step
            return
        found = self.mechanism(1)
        needed = math.ceil(
            _HEADROOM * training.expected_batch / self.cohort.min_merchants * found.grid.sensitivity
        )
        if found.room(self.limit) < needed:
            raise ValueError(
                f"One merchant's sum may reach {max(found.room(self.limit), 0)} grid steps beside its noise, and "
                f"expected_batch {training.expected_batch:g} needs {needed}. Ask fewer merchants at once "
                f"(max_merchants is {self.cohort.max_merchants}), or plan a smaller expected_batch or less noise."
            )

    def encode(self, update: NDArray[np.float64]) -> NDArray[np.uint32]:
        """Return a client update of mode `local`, shape (d,), in the model's units, as residues, shape (d,).

        Raises `ValueError` in another mode, where what is summed are integers from the start.
        """
        if not isinstance(self.training, LocalTraining):
            raise ValueError(f"Expected a plan of mode local, found {self.training.mode}.")
        return Ring(self.training.update_bound, self.cohort.max_merchants).encode(update)

    def decode(self, total: NDArray[np.uint32], survivors: int) -> NDArray[np.float64]:
        """Return the league's update, shape (d,), in the model's units, from the sum of `survivors` uploads.

        Mode `local`: the mean of the client updates. Mode `evaluation`: the noisy sum, in units of the photos' vectors;
        mode `trends`: the noisy counts. Else the noisy sum over the plan's `expected_batch`.
        """
        training = self.training
        update = np.empty(total.size, dtype=np.float64)
        pieces = [slice(first, first + _PIECE) for first in range(0, total.size, _PIECE)]
        if isinstance(training, LocalTraining):
            units = Ring(training.update_bound, self.cohort.max_merchants)
            for piece in pieces:
                np.divide(units.decode(total[piece]), survivors, out=update[piece])
        else:
            grid = self.mechanism(1).grid
            counts = isinstance(training, EvaluationTraining | TrendsTraining)
            parts = 1.0 if counts else training.expected_batch
            for piece in pieces:
                steps = ring.integers(total[piece]).astype(np.int64)
                np.divide(grid.dequantise(steps), parts, out=update[piece])
        return update

    @property
    def digest(self) -> bytes:
        """The SHA-256 of the canonical bytes, 32 bytes: the plan's name in every message."""
        return wire.digest(self)


def dimension_of(schedule: Schedule, recipe: Recipe, classes: int) -> int:
    """Return how many numbers a merchant uploads.

    What is trained; a photo's features in mode `mean`; a photo's vector in mode `evaluation`; the classes in mode
    `trends`. Raises `ValueError` when there are too many classes for an evaluation.
    """
    if isinstance(schedule, TrendsSchedule):
        return classes
    if isinstance(schedule, EvaluationSchedule):
        return Layout(classes).dimension
    return recipe.feature_dimension if isinstance(schedule, MeanSchedule) else recipe.dimension(classes)


def noise_shares(schedule: Schedule, cohort: Cohort) -> int:
    """Return h, how many merchants' shares of noise hide a photo: 1 in mode `local`, n_min − c elsewhere.

    So many honest merchants are in every released sum; what survivors beyond n_min add comes on top.
    """
    return 1 if isinstance(schedule, LocalSchedule) else cohort.min_merchants - cohort.max_corrupt


class SignedPlan(Message):
    """The canonical bytes of a plan with the operator's signature over them; also the form of a plan file."""

    kind: ClassVar[int] = 7

    plan: Annotated[bytes, Field(max_length=MAX_PLAN_BYTES)]
    signature: Signature

    DOMAIN: ClassVar[str] = "plan"

    @classmethod
    def sign(cls, plan: Plan, key: Ed25519PrivateKey) -> Self:
        """Return `plan` signed with the operator's key."""
        data = wire.encode(plan)
        return cls(plan=data, signature=signing.sign(key, cls.DOMAIN, data))

    def open(self, public_key: bytes) -> Plan:
        """Return the plan. Raises `SignatureInvalid` unless `public_key` signed it, `WireError` unless valid."""
        signing.verify(public_key, self.DOMAIN, self.plan, self.signature)
        return wire.decode(Plan, self.plan, MAX_PLAN_BYTES)
