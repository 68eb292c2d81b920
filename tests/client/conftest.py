"""What tests of the daemon share: a shop with photos and keys, and a stand-in for its node."""

import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from PIL import Image

from hanse_client import node_keeper
from hanse_client.config import ClientConfig
from hanse_client.keys import make_keys
from hanse_client.watching import Watcher
from hanse_common import signing
from hanse_common.charter import founded
from hanse_server.development_keys import DevelopmentKeys

OPERATOR = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
LEAGUE = Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))

STAND_IN = """#!{python} -S
import os, pathlib, signal, struct, sys, time
folder = pathlib.Path({folder!r})
descriptor = int(sys.argv[-1])

def say(data):
    data = struct.pack("!i", len(data)) + data
    while data:
        data = data[os.write(descriptor, data):]

def hear():
    (size,) = struct.unpack("!i", os.read(descriptor, 4))
    return os.read(descriptor, size)

key = hear()
number = len(list(folder.glob("run-*")))
(folder / f"run-{{number}}").write_text(str(os.getpid()))
{script}
"""


@pytest.fixture(autouse=True)
def quick_watcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a watcher that is not told otherwise tell of a change, and end, within a tenth of a second."""
    for name in ("quiet_seconds", "check_seconds"):
        monkeypatch.setitem(Watcher.__init__.__kwdefaults__, name, 0.1)


@pytest.fixture
def settings(tmp_path: Path, keys: DevelopmentKeys) -> dict[str, Any]:
    """What a shop with nine photos and its keys has in its file."""
    for number in range(9):
        path = tmp_path / "photos" / ("shirt", "shoe", "bag")[number % 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((9, 9), 20 * number, dtype=np.uint8)).save(path)
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
    found = {
        "photos": tmp_path / "photos",
        "state": tmp_path / "state",
        "device": "cpu",
        "holdout_fraction": 0.0,
        "league": {
            "operator_key": signing.public_bytes(OPERATOR).hex(),
            "charter": founded("test", LEAGUE).read().digest.hex(),
            "taxonomy": {"classes": ("shirt", "shoe", "bag")},
        },
        "policy": {"league": "test", "epsilon": 6.0, "delta": 2e-5},
        "resources": {"niceness": 0},
        "connection": {"server": f"localhost:{port}", "authority": keys.authority},
    }
    make_keys(ClientConfig.model_validate(found))
    return found


@pytest.fixture
def config(settings: dict[str, Any]) -> ClientConfig:
    return ClientConfig.model_validate(settings)


@pytest.fixture
def told() -> list[str]:
    """What the owner hears."""
    return []


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Return a function that lets a script be the node; it returns the folder in which each run leaves its pid."""
    monkeypatch.setattr(node_keeper, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(node_keeper, "LONGEST_PAUSE", 0.1)

    def write(script: str) -> Path:
        folder = tmp_path / "runs"
        folder.mkdir()
        program = tmp_path / "stand-in"
        program.write_text(STAND_IN.format(python=sys.executable, folder=str(folder), script=script))
        program.chmod(0o700)
        monkeypatch.setattr(node_keeper.sys, "executable", str(program))
        return folder

    return write
