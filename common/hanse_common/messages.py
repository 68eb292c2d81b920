"""What server and merchant say to each other in a round, typed and bounded.

    trip        server sends    merchant answers
    join        Invitation      Joined | Declined
    share       Roster          Shares | Declined
    ready       Delivery        Ready | Declined
    upload      Start           Upload | Declined
    survivors   Survivors       Agreed | Declined
    unmask      Agreement       Unmasked | Declined

The first three trips set up some rounds at once; each round is the other three. Every message names its work: plan
digest, round (a set-up's first), attempt. What secure aggregation itself says is in `hanse_common.secagg.messages`.
"""

import hashlib
from enum import StrEnum
from typing import Annotated, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from hanse_common.directory import SignedDirectory
from hanse_common.errors import WireError
from hanse_common.plan import SignedPlan
from hanse_common.secagg.messages import MAX_SETUP_BYTES, Work
from hanse_common.secagg.ring import MAX_VECTOR_BYTES
from hanse_common.secagg.suite import MAX_SETUP_ROUNDS
from hanse_common.wire import MAX_DOCUMENT_BYTES, Buffer

MAX_MESSAGE_BYTES = MAX_VECTOR_BYTES + MAX_SETUP_BYTES + MAX_DOCUMENT_BYTES

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
    DIRECTORY = "directory"
    ROSTER = "roster"
    SHARES = "shares"
    LEDGER = "ledger"
    SURVIVORS = "survivors"
    AGREEMENT = "agreement"


class Invitation(Work):
    """The server asks a merchant to set up `rounds` rounds from `round` on."""

    kind: ClassVar[int] = 2

    rounds: Annotated[int, Field(ge=1, le=MAX_SETUP_ROUNDS)]
    signed_plan: SignedPlan
    signed_directory: SignedDirectory


class Declined(Work):
    """The merchant does not take part, and why, as a code. `culprit` is the identity that it blames, if any."""

    kind: ClassVar[int] = 4

    code: Annotated[DeclineCode, Field(strict=False)]
    culprit: Annotated[bytes, Field(max_length=32)] = b""


class Start(Work):
    """The server asks a merchant to train from `model`, 4·d bytes of float32, and to upload."""

    kind: ClassVar[int] = 5
    tail: ClassVar[str | None] = "model"

    model: Annotated[bytes, Field(max_length=MAX_VECTOR_BYTES)]


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


def model_digest(data: Buffer) -> bytes:
    """Return the SHA-256 of the model's bytes, 32 bytes."""
    return hashlib.sha256(data).digest()
