"""Blocks: who is asked, when enough have come, and what is said when they do not."""

import itertools
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hanse_common.errors import RoundFailed, RunStopped
from hanse_common.plan import Cohort, Plan, SignedPlan
from hanse_common.session import Assignment, ReportCode, record_bytes
from hanse_server import blocks
from hanse_server.blocks import BlockTransport
from hanse_server.config import Blocks
from hanse_server.observed import ObservedTransport
from hanse_server.selection import Draw, RandomMembers, select

ALL = frozenset({"alder", "birch", "cedar", "damson"})


class League:
    """Streams and membership of merchants that exist in this test only: both protocols, no network."""

    def __init__(self, online: frozenset[str] = ALL) -> None:
        self.who_is_online = online
        self.come: Callable[[str], bool] = lambda name: True
        self.reported: dict[str, ReportCode] = {}
        self.streams: set[str] = set()
        self.assigned: list[tuple[Assignment, frozenset[str]]] = []
        self.opened: list[tuple[bytes, int]] = []
        self.closed = 0
        self.waits: list[float] = []
        self.after_wait: Callable[[], None] = lambda: None

    def online(self) -> frozenset[str]:
        return self.who_is_online

    def assign(self, assignment: Assignment, names: frozenset[str]) -> None:
        self.assigned.append((assignment, names))
        self.streams |= {name for name in names if self.come(name)}

    def reports(self) -> Mapping[str, ReportCode]:
        return self.reported

    def open_block(self, block: bytes, max_record_bytes: int) -> None:
        self.opened.append((block, max_record_bytes))
        self.reported = {}

    def close_block(self) -> None:
        self.closed += 1
        self.reported |= dict.fromkeys(self.streams, ReportCode.DONE)
        self.streams = set()

    def connected(self) -> tuple[str, ...]:
        return tuple(sorted(self.streams))

    def wait(self, seconds: float, until: Callable[[frozenset[str]], bool]) -> bool:
        self.waits.append(seconds)
        self.after_wait()
        return until(frozenset(self.streams))

    def exchange(
        self, kind: str, payloads: Mapping[str, bytes], deadline: float
    ) -> Iterator[tuple[str, bytes]]:
        yield from ((name, payload + kind.encode()) for name, payload in payloads.items())


class Clock:
    """Time that passes with each look."""

    def __init__(self, step: float) -> None:
        self.now, self.step = 0.0, step

    def monotonic(self) -> float:
        self.now += self.step
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def transport(
    make_plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[BlockTransport, list[str]]]:
    def make(
        league: League,
        step: float = 1.0,
        members: frozenset[str] = ALL,
        choose: Callable[[Plan], Any] = lambda plan: None,
        **settings: Any,
    ) -> tuple[BlockTransport, list[str]]:
        monkeypatch.setattr(blocks, "time", Clock(step))
        plan = make_plan(cohort=Cohort(min_merchants=3, max_merchants=4))
        lines: list[str] = []
        signed = SignedPlan.sign(plan, Ed25519PrivateKey.generate())
        chosen = Blocks(**({"rounds": 3, "patience": 50, "gather": 10} | settings))
        made = BlockTransport(
            league, league, signed, plan, "localhost:1", lambda: members, chosen, lines.append, choose(plan)
        )
        return made, lines

    return make


def test_one_assignment_for_each_merchant_and_block(transport: Any) -> None:
    league = League()
    with transport(league)[0] as made:
        for _ in range(3):
            assert made.gather() == ("alder", "birch", "cedar", "damson")
            for _ in range(3):
                assert made.merchants() == ("alder", "birch", "cedar", "damson")
    assert [names for _, names in league.assigned] == [ALL, ALL, ALL]
    assert len({assignment.block for assignment, _ in league.assigned}) == 3
    assert [block for block, _ in league.opened] == [assignment.block for assignment, _ in league.assigned]
    assert {assignment.rounds for assignment, _ in league.assigned} == {3}
    assert league.closed == 3


def test_records_are_bounded_by_the_plan(transport: Any, make_plan: Callable[..., Plan]) -> None:
    league = League()
    transport(league)[0].gather()
    assert league.opened[0][1] == record_bytes(make_plan().dimension)


def test_the_first_block_waits_for_all_that_are_listed_but_not_for_ever(transport: Any) -> None:
    league = League(ALL - {"damson"})
    made, _ = transport(league)
    assert made.gather() == ("alder", "birch", "cedar")
    assert 9 <= len(league.waits) <= 13  # a second a look, ten of patience with the rest
    league.waits.clear()
    assert made.gather() == ("alder", "birch", "cedar")  # the second block knows that damson is away
    assert len(league.waits) == 0


