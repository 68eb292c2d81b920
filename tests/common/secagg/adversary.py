"""The adversary of secure aggregation: a server that says what it likes, and merchants that tell it all they know.

    made = corrupted(league.of(7, n_min=4, c=2), 5, 6).start()
    round_ = made.open(0, dimension=3)
    enemy = Conspiracy(round_, corrupt=(5, 6))
    masked = round_.upload(updates)
    enemy.ask({0: some_survivors, 1: other_survivors, …})
    enemy.uncover(0, masked[0])                  # merchant 0's update, or None

It is made of the honest parties' own code: what it does otherwise stands here. A test that wants to see an attack
succeed takes a defence away, by more corrupt merchants than c or by a `Credulous` one.
"""

import copy
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from numpy.typing import NDArray

from hanse_common import signing
from hanse_common.secagg import shamir, suite, transcript
from hanse_common.secagg.faults import Fault, Refusal
from hanse_common.secagg.masking import Mask, apply_masks
from hanse_common.secagg.merchant import Merchant
from hanse_common.secagg.messages import (
    OPENING_BYTES,
    SEALED_BYTES,
    Agreement,
    Member,
    Packet,
    Roster,
    Shares,
    Survivors,
    Unmasked,
)
from hanse_common.secagg.transcript import KEY, SEED

Places = tuple[int, ...]


# -- merchants ----------------------------------------------------------------------------------------------------


class Corrupt(Merchant):
    """Keeps to the protocol, and keeps its mask keys, for the server."""

    mask_keys: tuple[X25519PrivateKey, ...] = ()

    def share(self, *arguments: Any) -> Shares:
        self.mask_keys = tuple(self._keys)
        return super().share(*arguments)


class Credulous(Merchant):
    """Takes it that those who shared are those whose packets came, and masks with them alone."""

    def receive_some(self, packets: Mapping[int, Packet]) -> None:
        for place, packet in packets.items():
            self._open(place, packet)
        self._pairs = [
            {place: secret for place, secret in p.items() if place in packets} for p in self._pairs
        ]
        self._is_ready = True


class Dealer(Corrupt):
    """Spoils what it deals: `altered` changes the plain text for one holder before it is committed to and sealed."""

    victims: Places = (0,)

    def _deal(self, *arguments: Any) -> tuple[Packet, ...]:
        packets = list(super()._deal(*arguments))
        for place in self.victims:
            packets[place] = self._repacked(place, packets[place])
        return tuple(packets)

    def _repacked(self, place: int, packet: Packet) -> Packet:
        holder, channel = self._members[place].identity, self._channels[place]
        plain = self.altered(suite.unseal(channel, self._context, self._own, holder, packet.sealed))
        sealed = suite.seal(channel, self._context, self._own, holder, plain)
        commitments = self.commitments(holder, plain, packet)
        statement = transcript.packet_statement(self._context, self._own, holder, sealed, commitments)
        signature = signing.sign(self._identity, "packet", statement)
        return Packet(sealed=sealed, commitments=commitments, signature=signature)

    def altered(self, plain: bytes) -> bytes:
        return plain

    def commitments(self, holder: bytes, plain: bytes, packet: Packet) -> bytes:
        shares = plain[SEALED_BYTES - 16 :]
        return transcript.commitments_to(self._context, self._setup, self._own, holder, plain[:32], shares)


class Contradicts(Dealer):
    """Seals a share that is not the one it committed to."""

    def altered(self, plain: bytes) -> bytes:
        return plain[:-1] + bytes([plain[-1] ^ 1])

    def commitments(self, holder: bytes, plain: bytes, packet: Packet) -> bytes:
        return packet.commitments


class SealsTooLittle(Dealer):
    """Seals, properly, all but the last share's last byte."""

    def altered(self, plain: bytes) -> bytes:
        return plain[:-1]


class OutsideTheField(Dealer):
    """Commits to a share that is no element of the field."""

    def altered(self, plain: bytes) -> bytes:
        return plain[: -shamir.SHARE_BYTES] + b"\xff" * shamir.SHARE_BYTES


class ForgesCounter(Dealer):
    """Says that it saw a counter of the holder's ledger that the holder never signed."""

    def altered(self, plain: bytes) -> bytes:
        return plain[:104] + (7).to_bytes(8, "big") + bytes(64) + plain[176:]


class NoPolynomial(Dealer):
    """Commits to shares of which one lies on no polynomial with the others."""

    def altered(self, plain: bytes) -> bytes:
        first = SEALED_BYTES - 16
        shares = [plain[k : k + shamir.SHARE_BYTES] for k in range(first, len(plain), shamir.SHARE_BYTES)]
        spoiled = [shamir.to_bytes((shamir.from_bytes(share) + 1) % shamir.PRIME) for share in shares]
        return plain[:first] + b"".join(spoiled)


class AnotherSecret(Corrupt):
    """Deals sound shares, of a seed that it does not mask with and of a key that it did not publish."""

    def _deal(self, *arguments: Any) -> tuple[Packet, ...]:
        true = self._seeds, self._keys
        self._seeds = [bytes([1]) * 32 for _ in self._seeds]
        self._keys = [X25519PrivateKey.generate() for _ in self._keys]
        try:
            return super()._deal(*arguments)
        finally:
            self._seeds, self._keys = true


def corrupted(made: Any, *places: int, kind: type[Merchant] = Corrupt) -> Any:
    """Return the league, which nobody joined yet, with merchants of that kind at these places."""
    for place in places:
        made.merchants[place] = kind(made.setup, made.parameters, made.identities[place], made.entities)
    return made


