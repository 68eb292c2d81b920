"""A server that was restored from an older backup goes on with real merchants, whose ledgers know what it forgot."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from hanse_client.charges import Budget
from hanse_client.ledger import Ledger
from hanse_client.markers import Markers
from hanse_client.participant import Participant, PinnedLeague
from hanse_client.policy import Policy
from hanse_common import signing
from hanse_common.charter import founded
from hanse_common.directory import Directory, Entry, SignedDirectory
from hanse_common.errors import RoundFailed
from hanse_common.plan import Plan, SignedPlan
from hanse_server.audit import verify
from hanse_server.coordinator import LeagueDirectory, MaskedRounds
from hanse_server.league import RoundReport, train
from hanse_server.optimizers import create
from hanse_server.storage import Progress, State
from hanse_server.storage.backup import read_backup, write_backup
from hanse_simulations.grid import LocalGrid

NAMES = ("alder", "birch", "cedar")
OPERATOR, LEAGUE, *KEYS = (Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32) for n in range(1, 6))
NOW = 1_800_000_000
BUDGET = Budget(100.0, 1e-4)
ROUNDS = 8


class Trainer:
    """Contributes a constant, without photos."""

    def accepts(self, plan: Plan) -> bool:
        return True

    def contribution(self, plan: Plan, round_: int, model: NDArray[np.float32]) -> NDArray[np.uint32]:
        return plan.encode(np.full(plan.dimension, 0.25))


class League:
    """Merchants with ledgers and marks in files, and what trains with them on any state."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan = plan
        self.signed = SignedPlan.sign(plan, OPERATOR)
        charter = founded("test", LEAGUE)
        pinned = PinnedLeague(signing.public_bytes(OPERATOR), charter.read().digest, plan.taxonomy)
        listed = Directory(
            league="test",
            charter=pinned.charter,
            version=1,
            expires=NOW + 99,
            entries=tuple(
                Entry(name=name, entity=name, identity=signing.public_bytes(key), expires=NOW + 99)
                for name, key in zip(NAMES, KEYS, strict=True)
            ),
        )
        self._directory = LeagueDirectory(SignedDirectory.of(listed, (charter,)).signed_by(LEAGUE), listed)
        self.ledgers: dict[str, Ledger] = {}
        handlers = {}
        for name, key in zip(NAMES, KEYS, strict=True):
            self.ledgers[name] = Ledger(folder / name / "ledger.sqlite", BUDGET)
            handlers[name] = Participant(
                pinned,
                Policy(league="test", epsilon=100.0, delta=1e-4),
                key,
                self.ledgers[name],
                Markers(folder / name / "markers.sqlite"),
                Trainer(),
                tell=lambda reason: None,
                clock=lambda: NOW,
                wait=lambda seconds: None,
            ).handle
        self._grid = LocalGrid(handlers)

    def progress(self, state: State) -> Progress:
        return state.progress(self.signed, self.plan)

    def train(self, state: State, on_round: Callable[[RoundReport], None] = lambda report: None) -> Any:
        progress = self.progress(state)
        rounds = MaskedRounds(
            self._grid,
            self.signed,
            self.plan,
            lambda: self._directory,
            progress.next_attempt,
            setup_rounds=2,
            attempts=1,
            clock=lambda: NOW,
        )
        initial = np.zeros(self.plan.dimension, dtype=np.float32)
        return train(rounds, progress, create({"name": "fedavg"}), initial, tail_average=0, on_round=on_round)

    def charged(self) -> list[tuple[int, int]]:
        """Return (round, attempt) of each charge of one merchant; all have the same."""
        found = [
            [(event.charge.round, event.charge.attempt) for event in ledger.events()]
            for ledger in self.ledgers.values()
        ]
        assert all(one == found[0] for one in found)
        return found[0]


class Lost(Exception):
    """The machine is gone."""


@pytest.fixture
def league(make_plan: Callable[..., Plan], tmp_path: Path) -> League:
    for name in NAMES:
        (tmp_path / name).mkdir()
    return League(make_plan(training={"rounds": ROUNDS}), tmp_path)


def lost_after(league: League, state: State, backup_after: int, last: int, path: Path) -> None:
    """Train `last` rounds, with a backup after the round `backup_after`, from 0; then the server is gone."""

    def on_round(report: RoundReport) -> None:
        if report.round == backup_after:
            write_backup(state, path)
        if report.round == last - 1:
            raise Lost

    with pytest.raises(Lost):
        league.train(state, on_round)


@pytest.mark.parametrize("last", [5, *(pytest.param(last, marks=pytest.mark.slow) for last in (4, 8))])
def test_the_training_goes_on_after_the_rounds_that_merchants_paid_for(
    league: League, state: State, make_url: Callable[[], str], tmp_path: Path, last: int
) -> None:
    lost_after(league, state, 2, last, tmp_path / "backup.tar")
    before = league.charged()
    assert [round_ for round_, _ in before] == list(range(last))
    with State.open(tmp_path / "restored", make_url()) as restored:
        read_backup(restored, tmp_path / "backup.tar")
        league.progress(restored).leave_out(last)
        done: list[int] = []
        league.train(restored, lambda report: done.append(report.round))
        assert done == list(range(last, ROUNDS))
        verify(restored.audit.entries())
    after = league.charged()
    assert after[:last] == before
    assert [round_ for round_, _ in after] == list(range(ROUNDS))  # none was paid for twice
    for ledger in league.ledgers.values():
        ledger.verify()


def test_a_round_that_was_begun_and_not_paid_for_is_asked_for_again(
    league: League, state: State, tmp_path: Path
) -> None:
    lost_after(league, state, 2, 3, tmp_path / "backup.tar")
    with State.open(tmp_path / "restored") as restored:
        read_backup(restored, tmp_path / "backup.tar")
        league.train(restored)
        assert league.progress(restored).rounds_done() == ROUNDS
    assert [round_ for round_, _ in league.charged()] == list(range(ROUNDS))


def test_without_being_told_the_server_asks_in_vain_and_nobody_pays(
    league: League, state: State, tmp_path: Path
) -> None:
    lost_after(league, state, 2, 5, tmp_path / "backup.tar")
    before = league.charged()
    with State.open(tmp_path / "restored") as restored:
        read_backup(restored, tmp_path / "backup.tar")
        with pytest.raises(RoundFailed, match="repeated"):
            league.train(restored)
        assert league.charged() == before
        league.progress(restored).leave_out(5)  # it is not too late
        league.train(restored)
    assert [round_ for round_, _ in league.charged()] == list(range(ROUNDS))
