"""The merchant's daemon: what it answers to an assignment, what its owner hears, and how it keeps a node."""

import queue
import stat
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import msgpack
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hanse_client import daemon as daemon_module
from hanse_client.approvals import Approvals, Standing
from hanse_client.charges import Charge
from hanse_client.config import ClientConfig
from hanse_client.control import Control, State
from hanse_client.daemon import Daemon
from hanse_client.journal import Journal
from hanse_client.ledger import Ledger
from hanse_client.node_protocol import CONNECTED, NodeExit
from hanse_client.schedule import DAYS
from hanse_common import signing, wire
from hanse_common.errors import ConfigError, RunStopped
from hanse_common.plan import Cohort, Plan, SignedPlan
from hanse_common.session import Assignment, BlockReport, ReportCode
from hanse_common.vision.recipe_features import Projection, Scattering
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
def daemon(config: ClientConfig, told: list[str]) -> Iterator[Daemon]:
    """A daemon without a node, whose photos are kept ready."""
    made = Daemon(config, told.append)
    with made._preparation:
        yield made


def served(daemon: Daemon, data: bytes) -> BlockReport:
    """Ask as a server does, again and again while the answer is "later"."""
    given_up = time.monotonic() + WAIT
    while (report := daemon._serve(data)).code is ReportCode.LATER and time.monotonic() < given_up:
        time.sleep(0.02)
    return report


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
    with daemon._preparation:
        assert served(daemon, assign(plan)).code is ReportCode.LOST  # nobody is at that address
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
    report = served(daemon, assign(make_plan(cohort=HASTY)))
    assert report.code is ReportCode.UNAVAILABLE
    assert set(report.model_dump()) == {"block", "code", "epsilon", "nonce"}
    assert report.epsilon is None
    assert told[-1].startswith("Not taking part now (unavailable): ")
    assert len(told[-1]) > len("Not taking part now (unavailable): ")


def test_photos_are_looked_through_once_for_each_recipe(
    daemon: Daemon, told: list[str], make_plan: MakePlan
) -> None:
    plan = make_plan(cohort=HASTY)
    for serial in (1, 2, 3):
        served(daemon, assign(plan.model_copy(update={"serial": bytes([serial]) * 16})))
    assert sum("Looking through your photos" in line for line in told) == 1
    backbone = Scattering(scales=1, angles=3, groups=None, projection=Projection(dimensions=6))
    recipe = plan.recipe.model_copy(update={"backbone": backbone})
    served(daemon, assign(plan.model_copy(update={"recipe": recipe})))
    assert sum("Looking through your photos" in line for line in told) == 2


def test_a_block_is_served_under_the_shops_identity_until_the_server_ends_it(
    daemon: Daemon, config: ClientConfig, told: list[str], keys: DevelopmentKeys, make_plan: MakePlan
) -> None:
    identity = signing.public_bytes(signing.load_key(config.identity_path))
    certificate, key = keys.certificate.read_bytes(), keys.key.read_bytes()
    reports: queue.SimpleQueue[BlockReport] = queue.SimpleQueue()
    with StreamServer("127.0.0.1", 0, certificate, key, lambda: {identity: "alder"}) as server:
        server.open_block(BLOCK, 1 << 20)
        data = assign(make_plan(), port=server.port)
        threading.Thread(target=lambda: reports.put(served(daemon, data)), daemon=True).start()
        assert server.wait(WAIT, lambda names: names == {"alder"})
        ((name, reply),) = server.exchange("test", {"alder": b"no request"}, WAIT)
        assert name == "alder"
        assert b"malformed" in bytes(reply)  # a participant is behind it
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
    with pytest.raises(ConfigError, match=rf"{name}: no such key; make your keys with hanse-client init"):
        Daemon(config, told.append)
    (config.state / name).write_text("no key")
    (config.state / name).chmod(0o600)
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
    stop = threading.Event()
    with Daemon(config, told.append) as daemon:
        running = threading.Thread(target=daemon.run, args=(stop,))
        running.start()
        wait_until("a node", lambda: list(runs.iterdir()))
        with pytest.raises(ConfigError, match="another hanse-client runs on this state folder"):
            Daemon(config, told.append).__enter__()
        time.sleep(0.3)
        assert len(list(runs.iterdir())) == 1, "the second one started no node"
        lock = config.state / "daemon.lock"
        assert stat.S_IMODE(lock.stat().st_mode) == 0o600
        (pid,) = (int(path.read_text()) for path in runs.iterdir())
        assert str(lock) not in {str(fd.readlink()) for fd in Path(f"/proc/{pid}/fd").iterdir()}
        stop.set()
        running.join(WAIT)
    with Daemon(config, told.append):
        pass


