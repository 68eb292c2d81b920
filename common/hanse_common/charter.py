"""The league's charter: who holds the league's key, how many of them must sign, and how many members admit another.

    charter = Charter(league="demo", version=1, holders=(alder, birch, cedar), threshold=2, endorsements=2)
    pinned = charter.digest                                    # what every merchant writes into its configuration
    signed = SignedCharter.of(charter).signed_by(alder_key).signed_by(birch_key)
    charters = follow((signed, later), pinned)                 # all of them, if each may follow the one before

"The league's key" is `threshold` signatures of `holders`, so that no one person can admit a member, and one lost or
stolen key ends nothing: the others sign a new charter that replaces it. Merchants pin the digest of the founding
charter and follow the chain from there. As in The Update Framework (specification 1.0.34, section 5.3), a charter
needs the signatures of its own threshold and of the threshold before it.

A charter never asks for fewer endorsements than the one before: holders alone cannot do away with the members' word.
All fields are public.
"""

from collections.abc import Iterable, Sequence
from typing import Annotated, ClassVar, Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import Field, model_validator

from hanse_common import signing, wire
from hanse_common.errors import DirectoryRefused, SignatureInvalid
from hanse_common.wire import Bytes32, Digest, Message, Name, Signature, Value

MAX_HOLDERS = 16
MAX_CHARTERS = 16
"""How many charters a league may have had; after that it is founded anew."""

MAX_ENDORSEMENTS = 4
MAX_CHARTER_BYTES = 1024


class HolderSignature(Value):
    """One holder's signature, Ed25519."""

    holder: Bytes32
    signature: Signature


Signatures = Annotated[tuple[HolderSignature, ...], Field(max_length=2 * MAX_HOLDERS)]


class Charter(Message):
    """The rules of one league.

    Attributes:
        version: 1 for the founding charter, then one more for each that follows.
        previous: the digest of the charter before, zeros in the founding one.
        holders: public keys of those who hold the league's key, sorted. None of them is the operator.
        threshold: how many of them must sign a directory or a charter.
        endorsements: how many members must vouch for a new one. With 0, the holders alone admit members.
    """

    kind: ClassVar[int] = 18

    league: Name
    version: Annotated[int, Field(ge=1, le=MAX_CHARTERS)]
    previous: Digest = bytes(32)
    holders: Annotated[tuple[Bytes32, ...], Field(min_length=1, max_length=MAX_HOLDERS)]
    threshold: Annotated[int, Field(ge=1, le=MAX_HOLDERS)]
    endorsements: Annotated[int, Field(ge=0, le=MAX_ENDORSEMENTS)]

    @model_validator(mode="after")
    def _sound(self) -> Self:
        if list(self.holders) != sorted(set(self.holders)):
            raise ValueError("expected holders sorted, each once")
        if self.threshold > len(self.holders):
            raise ValueError(f"expected a threshold of at most {len(self.holders)}, the number of holders")
        if (self.version == 1) != (self.previous == bytes(32)):
            raise ValueError("expected a previous charter for every version but the first")
        return self

    @property
    def digest(self) -> bytes:
        """The SHA-256 of the canonical bytes, 32 bytes."""
        return wire.digest(self)

    def succeeded_by(self, holders: Iterable[bytes], threshold: int, endorsements: int) -> "Charter":
        """Return the charter that replaces this one, to be signed by the thresholds of both."""
        return Charter(
            league=self.league,
            version=self.version + 1,
            previous=self.digest,
            holders=tuple(sorted(holders)),
            threshold=threshold,
            endorsements=endorsements,
        )

    def missing(self, domain: str, data: bytes, signatures: Sequence[HolderSignature]) -> int:
        """Return how many holders' signatures over `data` are still missing.

        Raises `SignatureInvalid` for a holder's signature that does not verify; those of others count for nothing.
        """
        signed = set()
        for one in signatures:
            if one.holder in self.holders:
                signing.verify(one.holder, domain, data, one.signature)
                signed.add(one.holder)
        return max(0, self.threshold - len(signed))

    def require_signed(self, domain: str, data: bytes, signatures: Sequence[HolderSignature]) -> None:
        """Raise `SignatureInvalid` unless `threshold` holders signed `data` under `domain`."""
        missing = self.missing(domain, data, signatures)
        if missing:
            raise SignatureInvalid(
                f"The {domain} has {self.threshold - missing} of the {self.threshold} signatures that the charter of "
                f"{self.league} asks for."
            )


