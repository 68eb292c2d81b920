"""The merchant's daemon: what it answers to an assignment, what its owner hears, and how it keeps a node."""

import queue
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from PIL import Image

from hanse_client import daemon as daemon_module
from hanse_client.charges import Charge
from hanse_client.config import ClientConfig
from hanse_client.daemon import MAX_WAITING, Daemon, NodeKeeper
from hanse_client.ledger import Ledger
from hanse_client.node_protocol import CONNECTED, NodeExit
from hanse_common import signing, wire
from hanse_common.credentials import create_node_key
from hanse_common.errors import ConfigError
from hanse_common.plan import Cohort, Plan, SignedPlan
from hanse_common.session import Assignment, BlockReport, ReportCode
from hanse_common.vision.recipe import Projection, Scattering
from hanse_common.wire import MAX_DOCUMENT_BYTES
from hanse_server.development_keys import DevelopmentKeys
from hanse_server.stream import StreamServer

WAIT = 30.0
OPERATOR = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
LEAGUE = Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))
BLOCK = b"b" * 16
HASTY = Cohort(min_merchants=3, max_merchants=5, join_deadline=0.2, upload_deadline=0.2, upload_slot=0)

Until = Callable[[str, Callable[[], Any]], Any]
MakePlan = Callable[..., Plan]


@pytest.fixture
def settings(tmp_path: Path, keys: DevelopmentKeys) -> dict[str, Any]:
    """What a shop with nine photos and its keys has in its file."""
    for number in range(9):
        path = tmp_path / "photos" / ("shirt", "shoe", "bag")[number % 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((9, 9), 20 * number, dtype=np.uint8)).save(path)
    (tmp_path / "state").mkdir()
    signing.create_key(tmp_path / "state" / "identity.key")
    create_node_key(tmp_path / "state" / "node.key")
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
    return {
        "photos": tmp_path / "photos",
        "state": tmp_path / "state",
        "device": "cpu",
        "league": {
            "operator_key": signing.public_bytes(OPERATOR).hex(),
            "league_key": signing.public_bytes(LEAGUE).hex(),
            "taxonomy": {"classes": ("shirt", "shoe", "bag")},
        },
        "policy": {"league": "test", "epsilon": 6.0, "delta": 2e-5},
        "connection": {"server": f"localhost:{port}", "authority": keys.authority},
    }


@pytest.fixture
def config(settings: dict[str, Any]) -> ClientConfig:
    return ClientConfig.model_validate(settings)


@pytest.fixture
def told() -> list[str]:
    """What the owner hears."""
    return []


@pytest.fixture
def daemon(config: ClientConfig, told: list[str]) -> Daemon:
    return Daemon(config, told.append)


def assign(plan: Plan, key: Ed25519PrivateKey = OPERATOR, port: int = 1) -> bytes:
    return wire.encode(
        Assignment(
            block=BLOCK,
            signed_plan=SignedPlan.sign(plan, key),
            rounds=1,
            aggregator=f"localhost:{port}",
        )
    )


# -- what it answers ----------------------------------------------------------------------------------------------


def other_plan(plan: Plan) -> bytes:
    """An assignment whose plan's bytes were changed after they were signed."""
    signed = SignedPlan.sign(plan, OPERATOR)
    changed = signed.model_copy(update={"plan": wire.encode(plan.model_copy(update={"serial": b"x" * 16}))})
    return wire.encode(Assignment(block=BLOCK, signed_plan=changed, rounds=1, aggregator="localhost:1"))


def no_plan(plan: Plan) -> bytes:
    """An assignment in which the operator signed what is no plan."""
    data = b"no plan"
    signed = SignedPlan(plan=data, signature=signing.sign(OPERATOR, SignedPlan.DOMAIN, data))
    return wire.encode(Assignment(block=BLOCK, signed_plan=signed, rounds=1, aggregator="localhost:1"))


