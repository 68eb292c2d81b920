"""A league in the middle of an upgrade: daemons of the release before, as it was shipped, beside those of this one."""

import os
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from hanse_common import signing, wire
from hanse_common.config import load
from hanse_common.plan import SignedPlan
from hanse_server.config import ServerConfig, make_evaluation_plan

pytestmark = pytest.mark.slow

BEFORE = Path(__file__).parent / "releases" / "hanse-0.1.0-py3-none-any.whl"


@pytest.fixture(scope="module")
def release_before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The release before, unpacked."""
    folder = tmp_path_factory.mktemp("release")
    with zipfile.ZipFile(BEFORE) as wheel:
        wheel.extractall(folder)
    return folder


def program(release: Path, package: str) -> tuple[str, ...]:
    """Return the command of a release that is not the installed one; its child processes are of it, too."""
    start = (
        f"import os, sys; os.environ['PYTHONPATH'] = {str(release)!r}; sys.path.insert(0, {str(release)!r}); "
        f"import {package}; assert {package}.__file__.startswith({str(release)!r}); "
        f"from {package}.cli import main; main()"
    )
    return sys.executable, "-c", start


def with_evaluation(league: Any) -> None:
    """Have the league's models tried, by a plan that version 1 of the protocol does not know."""
    text = yaml.safe_load(league.server_config.read_text())
    text["evaluation"] = {"privacy": {"epsilon": 2, "delta": 1e-6}, "holdout": 24}
    text["service"]["evaluation"] = "evaluation.hanse"
    league.server_config.write_text(yaml.safe_dump(text))
    config = load(ServerConfig, league.server_config)
    assert config.evaluation is not None
    plan = make_evaluation_plan(config.plan, config.evaluation, os.urandom(16))
    signed = SignedPlan.sign(plan, signing.load_key(config.signing_key))
    (league.server_config.parent / "evaluation.hanse").write_bytes(wire.encode(signed))
    for name in league.shops:
        league.edit_shop(name, lambda settings: settings["policy"].update(epsilon=20, delta=1e-4))


def test_merchants_of_the_release_before_train_with_a_new_server_and_sit_out_what_they_do_not_know(
    make_league: Callable[..., Any], release_before: Path
) -> None:
    league = make_league()
    with_evaluation(league)
    server = league.start_server()
    league.start_shop("alder", *program(release_before, "hanse_client"))
    for name in league.shops.keys() - {"alder"}:
        league.start_shop(name)
    league.until("the server to end", lambda: server.poll() is not None)
    assert server.returncode == 0, league.text("server")
    rounds = league.events("round")
    assert [event["round"] for event in rounds] == [1, 2, 3, 4, 5, 6]
    assert all(len(event["uploaded"]) == 4 for event in rounds), "the old one takes part in every round"
    (evaluated,) = league.events("evaluated")
    assert evaluated["after"] == 6
    assert league.ledger("alder").counter == 6
    assert league.ledger("birch").counter == 7


def test_new_merchants_train_with_a_server_of_the_release_before(
    make_league: Callable[..., Any], release_before: Path
) -> None:
    league = make_league()
    league.edit_server(lambda service: service.pop("page"))
    text = yaml.safe_load(league.server_config.read_text())
    text["optimization"] = {"optimizer": {"name": "sgd"}}  # as it was called then
    for name in ("proximal", "class_rates"):  # keys that came later
        text["plan"]["training"].pop(name, None)
    text["plan"]["recipe"].pop("loss", None)
    text["plan"]["recipe"]["preprocessing"].pop("zoom", None)
    league.server_config.write_text(yaml.safe_dump(text))
    words = [*program(release_before, "hanse_server"), "run", "--json", "--config", str(league.server_config)]
    server = league._start("server", words)
    league.start_shops()
    league.until("the server to end", lambda: server.poll() is not None)
    assert server.returncode == 0, league.text("server")
    assert all(len(event["uploaded"]) == 4 for event in league.events("round"))
    assert {league.ledger(name).counter for name in league.shops} == {6}
