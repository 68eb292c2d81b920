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

import unicodedata
from collections.abc import Collection, Sequence
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

MAX_MEMBERS = 450
MAX_FORMER = 50
MAX_DIRECTORY_BYTES = 768 * 1024
"""Enough for `MAX_MEMBERS` and `MAX_FORMER` with the longest names in any script and all that speaks for them."""

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

    @property
    def entity_key(self) -> str:
        """The entity as it is compared: one business is one, however it is spelled."""
        return " ".join(unicodedata.normalize("NFKC", self.entity).casefold().split())

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
    """All members, sorted by name, under the charter of digest `charter`. `version` grows with every change.

    `former` are members that left of late. They are none any more; a merchant that was away while they came and went
    learns from them who vouched for those that came after.
    """

    kind: ClassVar[int] = 15

    league: Name
    charter: Digest
    version: Annotated[int, Field(ge=1, lt=1 << 31)]
    expires: Time
    entries: Annotated[tuple[Entry, ...], Field(min_length=1, max_length=MAX_MEMBERS)]
    former: Annotated[tuple[Entry, ...], Field(max_length=MAX_FORMER)] = ()

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        names = [entry.name for entry in self.entries]
        if names != sorted(names):
            raise ValueError("expected entries sorted by name")
        node_keys = [entry.node_key for entry in self.entries if entry.node_key]
        for what, values in (
            ("name", names),
            ("entity", [entry.entity_key for entry in self.entries]),
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

    def follow(self, pinned: bytes) -> tuple[Charter, ...]:
        """Return the league's charters from the `pinned` digest on. Raises as `charter.follow` does."""
        return charters.follow(self.charters, pinned)

    def open(self, pinned: bytes, now: float) -> Directory:
        """Return the directory.

        Raises `SignatureInvalid` unless the charter that follows from `pinned` is satisfied, `WireError` unless
        valid, `DirectoryRefused` when it is another league's, under another charter, or has expired at `now`.
        """
        charter = self.follow(pinned)[-1]
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
    directory: Directory, chain: Sequence[Charter], before: Directory | None, gone: Collection[bytes] = ()
) -> None:
    """Raise `DirectoryRefused` unless everyone in `directory` was in `before` or was admitted since by its members.

    `chain` are the league's charters. A new member needs the word of members of different entities, as many as the
    charter asked for under which `before` was made, or the handover of the identity that it replaces. They may have
    become members just now themselves, but not by each other's word alone. Identities that are `gone` do not come back:
    old words would let in whoever was removed, or a stolen identity that was replaced. A merchant that has seen no
    directory yet has to believe its first one: it learns in person whose it is.

    Also raises `DirectoryRefused` when the charter under which `before` was made is not in `chain`, and
    `SignatureInvalid` for a signature that does not verify, wherever it stands.
    """
    founding = chain[0].digest
    if before is None:
        for entry in directory.entries:
            if entry.proof:
                entry.asked(founding).require_sound()
        return
    charter = next((one for one in chain if one.digest == before.charter), None)
    if charter is None:
        raise DirectoryRefused(
            f"The charters of {directory.league} do not come from the one under which its directory was seen before: "
            "somebody signed a fork."
        )
    known = {entry.identity: entry for entry in before.entries}
    members = {entry.identity: entry.entity_key for entry in before.entries}
    new = []
    for entry in directory.entries:
        old = known.get(entry.identity)
        if old is None or old.entity_key != entry.entity_key:
            new.append(entry)
        elif (old.name, old.node_key) != (entry.name, entry.node_key) and charter.endorsements:
            entry.asked(founding).require_sound()
    if charter.endorsements == 0:
        return
    returned = sorted(entry.name for entry in new if entry.identity in gone)
    if returned:
        raise DirectoryRefused(
            f"The league's directory, version {directory.version}: found {', '.join(returned[:5])} with an identity "
            "that had left; expected a new one."
        )
    steps = [*new, *(entry for entry in directory.former if entry.identity not in members)]
    while new:
        admitted = [entry for entry in steps if _is_admitted(entry, founding, charter.endorsements, members)]
        if not admitted:
            names = ", ".join(entry.name for entry in new[:5])
            raise DirectoryRefused(
                f"The league's directory, version {directory.version}: found {names} without the word of "
                f"{charter.endorsements} members that were there before; expected that of each new member."
            )
        members |= {entry.identity: entry.entity_key for entry in admitted}
        new = [entry for entry in new if entry not in admitted]
        steps = [entry for entry in steps if entry not in admitted]


def _is_admitted(entry: Entry, founding: bytes, endorsements: int, members: dict[bytes, str]) -> bool:
    """Return whether the entry has what it needs of `members`, entities by identity. Raises as above."""
    asked = entry.asked(founding)
    asked.require_sound()
    if entry.replaces and members.get(entry.replaces) == entry.entity_key:
        return True
    vouching = {members[one.identity] for one in entry.endorsements if one.identity in members}
    return len(vouching - {entry.entity_key}) >= endorsements