UNREADABLE: dict[str, bytes] = {
    "nothing": b"",
    "garbage": b"garbage",
    "what a node says": CONNECTED,
    "another message": wire.encode(BlockReport(block=BLOCK, code=ReportCode.DONE)),
    "too large": bytes(MAX_DOCUMENT_BYTES + 1),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_is_no_assignment(daemon: Daemon, told: list[str], case: str) -> None:
    report = daemon._serve(UNREADABLE[case])
    assert (report.block, report.code) == (bytes(16), ReportCode.MALFORMED)
    assert len(told) == 1
    assert told[0].startswith("The server sent what is no assignment")


def test_a_server_cannot_write_escape_codes_into_the_owners_terminal(
    daemon: Daemon, told: list[str], make_plan: MakePlan
) -> None:
    assignment = wire.decode(Assignment, assign(make_plan()))
    fields = assignment.model_dump() | {"\x1b[2J" + "x" * 10_000: 1}
    data = msgpack.packb([wire.WIRE_VERSION, Assignment.kind, fields], use_bin_type=True)
    assert daemon._serve(data).code == ReportCode.MALFORMED
    (line,) = told
    assert line.isprintable()
    assert len(line) < 5000


REFUSED: dict[str, tuple[ReportCode, Callable[[Plan], bytes]]] = {
    "another operator": (ReportCode.SIGNATURE, lambda plan: assign(plan, Ed25519PrivateKey.generate())),
    "changed after signing": (ReportCode.SIGNATURE, other_plan),
    "signed, and no plan": (ReportCode.MALFORMED, no_plan),
    "another league": (
        ReportCode.POLICY,
        lambda plan: assign(plan.model_copy(update={"league": "other"})),
    ),
    "too dear": (ReportCode.POLICY, lambda plan: assign(dear(plan, 0.4))),
}


def dear(plan: Plan, noise: float) -> Plan:
    return plan.model_copy(update={"training": plan.training.model_copy(update={"noise_multiplier": noise})})


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_is_a_code_and_comes_before_any_photo(
    daemon: Daemon, config: ClientConfig, told: list[str], make_plan: MakePlan, case: str
) -> None:
    code, make = REFUSED[case]
    report = daemon._serve(make(make_plan(cohort=HASTY)))
    assert (report.block, report.code) == (BLOCK, code)
    assert len(told) == 1
    assert told[0].startswith(f"Not taking part now ({code}): ")
    assert not (config.state / "embeddings.sqlite").exists()
    assert not (config.state / "holdout.key").exists()


def spend(config: ClientConfig, plan: Plan) -> None:
    ledger = Ledger(config.ledger_path, config.policy.budget)
    ledger.charge(Charge.of(plan, 0, 0, plan.training.local_steps))


def test_a_plan_that_the_budget_has_no_room_for(
    settings: dict[str, Any], told: list[str], make_plan: MakePlan
) -> None:
    plan = make_plan(cohort=HASTY)
    settings["policy"]["epsilon"] = 1.5 * plan.epsilon()
    config = ClientConfig.model_validate(settings)
    spend(config, plan.model_copy(update={"serial": b"x" * 16}))
    assert Daemon(config, told.append)._serve(assign(plan)).code is ReportCode.BUDGET
    assert told[-1].startswith("Not taking part now (budget): ")
    assert not (config.state / "embeddings.sqlite").exists()
    assert Ledger(config.ledger_path, config.policy.budget).counter == 1


def test_a_plan_that_was_paid_for_goes_on_with_a_full_ledger(
    settings: dict[str, Any], told: list[str], make_plan: MakePlan
) -> None:
    plan = make_plan(cohort=HASTY)
    settings["policy"]["epsilon"] = 1.01 * plan.epsilon()
    config = ClientConfig.model_validate(settings)
    spend(config, plan)
    daemon = Daemon(config, told.append)
    assert daemon._serve(assign(plan)).code is ReportCode.LOST  # nobody is at that address
    other = plan.model_copy(update={"serial": b"x" * 16})
    assert daemon._serve(assign(other)).code is ReportCode.BUDGET


def break_ledger(config: ClientConfig) -> None:
    config.ledger_path.write_bytes(b"no ledger" * 1000)


def break_photos(config: ClientConfig) -> None:
    config.photos.rename(config.photos.with_name("elsewhere"))


def break_holdout_key(config: ClientConfig) -> None:
    (config.state / "holdout.key").write_bytes(b"short")


def break_embeddings(config: ClientConfig) -> None:
    (config.state / "embeddings.sqlite").mkdir()


@pytest.mark.parametrize("harm", [break_ledger, break_photos, break_holdout_key, break_embeddings])
def test_what_is_wrong_in_the_shop_is_told_to_the_owner_and_to_nobody_else(
    daemon: Daemon,
    config: ClientConfig,
    told: list[str],
    make_plan: MakePlan,
    harm: Callable[[ClientConfig], None],
) -> None:
    harm(config)
    report = daemon._serve(assign(make_plan(cohort=HASTY)))
    assert report.code is ReportCode.UNAVAILABLE
    assert set(report.model_dump()) == {"block", "code", "nonce"}
    assert told[-1].startswith("Not taking part now (unavailable): ")
    assert len(told[-1]) > len("Not taking part now (unavailable): ")


def test_photos_are_looked_through_once_for_each_recipe(
    daemon: Daemon, told: list[str], make_plan: MakePlan
) -> None:
    plan = make_plan(cohort=HASTY)
    for serial in (1, 2, 3):
        daemon._serve(assign(plan.model_copy(update={"serial": bytes([serial]) * 16})))
    assert sum("Looking through your photos" in line for line in told) == 1
    backbone = Scattering(scales=1, angles=3, groups=None, projection=Projection(dimensions=6))
    recipe = plan.recipe.model_copy(update={"backbone": backbone})
    daemon._serve(assign(plan.model_copy(update={"recipe": recipe})))
    assert sum("Looking through your photos" in line for line in told) == 2
    assert len(daemon._participants) == 1, "one recipe's examples are in memory"


def test_a_block_is_served_under_the_shops_identity_until_the_server_ends_it(
    daemon: Daemon, config: ClientConfig, told: list[str], keys: DevelopmentKeys, make_plan: MakePlan
) -> None:
    identity = signing.public_bytes(signing.load_key(config.identity_path))
    certificate, key = keys.certificate.read_bytes(), keys.key.read_bytes()
    reports: queue.SimpleQueue[BlockReport] = queue.SimpleQueue()
    with StreamServer("127.0.0.1", 0, certificate, key, {identity: "alder"}) as server:
        server.open_block(BLOCK, 1 << 20)
        data = assign(make_plan(), port=server.port)
        threading.Thread(target=lambda: reports.put(daemon._serve(data)), daemon=True).start()
        assert server.wait(WAIT, lambda names: names == {"alder"})
        ((name, reply),) = server.exchange("test", {"alder": b"no request"}, WAIT)
        assert name == "alder"
        assert b"malformed" in reply  # a participant is behind it
        server.close_block()
        report = reports.get(timeout=WAIT)
    assert (report.block, report.code) == (BLOCK, ReportCode.DONE)
    assert not [line for line in told if line.startswith(("Not taking part", "Out of"))]


# -- what it needs to begin ---------------------------------------------------------------------------------------


def test_without_a_connection_there_is_no_daemon(settings: dict[str, Any], told: list[str]) -> None:
    del settings["connection"]
    with pytest.raises(ConfigError, match="connection: missing"):
        Daemon(ClientConfig.model_validate(settings), told.append)


@pytest.mark.parametrize("name", ["identity.key", "node.key"])
def test_without_keys_there_is_no_daemon(config: ClientConfig, told: list[str], name: str) -> None:
    (config.state / name).unlink()
    with pytest.raises(ConfigError, match=rf"{name}: no such key; make your keys with hanse-client keygen"):
        Daemon(config, told.append)
    (config.state / name).write_text("no key")
    with pytest.raises(ConfigError, match=rf"{name}: found no"):
        Daemon(config, told.append)


@pytest.mark.parametrize("content", [None, b"no certificate"])
def test_without_an_authority_there_is_no_daemon(
    settings: dict[str, Any], told: list[str], tmp_path: Path, content: bytes | None
) -> None:
    settings["connection"]["authority"] = tmp_path / "ca.crt"
    if content is not None:
        (tmp_path / "ca.crt").write_bytes(content)
    with pytest.raises(ConfigError, match=r"authority|certificate"):
        Daemon(ClientConfig.model_validate(settings), told.append)


# -- its node, here a stand-in that does what a test wants --------------------------------------------------------

STAND_IN = """#!{python} -S
import os, pathlib, signal, struct, sys, time
folder = pathlib.Path({folder!r})
number = len(list(folder.glob("run-*")))
(folder / f"run-{{number}}").write_text(str(os.getpid()))
descriptor = int(sys.argv[-1])

def say(data):
    data = struct.pack("!i", len(data)) + data
    while data:
        data = data[os.write(descriptor, data):]

def hear():
    (size,) = struct.unpack("!i", os.read(descriptor, 4))
    return os.read(descriptor, size)

{script}
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Return a function that lets a script be the node; it returns the folder in which each run leaves its pid."""
    monkeypatch.setattr(daemon_module, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(daemon_module, "LONGEST_PAUSE", 0.1)

    def write(script: str) -> Path:
        folder = tmp_path / "runs"
        folder.mkdir()
        program = tmp_path / "stand-in"
        program.write_text(STAND_IN.format(python=sys.executable, folder=str(folder), script=script))
        program.chmod(0o700)
        monkeypatch.setattr(daemon_module.sys, "executable", str(program))
        return folder

    return write


@pytest.fixture
def keeper(config: ClientConfig, told: list[str]) -> Iterator[NodeKeeper]:
    made = NodeKeeper(config, told.append)
    yield made
    made.stop()


def outages(told: list[str]) -> list[str]:
    return [line for line in told if line.startswith("No connection")]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (NodeExit.UNREACHABLE, "it does not answer"),
        (NodeExit.UNTRUSTED, "its certificate is not of the authority under connection.authority"),
        (NodeExit.UNKNOWN_KEY, "it no longer knows this node's key"),
        (NodeExit.REFUSED, "until the operator has your node.key.pub"),
        (NodeExit.LOST, "the connection was lost"),
        (0, "the node ended with code 0; see"),
        (77, "the node ended with code 77; see"),
    ],
)
def test_an_outage_is_told_once_however_long_it_lasts(
    keeper: NodeKeeper,
    stand_in: Callable[[str], Path],
    told: list[str],
    wait_until: Until,
    code: int,
    words: str,
) -> None:
    runs = stand_in(f"sys.exit({int(code)})")
    keeper.start()
    wait_until("some attempts", lambda: len(list(runs.iterdir())) > 4)
    assert len(outages(told)) == 1
    assert words in outages(told)[0]
    assert len(told) == 2, told


