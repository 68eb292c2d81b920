"""The node's keeper: it starts a node again and again, hears it, and leaves none behind. The node is a stand-in."""

import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from hanse_client import node_keeper
from hanse_client.config import ClientConfig
from hanse_client.keys import load_node
from hanse_client.node_keeper import MAX_WAITING, NodeKeeper
from hanse_client.node_protocol import CONNECTED, NodeExit
from hanse_common.wire import MAX_DOCUMENT_BYTES

WAIT = 30.0

Until = Callable[[str, Callable[[], Any]], Any]


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    """Ends every keeper that a test entered."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def keeper(config: ClientConfig, told: list[str], opened: ExitStack) -> NodeKeeper:
    return NodeKeeper(config, load_node(config), told.append)


def outages(told: list[str]) -> list[str]:
    return [line for line in told if line.startswith("No connection")]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (NodeExit.UNREACHABLE, "it does not answer"),
        (NodeExit.UNTRUSTED, "its certificate is not of the authority under connection.authority"),
        (NodeExit.UNKNOWN_KEY, "it no longer knows this node's key"),
        (NodeExit.REFUSED, "until this shop is in the league"),
        (NodeExit.LOST, "the connection was lost"),
        (0, "the node ended with code 0; see"),
        (77, "the node ended with code 77; see"),
    ],
)
def test_an_outage_is_told_once_however_long_it_lasts(
    keeper: NodeKeeper,
    opened: ExitStack,
    stand_in: Callable[[str], Path],
    told: list[str],
    wait_until: Until,
    code: int,
    words: str,
) -> None:
    runs = stand_in(f"sys.exit({int(code)})")
    opened.enter_context(keeper)
    wait_until("some attempts", lambda: len(list(runs.iterdir())) > 4)
    assert len(outages(told)) == 1
    assert words in outages(told)[0]
    assert len(told) == 2, told


def test_an_outage_after_a_connection_is_told_again(
    keeper: NodeKeeper, opened: ExitStack, stand_in: Callable[[str], Path], told: list[str], wait_until: Until
) -> None:
    stand_in(f"if number == 2: say({CONNECTED!r})\nsys.exit({int(NodeExit.LOST)})")
    opened.enter_context(keeper)
    wait_until("a second outage", lambda: len(outages(told)) == 2)
    assert told[1:4] == [outages(told)[0], "Connected. Waiting for the league.", outages(told)[1]]


def test_each_reason_of_one_outage_is_told_once(
    keeper: NodeKeeper, opened: ExitStack, stand_in: Callable[[str], Path], told: list[str], wait_until: Until
) -> None:
    """The first reason is often only that the server is down; what keeps the shop out afterwards is another."""
    reasons = [NodeExit.LOST, NodeExit.UNREACHABLE, NodeExit.UNTRUSTED]
    runs = stand_in(f"sys.exit({[int(reason) for reason in reasons]}[number % 3])")
    opened.enter_context(keeper)
    wait_until("some attempts", lambda: len(list(runs.iterdir())) > 7)
    assert len(outages(told)) == 3, told
    for line, words in zip(outages(told), ("was lost", "does not answer", "or out of date"), strict=True):
        assert words in line


def test_a_server_that_was_started_again_is_no_reason_to_call_anybody(
    keeper: NodeKeeper, opened: ExitStack, stand_in: Callable[[str], Path], told: list[str], wait_until: Until
) -> None:
    """Flower keeps its nodes in memory: after each restart it tells those that stayed that it doesn't know them."""
    stand_in(f"if number == 0: say({CONNECTED!r}); sys.exit({int(NodeExit.UNKNOWN_KEY)})\nsay({CONNECTED!r})")
    opened.enter_context(keeper)
    wait_until("the next connection", lambda: told.count("Connected. Waiting for the league.") > 1)
    assert "it was started again, or" in outages(told)[0]
    assert "if this lasts, ask the operator" in outages(told)[0]


