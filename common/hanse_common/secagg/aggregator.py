"""The server's side of secure aggregation: it relays what it cannot read, and gets the sum.

    aggregator = Aggregator(setup, parameters, entities)
    aggregator.add_member(joined) …                     then    roster = aggregator.roster()
    aggregator.add_shares(identity, shares) …           then    aggregator.delivery(identity) for each
    sum_ = aggregator.open_round(round_, model_digest, dimension)
    sum_.add_vector(identity, vector) …                 then    survivors = sum_.survivors()
    sum_.add_agreed(identity, agreed) …                 then    agreement = sum_.agreement()
    sum_.add_unmasked(identity, unmasked) …             then    total = sum_.total()

Merchants' safety does not rest on anything here: this is the honest server's own view, with the checks that let it
name who breaks the protocol (`Misbehaviour`) and finish with the others. Uploads are added as they come, so memory
is O(d) for a round, whatever the number of merchants, besides the set-up's O(n²) shares.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from numpy.typing import NDArray

from hanse_common.secagg import ring, shamir, suite, transcript
from hanse_common.secagg.faults import Misbehaviour, Refusal, SumLost
from hanse_common.secagg.masking import Mask, apply_masks
from hanse_common.secagg.messages import (
    COMMITMENTS_BYTES,
    OPENING_BYTES,
    SEALED_BYTES,
    SHARES_BYTES,
    Agreed,
    Agreement,
    Delivery,
    Joined,
    Member,
    Roster,
    Shares,
    Survivors,
    Unmasked,
    Upload,
)
from hanse_common.secagg.parameters import Parameters
from hanse_common.secagg.suite import Setup
from hanse_common.secagg.transcript import KEY, SEED
from hanse_common.wire import Buffer


class Aggregator:
    """One set-up. `entities` maps the directory's valid identities to the entity behind each."""

    def __init__(self, setup: Setup, parameters: Parameters, entities: Mapping[bytes, str]) -> None:
        self.setup = setup
        self.parameters = parameters
        self._entities = entities
        self._joined: dict[bytes, Member] = {}
        self._keys: set[bytes] = set()
        self._probe = X25519PrivateKey.generate()
        self.members: tuple[Member, ...] = ()
        self.context = b""
        self._places: dict[bytes, int] = {}
        self._shares: dict[int, Shares] = {}

    def add_member(self, identity: bytes, joined: Joined) -> None:
        """Take the keys of the merchant with that identity. Raises `Misbehaviour`.

        What would make every merchant refuse the roster is refused here, where it costs its sender alone. Honest keys
        are fresh and secret until all have joined, so who comes second with a key has copied it.
        """
        member = joined.member
        if member.identity != identity or identity not in self._entities or identity in self._joined:
            raise Misbehaviour("joined in another's name, twice, or without being in the directory")
        try:
            transcript.check_member(self.setup, member)
        except Refusal as refusal:
            raise Misbehaviour(str(refusal)) from None
        keys = transcript.public_keys(member)
        if len(self._keys.union(keys)) < len(self._keys) + len(keys):
            raise Misbehaviour("joined with one key twice, or with another's")
        try:
            for key in keys:
                suite.agree(self._probe, key)
        except ValueError:
            raise Misbehaviour("joined with a key of low order") from None
        self._keys.update(keys)
        self._joined[identity] = member

    def roster(self) -> Roster:
        """Return who takes part, and take nobody else. Raises `Refusal` when no merchant would accept it."""
        members = tuple(self._joined[identity] for identity in sorted(self._joined))
        transcript.check_roster(self.setup, self.parameters, self._entities, members)
        self.members = members
        self.context = transcript.roster_context(self.setup, members)
        self._places = {member.identity: place for place, member in enumerate(members)}
        return Roster(**self.setup.work, members=members)

    def add_shares(self, identity: bytes, shares: Shares) -> None:
        """Take one merchant's packets for all others. Raises `Misbehaviour`."""
        place = self._places[identity]
        rounds = self.setup.rounds
        if len(shares.packets) != len(self.members) or len(shares.seed_digests) != 32 * rounds:
            raise Misbehaviour("shared with another number of members or for another number of rounds")
        for other, packet in enumerate(shares.packets):
            sealed = 0 if other == place else SEALED_BYTES + SHARES_BYTES * rounds
            if len(packet.sealed) != sealed or len(packet.commitments) != COMMITMENTS_BYTES * rounds:
                raise Misbehaviour("shared packets of another length")
            statement = transcript.packet_statement(
                self.context, identity, self.members[other].identity, packet.sealed, packet.commitments
            )
            if not transcript.verifies(identity, "packet", statement, packet.signature):
                raise Misbehaviour("did not sign its shares")
        self._shares[place] = shares

    def missing_shares(self) -> tuple[bytes, ...]:
        """Return the identities of the members whose shares are not here."""
        return tuple(m.identity for place, m in enumerate(self.members) if place not in self._shares)

    def delivery(self, identity: bytes) -> Delivery:
        """Return the packets for one merchant. All members must have shared."""
        own = self._places[identity]
        packets = [self._shares[place].packets[own] for place in range(len(self.members)) if place != own]
        return Delivery(**self.setup.work, packets=tuple(packets))

    def place(self, identity: bytes) -> int:
        """Return the identity's place in the roster."""
        return self._places[identity]

    def open_round(self, round_: int, model_digest: bytes, dimension: int) -> "MaskedSum":
        """Return the sum of one round from the model with that digest."""
        return MaskedSum(self, round_, model_digest, dimension)

    def packet_commitment(self, dealer: int, holder: int, number: int, kind: bytes) -> bytes:
        """Return the commitment of `dealer` to the share of one round and kind for `holder`."""
        return transcript.commitment_of(self._shares[dealer].packets[holder], number, kind)

    def seed_digest(self, dealer: int, number: int) -> bytes:
        """Return the digest by which the dealer's seed of a round is known."""
        return self._shares[dealer].seed_digests[32 * number : 32 * (number + 1)]