def resigned(made: Any, place: int, **change: bytes) -> Member:
    """Return other keys of a corrupt merchant that joined, signed by itself."""
    member: Member = made.merchants[place]._member.model_copy(update=change)
    statement = transcript.join_statement(made.setup, member.identity, member.sealing_key, member.mask_keys)
    signature = signing.sign(made.identities[place], "join", statement)
    return member.model_copy(update={"signature": signature})


def forked(merchant: Merchant) -> Merchant:
    """Return a twin that goes its own way from here, for a search over what a merchant might be asked."""
    twin = copy.copy(merchant)
    for name, value in vars(merchant).items():
        if isinstance(value, list):
            setattr(twin, name, [dict(item) if isinstance(item, dict) else item for item in value])
        elif isinstance(value, dict) and name != "_entities":
            setattr(twin, name, dict(value))
    if merchant._round is not None:
        twin._round = replace(merchant._round)
    return twin


# -- the server ---------------------------------------------------------------------------------------------------


def with_members(roster: Roster, members: Iterable[Member]) -> Roster:
    """Return the roster with other members."""
    return roster.model_copy(update={"members": tuple(members)})


def agreement(work: Mapping[str, Any], signatures: Mapping[int, bytes]) -> Agreement:
    """Return these signatures, by place, as a merchant is shown them."""
    places = tuple(sorted(signatures))
    return Agreement(**work, places=places, signatures=b"".join(signatures[place] for place in places))


class Conspiracy:
    """A server and the merchants at `corrupt`, in a round that is open: their shares are on one heap."""

    def __init__(self, round_: Any, corrupt: Places = ()) -> None:
        self.league, self.sum, self.corrupt = round_.league, round_.sum, corrupt
        self.number = round_.sum._number
        self.heap: defaultdict[tuple[int, bytes], dict[int, bytes]] = defaultdict(dict)
        for holder in corrupt:
            for dealer, shares in self.league.merchants[holder]._held[self.number].items():
                for kind in (SEED, KEY):
                    self.heap[dealer, kind][holder] = transcript.share_of(shares, 0, kind)

    def name(self, *places: int) -> Survivors:
        """Return a survivor set of the server's choice."""
        return Survivors(**self.sum.work, places=places)

    def sign(self, places: Places, by: Iterable[int] | None = None) -> dict[int, bytes]:
        """Return the corrupt merchants' signatures, or others', over a survivor set: they sign whatever is asked."""
        statement = transcript.survivor_statement(self.sum._context, places)
        signers = self.corrupt if by is None else by
        return {
            place: signing.sign(self.league.identities[place], "survivors", statement) for place in signers
        }

    def ask(self, told: Mapping[int, Places]) -> dict[Places, list[int]]:
        """Tell each honest merchant survivors of its own, show it all signatures over these, and return who helped."""
        signed = {places: self.sign(places) for places in told.values()}
        for place, places in told.items():
            agreed = self.league.merchants[place].agree(self.name(*places))
            signed[places][place] = agreed.signature
        helped: dict[Places, list[int]] = {places: [] for places in signed}
        for place, places in told.items():
            try:
                unmasked = self.league.merchants[place].unmask(agreement(self.sum.work, signed[places]))
            except Refusal as refusal:
                assert refusal.fault is Fault.AGREEMENT, refusal
                continue
            self.take(place, places, unmasked)
            helped[places].append(place)
        return helped

    def take(self, holder: int, survivors: Places, unmasked: Unmasked) -> None:
        """Put what a merchant opened on the heap."""
        for dealer in range(len(self.sum._members)):
            opening = unmasked.openings[OPENING_BYTES * dealer : OPENING_BYTES * (dealer + 1)]
            kind = SEED if dealer in survivors else KEY
            self.heap[dealer, kind][holder] = opening[: shamir.SHARE_BYTES]

    def secret(self, dealer: int, kind: bytes) -> bytes | None:
        """Return the secret if there are shares enough."""
        shares = self.heap[dealer, kind]
        if len(shares) < self.league.parameters.threshold(len(self.sum._members)):
            return None
        found = shamir.recover({holder: shamir.from_bytes(share) for holder, share in shares.items()})
        return found.to_bytes(33, "big")[1:]

    def stream(self, one: int, other: int, context: bytes | None = None) -> bytes | None:
        """Return the key of two merchants' common mask, if either's private key is known."""
        members = self.sum._members
        for owner, peer in ((one, other), (other, one)):
            raw = self.secret(owner, KEY)
            key = X25519PrivateKey.from_private_bytes(raw) if raw else None
            if owner in self.corrupt:
                key = self.league.merchants[owner].mask_keys[self.number]
            if key is not None:
                shared = suite.agree(key, transcript.mask_key(members[peer], self.number))
                return suite.pair_mask_key(
                    shared, context or self.sum._context, members[owner].identity, members[peer].identity
                )
        return None

    def uncover(
        self, victim: int, masked: NDArray[np.uint32], partners: Iterable[int] | None = None
    ) -> NDArray[np.uint32] | None:
        """Return the victim's update, or None if a mask of it is unknown. It masked with `partners`: with all."""
        seed = self.secret(victim, SEED)
        others = [place for place in range(len(self.sum._members)) if place != victim]
        streams = {place: self.stream(victim, place) for place in partners or others}
        if seed is None:
            return None
        masks = [
            Mask(suite.self_mask_key(seed, self.sum._context, self.league.identity(victim)), subtract=True)
        ]
        for place, key in streams.items():
            if key is None:
                return None
            masks.append(Mask(key, subtract=place > victim))
        found = masked.copy()
        apply_masks(found, masks)
        return found
