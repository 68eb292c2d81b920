"""kill -9 at fault points of a merchant's rounds: `python rounds.py every STEP`, `twice STEP` or `broken 1`.

Prints JSON. A program of its own, so that a fork copies little.
"""

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import league
from broken import BROKEN
from points import Place
from setting import HONEST, Variant

MEMORY = Path("/dev/shm")  # noqa: S108 - what a killed process leaves does not depend on the disk


def crash_at_every(step: int, folder: Path) -> dict[str, Any]:
    """Crash an honest merchant at each `step`-th place; return the places and what was not kept."""
    places = _places(folder, HONEST)
    started = time.monotonic()
    broken = _crash(folder, places[::step], HONEST)
    return {
        "points": len(places),
        "killed": len(places[::step]),
        "phases": sorted({place[0] for place in places[::step]}),
        "files": sorted({place[2] for place in places[::step]} - {""}),
        "seconds": round(time.monotonic() - started, 1),
        "broken": broken,
    }


def crash_broken(folder: Path) -> dict[str, dict[str, list[str]]]:
    """Crash each broken merchant at each place of one phase until something is seen to be wrong."""
    found = {}
    for name, (phase, variant) in BROKEN.items():
        places = [place for place in _places(folder, variant) if place[0] == phase]
        found[name] = _crash(folder, places, variant, stop=True)
    return found


def crash_twice(step: int, folder: Path) -> dict[str, Any]:
    """Crash in the middle of writing, and again at each `step`-th place of being started from what that left."""
    written = [place for place in _places(folder, HONEST) if place[-1] == "after execute"]
    broken, killed = {}, 0
    for first in [place for place in written if place[0] in ("Invitation", "Start")][::20]:
        whole = league.trained(folder / "crashed", first, keeps_places=True)
        for second in [place for place in whole.met if place[0] == "open"][::step]:
            killed += 1
            training = league.trained(folder / "crashed", first, again=second)
            if training.broken:
                broken[f"{first}, {second}"] = training.broken
    return {"killed": killed, "broken": broken}


def _places(folder: Path, variant: Variant) -> list[Place]:
    return league.trained(folder / "whole", None, variant).met


def _crash(
    folder: Path, places: Sequence[Place], variant: Variant, stop: bool = False
) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for place in places:
        training = league.trained(folder / "crashed", place, variant)
        if training.broken:
            found[str(place)] = training.broken
            if stop:
                break
    return found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as name:
        place = Path(name)
        league.trained(place / "warm")  # what is computed once in a process is computed before it is forked
        what, step = sys.argv[1], int(sys.argv[2])
        if what == "every":
            print(json.dumps(crash_at_every(step, place)))
        elif what == "twice":
            print(json.dumps(crash_twice(step, place)))
        else:
            print(json.dumps(crash_broken(place)))
