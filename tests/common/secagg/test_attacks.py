"""What a server that cheats, and up to c merchants with it, try; and what becomes of it.

Merchants 0, 1, … are at these places in the roster. Unless a test says so, the server is the attacker: it may say
anything to anyone.
"""

from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from hanse_common import signing, wire
from hanse_common.errors import WireError
from hanse_common.secagg import ring, shamir, suite, transcript
from hanse_common.secagg.faults import Fault, Misbehaviour, Refusal, SumLost
from hanse_common.secagg.masking import Mask, apply_masks
from hanse_common.secagg.merchant import Merchant
from hanse_common.secagg.messages import (
    OPENING_BYTES,
    SEALED_BYTES,
    Agreed,
    Agreement,
    Delivery,
    Joined,
    Member,
    Packet,
    Roster,
    Shares,
    Survivors,
    Unmasked,
    Upload,
)
from hanse_common.secagg.transcript import KEY, SEED

Make = Any
D = 40


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


def with_members(roster: Roster, members: Any) -> Roster:
    return roster.model_copy(update={"members": tuple(members)})


def test_a_roster_under_the_minimum_or_over_the_maximum(league: Make) -> None:
    made = league.of(6, n_min=5)
    roster = made.join()
    refused(Fault.ROSTER, lambda: made.merchants[0].share(with_members(roster, roster.members[:4]), 0, {}))
    small = made.parameters.__class__(3, 1, 5)
    for check, fine in ((small, False), (made.parameters, True)):
        call = lambda check=check: transcript.check_roster(made.setup, check, made.entities, roster.members)  # noqa: E731
        call() if fine else refused(Fault.ROSTER, call)


def test_an_outsider_in_the_roster_is_named(league: Make) -> None:
    made = league.of(5)
    roster = made.join()
    del made.entities[made.identity(3)]
    assert refused(Fault.ROSTER, lambda: made.merchants[0].share(roster, 0, {})).culprit == 3


def test_one_entity_twice_in_the_roster(league: Make) -> None:
    made = league.of(5)
    roster = made.join()
    made.entities[made.identity(3)] = made.entities[made.identity(4)]
    refused(Fault.ROSTER, lambda: made.merchants[0].share(roster, 0, {}))


def test_one_member_twice_or_out_of_order(league: Make) -> None:
    made = league.of(5)
    roster = made.join()
    doubled = (*roster.members[:4], roster.members[3], roster.members[4])
    for members in (doubled, roster.members[::-1]):
        refused(
            Fault.ROSTER,
            lambda members=members: made.merchants[0].share(with_members(roster, members), 0, {}),
        )


def test_a_roster_without_the_merchant_or_with_other_keys_of_its_own(league: Make) -> None:
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
    made, earlier = league.of(5), league.of(5, **change)
    roster, stale = made.join(), earlier.join()
    mixed = with_members(roster, (*roster.members[:2], stale.members[2], *roster.members[3:]))
    assert refused(Fault.ROSTER, lambda: made.merchants[0].share(mixed, 0, {})).culprit == 2


def resigned(made: Make, place: int, **change: bytes) -> Member:
    """Return other keys of a corrupt merchant, signed by itself."""
    member = made.merchants[place]._member.model_copy(update=change)
    statement = transcript.join_statement(made.setup, member.identity, member.sealing_key, member.mask_keys)
    signature = signing.sign(made.identities[place], "join", statement)
    return member.model_copy(update={"signature": signature})  # type: ignore[no-any-return]


def test_swapped_keys_do_not_carry_their_owners_signature(league: Make) -> None:
    made = league.of(5)
    roster = made.join()
    one, two = roster.members[1], roster.members[2]
    for field in ("sealing_key", "mask_keys"):
        swapped = one.model_copy(update={field: getattr(two, field)})
        mixed = with_members(roster, (roster.members[0], swapped, *roster.members[2:]))
        assert refused(Fault.ROSTER, lambda mixed=mixed: made.merchants[0].share(mixed, 0, {})).culprit == 1


@pytest.mark.parametrize("field", ["sealing_key", "mask_keys"])
def test_a_corrupt_merchant_that_copies_another_ones_keys(league: Make, field: str) -> None:
    made = league.of(5)
    roster = made.join()
    copied = resigned(made, 4, **{field: getattr(roster.members[2], field)})
    mixed = with_members(roster, (*roster.members[:4], copied))
    refused(Fault.ROSTER, lambda: made.merchants[0].share(mixed, 0, {}))


