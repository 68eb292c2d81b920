"""The league's directory: who is a member, signed by the league's key, which is not the operator's.

    signed = SignedDirectory.of(directory, charters).signed_by(holder_key)
    directory = signed.open(pinned, now)
    require_admitted(directory, charter, before)
    entities = directory.entities(now)

Secure aggregation assumes that at most c members of the whole directory are corrupt. An operator who could add members
would add corrupt ones; so the league's key is others' (`hanse_common.charter`), each entity is listed once, and a new
member needs the word of some that are members already, which every merchant checks for itself. Merchants pin the
founding charter and refuse a directory of an earlier version, or under an earlier charter, than they have seen.

All fields are public. Times are seconds since 1970, UTC.
"""

from collections.abc import Sequence
from typing import Annotated, ClassVar, Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import Field, model_validator

from hanse_common import charter as charters
from hanse_common import wire
from hanse_common.charter import MAX_CHARTERS, Charter, Signatures, SignedCharter
from hanse_common.errors import DirectoryRefused
from hanse_common.membership import (
    Endorsements,
    Entity,
    Handover,
    NodeKey,
    OldIdentity,
    Request,
    SignedRequest,
)
from hanse_common.wire import Bytes32, Digest, Message, Name, Value

MAX_MEMBERS = 500
MAX_DIRECTORY_BYTES = 768 * 1024
"""Enough for `MAX_MEMBERS` with the longest names in any script and all that speaks for them."""

Time = Annotated[int, Field(ge=0, lt=1 << 40)]


class Entry(Value):
    """One member: what it asked to be entered with, what speaks for it, and until when it is one.

    `proof` is empty in what was listed without asking, as in a simulation; such entries are founders' at best.
    """

    name: Name
    entity: Entity
    identity: Bytes32
    expires: Time
    node_key: NodeKey = b""
    replaces: OldIdentity = b""
    proof: Annotated[bytes, Field(max_length=64)] = b""
    handover: Handover = b""
    endorsements: Endorsements = ()

    @classmethod
    def of(cls, asked: SignedRequest, expires: int) -> Self:
        """Return the entry that grants what was asked, until `expires`."""
        request = asked.request
        return cls(
            name=request.name,
            entity=request.entity,
            identity=request.identity,
            expires=expires,
            node_key=request.node_key,
            replaces=request.replaces,
            proof=asked.proof,
            handover=asked.handover,
            endorsements=asked.endorsements,
        )

    def asked(self, founding: bytes) -> SignedRequest:
        """Return what was asked, with its signatures, of the league whose founding charter has this digest.

        Raises `DirectoryRefused` when nothing was.
        """
        if not self.proof:
            raise DirectoryRefused(f"{self.name} is listed without its own request; expected one.")
        request = Request(
            charter=founding,
            name=self.name,
            entity=self.entity,
            identity=self.identity,
            node_key=self.node_key,
            replaces=self.replaces,
        )
        return SignedRequest(
            request=request, proof=self.proof, handover=self.handover, endorsements=self.endorsements
        )


class Directory(Message):
    """All members, sorted by name, under the charter of digest `charter`. `version` grows with every change."""

    kind: ClassVar[int] = 15

    league: Name
    charter: Digest
    version: Annotated[int, Field(ge=1, lt=1 << 31)]
    expires: Time
    entries: Annotated[tuple[Entry, ...], Field(min_length=1, max_length=MAX_MEMBERS)]

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        names = [entry.name for entry in self.entries]
        if names != sorted(names):
            raise ValueError("expected entries sorted by name")
        node_keys = [entry.node_key for entry in self.entries if entry.node_key]
        for what, values in (
            ("name", names),
            ("entity", [entry.entity.casefold() for entry in self.entries]),
            ("identity", [entry.identity for entry in self.entries]),
            ("node key", node_keys),
        ):
            if len(set(values)) != len(values):
                raise ValueError(f"found one {what} twice; expected one entry for each entity")
        return self

    def entities(self, now: float) -> dict[bytes, str]:
        """Return the entity behind each identity that is valid at `now`."""
        return {entry.identity: entry.entity for entry in self.entries if entry.expires > now}

    def identities(self) -> dict[str, bytes]:
        """Return the identity of each name."""
        return {entry.name: entry.identity for entry in self.entries}

    @property
    def digest(self) -> bytes:
        """The SHA-256 of the canonical bytes, 32 bytes."""
        return wire.digest(self)