# -- what its owner lets it do ------------------------------------------------------------------------------------


def test_a_plan_waits_for_its_owners_word(
    settings: dict[str, Any], told: list[str], make_plan: MakePlan
) -> None:
    settings["policy"]["approval"] = "manual"
    config = ClientConfig.model_validate(settings)
    daemon, plan = Daemon(config, told.append), make_plan(cohort=HASTY)
    for _ in range(3):
        assert daemon._serve(assign(plan)).code is ReportCode.LATER
    assert [line for line in told if "waits for your word" in line] == told
    assert len(told) == 1, "the owner is asked once"
    assert not (config.state / "holdout.key").exists(), "no photo was read"
    approvals = Approvals(config.plans_path)
    approvals.decide(plan.digest.hex(), Standing.APPROVED)
    with daemon._preparation:
        assert served(daemon, assign(plan)).code is ReportCode.LOST  # it goes, and nobody is there
    approvals.decide(plan.digest.hex(), Standing.REFUSED)
    assert daemon._serve(assign(plan)).code is ReportCode.POLICY
    assert "you refused this plan" in told[-1]


def test_a_refusal_holds_also_where_plans_need_no_word(
    daemon: Daemon, config: ClientConfig, make_plan: MakePlan
) -> None:
    plan = make_plan(cohort=HASTY)
    approvals = Approvals(config.plans_path)
    approvals.standing(plan.digest, SignedPlan.sign(plan, OPERATOR))
    approvals.decide(plan.digest.hex(), Standing.REFUSED)
    assert daemon._serve(assign(plan)).code is ReportCode.POLICY


def test_what_may_be_reported_is_the_policys_to_say(
    settings: dict[str, Any], told: list[str], make_plan: MakePlan
) -> None:
    plan = make_plan(cohort=HASTY)
    for report, expected in (((), None), (("epsilon",), 0.0)):
        settings["policy"]["report"] = report
        found = Daemon(ClientConfig.model_validate(settings), told.append)._serve(assign(plan, LEAGUE))
        assert found.code is ReportCode.SIGNATURE and found.epsilon == expected
    config = ClientConfig.model_validate(settings)
    spend(config, plan)
    found = Daemon(config, told.append)._serve(assign(plan, LEAGUE))
    assert found.epsilon == pytest.approx(plan.epsilon())


def test_traffic_that_is_used_up(settings: dict[str, Any], told: list[str], make_plan: MakePlan) -> None:
    settings["network"] = {"monthly_megabytes": 1}
    daemon = Daemon(ClientConfig.model_validate(settings), told.append)
    assert daemon._serve(assign(make_plan(cohort=HASTY))).code is ReportCode.POLICY
    assert "network.monthly_megabytes" in told[-1]


def running(daemon: Daemon, stop: threading.Event) -> threading.Thread:
    thread = threading.Thread(target=daemon.run, args=(stop,), daemon=True)
    thread.start()
    return thread


