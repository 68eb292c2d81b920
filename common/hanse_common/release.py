"""A release: the operator's signed word which recognizer is the league's now.

    signed = SignedRelease.sign(release, operator_key)
    release = signed.open(pinned_key)
    release.require_successor_of(number_seen)

Numbers of releases only grow, so that nobody can bring back an earlier one; to go back to an earlier recognizer is a
release of its own, with a higher number. What is released is named by the digest of its card, and the card names every
other file, so whoever checked the signature knows every bit.

All fields are public information.
"""

from typing import Annotated, ClassVar, Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import Field, model_validator

from hanse_common import signing, wire
from hanse_common.errors import ReleaseRefused
from hanse_common.wire import Digest, Message, Name, Signature, Value

MAX_RELEASE_BYTES = 1 << 16
MAX_FILE_BYTES = 1 << 31
FILES = ("card.json", "centre.safetensors", "model.safetensors", "whitening.safetensors")
"""The only names that a recognizer's files have. No other is ever written on a merchant's disk."""


class ReleasedFile(Value):
    """One file of a recognizer: its name, its SHA-256 and how many bytes it has."""

    name: Annotated[str, Field(pattern=r"^[a-z]{1,32}\.(json|safetensors)$")]
    digest: Digest
    size: Annotated[int, Field(ge=1, le=MAX_FILE_BYTES)]


class Release(Message):
    """The `number`-th release of the league. `recognizer` is the digest of its card, `reason` is for people."""

    kind: ClassVar[int] = 38
    since: ClassVar[int] = 2

    league: Name
    number: Annotated[int, Field(ge=1, lt=1 << 31)]
    version: Annotated[int, Field(ge=1, lt=1 << 31)]
    recognizer: Digest
    files: Annotated[tuple[ReleasedFile, ...], Field(min_length=2, max_length=len(FILES))]
    made: Annotated[int, Field(ge=0, lt=1 << 40)]
    reason: Annotated[str, Field(max_length=500)] = ""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        names = [file.name for file in self.files]
        if names != sorted(set(names)) or not set(names) <= set(FILES):
            raise ValueError(f"files: expected some of {', '.join(FILES)}, each once, in order")
        cards = [file.digest for file in self.files if file.name == "card.json"]
        if cards != [self.recognizer] or "model.safetensors" not in names:
            raise ValueError("files: expected a card, of the recognizer's digest, and a model")
        return self

    def require_successor_of(self, seen: int) -> None:
        """Raise `ReleaseRefused` unless this release came after the one with the number `seen`."""
        if self.number <= seen:
            raise ReleaseRefused(f"found release {self.number}, release {seen} was seen before.")


class SignedRelease(Message):
    """The canonical bytes of a release with the operator's signature over them."""

    kind: ClassVar[int] = 39
    since: ClassVar[int] = 2

    release: Annotated[bytes, Field(max_length=MAX_RELEASE_BYTES)]
    signature: Signature

    DOMAIN: ClassVar[str] = "release"

    @classmethod
    def sign(cls, release: Release, key: Ed25519PrivateKey) -> Self:
        """Return `release` signed with the operator's key."""
        data = wire.encode(release)
        return cls(release=data, signature=signing.sign(key, cls.DOMAIN, data))

    def open(self, public_key: bytes) -> Release:
        """Return the release. Raises `SignatureInvalid` unless `public_key` signed it, `WireError` unless valid."""
        signing.verify(public_key, self.DOMAIN, self.release, self.signature)
        return wire.decode(Release, self.release, MAX_RELEASE_BYTES)
