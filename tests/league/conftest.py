"""A small league of real processes: one server, four shops with real photos, over TLS on loopback."""

import asyncio
import json
import os
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self

import psutil
import pytest
import yaml

from hanse_client.config import ClientConfig
from hanse_client.ledger import Ledger
from hanse_common.config import load
from hanse_simulations import daemons, demo
from hanse_simulations.experiment import Experiment
from hanse_simulations.processes import Processes, command, free_ports

WAIT = 120.0

TRAINING = {
    "mode": "local",
    "update_bound": 16,
    "rounds": 6,
    "local_steps": 1,
    "sampling_rate": 0.5,
    "expected_batch": 30,
    "clipping_norm": 0.5,
    "learning_rate": 2,
}


class League:
    """The folders of a league, and its processes by name: "server" and the shops."""

    def __init__(
        self,
        folder: Path,
        data: Path,
        processes: Processes,
        attempts: int = 3,
        change: Callable[[dict[str, Any]], None] = lambda experiment: None,
        **training: Any,
    ) -> None:
        self.folder = folder
        self.processes = processes
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        experiment = folder / "experiment.yaml"
        settings: dict[str, Any] = {
            "name": "tiny",
            "data": {
                "dataset": "fashion-mnist",
                "folder": str(data),
                "merchants": 4,
                "photos_per_merchant": 60,
                "test_photos": 50,
            },
            "plan": {
                "league": "tiny",
                "taxonomy": {"classes": list(demo.datasets.CLASSES)},
                "recipe": {
                    "preprocessing": {"size": 8, "channels": 1},
                    "backbone": {"name": "scattering", "scales": 1, "angles": 2, "groups": None},
                },
                "training": TRAINING | training,
                "privacy": {"epsilon": 3, "delta": 1e-5},
                "cohort": {
                    "min_merchants": 3,
                    "max_merchants": 4,
                    "join_deadline": 8,
                    "upload_deadline": 8,
                    "upload_slot": 0.05,
                },
            },
            "optimization": {"attempts": attempts},
        }
        change(settings)
        experiment.write_text(yaml.safe_dump(settings))
        self.experiment = load(Experiment, experiment)
        self.shops = {
            name: config.parent
            for name, config in demo.write_shops(self.experiment, folder / "shops").items()
        }
        self.signed_plan = daemons.make_server(self.experiment, folder / "server", self.shops, os.urandom(16))
        self.edit_server(lambda service: service["blocks"].update(rounds=3, patience=60, gather=5))

    @property
    def server_config(self) -> Path:
        return self.folder / "server" / "hanse-server.yaml"

    @property
    def flwr_home(self) -> Path:
        return self.folder / "server" / "state" / "flwr"

    def edit_server(self, change: Callable[[dict[str, Any]], None]) -> None:
        settings = yaml.safe_load(self.server_config.read_text())
        change(settings["service"])
        self.server_config.write_text(yaml.safe_dump(settings))

    def edit_shop(self, name: str, change: Callable[[dict[str, Any]], None]) -> None:
        path = self.shops[name] / "hanse-client.yaml"
        settings = yaml.safe_load(path.read_text())
        change(settings)
        path.write_text(yaml.safe_dump(settings))

    def start_server(self, *arguments: str, verb: str = "run") -> subprocess.Popen[bytes]:
        words = [command("hanse-server"), verb, "--json", "--config", str(self.server_config), *arguments]
        return self._start("server", words)

    def start_shop(self, name: str, *program: str) -> subprocess.Popen[bytes]:
        """Start the shop's daemon; `program` stands for the command hanse-client."""
        program = program or (command("hanse-client"),)
        words = [*program, "run", "--config", str(self.shops[name] / "hanse-client.yaml")]
        return self._start(name, words)

    def start_shops(self) -> None:
        for name in self.shops:
            self.start_shop(name)

    def _start(self, name: str, words: list[str]) -> subprocess.Popen[bytes]:
        self.running[name] = self.processes.start(name, words, self.log(name), daemons.ONE_THREAD)
        return self.running[name]

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def text(self, name: str) -> str:
        path = self.log(name)
        return path.read_text(errors="replace") if path.exists() else ""

    def events(self, kind: str) -> list[dict[str, Any]]:
        lines = [line for line in self.text("server").splitlines() if line.startswith("{")]
        return [event for event in map(json.loads, lines) if event["kind"] == kind]

    def ledger(self, name: str) -> Ledger:
        config = load(ClientConfig, self.shops[name] / "hanse-client.yaml")
        return Ledger(config.ledger_path, config.policy.budget)

    def until(self, what: str, true: Callable[[], object], wait: float = WAIT) -> None:
        """Wait until `true()`, or fail with everything the processes said."""
        given_up = time.monotonic() + wait
        while not true():
            if time.monotonic() > given_up:
                said = "\n".join(f"--- {name}\n{self.text(name)[-3000:]}" for name in ("server", *self.shops))
                pytest.fail(f"waited in vain for: {what}\n{said}")
            time.sleep(0.02)

    def flwr(self, *arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run one of Flower's own commands as the operator would."""
        return subprocess.run(
            [command("flwr"), *arguments],
            env=os.environ | {"FLWR_HOME": str(self.flwr_home), "COLUMNS": "300"},
            cwd=folder or self.folder,
            capture_output=True,
            text=True,
            timeout=WAIT,
            check=False,
        )


class Network:
    """What lies between the shops and the server's two ports; it can be cut for some shops, and mended.

    Make it before anybody is started: the server then tells, and the shops know, its ports and not the server's own.
    """

    def __init__(self, league: League) -> None:
        self._league = league
        self._lines: set[tuple[str, asyncio.StreamWriter]] = set()
        self._refused: frozenset[str] = frozenset()
        self._flows = {name: asyncio.Event() for name in ("", *league.shops)}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="network", daemon=True)
        self._servers: list[asyncio.Server] = []
        self._carried: set[asyncio.Future[None]] = set()
        service = yaml.safe_load(league.server_config.read_text())["service"]
        fleet, streams = free_ports(2)
        self._ports = {fleet: service["fleet"]["port"], streams: service["aggregator"]["port"]}
        league.edit_server(lambda service: service["aggregator"].update(address=f"localhost:{streams}"))
        for name in league.shops:
            league.edit_shop(name, lambda shop: shop["connection"].update(server=f"localhost:{fleet}"))

    def __enter__(self) -> Self:
        self._thread.start()
        for port, target in self._ports.items():
            self._call(self._listen(port, target))
        self.mend()
        return self

    def __exit__(self, *exception: object) -> None:
        self._call(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def reset(self, *names: str) -> None:
        """Break off the connections of these shops, all by default, and refuse new ones."""
        self._call(self._cut(frozenset(names) or self._flows.keys(), refuse=True))

    def swallow(self, *names: str) -> None:
        """Let nothing through from or to these shops, all by default; they hear nothing of it, as of a pulled plug."""
        self._call(self._cut(frozenset(names) or self._flows.keys(), refuse=False))

    def mend(self) -> None:
        """Let everything through, also what was sent meanwhile: TCP would send it again."""
        self._call(self._mend())

    def _call(self, work: Any) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _listen(self, port: int, target: int) -> None:
        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            carried = asyncio.ensure_future(self._carry(target, reader, writer))
            self._carried.add(carried)
            carried.add_done_callback(self._carried.discard)

        self._servers.append(await asyncio.start_server(accept, "127.0.0.1", port))

    async def _cut(self, names: Iterable[str], *, refuse: bool) -> None:
        if not refuse:
            for name in names:
                self._flows[name].clear()
            return
        self._refused = frozenset(names)
        for name, writer in tuple(self._lines):
            if name in self._refused:
                _reset(writer)

    async def _mend(self) -> None:
        self._refused = frozenset()
        for flow in self._flows.values():
            flow.set()

    async def _end(self) -> None:
        for server in self._servers:
            server.close()
        for carried in self._carried:
            carried.cancel()
        await asyncio.gather(*self._carried, return_exceptions=True)

    async def _carry(self, target: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry one connection to the server's port `target`, to its end."""
        name = await asyncio.to_thread(self._owner, writer.get_extra_info("peername")[1])
        far_writer = None
        try:
            if name in self._refused:
                _reset(writer)
                return
            await self._flows[name].wait()
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", target)
            self._lines |= {(name, writer), (name, far_writer)}
            there = asyncio.ensure_future(self._pump(name, reader, far_writer))
            back = asyncio.ensure_future(self._pump(name, far_reader, writer))
            await asyncio.wait({there, back}, return_when=asyncio.FIRST_COMPLETED)
            for pump in (there, back):
                pump.cancel()
            await asyncio.gather(there, back, return_exceptions=True)
        except OSError:
            _reset(writer)  # the server is down
        finally:
            for one in (writer, far_writer):
                if one is not None:
                    self._lines.discard((name, one))
                    one.close()

    async def _pump(self, name: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(1 << 16):
                await self._flows[name].wait()
                writer.write(data)
                await writer.drain()
            await self._flows[name].wait()

    def _owner(self, port: int) -> str:
        """Return whose connection comes from `port`, "" for nobody's of this league."""
        for name in self._league.shops:
            daemon = self._league.running.get(name)
            for pid in [daemon.pid, *children(daemon.pid)] if daemon else []:
                with suppress(psutil.Error):
                    if any(one.laddr.port == port for one in psutil.Process(pid).net_connections("tcp")):
                        return name
        return ""


def _reset(writer: asyncio.StreamWriter) -> None:
    """End a connection so that its peer sees a reset."""
    connection = writer.get_extra_info("socket")
    with suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def children(pid: int) -> list[int]:
    """Return the processes that `pid` started and that live."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def make_league(tmp_path: Path, data_folder: Path) -> Iterator[Callable[..., League]]:
    with Processes() as processes:
        made: list[League] = []

        def make(**training: Any) -> League:
            made.append(League(tmp_path, data_folder, processes, **training))
            return made[-1]

        yield make
        for league in made:  # a process that a test stopped can't end in order
            for process in league.running.values():
                if process.poll() is None:
                    os.kill(process.pid, signal.SIGCONT)


@pytest.fixture
def make_network() -> Iterator[Callable[[League], Network]]:
    with ExitStack() as stack:
        yield lambda league: stack.enter_context(Network(league))


@pytest.fixture
def helpers() -> Any:
    """Functions for tests that look at processes."""

    class Helpers:
        children = staticmethod(children)
        lives = staticmethod(lives)

    return Helpers
