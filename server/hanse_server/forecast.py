"""A forecast of a plan's accuracy, from the researcher's command `hanse-sim forecast`, run as a process of its own.

    found = forecast(["--config", "hanse-server.yaml", "--quick"], print)
    found.accuracies, found.round_seconds

The server knows nothing of simulations and works where they are not installed; then there is no forecast, and why.
"""

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pydantic import Field, ValidationError

from hanse_common.config import Section
from hanse_common.errors import ConfigError
from hanse_common.files import read_bounded

MAX_FIGURES_BYTES = 1 << 20
MAX_REASON_CHARACTERS = 500


class Forecast(Section):
    """What `hanse-sim forecast --json` writes.

    Each of `accuracies` is of one seed, on `test_photos` of the public set `proxy`. Merchants have `photos` each, and
    `photos_used` in the simulation. On this machine a merchant computes `round_seconds` in a round and `photo_seconds`
    to embed one photo, where the backbone's weights are here. `notes` say what is different from the league.
    """

    proxy: str
    notes: tuple[str, ...]
    merchants: int
    photos: int
    photos_used: int
    test_photos: int
    round_seconds: float = Field(ge=0)
    photo_seconds: float | None = Field(ge=0)
    accuracies: tuple[float, ...]


def forecast(options: Sequence[str], tell: Callable[[str], None]) -> tuple[Forecast | None, str]:
    """Run `hanse-sim forecast` with `options`; return what there is of its figures, and why not all of them.

    `tell` hears its lines as they come. The reason is empty when all is there.
    """
    with tempfile.TemporaryDirectory() as folder:
        path, errors = Path(folder) / "forecast.json", Path(folder) / "errors"
        command = [sys.executable, "-m", "hanse_simulations", "forecast", *options, "--json", str(path)]
        with errors.open("wb") as file, _running(command, file.fileno()) as process:
            for line in process.stdout or ():
                tell(line.strip())
        reason = (
            "" if process.returncode == 0 else _reason(errors.read_text(encoding="utf-8", errors="replace"))
        )
        if not path.exists():
            return None, reason or "hanse-sim forecast wrote no figures."
        data = read_bounded(path, MAX_FIGURES_BYTES, "a forecast's figures", ConfigError)
        try:
            return Forecast.model_validate_json(data), reason
        except ValidationError as error:
            return (
                None,
                f"hanse-sim forecast wrote other figures than expected ({error.error_count()} faults).",
            )


@contextmanager
def _running(command: Sequence[str], errors: int) -> "Iterator[subprocess.Popen[str]]":
    """Yield a process that ends with the block, also when that is interrupted."""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, text=True, encoding="utf-8"
    )
    try:
        yield process
        process.wait()
    finally:
        process.terminate()
        process.wait()


def _reason(said: str) -> str:
    """Return the errors that the command printed, or the last line of what else went wrong, in one line."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line.removeprefix("error:").strip() for line in lines if line.startswith("error:")]
    if not errors and any("No module named" in line for line in lines):
        errors = [f"{lines[-1]}; install what simulations need: pip install 'hanse[simulations]'"]
    return " ".join(errors or lines[-1:] or ["hanse-sim ended without a word."])[:MAX_REASON_CHARACTERS]
