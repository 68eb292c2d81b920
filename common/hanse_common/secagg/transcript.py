"""What merchants and aggregator both compute from what was said: contexts, statements, commitments, roster checks."""

from collections.abc import Mapping
from typing import ClassVar

from hanse_common import signing, wire
from hanse_common.errors import SignatureInvalid
from hanse_common.secagg import shamir, suite
from hanse_common.secagg.faults import Fault, Refusal, require
from hanse_common.secagg.messages import COMMITMENTS_BYTES, SHARES_BYTES, Member, Packet
from hanse_common.secagg.parameters import Parameters
from hanse_common.secagg.suite import JoinStatement, PacketStatement, Setup, SurvivorStatement

SEED, KEY = b"s", b"k"
"""Which of a merchant's two secrets of a round a share is of."""


class _RosterContext(wire.Message):
    kind: ClassVar[int] = 26

    context: wire.Digest
    members: tuple[Member, ...]


def roster_context(setup: Setup, members: tuple[Member, ...]) -> bytes:
    """Return ctx, 32 bytes: the set-up and exactly these members with exactly these keys."""
    return wire.digest(_RosterContext(context=setup.context, members=members))


def join_statement(setup: Setup, identity: bytes, sealing_key: bytes, mask_keys: bytes) -> bytes:
    """Return the bytes that a merchant signs of its fresh keys."""
    return wire.encode(
        JoinStatement(context=setup.context, identity=identity, sealing_key=sealing_key, mask_keys=mask_keys)
    )


def packet_statement(
    context: bytes, dealer: bytes, holder: bytes, sealed: bytes, commitments: bytes
) -> bytes:
    """Return the bytes that a dealer signs of one holder's packet under ctx."""
    return wire.encode(
        PacketStatement(context=context, dealer=dealer, holder=holder, sealed=sealed, commitments=commitments)
    )


def survivor_statement(context: bytes, places: tuple[int, ...]) -> bytes:
    """Return the bytes that survivors sign under ctx_r."""
    return wire.encode(SurvivorStatement(context=context, survivors=places))


def verifies(identity: bytes, domain: str, data: bytes, signature: bytes) -> bool:
    """Return whether `signature` is that of `identity` over `data` under `domain`."""
    try:
        signing.verify(identity, domain, data, signature)
    except SignatureInvalid:
        return False
    return True


def check_member(setup: Setup, member: Member, place: int | None = None) -> None:
    """Raise `Refusal` unless the member's keys are as many as the rounds and signed by its identity."""
    statement = join_statement(setup, member.identity, member.sealing_key, member.mask_keys)
    valid = len(member.mask_keys) == 32 * setup.rounds
    valid = valid and verifies(member.identity, "join", statement, member.signature)
    require(valid, Fault.ROSTER, "found keys that their owner did not sign for this set-up", place)


def check_roster(
    setup: Setup, parameters: Parameters, entities: Mapping[bytes, str], members: tuple[Member, ...]
) -> None:
    """Raise `Refusal` unless `members` may take part together.

    That is: enough of them, in order, all in the directory, of different entities, each with keys of its own that
    it signed for this set-up.
    """
    try:
        parameters.check_roster(len(members))
    except ValueError as error:
        raise Refusal(Fault.ROSTER, str(error)) from None
    identities = [member.identity for member in members]
    require(identities == sorted(set(identities)), Fault.ROSTER, "found a roster out of order, or one twice")
    for place, member in enumerate(members):
        require(member.identity in entities, Fault.ROSTER, "found one who is not in the directory", place)
        check_member(setup, member, place)
    found = {entities[identity] for identity in identities}
    require(len(found) == len(members), Fault.ROSTER, "found one entity twice in the roster")
    keys = [key for member in members for key in public_keys(member)]
    require(len(set(keys)) == len(keys), Fault.ROSTER, "found one key twice in the roster")


def public_keys(member: Member) -> list[bytes]:
    """Return the member's keys: for sealing, then for each round's masks."""
    return [member.sealing_key, *(mask_key(member, k) for k in range(len(member.mask_keys) // 32))]


def mask_key(member: Member, number: int) -> bytes:
    """Return the member's public mask key of the set-up's round `number`, counted from 0."""
    return member.mask_keys[32 * number : 32 * (number + 1)]


def share_of(shares: bytes, number: int, kind: bytes) -> bytes:
    """Return one share of a packet's `shares`, by the round's number in the set-up."""
    first = SHARES_BYTES * number + (0 if kind == SEED else shamir.SHARE_BYTES)
    return shares[first : first + shamir.SHARE_BYTES]


def commitment_of(packet: Packet, number: int, kind: bytes) -> bytes:
    """Return one of the packet's commitments, by the round's number in the set-up."""
    first = COMMITMENTS_BYTES * number + (0 if kind == SEED else 32)
    return packet.commitments[first : first + 32]


def commitments_to(
    context: bytes, setup: Setup, dealer: bytes, holder: bytes, blinding: bytes, shares: bytes
) -> bytes:
    """Return the commitments to `shares`: for each round the seed's and the key's, 32 bytes each."""
    found = []
    for number in range(setup.rounds):
        round_ = setup.round + number
        for kind in (SEED, KEY):
            blinded = suite.blind(blinding, round_, kind)
            share = share_of(shares, number, kind)
            found.append(suite.commit(context, dealer, holder, round_, kind, blinded, share))
    return b"".join(found)
