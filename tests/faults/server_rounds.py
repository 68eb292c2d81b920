"""kill -9 at fault points of a server's training: `python server_rounds.py every STEP broken STEP`, or `twice STEP`.

Prints JSON. A program of its own, so that a fork copies little.
"""

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import server_league
from points import Place
from server_broken import BROKEN
from server_setting import HONEST, ServerVariant

MEMORY = Path("/dev/shm")  # noqa: S108 - what a killed process leaves does not depend on the disk


def crash_at_every(step: int, folder: Path) -> dict[str, Any]:
    """Crash an honest server at each `step`-th place; return the places and what was not kept."""
    places = _places(folder, HONEST)
    started = time.monotonic()
    broken, unrecorded = {}, 0
    for place in places[::step]:
        training = server_league.trained(folder / "crashed", place)
        unrecorded += len(training.unrecorded)
        if training.broken:
            broken[str(place)] = training.broken
    return {
        "points": len(places),
        "killed": len(places[::step]),
        "phases": list(dict.fromkeys(place[0] for place in places)),
        "files": sorted({place[2] for place in places} - {""}),
        "unrecorded": unrecorded,
        "seconds": round(time.monotonic() - started, 1),
        "broken": broken,
    }


def crash_twice(step: int, folder: Path) -> dict[str, Any]:
    """Crash after some commits, and again at each `step`-th place of the life after that."""
    broken, killed = {}, 0
    for first in [place for place in _places(folder, HONEST) if place[-1] == "after commit"][1::6]:
        whole = server_league.trained(folder / "crashed", first, keeps_places=True)
        for second in whole.met[::step]:
            killed += 1
            training = server_league.trained(folder / "crashed", first, again=second)
            if training.broken:
                broken[f"{first}, {second}"] = training.broken
    return {"killed": killed, "broken": broken}


def crash_broken(step: int, folder: Path) -> dict[str, list[str]]:
    """Crash each broken server at each `step`-th place of one phase, the last first, until something is wrong."""
    found: dict[str, list[str]] = {}
    for name, (phase, variant) in BROKEN.items():
        places = [place for place in _places(folder, variant) if place[0] == phase and place[2]]
        found[name] = _first_fault(folder, places[::-step], variant)
    return found


def _first_fault(folder: Path, places: Sequence[Place], variant: ServerVariant) -> list[str]:
    for place in places:
        training = server_league.trained(folder / "crashed", place, variant)
        if training.broken:
            return training.broken
    return []


def _places(folder: Path, variant: ServerVariant) -> list[Place]:
    training = server_league.trained(folder / "whole", None, variant)
    if training.broken and variant is HONEST:
        raise RuntimeError(f"without any crash: {training.broken}")
    return training.met


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as name:
        place = Path(name)
        works = {"every": crash_at_every, "twice": crash_twice, "broken": crash_broken}
        asked = zip(sys.argv[1::2], sys.argv[2::2], strict=True)
        print(json.dumps({what: works[what](int(step), place) for what, step in asked}))
