"""Looks for inputs that reach new code, and keeps the smallest of them: `python -m tests.fuzz [TARGET …] --seconds 30`.

New is a line of `hanse_*` that no kept input reached, or a refusal in other words: pydantic and Pillow are not Python,
so what they say is all that is seen of them.
"""

import argparse
import hashlib
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from . import parsers
from .mutate import Mutator
from .target import Parse, Target
from .test_fuzz import CORPUS, kept

MAX_KEPT, MAX_KEPT_BYTES = 16, 2000
"""Bounds of the inputs kept of a target, and of one input's bytes."""

Reached = set[Any]


def traced(target: Target, parse: Parse, data: bytes) -> Reached:
    """Return what `data` reaches: lines, and the words of its refusal without what is quoted in them."""
    reached: Reached = set()
    ours: dict[CodeType, bool] = {}

    def call(frame: FrameType, event: str, _: object) -> Callable[..., Any] | None:
        code = frame.f_code
        if code not in ours:
            ours[code] = "hanse_c" in code.co_filename
        return line if ours[code] else None

    def line(frame: FrameType, event: str, _: object) -> Callable[..., Any]:
        reached.add((frame.f_code, frame.f_lineno))
        return line

    sys.settrace(call)
    try:
        parse(data)
        reached.add("taken")
    except target.refusals as refusal:
        said = re.sub(
            r"'[^']*'|\"[^\"]*\"|[0-9a-f]{8,}|-?[0-9.]+|\([^)]*\)", "#", str(refusal).splitlines()[0]
        )
        reached.add((type(refusal), said.rpartition(": ")[2][:60]))
    finally:
        sys.settrace(None)
    return reached


def extend(target: Target, seconds: float, rng: random.Random) -> None:
    """Look for new inputs of `target`, then keep as few and as small ones as reach all that was reached."""
    given = target.seeds()
    corpus = {data: frozenset[Any]() for data in kept(target)}
    with tempfile.TemporaryDirectory() as name, target.opened(Path(name)) as parse:
        known: Reached = set().union(*(traced(target, parse, data) for data in given))
        seeded = set(known)
        for data in corpus:
            corpus[data] = frozenset(traced(target, parse, data))
            known |= corpus[data]
        ends = time.monotonic() + seconds
        tried = 0
        while time.monotonic() < ends:
            mutator = Mutator(rng, [*given, *corpus], target.dialect)
            for _ in range(100):
                data = mutator.next()
                tried += 1
                if len(data) > MAX_KEPT_BYTES:
                    continue
                reached = traced(target, parse, data)
                if not reached <= known:
                    known |= reached
                    corpus[data] = frozenset(reached)
    wanted, chosen = known - seeded, []
    while wanted and corpus and len(chosen) < MAX_KEPT:
        best = max(corpus, key=lambda data: (len(corpus[data] & wanted), -len(data)))
        if not corpus[best] & wanted:
            break
        wanted -= corpus.pop(best)
        chosen.append(best)
    folder = CORPUS / target.name
    folder.mkdir(parents=True, exist_ok=True)
    names = {hashlib.sha256(data).hexdigest()[:16]: data for data in chosen}
    for path in folder.iterdir():
        if path.name not in names and re.fullmatch("[0-9a-f]{16}", path.name):
            path.unlink()
    for name, data in names.items():
        (folder / name).write_bytes(data)
    print(
        f"{target.name}: {tried} inputs tried, {len(names)} kept, {sum(map(len, chosen))} bytes", flush=True
    )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("targets", nargs="*")
    options.add_argument("--seconds", type=float, default=30.0, help="for each target")
    chosen = options.parse_args()
    for target in parsers.targets():
        if not chosen.targets or target.name in chosen.targets:
            extend(target, chosen.seconds, random.Random())


if __name__ == "__main__":
    main()
