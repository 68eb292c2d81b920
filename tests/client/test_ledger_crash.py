"""kill -9 between any two statements of a charge: photos are never touched without a charge on disk.

Run as a program, this file makes the crashes: for each point a forked child kills itself there, and the
parent opens what it left behind. It runs in a process of its own, so that a fork copies little.
"""

import functools
import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from tests.crashes import dies_at, run

from hanse_client import ledger as ledger_module
from hanse_client.charges import Budget, Charge
from hanse_client.ledger import Ledger
from hanse_common.errors import LedgerError
from hanse_common.privacy.mechanism import Mechanism

FILTERS = ("sum", "rdp-16")
MECHANISM = Mechanism(clipping_norm=0.5, dimension=1000, noise_multiplier=4.0, sampling_rate=0.1, steps=1)


def budget(filter_name: str) -> Budget:
    return Budget(10.0, 2e-5, filter_name, "product")


def charge(round_: int, plan: int = 0) -> Charge:
    return Charge(bytes([plan]) * 32, round_, 0, MECHANISM, 1000, 1e-5, "product")


def use_photos(ledger: Ledger, folder: Path, round_: int, plan: int = 0) -> None:
    """What a merchant does: charge, then touch photos. A file stands for the touch."""
    ledger.charge(charge(round_, plan))
    (folder / f"touched-{round_}").touch()


def crash_in_every_charge(
    folder: Path, filter_name: str, opcodes: bool = False, plan: int = 0
) -> list[tuple[list[int], list[int], bool]]:
    """Crash at each point of charging round 1 of `plan`, after round 0 of plan 0.

    For each point: the rounds in the ledger, those whose photos were touched, and whether what the ledger says is
    spent is just what its rows cost.
    """
    found: list[tuple[list[int], list[int], bool]] = []
    before = folder / "before"
    Ledger(before, budget(filter_name)).charge(charge(0))  # also computes ε once for all children
    costs = [Ledger(before, budget(filter_name)).spent().epsilon]
    shutil.copy(before, folder / "after")
    costs.append(Ledger(folder / "after", budget(filter_name)).charge(charge(1, plan)).epsilon)
    crashed = True
    while crashed:
        place = folder / "place"
        place.mkdir()
        path = place / "ledger"
        shutil.copy(before, path)
        ledger = Ledger(path, budget(filter_name))
        crashed = dies_at(
            len(found),
            lambda ledger=ledger, place=place: use_photos(ledger, place, 1, plan),
            ledger_module.__file__,
            opcodes,
        )
        after = Ledger(path, budget(filter_name))
        rounds = [event.charge.round for event in after.events()]
        touched = [int(file.name.removeprefix("touched-")) for file in place.glob("touched-*")]
        found.append((rounds, touched, after.spent().epsilon == costs[len(rounds) - 1]))
        after.charge(charge(2, plan))  # whatever happened, the next round can be charged
        shutil.rmtree(place)
    return found


def crash_in_every_birth(folder: Path, filter_name: str) -> list[bool]:
    """For each point of making a ledger: whether it is there after a crash; it must then be sound, filter and all."""
    (other,) = set(FILTERS) - {filter_name}
    others = {
        f"adds up by {filter_name}": budget(other),
        "keeps account of one product": replace(budget(filter_name), unit="photo"),
    }
    found: list[bool] = []
    crashed = True
    while crashed:
        place = folder / "place"
        path = place / "ledger"
        crashed = dies_at(
            len(found), lambda path=path: Ledger(path, budget(filter_name)), ledger_module.__file__
        )
        found.append(path.exists())
        if path.exists():
            for reason, wrong in others.items():
                try:
                    Ledger(path, wrong)
                except LedgerError as error:
                    if reason not in str(error):
                        raise
                else:
                    raise RuntimeError("a crash left a ledger that takes any filter or unit")
        Ledger(path, budget(filter_name)).charge(charge(0))
        shutil.rmtree(place)
    return found


def kill_at_any_time(folder: Path, filter_name: str) -> tuple[list[int], list[int]]:
    """Charge round after round in children that are killed from outside: the rounds charged and touched."""
    chance = random.Random(0)
    Ledger(folder / "ledger", budget(filter_name)).check(charge(0))  # computes ε once for all children
    for _ in range(20):
        child = os.fork()
        if child == 0:
            ledger = Ledger(folder / "ledger", budget(filter_name))
            last = ledger.last_work(bytes(32))
            for round_ in itertools.count(0 if last is None else last[0] + 1):
                use_photos(ledger, folder, round_)
        time.sleep(chance.uniform(0.0, 0.1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    rounds = [event.charge.round for event in Ledger(folder / "ledger", budget(filter_name)).events()]
    return rounds, [int(file.name.removeprefix("touched-")) for file in folder.glob("touched-*")]


BOTH_FILTERS = pytest.mark.parametrize("filter_name", FILTERS)


@BOTH_FILTERS
@pytest.mark.parametrize("what", ["lines", "second plan", pytest.param("opcodes", marks=pytest.mark.slow)])
def test_no_photo_is_touched_without_a_charge_wherever_the_crash(folder_in_memory, what, filter_name):
    found = run(__file__, what, folder_in_memory, filter_name)
    assert len(found) > 50
    assert all(rounds in ([0], [0, 1]) for rounds, _, _ in found)  # there or not, and the row before stays
    assert all(set(touched) <= set(rounds) for rounds, touched, _ in found)
    assert all(right for _, _, right in found)
    # The crashes reached from before the charge to after it: absent, then charged in vain, then both.
    outcomes = [(len(rounds) - 1, len(touched)) for rounds, touched, _ in found]
    assert outcomes == sorted(outcomes)
    assert set(outcomes) == {(0, 0), (1, 0), (1, 1)}


@BOTH_FILTERS
def test_a_crash_while_the_ledger_is_made_leaves_none_or_a_sound_one(folder_in_memory, filter_name):
    found = run(__file__, "birth", folder_in_memory, filter_name)
    assert len(found) > 20
    assert found == sorted(found)
    assert set(found) == {False, True}


@BOTH_FILTERS
def test_no_photo_is_touched_without_a_charge_whenever_the_kill(folder_in_memory, filter_name):
    """Kills from outside fall inside SQLite and the system's calls too; one ledger survives all of them."""
    charged, touched = run(__file__, "any time", folder_in_memory, filter_name)
    assert charged == list(range(len(charged)))
    assert set(touched) <= set(charged)
    assert len(touched) > 20
    assert len(charged) - len(touched) <= 20


if __name__ == "__main__":
    modes = {
        "lines": crash_in_every_charge,
        "second plan": functools.partial(crash_in_every_charge, plan=1),
        "opcodes": functools.partial(crash_in_every_charge, opcodes=True),
        "birth": crash_in_every_birth,
        "any time": kill_at_any_time,
    }
    what, place, filter_name = sys.argv[1:]
    print(json.dumps(modes[what](Path(place), filter_name)))
