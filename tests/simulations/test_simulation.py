"""A league in one process, on synthetic embeddings: repeatable, resumable, honest about ε and about dropouts."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dp_accounting.pld import privacy_loss_distribution as pld
from numpy.typing import NDArray

from hanse_client.examples import Examples
from hanse_common import messages, signing, wire
from hanse_common.config import load
from hanse_common.errors import RoundFailed, WireError
from hanse_common.messages import Start
from hanse_common.secagg.ring import Ring
from hanse_server.evaluation import Evaluator
from hanse_server.league import RoundReport
from hanse_simulations.experiment import Experiment
from hanse_simulations.shops import merchant_names
from hanse_simulations.simulation import League, operator_key, seeded_members

Write = Callable[..., Path]
Told = list[tuple[str, str]]
FEATURES = 48

FOUR: dict[str, Any] = {
    "data__merchants": 4,
    "plan__cohort": {"min_merchants": 3, "max_merchants": 4},
}
"""One of four may drop out of a round."""


@pytest.fixture
def experiment(write_experiment: Write) -> Callable[..., Experiment]:
    return lambda **changes: load(
        Experiment, write_experiment({key.replace("__", "."): value for key, value in changes.items()})
    )


def examples(count: int, seed: int) -> Examples:
    """Three clouds of points with norm 1."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count)
    inputs = (3 * np.eye(3, FEATURES)[labels] + rng.normal(size=(count, FEATURES)) / 4).astype(np.float32)
    return Examples.of(inputs / np.linalg.norm(inputs, axis=1, keepdims=True), labels, "cpu")


def league(settings: Experiment, folder: Path, told: Told | None = None) -> League:
    names = merchant_names(settings.data.merchants)
    shops = {name: examples(60, index) for index, name in enumerate(names)}
    told = [] if told is None else told
    members = seeded_members(settings, shops, folder, lambda name, text: told.append((name, text)))
    return League.assemble(settings, members, folder)


def trained(settings: Experiment, folder: Path) -> NDArray[np.float32]:
    return league(settings, folder).train()


def test_the_same_seed_gives_the_same_bits(experiment: Callable[..., Experiment], tmp_path: Path) -> None:
    first, second = trained(experiment(), tmp_path / "a"), trained(experiment(), tmp_path / "b")
    assert first.tobytes() == second.tobytes()
    assert trained(experiment(seed=8), tmp_path / "c").tobytes() != first.tobytes()


def test_it_learns(experiment: Callable[..., Experiment], tmp_path: Path) -> None:
    whole = league(experiment(), tmp_path)
    test = examples(200, 99)
    evaluator = Evaluator(whole.plan.recipe, whole.plan.taxonomy, test.inputs, test.labels)
    assert evaluator.accuracy(whole.train()) > 0.9


class Stop(Exception):
    pass


@pytest.mark.parametrize("last", [0, 2])
def test_a_resumed_training_ends_with_the_same_bits(
    experiment: Callable[..., Experiment], tmp_path: Path, last: int
) -> None:
    # Dropout in the model too, which draws from torch's generator; and replies are lost.
    changes: dict[str, Any] = {
        "plan__recipe__model": {"name": "linear", "dropout": 0.2},
        "plan__training__repeats": 8,
        "dropout_rate": 0.4,
    } | FOUR
    settings = experiment(**changes)
    uploads: list[tuple[str, ...]] = []
    whole = league(settings, tmp_path / "whole").train(lambda p: uploads.append(p.outcome.uploaded))

    def stop(progress: RoundReport) -> None:
        if progress.round == last:
            raise Stop

    with pytest.raises(Stop):
        league(settings, tmp_path / "parts").train(stop)
    torch.manual_seed(5)  # another process has another default generator
    rest: list[tuple[str, ...]] = []
    resumed = league(settings, tmp_path / "parts").train(lambda p: rest.append(p.outcome.uploaded))
    assert resumed.tobytes() == whole.tobytes()
    assert rest == uploads[last + 1 :]
    assert any(len(names) < 4 for names in uploads)  # or nothing was lost and nothing was tried


def test_a_round_survives_dropouts_down_to_the_minimum(
    experiment: Callable[..., Experiment], tmp_path: Path
) -> None:
    settings = experiment(dropout_rate=0.4, plan__training__repeats=8, **FOUR)
    uploads: list[int] = []
    assembled = league(settings, tmp_path)
    assembled.train(lambda p: uploads.append(len(p.outcome.uploaded)))
    assert len(uploads) == 4
    assert min(uploads) == 3
    # Whoever's upload was lost has paid all the same.
    charged = [member.ledger.counter for member in assembled.members.values()]
    assert sum(charged) > sum(uploads)