@pytest.mark.parametrize("low", [0, 1, 2**255 - 20, 2**255 - 19, 2**255 - 18])
@pytest.mark.parametrize("field", ["sealing_key", "mask_keys"])
def test_keys_of_low_order_are_noticed_before_any_photo(league: Make, field: str, low: int) -> None:
    """Everybody knows the secret that is shared with such a key."""
    made = league.of(5)
    roster = made.join()
    weak = resigned(made, 4, **{field: low.to_bytes(32, "little")})
    mixed = with_members(roster, (*roster.members[:4], weak))
    assert refused(Fault.ROSTER, lambda: made.merchants[0].share(mixed, 0, {})).culprit == 4


def test_two_rosters(league: Make) -> None:
    """Merchant 0 believes in 0 to 4, all others in 0 to 5: their shares are for another roster."""
    made = league.of(6)
    whole = made.join()
    part = with_members(whole, whole.members[:5])
    made.merchants[0].share(part, 0, {})
    packets = [made.merchants[place].share(whole, 0, {}).packets[0] for place in range(1, 6)]
    delivery = Delivery(**made.setup.work, packets=tuple(packets[:4]))
    assert refused(Fault.SHARES, lambda: made.merchants[0].receive(delivery)).culprit == 1


# -- the shares ---------------------------------------------------------------------------------------------------


def test_split_share_sets(league: Make) -> None:
    """The victim is told that only six honest and both corrupt merchants shared.

    Its shares then lie with 8 others, those of the rest with all: a server could present one set of survivors to
    each part, and both parts would believe that enough are there.
    """
    made = league.of(20, n_min=9, c=2)
    assert (made.parameters.threshold(20), made.parameters.quorum(20)) == (11, 12)
    made.share(made.join())
    whole = made.aggregator.delivery(made.identity(0))
    few = whole.model_copy(update={"packets": whole.packets[:8]})
    victim = made.merchants[0]
    refused(Fault.SHARES, lambda: victim.receive(few))
    refused(Fault.ORDER, lambda: victim.open_round(0, bytes(32)))


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
    }[how]


@pytest.mark.parametrize(
    "how", ["tampered", "truncated", "empty", "other commitments", "unsigned", "swapped", "one twice"]
)
def test_packets_that_are_tampered_with(league: Make, how: str) -> None:
    made = league.of(5)
    made.share(made.join())
    delivery = made.aggregator.delivery(made.identity(0))
    bad = delivery.model_copy(update={"packets": spoil(delivery.packets, how)})
    assert refused(Fault.SHARES, lambda: made.merchants[0].receive(bad)).culprit in (1, 2)


def test_a_packet_for_another_holder(league: Make) -> None:
    made = league.of(5)
    shares = made.share(made.join())
    delivery = made.aggregator.delivery(made.identity(0))
    packets = (shares[1].packets[2], *delivery.packets[1:])
    bad = delivery.model_copy(update={"packets": packets})
    assert refused(Fault.SHARES, lambda: made.merchants[0].receive(bad)).culprit == 1


class BadDealer(Merchant):
    """A corrupt merchant that spoils what it deals; `how` names the way."""

    how = ""

    def _deal(self, *arguments: Any) -> tuple[Packet, ...]:
        if self.how == "no polynomial":
            before, shamir.split = (
                shamir.split,
                lambda secret, t, n: [secret ^ (k * k * k + 1) for k in range(n)],
            )
            try:
                return super()._deal(*arguments)
            finally:
                shamir.split = before
        packets = list(super()._deal(*arguments))
        if self.how == "contradicts":  # one holder gets a share that was not committed to
            holder = self._members[0].identity
            plain = bytearray(
                suite.unseal(self._channels[0], self._context, self._own, holder, packets[0].sealed)
            )
            plain[-1] ^= 1
            sealed = suite.seal(self._channels[0], self._context, self._own, holder, bytes(plain))
            statement = transcript.packet_statement(
                self._context, self._own, holder, sealed, packets[0].commitments
            )
            signature = signing.sign(self._identity, "packet", statement)
            packets[0] = Packet(sealed=sealed, commitments=packets[0].commitments, signature=signature)
        return tuple(packets)


def with_bad_dealer(made: Make, place: int, how: str) -> Make:
    corrupt = BadDealer(made.setup, made.parameters, made.identities[place], made.entities)
    corrupt.how = how
    made.merchants[place] = corrupt
    return made


