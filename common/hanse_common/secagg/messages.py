"""What is said in secure aggregation, typed and bounded. `hanse_common.messages` draws the whole round.

    trip        server sends    merchant answers
    join        (Invitation)    Joined          fresh keys, signed
    share       Roster          Shares          its secrets' shares, sealed to each roster member
    ready       Delivery        Ready           holds an authentic share from every roster member
    upload      Start           Upload          the masked update
    survivors   Survivors       Agreed          a signature over the one survivor set
    unmask      Agreement       Unmasked        seed shares of survivors, key shares of the others

The first three set up some rounds at once, the others are a round. A member's place in the roster, which is sorted
by identity, stands for it everywhere else. Several values of one length are one byte string, without separators.
"""

from itertools import pairwise
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, model_validator

from hanse_common.secagg.parameters import MAX_ROSTER
from hanse_common.secagg.ring import MAX_VECTOR_BYTES
from hanse_common.secagg.shamir import SHARE_BYTES
from hanse_common.secagg.suite import MAX_SETUP_ROUNDS
from hanse_common.wire import Bytes32, Digest, Message, RoundNumber, Signature, Value

SHARES_BYTES = 2 * SHARE_BYTES
"""Of one round in a packet: a share of the seed, then one of the key."""

COMMITMENTS_BYTES = 2 * 32
"""Of one round in a packet: the commitments to these."""

OPENING_BYTES = SHARE_BYTES + 32
"""A share as it is revealed, with the value that hid it in its commitment."""

COUNTER_BYTES = 8 + 64
"""A ledger's counter, big-endian, and its owner's signature over it; all zeros where there is none."""

SEALED_BYTES = 32 + 2 * COUNTER_BYTES + 16
"""A sealed packet without its shares: blinding, two counters, AES-GCM's tag."""

MAX_SETUP_BYTES = 1 << 22
"""Bound of a message of the set-up, in bytes: the largest roster and the most rounds take three quarters of it."""

Place = Annotated[int, Field(ge=0, lt=MAX_ROSTER)]


class Work(Message):
    """The identity of a piece of work: fields that every message of a round shares."""

    plan_digest: Digest
    round: RoundNumber
    attempt: RoundNumber

    @property
    def work(self) -> dict[str, Any]:
        """The three fields, to compare with another message's or to make an answer from."""
        return {"plan_digest": self.plan_digest, "round": self.round, "attempt": self.attempt}


class Member(Value):
    """A roster member: its directory identity, and keys made for this set-up alone, signed by it.

    `mask_keys` are X25519 public keys of 32 bytes, one for each round.
    """

    identity: Bytes32
    sealing_key: Bytes32
    mask_keys: Annotated[bytes, Field(min_length=32, max_length=32 * MAX_SETUP_ROUNDS)]
    signature: Signature


class Joined(Work):
    """The merchant takes part in a set-up."""

    kind: ClassVar[int] = 3

    member: Member


class Roster(Work):
    """Who takes part, sorted by identity."""

    kind: ClassVar[int] = 30

    members: Annotated[tuple[Member, ...], Field(min_length=1, max_length=MAX_ROSTER)]


class Packet(Value):
    """One dealer's shares for one holder: sealed, committed to and signed. A dealer's own is not sealed: b""."""

    sealed: Annotated[bytes, Field(max_length=SEALED_BYTES + SHARES_BYTES * MAX_SETUP_ROUNDS)]
    commitments: Annotated[bytes, Field(max_length=COMMITMENTS_BYTES * MAX_SETUP_ROUNDS)]
    signature: Signature


class Shares(Work):
    """A packet for each roster member, in the roster's order, and the digest of each round's seed."""

    kind: ClassVar[int] = 31

    seed_digests: Annotated[bytes, Field(max_length=32 * MAX_SETUP_ROUNDS)]
    packets: Annotated[tuple[Packet, ...], Field(max_length=MAX_ROSTER)]


class Delivery(Work):
    """The packets for one holder from all others, in the roster's order."""

    kind: ClassVar[int] = 32

    packets: Annotated[tuple[Packet, ...], Field(max_length=MAX_ROSTER)]


class Ready(Work):
    """The merchant holds an authentic share of every roster member's secrets."""

    kind: ClassVar[int] = 33


class Upload(Work):
    """The masked client update as residues of the plan's ring, 4·d bytes of uint32."""

    kind: ClassVar[int] = 6
    tail: ClassVar[str | None] = "vector"

    vector: Annotated[bytes, Field(max_length=MAX_VECTOR_BYTES)]


class _Places(Work):
    @staticmethod
    def _require_ascending(places: tuple[int, ...]) -> None:
        if any(one >= other for one, other in pairwise(places)):
            raise ValueError("expected places in ascending order, each once")


class Survivors(_Places):
    """Whose uploads are in the sum, as the server says."""

    kind: ClassVar[int] = 34

    places: Annotated[tuple[Place, ...], Field(max_length=MAX_ROSTER)]

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        self._require_ascending(self.places)
        return self


class Agreed(Work):
    """A survivor's signature over the survivor set: the only one that it ever makes for this round."""

    kind: ClassVar[int] = 35

    signature: Signature


class Agreement(_Places):
    """The survivors that signed, and their signatures in the same order, 64 bytes each."""

    kind: ClassVar[int] = 36

    places: Annotated[tuple[Place, ...], Field(max_length=MAX_ROSTER)]
    signatures: Annotated[bytes, Field(max_length=64 * MAX_ROSTER)]

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        self._require_ascending(self.places)
        if len(self.signatures) != 64 * len(self.places):
            raise ValueError("expected one signature of 64 bytes for each place")
        return self


class Unmasked(Work):
    """One opening for each roster member, in order: of its seed if it survived, of its key if it did not."""

    kind: ClassVar[int] = 37

    openings: Annotated[bytes, Field(max_length=OPENING_BYTES * MAX_ROSTER)]
