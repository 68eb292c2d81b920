"""The league's directory: who is a member, signed by a key that is not the operator's.

    signed = SignedDirectory.sign(directory, league_key)
    directory = signed.open(pinned_league_key, now)
    entities = directory.entities(now)

Secure aggregation assumes that at most c members of the whole directory are corrupt. An operator who could add members
would add corrupt ones; so whoever holds the league's key must not be the operator, and lists each entity, a business
or a person, once. Merchants pin the league's key and refuse a directory of an earlier version than they have seen.

All fields are public. Times are seconds since 1970, UTC.
"""

from typing import Annotated, ClassVar, Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import Field, model_validator

from hanse_common import signing, wire
from hanse_common.errors import DirectoryRefused
from hanse_common.wire import Bytes32, Message, Name, Signature, Value

MAX_MEMBERS = 1000
MAX_DIRECTORY_BYTES = 768 * 1024
"""Enough for `MAX_MEMBERS` with the longest names in any script, and the signature."""

Time = Annotated[int, Field(ge=0, lt=1 << 40)]


class Entry(Value):
    """One member: its name in the league, the entity behind it, its Ed25519 identity, and until when it is one."""

    name: Name
    entity: Annotated[str, Field(min_length=1, max_length=128)]
    identity: Bytes32
    expires: Time


class Directory(Message):
    """All members, sorted by name. `version` grows with every change."""

    kind: ClassVar[int] = 15

    league: Name
    version: Annotated[int, Field(ge=1, lt=1 << 31)]
    expires: Time
    entries: Annotated[tuple[Entry, ...], Field(min_length=1, max_length=MAX_MEMBERS)]

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        names = [entry.name for entry in self.entries]
        if names != sorted(names):
            raise ValueError("expected entries sorted by name")
        for what, values in (
            ("name", names),
            ("entity", [entry.entity.casefold() for entry in self.entries]),
            ("identity", [entry.identity for entry in self.entries]),
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
    """The canonical bytes of a directory with the league's signature over them; also the form of its file."""

    kind: ClassVar[int] = 17

    directory: Annotated[bytes, Field(max_length=MAX_DIRECTORY_BYTES)]
    signature: Signature

    DOMAIN: ClassVar[str] = "directory"

    @classmethod
    def sign(cls, directory: Directory, key: Ed25519PrivateKey) -> Self:
        """Return `directory` signed with the league's key."""
        data = wire.encode(directory)
        return cls(directory=data, signature=signing.sign(key, cls.DOMAIN, data))

    def open(self, league_key: bytes, now: float) -> Directory:
        """Return the directory.

        Raises `SignatureInvalid` unless `league_key` signed it, `WireError` unless valid, `DirectoryRefused` when it
        has expired at `now`.
        """
        signing.verify(league_key, self.DOMAIN, self.directory, self.signature)
        directory = wire.decode(Directory, self.directory, MAX_DIRECTORY_BYTES)
        if directory.expires <= now:
            raise DirectoryRefused(
                f"The league's directory, version {directory.version}, has expired; whoever holds the league's key "
                "must sign a new one."
            )
        return directory