def test_a_share_that_opens_but_contradicts_its_commitment(league: Make) -> None:
    made = with_bad_dealer(league.of(5), 3, "contradicts")
    made.share(made.join())
    delivery = made.aggregator.delivery(made.identity(0))
    assert refused(Fault.SHARES, lambda: made.merchants[0].receive(delivery)).culprit == 3


@pytest.mark.parametrize("uploads", [range(5), range(4)], ids=["survived", "dropped"])
def test_shares_of_no_secret_cost_the_sum_and_their_dealer_is_named(league: Make, uploads: range) -> None:
    """Each fits its commitment, so nobody sees it before the end; nothing is released then."""
    made = with_bad_dealer(league.of(5), 4, "no polynomial").start()
    round_ = made.open(0, D)
    round_.upload({place: update for place, update in updates(5).items() if place in uploads})
    round_.agree(uploads)
    round_.unmask(uploads)
    with pytest.raises(SumLost) as lost:
        round_.total()
    assert lost.value.culprits == (made.identity(4),)


def test_a_digest_of_another_seed(league: Make) -> None:
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


def test_all_but_one_dropped(league: Make) -> None:
    """The sum over one is its update."""
    for places in ((0,), (0, 1), (0, 1, 2)):  # of five with c = 1 four must agree
        made = league.of(5)
        refused(
            Fault.SURVIVORS, lambda made=made, p=places: made.merchants[0].agree(named(uploaded(made), *p))
        )


def test_survivors_under_the_plans_minimum(league: Make) -> None:
    """A quorum is not enough where the noise, or the policy, counts on more."""
    made = league.of(7, n_min=6)
    assert made.parameters.quorum(7) == 5
    round_ = uploaded(made, 7)
    refused(Fault.SURVIVORS, lambda: made.merchants[0].agree(named(round_, 0, 1, 2, 3, 4)))


def test_a_second_survivor_set(league: Make) -> None:
    made = league.of(5)
    round_ = uploaded(made)
    made.merchants[0].agree(named(round_, 0, 1, 2, 3))
    for places in ((0, 1, 2, 3, 4), (0, 1, 2, 3)):
        refused(Fault.SURVIVORS, lambda places=places: made.merchants[0].agree(named(round_, *places)))


def test_survivors_without_the_merchant_itself_or_with_a_stranger(league: Make) -> None:
    made = league.of(5)
    round_ = uploaded(made)
    refused(Fault.SURVIVORS, lambda: made.merchants[0].agree(named(round_, 1, 2, 3, 4)))
    refused(Fault.SURVIVORS, lambda: made.merchants[0].agree(named(round_, 0, 1, 2, 3, 4, 5)))


def test_survivors_before_the_upload(league: Make) -> None:
    made = league.of(5)
    round_ = made.start().open(0, D)
    refused(Fault.ORDER, lambda: made.merchants[0].agree(named(round_, 0, 1, 2, 3, 4)))


def agreement(round_: Any, signatures: dict[int, bytes]) -> Agreement:
    places = tuple(sorted(signatures))
    return Agreement(**round_.sum.work, places=places, signatures=b"".join(signatures[p] for p in places))


def test_two_survivor_sets_for_two_groups_find_no_quorum(league: Make) -> None:
    """Corrupt merchant 4 signs both; however the honest are divided, one set at most has q signatures."""
    everyone, without = (0, 1, 2, 3, 4), (0, 1, 2, 4)
    for split in range(5):
        made = league.of(5)
        round_ = uploaded(made)
        told = {place: everyone if place < split else without for place in range(4)}
        told[3] = everyone  # it would not sign a set without itself
        signed: dict[Any, dict[int, bytes]] = {everyone: {}, without: {}}
        for place, places in told.items():
            signed[places][place] = made.merchants[place].agree(named(round_, *places)).signature
        for places in (everyone, without):
            statement = transcript.survivor_statement(round_.sum._context, places)
            signed[places][4] = signing.sign(made.identities[4], "survivors", statement)
        opened = set()
        for place, places in told.items():
            try:
                made.merchants[place].unmask(agreement(round_, signed[places]))
                opened.add(places)
            except Refusal as refusal:
                assert refusal.fault is Fault.AGREEMENT
        assert len(opened) <= 1


