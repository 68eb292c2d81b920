"""How a merchant becomes a member: it asks, members vouch for it, and the directory says so.

    request = Request(charter=pinned, name="alder", entity="Alder Ltd", identity=identity, node_key=node_key)
    asked = SignedRequest.make(request, identity_key)
    vouched = asked.endorsed_by(birch_key).endorsed_by(cedar_key)

A request is signed with the identity it brings, so nobody can enter a key that is not its own. An endorsement is a
member's signature over the request's digest: "I know who this is, and compared its words". A member that changes its
identity hands the old one over: the old key's signature then stands in for endorsements.

All fields are public.
"""

import base64
import binascii
import textwrap
from typing import Annotated, ClassVar, Self

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import AfterValidator, Field

from hanse_common import signing, wire
from hanse_common.charter import MAX_ENDORSEMENTS
from hanse_common.errors import WireError
from hanse_common.wire import Bytes32, Digest, Message, Name, Signature, Value

NODE_KEY_BYTES = 49
"""A point on P-384 in compressed form (SEC 1, section 2.3.3)."""

MAX_REQUEST_BYTES = 4096
HANDOVER = "handover"
ENDORSEMENT = "endorsement"
PROOF = "membership request"

_FIRST, _LAST = "-----BEGIN HANSE REQUEST-----", "-----END HANSE REQUEST-----"
_COLUMNS = 72

Entity = Annotated[str, Field(min_length=1, max_length=128)]
NodeKey = Annotated[bytes, Field(max_length=NODE_KEY_BYTES), AfterValidator(lambda key: _point(key))]
OldIdentity = Annotated[bytes, Field(max_length=32)]
Handover = Annotated[bytes, Field(max_length=64)]


class Endorsement(Value):
    """A member's word, by its identity, for a request: Ed25519 over the request's digest."""

    identity: Bytes32
    signature: Signature


Endorsements = Annotated[tuple[Endorsement, ...], Field(max_length=MAX_ENDORSEMENTS)]


class Request(Message):
    """What a merchant asks to be entered with.

    Attributes:
        charter: the digest of the league's founding charter.
        name: its name in the league.
        entity: the business or person behind it; the league has one member an entity.
        identity: its Ed25519 identity.
        node_key: its Flower node's public key, a compressed point on P-384; empty where it has no node.
        replaces: its identity until now, or empty for a new member.
    """

    kind: ClassVar[int] = 27

    charter: Digest
    name: Name
    entity: Entity
    identity: Bytes32
    node_key: NodeKey = b""
    replaces: OldIdentity = b""

    @property
    def digest(self) -> bytes:
        """The SHA-256 of the canonical bytes, 32 bytes: what fingerprints are of and endorsements are over."""
        return wire.digest(self)


class SignedRequest(Message):
    """A request with the proof that its identity wants it, and what speaks for it so far."""

    kind: ClassVar[int] = 28

    request: Request
    proof: Signature
    handover: Handover = b""
    endorsements: Endorsements = ()

    @classmethod
    def make(cls, request: Request, key: Ed25519PrivateKey, old: Ed25519PrivateKey | None = None) -> Self:
        """Return the request signed with its identity's `key`, handed over by the `old` one if it replaces that."""
        digest = request.digest
        return cls(
            request=request,
            proof=signing.sign(key, PROOF, digest),
            handover=b"" if old is None else signing.sign(old, HANDOVER, digest),
        )

    def endorsed_by(self, key: Ed25519PrivateKey) -> Self:
        """Return it with the endorsement of the member whose identity's `key` this is.

        Raises `WireError` when it has `MAX_ENDORSEMENTS` of others.
        """
        own = signing.public_bytes(key)
        others = tuple(one for one in self.endorsements if one.identity != own)
        if len(others) >= MAX_ENDORSEMENTS:
            raise WireError(
                f"the request has {MAX_ENDORSEMENTS} endorsements, which is all that it has room for."
            )
        new = Endorsement(identity=own, signature=signing.sign(key, ENDORSEMENT, self.request.digest))
        return self.model_copy(update={"endorsements": (*others, new)})

    def require_sound(self) -> None:
        """Raise `SignatureInvalid` unless every signature that it carries verifies."""
        request, digest = self.request, self.request.digest
        signing.verify(request.identity, PROOF, digest, self.proof)
        if request.replaces or self.handover:
            signing.verify(request.replaces, HANDOVER, digest, self.handover)
        for one in self.endorsements:
            signing.verify(one.identity, ENDORSEMENT, digest, one.signature)

    def to_text(self) -> str:
        """Return it as some lines of text, to be mailed."""
        lines = textwrap.wrap(base64.b64encode(wire.encode(self)).decode("ascii"), _COLUMNS)
        return "\n".join((_FIRST, *lines, _LAST)) + "\n"

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Return the request in `text`, which may have other lines around it. Raises `WireError`."""
        _, found, rest = text.partition(_FIRST)
        inner, ended, _ = rest.partition(_LAST)
        if not (found and ended) or len(inner) > 2 * MAX_REQUEST_BYTES:
            raise WireError(f"found no request, expected lines from {_FIRST} to {_LAST}.")
        try:
            data = base64.b64decode("".join(inner.split()), validate=True)
        except (binascii.Error, ValueError):
            raise WireError("the request's lines are damaged, expected them as they were printed.") from None
        return wire.decode(cls, data, MAX_REQUEST_BYTES)


def _point(key: bytes) -> bytes:
    """Return `key`. Raises ValueError unless it is empty or a point: a directory with another would let nobody in."""
    if key:
        try:
            ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP384R1(), key)
        except ValueError:
            raise ValueError("expected a compressed point on P-384, or nothing") from None
    return key