class MaskedSum:
    """The sum of one round: O(d) memory, uploads added as they come."""

    def __init__(self, aggregator: Aggregator, round_: int, model_digest: bytes, dimension: int) -> None:
        self._aggregator = aggregator
        self._setup = aggregator.setup
        self._members = aggregator.members
        self._round = round_
        self._number = round_ - aggregator.setup.round
        self._context = suite.round_context(aggregator.context, round_, model_digest)
        self._total = np.zeros(dimension, dtype=np.uint32)
        self._uploaded: set[int] = set()
        self._survivors: tuple[int, ...] = ()
        self._signatures: dict[int, bytes] = {}
        self._openings: dict[int, tuple[int, ...]] = {}

    @property
    def work(self) -> dict[str, Any]:
        """The identity of the round's messages."""
        return self._setup.work | {"round": self._round}

    @property
    def places(self) -> tuple[int, ...]:
        """The survivors' places in the roster, once they are named."""
        return self._survivors

    def add_upload(self, identity: bytes, upload: Upload) -> None:
        """Add the masked update in `upload`, as `add_vector` does."""
        self.add_vector(identity, upload.vector)

    def add_vector(self, identity: bytes, vector: Buffer) -> None:
        """Add one masked update, 4·d bytes, in place and without a copy of it.

        Raises `Misbehaviour` when it is a second one of that merchant, or of another length.
        """
        place = self._aggregator.place(identity)
        if place in self._uploaded or self._survivors:
            raise Misbehaviour("uploaded twice, or after the survivors were named")
        try:
            residues = ring.from_bytes(vector, self._total.size)
        except ValueError as error:
            raise Misbehaviour(str(error)) from None
        np.add(self._total, residues, out=self._total)
        self._uploaded.add(place)

    def survivors(self) -> Survivors:
        """Return whose uploads are in the sum, and take no more. Raises `SumLost` when they are too few."""
        required = self._aggregator.parameters.required(len(self._members))
        if len(self._uploaded) < required:
            raise SumLost(f"{len(self._uploaded)} of {len(self._members)} uploaded, {required} are needed")
        self._survivors = tuple(sorted(self._uploaded))
        return Survivors(**self.work, places=self._survivors)

    def add_agreed(self, identity: bytes, agreed: Agreed) -> None:
        """Take a survivor's signature over the set. Raises `Misbehaviour`."""
        place = self._aggregator.place(identity)
        statement = transcript.survivor_statement(self._context, self._survivors)
        signed = transcript.verifies(identity, "survivors", statement, agreed.signature)
        if place not in self._survivors or not signed:
            raise Misbehaviour("did not sign the survivors, or signed others")
        self._signatures[place] = agreed.signature

    def agreement(self) -> Agreement:
        """Return the signatures. Raises `SumLost` when they are too few for anybody to help."""
        quorum = self._aggregator.parameters.quorum(len(self._members))
        if len(self._signatures) < quorum:
            raise SumLost(f"{len(self._signatures)} signed the survivors, {quorum} are needed")
        places = tuple(sorted(self._signatures))
        return Agreement(
            **self.work, places=places, signatures=b"".join(self._signatures[place] for place in places)
        )

    def add_unmasked(self, identity: bytes, unmasked: Unmasked) -> None:
        """Take one merchant's openings. Raises `Misbehaviour` unless each is what its dealer committed to."""
        holder = self._aggregator.place(identity)
        openings = unmasked.openings
        if len(openings) != OPENING_BYTES * len(self._members):
            raise Misbehaviour("opened another number of shares")
        found = []
        for dealer, member in enumerate(self._members):
            opening = openings[OPENING_BYTES * dealer : OPENING_BYTES * (dealer + 1)]
            share, blinded = opening[: shamir.SHARE_BYTES], opening[shamir.SHARE_BYTES :]
            kind = self._kind(dealer)
            expected = self._aggregator.packet_commitment(dealer, holder, self._number, kind)
            context = self._aggregator.context
            if expected != suite.commit(
                context, member.identity, identity, self._round, kind, blinded, share
            ):
                raise Misbehaviour("opened a share that its dealer did not commit to")
            found.append(int.from_bytes(share, "big"))
        self._openings[holder] = tuple(found)

    def total(self, threads: int = 1) -> NDArray[np.uint32]:
        """Return the sum mod 2³² of the survivors' updates, shape (d,), dtype uint32. It can be taken once.

        Raises `SumLost` when too few helped, or when what a merchant dealt does not give back its secret: shares
        that all match its own commitments and do not lie on one polynomial are its own fault.
        """
        threshold = self._aggregator.parameters.threshold(len(self._members))
        if len(self._openings) < threshold:
            raise SumLost(f"{len(self._openings)} helped to unmask, {threshold} are needed")
        holders = tuple(sorted(self._openings))[:threshold]
        factors = shamir.weights(holders)
        masks: list[Mask] = []
        culprits = []
        for dealer, member in enumerate(self._members):
            shares = {holder: self._openings[holder][dealer] for holder in holders}
            secret = shamir.combine(shares, factors)
            found = self._masks_of(dealer, secret.to_bytes(shamir.SHARE_BYTES, "big"))
            if found is None:
                culprits.append(member.identity)
            else:
                masks += found
        if culprits:
            raise SumLost(f"{len(culprits)} merchants dealt shares of something else", tuple(culprits))
        apply_masks(self._total, masks, threads)
        return self._total

    def _kind(self, place: int) -> bytes:
        return SEED if place in self._survivors else KEY

    def _masks_of(self, dealer: int, secret: bytes) -> list[Mask] | None:
        """Return the masks that take the member's out of the sum, or None if the secret is not the one it dealt."""
        member = self._members[dealer]
        if secret[0]:
            return None  # in the field, and longer than any secret is
        secret = secret[1:]
        if self._kind(dealer) == SEED:
            found = suite.seed_digest(self._aggregator.context, self._round, member.identity, secret)
            if found != self._aggregator.seed_digest(dealer, self._number):
                return None
            return [Mask(suite.self_mask_key(secret, self._context, member.identity), subtract=True)]
        key = X25519PrivateKey.from_private_bytes(secret)
        if key.public_key().public_bytes_raw() != transcript.mask_key(member, self._number):
            return None
        # A survivor with a higher place added its stream with this member, one with a lower place subtracted it.
        masks = []
        for place in self._survivors:
            other = self._members[place]
            shared = suite.agree(key, transcript.mask_key(other, self._number))
            pair = suite.pair_mask_key(shared, self._context, member.identity, other.identity)
            masks.append(Mask(pair, subtract=place < dealer))
        return masks