def test_below_the_minimum_the_round_fails_and_nothing_is_published(
    experiment: Callable[..., Experiment], tmp_path: Path
) -> None:
    settings = experiment(dropout_rate=0.9)
    seen: list[RoundReport] = []
    with pytest.raises(RoundFailed, match="Round 1 of 4 failed"):
        league(settings, tmp_path).train(seen.append)
    assert seen == []
    assert not (tmp_path / "server" / "checkpoint.safetensors").exists()


def test_epsilon_is_what_dp_accounting_computes(
    experiment: Callable[..., Experiment], tmp_path: Path
) -> None:
    assembled = league(experiment(), tmp_path)
    assembled.train()
    training = assembled.plan.training
    wanted = (
        pld.from_gaussian_mechanism(
            standard_deviation=training.noise_multiplier,
            sampling_prob=training.sampling_rate,
            value_discretization_interval=1e-4,
        )
        .self_compose(training.rounds * training.local_steps)
        .get_epsilon_for_delta(assembled.plan.delta)
    )
    for member in assembled.members.values():
        spent = member.ledger.spent()
        assert spent.epsilon == pytest.approx(wanted, rel=0.01)
        assert (spent.delta, member.ledger.counter) == (1e-5, 4)
        assert spent.plans[0].steps == 8


def test_ledgers_stay_charged(experiment: Callable[..., Experiment], tmp_path: Path) -> None:
    """Training again from scratch with the old ledgers is declined: the photos have paid for these rounds."""
    trained(experiment(), tmp_path)
    (tmp_path / "server").rename(tmp_path / "forgotten")
    told: Told = []
    with pytest.raises(RoundFailed, match="declined"):
        league(experiment(), tmp_path, told).train()
    assert {name for name, _ in told} == {"alder", "birch", "cedar"}


def test_merchants_draw_from_streams_of_their_own(
    experiment: Callable[..., Experiment], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two shops with the same photos upload different numbers."""
    drawn: list[bytes] = []
    original = Ring.encode
    monkeypatch.setattr(
        Ring, "encode", lambda ring, update: drawn.append(update.tobytes()) or original(ring, update)
    )
    same = examples(60, 0)
    names = ("alder", "birch", "cedar")
    members = seeded_members(experiment(), dict.fromkeys(names, same), tmp_path, lambda name, text: None)
    League.assemble(experiment(), members, tmp_path).train()
    assert len(drawn) == 12
    assert len(set(drawn)) == 12


def test_the_seed_is_behind_key_and_initial_model(
    experiment: Callable[..., Experiment], tmp_path: Path
) -> None:
    def begun(seed: int) -> tuple[bytes, bytes]:
        """The operator's key, and the first round's model."""
        model = {"name": "linear", "initialisation": "kaiming"}
        settings = experiment(seed=seed, plan__recipe__model=model)
        whole = league(settings, tmp_path / str(seed))
        sent: list[bytes] = []
        for name, member in whole.members.items():

            def handle(request: bytes, answer: Callable[[bytes], bytes] = member.handle) -> bytes:
                with suppress(WireError):
                    sent.append(wire.decode(Start, request, messages.MAX_MESSAGE_BYTES).model)
                return answer(request)

            whole.grid._merchants[name] = handle
        whole.train()
        return signing.public_bytes(operator_key(settings)), sent[0]

    one, two = begun(1), begun(2)
    assert one[0] != two[0]
    assert one[1] != two[1]


def test_attempts_and_tail_are_the_experiments(experiment: Callable[..., Experiment], tmp_path: Path) -> None:
    last = trained(experiment(optimization__tail_average=0.0), tmp_path / "a")
    mean = trained(experiment(optimization__tail_average=1.0), tmp_path / "b")
    assert not np.array_equal(last, mean)
    lossy = {"dropout_rate": 0.999, "plan__training__repeats": 8}
    for attempts in (1, 3):
        settings = experiment(optimization__attempts=attempts, **lossy)
        with pytest.raises(RoundFailed) as failed:
            trained(settings, tmp_path / str(attempts))
        assert str(failed.value).count("Attempt ") == attempts
