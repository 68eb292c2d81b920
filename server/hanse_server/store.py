"""The server's own checkpoint: after each round, one file that says everything needed to go on.

    folder/
      plan.hanse               the signed plan
      checkpoint.safetensors   model, optimizer state, average; round and plan digest in the metadata
      attempt.json             the attempt begun last, written before a merchant hears of it

Files are replaced whole (temporary file, fsync, rename), so a crash leaves the old one or the new one.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from hanse_common import wire
from hanse_common.errors import ConfigError, WireError
from hanse_common.files import read_bounded, write_atomically
from hanse_common.plan import SignedPlan
from hanse_common.wire import RoundNumber, Value

FORMAT = "hanse-checkpoint-1"
MAX_ATTEMPT_BYTES = 4096
_OPTIMIZER = "optimizer."


@dataclass(frozen=True)
class Checkpoint:
    """The state after `rounds_done` rounds. Arrays have shape (d,), float64, unless the optimizer says other."""

    plan_digest: bytes
    rounds_done: int
    model: NDArray[np.float64]
    optimizer: dict[str, NDArray[np.float64]]
    average_total: NDArray[np.float64]
    average_count: int


class _Attempt(Value):
    attempt: RoundNumber


class Store:
    """Checkpoints of one training in the folder `folder`, which is made when missing."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._plan = folder / "plan.hanse"
        self._checkpoint = folder / "checkpoint.safetensors"
        self._attempt = folder / "attempt.json"

    def save_plan(self, signed_plan: SignedPlan) -> None:
        """Keep the plan of this training. Raises `ConfigError` when the folder holds another one."""
        kept = self.load_plan()
        if kept is None:
            write_atomically(self._plan, wire.encode(signed_plan))
        elif kept != signed_plan:
            raise ConfigError(f"{self._plan}: found another plan; name another folder or move it away.")

    def load_plan(self) -> SignedPlan | None:
        """Return the plan kept here, or None. Raises `ConfigError` when the file is damaged."""
        if not self._plan.exists():
            return None
        data = read_bounded(self._plan, wire.MAX_DOCUMENT_BYTES, "a plan", ConfigError)
        try:
            return wire.decode(SignedPlan, data)
        except WireError as error:
            raise ConfigError(f"{self._plan}: {error} Restore it from a backup.") from None

    def save(self, checkpoint: Checkpoint) -> None:
        """Replace the checkpoint."""
        arrays = {_OPTIMIZER + name: array for name, array in checkpoint.optimizer.items()}
        arrays["model"] = checkpoint.model
        arrays["average"] = checkpoint.average_total
        metadata = {
            "format": FORMAT,
            "plan": checkpoint.plan_digest.hex(),
            "rounds_done": str(checkpoint.rounds_done),
            "average_count": str(checkpoint.average_count),
        }
        contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        write_atomically(self._checkpoint, save(contiguous, metadata))

    def load(self, plan_digest: bytes, dimension: int) -> Checkpoint | None:
        """Return the checkpoint, or None when there is none yet.

        Raises `ConfigError` when it is damaged or belongs to another plan.
        """
        if not self._checkpoint.exists():
            return None
        try:
            with safe_open(self._checkpoint, framework="numpy") as file:
                metadata = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            found = Checkpoint(
                plan_digest=bytes.fromhex(metadata["plan"]),
                rounds_done=int(metadata["rounds_done"]),
                model=arrays.pop("model"),
                average_total=arrays.pop("average"),
                average_count=int(metadata["average_count"]),
                optimizer={name.removeprefix(_OPTIMIZER): array for name, array in arrays.items()},
            )
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise ConfigError(
                f"{self._checkpoint}: the checkpoint is damaged ({error}); restore it from a backup, or "
                "begin another training, in another folder, with a newly signed plan."
            ) from None
        if metadata.get("format") != FORMAT or found.plan_digest != plan_digest:
            raise ConfigError(
                f"{self._checkpoint}: found a checkpoint of another plan or version; name another folder."
            )
        if found.model.shape != (dimension,):
            raise ConfigError(
                f"{self._checkpoint}: found a model of shape {found.model.shape}, expected ({dimension},)."
            )
        return found

    def begun(self) -> bool:
        """Return whether any merchant may have heard of a round."""
        return self._attempt.exists()

    def next_attempt(self) -> int:
        """Return a number that was never used in this training, recorded before it is returned. They only grow."""
        attempt = 0
        if self._attempt.exists():
            data = read_bounded(self._attempt, MAX_ATTEMPT_BYTES, "the number of an attempt", ConfigError)
            try:
                attempt = _Attempt.model_validate_json(data).attempt + 1
            except ValidationError:
                raise ConfigError(
                    f"{self._attempt}: found no number of an attempt, expected one; restore it from a backup."
                ) from None
        write_atomically(self._attempt, _Attempt(attempt=attempt).model_dump_json().encode())
        return attempt
