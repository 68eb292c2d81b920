"""What a server that cheats, and up to c merchants with it, try; and what becomes of it.

Merchants 0, 1, … are at these places in the roster. Unless a test says so, the server is the attacker: it may say
anything to anyone. What it is made of is in `adversary`.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from scipy.stats import chisquare

from hanse_client.markers import Markers
from hanse_common import signing, wire
from hanse_common.charter import founded, with_signature
from hanse_common.directory import Directory, Entry, SignedDirectory
from hanse_common.errors import DirectoryRefused, SignatureInvalid, WireError
from hanse_common.messages import Invitation, Start
from hanse_common.plan import SignedPlan
from hanse_common.secagg import ring, shamir, suite, transcript
from hanse_common.secagg.faults import Fault, Misbehaviour, Refusal, SumLost
from hanse_common.secagg.masking import Mask, apply_masks
from hanse_common.secagg.merchant import Merchant
from hanse_common.secagg.messages import (
    OPENING_BYTES,
    Agreed,
    Agreement,
    Delivery,
    Joined,
    Packet,
    Roster,
    Shares,
    Survivors,
    Unmasked,
    Upload,
)
from hanse_common.secagg.parameters import Parameters
from hanse_common.secagg.transcript import KEY, SEED

from .adversary import (
    AnotherSecret,
    Conspiracy,
    Contradicts,
    Credulous,
    ForgesCounter,
    NoPolynomial,
    OutsideTheField,
    SealsTooLittle,
    agreement,
    corrupted,
    forked,
    resigned,
    with_members,
)

Make = Any
D = 40
ALL = (0, 1, 2, 3, 4)


def refused(fault: Fault, call: Callable[[], Any]) -> Refusal:
    with pytest.raises(Refusal) as caught:
        call()
    assert caught.value.fault is fault, caught.value
    return caught.value


def updates(count: int, seed: int = 0) -> dict[int, Any]:
    rng = np.random.default_rng(seed)
    return {place: rng.integers(0, 2**32, D, dtype=np.uint32) for place in range(count)}


def total_of(some: dict[int, Any], places: Any) -> Any:
    return np.sum([some[place] for place in places], axis=0, dtype=np.uint32)


# -- the roster ---------------------------------------------------------------------------------------------------


def test_a_roster_under_the_minimum_or_over_the_maximum(league: Make) -> None:
    """Few take part, so that a sum says more of each; or so many that it wraps."""
    made = league.of(6, n_min=5)
    roster = made.join()
    refused(Fault.ROSTER, lambda: made.merchants[0].share(with_members(roster, roster.members[:4]), 0, {}))
    refused(
        Fault.ROSTER,
        lambda: transcript.check_roster(made.setup, Parameters(3, 1, 5), made.entities, roster.members),
    )
    transcript.check_roster(made.setup, made.parameters, made.entities, roster.members)


def test_an_outsider_in_the_roster_is_named(league: Make) -> None:
    """The server brings merchants of its own, whom the league never saw."""
    made = league.of(5)
    roster = made.join()
    del made.entities[made.identity(3)]
    assert refused(Fault.ROSTER, lambda: made.merchants[0].share(roster, 0, {})).culprit == 3


def test_one_entity_twice_in_the_roster(league: Make) -> None:
    """One corrupt business counts as two, and so passes c."""
    made = league.of(5)
    roster = made.join()
    made.entities[made.identity(3)] = made.entities[made.identity(4)]
    refused(Fault.ROSTER, lambda: made.merchants[0].share(roster, 0, {}))


def test_one_member_twice_or_out_of_order(league: Make) -> None:
    """One corrupt merchant counts as two; or places mean other members to some than to others."""
    made = league.of(5)
    roster = made.join()
    doubled = (*roster.members[:4], roster.members[3], roster.members[4])
    for members in (doubled, roster.members[::-1]):
        refused(
            Fault.ROSTER,
            lambda members=members: made.merchants[0].share(with_members(roster, members), 0, {}),
        )


def test_a_roster_without_the_merchant_or_with_other_keys_of_its_own(league: Make) -> None:
    """The victim is to deal its secrets to a roster that it is not in, or is in with keys that it forgot."""
    made, other = league.of(5), league.of(5)
    roster, stale = made.join(), other.join()
    refused(Fault.ROSTER, lambda: made.merchants[0].share(with_members(roster, roster.members[1:]), 0, {}))
    # The same identity, a valid signature, keys of another process of the same merchant.
    mixed = with_members(roster, (stale.members[0], *roster.members[1:]))
    refused(Fault.ROSTER, lambda: made.merchants[0].share(mixed, 0, {}))


@pytest.mark.parametrize(
    "change",
    [
        {"attempt": 1},
        {"round": 1},
        {"rounds": 2},
        {"plan_digest": bytes(32)},
        {"directory_digest": bytes(32)},
    ],
)
def test_keys_replayed_from_another_set_up(league: Make, change: dict[str, Any]) -> None:
    """Keys whose shares were opened in an earlier set-up are presented again."""
    made, earlier = league.of(5), league.of(5, **change)
    roster, stale = made.join(), earlier.join()
    mixed = with_members(roster, (*roster.members[:2], stale.members[2], *roster.members[3:]))
    assert refused(Fault.ROSTER, lambda: made.merchants[0].share(mixed, 0, {})).culprit == 2


def test_swapped_keys_do_not_carry_their_owners_signature(league: Make) -> None:
    """The server puts a key that it knows, here another merchant's, in the place of a merchant's own."""
    made = league.of(5)
    roster = made.join()
    one, two = roster.members[1], roster.members[2]
    for field in ("sealing_key", "mask_keys"):
        swapped = one.model_copy(update={field: getattr(two, field)})
        mixed = with_members(roster, (roster.members[0], swapped, *roster.members[2:]))
        assert refused(Fault.ROSTER, lambda mixed=mixed: made.merchants[0].share(mixed, 0, {})).culprit == 1


@pytest.mark.parametrize("field", ["sealing_key", "mask_keys"])
def test_a_corrupt_merchant_that_copies_another_ones_keys(league: Make, field: str) -> None:
    """So that a secret shared with the one is shared with the other."""
    made = league.of(5)
    roster = made.join()
    copied = resigned(made, 4, **{field: getattr(roster.members[2], field)})
    mixed = with_members(roster, (*roster.members[:4], copied))
    refused(Fault.ROSTER, lambda: made.merchants[0].share(mixed, 0, {}))


def test_a_copied_key_in_disguise_gives_no_common_stream(league: Make) -> None:
    """X25519 ignores a key's highest bit, so a copy may look different: secrets are common then, masks are not.

    Were they, the merchant between the two would add one stream and subtract the same.
    """
    made = corrupted(league.of(5), 4)
    roster = made.join()
    key = bytearray(roster.members[1].mask_keys)
    key[31] |= 0x80
    made.aggregator._joined[made.identity(4)] = made.merchants[4]._member = resigned(
        made, 4, mask_keys=bytes(key)
    )
    made.share(made.aggregator.roster())
    made.receive()
    made.open(0, D)
    assert len({mask.key for mask in made.merchants[2]._round.masks}) == 5


@pytest.mark.parametrize("rounds", [1, 3])
def test_too_few_or_too_many_mask_keys(league: Make, rounds: int) -> None:
    """A corrupt merchant has no key for a round, so that nobody can take its masks out."""
    made = league.of(5, rounds=2)
    roster = made.join()
    other = resigned(made, 4, mask_keys=(roster.members[4].mask_keys + bytes(range(32)))[: 32 * rounds])
    mixed = with_members(roster, (*roster.members[:4], other))
    assert refused(Fault.ROSTER, lambda: made.merchants[0].share(mixed, 0, {})).culprit == 4
    with pytest.raises(Misbehaviour):
        made.aggregator.__class__(made.setup, made.parameters, made.entities).add_member(
            made.identity(4), Joined(**made.setup.work, member=other)
        )


@pytest.mark.parametrize("low", [0, 1, 2**255 - 20, 2**255 - 19, 2**255 - 18])
@pytest.mark.parametrize("field", ["sealing_key", "mask_keys"])
def test_keys_of_low_order_are_noticed_before_any_photo(league: Make, field: str, low: int) -> None:
    """Everybody knows the secret that is shared with such a key."""
    made = league.of(5)
    roster = made.join()
    weak = resigned(made, 4, **{field: low.to_bytes(32, "little")})
    mixed = with_members(roster, (*roster.members[:4], weak))
    assert refused(Fault.ROSTER, lambda: made.merchants[0].share(mixed, 0, {})).culprit == 4
    refused(Fault.ORDER, lambda: made.merchants[0].share(roster, 0, {}))


def test_two_rosters(league: Make) -> None:
    """Merchant 0 believes in 0 to 4, all others in 0 to 5: their shares are for another roster."""
    made = league.of(6)
    whole = made.join()
    part = with_members(whole, whole.members[:5])
    made.merchants[0].share(part, 0, {})
    packets = [made.merchants[place].share(whole, 0, {}).packets[0] for place in range(1, 6)]
    delivery = Delivery(**made.setup.work, packets=tuple(packets[:4]))
    assert refused(Fault.SHARES, lambda: made.merchants[0].receive(delivery)).culprit == 1


def test_two_rosters_for_two_groups_share_no_key(league: Make) -> None:
    """Of seven, 0 to 4 are told that 6 is not there, 6 that 0 is not. Had they been served, masks would not cancel."""
    made = league.of(7)
    whole = made.join()
    contexts, streams = [], []
    for place, left_out, peer in ((1, 6, 2), (2, 0, 1)):
        members = tuple(member for k, member in enumerate(whole.members) if k != left_out)
        merchant = made.merchants[place]
        merchant.share(with_members(whole, members), 0, {})
        own = [member.identity for member in members].index(made.identity(peer))
        secret = merchant._pairs[0][own]
        context = suite.round_context(merchant._context, 0, bytes(32))
        contexts.append(context)
        streams.append((secret, suite.pair_mask_key(secret, context, made.identity(1), made.identity(2))))
    (secret, stream), (same, other) = streams
    assert secret == same
    assert stream != other
    assert contexts[0] != contexts[1], "what either group signs, the other does not count"


# -- the directory ------------------------------------------------------------------------------------------------


LEAGUE = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
CHARTER = founded("test", LEAGUE)


def directory(version: int = 1, expires: int = 10, *entities: str) -> Directory:
    entries = tuple(
        Entry(name=f"m{k}", entity=entity, identity=bytes([k]) * 32, expires=5 + k)
        for k, entity in enumerate(entities or ("Alder", "Birch"))
    )
    return Directory(
        league="test", charter=CHARTER.read().digest, version=version, expires=expires, entries=entries
    )


def test_a_directory_of_the_servers_own_or_one_that_expired() -> None:
    """Who lists members may list corrupt ones; and an old list has those that the league threw out."""
    server_key = Ed25519PrivateKey.generate()
    pinned = CHARTER.read().digest
    unsigned = SignedDirectory.of(directory(), (CHARTER,))
    signed = unsigned.signed_by(LEAGUE)
    own = founded("test", server_key)
    assert signed.open(pinned, now=9) == directory()
    with pytest.raises(DirectoryRefused, match="expired"):
        signed.open(pinned, now=10)
    longer = wire.encode(directory(expires=1000))
    for forged in (
        unsigned,
        unsigned.signed_by(server_key),
        signed.model_copy(update={"directory": longer}),
        unsigned.model_copy(update={"signatures": with_signature((), LEAGUE, "plan", signed.directory)}),
    ):
        with pytest.raises(SignatureInvalid):
            forged.open(pinned, now=9)
    for another in (
        SignedDirectory.of(directory(), (own,)).signed_by(server_key),
        SignedDirectory.of(directory(), (CHARTER, own)).signed_by(server_key),
    ):
        with pytest.raises(DirectoryRefused):
            another.open(pinned, now=9)


def test_one_who_is_no_member_any_more_is_an_outsider() -> None:
    """A merchant whose entry ran out is presented as one of the league."""
    assert set(directory().entities(now=4)) == {bytes(32), bytes([1]) * 32}
    assert set(directory().entities(now=5)) == {bytes([1]) * 32}


def test_one_entity_is_listed_once() -> None:
    """One business, two identities, in two spellings."""
    with pytest.raises(ValueError, match="entity twice"):
        directory(1, 10, "Alder", "ALDER")


def test_a_directory_that_goes_back(tmp_path: Path) -> None:
    """An earlier version, with a member that was thrown out; or two of one version for two merchants."""
    markers, charter = Markers(tmp_path / "markers.sqlite"), CHARTER.read()
    markers.see_directory(directory(version=2), (charter,))
    for earlier in (directory(version=1), directory(2, 11), directory(2, 10, "Alder", "Cedar")):
        with pytest.raises(DirectoryRefused):
            Markers(tmp_path / "markers.sqlite").see_directory(earlier, (charter,))
    markers.see_directory(directory(version=2), (charter,))
    markers.see_directory(directory(version=3), (charter,))
    with pytest.raises(DirectoryRefused):
        markers.see_directory(directory(version=2), (charter,))


# -- the shares ---------------------------------------------------------------------------------------------------


def test_split_share_sets(league: Make) -> None:
    """The victim is told that only six honest and both corrupt merchants shared; these six are then called dropped.

    Eleven honest and the corrupt are a quorum for survivors with the victim and without the six. They open its seed
    and the six keys. To a victim that masks with those who shared, that is every mask. An honest one does not upload.
    """
    few, corrupt, update = (1, 2, 3, 4, 5, 6, 7, 8), (7, 8), updates(1)[0]
    for kind in (Credulous, Merchant):
        made = corrupted(league.of(20, n_min=9, c=2), *corrupt)
        corrupted(made, 0, kind=kind)
        assert (made.parameters.threshold(20), made.parameters.quorum(20)) == (11, 12)
        made.share(made.join())
        for place in range(1, 20):
            made.merchants[place].receive(made.aggregator.delivery(made.identity(place)))
        victim, whole = made.merchants[0], made.aggregator.delivery(made.identity(0))
        if kind is Merchant:
            some = whole.model_copy(update={"packets": whole.packets[:8]})
            refused(Fault.SHARES, lambda victim=victim, some=some: victim.receive(some))
            refused(Fault.ORDER, lambda victim=victim: victim.open_round(0, bytes(32)))
            continue
        victim.receive_some({place: whole.packets[place - 1] for place in few})
        round_ = made.open(0, D)
        enemy = Conspiracy(round_, corrupt)
        masked = round_.upload(dict.fromkeys(range(20), update))
        survivors = (0, *range(7, 20))
        assert enemy.uncover(0, masked[0], few) is None, "their own shares are not enough"
        assert len(enemy.ask(dict.fromkeys(range(9, 20), survivors))[survivors]) == 11
        assert np.array_equal(enemy.uncover(0, masked[0], few), update)


def spoil(packets: tuple[Packet, ...], how: str) -> tuple[Packet, ...]:
    first, second, *rest = packets
    flipped = bytes([first.sealed[0] ^ 1]) + first.sealed[1:]
    return {
        "tampered": (first.model_copy(update={"sealed": flipped}), second, *rest),
        "truncated": (first.model_copy(update={"sealed": first.sealed[:-1]}), second, *rest),
        "empty": (first.model_copy(update={"sealed": b""}), second, *rest),
        "other commitments": (first.model_copy(update={"commitments": second.commitments}), second, *rest),
        "unsigned": (first.model_copy(update={"signature": bytes(64)}), second, *rest),
        "swapped": (second, first, *rest),
        "one twice": (first, first, *rest),
        "one dropped": (second, *rest),
        "one twice, all there": (first, first, second, *rest),
    }[how]


@pytest.mark.parametrize(
    ("how", "culprits"),
    [
        ("tampered", (1,)),
        ("truncated", (1,)),
        ("empty", (1,)),
        ("other commitments", (1,)),
        ("unsigned", (1,)),
        ("swapped", (1,)),
        ("one twice", (2,)),
        ("one dropped", (None,)),
        ("one twice, all there", (None,)),
    ],
)
def test_packets_that_are_tampered_with(league: Make, how: str, culprits: tuple[int | None]) -> None:
    """On the way, the server changes a packet, swaps two dealers', leaves one out or sends one twice."""
    made = league.of(5)
    made.share(made.join())
    delivery = made.aggregator.delivery(made.identity(0))
    bad = delivery.model_copy(update={"packets": spoil(delivery.packets, how)})
    assert refused(Fault.SHARES, lambda: made.merchants[0].receive(bad)).culprit in culprits
    refused(Fault.ORDER, lambda: made.merchants[0].open_round(0, bytes(32)))