def test_whoever_comes_online_later_is_asked_for_the_next_block(transport: Any) -> None:
    league = League(ALL - {"damson"})
    made, _ = transport(league)
    made.gather()
    league.who_is_online = ALL
    assert made.merchants() == ("alder", "birch", "cedar")
    assert made.gather() == ("alder", "birch", "cedar", "damson")
    assert [names for _, names in league.assigned] == [ALL - {"damson"}, ALL]
    assert league.assigned[0][0] != league.assigned[1][0]


def test_a_merchant_that_declines_is_named_once_and_not_waited_for(transport: Any) -> None:
    league = League()
    league.come = lambda name: name != "cedar"
    made, lines = transport(league)
    league.after_wait = lambda: league.reported.update(cedar=ReportCode.POLICY)
    assert made.gather() == ("alder", "birch", "damson")
    made.merchants()
    assert [line for line in lines if "cedar" in line] == ["cedar does not take part in this block (policy)."]
    assert len(league.waits) < 5


def test_too_many_declines_end_it_at_once_with_their_codes(transport: Any) -> None:
    league = League()
    league.come = lambda name: name in ("alder", "damson")
    league.after_wait = lambda: league.reported.update(birch=ReportCode.BUDGET, cedar=ReportCode.SIGNATURE)
    with pytest.raises(RoundFailed, match=r"needs 3 .* birch \(budget\), cedar \(signature\)"):
        transport(league)[0].gather()


def test_a_run_that_is_stopped_while_merchants_gather_has_not_failed(transport: Any) -> None:
    """Flower drops a stopped run's messages at once, which looks like declines; the streams hear of it only later."""
    league = League()
    league.assign = lambda assignment, names: league.reported.update(dict.fromkeys(names, ReportCode.LOST))

    def stop() -> None:
        if sum(league.waits) > 1.0:  # twice what an executor takes between two looks
            raise RunStopped("stopped")

    league.after_wait = stop
    with pytest.raises(RunStopped):
        transport(league)[0].gather()


def test_patience_ends(transport: Any) -> None:
    league = League(frozenset({"alder"}))
    with pytest.raises(RoundFailed, match=r"Waited 50 s; 1 merchants came, the plan needs 3"):
        transport(league)[0].gather()


def test_a_lost_stream_is_waited_for_once(transport: Any) -> None:
    league = League()
    made, _ = transport(league)
    made.gather()
    league.waits.clear()
    league.streams.discard("birch")
    league.after_wait = lambda: league.streams.add("birch")
    assert made.merchants() == ("alder", "birch", "cedar", "damson")
    league.after_wait = lambda: None
    league.streams.discard("birch")
    assert made.merchants() == ("alder", "cedar", "damson")
    assert league.waits == [blocks.RETURN_SECONDS] * 2


def test_exchange_is_the_streams(transport: Any) -> None:
    made, _ = transport(League())
    assert dict(made.exchange("join", {"alder": b"1"}, 1.0)) == {"alder": b"1join"}


def test_the_end_hears_reports_but_not_for_ever(transport: Any) -> None:
    league = League()
    made, _ = transport(league)
    made.gather()
    league.close_block = lambda: None  # type: ignore[method-assign]
    ended = threading.Thread(target=made.__exit__)
    ended.start()
    ended.join(10)
    assert not ended.is_alive()


def test_who_says_later_is_asked_again_after_ever_longer_pauses(transport: Any) -> None:
    """Photos are being prepared, or the owner is being asked; that is no decline."""
    league = League()
    made, lines = transport(league, step=0.01, patience=1000)
    asked: list[float] = []
    clock = blocks.time

    def come(name: str) -> bool:
        if name != "damson":
            return name != "cedar"
        asked.append(clock.now)
        league.reported = {"cedar": ReportCode.POLICY}
        if len(asked) < 5:
            league.reported["damson"] = ReportCode.LATER
            return False
        return True

    league.come = come
    assert made.gather() == ("alder", "birch", "damson")
    assert len(asked) == 5
    pauses = [later - earlier for earlier, later in itertools.pairwise(asked)]
    assert pauses == pytest.approx([0.5, 1.0, 2.0, 4.0], abs=0.05)  # soon at first: most photos take a moment
    assert all(names == {"damson"} for _, names in league.assigned[1:])
    assert lines.count("damson is not ready yet.") == 1


