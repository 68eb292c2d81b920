"""The demo's league as it will run: one `hanse-server`, a `hanse-client` for each shop, TLS between them.

    figures = train(experiment, configs, test, folder, started)

Each is a process of its own with its own folder, keys and log. The demo only looks at what an operator would see:
the server's lines and its checkpoint, from which it takes each round's accuracy on public photos.
"""

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from subprocess import Popen
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from hanse_client.config import ClientConfig
from hanse_client.examples import Examples
from hanse_client.ledger import Ledger
from hanse_common import signing, wire
from hanse_common.charter import CharterFile, founded
from hanse_common.config import load
from hanse_common.credentials import create_node_key
from hanse_common.errors import RoundFailed, StorageError
from hanse_common.files import PUBLIC, write_atomically
from hanse_common.plan import Plan, SignedPlan
from hanse_common.vision.recognizer import WHITENING_FILE, Recognizer
from hanse_server.averaging import TailAverage
from hanse_server.config import make_plan
from hanse_server.development_keys import make_keys, sign_directory
from hanse_server.evaluation import Evaluator
from hanse_server.storage import State
from hanse_simulations import results
from hanse_simulations.console import bar, console
from hanse_simulations.experiment import Experiment
from hanse_simulations.processes import Processes, command, free_ports

POLL_SECONDS = 0.1
MAX_LINE_BYTES = 1 << 16

ONE_THREAD = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
"""For processes that share this machine: torch's threads would only wait for those of the others."""


def make_server(experiment: Experiment, folder: Path, shops: Mapping[str, Path], serial: bytes) -> SignedPlan:
    """Write the operator's folder, anew: keys, signed plan, `hanse-server.yaml`; return the plan.

    `shops` are the shops' folders. Each makes its own keys and pins the operator's; both are part of what
    `hanse-server.yaml` and the shops' own files say of each other.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    key = signing.create_key(folder / "operator.key")
    keys = folder / "keys"
    make_keys(keys, hosts=("localhost", "127.0.0.1"), merchants=())
    plan = make_plan(experiment.plan, serial)
    signed = SignedPlan.sign(plan, key)
    write_atomically(folder / "plan.hanse", wire.encode(signed))
    states = {name: shop / "state" for name, shop in shops.items()}
    for state in states.values():
        _make_keys(state)
    # Not the operator's: in a real league somebody else holds this key, elsewhere.
    league = folder.with_name("league")
    shutil.rmtree(league, ignore_errors=True)
    league.mkdir()
    league_key = signing.create_key(league / "league.key")
    charter = founded(experiment.plan.league, league_key)
    pinned = charter.read().digest.hex()
    write_atomically(league / "charter.hanse", wire.encode(CharterFile(charters=(charter,))), PUBLIC)
    directory = sign_directory(charter, states, league_key, datetime.now(UTC))
    write_atomically(folder / "directory.hanse", wire.encode(directory), PUBLIC)
    admin, fleet, streams, page = free_ports(4)
    text = yaml.safe_dump(
        {
            "signing_key": "operator.key",
            "plan": experiment.plan.model_dump(mode="json"),
            "optimization": experiment.optimization.model_dump(mode="json"),
            "service": {
                "plan": "plan.hanse",
                "directory": "directory.hanse",
                "charter": pinned,
                "state": "state",
                "whitening": f"../result/{WHITENING_FILE}",
                "tls": {
                    "authority": "keys/ca.crt",
                    "certificate": "keys/server.crt",
                    "key": "keys/server.key",
                },
                "admin": {"port": admin, "token": "keys/admin.token"},
                "fleet": {"host": "127.0.0.1", "port": fleet},
                "aggregator": {
                    "host": "127.0.0.1",
                    "port": streams,
                    "address": f"localhost:{streams}",
                },
                "blocks": {"rounds": 20, "patience": 600, "gather": 60},
                "page": {"port": page},
            },
        },
        sort_keys=False,
        allow_unicode=True,
    )
    (folder / "hanse-server.yaml").write_text(text, encoding="utf-8")
    for shop in shops.values():
        believed = {"operator_key": signing.public_bytes(key).hex(), "charter": pinned}
        _connect(shop / "hanse-client.yaml", f"localhost:{fleet}", believed)
    return signed


def _make_keys(state: Path) -> None:
    """Make a shop's keys, anew, as `hanse-client init` does."""
    state.mkdir(mode=0o700, exist_ok=True)
    for path in (*state.glob("identity.key*"), *state.glob("node.key*")):
        path.unlink()
    signing.create_key(state / "identity.key")
    create_node_key(state / "node.key")