class SignedDirectory(Message):
    """The canonical bytes of a directory, holders' signatures over them, and all charters of the league.

    Also the form of its file, complete or not.
    """

    kind: ClassVar[int] = 17

    charters: Annotated[tuple[SignedCharter, ...], Field(min_length=1, max_length=MAX_CHARTERS)]
    directory: Annotated[bytes, Field(max_length=MAX_DIRECTORY_BYTES)]
    signatures: Signatures = ()

    DOMAIN: ClassVar[str] = "directory"

    @classmethod
    def of(cls, directory: Directory, chain: Sequence[SignedCharter]) -> Self:
        """Return `directory` without a signature; `chain` are the league's charters, the founding one first."""
        return cls(charters=tuple(chain), directory=wire.encode(directory))

    def signed_by(self, key: Ed25519PrivateKey) -> Self:
        """Return it with the signature of a holder's `key`, too."""
        signatures = charters.with_signature(self.signatures, key, self.DOMAIN, self.directory)
        return self.model_copy(update={"signatures": signatures})

    def read(self) -> Directory:
        """Return the directory, whoever signed it. Raises `WireError`."""
        return wire.decode(Directory, self.directory, MAX_DIRECTORY_BYTES)

    def charter(self, pinned: bytes) -> Charter:
        """Return the charter in force, followed from the `pinned` digest. Raises as `charter.follow` does."""
        return charters.follow(self.charters, pinned)

    def open(self, pinned: bytes, now: float) -> Directory:
        """Return the directory.

        Raises `SignatureInvalid` unless the charter that follows from `pinned` is satisfied, `WireError` unless
        valid, `DirectoryRefused` when it is another league's, under another charter, or has expired at `now`.
        """
        charter = self.charter(pinned)
        charter.require_signed(self.DOMAIN, self.directory, self.signatures)
        directory = self.read()
        if (directory.league, directory.charter) != (charter.league, charter.digest):
            raise DirectoryRefused(
                f"found a directory of {directory.league} under another charter than its own, expected one of "
                f"{charter.league} under charter {charter.version}."
            )
        if directory.expires <= now:
            raise DirectoryRefused(
                f"The league's directory, version {directory.version}, has expired; whoever holds the league's key "
                "must sign a new one."
            )
        return directory


def require_admitted(
    directory: Directory, founding: bytes, endorsements: int, before: Directory | None
) -> None:
    """Raise `DirectoryRefused` unless everyone in `directory` was in `before` or was admitted since by its members.

    `founding` is the digest of the league's founding charter; a new member needs `endorsements` of members of
    different entities, or the handover of the identity that it replaces. They may have become members just now
    themselves, but not by each other's word alone. A merchant that has seen no directory yet has to believe its
    first one: it learns in person whose it is.

    Raises `SignatureInvalid` for a signature that does not verify, wherever it stands.
    """
    if before is None:
        for entry in directory.entries:
            if entry.proof:
                entry.asked(founding).require_sound()
        return
    members = {entry.identity: entry.entity.casefold() for entry in before.entries}
    new = [entry for entry in directory.entries if members.get(entry.identity) != entry.entity.casefold()]
    while new:
        waiting = [entry for entry in new if not _is_admitted(entry, founding, endorsements, members)]
        if len(waiting) == len(new):
            names = ", ".join(entry.name for entry in waiting[:5])
            raise DirectoryRefused(
                f"The league's directory, version {directory.version}: found {names} without the word of "
                f"{endorsements} members that were there before; expected that of each new member."
            )
        members |= {entry.identity: entry.entity.casefold() for entry in new if entry not in waiting}
        new = waiting


def _is_admitted(entry: Entry, founding: bytes, endorsements: int, members: dict[bytes, str]) -> bool:
    """Return whether the entry has what it needs of `members`, entities by identity. Raises as above."""
    if endorsements == 0:
        return True
    asked = entry.asked(founding)
    asked.require_sound()
    entity = entry.entity.casefold()
    if entry.replaces and members.get(entry.replaces) == entity:
        return True
    vouching = {members[one.identity] for one in entry.endorsements if one.identity in members}
    return len(vouching - {entity}) >= endorsements
