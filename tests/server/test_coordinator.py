"""Rounds on the server's side, masked, against honest, silent, declining and hostile merchants."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from hanse_common import wire
from hanse_common.errors import RoundFailed
from hanse_common.messages import MAX_MESSAGE_BYTES, DeclineCode, Declined, Invitation, Start
from hanse_common.plan import Cohort, Plan
from hanse_common.secagg.messages import (
    MAX_SETUP_BYTES,
    Agreed,
    Delivery,
    Joined,
    Ready,
    Roster,
    Shares,
    Survivors,
    Unmasked,
    Upload,
)
from hanse_server.coordinator import RoundOutcome

Make = Callable[..., tuple[Any, Any]]
SETUP = ["joined", "shares", "ready"]
ROUND = ["upload", "agreed", "unmasked"]


@pytest.fixture
def plan(make_plan: Callable[..., Plan]) -> Plan:
    return make_plan(cohort=Cohort(min_merchants=3, max_merchants=5, join_deadline=7.0, upload_deadline=9.0))


def go(rounds: Any, plan: Plan, round_: int = 0) -> RoundOutcome:
    outcome: RoundOutcome = rounds.run(round_, np.zeros(plan.dimension, dtype=np.float32))
    return outcome


def is_mean(outcome: RoundOutcome, plan: Plan, value: float) -> bool:
    return bool(np.allclose(outcome.update, value, atol=1e-6))


def test_the_update_is_the_mean_of_those_who_uploaded(plan: Plan, make_masked: Make) -> None:
    league, rounds = make_masked(plan)
    outcome = go(rounds, plan)
    assert outcome.uploaded == ("alder", "birch", "cedar", "damson")
    assert is_mean(outcome, plan, 2.5)
    assert not (outcome.dropped or outcome.declined or outcome.blamed)
    assert league.trips() == SETUP + ROUND
    deadlines = [deadline for _, _, deadline in league.asked]
    assert deadlines == [7.0, 7.0, 7.0, 9.0, 7.0, 7.0]


def test_each_trip_asks_how_long_it_may_take(plan: Plan, make_masked: Make) -> None:
    heard: list[tuple[str, float]] = []

    def deadline(kind: str, planned: float) -> float:
        heard.append((kind, planned))
        return planned / (len(heard) + 1)

    league, rounds = make_masked(plan, deadline=deadline)
    go(rounds, plan)
    assert heard == list(zip(SETUP + ROUND, [7.0, 7.0, 7.0, 9.0, 7.0, 7.0], strict=True))
    assert [asked for _, _, asked in league.asked] == [7 / 2, 7 / 3, 7 / 4, 9 / 5, 7 / 6, 7 / 7]


def test_one_set_up_serves_its_rounds_and_no_more(plan: Plan, make_masked: Make) -> None:
    league, rounds = make_masked(plan, setup_rounds=3)
    for round_ in range(4):  # of four that the plan has
        assert is_mean(go(rounds, plan, round_), plan, 2.5)
    assert league.trips() == SETUP + 3 * ROUND + SETUP + ROUND
    invitations = [asked for asked in league.members["alder"].asked if isinstance(asked, Invitation)]
    assert [(i.round, i.rounds, i.attempt) for i in invitations] == [(0, 3, 0), (3, 1, 1)]


@pytest.mark.parametrize(("trip", "mean"), [("upload", 7 / 3), ("agreed", 2.5), ("unmasked", 2.5)])
def test_a_dropout_at_any_trip_of_a_round_is_recovered(
    plan: Plan, make_masked: Make, trip: str, mean: float
) -> None:
    league, rounds = make_masked(plan)
    league.silent = {("cedar", trip)}
    outcome = go(rounds, plan)
    assert is_mean(outcome, plan, mean)
    assert outcome.dropped == (("cedar",) if trip == "upload" else ())
    league.silent = set()
    assert is_mean(go(rounds, plan, 1), plan, 2.5)  # and it is back in the next round
    assert league.trips() == SETUP + 2 * ROUND


@pytest.mark.parametrize(("trip", "names"), [("joined", "bc"), ("upload", "bc"), ("agreed", "bc")])
def test_under_the_minimum_nothing_is_released(plan: Plan, make_masked: Make, trip: str, names: str) -> None:
    league, rounds = make_masked(plan)
    league.silent = {(name, trip) for name in ("birch", "cedar")}
    with pytest.raises(RoundFailed, match="Round 1 of 4 failed"):
        go(rounds, plan)
    assert "unmasked" not in league.trips()


def test_too_few_that_help_fail_the_round(plan: Plan, make_masked: Make) -> None:
    league, rounds = make_masked(plan)
    league.silent = {("birch", "unmasked"), ("cedar", "unmasked")}
    with pytest.raises(RoundFailed, match="2 helped to unmask, 3 are needed"):
        go(rounds, plan)


@pytest.mark.parametrize("trip", ["shares", "ready"])
def test_who_is_lost_in_a_set_up_costs_another_set_up_before_anyone_trains(
    plan: Plan, make_masked: Make, trip: str
) -> None:
    league, rounds = make_masked(plan)
    league.silent = {("damson", trip), ("damson", "upload")}
    outcome = go(rounds, plan)
    assert is_mean(outcome, plan, 2.0)
    uploads = [tuple(sorted(asked)) for kind, asked, _ in league.asked if kind == "upload"]
    if trip == "shares":  # without its shares nobody may go on
        assert league.trips() == ["joined", "shares", *SETUP, *ROUND]
        assert uploads == [("alder", "birch", "cedar")]
    else:  # everyone else holds its shares
        assert league.trips() == SETUP + ROUND


def test_set_ups_are_tried_with_fresh_keys_and_not_for_ever(plan: Plan, make_masked: Make) -> None:
    league, rounds = make_masked(plan, count=5, attempts=3)
    league.silent = {(name, "shares") for name in league.members}
    with pytest.raises(RoundFailed, match="Expected a roster of 3 to 5 merchants, found 0"):
        go(rounds, plan)
    tried = [asked for asked in league.members["cedar"].asked if isinstance(asked, Invitation)]
    assert len(tried) == 3
    keys = [asked.members for asked in league.members["cedar"].asked if isinstance(asked, Roster)]
    assert len({members[0].sealing_key for members in keys}) == 3
    assert len({asked.attempt for asked in tried}) == 3


def test_a_failed_attempt_is_followed_by_another_set_up_under_a_later_number(
    plan: Plan, make_masked: Make
) -> None:
    league, rounds = make_masked(plan, attempts=3)
    member = league.members["damson"]
    member.change = lambda asked, reply: None if asked.attempt < 2 and isinstance(asked, Start) else reply
    league.members["cedar"].change = member.change
    assert is_mean(go(rounds, plan), plan, 2.5)
    assert league.trips() == 2 * [*SETUP, "upload"] + SETUP + ROUND
    assert go(rounds, plan, 1).uploaded == ("alder", "birch", "cedar", "damson")


def test_a_merchant_that_declines_is_not_asked_to_train(plan: Plan, make_masked: Make) -> None:
    league, rounds = make_masked(plan)
    league.members["birch"].change = lambda asked, reply: wire.encode(
        Declined(**asked.work, code=DeclineCode.BUDGET)
    )
    outcome = go(rounds, plan)
    assert outcome.declined == {"birch": DeclineCode.BUDGET}
    assert len(league.members["birch"].asked) == 1
    assert is_mean(outcome, plan, 8 / 3)


def spoiled(kind: type, answer: Callable[[Any, bytes], bytes]) -> Callable[[Any, bytes], bytes]:
    return lambda asked, reply: answer(asked, reply) if isinstance(asked, kind) else reply


def vector(reply: bytes) -> bytes:
    return wire.decode(Upload, reply, MAX_MESSAGE_BYTES).vector


@pytest.mark.parametrize(
    "answer",
    [
        lambda asked, reply: b"nonsense",
        lambda asked, reply: b"",
        lambda asked, reply: wire.encode(Upload(**asked.work, vector=vector(reply)[:-4])),
        lambda asked, reply: wire.encode(Upload(**asked.work, vector=vector(reply)[:-1])),
        lambda asked, reply: wire.encode(Upload(**asked.work, vector=vector(reply) + bytes(4))),
        lambda asked, reply: wire.encode(Upload(**(asked.work | {"round": 1}), vector=vector(reply))),
        lambda asked, reply: wire.encode(Upload(**(asked.work | {"attempt": 1}), vector=vector(reply))),
        lambda asked, reply: wire.encode(
            Upload(**(asked.work | {"plan_digest": b"x" * 32}), vector=vector(reply))
        ),
        lambda asked, reply: wire.encode(Ready(**asked.work)),
    ],
)
def test_a_bad_upload_is_blamed_and_the_round_goes_on(
    plan: Plan, make_masked: Make, answer: Callable[[Any, bytes], bytes]
) -> None:
    league, rounds = make_masked(plan)
    league.members["cedar"].change = spoiled(Start, answer)
    outcome = go(rounds, plan)
    assert set(outcome.blamed) == {"cedar"}
    assert outcome.uploaded == ("alder", "birch", "damson")
    assert is_mean(outcome, plan, 7 / 3)


def test_a_bad_signature_or_share_is_blamed_and_the_sum_comes_out(plan: Plan, make_masked: Make) -> None:
    league, rounds = make_masked(plan)
    league.members["cedar"].change = spoiled(
        Survivors, lambda asked, reply: wire.encode(Agreed(**asked.work, signature=bytes(64)))
    )
    outcome = go(rounds, plan)
    assert outcome.blamed == {"cedar": "did not sign the survivors, or signed others"}
    assert is_mean(outcome, plan, 2.5)

    def open_another(asked: Any, reply: bytes) -> bytes:
        if not isinstance(asked, Survivors | Start | Invitation | Roster | Delivery):
            openings = bytearray(wire.decode(Unmasked, reply, MAX_MESSAGE_BYTES).openings)
            openings[5] ^= 1
            return wire.encode(Unmasked(**asked.work, openings=bytes(openings)))
        return reply

    league.members["cedar"].change = open_another
    outcome = go(rounds, plan, 1)
    assert outcome.blamed == {"cedar": "opened a share that its dealer did not commit to"}
    assert is_mean(outcome, plan, 2.5)


def test_keys_in_anothers_name_are_left_out(plan: Plan, make_masked: Make) -> None:
    league, rounds = make_masked(plan)
    replies: dict[str, bytes] = {}
    league.members["alder"].change = spoiled(
        Invitation, lambda asked, reply: replies.setdefault("alder", reply)
    )
    league.members["cedar"].change = spoiled(Invitation, lambda asked, reply: replies["alder"])
    outcome = go(rounds, plan)
    assert set(outcome.blamed) == {"cedar"}
    assert outcome.uploaded == ("alder", "birch", "damson")


def test_unsigned_shares_are_blamed_and_their_sender_left_out_for_good(plan: Plan, make_masked: Make) -> None:
    league, rounds = make_masked(plan)

    def unsigned(asked: Any, reply: bytes) -> bytes:
        shares = wire.decode(Shares, reply, MAX_SETUP_BYTES)
        packets = tuple(packet.model_copy(update={"signature": bytes(64)}) for packet in shares.packets)
        return wire.encode(shares.model_copy(update={"packets": packets}))

    league.members["cedar"].change = spoiled(Roster, unsigned)
    outcome = go(rounds, plan)
    assert outcome.blamed == {"cedar": "did not sign its shares"}
    assert outcome.uploaded == ("alder", "birch", "damson")
    for round_ in (1, 2, 3):
        assert "cedar" not in go(rounds, plan, round_).uploaded
    assert sum(isinstance(asked, Invitation) for asked in league.members["cedar"].asked) == 1


def test_a_dispute_leaves_out_both_sides(plan: Plan, make_masked: Make) -> None:
    """One of the two lies, and nobody can tell which."""
    league, rounds = make_masked(plan, count=5)
    accused = rounds._listed.identities["birch"]
    league.members["damson"].change = spoiled(
        Delivery,
        lambda asked, reply: wire.encode(Declined(**asked.work, code=DeclineCode.SHARES, culprit=accused)),
    )
    outcome = go(rounds, plan)
    assert outcome.declined == {"damson": DeclineCode.SHARES}
    assert outcome.blamed == {"birch": "damson says that its part in the set-up is bad"}
    for round_ in (1, 2):
        go(rounds, plan, round_)
    assert go(rounds, plan, 3).uploaded == ("alder", "cedar", "elder")  # the next set-up


def test_a_dealer_that_spoils_its_shares_to_everyone_costs_one_accuser_and_no_more(
    plan: Plan, make_masked: Make
) -> None:
    """All the honest name it; they are there, and come again."""
    league, rounds = make_masked(plan, count=5)
    culprit = rounds._listed.identities["birch"]
    for name, member in league.members.items():
        if name != "birch":
            member.change = lambda asked, reply: (
                wire.encode(Declined(**asked.work, code=DeclineCode.SHARES, culprit=culprit))
                if isinstance(asked, Delivery) and asked.attempt == 0
                else reply
            )
    outcome = go(rounds, plan)
    assert len(outcome.uploaded) == 3
    assert "birch" not in outcome.uploaded
    assert "birch" in outcome.blamed


def test_unasked_and_second_answers_are_not_added(plan: Plan, make_masked: Make) -> None:
    league, rounds = make_masked(plan)
    extra = wire.encode(Upload(plan_digest=plan.digest, round=0, attempt=0, vector=bytes(4 * plan.dimension)))
    league.extra = [("stranger", extra), ("alder", extra)]
    outcome = go(rounds, plan)
    assert set(outcome.blamed) == {"stranger", "alder"}
    assert is_mean(outcome, plan, 2.5)


def test_no_more_than_the_plans_maximum_and_only_members_are_invited(
    make_plan: Callable[..., Plan], make_masked: Make
) -> None:
    plan = make_plan(cohort=Cohort(min_merchants=3, max_merchants=4))
    league, rounds = make_masked(plan, count=5)
    league.members = {"aaa-stranger": league.members["elder"]} | league.members
    assert go(rounds, plan).uploaded == ("alder", "birch", "cedar", "damson")


def test_oversized_answers_are_refused_unparsed(plan: Plan, make_masked: Make) -> None:
    league, rounds = make_masked(plan, count=5)
    league.members["cedar"].change = spoiled(
        Invitation, lambda asked, reply: bytes(MAX_SETUP_BYTES + wire.MAX_DOCUMENT_BYTES + 1)
    )
    league.members["damson"].change = spoiled(
        Start, lambda asked, reply: bytes(4 * plan.dimension + wire.MAX_DOCUMENT_BYTES + 1)
    )
    outcome = go(rounds, plan)
    assert set(outcome.blamed) == {"cedar", "damson"}
    assert all("expected at most" in reason for reason in outcome.blamed.values())


def test_what_the_server_sees_of_one_merchant_is_not_its_update(plan: Plan, make_masked: Make) -> None:
    seen: dict[str, Any] = {}
    league, rounds = make_masked(plan, watch=lambda name, residues: seen.update({name: residues.copy()}))
    go(rounds, plan)
    assert set(seen) == {"", "alder", "birch", "cedar", "damson"}
    for value, name in enumerate(sorted(league.members), start=1):
        plain = plan.encode(np.full(plan.dimension, float(value)))
        assert not (seen[name] == plain).any() or plan.dimension > 1000
    total = sum((seen[name] for name in league.members), start=np.zeros(plan.dimension, dtype=np.uint32))
    assert not np.array_equal(total, seen[""])
    assert np.allclose(plan.decode(seen[""], 1), 10.0, atol=1e-6)


def test_joined_is_the_only_answer_to_an_invitation(plan: Plan, make_masked: Make) -> None:
    league, rounds = make_masked(plan)
    league.members["cedar"].change = spoiled(
        Delivery, lambda asked, reply: wire.encode(Joined(**asked.work, member=_member(league)))
    )
    assert "cedar" in go(rounds, plan).blamed


def _member(league: Any) -> Any:
    return league.members["cedar"].merchant._member
