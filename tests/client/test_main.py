"""Where the command begins: what happens before its modules are loaded."""

import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

STOPPED_AT = """
import importlib.abc, os, signal, sys

class Person(importlib.abc.MetaPathFinder):
    "Presses Ctrl-C when a module is about to be loaded."

    def find_spec(self, name, path, target=None):
        if name == "hanse_client.cli.catalog":
            os.kill(os.getpid(), signal.SIGINT)
        return None

sys.meta_path.insert(0, Person())
sys.argv = ["hanse-client", "--help"]
from hanse_client.__main__ import main
main()
"""


def test_the_installed_command_begins_here(root: Path) -> None:
    scripts = tomllib.loads((root / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts["hanse-client"] == "hanse_client.__main__:main"


def test_ctrl_c_while_modules_are_loaded_ends_in_a_word() -> None:
    done = subprocess.run([sys.executable, "-c", STOPPED_AT], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped\n")


@pytest.mark.parametrize("before", [signal.SIG_IGN, signal.default_int_handler])
def test_after_loading_ctrl_c_is_as_it_was(monkeypatch: pytest.MonkeyPatch, before: signal.Handlers) -> None:
    from hanse_client import __main__, cli

    during: list[object] = []
    monkeypatch.setattr(cli, "main", lambda: during.append(signal.getsignal(signal.SIGINT)))
    old = signal.signal(signal.SIGINT, before)
    try:
        __main__.main()
    finally:
        signal.signal(signal.SIGINT, old)
    assert during == [before]