def test_a_packet_for_another_holder(league: Make) -> None:
    """The server swaps two holders' packets."""
    made = league.of(5)
    shares = made.share(made.join())
    delivery = made.aggregator.delivery(made.identity(0))
    packets = (shares[1].packets[2], *delivery.packets[1:])
    bad = delivery.model_copy(update={"packets": packets})
    assert refused(Fault.SHARES, lambda: made.merchants[0].receive(bad)).culprit == 1


def test_a_packet_of_another_set_up(league: Make) -> None:
    """The server has a dealer's packet from a set-up before, for the same holder, whose secrets are known now."""
    made, earlier = league.of(5), league.of(5, attempt=1)
    made.share(made.join())
    old = earlier.share(earlier.join())
    delivery = made.aggregator.delivery(made.identity(0))
    bad = delivery.model_copy(update={"packets": (old[1].packets[0], *delivery.packets[1:])})
    assert refused(Fault.SHARES, lambda: made.merchants[0].receive(bad)).culprit == 1


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Contradicts, "contradict"),
        (SealsTooLittle, "another length"),
        (OutsideTheField, "malformed"),
        (ForgesCounter, "malformed"),
    ],
)
def test_a_dealer_that_seals_what_is_bad(league: Make, kind: type[Merchant], reason: str) -> None:
    """Corrupt merchant 3's packet is signed and opens. Taken, it would cost the sum, and its holder be blamed."""
    made = corrupted(league.of(5), 3, kind=kind)
    roster = made.join()
    shares = [merchant.share(roster, 0, {}) for merchant in made.merchants]
    delivery = Delivery(**made.setup.work, packets=tuple(shares[place].packets[0] for place in ALL[1:]))
    found = refused(Fault.SHARES, lambda: made.merchants[0].receive(delivery))
    assert found.culprit == 3
    assert reason in str(found)


