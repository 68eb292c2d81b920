"""How far a process grows, and a process of its own to ask that of.

growth = Growth()
...
growth.peak_bytes()

figures = measured_apart("hanse_simulations.benchmarks.flower_aggregation", 10, 1_000_000)
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from hanse_common.errors import RoundFailed

MEGABYTE = 1e6


def peak_bytes() -> int:
    """Return the most that this process's memory ever was, in bytes.

    Not by getrusage(2), whose figure begins with the peak of whoever started the process.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


class Growth:
    """The growth of this process's resident memory from now on. Its peak must not lie behind it."""

    def __init__(self) -> None:
        self._before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    def peak_bytes(self) -> int:
        """Return by how many bytes the peak is over what it was at first."""
        return max(0, peak_bytes() - self._before)


def measured_apart(module: str, *arguments: int) -> Any:
    """Run `module` with `arguments` in a fresh process and return the JSON that it prints.

    Raises `RoundFailed` when it fails.
    """
    words = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(words, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise RoundFailed(f"{module}: ended with code {done.returncode}, expected 0; its message is above.")
    return json.loads(done.stdout)
