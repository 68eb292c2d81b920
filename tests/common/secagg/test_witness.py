"""Ledger counters: signed, remembered by others, and a merchant whose ledger was put back does not go on."""

from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from hanse_common import signing
from hanse_common.errors import SignatureInvalid
from hanse_common.secagg.faults import Fault, Refusal
from hanse_common.secagg.messages import COUNTER_BYTES, SEALED_BYTES, SHARES_BYTES
from hanse_common.secagg.witness import NO_WITNESS, Witness

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OWNER = signing.public_bytes(KEY)


@given(st.integers(0, (1 << 63) - 1))
def test_a_counter_comes_back_from_its_bytes(counter: int) -> None:
    witness = Witness.sign(KEY, counter)
    data = witness.to_bytes()
    assert len(data) == COUNTER_BYTES
    assert Witness.from_bytes(data, OWNER) == witness
    assert witness.counter == counter


def test_only_its_owner_can_sign_a_counter() -> None:
    other = Ed25519PrivateKey.generate()
    data = Witness.sign(KEY, 7).to_bytes()
    with pytest.raises(SignatureInvalid):
        Witness.from_bytes(data, signing.public_bytes(other))
    with pytest.raises(SignatureInvalid):
        Witness.from_bytes(Witness.sign(other, 7).to_bytes(), OWNER)
    for counter in (0, 6, 8, 1 << 62, 1 << 63, (1 << 64) - 1):
        with pytest.raises(SignatureInvalid):
            Witness.from_bytes(counter.to_bytes(8, "big") + data[8:], OWNER)
    for bit in range(0, 8 * len(data), 5):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(SignatureInvalid):
            Witness.from_bytes(bytes(flipped), OWNER)
    for wrong in (b"", data[:8], data[:-1], data + b"\0", NO_WITNESS.to_bytes()):
        with pytest.raises(SignatureInvalid):
            Witness.from_bytes(wrong, OWNER)


def test_a_signature_of_another_domain_is_no_counter() -> None:
    from hanse_common import wire
    from hanse_common.secagg.suite import CounterStatement

    statement = wire.encode(CounterStatement(identity=OWNER, counter=7))
    right = signing.sign(KEY, "counter", statement)
    assert Witness.from_bytes((7).to_bytes(8, "big") + right, OWNER) == Witness.sign(KEY, 7)
    for domain in ("join", "packet", "survivors", ""):
        wrong = (7).to_bytes(8, "big") + signing.sign(KEY, domain, statement)
        with pytest.raises(SignatureInvalid):
            Witness.from_bytes(wrong, OWNER)


def test_everyone_learns_the_signed_counters_of_all_others(league: Any) -> None:
    started = league.of(4)
    started.share(started.join(), counters={0: 10, 1: 11, 2: 0, 3: 13})
    for place, seen in enumerate(started.receive()):
        expected = {0: 10, 1: 11, 2: 0, 3: 13}
        del expected[place]
        assert {identity: witness.counter for identity, witness in seen.items()} == {
            started.identity(other): counter for other, counter in expected.items()
        }
        for identity, witness in seen.items():
            assert Witness.from_bytes(witness.to_bytes(), identity) == witness


def seen_at(league: Any, counter: int, n: int = 4) -> list[dict[bytes, Witness]]:
    """Return what each of `n` merchants learned in a first set-up where the ledger at place 1 was at `counter`."""
    first = league.of(n)
    first.share(first.join(), counters={1: counter})
    return first.receive()


@pytest.mark.parametrize("counter", [10, 11, 1 << 40])
def test_a_ledger_that_only_grew_goes_on(league: Any, counter: int) -> None:
    seen = seen_at(league, 10)
    again = league.of(4, attempt=1)
    again.share(again.join(), {1: counter}, dict(enumerate(seen)))
    again.receive()


@pytest.mark.parametrize("counter", [0, 9])
@pytest.mark.parametrize("remembering", [(0, 2, 3), (3,)])
def test_a_ledger_put_back_is_refused_when_one_peer_remembers(
    league: Any, counter: int, remembering: tuple[int, ...]
) -> None:
    seen = seen_at(league, 10)
    again = league.of(4, attempt=1)
    again.share(again.join(), {1: counter}, {place: seen[place] for place in remembering})
    for place in (0, 2, 3):  # it is nobody else's affair
        again.merchants[place].receive(again.aggregator.delivery(again.identity(place)))
    with pytest.raises(
        Refusal, match=f"your ledger has {counter} entries, but a peer saw it with 10"
    ) as refusal:
        again.merchants[1].receive(again.aggregator.delivery(again.identity(1)))
    assert refusal.value.fault is Fault.LEDGER
    assert refusal.value.culprit is None
    with pytest.raises(Refusal):  # nothing is trained
        again.merchants[1].open_round(0, bytes(32))


def test_a_ledger_put_back_goes_unnoticed_only_where_nobody_remembers(league: Any) -> None:
    again = league.of(4, attempt=1)
    again.share(again.join(), {1: 0})
    again.receive()


@pytest.mark.parametrize(
    "forged",
    [
        Witness(99, bytes(64)),
        Witness(99, Witness.sign(KEY, 99).signature),
        Witness(0, b"\x01" * 64),
        Witness(1 << 63, bytes(64)),
    ],
)
def test_a_forged_witness_is_its_bearers_fault(league: Any, forged: Witness) -> None:
    started = league.of(4)
    started.share(started.join(), {1: 5}, {2: {started.identity(1): forged}})
    with pytest.raises(Refusal, match="counters are malformed") as refusal:
        started.merchants[1].receive(started.aggregator.delivery(started.identity(1)))
    assert refusal.value.fault is Fault.SHARES
    assert refusal.value.culprit == 2


def test_another_merchants_counter_does_not_pass_for_ones_own(league: Any) -> None:
    seen = seen_at(league, 50)
    again = league.of(4, attempt=1)
    # Place 2 returns place 1's counter to place 3.
    again.share(again.join(), {1: 50}, {2: {again.identity(3): seen[2][again.identity(1)]}})
    with pytest.raises(Refusal) as refusal:
        again.merchants[3].receive(again.aggregator.delivery(again.identity(3)))
    assert (refusal.value.fault, refusal.value.culprit) == (Fault.SHARES, 2)


@pytest.mark.parametrize("rounds", [1, 3])
def test_the_server_sees_the_same_sizes_with_and_without_a_witness(league: Any, rounds: int) -> None:
    seen = seen_at(league, 10)
    sizes = []
    for witnesses in ({}, dict(enumerate(seen))):
        for counters in ({}, {1: (1 << 62) + 1}):
            if witnesses and not counters:
                continue
            started = league.of(4, attempt=1, rounds=rounds)
            dealt = started.share(started.join(), counters, witnesses)
            sizes.append([[len(packet.sealed) for packet in shares.packets] for shares in dealt])
    full = SEALED_BYTES + SHARES_BYTES * rounds
    expected = [[0 if holder == dealer else full for holder in range(4)] for dealer in range(4)]
    assert sizes == [expected] * 3


def test_a_counter_is_not_readable_by_the_server(league: Any) -> None:
    started = league.of(3)
    dealt = started.share(started.join(), {0: 0x0102030405060708})
    for shares in dealt:
        assert all(bytes(range(1, 9)) not in packet.sealed for packet in shares.packets)