@pytest.mark.parametrize("uploads", [range(5), range(4)], ids=["survived", "dropped"])
@pytest.mark.parametrize("kind", [NoPolynomial, AnotherSecret])
def test_shares_of_no_secret_cost_the_sum_and_their_dealer_is_named(
    league: Make, kind: type[Merchant], uploads: range
) -> None:
    """Each fits its commitment, so nobody sees it before the end; nothing is released then."""
    made = corrupted(league.of(5), 4, kind=kind).start()
    round_ = made.open(0, D)
    round_.upload({place: update for place, update in updates(5).items() if place in uploads})
    round_.agree(uploads)
    round_.unmask(uploads)
    with pytest.raises(SumLost) as lost:
        round_.total()
    assert lost.value.culprits == (made.identity(4),)


def test_a_digest_of_another_seed(league: Make) -> None:
    """Corrupt merchant 2 publishes the digest of a seed that it did not deal."""
    made = league.of(5)
    roster = made.join()
    for place, merchant in enumerate(made.merchants):
        shares = merchant.share(roster, 0, {})
        if place == 2:
            shares = shares.model_copy(update={"seed_digests": bytes(32)})
        made.aggregator.add_shares(made.identity(place), shares)
    made.receive()
    round_ = made.open(0, D)
    round_.upload(updates(5))
    round_.agree(range(5))
    round_.unmask(range(5))
    with pytest.raises(SumLost) as lost:
        round_.total()
    assert lost.value.culprits == (made.identity(2),)


