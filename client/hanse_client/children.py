"""How the daemon ends its child processes."""

import subprocess
from contextlib import suppress


def end(process: "subprocess.Popen[bytes] | None", seconds: float) -> None:
    """End the process, in order if it does so within `seconds`, and wait until it is gone."""
    if process is None:
        return
    with suppress(ProcessLookupError):
        process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    process.kill()
    process.wait()
