"""A league of real processes on this machine: one server, some merchants' daemons, nobody left behind.

    with Processes() as processes:
        server = processes.start("server", [command("hanse-server"), "run", …], folder / "server.log")
        …

Leaving the block ends every process: SIGTERM to all, a bounded wait, SIGKILL to those that are left. Each runs
in a session of its own, so that a terminal's Ctrl-C reaches only the process that started them, which ends them
in order.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

GRACE_SECONDS = 15.0
"""How long a process may take to end by itself."""


def command(name: str) -> str:
    """Return the path of the installed command `name`, beside this Python."""
    return str(Path(sys.executable).with_name(name))


def free_ports(count: int) -> tuple[int, ...]:
    """Return `count` different TCP ports of loopback that nobody listens on now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return tuple(one.getsockname()[1] for one in sockets)
    finally:
        for one in sockets:
            one.close()


class Processes:
    """Processes that end with the block."""

    def __init__(self) -> None:
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._before: Any = None

    def __enter__(self) -> Self:
        """From here on SIGTERM ends this process as Ctrl-C does, so that the others are ended, too."""
        if _is_main_thread():
            self._before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def start(
        self, name: str, arguments: list[str], log: Path, environment: dict[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start `arguments` as the process `name`; what it prints goes to the file `log`, at its end."""
        with log.open("ab") as file:
            process = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | (environment or {}),
            )
        self._running[name] = process
        return process

    def stop(self, *names: str) -> None:
        """End the processes `names`, or all."""
        ending = {name: self._running.pop(name) for name in names or tuple(self._running)}
        # A second Ctrl-C or SIGTERM while this waits must not leave processes behind.
        before = (
            {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
            if _is_main_thread()
            else {}
        )
        try:
            for process in ending.values():
                with suppress(ProcessLookupError):
                    process.terminate()
            given_up = time.monotonic() + GRACE_SECONDS
            for process in ending.values():
                with suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, given_up - time.monotonic()))
                # Its own children, too: a session is a process group.
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
