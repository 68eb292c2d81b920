"""Daemons as they run: processes, TLS, node authentication, crashes, and everything gone at the end."""

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hanse_common import wire
from hanse_common.plan import Plan
from hanse_common.vision.recognizer import Recognizer
from hanse_simulations.processes import command


def test_a_training_from_nothing_to_a_recognizer(make_league: Callable[..., Any], helpers: Any) -> None:
    league = make_league()
    server = league.start_server()
    league.start_shops()
    league.until("all to be there", lambda: league.events("round"))
    daemons = [league.running[name].pid for name in league.shops]
    nodes = [child for pid in daemons for child in helpers.children(pid)]
    assert len(nodes) == 4
    league.until("the server to end", lambda: server.poll() is not None)
    assert server.returncode == 0, league.text("server")
    assert [event["round"] for event in league.events("round")] == [1, 2, 3, 4, 5, 6]
    assert all(len(event["uploaded"]) == 4 for event in league.events("round"))
    recognizer = Recognizer.load(league.folder / "server" / "state" / "recognizer")
    plan = wire.decode(Plan, league.signed_plan.plan)
    assert recognizer.card.plan_digest == plan.digest.hex()
    for name in league.shops:
        assert league.ledger(name).counter == 6
        assert league.ledger(name).spent().epsilon == pytest.approx(plan.epsilon())
        assert "Round 6 of 6: trained, charged, sent." in league.text(name)
    # Daemons stay for the next training; asked to end, they leave nobody behind.
    nodes += [child for pid in daemons for child in helpers.children(pid)]
    league.processes.stop()
    assert all(process.returncode == 0 for process in league.running.values())
    assert not any(helpers.lives(pid) for pid in (*daemons, *nodes))
    # A plan that is done is not trained again by mistake.
    again = league.start_server()
    league.until("the second server to end", lambda: again.poll() is not None)
    assert again.returncode == 10
    assert "6 of 6 rounds done; go on with hanse-server resume" in league.text("server")


@pytest.mark.slow
def test_a_killed_daemon_is_a_dropout_and_comes_back_by_itself(
    make_league: Callable[..., Any], helpers: Any
) -> None:
    league = make_league(rounds=60, attempts=60)
    server = league.start_server()
    league.start_shops()
    league.until("a first round", lambda: league.events("round"))
    cedar = league.running["cedar"]
    (node,) = helpers.children(cedar.pid)
    os.kill(cedar.pid, signal.SIGSTOP)  # a round is now open and waits for cedar
    done = len(league.events("round"))
    os.kill(node, signal.SIGKILL)
    os.kill(cedar.pid, signal.SIGKILL)
    cedar.wait()
    league.until("a round without cedar", lambda: len(league.events("round")) > done + 1)
    assert league.events("round")[-1]["uploaded"] == ["alder", "birch", "damson"]
    # Flower remembers cedar's node for a minute and refuses it; the others hold the training until it is back.
    for name in ("alder", "birch"):
        os.kill(league.running[name].pid, signal.SIGSTOP)
    league.log("cedar").unlink()
    league.start_shop("cedar")
    league.until("cedar to be refused", lambda: "does not let the node in yet" in league.text("cedar"))
    league.until("cedar to be asked", lambda: "Ready for a training" in league.text("cedar"))
    for name in ("alder", "birch"):
        os.kill(league.running[name].pid, signal.SIGCONT)
    league.until("the server to end", lambda: server.poll() is not None)
    assert server.returncode == 0, league.text("server")
    assert league.events("round")[-1]["uploaded"] == ["alder", "birch", "cedar", "damson"]


@pytest.mark.slow
def test_a_plan_with_a_bad_signature_is_refused_with_a_code(make_league: Callable[..., Any]) -> None:
    """Cedar pins another operator's key; the others go on."""
    league = make_league(rounds=2)
    league.edit_shop("cedar", lambda settings: settings["league"].update(operator_key="ab" * 32))
    server = league.start_server()
    league.start_shops()
    league.until("the server to end", lambda: server.poll() is not None)
    assert server.returncode == 0, league.text("server")
    assert league.events("round")[-1]["uploaded"] == ["alder", "birch", "damson"]
    assert "cedar does not take part in this block (signature)." in league.text("server")
    assert "The signature of the plan does not verify." in league.text("cedar")
    assert league.ledger("cedar").counter == 0


