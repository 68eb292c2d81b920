"""The plan: what the operator signs and every merchant judges before a photo is touched.

    signed = SignedPlan.sign(plan, operator_key)
    plan = signed.open(pinned_public_key)

A plan fixes the recipe, the classes, and every number on which privacy depends. It is frozen, has one canonical
encoding, a digest that names it in every message, and an Ed25519 signature. Nothing the server sends later can
widen it; a merchant computes ε from it alone.

All fields are public information.
"""

from typing import Annotated, ClassVar, Literal, Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import Field, model_validator

from hanse_common import signing, wire
from hanse_common.privacy.accounting import STEPS_MAX
from hanse_common.privacy.mechanism import Mechanism
from hanse_common.secagg.parameters import MAX_ROSTER, Parameters
from hanse_common.secagg.ring import MAX_DIMENSION, Ring
from hanse_common.vision.recipe import Recipe
from hanse_common.vision.taxonomy import Taxonomy
from hanse_common.wire import Message, Name, Signature, Value

MAX_PLAN_BYTES = 256 * 1024

Positive = Annotated[float, Field(gt=0, le=1e9)]


class LocalSchedule(Value):
    """Mode `local` but for its noise: a round is `local_steps` steps of DP-SGD at each merchant.

    `sampling_rate` is the Poisson rate of every step. `expected_batch` divides each noisy sum, in photos: a
    number of the plan, never of the merchant, whose own count would leave with the update. The learning rate of
    a round falls linearly to zero over the plan's rounds when `decay` is set. `repeats` is how many rounds, in
    all, may be tried once more after they failed: a merchant pays for the whole plan, so those are paid too.
    """

    mode: Literal["local"] = "local"
    rounds: Annotated[int, Field(ge=1, le=100_000)]
    repeats: Annotated[int, Field(ge=0, le=100_000)] = 0
    local_steps: Annotated[int, Field(ge=1, le=10_000)]
    sampling_rate: Annotated[float, Field(gt=0, le=1)]
    expected_batch: Positive
    clipping_norm: Positive
    learning_rate: Positive
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    decay: bool = False

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if self.total_steps > STEPS_MAX:
            raise ValueError(
                f"(rounds + repeats)·local_steps is {self.total_steps}; expected at most {STEPS_MAX}"
            )
        return self

    @property
    def total_steps(self) -> int:
        """The most steps that a merchant takes under this plan: what ε is computed for."""
        return (self.rounds + self.repeats) * self.local_steps

    def learning_rate_of(self, round_: int) -> float:
        """Return the learning rate of the round `round_`, counted from 0."""
        return self.learning_rate * (1 - round_ / self.rounds if self.decay else 1.0)


class LocalTraining(LocalSchedule):
    """Mode `local`: each step has the full noise, so its guarantee needs no other merchant.

    `noise_multiplier` is the noise's standard deviation over the sensitivity of the sum on the grid.
    """

    noise_multiplier: Annotated[float, Field(gt=0, le=1e4)]


class Cohort(Value):
    """Who must take part for a round to count, and how long each trip waits, in seconds.

    `min_merchants` is n_min, `max_corrupt` is c; what follows from them is in `hanse_common.secagg.parameters`.
    `join_deadline` is for every trip but the upload, which `upload_deadline` is for.
    """

    min_merchants: Annotated[int, Field(ge=3, le=MAX_ROSTER)]
    max_merchants: Annotated[int, Field(ge=3, le=MAX_ROSTER)]
    max_corrupt: Annotated[int, Field(ge=1, le=MAX_ROSTER)] = 1
    join_deadline: Annotated[float, Field(gt=0, le=86_400)] = 60.0
    upload_deadline: Annotated[float, Field(gt=0, le=86_400)] = 600.0

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.min_merchants > self.max_merchants:
            raise ValueError("min_merchants must not be over max_merchants")
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
    training: LocalTraining
    cohort: Cohort
    delta: Annotated[float, Field(gt=0, lt=1e-3)]
    update_bound: Positive

    def mechanism(self, steps: int) -> Mechanism:
        """Return the mechanism that `steps` steps of this plan are."""
        training = self.training
        return Mechanism(
            clipping_norm=training.clipping_norm,
            dimension=self.dimension,
            noise_multiplier=training.noise_multiplier,
            sampling_rate=training.sampling_rate,
            steps=steps,
        )

    def epsilon(self) -> float:
        """Return the ε of all steps at the plan's δ; may be infinite.

        Raises `ValueError` when the mechanism's arithmetic does not allow the plan's numbers.
        """
        return self.mechanism(self.training.total_steps).epsilon(self.delta)

    @property
    def ring(self) -> Ring:
        """The ring in which this plan's updates are summed."""
        return Ring(self.update_bound, self.cohort.max_merchants)

    @property
    def digest(self) -> bytes:
        """The SHA-256 of the canonical bytes, 32 bytes: the plan's name in every message."""
        return wire.digest(self)


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