def test_both_secrets_of_one_merchant_are_never_opened(league: Make) -> None:
    """Opened once, as survivor; asked again, as dropped."""
    made = league.of(5)
    round_ = uploaded(made)
    round_.agree(range(5))
    asked = round_.sum.agreement()
    opened = made.merchants[0].unmask(asked)
    assert len(opened.openings) == 5 * OPENING_BYTES
    refused(Fault.ORDER, lambda: made.merchants[0].unmask(asked))
    refused(Fault.ORDER, lambda: made.merchants[0].agree(named(round_, 0, 1, 2, 3)))
    assert made.merchants[0]._held[0] == {}, "nothing is left that could be opened"


def test_signatures_of_too_few_of_strangers_or_twice(league: Make) -> None:
    made = league.of(5)
    round_ = uploaded(made)
    round_.agree(range(5))
    signatures = dict(round_.sum._signatures)
    three = {place: signatures[place] for place in (0, 1, 2)}
    forged = three | {3: signatures[2]}
    for bad in (three, forged, {}):
        victim = league.of(5)
        other = uploaded(victim)
        victim.merchants[0].agree(named(other, 0, 1, 2, 3, 4))
        refused(Fault.AGREEMENT, lambda v=victim, o=other, b=bad: v.merchants[0].unmask(agreement(o, b)))
    with pytest.raises(ValueError, match="ascending"):
        Agreement(**round_.sum.work, places=(0, 0, 1, 2), signatures=bytes(256))


def test_the_signature_of_one_who_is_no_survivor_does_not_count(league: Make) -> None:
    made = league.of(5)
    round_ = made.start().open(0, D)
    some = updates(5)
    round_.upload({place: some[place] for place in range(4)})
    survivors = named(round_, 0, 1, 2, 3)
    signatures = {place: made.merchants[place].agree(survivors).signature for place in (0, 1, 2)}
    statement = transcript.survivor_statement(round_.sum._context, (0, 1, 2, 3))
    signatures[4] = signing.sign(made.identities[4], "survivors", statement)
    refused(Fault.AGREEMENT, lambda: made.merchants[0].unmask(agreement(round_, signatures)))


@pytest.mark.parametrize("change", ["round", "attempt", "model"])
def test_signatures_from_elsewhere(league: Make, change: str) -> None:
    """The same survivors signed before: in another round, another set-up, or from another model."""
    made = league.of(5, rounds=2)
    round_ = uploaded(made)
    round_.agree(range(5))
    old = dict(round_.sum._signatures)
    if change == "round":
        victim, number = made, 1
    else:
        victim, number = league.of(5, rounds=2, attempt=int(change == "attempt")).start(), 0
    later = victim.open(number, D) if change != "model" else None
    if later is None:
        for merchant in victim.merchants:
            merchant.open_round(0, b"another model".ljust(32))
        later = type(round_)(victim, victim.aggregator.open_round(0, b"another model".ljust(32), D))
    later.upload(updates(5))
    victim.merchants[0].agree(named(later, 0, 1, 2, 3, 4))
    refused(Fault.AGREEMENT, lambda: victim.merchants[0].unmask(agreement(later, old)))


