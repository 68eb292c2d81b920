"""Plans that wait for their owner's word, with the policy's `approval: manual`.

    approvals = Approvals(state / "plans")
    if approvals.standing(signed) is not Standing.APPROVED: ...     # the plan waits, or was refused
    approvals.decide("3f9a", Standing.APPROVED)                     # hanse-client approve 3f9a

Each plan is a file, named by its digest and its standing. Nothing is charged before the owner says yes, and a later no
holds from the next block on.
"""

from enum import StrEnum
from pathlib import Path

from hanse_common import wire
from hanse_common.errors import ConfigError, WireError
from hanse_common.files import read_bounded, write_atomically
from hanse_common.plan import SignedPlan

MAX_WAITING = 20
"""Plans kept waiting; the oldest makes room, as an operator may sign any number."""


class Standing(StrEnum):
    """What the owner said of a plan."""

    WAITING = "waiting"
    APPROVED = "approved"
    REFUSED = "refused"


class Approvals:
    """The plans in the folder `folder`, made when missing."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def standing(self, digest: bytes, signed: SignedPlan) -> Standing:
        """Return what the owner said of the plan of this digest; one that was never seen waits from now on.

        Raises `ConfigError` when the folder can't be used.
        """
        name = digest.hex()
        for standing in Standing:
            if self._path(name, standing).exists():
                return standing
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            waiting = sorted(self._folder.glob(f"*.{Standing.WAITING}"), key=_age)
            for oldest in waiting[: max(0, len(waiting) - MAX_WAITING + 1)]:
                oldest.unlink(missing_ok=True)
            write_atomically(self._path(name, Standing.WAITING), wire.encode(signed))
        except OSError as error:
            raise ConfigError(f"{self._folder}: cannot be written ({error.strerror}).") from None
        return Standing.WAITING

    def list(self) -> dict[str, Standing]:
        """Return the standing of each plan by its digest, 64 hexadecimal digits, the newest last."""
        found = [path for standing in Standing for path in self._folder.glob(f"*.{standing}")]
        found.sort(key=_age)
        return {path.stem: Standing(path.suffix[1:]) for path in found}

    def decide(self, prefix: str, standing: Standing) -> str:
        """Give the plan whose digest begins with `prefix` this standing, and return its digest.

        Raises `ConfigError` unless there is exactly one such plan.
        """
        name, before = self._find(prefix)
        try:
            self._path(name, before).replace(self._path(name, standing))
        except OSError as error:
            raise ConfigError(f"{self._folder}: cannot be written ({error.strerror}); try again.") from None
        return name

    def plan(self, prefix: str) -> SignedPlan:
        """Return the plan whose digest begins with `prefix`. Raises `ConfigError`, `WireError`."""
        name, standing = self._find(prefix)
        path = self._path(name, standing)
        data = read_bounded(path, wire.MAX_DOCUMENT_BYTES, "a plan", ConfigError)
        try:
            return wire.decode(SignedPlan, data)
        except WireError as error:
            raise WireError(f"{path}: not a plan file. {error}") from None

    def _find(self, prefix: str) -> tuple[str, Standing]:
        found = [pair for pair in self.list().items() if pair[0].startswith(prefix.lower())]
        if len(found) != 1:
            raise ConfigError(
                f"{prefix}: found {len(found)} plans whose name begins so, expected one; hanse-client plans lists them."
            )
        return found[0]

    def _path(self, name: str, standing: Standing) -> Path:
        return self._folder / f"{name}.{standing}"


def _age(path: Path) -> float:
    """Return when the file was written; its owner may decide on it, and so rename it, at any moment."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