@pytest.mark.slow
def test_a_directory_of_another_league_is_refused_with_a_code(make_league: Callable[..., Any]) -> None:
    """Damson pins another league's key; the others go on."""
    league = make_league(rounds=2)
    league.edit_shop("damson", lambda settings: settings["league"].update(charter="cd" * 32))
    server = league.start_server()
    league.start_shops()
    league.until("the server to end", lambda: server.poll() is not None)
    assert server.returncode == 0, league.text("server")
    assert league.events("round")[-1]["uploaded"] == ["alder", "birch", "cedar"]
    assert league.events("round")[0]["declined"] == {"damson": "directory"}
    assert "expected the pinned one" in league.text("damson") and "another league's" in league.text("damson")
    assert league.ledger("damson").counter == 0


def test_nobody_outlives_a_killed_daemon(make_league: Callable[..., Any], helpers: Any) -> None:
    """Also where it has nobody to talk to: there is no server here."""
    league = make_league()
    daemon = league.start_shop("alder")
    league.until("a node", lambda: helpers.children(daemon.pid))
    league.until("an outage", lambda: "it does not answer" in league.text("alder"))
    league.until("another node", lambda: helpers.children(daemon.pid))
    (node,) = helpers.children(daemon.pid)
    os.kill(daemon.pid, signal.SIGKILL)
    daemon.wait()
    league.until("the node to end", lambda: not helpers.lives(node))


@pytest.mark.slow
def test_a_killed_server_resumes_with_as_many_rounds_and_no_ledger_loses_an_event(
    make_league: Callable[..., Any],
) -> None:
    league = make_league(rounds=6, repeats=2)
    server = league.start_server()
    league.start_shops()
    league.until("two rounds", lambda: len(league.events("round")) >= 2)
    os.kill(league.running["birch"].pid, signal.SIGSTOP)  # a round is now open and waits for birch
    before = {name: list(league.ledger(name).events()) for name in league.shops}
    os.kill(server.pid, signal.SIGKILL)
    server.wait()
    os.kill(league.running["birch"].pid, signal.SIGCONT)
    refused = league.start_server()
    league.until("a refusal", lambda: refused.poll() is not None)
    assert refused.returncode == 10
    assert "go on with hanse-server resume" in league.text("server")
    resumed = league.start_server(verb="resume")
    league.until("the resumed server to end", lambda: resumed.poll() is not None)
    assert resumed.returncode == 0, league.text("server")
    rounds = [event["round"] for event in league.events("round")]
    assert rounds == [1, 2, 3, 4, 5, 6]
    for name in league.shops:
        kept = list(league.ledger(name).events())
        assert kept[: len(before[name])] == before[name]
        assert {event.charge.round for event in kept} == set(range(6))
        assert len(kept) <= 7  # the round that was open may have been paid twice, never more


@pytest.mark.slow
def test_a_server_that_serves_goes_on_with_what_was_lost_and_trains_again_after_a_stop(
    make_league: Callable[..., Any], root: Path
) -> None:
    league = make_league(rounds=40, repeats=10)
    server = league.start_server()
    league.start_shops()
    league.until("a second round", lambda: len(league.events("round")) >= 2)
    server.kill()
    server.wait()
    league.start_server(verb="serve")
    league.until("it to go on", lambda: league.events("resumed"))
    before = len(league.events("round"))
    league.until("another round", lambda: len(league.events("round")) > before)
    stopped = subprocess.run(
        [command("hanse-server"), "stop", "--config", str(league.server_config)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert stopped.stdout.startswith("Stopped.")
    done = len(league.events("round"))
    assert league.flwr("run", str(root)).returncode == 0
    league.until("the training to end", lambda: league.events("published"))
    assert len(league.events("round")) == 40
    assert done < 40
