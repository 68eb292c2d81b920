"""The cryptographic suite, and how everything is bound to what it was made for.

    ctx₀  = H(Setup)            plan, first round, number of rounds, attempt, directory, suite
    ctx   = H(ctx₀, roster)     … and exactly who takes part with which keys
    ctx_r = H(ctx, round, model digest)

One of them enters every key derivation, every associated data and every signature. Two merchants that were shown
different rosters, models or rounds therefore share no key and accept no signature of each other: a server that
shows two things gets garbage or silence.

X25519 (RFC 7748), HKDF-SHA256 (RFC 5869), AES-256-CTR as mask generator (NIST SP 800-38A), AES-256-GCM (NIST SP
800-38D), Ed25519 (RFC 8032), Shamir over the least prime above 2²⁵⁶, sums mod 2³².
"""

import hashlib
import hmac
import re
from typing import Annotated, Any, ClassVar

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from pydantic import Field

from hanse_common import wire
from hanse_common.wire import Bytes32, Digest, Message, RoundNumber

SUITE = "x25519-hkdfsha256-aes256ctr-aes256gcm-ed25519-shamir257-mod2^32"
KEY_BYTES = 32

MAX_SETUP_ROUNDS = 64
"""Most rounds of one set-up: bounds what a roster and its shares take to send."""

_ONCE = bytes(12)
"""Nonce of AES-GCM: each key is derived for one message and seals nothing else."""


class Setup(Message):
    """What a set-up is for: `rounds` rounds of a plan from `round` on. `attempt` only grows within a plan."""

    kind: ClassVar[int] = 20

    suite: Annotated[str, Field(pattern=f"^{re.escape(SUITE)}$")] = SUITE
    plan_digest: Digest
    round: RoundNumber
    rounds: Annotated[int, Field(ge=1, le=MAX_SETUP_ROUNDS)]
    attempt: RoundNumber
    directory_digest: Digest

    @property
    def context(self) -> bytes:
        """ctx₀, 32 bytes."""
        return wire.digest(self)

    @property
    def work(self) -> dict[str, Any]:
        """The identity of the set-up's own messages: plan digest, first round, attempt."""
        return {"plan_digest": self.plan_digest, "round": self.round, "attempt": self.attempt}


class _RoundContext(Message):
    kind: ClassVar[int] = 21

    context: Digest
    round: RoundNumber
    model_digest: Digest


def round_context(context: bytes, round_: int, model_digest: bytes) -> bytes:
    """Return ctx_r, 32 bytes, of the round `round_` from the model of that digest, in the roster of ctx."""
    return wire.digest(_RoundContext(context=context, round=round_, model_digest=model_digest))


def agree(own: X25519PrivateKey, other: bytes) -> bytes:
    """Return the secret, 32 bytes, shared with the holder of the public key `other`.

    Raises `ValueError` for a point of low order, with which everybody would share the same secret.
    """
    return own.exchange(X25519PublicKey.from_public_bytes(other))


def derive(secret: bytes, purpose: str, context: bytes, *parties: bytes) -> bytes:
    """Return a key, 32 bytes, from `secret`, for one purpose, context and ordered parties (32 bytes each)."""
    info = b"hanse " + purpose.encode() + b"\0" + context + b"".join(parties)
    return HKDF(algorithm=hashes.SHA256(), length=KEY_BYTES, salt=None, info=info).derive(secret)


def pair_mask_key(secret: bytes, context: bytes, one: bytes, other: bytes) -> bytes:
    """Return the key of the mask that the identities `one` and `other` share; their order does not matter."""
    return derive(secret, "pair mask", context, *sorted((one, other)))


def self_mask_key(seed: bytes, context: bytes, identity: bytes) -> bytes:
    """Return the key of the mask that `identity` alone adds."""
    return derive(seed, "self mask", context, identity)


def seal(secret: bytes, context: bytes, dealer: bytes, holder: bytes, data: bytes) -> bytes:
    """Return `data` encrypted from `dealer` to `holder`: once for each shared secret, context and direction."""
    key = derive(secret, "shares", context, dealer, holder)
    return AESGCM(key).encrypt(_ONCE, data, context + dealer + holder)


def unseal(secret: bytes, context: bytes, dealer: bytes, holder: bytes, sealed: bytes) -> bytes:
    """Return what `seal` was given. Raises `cryptography.exceptions.InvalidTag` for anything else."""
    key = derive(secret, "shares", context, dealer, holder)
    return AESGCM(key).decrypt(_ONCE, sealed, context + dealer + holder)


def blind(blinding: bytes, round_: int, kind: bytes) -> bytes:
    """Return the value, 32 bytes, that hides the share of a round and kind in its commitment.

    Each is revealed with its share; the others stay pseudorandom, since `blinding` stays secret.
    """
    return hmac.digest(blinding, round_.to_bytes(4, "big") + kind, "sha256")


def commit(
    context: bytes, dealer: bytes, holder: bytes, round_: int, kind: bytes, blinded: bytes, share: bytes
) -> bytes:
    """Return the commitment, 32 bytes, to one share: binding to it, and hiding while `blinded` is secret."""
    header = b"hanse share\0" + context + dealer + holder + round_.to_bytes(4, "big") + kind
    return hashlib.sha256(header + blinded + share).digest()


def seed_digest(context: bytes, round_: int, identity: bytes, seed: bytes) -> bytes:
    """Return the digest, 32 bytes, by which a recovered seed is known to be the one that was dealt."""
    header = b"hanse seed\0" + context + identity + round_.to_bytes(4, "big")
    return hashlib.sha256(header + seed).digest()


class CounterStatement(Message):
    """What a merchant signs of its ledger: how many charges it has. Domain "counter"."""

    kind: ClassVar[int] = 22

    identity: Bytes32
    counter: Annotated[int, Field(ge=0, lt=1 << 63)]


class JoinStatement(Message):
    """What a merchant signs of its fresh keys, under ctx₀. Domain "join"."""

    kind: ClassVar[int] = 23

    context: Digest
    identity: Bytes32
    sealing_key: Bytes32
    mask_keys: bytes


class PacketStatement(Message):
    """What a dealer signs of the shares for one holder, under ctx. Domain "packet"."""

    kind: ClassVar[int] = 24

    context: Digest
    dealer: Bytes32
    holder: Bytes32
    sealed: bytes
    commitments: bytes


class SurvivorStatement(Message):
    """What a survivor signs, once a round, under ctx_r: who survived, as places in the roster. Domain "survivors"."""

    kind: ClassVar[int] = 25

    context: Digest
    survivors: tuple[int, ...]