def test_a_node_that_cannot_be_started_is_tried_again(
    keeper: NodeKeeper, opened: ExitStack, stand_in: Callable[[str], Path], told: list[str], wait_until: Until
) -> None:
    stand_in(f"say({CONNECTED!r})\ntime.sleep(60)")
    program = Path(sys.executable)
    program.chmod(0o600)
    opened.enter_context(keeper)
    wait_until("an outage", lambda: outages(told))
    assert "the node could not be started (Permission denied)" in outages(told)[0]
    program.chmod(stat.S_IRWXU)
    wait_until("a node", lambda: "Connected. Waiting for the league." in told)


def test_assignments_that_wait_are_bounded(
    keeper: NodeKeeper, opened: ExitStack, stand_in: Callable[[str], Path], wait_until: Until
) -> None:
    runs = stand_in(
        f"say({CONNECTED!r})\n"
        "for number in range(20): say(b'assignment %d' % number)\n"
        "(folder / 'said').touch(); time.sleep(60)"
    )
    opened.enter_context(keeper)
    wait_until("all to be said", (runs / "said").exists)
    time.sleep(0.3)
    heard = []
    while not keeper.assignments.empty():
        heard.append(keeper.assignments.get()[1])
    assert heard == [b"assignment %d" % number for number in range(MAX_WAITING)]


def test_a_node_that_says_too_much_is_ended(
    keeper: NodeKeeper,
    opened: ExitStack,
    stand_in: Callable[[str], Path],
    wait_until: Until,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(node_keeper, "END_SECONDS", 0.2)
    runs = stand_in(
        f"say({CONNECTED!r})\ntry: say(bytes({MAX_DOCUMENT_BYTES + 1}))\nexcept OSError: pass\ntime.sleep(60)"
    )
    opened.enter_context(keeper)
    wait_until("another node", lambda: len(list(runs.iterdir())) > 1)
    assert not lives(int((runs / "run-0").read_text()))
    assert keeper.assignments.empty()


def test_nothing_that_a_server_sends_reads_as_connected(
    keeper: NodeKeeper, opened: ExitStack, stand_in: Callable[[str], Path], told: list[str]
) -> None:
    stand_in(f"for _ in range(3): say({CONNECTED!r})\ntime.sleep(60)")
    opened.enter_context(keeper)
    for _ in range(2):
        assert keeper.assignments.get(timeout=WAIT)[1] == CONNECTED
    assert told.count("Connected. Waiting for the league.") == 1


def test_a_report_goes_to_the_node_that_asked_and_to_no_later_one(
    keeper: NodeKeeper, opened: ExitStack, stand_in: Callable[[str], Path], told: list[str], wait_until: Until
) -> None:
    """A later node would take it for the report on its own block, and be one behind ever after."""
    runs = stand_in(
        f"say({CONNECTED!r})\nsay(b'block %d' % number)\nif number == 0: sys.exit(1)\n"
        "(folder / 'heard').write_bytes(hear()); time.sleep(60)"
    )
    opened.enter_context(keeper)
    first, assignment = keeper.assignments.get(timeout=WAIT)
    assert assignment == b"block 0"
    second, assignment = keeper.assignments.get(timeout=WAIT)
    assert assignment == b"block 1"
    keeper.report(first, b"report 0")
    keeper.report(second, b"report 1")
    wait_until("a report", lambda: (runs / "heard").exists() and (runs / "heard").read_bytes())
    assert (runs / "heard").read_bytes() == b"report 1"


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    "script", ["time.sleep(60)", "signal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(60)"]
)
def test_stop_leaves_no_node(
    config: ClientConfig,
    told: list[str],
    stand_in: Callable[[str], Path],
    wait_until: Until,
    monkeypatch: pytest.MonkeyPatch,
    script: str,
) -> None:
    monkeypatch.setattr(node_keeper, "END_SECONDS", 0.5)
    runs = stand_in(f"say({CONNECTED!r})\n{script}")
    with NodeKeeper(config, load_node(config), told.append):
        wait_until("the connection", lambda: "Connected. Waiting for the league." in told)
    (pid,) = (int(path.read_text()) for path in runs.iterdir())
    assert not lives(pid)
    assert outages(told) == []
