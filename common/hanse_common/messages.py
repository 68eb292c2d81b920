"""What server and merchant say to each other in a round, typed and bounded.

    trip      server sends          merchant answers
    join      Invitation            Joined | Declined
    upload    Start                 Upload | Declined

The identity of work is (plan digest, round, attempt); each message names it. Secure aggregation adds its trips
between and after these two.
"""

import hashlib
from enum import StrEnum
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from hanse_common.errors import WireError
from hanse_common.plan import MAX_DIMENSION, Digest, SignedPlan
from hanse_common.wire import MAX_DOCUMENT_BYTES, Message

MAX_VECTOR_BYTES = 4 * MAX_DIMENSION
MAX_MESSAGE_BYTES = MAX_VECTOR_BYTES + MAX_DOCUMENT_BYTES

FLOAT = np.dtype("<f4")
"""A model parameter on the wire: float32, little-endian."""


class DeclineCode(StrEnum):
    """Why a merchant declines. None depends on a photo; the text behind it stays with the merchant."""

    MALFORMED = "malformed"
    SIGNATURE = "signature"
    POLICY = "policy"
    BUDGET = "budget"
    MODEL = "model"
    REPEATED = "repeated"
    UNEXPECTED = "unexpected"
    UNAVAILABLE = "unavailable"


class Work(Message):
    """The identity of a piece of work: fields that every message of a round shares."""

    plan_digest: Digest
    round: Annotated[int, Field(ge=0, lt=1 << 31)]
    attempt: Annotated[int, Field(ge=0, lt=1 << 31)]

    @property
    def work(self) -> dict[str, Any]:
        """The three fields, to compare with another message's or to make an answer from."""
        return {"plan_digest": self.plan_digest, "round": self.round, "attempt": self.attempt}


class Invitation(Work):
    """The server asks a merchant to join a round that starts from `model`, 4·d bytes of float32."""

    kind: ClassVar[int] = 2

    signed_plan: SignedPlan
    model: Annotated[bytes, Field(max_length=MAX_VECTOR_BYTES)]


class Joined(Work):
    """The merchant joins, having checked the model with this digest."""

    kind: ClassVar[int] = 3

    model_digest: Digest


class Declined(Work):
    """The merchant does not take part in this round, and why, as a code."""

    kind: ClassVar[int] = 4

    code: Annotated[DeclineCode, Field(strict=False)]


class Start(Work):
    """The server asks a merchant that joined to train and upload."""

    kind: ClassVar[int] = 5

    cohort_size: Annotated[int, Field(ge=1, le=300)]


class Upload(Work):
    """The client update as residues of the plan's ring, 4·d bytes of uint32."""

    kind: ClassVar[int] = 6

    vector: Annotated[bytes, Field(max_length=MAX_VECTOR_BYTES)]


def model_to_bytes(model: NDArray[np.float32]) -> bytes:
    """Return the model, shape (d,), as 4·d bytes for the wire."""
    return model.astype(FLOAT).tobytes()


def model_from_bytes(data: bytes, dimension: int) -> NDArray[np.float32]:
    """Return the model in `data`, shape (dimension,), dtype float32.

    Raises `WireError` when its length is wrong or a parameter is not finite.
    """
    if len(data) != dimension * FLOAT.itemsize:
        raise WireError(f"model: found {len(data)} bytes, expected {dimension * FLOAT.itemsize}.")
    model = np.frombuffer(data, dtype=FLOAT).astype(np.float32)
    if not np.isfinite(model).all():
        raise WireError("model: found a parameter that is not finite, expected finite ones.")
    return model


def model_digest(data: bytes) -> bytes:
    """Return the SHA-256 of the model's bytes, 32 bytes."""
    return hashlib.sha256(data).digest()
