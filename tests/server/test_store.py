"""Checkpoints: whole, of this plan, and read back as they were."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from hanse_common.errors import ConfigError
from hanse_server.store import Checkpoint, Store

PLAN = bytes(32)


def checkpoint(**changes: Any) -> Checkpoint:
    fields: dict[str, Any] = {
        "plan_digest": PLAN,
        "rounds_done": 2,
        "model": np.arange(6.0)[::2],  # strided on purpose: safetensors writes memory as it lies
        "optimizer": {"velocity": np.arange(6.0)[::-2]},
        "average_total": np.full(3, 0.5),
        "average_count": 1,
    }
    return Checkpoint(**(fields | changes))


def test_a_checkpoint_is_read_back_as_it_was(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.load(PLAN, 3) is None
    store.save(checkpoint())
    found = store.load(PLAN, 3)
    assert found is not None
    assert (found.rounds_done, found.average_count, found.plan_digest) == (2, 1, PLAN)
    assert found.model.tolist() == [0, 2, 4]
    assert found.optimizer["velocity"].tolist() == [5, 3, 1]
    assert found.average_total.tolist() == [0.5, 0.5, 0.5]


def test_a_checkpoint_is_replaced_whole(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.save(checkpoint())
    before = (tmp_path / "checkpoint.safetensors").stat().st_ino
    store.save(checkpoint(rounds_done=3))
    assert (tmp_path / "checkpoint.safetensors").stat().st_ino != before


def test_another_plans_size_or_formats_checkpoint_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.save(checkpoint())
    with pytest.raises(ConfigError, match="shape"):
        store.load(PLAN, 4)
    with pytest.raises(ConfigError, match="another plan"):
        store.load(b"x" * 32, 3)
    metadata = {"format": "hanse-checkpoint-2", "plan": PLAN.hex(), "rounds_done": "1", "average_count": "0"}
    arrays = {"model": np.zeros(3), "average": np.zeros(3)}
    save_file(arrays, tmp_path / "checkpoint.safetensors", metadata)
    with pytest.raises(ConfigError, match="version"):
        store.load(PLAN, 3)
