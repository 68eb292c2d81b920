"""A server that is not ours pushes a bundle with hostile code: an unmodified SuperLink, the stock `flwr run`.

Its ServerApp runs there, as a hostile operator's would, and sends our daemon whatever it likes; its ClientApp
would leave a mark wherever it is imported or called. A stock SuperNode shows that the bundle works.
"""

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from hanse_common import signing
from hanse_common.credentials import create_node_key
from hanse_server.development_keys import DevelopmentKeys, make_keys
from hanse_simulations.processes import Processes, command, free_ports

WAIT = 90.0
STOCK = {"PATH": f"{Path(command('flwr')).parent}:{os.environ['PATH']}", "PYTHONUNBUFFERED": "1"}

SERVER_APP = """
import time
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()

def tell(*words):
    with open(ANSWERS, "a") as file:
        print(*words, file=file, flush=True)

@app.main()
def main(grid, context):
    while not (nodes := list(grid.get_node_ids())):
        time.sleep(0.2)
    record = lambda value: RecordDict({"hanse": ConfigRecord({"message": value})})
    attacks = [
        ("train", RecordDict()),
        ("train", record(b"garbage")),
        ("train", record("text")),
        ("train", RecordDict({"a": ConfigRecord({"x": 1}), "b": ConfigRecord({"y": 2})})),
        ("evaluate", record(b"garbage")),
        ("query", record(b"garbage")),
        ("train.special", record(b"garbage")),
        ("train", RecordDict({f"r{i}": ConfigRecord({"x": i}) for i in range(50)})),
    ]
    for kind, content in attacks:
        messages = [Message(content, node, kind) for node in nodes]
        for reply in grid.send_and_receive(messages, timeout=40):
            if reply.has_error():
                tell(kind, "error")
            else:
                data = reply.content["hanse"]["message"]
                tell(kind, sorted(reply.content), data.hex())
    tell("ALL SENT")
"""

CLIENT_APP = """
import os, pathlib
pathlib.Path(os.environ.get("MARK_FOLDER", MARKS), f"import-{os.getpid()}").touch()
from flwr.clientapp import ClientApp

app = ClientApp()

@app.train()
def train(message, context):
    pathlib.Path(MARKS, f"call-{os.getpid()}").touch()
    raise RuntimeError("called")
"""

BUNDLE = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "hostile"
version = "1.0.0"
license = "Apache-2.0"
dependencies = ["flwr>=1.41"]
[tool.flwr.app]
publisher = "mallory"
fab-include = ["hostile/*.py"]
[tool.flwr.app.components]
serverapp = "hostile.server_app:app"
clientapp = "hostile.client_app:app"
[tool.flwr.app.config]
"""


class Hostile:
    """The hostile operator: a stock SuperLink with a bundle to push."""

    def __init__(self, folder: Path, processes: Processes) -> None:
        self.folder = folder
        self.processes = processes
        self.marks = folder / "marks"
        self.marks.mkdir()
        self.answers = folder / "answers.txt"
        self.answers.touch()
        self.keys: DevelopmentKeys = make_keys(folder / "keys", ("localhost", "127.0.0.1"), ())
        (self.port,) = free_ports(1)
        self.log = folder / "superlink.log"
        words = ["--ssl-certfile", str(self.keys.certificate), "--ssl-keyfile", str(self.keys.key)]
        words += [
            "--ssl-ca-certfile",
            str(self.keys.authority),
            "--port",
            str(self.port),
            "--host",
            "127.0.0.1",
        ]
        self.home = folder / "operator"
        self.home.mkdir()
        processes.start(
            "superlink",
            [command("flower-superlink"), *words, "--enable-supernode-auth"],
            self.log,
            STOCK | {"FLWR_HOME": str(self.home)},
        )
        (self.home / "config.toml").write_text(
            f'[superlink]\ndefault = "x"\n[superlink.x]\naddress = "127.0.0.1:{self.port}"\n'
            f'root-certificates = "{self.keys.authority}"\n'
        )
        app = folder / "app" / "hostile"
        app.mkdir(parents=True)
        (folder / "app" / "pyproject.toml").write_text(BUNDLE)
        (app / "__init__.py").touch()
        (app / "server_app.py").write_text(SERVER_APP.replace("ANSWERS", repr(str(self.answers))))
        (app / "client_app.py").write_text(CLIENT_APP.replace("MARKS", repr(str(self.marks))))

    def flwr(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [command("flwr"), *words],
            env=os.environ | {"FLWR_HOME": str(self.home)},
            capture_output=True,
            text=True,
            timeout=WAIT,
            check=False,
        )

    def said(self) -> str:
        return self.log.read_text(errors="replace")


@pytest.fixture
def hostile(tmp_path: Path) -> Iterator[Hostile]:
    with Processes() as processes:
        yield Hostile(tmp_path, processes)


def until(what: str, true: Callable[[], Any], said: Callable[[], str]) -> None:
    given_up = time.monotonic() + WAIT
    while not true():
        if time.monotonic() > given_up:
            pytest.fail(f"waited in vain for: {what}\n{said()[-6000:]}")
        time.sleep(0.1)


def tree(pid: int) -> dict[int, str]:
    """Return the processes below `pid`, itself included, with their command lines."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found, border = {pid}, {pid}
    while border := {child for child, parent in parents.items() if parent in border}:
        found |= border
    lines = {}
    for one in found:
        try:
            lines[one] = Path(f"/proc/{one}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
    return lines


def write_shop(folder: Path, hostile: Hostile) -> Path:
    (folder / "photos" / "shoe").mkdir(parents=True)
    (folder / "state").mkdir()
    signing.create_key(folder / "state" / "identity.key")
    create_node_key(folder / "state" / "node.key")
    config = folder / "hanse-client.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "photos": "photos",
                "state": "state",
                "league": {
                    "operator_key": "0" * 64,
                    "charter": "1" * 64,
                    "taxonomy": {"classes": ["shoe", "bag"]},
                },
                "policy": {"league": "test", "epsilon": 1.0},
                "connection": {
                    "server": f"localhost:{hostile.port}",
                    "authority": str(hostile.keys.authority),
                },
            }
        )
    )
    return config