# -- survivors and unmasking --------------------------------------------------------------------------------------


def uploaded(made: Make, count: int = 5) -> Any:
    """Return a round of a fresh set-up in which everybody uploaded."""
    round_ = made.start().open(0, D)
    round_.upload(updates(count))
    return round_


def named(round_: Any, *places: int) -> Survivors:
    return Survivors(**round_.sum.work, places=places)


@pytest.mark.parametrize("places", [(0,), (0, 1), (0, 1, 2)])
def test_all_but_one_dropped(league: Make, places: tuple[int, ...]) -> None:
    """The sum over one is its update. Of five with c = 1 four must agree."""
    made = league.of(5)
    round_ = uploaded(made)
    refused(Fault.SURVIVORS, lambda: made.merchants[0].agree(named(round_, *places)))


def test_survivors_under_the_plans_minimum(league: Make) -> None:
    """A quorum is not enough where the noise, or the policy, counts on more."""
    made = league.of(7, n_min=6)
    assert made.parameters.quorum(7) == 5
    round_ = uploaded(made, 7)
    refused(Fault.SURVIVORS, lambda: made.merchants[0].agree(named(round_, 0, 1, 2, 3, 4)))


def test_a_second_survivor_set(league: Make) -> None:
    """With signatures over two sets in one round, a merchant survives in the one and is dropped in the other."""
    made = league.of(5)
    round_ = uploaded(made)
    made.merchants[0].agree(named(round_, 0, 1, 2, 3))
    for places in (ALL, (0, 1, 2, 3)):
        refused(Fault.SURVIVORS, lambda places=places: made.merchants[0].agree(named(round_, *places)))


def test_survivors_without_the_merchant_itself_or_with_a_stranger(league: Make) -> None:
    """The victim is to agree that it dropped out, so that its key is opened; or to a place that nobody holds."""
    made = league.of(5)
    round_ = uploaded(made)
    refused(Fault.SURVIVORS, lambda: made.merchants[0].agree(named(round_, 1, 2, 3, 4)))
    refused(Fault.SURVIVORS, lambda: made.merchants[0].agree(named(round_, 0, 1, 2, 3, 4, 5)))


def test_survivors_before_the_upload(league: Make) -> None:
    """A merchant that agrees first would then upload into a sum whose masks are open."""
    made = league.of(5)
    round_ = made.start().open(0, D)
    refused(Fault.ORDER, lambda: made.merchants[0].agree(named(round_, *ALL)))


def test_two_survivor_sets_for_two_groups_find_no_quorum(league: Make) -> None:
    """Corrupt merchant 4 signs both; however the honest are divided, one set at most has q signatures."""
    without = (0, 1, 2, 4)
    for split in range(5):
        made = corrupted(league.of(5), 4)
        enemy = Conspiracy(uploaded(made), corrupt=(4,))
        told = {place: ALL if place < split else without for place in range(4)}
        told[3] = ALL  # it would not sign a set without itself
        assert sum(bool(helped) for helped in enemy.ask(told).values()) <= 1


def test_two_survivor_sets_that_hardly_meet(league: Make) -> None:
    """Each of two groups is named its own members and the corrupt ones alone: too few to agree on."""
    made = corrupted(league.of(9, n_min=5, c=2), 7, 8)
    round_ = uploaded(made, 9)
    for places in ((0, 1, 2, 7, 8), (3, 4, 5, 7, 8)):
        refused(
            Fault.SURVIVORS, lambda places=places: made.merchants[places[0]].agree(named(round_, *places))
        )
    # Padded with honest ones who were told the other set: enough are named, too few sign.
    enemy = Conspiracy(round_, (7, 8))
    one, other = (0, 1, 2, 3, 7, 8), (2, 3, 4, 5, 7, 8)
    assert enemy.ask({0: one, 1: one, 2: one, 3: other, 4: other, 5: other}) == {one: [], other: []}


def test_an_upload_that_comes_too_late(league: Make) -> None:
    """Merchant 0 survives round 0, and in round 1 is called dropped, though its upload is there.

    All its streams with others are then open. Its own stays secret: neither corrupt merchant 4's share of the seed nor
    the seed of the round before tells it.
    """
    made, update, rest = corrupted(league.of(5, rounds=2), 4), updates(1)[0], (1, 2, 3, 4)
    first = made.start().open(0, D)
    first.upload(dict.fromkeys(range(5), update))
    before = Conspiracy(first, corrupt=(4,))
    before.ask(dict.fromkeys(range(4), ALL))
    second = made.open(1, D)
    held = {place: transcript.share_of(made.merchants[place]._held[1][0], 0, SEED) for place in rest}
    masked = second.upload(dict.fromkeys(range(5), update))
    enemy = Conspiracy(second, corrupt=(4,))
    assert enemy.ask(dict.fromkeys((1, 2, 3), rest)) == {rest: [1, 2, 3]}
    assert all(enemy.stream(0, place) for place in rest)
    assert enemy.uncover(0, masked[0]) is None
    enemy.heap[0, SEED] = before.heap[0, SEED]
    assert not np.any(enemy.uncover(0, masked[0]) == update)
    enemy.heap[0, SEED] = held  # had the others opened both
    assert np.array_equal(enemy.uncover(0, masked[0]), update)


def test_both_secrets_of_one_merchant_are_never_opened(league: Make) -> None:
    """Opened once, as survivor; asked again, as dropped. Of its key the server has the c corrupt shares and no more."""
    made = corrupted(league.of(7, n_min=4, c=2), 5, 6)
    round_ = uploaded(made, 7)
    enemy = Conspiracy(round_, corrupt=(5, 6))
    survivors, without = tuple(range(7)), (0, 1, 2, 4, 5, 6)
    assert enemy.ask(dict.fromkeys(range(5), survivors)) == {survivors: [0, 1, 2, 3, 4]}
    everyones = agreement(round_.sum.work, enemy.sign(without, by=without))
    for place in range(5):
        merchant = made.merchants[place]
        refused(Fault.ORDER, lambda merchant=merchant: merchant.unmask(everyones))
        refused(Fault.ORDER, lambda merchant=merchant: merchant.agree(named(round_, *without)))
        assert merchant._held[0] == {}, "nothing is left that could be opened"
    assert enemy.secret(3, SEED) is not None
    assert len(enemy.heap[3, KEY]) == 2 < made.parameters.threshold(7)
    assert enemy.uncover(3, np.zeros(D, dtype=np.uint32)) is None