class SignedCharter(Value):
    """The canonical bytes of a charter with signatures over them, of its own holders and of those before."""

    charter: Annotated[bytes, Field(max_length=MAX_CHARTER_BYTES)]
    signatures: Signatures = ()

    DOMAIN: ClassVar[str] = "charter"

    @classmethod
    def of(cls, charter: Charter) -> Self:
        """Return `charter` without a signature."""
        return cls(charter=wire.encode(charter))

    def signed_by(self, key: Ed25519PrivateKey) -> Self:
        """Return it with the signature of `key` too; one that it has already stays."""
        return self.model_copy(
            update={"signatures": with_signature(self.signatures, key, self.DOMAIN, self.charter)}
        )

    def read(self) -> Charter:
        """Return the charter, whoever signed it. Raises `WireError`."""
        return wire.decode(Charter, self.charter, MAX_CHARTER_BYTES)


class CharterFile(Message):
    """All charters of a league, the founding one first: the form of its file, complete or not."""

    kind: ClassVar[int] = 19

    charters: Annotated[tuple[SignedCharter, ...], Field(min_length=1, max_length=MAX_CHARTERS)]


def with_signature(
    signatures: Sequence[HolderSignature], key: Ed25519PrivateKey, domain: str, data: bytes
) -> tuple[HolderSignature, ...]:
    """Return `signatures` with that of `key` over `data`, once."""
    own = signing.public_bytes(key)
    others = tuple(one for one in signatures if one.holder != own)
    return (*others, HolderSignature(holder=own, signature=signing.sign(key, domain, data)))


def follow(chain: Sequence[SignedCharter], pinned: bytes) -> tuple[Charter, ...]:
    """Return the charters of `chain`, whose first must be the one of digest `pinned`; the last is in force.

    Raises `DirectoryRefused` when it is another league's, does not lead on or asks for fewer endorsements,
    `SignatureInvalid` when signatures are missing or wrong, `WireError` when a charter can't be read.
    """
    charter = chain[0].read()
    if charter.digest != pinned:
        raise DirectoryRefused(
            f"found the charter {charter.digest.hex()}, expected the pinned one, {pinned.hex()}: another league's."
        )
    charter.require_signed(SignedCharter.DOMAIN, chain[0].charter, chain[0].signatures)
    followed = [charter]
    for signed in chain[1:]:
        later = signed.read()
        if (later.league, later.version, later.previous) != (
            charter.league,
            charter.version + 1,
            charter.digest,
        ):
            raise DirectoryRefused(
                f"found charter {later.version} of {later.league}, which does not follow charter {charter.version} of "
                f"{charter.league}."
            )
        if later.endorsements < charter.endorsements:
            raise DirectoryRefused(
                f"charter {later.version} of {charter.league} asks for {later.endorsements} endorsements, expected "
                f"{charter.endorsements} or more, as before."
            )
        for needed in (charter, later):
            needed.require_signed(SignedCharter.DOMAIN, signed.charter, signed.signatures)
        charter = later
        followed.append(charter)
    return tuple(followed)


def founded(league: str, *keys: Ed25519PrivateKey, endorsements: int = 0) -> SignedCharter:
    """Return the founding charter whose holders are all of `keys`, each of whom must sign, signed by them."""
    holders = tuple(sorted(map(signing.public_bytes, keys)))
    charter = Charter(
        league=league, version=1, holders=holders, threshold=len(keys), endorsements=endorsements
    )
    signed = SignedCharter.of(charter)
    for key in keys:
        signed = signed.signed_by(key)
    return signed
