"""The whole protocol among honest parties: the sum is the plain sum, or it is lost, by what answers arrive."""

import hashlib
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hanse_common import signing
from hanse_common.secagg import ring, suite, transcript
from hanse_common.secagg.faults import Fault, Misbehaviour, Refusal, SumLost
from hanse_common.secagg.masking import CHUNK_WORDS
from hanse_common.secagg.messages import Agreed, Agreement, Upload


def updates_of(places: Any, dimension: int, seed: int = 0) -> dict[int, NDArray[np.uint32]]:
    """Return an update for each place, over the whole ring."""
    random = np.random.default_rng(seed)
    return {place: random.integers(0, 1 << 32, dimension, dtype=np.uint32) for place in places}


def plain_sum(updates: dict[int, NDArray[np.uint32]]) -> list[int]:
    """Return the sum mod 2³², in Python's integers."""
    columns = zip(*(update.tolist() for update in updates.values()), strict=True)
    return [sum(column) % (1 << 32) for column in columns]


@st.composite
def parameters(draw: st.DrawFn) -> tuple[int, int, int]:
    """Draw n, n_min and c."""
    n = draw(st.integers(3, 8))
    c = draw(st.integers(1, min(n - 2, n // 2)))
    return n, draw(st.integers(max(c + 2, 2 * c), n)), c


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(parameters(), st.data())
def test_a_round_gives_the_plain_sum_just_when_enough_answer(
    league: Any, setting: tuple[int, int, int], data: st.DataObject
) -> None:
    n, n_min, c = setting
    first, rounds = data.draw(st.sampled_from([0, 7])), data.draw(st.integers(1, 3))
    started = league.of(n, n_min, c, round=first, rounds=rounds).start()
    required = started.parameters.required(n)
    quorum, threshold = started.parameters.quorum(n), started.parameters.threshold(n)
    assert required <= n
    held = data.draw(st.sets(st.integers(first, first + rounds - 1), min_size=1))
    for number in sorted(held):
        order = data.draw(st.permutations(range(n)))
        uploaded = order[: data.draw(st.integers(required - 1, n))]
        opened = set(uploaded) | data.draw(st.sets(st.integers(0, n - 1)))
        dimension = data.draw(st.integers(1, 70))
        updates = updates_of(uploaded, dimension, data.draw(st.integers(0, 99)))
        round_ = started.open(number, dimension, opened)
        round_.upload(updates)
        if len(uploaded) < required:
            with pytest.raises(SumLost, match=f"{required} are needed"):
                round_.sum.survivors()
            continue
        signed = uploaded[: data.draw(st.integers(quorum - 1, len(uploaded)))]
        round_.agree(signed)
        if len(signed) < quorum:
            with pytest.raises(SumLost, match=f"{quorum} are needed"):
                round_.sum.agreement()
            continue
        helped = data.draw(st.permutations(signed))[: data.draw(st.integers(threshold - 1, len(signed)))]
        round_.unmask(helped)
        if len(helped) < threshold:
            with pytest.raises(SumLost, match=f"{threshold} are needed"):
                round_.total()
            continue
        assert round_.sum.places == tuple(sorted(uploaded))
        assert round_.total(threads=data.draw(st.sampled_from([1, 2]))).tolist() == plain_sum(updates)


@pytest.mark.parametrize("size", [CHUNK_WORDS - 1, CHUNK_WORDS, 2 * CHUNK_WORDS + 3])
def test_vectors_longer_than_a_chunk(league: Any, size: int) -> None:
    round_ = league.of(4, 3).start().open(0, size)
    updates = updates_of((0, 2, 3), size)
    round_.upload(updates)
    round_.agree(updates)
    round_.unmask((3, 0, 2))
    total = round_.total(threads=3)
    assert np.array_equal(total, updates[0] + updates[2] + updates[3])


# n = 7, n_min = 4, c = 2: t = 4, q = 5, required 5. Each trip on its own edge.


def at_the_edge(league: Any, uploads: int, signers: int, helpers: int) -> Any:
    """Return a round of seven in which as many answer, up to the last trip."""
    round_ = league.of(7, 4, 2).start().open(0, 3)
    round_.upload(updates_of(range(uploads), 3))
    round_.agree(range(signers))
    round_.unmask(range(signers - helpers, signers))
    return round_


@pytest.mark.parametrize(
    ("uploads", "signers", "helpers"),
    [(7, 7, 7), (5, 5, 5), (5, 5, 4), (7, 5, 4), (7, 6, 5), (6, 6, 4)],
)
def test_exactly_as_many_as_are_needed_are_enough(
    league: Any, uploads: int, signers: int, helpers: int
) -> None:
    total = at_the_edge(league, uploads, signers, helpers).total()
    assert total.tolist() == plain_sum(updates_of(range(uploads), 3))


@pytest.mark.parametrize(
    ("uploads", "signers", "helpers", "text"),
    [
        (4, 4, 4, "4 of 7 uploaded, 5 are needed"),
        (7, 4, 4, "4 signed the survivors, 5 are needed"),
        (5, 4, 4, "4 signed the survivors, 5 are needed"),
        (7, 7, 3, "3 helped to unmask, 4 are needed"),
        (5, 5, 0, "0 helped to unmask, 4 are needed"),
    ],
)
def test_one_fewer_loses_the_sum_and_is_nobodys_fault(
    league: Any, uploads: int, signers: int, helpers: int, text: str
) -> None:
    with pytest.raises(SumLost, match=text) as lost:
        at_the_edge(league, uploads, signers, helpers).total()
    assert lost.value.culprits == ()


def test_a_merchant_needs_a_quorum_of_signatures_whatever_the_server_says(league: Any) -> None:
    for count in (4, 5):
        started = league.of(7, 4, 2).start()
        round_ = started.open(0, 3)
        round_.upload(updates_of(range(7), 3))
        round_.agree(range(7))
        full = round_.sum.agreement()
        fewer = Agreement(**full.work, places=full.places[:count], signatures=full.signatures[: 64 * count])
        if count == 5:
            started.merchants[6].unmask(fewer)
            continue
        with pytest.raises(Refusal, match="found 4 signatures over the survivors, expected 5") as refusal:
            started.merchants[6].unmask(fewer)
        assert refusal.value.fault is Fault.AGREEMENT


def test_one_whose_signature_was_lost_may_still_help(league: Any) -> None:
    started = league.of(5, 4).start()
    round_ = started.open(0, 3)
    updates = updates_of(range(5), 3)
    round_.upload(updates)
    round_.agree(range(4))
    started.merchants[4].agree(round_.sum.survivors())
    round_.unmask((4, 0, 2))
    assert round_.total().tolist() == plain_sum(updates)


def test_a_signature_of_one_who_did_not_upload_does_not_count(league: Any) -> None:
    """Merchants would not count it: with it in the place of a good one, all would refuse."""
    started = league.of(5, 3).start()
    round_ = started.open(0, 2)
    round_.upload(updates_of(range(4), 2))
    round_.agree(range(3))
    signed = started.merchants[3].agree(round_.sum.survivors())
    with pytest.raises(Misbehaviour, match="did not sign the survivors"):
        round_.sum.add_agreed(started.identity(4), signed)
    context = suite.round_context(started.aggregator.context, 0, hashlib.sha256(b"model 0").digest())
    statement = transcript.survivor_statement(context, (0, 1, 2, 3))
    for place, counts in ((4, False), (3, True)):
        own = Agreed(**signed.work, signature=signing.sign(started.identities[place], "survivors", statement))
        if counts:
            round_.sum.add_agreed(started.identity(place), own)
        else:
            with pytest.raises(Misbehaviour, match="did not sign the survivors"):
                round_.sum.add_agreed(started.identity(place), own)
    assert round_.sum.agreement().places == (0, 1, 2, 3)


def test_rounds_may_be_left_out_and_merchants_come_back(league: Any) -> None:
    started = league.of(5, 3, rounds=6).start()
    for number, uploaded in ((1, (0, 1, 2, 3)), (2, (1, 2, 3, 4)), (5, (0, 2, 3, 4))):
        round_ = started.open(number, 4, uploaded)
        updates = updates_of(uploaded, 4, number)
        round_.upload(updates)
        round_.agree(uploaded)
        round_.unmask(uploaded[1:])
        assert round_.total().tolist() == plain_sum(updates)


def test_a_round_abandoned_half_way_costs_only_itself(league: Any) -> None:
    started = league.of(4, 3, rounds=2).start()
    abandoned = started.open(0, 4)
    abandoned.upload(updates_of(range(4), 4))
    abandoned.agree((0, 1))
    round_ = started.open(1, 4)
    updates = updates_of(range(4), 4, 1)
    round_.upload(updates)
    round_.agree(range(4))
    round_.unmask(range(4))
    assert round_.total().tolist() == plain_sum(updates)


@pytest.mark.parametrize("number", [0, 1, 4])
def test_rounds_over_or_outside_the_setup_are_refused(league: Any, number: int) -> None:
    started = league.of(3, round=1, rounds=3).start()
    started.merchants[0].open_round(1, bytes(32))
    with pytest.raises(Refusal, match="over, or not of this set-up") as refusal:
        started.merchants[0].open_round(number, bytes(32))
    assert refusal.value.fault is Fault.ORDER


def test_the_same_update_is_masked_anew_in_every_round_and_by_every_merchant(league: Any) -> None:
    started = league.of(3, rounds=2).start()
    same = {place: np.zeros(8, dtype=np.uint32) for place in range(3)}
    masked = [vector for number in (0, 1) for vector in started.open(number, 8).upload(same)]
    assert len(np.unique(masked)) == 6 * 8  # any two words are alike once in four million runs
    assert np.any(masked[0] + masked[1] + masked[2])  # the masks between them cancel, their own ones do not


def test_a_second_upload_and_another_length_are_the_merchants_fault(league: Any) -> None:
    started = league.of(3).start()
    round_ = started.open(0, 2)
    round_.upload(updates_of((0,), 2))
    upload = Upload(**round_.sum.work, vector=bytes(8))
    with pytest.raises(Misbehaviour, match="uploaded twice"):
        round_.sum.add_upload(started.identity(0), upload)
    for length in (0, 7, 9, 12):
        with pytest.raises(Misbehaviour, match="2 words of 4 bytes"):
            round_.sum.add_upload(started.identity(1), Upload(**round_.sum.work, vector=bytes(length)))
    round_.upload(updates_of((1, 2), 2, 1))
    round_.agree(range(3))
    round_.unmask(range(3))
    expected = plain_sum(updates_of((0,), 2) | updates_of((1, 2), 2, 1))
    assert round_.total().tolist() == expected


@pytest.mark.parametrize("n", [3, 12])
def test_a_sum_holds_one_vector_whatever_the_number_of_merchants(league: Any, n: int) -> None:
    dimension = 1 << 18
    started = league.of(n).start()
    data = ring.to_bytes(np.ones(dimension, dtype=np.uint32))
    started.open(0, 1)  # what is made once
    tracemalloc.start()
    try:
        sum_ = started.aggregator.open_round(0, bytes(32), dimension)
        for place in range(n):
            sum_.add_upload(started.identity(place), Upload(**sum_.work, vector=data))
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 4 * dimension <= held <= peak < 4 * dimension + 64 * 1024
