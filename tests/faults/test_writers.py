"""kill -9 at every step of all else that writes on a merchant's disk: the old content or the new, never half."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

PLACES = {
    "torchless": {"write_atomically": 15, "create_secret": 15, "identity": 30, "node key": 30, "export": 30},
    "torch": {"holdout key": 20, "embedding cache": 40},
}
"""How many places there are at least, by what is loaded and what is written."""


@pytest.mark.parametrize("kind", ["torchless", pytest.param("torch", marks=pytest.mark.slow)])
def test_wherever_a_writer_is_killed_nothing_is_half_written(kind: str) -> None:
    command = [sys.executable, str(HERE / "writers.py"), kind]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for name, least in PLACES[kind].items():
        places, broken = found.pop(name)
        assert broken == []
        assert places >= least
    for _, broken in found.values():  # writers as they should not be, for the harness to find
        assert any("half-written" in line for line in broken)
