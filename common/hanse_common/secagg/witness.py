"""Ledger counters that merchants remember of each other, so that a ledger put back from a backup is noticed.

In each set-up a merchant tells every other, sealed, how many charges its ledger has, signed; and it returns to each
the highest signed counter that it ever saw from it. Nobody can claim a counter that its owner did not sign, and the
server, which carries all this, sees neither.
"""

from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hanse_common import signing, wire
from hanse_common.errors import SignatureInvalid
from hanse_common.secagg.suite import CounterStatement


@dataclass(frozen=True)
class Witness:
    """A ledger counter with its owner's signature: what one merchant remembers of another."""

    counter: int
    signature: bytes

    def to_bytes(self) -> bytes:
        """Return `COUNTER_BYTES` bytes."""
        return self.counter.to_bytes(8, "big") + self.signature

    @classmethod
    def sign(cls, identity: Ed25519PrivateKey, counter: int) -> "Witness":
        """Return what the owner of `identity` says of its ledger."""
        statement = CounterStatement(identity=signing.public_bytes(identity), counter=counter)
        return cls(counter, signing.sign(identity, "counter", wire.encode(statement)))

    @classmethod
    def from_bytes(cls, data: bytes, owner: bytes) -> "Witness":
        """Return what `data` says of the ledger of the identity `owner`. Raises `SignatureInvalid`."""
        counter = int.from_bytes(data[:8], "big")
        if counter >= 1 << 63:
            raise SignatureInvalid("A counter out of range.")
        statement = CounterStatement(identity=owner, counter=counter)
        signing.verify(owner, "counter", wire.encode(statement), data[8:])
        return cls(counter, data[8:])


NO_WITNESS = Witness(0, bytes(64))
"""Said to a peer never met before. It has the size of any other: what the server carries tells it nothing."""