def test_an_outage_after_a_connection_is_told_again(
    keeper: NodeKeeper, stand_in: Callable[[str], Path], told: list[str], wait_until: Until
) -> None:
    stand_in(f"if number == 2: say({CONNECTED!r})\nsys.exit({int(NodeExit.LOST)})")
    keeper.start()
    wait_until("a second outage", lambda: len(outages(told)) == 2)
    assert told[1:4] == [outages(told)[0], "Connected. Waiting for the league.", outages(told)[1]]


def test_a_node_that_cannot_be_started_is_tried_again(
    keeper: NodeKeeper, stand_in: Callable[[str], Path], told: list[str], wait_until: Until
) -> None:
    stand_in(f"say({CONNECTED!r})\ntime.sleep(60)")
    program = Path(sys.executable)
    program.chmod(0o600)
    keeper.start()
    wait_until("an outage", lambda: outages(told))
    assert "the node could not be started (Permission denied)" in outages(told)[0]
    program.chmod(stat.S_IRWXU)
    wait_until("a node", lambda: "Connected. Waiting for the league." in told)


def test_assignments_that_wait_are_bounded(
    keeper: NodeKeeper, stand_in: Callable[[str], Path], wait_until: Until
) -> None:
    runs = stand_in(
        f"say({CONNECTED!r})\n"
        "for number in range(20): say(b'assignment %d' % number)\n"
        "(folder / 'said').touch(); time.sleep(60)"
    )
    keeper.start()
    wait_until("all to be said", (runs / "said").exists)
    time.sleep(0.3)
    heard = []
    while not keeper.assignments.empty():
        heard.append(keeper.assignments.get()[1])
    assert heard == [b"assignment %d" % number for number in range(MAX_WAITING)]


