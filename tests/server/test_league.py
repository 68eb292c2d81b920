"""A whole training: resumed anywhere it gives the same model, and no attempt number is used twice."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hanse_common import messages, wire
from hanse_common.errors import ConfigError, RoundFailed
from hanse_common.messages import Invitation, Joined, Start, Upload
from hanse_common.plan import Plan, SignedPlan
from hanse_common.secagg import ring
from hanse_server.league import RoundReport, train
from hanse_server.optimizers import create
from hanse_server.store import Store

MakePlan = Callable[..., Plan]


class Deterministic:
    """Merchants whose update depends on round and model only; they remember what they were asked."""

    def __init__(self, plan: Plan, silent_attempts: frozenset[tuple[int, int]] = frozenset()) -> None:
        self.plan = plan
        self.silent = silent_attempts
        self.seen: list[tuple[int, int]] = []
        self.model = np.zeros(plan.dimension, dtype=np.float32)

    def merchants(self) -> tuple[str, ...]:
        return ("a", "b")

    def exchange(
        self, kind: str, payloads: Mapping[str, bytes], deadline: float
    ) -> Iterator[tuple[str, bytes]]:
        for name, data in payloads.items():
            message = wire.decode_any((Invitation, Start), data, messages.MAX_MESSAGE_BYTES)
            if isinstance(message, Invitation):
                if name == "a":
                    self.seen.append((message.round, message.attempt))
                self.model = messages.model_from_bytes(message.model, self.plan.dimension)
                digest = messages.model_digest(message.model)
                yield name, wire.encode(Joined(**message.work, model_digest=digest))
            elif (message.round, message.attempt) not in self.silent:
                update = 0.1 * (message.round + 1) - 0.5 * self.model.astype(np.float64)
                vector = ring.to_bytes(self.plan.ring.encode(update))
                yield name, wire.encode(Upload(**message.work, vector=vector))


class Stop(Exception):
    pass


def go(
    plan: Plan,
    transport: Deterministic,
    folder: Path,
    stop_after: int | None = None,
    on_report: Callable[[RoundReport], None] = lambda report: None,
) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    def on_round(report: RoundReport) -> None:
        on_report(report)
        if report.round == stop_after:
            raise Stop

    return train(
        transport,
        SignedPlan.sign(plan, Ed25519PrivateKey.from_private_bytes(bytes(32))),
        plan,
        create({"name": "adam"}),
        Store(folder),
        np.ones(plan.dimension, dtype=np.float32),
        attempts=3,
        tail_average=0.5,
        on_round=on_round,
    )


@pytest.mark.parametrize("stop_after", [0, 1, 2, 3])
def test_a_resumed_training_ends_with_the_same_model(
    make_plan: MakePlan, tmp_path: Path, stop_after: int
) -> None:
    plan = make_plan()
    whole = go(plan, Deterministic(plan), tmp_path / "whole")
    with pytest.raises(Stop):
        go(plan, Deterministic(plan), tmp_path / "parts", stop_after)
    rest = Deterministic(plan)
    resumed = go(plan, rest, tmp_path / "parts")
    assert np.array_equal(whole, resumed)
    assert [round_ for round_, _ in rest.seen] == list(range(stop_after + 1, 4))


def test_a_failed_attempt_is_followed_by_another_with_a_new_number(
    make_plan: MakePlan, tmp_path: Path
) -> None:
    plan = make_plan()
    transport = Deterministic(plan, frozenset({(1, 0), (1, 1)}))
    go(plan, transport, tmp_path)
    assert transport.seen == [(0, 0), (1, 0), (1, 1), (1, 2), (2, 0), (3, 0)]


def test_attempt_numbers_go_on_after_a_restart(make_plan: MakePlan, tmp_path: Path) -> None:
    plan = make_plan()
    transport = Deterministic(plan, frozenset({(0, 0), (0, 1), (0, 2)}))
    with pytest.raises(RoundFailed, match="Round 1 of 4"):
        go(plan, transport, tmp_path)
    again = Deterministic(plan)
    go(plan, again, tmp_path)
    assert again.seen[0] == (0, 3)


def test_a_store_of_another_plan_is_refused(make_plan: MakePlan, tmp_path: Path) -> None:
    go(make_plan(), Deterministic(make_plan()), tmp_path)
    other = make_plan(league="other")
    with pytest.raises(ConfigError, match="another plan"):
        go(other, Deterministic(other), tmp_path)


@pytest.mark.parametrize("name", ["checkpoint.safetensors", "attempt.json", "plan.hanse"])
def test_a_damaged_file_is_named_and_left_alone(make_plan: MakePlan, tmp_path: Path, name: str) -> None:
    plan = make_plan()
    with pytest.raises(Stop):
        go(plan, Deterministic(plan), tmp_path, 1)
    (tmp_path / name).write_bytes(b"half of")
    with pytest.raises(ConfigError, match=name):
        go(plan, Deterministic(plan), tmp_path)
    assert (tmp_path / name).read_bytes() == b"half of"


@pytest.mark.parametrize(
    "content", [b'{"round":0,"attempt":Infinity}', b"[" * 4000, b'{"round":0,"attempt":-5}']
)
def test_an_attempt_file_that_makes_no_sense_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "attempt.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"attempt\.json"):
        Store(tmp_path).next_attempt(0)


def test_what_is_published_is_the_mean_of_the_last_rounds_models(make_plan: MakePlan, tmp_path: Path) -> None:
    plan = make_plan()
    after, published = [], []

    def on_round(report: RoundReport) -> None:
        checkpoint = Store(tmp_path).load(plan.digest, plan.dimension)
        assert checkpoint is not None
        after.append(checkpoint.model)
        published.append(report.published)

    final = go(plan, Deterministic(plan), tmp_path, on_report=on_round)
    assert np.array_equal(published[1], after[1].astype(np.float32))  # the tail has not begun
    assert np.array_equal(final, np.mean(after[2:], axis=0).astype(np.float32))
    assert np.array_equal(final, published[-1])
    assert not np.array_equal(final, after[-1].astype(np.float32))
