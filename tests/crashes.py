"""kill -9 between any two lines of some code, in a child of a program of its own.

    # in tests/client/test_ledger_crash.py, run as a program:
    while dies_at(point, action, ledger.__file__):
        point += 1

    # in a test of the same file:
    found = run(__file__, "lines", folder)         # what the program printed, JSON

Children are forked, so whoever forks is a program of its own: a small one, whose fork copies little.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).parent.parent


def dies_at(point: int, action: Callable[[], object], where: str, opcodes: bool = False) -> bool:
    """Run `action` in a child that is killed at the `point`-th line (or bytecode) of the files that begin with `where`.

    Returns whether there was such a point. Raises `RuntimeError` when the child failed by itself.
    """
    child = os.fork()
    if child == 0:
        left = point
        counted = "opcode" if opcodes else "line"

        def trace(frame: FrameType, event: str, arg: Any) -> Any:
            nonlocal left
            if not frame.f_code.co_filename.startswith(where):
                return None
            frame.f_trace_opcodes = opcodes
            if event == counted:
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
            return trace

        try:
            sys.settrace(trace)
            action()
            sys.settrace(None)
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return True
    if status != 0:
        raise RuntimeError(f"the child failed at point {point}")
    return False


def run(file: str, *arguments: object) -> Any:
    """Run the test `file` as a program; return what it printed."""
    module = ".".join(Path(file).relative_to(ROOT).with_suffix("").parts)
    command = [sys.executable, "-m", module, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)