def test_what_a_merchant_signed_is_what_it_opens_for(league: Make) -> None:
    """Everybody else, forged here, signs another set than the victim: it opens nothing."""
    made = league.of(5)
    round_ = uploaded(made)
    enemy = Conspiracy(round_)
    made.merchants[0].agree(named(round_, *ALL))
    others = agreement(round_.sum.work, enemy.sign((0, 1, 2, 3), by=(0, 1, 2, 3)))
    refused(Fault.AGREEMENT, lambda: made.merchants[0].unmask(others))


def test_signatures_of_too_few_of_strangers_or_twice(league: Make) -> None:
    """The server makes a quorum out of three signatures."""
    made = league.of(5)
    round_ = uploaded(made)
    enemy = Conspiracy(round_)
    three = enemy.sign(ALL, by=(0, 1, 2))
    made.merchants[0].agree(named(round_, *ALL))
    for bad in (three, three | {3: three[2]}, three | {7: three[2]}, {}):
        refused(Fault.AGREEMENT, lambda bad=bad: made.merchants[0].unmask(agreement(round_.sum.work, bad)))
    with pytest.raises(ValueError, match="ascending"):
        Agreement(**round_.sum.work, places=(0, 0, 1, 2), signatures=bytes(256))
    with pytest.raises(ValueError, match="one signature"):
        Agreement(**round_.sum.work, places=(0, 1, 2), signatures=bytes(256))
    made.merchants[0].unmask(agreement(round_.sum.work, three | enemy.sign(ALL, by=(3,))))


def test_the_signature_of_one_who_is_no_survivor_does_not_count(league: Make) -> None:
    """A corrupt merchant that did not upload signs, so that one honest survivor's word is not needed."""
    made = league.of(5)
    round_ = made.start().open(0, D)
    some = updates(5)
    round_.upload({place: some[place] for place in range(4)})
    enemy, survivors = Conspiracy(round_, corrupt=(4,)), (0, 1, 2, 3)
    assert enemy.ask(dict.fromkeys((0, 1, 2), survivors)) == {survivors: []}


@pytest.mark.parametrize("change", ["round", "attempt", "keys", "model"])
def test_signatures_from_elsewhere(league: Make, change: str) -> None:
    """The same survivors signed before: in another round or attempt, with other keys, or from another model."""
    made = league.of(5, rounds=2)
    first = uploaded(made)
    old = Conspiracy(first).sign(ALL, by=ALL)
    number, model = int(change == "round"), b"other" if change == "model" else b"model"
    victim = made if change == "round" else league.of(5, rounds=2, attempt=int(change == "attempt")).start()
    if change in ("round", "model"):  # everything else is equal
        context = suite.round_context(victim.aggregator.context, 0, b"model".ljust(32))
        statement = transcript.survivor_statement(context, ALL)
        old = {place: signing.sign(victim.identities[place], "survivors", statement) for place in ALL}
    merchant, work = victim.merchants[0], victim.setup.work | {"round": number}
    merchant.open_round(number, model.ljust(32))
    merchant.mask(np.zeros(D, dtype=np.uint32))
    merchant.agree(Survivors(**work, places=ALL))
    refused(Fault.AGREEMENT, lambda: merchant.unmask(agreement(work, old)))


def test_a_signature_over_something_else_is_none_over_survivors(league: Make) -> None:
    """What merchants sign elsewhere, here as packets, has another domain."""
    made = league.of(5)
    round_ = uploaded(made)
    made.merchants[0].agree(named(round_, *ALL))
    statement = transcript.survivor_statement(round_.sum._context, ALL)
    packets = {place: signing.sign(made.identities[place], "packet", statement) for place in ALL}
    refused(Fault.AGREEMENT, lambda: made.merchants[0].unmask(agreement(round_.sum.work, packets)))


