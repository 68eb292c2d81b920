"""A merchant's side of secure aggregation. The methods are in the order of the trips: read them from top to bottom.

    merchant = Merchant(setup, parameters, identity, entities)
    joined = merchant.join()
    shares = merchant.share(roster, counter, witnesses)
    counters, ready = merchant.receive(delivery)
    for each round:
        merchant.open_round(round_, model_digest)       # before anything is charged
        merchant.mask(residues)                         # after the photos were used
        agreed = merchant.agree(survivors)
        unmasked = merchant.unmask(agreement)

The server may be corrupt, and c merchants with it. It may say anything to anyone; each check here says what it
stops. Whatever it does, an honest merchant's upload is unmasked only inside one sum of at least n_min uploads, of
which at most c are corrupt merchants' [Bonawitz et al. 2017, theorem 6.5, with the roster fixed before the shares].

Each method works in its turn, for each round once; anything else raises `Refusal`, and so does a message that is not
of this set-up. After a refusal the object is of no further use. Nothing here can be resumed: secrets are in this
object only, and a merchant that crashes is a dropout until the next set-up. Python cannot wipe memory; secrets are
dropped as soon as nothing needs them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from numpy.typing import NDArray

from hanse_common import signing
from hanse_common.errors import SignatureInvalid
from hanse_common.randomness import secret_bytes
from hanse_common.secagg import shamir, suite, transcript
from hanse_common.secagg.faults import Fault, Refusal, require
from hanse_common.secagg.masking import Mask, apply_masks
from hanse_common.secagg.messages import (
    SEALED_BYTES,
    SHARES_BYTES,
    Agreed,
    Agreement,
    Delivery,
    Joined,
    Member,
    Packet,
    Ready,
    Roster,
    Shares,
    Survivors,
    Unmasked,
    Work,
)
from hanse_common.secagg.parameters import Parameters
from hanse_common.secagg.suite import Setup
from hanse_common.secagg.transcript import KEY, SEED
from hanse_common.secagg.witness import NO_WITNESS, Witness


@dataclass
class _Round:
    """The open round: its work, ctx_r, masks not yet used, and the survivors signed for."""

    number: int
    work: dict[str, Any]
    context: bytes
    masks: list[Mask] = field(repr=False)
    survivors: tuple[int, ...] | None = None


class Merchant:
    """One merchant in one set-up.

    `identity` is its directory key; `entities` maps the directory's valid identities to the entity behind each.
    """

    def __init__(
        self,
        setup: Setup,
        parameters: Parameters,
        identity: Ed25519PrivateKey,
        entities: Mapping[bytes, str],
    ) -> None:
        self._setup = setup
        self._parameters = parameters
        self._identity = identity
        self._own = signing.public_bytes(identity)
        self._entities = entities
        self._sealing = X25519PrivateKey.generate()
        self._keys = [X25519PrivateKey.generate() for _ in range(setup.rounds)]
        self._seeds = [secret_bytes(suite.KEY_BYTES) for _ in range(setup.rounds)]
        self._member: Member | None = None
        self._members: tuple[Member, ...] = ()
        self._place = 0
        self._context = b""
        self._counter = 0
        self._channels: dict[int, bytes] = {}
        self._pairs: list[dict[int, bytes]] = [{} for _ in range(setup.rounds)]
        self._held: list[dict[int, bytes]] = [{} for _ in range(setup.rounds)]
        self._blindings: dict[int, bytes] = {}
        self._is_ready = False
        self._next_round = setup.round
        self._round: _Round | None = None

    def join(self) -> Joined:
        """Return this merchant's fresh keys, signed under ctx₀."""
        require(self._member is None, Fault.ORDER, "asked twice to join")
        sealing = self._sealing.public_key().public_bytes_raw()
        masks = b"".join(key.public_key().public_bytes_raw() for key in self._keys)
        statement = transcript.join_statement(self._setup, self._own, sealing, masks)
        signature = signing.sign(self._identity, "join", statement)
        self._member = Member(identity=self._own, sealing_key=sealing, mask_keys=masks, signature=signature)
        return Joined(**self._setup.work, member=self._member)

    def share(self, roster: Roster, counter: int, witnesses: Mapping[bytes, Witness]) -> Shares:
        """Return this merchant's shares for everyone in the roster.

        `counter` is its ledger's, `witnesses` what it remembers of other ledgers, by identity.
        """
        self._require_setup(roster)
        require(self._member is not None and not self._members, Fault.ORDER, "asked twice to share")
        members = roster.members
        transcript.check_roster(self._setup, self._parameters, self._entities, members)
        places = [place for place, member in enumerate(members) if member == self._member]
        require(bool(places), Fault.ROSTER, "the roster does not have this merchant as it joined")
        self._members, self._place = members, places[0]
        self._context = transcript.roster_context(self._setup, members)
        self._counter = counter
        self._exchange_keys()
        packets = self._deal(Witness.sign(self._identity, counter), witnesses)
        digests = [
            suite.seed_digest(self._context, self._setup.round + number, self._own, seed)
            for number, seed in enumerate(self._seeds)
        ]
        self._keys = []  # what is left to do with them, only those who hold their shares may do
        del self._sealing  # it would open all packets again, with the shares of rounds that are forgotten
        return Shares(**self._setup.work, seed_digests=b"".join(digests), packets=packets)

    def receive(self, delivery: Delivery) -> tuple[dict[bytes, Witness], Ready]:
        """Take the other members' shares; return their ledgers' counters, to be remembered, and that all is there.

        An authentic share of **every** member's secrets is needed before anything is uploaded. A victim that went on
        with fewer, and masked with those alone, could be told of few, whom the others are then told have dropped
        out: they would open its seed and the keys of all its partners, which is every mask that it has.
        """
        self._require_setup(delivery)
        require(bool(self._members) and not self._is_ready, Fault.ORDER, "shares came out of turn")
        others = [place for place in range(len(self._members)) if place != self._place]
        found = len(delivery.packets)
        require(found == len(others), Fault.SHARES, f"found shares of {found} others, expected {len(others)}")
        counters = {
            self._members[place].identity: self._open(place, packet)
            for place, packet in zip(others, delivery.packets, strict=True)
        }
        self._channels = {}
        self._is_ready = True
        return counters, Ready(**self._setup.work)

    def open_round(self, round_: int, model_digest: bytes) -> None:
        """Get the masks of a round from the model with that digest. Rounds may be left out, never repeated."""
        require(self._is_ready, Fault.ORDER, "a round was begun before everyone's shares were there")
        number = round_ - self._setup.round
        timely = self._next_round <= round_ and number < self._setup.rounds
        require(timely, Fault.ORDER, "found a round that is over, or not of this set-up")
        for passed in range(self._next_round - self._setup.round, number):
            self._forget(passed)
        self._next_round = round_ + 1
        context = suite.round_context(self._context, round_, model_digest)
        masks = [Mask(suite.self_mask_key(self._seeds[number], context, self._own))]
        for place, secret in self._pairs[number].items():
            key = suite.pair_mask_key(secret, context, self._own, self._members[place].identity)
            masks.append(Mask(key, subtract=place < self._place))
        self._seeds[number], self._pairs[number] = b"", {}
        if self._round is not None:
            self._forget(self._round.number)
        self._round = _Round(number, self._setup.work | {"round": round_}, context, masks)

    def mask(self, residues: NDArray[np.uint32], threads: int = 1) -> None:
        """Mask the update, shape (d,), dtype uint32, in place: one stream of its own, one for every other member."""
        opened = self._round
        if opened is None or not opened.masks:
            raise Refusal(Fault.ORDER, "no update is to be masked")
        masks, opened.masks = opened.masks, []
        apply_masks(residues, masks, threads)

    def agree(self, survivors: Survivors) -> Agreed:
        """Return the signature over the survivor set: one a round, so that no other can ever be agreed on."""
        opened = self._opened(survivors)
        require(not opened.masks, Fault.ORDER, "survivors were named before the upload")
        require(opened.survivors is None, Fault.SURVIVORS, "found a second survivor set in one round")
        places, required = survivors.places, self._parameters.required(len(self._members))
        enough = len(places) >= required
        require(enough, Fault.SURVIVORS, f"found {len(places)} survivors, expected {required} or more")
        require(places[-1] < len(self._members), Fault.SURVIVORS, "found one who is not in the roster")
        require(self._place in places, Fault.SURVIVORS, "the survivors lack this merchant, which uploaded")
        opened.survivors = places
        statement = transcript.survivor_statement(opened.context, places)
        return Agreed(**survivors.work, signature=signing.sign(self._identity, "survivors", statement))

    def unmask(self, agreement: Agreement) -> Unmasked:
        """Return an opening for each member: of a survivor's seed, of another's key, never of both.

        It takes a quorum of signatures over the very set that this merchant signed. The round's secrets are
        dropped then.
        """
        opened = self._opened(agreement)
        survivors = opened.survivors
        if survivors is None:
            raise Refusal(Fault.ORDER, "asked to unmask before the survivors were named")
        statement = transcript.survivor_statement(opened.context, survivors)
        signatures = agreement.signatures
        valid = sum(
            place in survivors
            and transcript.verifies(
                self._members[place].identity, "survivors", statement, signatures[64 * k : 64 * (k + 1)]
            )
            for k, place in enumerate(agreement.places)
        )
        quorum = self._parameters.quorum(len(self._members))
        require(
            valid >= quorum,
            Fault.AGREEMENT,
            f"found {valid} signatures over the survivors, expected {quorum}",
        )
        round_, held = self._setup.round + opened.number, self._held[opened.number]
        openings = []
        for place in range(len(self._members)):
            kind = SEED if place in survivors else KEY
            openings.append(transcript.share_of(held[place], 0, kind))
            openings.append(suite.blind(self._blindings[place], round_, kind))
        self._forget(opened.number)
        self._round = None
        return Unmasked(**agreement.work, openings=b"".join(openings))

    def _exchange_keys(self) -> None:
        """Compute every secret shared with another member: a key of low order shows here, before any photo."""
        for place, member in enumerate(self._members):
            if place == self._place:
                continue
            try:
                self._channels[place] = suite.agree(self._sealing, member.sealing_key)
                for number, key in enumerate(self._keys):
                    self._pairs[number][place] = suite.agree(key, transcript.mask_key(member, number))
            except ValueError:
                raise Refusal(Fault.ROSTER, "a roster member has a key of low order", place) from None

    def _deal(self, own: Witness, witnesses: Mapping[bytes, Witness]) -> tuple[Packet, ...]:
        """Split each round's two secrets among all members, and make every holder's packet."""
        size = len(self._members)
        threshold = self._parameters.threshold(size)
        dealt: list[list[bytes]] = [[] for _ in range(size)]
        for seed, key in zip(self._seeds, self._keys, strict=True):
            for secret in (seed, key.private_bytes_raw()):
                shares = shamir.split(int.from_bytes(secret, "big"), threshold, size)
                for part, share in zip(dealt, shares, strict=True):
                    part.append(shamir.to_bytes(share))
        packets = []
        for place, member in enumerate(self._members):
            blinding, shares_of_holder = secret_bytes(suite.KEY_BYTES), b"".join(dealt[place])
            sealed = b""
            if place == self._place:
                self._hold(place, blinding, shares_of_holder)
            else:
                seen = witnesses.get(member.identity, NO_WITNESS)
                plain = blinding + own.to_bytes() + seen.to_bytes() + shares_of_holder
                sealed = suite.seal(self._channels[place], self._context, self._own, member.identity, plain)
            commitments = transcript.commitments_to(
                self._context, self._setup, self._own, member.identity, blinding, shares_of_holder
            )
            statement = transcript.packet_statement(
                self._context, self._own, member.identity, sealed, commitments
            )
            signature = signing.sign(self._identity, "packet", statement)
            packets.append(Packet(sealed=sealed, commitments=commitments, signature=signature))
        return tuple(packets)

    def _open(self, place: int, packet: Packet) -> Witness:
        """Keep the shares in the packet of the member at `place`; return what it says of its own ledger."""
        dealer = self._members[place].identity
        statement = transcript.packet_statement(
            self._context, dealer, self._own, packet.sealed, packet.commitments
        )
        signed = transcript.verifies(dealer, "packet", statement, packet.signature)
        require(signed, Fault.SHARES, "a roster member did not sign its shares", place)
        try:
            plain = suite.unseal(self._channels[place], self._context, dealer, self._own, packet.sealed)
        except InvalidTag:
            raise Refusal(Fault.SHARES, "a roster member's shares cannot be opened", place) from None
        whole = len(packet.sealed) == SEALED_BYTES + SHARES_BYTES * self._setup.rounds
        require(whole, Fault.SHARES, "a roster member's shares have another length", place)
        blinding, theirs, ours, shares = plain[:32], plain[32:104], plain[104:176], plain[176:]
        expected = transcript.commitments_to(self._context, self._setup, dealer, self._own, blinding, shares)
        require(
            packet.commitments == expected,
            Fault.SHARES,
            "a member's shares contradict its commitments",
            place,
        )
        try:
            for first in range(0, len(shares), shamir.SHARE_BYTES):
                shamir.from_bytes(shares[first : first + shamir.SHARE_BYTES])
            witness = Witness.from_bytes(theirs, dealer)
            seen = NO_WITNESS if ours == NO_WITNESS.to_bytes() else Witness.from_bytes(ours, self._own)
        except (ValueError, SignatureInvalid):
            raise Refusal(Fault.SHARES, "a member's shares or counters are malformed", place) from None
        require(
            seen.counter <= self._counter,
            Fault.LEDGER,
            f"your ledger has {self._counter} entries, but a peer saw it with {seen.counter}: an older copy was put "
            "in its place. Put the newer one back; until then nothing is trained.",
        )
        self._hold(place, blinding, shares)
        return witness

    def _hold(self, place: int, blinding: bytes, shares: bytes) -> None:
        self._blindings[place] = blinding
        for number, held in enumerate(self._held):
            held[place] = shares[SHARES_BYTES * number : SHARES_BYTES * (number + 1)]

    def _forget(self, number: int) -> None:
        """Drop what is left of the set-up's round `number`."""
        self._held[number], self._pairs[number], self._seeds[number] = {}, {}, b""

    def _require_setup(self, message: Work) -> None:
        require(message.work == self._setup.work, Fault.ORDER, "found a message of another set-up")

    def _opened(self, message: Work) -> _Round:
        if self._round is None or message.work != self._round.work:
            raise Refusal(Fault.ORDER, "found a question about a round that is not open")
        return self._round