def _connect(path: Path, server: str, pinned: dict[str, str]) -> None:
    """Add to a shop's configuration how to reach the server, and whose plans and directory to believe."""
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    settings["league"] |= pinned
    settings["connection"] = {"server": server, "authority": "../../server/keys/ca.crt"}
    path.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")


def train(
    experiment: Experiment,
    signed_plan: SignedPlan,
    configs: Mapping[str, Path],
    test: Examples,
    folder: Path,
    started: float,
) -> dict[str, Any]:
    """Start server and daemons, show the rounds, end them all, write `folder`/result, and return the figures.

    Raises `RoundFailed` when the server ends without a recognizer.
    """
    server, result = folder / "server", folder / "result"
    plan = wire.decode(Plan, signed_plan.plan)
    evaluator = Evaluator(plan.recipe, plan.taxonomy, test.inputs, test.labels)
    curve = results.Curve(result / results.METRICS_FILE)
    log = server / "server.log"
    with Processes() as processes:
        arguments = [command("hanse-server"), "run", "--json", "--config", str(server / "hanse-server.yaml")]
        running = processes.start("server", arguments, log, ONE_THREAD)
        daemons: list[Popen[bytes]] = []
        needed = experiment.plan.cohort.min_merchants

        def alive() -> int:
            return sum(daemon.poll() is None for daemon in daemons)

        for name, config in configs.items():
            arguments = [command("hanse-client"), "run", "--config", str(config)]
            daemons.append(processes.start(name, arguments, config.parent / "daemon.log", ONE_THREAD))
        console.print(
            f"{1 + len(configs)} processes started; the server's lines are in {log}.", soft_wrap=True
        )
        with bar("rounds", plan.training.rounds, tenths=True) as shown:
            for event in _events(log, lambda: running.poll() is not None or alive() < needed):
                if event["kind"] == "merchants":
                    shown.update(0, text=event["text"])
                if event["kind"] != "round":
                    continue
                model = _published(server / "state", experiment, plan)
                if model is not None and event["round"] not in curve.rounds:
                    curve.add(event["round"], len(event["uploaded"]), evaluator.accuracy(model))
                text = f"{len(event['uploaded'])} merchants, accuracy {100 * curve.accuracies[-1]:.1f} %"
                shown.update(event["round"], text=text)
        if running.poll() is None:
            raise RoundFailed(
                f"{len(daemons) - alive()} of {len(daemons)} shops' daemons ended by themselves, and the league needs "
                f"{needed}; what they said last is in their folders, in daemon.log."
            )
        code = running.wait()
    if code != 0:
        raise RoundFailed(f"The server ended with exit code {code}; its last lines are in {log}.")
    model = Recognizer.load(server / "state" / "recognizer").vector
    ledgers = {name: _ledger(config) for name, config in configs.items()}
    report = evaluator.report(model)
    seconds = time.perf_counter() - started
    return results.write(experiment, plan, ledgers, model, report, curve, seconds, result)


def _events(log: Path, ended: Any) -> Iterator[dict[str, Any]]:
    """Yield the server's JSON lines as they come, until the server has `ended`."""
    with log.open("rb") as file:
        rest = b""
        while True:
            over = ended()  # before the last look: what was written until then is still read
            for line in (rest + file.read()).splitlines(keepends=True):
                rest = b"" if line.endswith(b"\n") else line[:MAX_LINE_BYTES]
                if line.startswith(b"{") and line.endswith(b"\n"):
                    yield json.loads(line)
            if over:
                return
            time.sleep(POLL_SECONDS)


def _published(state: Path, experiment: Experiment, plan: Plan) -> NDArray[np.float32] | None:
    """Return what would be published now, shape (d,), from the server's checkpoint."""
    try:
        with State.open(state) as kept:
            checkpoint = kept.checkpoint(plan.digest)
    except StorageError:
        return None  # the server replaced it at this very moment
    if checkpoint is None:
        return None
    average = TailAverage(plan.training.rounds, experiment.optimization.tail_average, plan.dimension)
    average.total, average.count = checkpoint.average_total, checkpoint.average_count
    return average.value(checkpoint.model).astype(np.float32)


def _ledger(path: Path) -> Ledger:
    config = load(ClientConfig, path)
    return Ledger(config.ledger_path, config.policy.budget)