def test_a_model_for_each_merchant(league: Make) -> None:
    """A crafted model makes one update tell more. Masks of two models do not cancel, and nobody helps."""
    made = league.of(5).start()
    models = [bytes([place // 3]) * 32 for place in range(5)]  # one for 0, 1, 2 and another for 3, 4
    some, masked, signatures = updates(5), [], {}
    sum_ = made.aggregator.open_round(0, models[0], D)
    for place, merchant in enumerate(made.merchants):
        merchant.open_round(0, models[place])
        masked.append(some[place].copy())
        merchant.mask(masked[-1])
        survivors = Survivors(**sum_.work, places=(0, 1, 2, 3, 4))
        signatures[place] = merchant.agree(survivors).signature
    asked = Agreement(**sum_.work, places=(0, 1, 2, 3, 4), signatures=b"".join(signatures.values()))
    for merchant in made.merchants:
        refused(Fault.AGREEMENT, lambda merchant=merchant: merchant.unmask(asked))
    # And had they helped: the seeds' streams taken out, what is left is no sum.
    total = np.sum(masked, axis=0, dtype=np.uint32)
    same = league.of(5).start()
    round_ = same.open(0, D)
    round_.upload(some)
    round_.agree(range(5))
    round_.unmask(range(5))
    assert np.array_equal(round_.total(), total_of(some, range(5)))
    assert not np.array_equal(total, total_of(some, range(5)))


# -- how much corruption is too much ------------------------------------------------------------------------------


def uncovered(made: Make, corrupt: tuple[int, ...], masked: Any) -> Any:
    """Return the upload of merchant 0 less the masks that the corrupt merchants' shares give the server."""
    held = [made.merchants[place]._held[0][0] for place in corrupt]
    seed, key = (
        shamir.recover(
            {
                place: shamir.from_bytes(transcript.share_of(shares, 0, kind))
                for place, shares in zip(corrupt, held, strict=True)
            }
        )
        for kind in (SEED, KEY)
    )
    if max(seed, key) >= 1 << 256:
        return None
    context = made.merchants[0]._round.context
    masks = [Mask(suite.self_mask_key(seed.to_bytes(32, "big"), context, made.identity(0)), subtract=True)]
    private = X25519PrivateKey.from_private_bytes(key.to_bytes(32, "big"))
    for place in range(1, len(made.merchants)):
        shared = suite.agree(private, transcript.mask_key(made.merchants[0]._members[place], 0))
        masks.append(
            Mask(suite.pair_mask_key(shared, context, made.identity(0), made.identity(place)), subtract=True)
        )
    found = masked.copy()
    apply_masks(found, masks)
    return found


@pytest.mark.parametrize(("corrupt", "falls"), [((4,), False), ((3, 4), False), ((2, 3, 4), True)])
def test_the_threshold_is_what_it_says(league: Make, corrupt: tuple[int, ...], falls: bool) -> None:
    """With c = 1 of five, a majority of corrupt merchants uncovers an upload by their shares; fewer do not."""
    made = league.of(5).start()
    assert made.parameters.threshold(5) == 3
    round_ = made.open(0, D)
    some = updates(5)
    masked = round_.upload({0: some[0]})[0]
    found = uncovered(made, corrupt, masked)
    assert (found is not None and np.array_equal(found, some[0])) == falls


def test_a_quorum_is_what_it_says(league: Make) -> None:
    """2q − n merchants that sign two sets, here three instead of c = 1, give both sets their signatures."""
    one, other = (0, 2, 3, 4), (1, 2, 3, 4)
    for corrupt, falls in (((2, 3, 4), True), ((3, 4), False), ((4,), False)):
        made = league.of(5)
        round_ = uploaded(made)
        opened = []
        for victim, places in ((0, one), (1, other)):
            signatures = {victim: made.merchants[victim].agree(named(round_, *places)).signature}
            for place in corrupt:
                statement = transcript.survivor_statement(round_.sum._context, places)
                signatures[place] = signing.sign(made.identities[place], "survivors", statement)
            try:
                opened.append(made.merchants[victim].unmask(agreement(round_, signatures)))
            except Refusal as refusal:
                assert refusal.fault is Fault.AGREEMENT
        assert bool(opened) == falls


# -- merchants that break the protocol ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 4 * D - 4, 4 * D - 1, 4 * D + 1, 4 * D + 4, 8 * D])
def test_an_upload_of_another_length_or_type_is_dropped(league: Make, size: int) -> None:
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


@pytest.mark.parametrize("how", ["share", "blind", "wrong kind", "short"])
def test_a_bad_opening_is_its_holders_and_the_sum_comes_out(league: Make, how: str) -> None:
    made = league.of(5)
    round_ = uploaded(made)
    round_.agree(range(5))
    asked = round_.sum.agreement()
    kind = made.merchants[4]._held[0][1][shamir.SHARE_BYTES :]
    good = made.merchants[4].unmask(asked).openings
    bad = {
        "share": good[:5] + bytes([good[5] ^ 1]) + good[6:],
        "blind": good[:60] + bytes([good[60] ^ 1]) + good[61:],
        "wrong kind": good[:OPENING_BYTES] + kind + good[OPENING_BYTES + shamir.SHARE_BYTES :],
        "short": good[:-1],
    }[how]
    with pytest.raises(Misbehaviour):
        round_.sum.add_unmasked(made.identity(4), Unmasked(**round_.sum.work, openings=bad))
    for place in range(4):
        round_.sum.add_unmasked(made.identity(place), made.merchants[place].unmask(asked))
    assert np.array_equal(round_.total(), total_of(updates(5), range(5)))


def test_a_signature_over_other_survivors_is_not_counted(league: Make) -> None:
    made = league.of(5)
    round_ = uploaded(made)
    round_.agree(range(4))
    statement = transcript.survivor_statement(round_.sum._context, (1, 2, 3, 4))
    signature = signing.sign(made.identities[4], "survivors", statement)
    with pytest.raises(Misbehaviour):
        round_.sum.add_agreed(made.identity(4), Agreed(**round_.sum.work, signature=signature))
    assert round_.sum.agreement().places == (0, 1, 2, 3)


def test_joining_in_anothers_name_twice_or_from_outside(league: Make) -> None:
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


def test_packets_that_are_short_unsigned_or_too_few_are_dropped(league: Make) -> None:
    made = league.of(5)
    shares = made.merchants[1].share(made.join(), 0, {})
    first, *rest = shares.packets
    assert len(first.sealed) > SEALED_BYTES
    for packets in (
        (first.model_copy(update={"sealed": first.sealed[:-1]}), *rest),
        (first.model_copy(update={"commitments": first.commitments[:-32]}), *rest),
        (first.model_copy(update={"signature": bytes(64)}), *rest),
        tuple(rest),
    ):
        bad: Shares = shares.model_copy(update={"packets": packets})
        with pytest.raises(Misbehaviour):
            made.aggregator.add_shares(made.identity(1), bad)


# -- what the server cannot choose, and order ---------------------------------------------------------------------


@pytest.mark.parametrize("field", ["threshold", "quorum", "modulus", "n_min", "c", "clipping_norm"])
def test_no_message_can_carry_a_parameter(league: Make, field: str) -> None:
    roster = league.of(5).join()
    for message in (roster, Survivors(**roster.work, places=(0,))):
        fields = message.model_dump() | {field: 2}
        data = msgpack.packb([wire.WIRE_VERSION, message.kind, fields], use_bin_type=True)
        with pytest.raises(WireError, match=field):
            wire.decode(type(message), data, 1 << 22)


STEPS = ("join", "share", "receive", "open 0", "open 1", "mask", "agree", "agree other", "unmask")


@settings(max_examples=150, deadline=None)
@given(order=st.lists(st.sampled_from(STEPS), min_size=1, max_size=14))
def test_nothing_is_answered_twice_in_whatever_order_it_is_asked(league: Make, order: list[str]) -> None:
    """A merchant whose server asks at random; the other four answer truly. Refusals leave it as it was or done."""
    made = league.of(5, rounds=2)
    roster = made.join()
    delivery: Delivery | None = None
    merchant, number = made.merchants[0], 0
    done: list[tuple[str, int]] = []

    def agreed(places: tuple[int, ...]) -> Survivors:
        return Survivors(**(made.setup.work | {"round": number}), places=places)

    for step in order:
        try:
            if step == "join":
                merchant.join()
            elif step == "share":
                made.aggregator.add_shares(made.identity(0), merchant.share(roster, 0, {}))
                for place in range(1, 5):
                    made.aggregator.add_shares(
                        made.identity(place), made.merchants[place].share(roster, 0, {})
                    )
                delivery = made.aggregator.delivery(made.identity(0))
            elif step == "receive":
                merchant.receive(delivery or Delivery(**made.setup.work, packets=()))
            elif step.startswith("open"):
                merchant.open_round(int(step[-1]), bytes(32))
                number = int(step[-1])
            elif step == "mask":
                merchant.mask(np.zeros(4, dtype=np.uint32))
            elif step.startswith("agree"):
                merchant.agree(agreed((0, 1, 2, 3) if "other" in step else (0, 1, 2, 3, 4)))
                step = "agree"
            else:
                context = merchant._round.context if merchant._round else b""
                survivors = (merchant._round.survivors or ()) if merchant._round else ()
                statement = transcript.survivor_statement(context.ljust(32, b"\0"), survivors)
                signatures = {
                    place: signing.sign(made.identities[place], "survivors", statement) for place in survivors
                }
                places = tuple(sorted(signatures))
                merchant.unmask(
                    Agreement(
                        **agreed(()).work, places=places, signatures=b"".join(signatures[p] for p in places)
                    )
                )
        except Refusal:
            continue
        done.append((step, number if step in ("mask", "agree", "unmask") else -1))
    assert len(set(done)) == len(done), done
    kinds = [step for step, _ in done]
    for before, after in (("share", "receive"), ("receive", "mask"), ("mask", "agree"), ("agree", "unmask")):
        if after in kinds:
            assert before in kinds
            assert kinds.index(before) < kinds.index(after)