def test_a_model_for_each_merchant(league: Make) -> None:
    """A crafted model makes one update tell more. Masks of two models do not cancel, and nobody helps."""
    made = league.of(5).start()
    models = [bytes([place // 3]) * 32 for place in range(5)]  # one for 0, 1, 2 and another for 3, 4
    some, masked, signatures, masks = updates(5), [], {}, []
    sum_ = made.aggregator.open_round(0, models[0], D)
    for place, merchant in enumerate(made.merchants):
        merchant.open_round(0, models[place])
        masks += merchant._round.masks[:1]  # its own: as if all seeds were known
        masked.append(some[place].copy())
        merchant.mask(masked[-1])
        signatures[place] = merchant.agree(Survivors(**sum_.work, places=ALL)).signature
    for merchant in made.merchants:
        asked = agreement(sum_.work, signatures)
        refused(Fault.AGREEMENT, lambda merchant=merchant, asked=asked: merchant.unmask(asked))
    # And had they helped: with the seeds' streams taken out, each part is noise, and so is the whole.
    for parts in ((0, 1, 2), (3, 4), ALL):
        total = total_of(dict(enumerate(masked)), parts)
        apply_masks(total, [Mask(masks[place].key, subtract=True) for place in parts])
        assert not np.any(total == total_of(some, parts))


# -- how much corruption is too much ------------------------------------------------------------------------------


@pytest.mark.parametrize(("corrupt", "falls"), [((4,), False), ((3, 4), False), ((2, 3, 4), True)])
def test_the_threshold_is_what_it_says(league: Make, corrupt: tuple[int, ...], falls: bool) -> None:
    """With c = 1 of five, a majority of corrupt merchants uncovers an upload by their shares; fewer do not."""
    made = corrupted(league.of(5), *corrupt).start()
    assert made.parameters.threshold(5) == 3
    round_ = made.open(0, D)
    some = updates(5)
    masked = round_.upload({0: some[0]})[0]
    found = Conspiracy(round_, corrupt).uncover(0, masked)
    assert (found is not None and np.array_equal(found, some[0])) == falls


@pytest.mark.parametrize("corrupt", [(6,), (5, 6), (4, 5, 6)])
def test_the_quorum_is_what_it_says(league: Make, corrupt: tuple[int, ...]) -> None:
    """Of seven with c = 2, two sets with q = 5 signatures have 2q − n = 3 signers in common.

    Up to c corrupt merchants therefore cannot sign both sets for two groups, however the server divides the honest.
    With c + 1, too few to recover anything by their own shares, there is a division where the group that is told of
    the victim opens its seed, the other its key, and its update is bare: the bound is tight.
    """
    everyone, without, update = tuple(range(7)), (1, 2, 3, 4, 5, 6), updates(1)[0]
    falls = []
    honest = 7 - len(corrupt)
    for split in range(1, honest + 1):
        made = corrupted(league.of(7, n_min=4, c=2), *corrupt)
        assert (made.parameters.quorum(7), made.parameters.threshold(7)) == (5, 4)
        round_ = made.start().open(0, D)
        masked = round_.upload(dict.fromkeys(range(7), update))
        enemy = Conspiracy(round_, corrupt)
        enemy.ask({place: everyone if place < split else without for place in range(honest)})
        found = enemy.uncover(0, masked[0])
        falls.append(found is not None and np.array_equal(found, update))
        if not falls[-1]:
            assert min(len(enemy.heap[0, kind]) for kind in (SEED, KEY)) <= len(corrupt) < 4
    assert any(falls) == (len(corrupt) > made.parameters.c)


# -- merchants that break the protocol ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 4 * D - 4, 4 * D - 1, 4 * D + 1, 4 * D + 4, 8 * D])
def test_an_upload_of_another_length_or_type_is_dropped(league: Make, size: int) -> None:
    """A corrupt merchant uploads too much or too little, or words of another size."""
    made = league.of(5).start()
    round_ = made.open(0, D)
    some = updates(5)
    with pytest.raises(Misbehaviour):
        round_.sum.add_upload(made.identity(4), Upload(**round_.sum.work, vector=bytes(size)))
    round_.upload({place: some[place] for place in range(4)})
    round_.agree(range(4))
    round_.unmask(range(4))
    assert np.array_equal(round_.total(), total_of(some, range(4)))


def test_an_upload_twice_or_too_late_is_not_added(league: Make) -> None:
    """A corrupt merchant would count twice, or spoil a sum that is agreed on."""
    made = league.of(5).start()
    round_ = made.open(0, D)
    some = updates(5)
    masked = round_.upload({place: some[place] for place in range(4)})
    again = Upload(**round_.sum.work, vector=ring.to_bytes(masked[0]))
    with pytest.raises(Misbehaviour):
        round_.sum.add_upload(made.identity(0), again)
    round_.agree(range(4))
    with pytest.raises(Misbehaviour):
        round_.sum.add_upload(made.identity(4), again)
    round_.unmask(range(4))
    assert np.array_equal(round_.total(), total_of(some, range(4)))


@pytest.mark.parametrize("how", ["share", "blind", "wrong kind", "another round", "short", "long"])
def test_a_bad_opening_is_its_holders_and_the_sum_comes_out(league: Make, how: str) -> None:
    """Corrupt merchant 4 spoils the opening of merchant 1's seed, or opens its key instead."""
    made = corrupted(league.of(5, rounds=2), 4)
    round_ = uploaded(made)
    round_.agree(range(5))
    asked, corrupt = round_.sum.agreement(), made.merchants[4]
    blinding, key = corrupt._blindings[1], transcript.share_of(corrupt._held[0][1], 0, KEY)
    later = transcript.share_of(corrupt._held[1][1], 0, SEED) + suite.blind(blinding, 1, SEED)
    good = corrupt.unmask(asked).openings
    before, opening, after = (
        good[:OPENING_BYTES],
        good[OPENING_BYTES : 2 * OPENING_BYTES],
        good[2 * OPENING_BYTES :],
    )
    bad = {
        "share": opening[:5] + bytes([opening[5] ^ 1]) + opening[6:],
        "blind": opening[:-5] + bytes([opening[-5] ^ 1]) + opening[-4:],
        "wrong kind": key + suite.blind(blinding, 0, KEY),
        "another round": later,
        "short": opening[:-1],
        "long": opening,
    }[how]
    with pytest.raises(Misbehaviour):
        round_.sum.add_unmasked(
            made.identity(4),
            Unmasked(**round_.sum.work, openings=before + bad + after + bytes(how == "long")),
        )
    for place in range(4):
        round_.sum.add_unmasked(made.identity(place), made.merchants[place].unmask(asked))
    assert np.array_equal(round_.total(), total_of(updates(5), range(5)))


def test_a_signature_over_other_survivors_is_not_counted(league: Make) -> None:
    """Corrupt merchant 4 agrees to others: counted, its signature would keep honest merchants from helping."""
    made = league.of(5)
    round_ = uploaded(made)
    round_.agree(range(4))
    signature = Conspiracy(round_, corrupt=(4,)).sign((1, 2, 3, 4))[4]
    with pytest.raises(Misbehaviour):
        round_.sum.add_agreed(made.identity(4), Agreed(**round_.sum.work, signature=signature))
    assert round_.sum.agreement().places == (0, 1, 2, 3)
    round_.unmask(range(4))
    assert np.array_equal(round_.total(), total_of(updates(5), range(5)))


def test_joining_in_anothers_name_twice_or_from_outside(league: Make) -> None:
    """A corrupt merchant takes an honest one's place, two places, or one that the league did not give it."""
    made = league.of(5)
    joined = [merchant.join() for merchant in made.merchants]
    made.aggregator.add_member(made.identity(0), joined[0])
    forged = joined[2].member.model_copy(update={"signature": joined[3].member.signature})
    for place, message in ((0, joined[0]), (1, joined[0]), (2, Joined(**made.setup.work, member=forged))):
        with pytest.raises(Misbehaviour):
            made.aggregator.add_member(made.identity(place), message)
    del made.entities[made.identity(4)]
    with pytest.raises(Misbehaviour):
        made.aggregator.add_member(made.identity(4), joined[4])


@pytest.mark.parametrize("how", ["one key for all", "one key for two rounds", "another's", "low order"])
def test_keys_that_nobody_would_accept_cost_their_sender_alone(league: Make, how: str) -> None:
    """Corrupt merchant 4 joins with keys for which all others would refuse any roster: no round would ever begin."""
    made = league.of(5, rounds=2)
    members = [merchant.join().member for merchant in made.merchants]
    own, other = members[4], members[1]
    changed = {
        "one key for all": {"mask_keys": own.mask_keys[:32] + own.sealing_key},
        "one key for two rounds": {"mask_keys": 2 * own.mask_keys[:32]},
        "another's": {"sealing_key": other.mask_keys[:32]},
        "low order": {"mask_keys": own.mask_keys[:32] + bytes(32)},
    }[how]
    for place in range(4):
        made.aggregator.add_member(made.identity(place), Joined(**made.setup.work, member=members[place]))
    bad = resigned(made, 4, **changed)
    with pytest.raises(Misbehaviour, match="key"):
        made.aggregator.add_member(made.identity(4), Joined(**made.setup.work, member=bad))
    roster = made.aggregator.roster()
    assert roster.members == tuple(members[:4])
    made.merchants[0].share(roster, 0, {})


@pytest.mark.parametrize("how", ["sealed", "commitments", "signature", "packets", "digests", "own"])
def test_packets_that_are_short_unsigned_or_too_few_are_dropped(league: Make, how: str) -> None:
    """Passed on, a corrupt merchant's bad packet would make its holder refuse, and the two be hard to tell apart."""
    made = league.of(5)
    shares = made.merchants[1].share(made.join(), 0, {})
    first, own, *rest = shares.packets
    changed: dict[str, dict[str, Any]] = {
        "sealed": {"packets": (first.model_copy(update={"sealed": first.sealed[:-1]}), own, *rest)},
        "commitments": {"packets": (first.model_copy(update={"commitments": b""}), own, *rest)},
        "signature": {"packets": (first.model_copy(update={"signature": bytes(64)}), own, *rest)},
        "packets": {"packets": (first, own, *rest[:-1])},
        "digests": {"seed_digests": b""},
        "own": {"packets": (first, own.model_copy(update={"sealed": first.sealed}), *rest)},
    }
    bad: Shares = shares.model_copy(update=changed[how])
    with pytest.raises(Misbehaviour):
        made.aggregator.add_shares(made.identity(1), bad)
    assert made.identity(1) in made.aggregator.missing_shares()


def test_a_truncated_packet_that_its_dealer_signed_is_dropped(league: Make) -> None:
    """A corrupt merchant signs a packet of another length: the server sees that without opening it."""
    made = corrupted(league.of(5), 3, kind=SealsTooLittle)
    shares = made.merchants[3].share(made.join(), 0, {})
    with pytest.raises(Misbehaviour, match="length"):
        made.aggregator.add_shares(made.identity(3), shares)


# -- what the server cannot choose --------------------------------------------------------------------------------

WORK: dict[str, Any] = {"plan_digest": bytes(32), "round": 0, "attempt": 0}
ASKED = (
    Invitation(
        **WORK,
        rounds=1,
        signed_plan=SignedPlan(plan=b"", signature=bytes(64)),
        signed_directory=SignedDirectory.of(directory(), (CHARTER,)),
    ),
    Delivery(**WORK, packets=()),
    Start(**WORK, model=bytes(4)),
    Survivors(**WORK, places=(0,)),
    Agreement(**WORK, places=(0,), signatures=bytes(64)),
)


@pytest.mark.parametrize(
    "field", ["threshold", "quorum", "modulus", "n_min", "c", "clipping_norm", "noise_multiplier", "suite"]
)
def test_no_message_can_carry_a_parameter(league: Make, field: str) -> None:
    """A threshold of 1, a quorum of 1 or a modulus of the server's choice: no message has a place for it."""
    for message in (*ASKED, league.of(5).join()):
        plain = message.model_dump()
        assert wire.decode(type(message), wire.encode(message), 1 << 22) == message
        data = msgpack.packb([wire.WIRE_VERSION, message.kind, plain | {field: 1}], use_bin_type=True)
        with pytest.raises(WireError, match=field):
            wire.decode(type(message), data, 1 << 22)


def test_threshold_and_quorum_follow_from_the_merchants_own_plan_and_the_roster(league: Make) -> None:
    """t − 1 of the shares that a merchant dealt do not give its seed, t do; whatever the server's own t is."""
    made = corrupted(league.of(7, n_min=4, c=2), *range(7))
    made.aggregator.parameters = Parameters(3, 1)  # the server's, which nobody asked for
    made.start()
    round_ = made.open(0, D)
    seed = made.merchants[0]._round.masks[0].key
    for holders in (3, 4):
        heap = Conspiracy(round_, tuple(range(holders))).heap[0, SEED]
        found = shamir.recover({holder: shamir.from_bytes(share) for holder, share in heap.items()})
        key = suite.self_mask_key(found.to_bytes(33, "big")[1:], round_.sum._context, made.identity(0))
        assert (key == seed) == (holders == 4)


# -- order --------------------------------------------------------------------------------------------------------

TURNS = ("join", "share", "receive", "open", "mask", "agree", "unmask")
ROUND = ("mask", "agree", "unmask")


class Asked:
    """All that a server could ask merchant 0 of five in a set-up of two rounds, truly or not, at any time.

    The other four, and their forks, answer truly; here everybody but merchant 0 signs whatever is needed.
    """

    def __init__(self, made: Make) -> None:
        self.made, self.merchant = made, made.merchants[0]
        whole = made.join()
        self.rosters = {"whole": whole, "part": with_members(whole, whole.members[:4])}
        self.deliveries = {name: self._delivery(roster) for name, roster in self.rosters.items()}
        whole_delivery = self.deliveries["whole"]
        for how in ("one dropped", "swapped"):
            packets = spoil(whole_delivery.packets, how)
            self.deliveries[how] = whole_delivery.model_copy(update={"packets": packets})

    def _delivery(self, roster: Roster) -> Delivery:
        others = self.made.merchants[1 : len(roster.members)]
        packets = [forked(merchant).share(roster, 0, {}).packets[0] for merchant in others]
        return Delivery(**self.made.setup.work, packets=tuple(packets))

    def questions(self) -> Iterator[tuple[Any, ...]]:
        yield ("join",)
        yield from (("share", name) for name in self.rosters)
        yield from (("receive", name) for name in self.deliveries)
        yield from (("open", 0, b"model"), ("open", 0, b"other"), ("open", 1, b"model"))
        yield ("mask",)
        for round_ in (0, 1):
            for places in (ALL, (0, 1, 2, 3), (1, 2, 3, 4), (0, 1)):
                yield from (("agree", round_, places), ("unmask", round_, places))

    def ask(self, merchant: Merchant, question: tuple[Any, ...]) -> Any:
        """Return what the merchant answers. Raises `Refusal`."""
        match question:
            case ("join",):
                return merchant.join()
            case ("share", name):
                return merchant.share(self.rosters[name], 0, {})
            case ("receive", name):
                return merchant.receive(self.deliveries[name])
            case ("open", round_, model):
                return merchant.open_round(round_, model.ljust(32))
            case ("mask",):
                masks = merchant._round.masks if merchant._round else []
                merchant.mask(np.zeros(4, dtype=np.uint32))
                return masks
            case ("agree", round_, places):
                return merchant.agree(Survivors(**self._work(round_), places=places))
            case ("unmask", round_, places):
                context = merchant._round.context if merchant._round else bytes(32)
                statement = transcript.survivor_statement(context, places)
                signatures = {
                    p: signing.sign(self.made.identities[p], "survivors", statement) for p in places
                }
                return merchant.unmask(agreement(self._work(round_), signatures))
            case _:
                raise AssertionError(question)

    def _work(self, round_: int) -> dict[str, Any]:
        return self.made.setup.work | {"round": round_}


def opened_kinds(asked: Asked, held: Any, unmasked: Unmasked) -> set[tuple[int, bytes]]:
    """Return of which dealer which kind was opened."""
    found = set()
    for dealer in held:
        share = unmasked.openings[OPENING_BYTES * dealer :][: shamir.SHARE_BYTES]
        found |= {
            (dealer, kind) for kind in (SEED, KEY) if share == transcript.share_of(held[dealer], 0, kind)
        }
    assert len(found) == len(held)
    return found


def test_nothing_is_answered_twice_in_whatever_order_it_is_asked(league: Make) -> None:
    """Every sequence of questions, of any length: after a question that changed nothing, all is as without it.

    No question is answered twice, none before those that it builds on; no mask covers two vectors; and of no
    member both kinds of shares of a round are opened.
    """
    asked = Asked(league.of(5, rounds=2))
    questions = tuple(asked.questions())
    sequences, longest = 0, 0

    def search(merchant: Merchant, answered: tuple[Any, ...], masks: frozenset[bytes], opened: Any) -> None:
        nonlocal sequences, longest
        sequences, longest = sequences + 1, max(longest, len(answered))
        for question in questions:
            twin = forked(merchant)
            number = twin._round.number if twin._round else -1
            held = dict(twin._held[number]) if twin._round else {}
            try:
                answer = asked.ask(twin, question)
            except Refusal:
                if vars(twin) != vars(merchant):
                    assert question[0] == "receive", "no other refusal may leave a trace"
                    assert not twin._is_ready
                    search(twin, answered, masks, opened)
                continue
            kind, now, new = question[0], masks, opened
            if kind == "mask":
                now = masks | {mask.key for mask in answer}
                assert len(now) == len(masks) + len(answer), "one stream for two vectors"
            if kind == "unmask":
                assert ("agree", number, question[2]) in answered, "opened for survivors that it did not sign"
                new = opened | {(number, *found) for found in opened_kinds(asked, held, answer)}
                assert len({found[:2] for found in new}) == len(new), "both kinds of one member's shares"
            once = (kind, question[1] if kind == "open" else number if kind in ROUND else None)
            assert once not in [(step, of) for step, of, *_ in answered], f"{once} twice, after {answered}"
            search(twin, (*answered, (*once, *question[2:])), now, new)
            order = [step for step, of, *_ in (*answered, once) if of in (None, once[1])]
            assert sorted(order, key=TURNS.index) == order, "out of turn"
            assert all(TURNS.index(b) == TURNS.index(a) + 1 for a, b in pairwise(order))

    search(forked(asked.made.merchants[0]), (("join", None),), frozenset(), frozenset())
    assert longest == 3 + 2 * 4
    assert sequences > 100


@pytest.mark.parametrize("change", [{"plan_digest": bytes(32)}, {"attempt": 1}, {"round": 1}])
def test_questions_about_other_work(league: Make, change: dict[str, Any]) -> None:
    """The server takes questions of one set-up or round into another."""
    made = league.of(5, rounds=2)
    roster, merchant = made.join(), made.merchants[0]
    refused(Fault.ORDER, lambda: merchant.share(roster.model_copy(update=change), 0, {}))
    made.share(roster)
    delivery = made.aggregator.delivery(made.identity(0))
    refused(Fault.ORDER, lambda: merchant.receive(delivery.model_copy(update=change)))
    made.receive()
    round_ = made.open(0, D)
    round_.upload(updates(5))
    refused(Fault.ORDER, lambda: merchant.agree(named(round_, *ALL).model_copy(update=change)))
    round_.agree(range(5))
    asked = round_.sum.agreement()
    refused(Fault.ORDER, lambda: merchant.unmask(asked.model_copy(update=change)))
    merchant.unmask(asked)


def test_a_merchant_that_is_seized_later_gives_nothing_of_a_round_that_is_over(league: Make) -> None:
    """The server kept every packet. With a key that opens them it would have both shares of everyone's secrets."""
    made = league.of(5, rounds=2)
    roster = made.join()
    shares = made.share(roster)
    made.receive()
    merchant, context = made.merchants[0], made.aggregator.context
    keys = [value for value in vars(merchant).values() if isinstance(value, X25519PrivateKey)]
    for key in [*keys, *merchant._keys]:
        with pytest.raises(InvalidTag):
            channel = suite.agree(key, roster.members[1].sealing_key)
            suite.unseal(channel, context, made.identity(1), made.identity(0), shares[1].packets[0].sealed)
    assert merchant._channels == {}
    round_ = made.open(0, D)
    round_.upload(updates(5))
    round_.agree(range(5))
    round_.unmask(range(5))
    assert (merchant._held[0], merchant._pairs[0], merchant._seeds[0]) == ({}, {}, b"")


def test_a_round_is_over_when_the_next_one_is_open(league: Make) -> None:
    """The server opens round 1, and comes back to round 0, whose uploads it has."""
    made = league.of(5, rounds=2)
    round_ = uploaded(made)
    round_.agree(range(5))
    old = round_.sum.agreement()
    made.merchants[0].open_round(1, bytes(32))
    refused(Fault.ORDER, lambda: made.merchants[0].unmask(old))
    refused(Fault.ORDER, lambda: made.merchants[0].open_round(0, bytes(32)))
    assert made.merchants[0]._held[0] == {}


# -- what the server sees -----------------------------------------------------------------------------------------


def looks_uniform(words: Any) -> bool:
    """Return whether the words' bytes, at each position, could be uniform: no once in 10⁸ honest runs."""
    columns = words.view(np.uint8).reshape(-1, 4).T
    return all(chisquare(np.bincount(column, minlength=256)).pvalue > 1e-9 for column in columns)


@pytest.mark.parametrize("update", ["zero", "small", "ones"])
def test_an_upload_looks_uniform_and_another_one_each_round(league: Make, update: str) -> None:
    """The server compares uploads with chance: as they come, and with either of the victim's secrets known."""
    size = 1 << 17
    plain = {
        "zero": np.zeros(size, dtype=np.uint32),
        "small": np.random.default_rng(1).integers(0, 9, size, dtype=np.uint32) - np.uint32(4),
        "ones": np.full(size, 2**32 - 1, dtype=np.uint32),
    }[update]
    assert not looks_uniform(plain)
    made = league.of(4, rounds=2).start()
    merchant, seen = made.merchants[1], []
    for number in (0, 1):
        seed, secrets = merchant._seeds[number], dict(merchant._pairs[number])
        made.open(number, size)
        context, upload = merchant._round.context, plain.copy()
        merchant.mask(upload)
        seen.append(upload)
        own = [Mask(suite.self_mask_key(seed, context, made.identity(1)), subtract=True)]
        pairs = [
            Mask(suite.pair_mask_key(secret, context, made.identity(1), made.identity(place)), place > 1)
            for place, secret in secrets.items()
        ]
        for known in ([], own, pairs, own + pairs):
            rest = upload.copy()
            apply_masks(rest, known)
            assert looks_uniform(rest) == (len(known) < 4)
        assert np.array_equal(rest, plain)
    assert looks_uniform(seen[1] - seen[0])
    assert np.count_nonzero(seen[0] == seen[1]) <= 2
