"""The operator's page of a server that trains with real shops: what a monitor and the operator see meanwhile."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
import yaml

from hanse_server.page import listens
from hanse_simulations.processes import command

pytestmark = pytest.mark.slow

FORM = {"Sec-Fetch-Site": "same-origin"}


def token_of(league: Any) -> str:
    service = yaml.safe_load(league.server_config.read_text())["service"]
    found: str = (league.server_config.parent / service["admin"]["token"]).read_text().strip()
    return found


@contextmanager
def operator(league: Any, port: int) -> Iterator[httpx.Client]:
    """The operator, let in."""
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
        answer = client.post("/login", data={"token": token_of(league)}, headers=FORM)
        assert (answer.status_code, answer.headers["location"]) == (303, "/")
        yield client


def test_the_page_is_there_while_merchants_train_and_by_itself_afterwards(
    make_league: Callable[..., Any],
) -> None:
    league = make_league()
    server = league.start_server()
    league.until("listening", lambda: league.events("listening"))
    (event,) = league.events("listening")
    port = event["page_port"]
    assert f"Your page: http://127.0.0.1:{port}." in event["text"]
    assert listens("127.0.0.1", event["fleet_port"])
    with operator(league, port) as page:
        assert page.get("/ready").text == "ready\n"
        league.until("the run", lambda: "A training is under way." in page.get("/").text)
        league.start_shops()
        league.until("two rounds", lambda: len(league.events("round")) > 1)
        text = page.get("/privacy").text
        assert text.count('src="data:image/png;base64,') == 2
        bits = [float(found) for found in re.findall(r"([\d.]+) of 8 bits a byte", text)]
        assert bits[0] > 7.5  # few numbers, but each of them masked
        assert re.search(r"<bdi>alder</bdi>", page.get("/rounds").text)
        bearer = {"Authorization": f"Bearer {token_of(league)}"}
        numbers = httpx.get(f"http://127.0.0.1:{port}/metrics", headers=bearer).text
        assert re.search(r"^hanse_training_active 1\.0$", numbers, re.M)
        assert re.search(r"^hanse_rounds_total [2-6]\.0$", numbers, re.M)
    league.until("the server to end", lambda: server.poll() is not None)
    assert server.returncode == 0, league.text("server")
    words = [command("hanse-server"), "page", "--config", str(league.server_config)]
    league._start("page", words)
    league.until("the page", lambda: "Your page: http" in league.text("page"))
    with operator(league, port) as page:
        text = page.get("/").text
        assert "The training is finished." in text
        assert "hanse-server publish 1" in text
        assert page.get("/metrics").status_code == 404
