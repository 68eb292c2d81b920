"""A league's recognizers on their way to the shops: trained, published, fetched by real daemons, and taken back."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hanse_client.config import ClientConfig
from hanse_client.releases import Releases
from hanse_common.config import load
from hanse_common.vision.recognizer import Recognizer
from hanse_simulations.processes import command

pytestmark = pytest.mark.slow

SECONDS = 60.0
"""How long a swap may take: the node's own way back after a server's restart is most of it."""


def operate(league: Any, *words: str) -> str:
    """Run one of the operator's commands and return what it says."""
    done = subprocess.run(
        [command("hanse-server"), *words, "--config", str(league.server_config)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def shop(league: Any, name: str, *words: str) -> str:
    """Run one of a shop's commands and return what it says."""
    done = subprocess.run(
        [command("hanse-client"), *words, "--config", str(league.shops[name] / "hanse-client.yaml")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def in_use(league: Any) -> list[tuple[int, int] | None]:
    """Return each shop's release and version, of a recognizer that is whole."""
    found: list[tuple[int, int] | None] = []
    for name in league.shops:
        releases = Releases.of(load(ClientConfig, league.shops[name] / "hanse-client.yaml"))
        folder, release = releases.folder(), releases.in_use()
        if folder is None or release is None:
            found.append(None)
            continue
        assert Recognizer.load(folder).digest() == release.recognizer
        found.append((release.number, release.version))
    return found


def everybody_has(league: Any, number: int, version: int) -> None:
    league.until(
        f"every shop to have release {number}",
        lambda: in_use(league) == [(number, version)] * len(league.shops),
        wait=SECONDS,
    )


def train(league: Any) -> None:
    server = league.start_server()
    league.until("the server to end", lambda: server.poll() is not None)
    assert server.returncode == 0, league.text("server")


def end(league: Any) -> None:
    league.running["server"].terminate()
    league.running["server"].wait(60)


def test_every_shop_swaps_to_what_is_published_and_back_to_what_it_is_rolled_back_to(
    make_league: Callable[..., Any],
) -> None:
    league = make_league(rounds=3)
    league.edit_server(lambda service: service["blocks"].update(rounds=1))
    for name in league.shops:
        league.edit_shop(name, lambda settings: settings.update(recognizer=None))
        league.edit_shop(name, lambda settings: settings["policy"].update(epsilon=20, delta=1e-4))
    league.start_shops()
    train(league)
    assert in_use(league) == [None] * 4, "a candidate is nobody's yet"

    operate(league, "publish", "1", "--without-figures", "--reason", "the first one")
    league.start_server(verb="serve")
    everybody_has(league, 1, 1)
    line = "The league released version 1: the first one. It is in use now."
    league.until("the owners to be told", lambda: all(line in league.text(name) for name in league.shops))
    end(league)

    plan: Path = league.folder / "server" / "second.hanse"
    operate(league, "sign", "--out", str(plan))
    league.edit_server(lambda service: service.update(plan=str(plan)))
    train(league)
    operate(league, "publish", "2", "--without-figures", "--reason", "more shoes")
    league.start_server(verb="serve")
    everybody_has(league, 2, 2)
    end(league)

    operate(league, "rollback", "1", "--reason", "the second one is no good")
    league.start_server(verb="serve")
    everybody_has(league, 3, 1)
    line = "The league went back to version 1: the second one is no good. It is in use now."
    league.until("the owners to be told", lambda: all(line in league.text(name) for name in league.shops))

    name = next(iter(league.shops))
    assert "the league's version 1, its release 3" in shop(league, name, "status")
    assert shop(league, name, "update").strip() == "Version 1 is the newest, and in use."
    photo = next((league.shops[name] / "photos").rglob("*.png"))
    assert json.loads(shop(league, name, "classify", "--json", str(photo)))["probabilities"]