def test_a_pause_ends_the_connection_and_resume_brings_it_back(
    config: ClientConfig, told: list[str], stand_in: Callable[[str], Path], wait_until: Until
) -> None:
    runs = stand_in(f"say({CONNECTED!r})\ntime.sleep(60)")
    control, stop = Control(config.state), threading.Event()

    def state() -> State | None:
        found = control.status()
        return found.state if found else None

    with Daemon(config, told.append) as daemon:
        thread = running(daemon, stop)
        wait_until("the connection", lambda: state() is State.WAITING)
        control.pause(None)
        wait_until("the pause", lambda: state() is State.PAUSED)
        pids = [int(path.read_text()) for path in runs.iterdir()]
        wait_until("the node to end", lambda: not any(map(lives, pids)))
        control.resume()
        wait_until("the connection", lambda: state() is State.WAITING)
        assert len(list(runs.iterdir())) == 2
        stop.set()
        thread.join(WAIT)
    assert state() is State.STOPPED
    assert [event.kind for event in Journal(config.state).recent(100)][::100] == ["started"]


def test_outside_its_hours_it_keeps_no_connection(
    settings: dict[str, Any], told: list[str], stand_in: Callable[[str], Path], wait_until: Until
) -> None:
    today = DAYS[datetime.now().weekday()]
    tomorrow = DAYS[(datetime.now().weekday() + 1) % 7]
    settings["schedule"] = {"days": tuple(day for day in DAYS if day not in (today, tomorrow))}
    config = ClientConfig.model_validate(settings)
    runs = stand_in(f"say({CONNECTED!r})\ntime.sleep(60)")
    stop = threading.Event()
    with Daemon(config, told.append) as daemon:
        thread = running(daemon, stop)
        wait_until(
            "it to be closed", lambda: (s := Control(config.state).status()) and s.state is State.CLOSED
        )
        stop.set()
        thread.join(WAIT)
    assert not list(runs.iterdir())


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class _Paid:
    """Stands in for a participant: what matters is whether a round is paid for."""

    def __init__(self, owes: bool) -> None:
        self.owes = owes


def test_a_round_that_was_paid_for_is_finished_but_not_waited_for_without_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted, participant, now = threading.Event(), _Paid(True), [100.0]
    monkeypatch.setattr(daemon_module.time, "monotonic", lambda: now[0])
    farewell = daemon_module._Farewell(wanted.is_set, participant)  # type: ignore[arg-type]
    assert not farewell.is_set()
    wanted.set()
    assert not farewell.is_set(), "the sum is still to be opened"
    now[0] += daemon_module.FAREWELL_SECONDS - 1
    assert not farewell.is_set()
    now[0] += 2
    assert farewell.is_set()
    idle = daemon_module._Farewell(lambda: True, _Paid(False))  # type: ignore[arg-type]
    assert idle.is_set()


def test_a_listener_that_went_away_ends_no_thread(config: ClientConfig) -> None:
    """`hanse-client run | tee`, and tee is gone: rich then raises `SystemExit`."""

    def gone(text: str) -> None:
        raise SystemExit(1)

    daemon = Daemon(config, gone)
    daemon._note("round", "Round 1.")
    assert Journal(config.state).recent(1)[0].text == "Round 1."


def test_a_slot_that_is_far_is_not_waited_for_at_the_end(config: ClientConfig, told: list[str]) -> None:
    daemon = Daemon(config, told.append)
    daemon._stop.set()
    with pytest.raises(RunStopped):
        daemon._wait(daemon_module.FAREWELL_SECONDS + 1)
    daemon._wait(0.01)


def test_the_status_says_why_there_is_no_connection(
    config: ClientConfig, told: list[str], stand_in: Callable[[str], Path], wait_until: Until
) -> None:
    stand_in(f"sys.exit({int(NodeExit.UNTRUSTED)})")
    stop = threading.Event()
    with Daemon(config, told.append) as daemon:
        thread = running(daemon, stop)

        def says() -> bool:
            found = Control(config.state).status()
            return found is not None and "its certificate is not" in found.note

        wait_until("the reason", says)
        stop.set()
        thread.join(WAIT)