def test_a_node_that_says_too_much_is_ended(
    keeper: NodeKeeper, stand_in: Callable[[str], Path], wait_until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemon_module, "END_SECONDS", 0.2)
    runs = stand_in(
        f"say({CONNECTED!r})\ntry: say(bytes({MAX_DOCUMENT_BYTES + 1}))\nexcept OSError: pass\ntime.sleep(60)"
    )
    keeper.start()
    wait_until("another node", lambda: len(list(runs.iterdir())) > 1)
    assert not lives(int((runs / "run-0").read_text()))
    assert keeper.assignments.empty()


def test_nothing_that_a_server_sends_reads_as_connected(
    keeper: NodeKeeper, stand_in: Callable[[str], Path], told: list[str]
) -> None:
    stand_in(f"for _ in range(3): say({CONNECTED!r})\ntime.sleep(60)")
    keeper.start()
    for _ in range(2):
        assert keeper.assignments.get(timeout=WAIT)[1] == CONNECTED
    assert told.count("Connected. Waiting for the league.") == 1


def test_a_report_goes_to_the_node_that_asked_and_to_no_later_one(
    keeper: NodeKeeper, stand_in: Callable[[str], Path], told: list[str], wait_until: Until
) -> None:
    """A later node would take it for the report on its own block, and be one behind ever after."""
    runs = stand_in(
        f"say({CONNECTED!r})\nsay(b'block %d' % number)\nif number == 0: sys.exit(1)\n"
        "(folder / 'heard').write_bytes(hear()); time.sleep(60)"
    )
    keeper.start()
    first, assignment = keeper.assignments.get(timeout=WAIT)
    assert assignment == b"block 0"
    second, assignment = keeper.assignments.get(timeout=WAIT)
    assert assignment == b"block 1"
    keeper.report(first, b"report 0")
    keeper.report(second, b"report 1")
    wait_until("a report", lambda: (runs / "heard").exists() and (runs / "heard").read_bytes())
    assert (runs / "heard").read_bytes() == b"report 1"


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    "script", ["time.sleep(60)", "signal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(60)"]
)
def test_stop_leaves_no_node(
    config: ClientConfig,
    told: list[str],
    stand_in: Callable[[str], Path],
    wait_until: Until,
    monkeypatch: pytest.MonkeyPatch,
    script: str,
) -> None:
    monkeypatch.setattr(daemon_module, "END_SECONDS", 0.5)
    runs = stand_in(f"say({CONNECTED!r})\n{script}")
    keeper = NodeKeeper(config, told.append)
    keeper.start()
    wait_until("the connection", lambda: "Connected. Waiting for the league." in told)
    keeper.stop()
    (pid,) = (int(path.read_text()) for path in runs.iterdir())
    assert not lives(pid)
    assert outages(told) == []