@pytest.mark.slow
def test_nothing_of_a_pushed_bundle_is_fetched_or_executed(hostile: Hostile, tmp_path: Path) -> None:
    shop = tmp_path / "shop"
    config = write_shop(shop, hostile)
    until(
        "the SuperLink",
        lambda: hostile.flwr("supernode", "register", str(shop / "state" / "node.key.pub")).returncode == 0,
        hostile.said,
    )
    home = tmp_path / "merchant-home"
    home.mkdir()
    log = shop / "daemon.log"
    daemon = hostile.processes.start(
        "daemon",
        [command("hanse-client"), "run", "--config", str(config)],
        log,
        {"HOME": str(home), "FLWR_HOME": str(home / "flwr"), "TMPDIR": str(home)},
    )
    until("the daemon to connect", lambda: "Connected." in log.read_text(), log.read_text)
    files = set(shop.rglob("*"))
    pushed = hostile.flwr("run", str(tmp_path / "app"))
    assert pushed.returncode == 0, pushed.stdout + pushed.stderr
    seen: dict[int, str] = {}

    def all_sent() -> bool:
        seen.update(tree(daemon.pid))
        return "ALL SENT" in hostile.answers.read_text()

    until("all attacks", all_sent, hostile.said)
    answers = hostile.answers.read_text().splitlines()[:-1]
    assert len(answers) == 8, answers
    for answer in answers:
        kind, _, rest = answer.partition(" ")
        assert rest.startswith("['hanse'] "), answer  # one record, no error with a text
        report = bytes.fromhex(rest.partition(" ")[2])
        assert (b"malformed" in report) == (kind == "train"), answer
        assert (b"unknown" in report) == (kind != "train"), answer
    # Nothing was fetched: the server saw no request for it, and no file came into being.
    assert "/v1/fleet/get-fab" not in hostile.said()
    new = {path.name for path in shop.rglob("*")} - {path.name for path in files}
    assert new <= {"ledger.sqlite", "ledger.sqlite-wal", "ledger.sqlite-shm", "holdout.key"}
    assert not [path for path in home.rglob("*") if "hostile" in path.name or path.suffix in (".py", ".fab")]
    # Nothing was executed: no mark, and no process but the daemon and its node.
    assert not list(hostile.marks.iterdir())
    assert len(seen) == 2, seen
    assert all("hanse-client" in line or "hanse_client.flower_node" in line for line in seen.values()), seen


@pytest.mark.slow
def test_the_same_bundle_does_run_on_a_stock_supernode(hostile: Hostile, tmp_path: Path) -> None:
    """Without this the test above would pass for a bundle that does not work."""
    key = tmp_path / "node.key"
    create_node_key(key)
    until(
        "the SuperLink",
        lambda: hostile.flwr("supernode", "register", f"{key}.pub").returncode == 0,
        hostile.said,
    )
    (port,) = free_ports(1)
    hostile.processes.start(
        "supernode",
        [
            command("flower-supernode"),
            *("--superlink", f"127.0.0.1:{hostile.port}", "--root-certificates", str(hostile.keys.authority)),
            *("--auth-supernode-private-key", str(key), "--port", str(port)),
        ],
        tmp_path / "supernode.log",
        STOCK | {"FLWR_HOME": str(tmp_path / "stock")},
    )
    assert hostile.flwr("run", str(tmp_path / "app")).returncode == 0
    until("a mark", lambda: list(hostile.marks.iterdir()), hostile.said)
    assert "/v1/fleet/get-fab" in hostile.said()
