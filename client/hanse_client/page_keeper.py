"""Keeps the owner's page running in a child process, while entered.

    with PageKeeper(source, config, note): ...

The page reads what the daemon writes and leaves word for it (`control`, `approvals`), so neither waits for the other.
"""

import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

from hanse_client.children import end
from hanse_client.config import ClientConfig
from hanse_common.errors import ConfigError

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
STEADY_SECONDS = 60.0
END_SECONDS = 5.0

_JITTER = secrets.SystemRandom()


class PageKeeper:
    """The page of the shop whose configuration is `config`, in the file `source`.

    `note` hears where the page is, and once of each trouble.
    """

    def __init__(self, source: Path, config: ClientConfig, note: Callable[[str, str], None]) -> None:
        if config.page is None:
            raise ConfigError("page: missing; expected a section with a port.")
        self._words = [sys.executable, "-m", "hanse_client.page", str(source)]
        self._port = config.page.port
        self._log = config.state / "page.log"
        self._note = note
        self._ending = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._keep, name="page", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ending.set()
        end(self._process, END_SECONDS)
        self._thread.join(END_SECONDS)

    def _keep(self) -> None:
        pause, told = FIRST_PAUSE, False
        self._note("page", f"Your page: http://127.0.0.1:{self._port} (hanse-client page opens it).")
        while not self._ending.is_set():
            started = time.monotonic()
            try:
                with self._log.open("wb") as output:
                    self._process = subprocess.Popen(
                        self._words,
                        stdin=subprocess.PIPE,  # its end tells the page that the daemon is gone
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        env=os.environ | {"PYTHONUNBUFFERED": "1"},
                        start_new_session=True,
                    )
                if self._ending.is_set():
                    self._process.kill()
                code = self._process.wait()
            except OSError as error:
                code = error.errno or 1
            if self._ending.is_set():
                return
            if time.monotonic() - started > STEADY_SECONDS:
                pause, told = FIRST_PAUSE, False
            if not told:
                self._note("problem", f"Your page ended (code {code}); see {self._log}. Starting it again.")
                told = True
            self._ending.wait(pause * _JITTER.uniform(0.7, 1.3))
            pause = min(2 * pause, LONGEST_PAUSE)