# -- the whole of it ----------------------------------------------------------------------------------------------


def test_assignments_are_answered_in_order_and_the_node_hears_each_report(
    config: ClientConfig,
    told: list[str],
    stand_in: Callable[[str], Path],
    make_plan: MakePlan,
    wait_until: Until,
) -> None:
    refused = assign(make_plan(), Ed25519PrivateKey.generate())
    runs = stand_in(
        f"say({CONNECTED!r})\nsay(b'garbage')\nsay({refused!r})\n"
        "(folder / 'one').write_bytes(hear()); (folder / 'two').write_bytes(hear())\n"
        "(folder / 'done').touch(); time.sleep(60)"
    )
    stop = threading.Event()
    with Daemon(config, told.append) as daemon:
        running = threading.Thread(target=daemon.run, args=(stop,))
        running.start()
        wait_until("both reports", (runs / "done").exists)
        stop.set()
        running.join(WAIT)
        assert not running.is_alive()
    one, two = (wire.decode(BlockReport, (runs / name).read_bytes()) for name in ("one", "two"))
    assert (one.block, one.code) == (bytes(16), ReportCode.MALFORMED)
    assert (two.block, two.code) == (BLOCK, ReportCode.SIGNATURE)


def test_one_daemon_for_a_state_folder(
    config: ClientConfig, told: list[str], stand_in: Callable[[str], Path], wait_until: Until
) -> None:
    runs = stand_in("time.sleep(60)")
    with Daemon(config, told.append):
        wait_until("a node", lambda: list(runs.iterdir()))
        with pytest.raises(ConfigError, match="another hanse-client runs on this state folder"):
            Daemon(config, told.append).__enter__()
        time.sleep(0.3)
        assert len(list(runs.iterdir())) == 1, "the second one started no node"
        lock = config.state / "daemon.lock"
        assert stat.S_IMODE(lock.stat().st_mode) == 0o600
        (pid,) = (int(path.read_text()) for path in runs.iterdir())
        assert str(lock) not in {str(fd.readlink()) for fd in Path(f"/proc/{pid}/fd").iterdir()}
    with Daemon(config, told.append):
        pass
