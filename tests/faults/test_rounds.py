"""kill -9 at every step of a merchant's rounds: nothing is undercounted, answered twice or half-written."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent

STEP = 24
"""The default suite crashes at every so many-th place; the slow one at every place."""

BROKEN = {
    "acknowledges a charge before it is written": "undercounted",
    "looks at photos, then pays": "undercounted",
    "forgets which attempts it began": "answered twice",
    "notes an attempt after the answer": "answered twice",
    "makes its ledger in place": "half-written",
    "keeps secrets on disk": "answered twice",
}


def run(*arguments: str) -> Any:
    command = [sys.executable, str(HERE / "rounds.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("step", [STEP, pytest.param(1, marks=pytest.mark.slow)])
def test_wherever_a_merchant_is_killed_nothing_is_lost_and_the_league_goes_on(step: int) -> None:
    found = run("every", str(step))
    print(f"{found['killed']} of {found['points']} fault points in {found['seconds']} s")
    assert found["broken"] == {}
    assert found["points"] > 900
    assert found["killed"] == -(-found["points"] // step)
    assert found["phases"] == ["Agreement", "Delivery", "Invitation", "Roster", "Start", "Survivors", "open"]
    for file in ("participant", "ledger", "markers", "merchant"):
        assert any(file in name for name in found["files"])


@pytest.mark.slow
def test_a_merchant_that_is_killed_again_while_it_starts_loses_nothing_either() -> None:
    found = run("twice", "2")
    assert found["broken"] == {}
    assert found["killed"] > 80


def test_the_harness_finds_every_broken_merchant() -> None:
    found = run("broken", "1")
    assert found.keys() == BROKEN.keys()
    for name, first in found.items():
        assert first, f"nothing was seen to be wrong with a merchant that {name}"
        (what,) = first.values()
        assert any(line.startswith(BROKEN[name]) for line in what), what