def test_a_block_does_not_wait_for_later_ones_longer_than_it_gathers(transport: Any) -> None:
    league = League()
    league.come = lambda name: name != "damson"
    made, _ = transport(league)
    assign = league.assign

    def later(assignment: Assignment, names: frozenset[str]) -> None:
        assign(assignment, names)
        if "damson" in names:
            league.reported["damson"] = ReportCode.LATER

    league.assign = later  # type: ignore[method-assign]
    assert made.gather() == ("alder", "birch", "cedar")


def test_reports_of_the_block_before_count_for_nothing_in_the_next(transport: Any) -> None:
    """They stay until the next assignment, which waits for somebody to come online."""
    league = League()
    league.open_block = lambda block, max_record_bytes: None  # type: ignore[method-assign]
    made, lines = transport(league, patience=100)
    made.gather()
    league.reported = dict.fromkeys(ALL, ReportCode.LOST)
    league.who_is_online = frozenset()

    def come_online() -> None:
        if len(league.waits) > 3:
            league.who_is_online, league.reported = ALL, {}

    league.after_wait = come_online
    league.waits.clear()
    assert made.gather() == tuple(sorted(ALL))
    assert not [line for line in lines if "does not take part" in line]


# A part of the members

MANY = frozenset(f"shop-{number}" for number in range(12))
IDENTITIES = {bytes([number]) * 32: name for number, name in enumerate(sorted(MANY))}


def part(drawn: list[Draw], selections: list[Any] | None = None) -> Callable[[Plan], Any]:
    """Return what makes a selection of three, and of a fourth to be sure, that keeps its draws in `drawn`."""
    settings = RandomMembers(size=3, over_selection=1.3, seed="ab" * 16)
    numbers = itertools.count(5)

    def choose(plan: Plan) -> Any:
        found = select(settings, plan, lambda: IDENTITIES, numbers.__next__, drawn.append)
        if selections is not None:
            selections.append(found)
        return found

    return choose


def test_the_first_of_a_draw_are_asked_and_nobody_else(transport: Any) -> None:
    league, drawn = League(MANY), []  # type: ignore[var-annotated]
    made, lines = transport(league, members=MANY, choose=part(drawn))
    for _ in range(3):
        assert made.gather() == tuple(sorted(drawn[-1].order[:4]))
    assert [draw.block for draw in drawn] == [5, 6, 7]
    assert [names for _, names in league.assigned] == [frozenset(draw.order[:4]) for draw in drawn]
    assert [line for line in lines if line.startswith("Block ")] == [draw.describe() for draw in drawn]


def test_those_that_are_away_or_decline_are_replaced_in_the_order_of_the_draw(transport: Any) -> None:
    """The draw is the same for whoever draws it, so what follows from it can be said beforehand."""
    drawn: list[Draw] = []
    transport(League(MANY), members=MANY, choose=part(drawn))[0].gather()
    order = drawn[0].order
    plan_of_old = drawn[0].plan_digest

    league = League(MANY - {order[0]})
    league.come = lambda name: name != order[1]
    league.after_wait = lambda: league.reported.update({order[1]: ReportCode.BUDGET})
    made, lines = transport(league, members=MANY, choose=part(drawn))
    assert made.gather() == tuple(sorted(order[2:6]))
    assert (drawn[1].order, drawn[1].plan_digest) == (order, plan_of_old)
    assert [names for _, names in league.assigned] == [frozenset(order[1:4]), frozenset(order[4:6])]
    assert f"{order[1]} does not take part in this block (budget)." in lines


def test_too_many_declines_end_a_drawn_block_when_nobody_is_left_to_ask(transport: Any) -> None:
    league, drawn = League(MANY), []  # type: ignore[var-annotated]
    league.come = lambda name: False
    league.after_wait = lambda: league.reported.update(
        {name: ReportCode.POLICY for _, names in league.assigned for name in names}
    )
    with pytest.raises(RoundFailed, match=r"needs 3 merchants; too many decline"):
        transport(league, members=MANY, choose=part(drawn))[0].gather()
    assert len(league.assigned) > 1  # others were asked before that


def test_who_did_not_answer_in_a_block_comes_last_in_the_next(transport: Any) -> None:
    league, drawn, selections = League(MANY), [], []  # type: ignore[var-annotated]
    made, _ = transport(league, members=MANY, choose=part(drawn, selections))
    observed = ObservedTransport(made, [selections[0].observe])
    there = observed.gather()
    league.exchange = lambda kind, payloads, deadline: iter([(there[0], b"")])  # type: ignore[method-assign]
    assert len(list(observed.exchange("upload", dict.fromkeys(there, b""), 1.0))) == 1
    observed.gather()
    assert set(drawn[1].order[-3:]) == set(drawn[1].late) == set(there[1:])
