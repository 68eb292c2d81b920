"""The owner's page: who may see it, what it shows of good and damaged files, and a person at it in a real browser."""

import functools
import html
import re
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tests.browser import SCREENSHOTS, Person, Visitor

from hanse_client import page as pages
from hanse_client.approvals import Approvals, Standing
from hanse_client.charges import Charge
from hanse_client.config import ClientConfig
from hanse_client.control import Control, State, Status
from hanse_client.explanation import posterior_bound
from hanse_client.journal import Journal
from hanse_client.ledger import Ledger
from hanse_client.markers import Markers
from hanse_client.page import ENTRIES_A_PAGE, MAX_FORM_BYTES, build, told
from hanse_client.page_access import TOKEN_FILE, address, entrance, new_token, opener, read_token
from hanse_client.wizard import Wizard
from hanse_client.wizard import build as build_wizard
from hanse_common import signing, wire
from hanse_common.charter import founded
from hanse_common.directory import Directory, Entry
from hanse_common.errors import ConfigError
from hanse_common.fingerprint import words
from hanse_common.league_card import LeagueCard
from hanse_common.membership import SignedRequest
from hanse_common.modes import TrendsTraining
from hanse_common.plan import Plan, SignedPlan
from hanse_common.privacy.mechanism import Mechanism
from hanse_common.vision.taxonomy import Taxonomy
from hanse_common.web.languages import Languages
from hanse_common.web.security import HEADERS
from hanse_common.web.serving import listen, serving
from hanse_server.development_keys import DevelopmentKeys

WAIT = 30.0
PORT = 8765
OPERATOR = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
CHARTER = founded("test", Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))).read()
MARKUP = "<script>alert(1)</script><img src=x onerror=alert(2)>"
PAGES = ("/", "/status", "/plans", "/ledger", "/history", "/members", "/settings")
POSTS = ("/pause", "/resume", f"/plan/{'0' * 64}/approve", f"/plan/{'0' * 64}/refuse", "/language")

MakePlan = Callable[..., Plan]


_LANGUAGES = functools.cache(Languages)


@pytest.fixture(autouse=True)
def templates_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "Languages", _LANGUAGES)


@pytest.fixture
def config(settings: dict[str, Any]) -> ClientConfig:
    return ClientConfig.model_validate(settings | {"page": {"port": PORT}})


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "hanse-client.yaml"
    path.write_text(f"# My shop </pre>{MARKUP}\nphotos: photos\n", encoding="utf-8")
    return path


def stranger(config: ClientConfig, source: Path) -> Visitor:
    return Visitor(build(config, source, PORT), f"http://127.0.0.1:{PORT}", form="/settings")


@pytest.fixture
def visit(config: ClientConfig, source: Path) -> Visitor:
    """The owner, let in."""
    visitor = stranger(config, source)
    assert visitor.get(address(config)).status_code == 200
    return visitor


def status(**changes: Any) -> Status:
    now = datetime.now(UTC)
    fields: dict[str, Any] = {
        "version": "1",
        "pid": 1,
        "started": now,
        "updated": now,
        "state": State.WAITING,
        "since": now,
        "note": "note",
        "server": "league.example:9092",
    }
    return Status(**(fields | changes))


@contextmanager
def daemon(config: ClientConfig, **changes: Any) -> Iterator[None]:
    """What a running daemon leaves in its folder."""
    control = Control(config.state)
    with control.hold():
        control.publish(status(**changes))
        yield


def charge(round_: int, attempt: int = 0, plan: bytes = b"p" * 32) -> Charge:
    return Charge(plan, round_, attempt, Mechanism(0.5, 1000, 8.0, 0.1, steps=4, shares=2), 4000, 1e-5)


def fill(config: ClientConfig, rounds: int) -> Ledger:
    ledger = Ledger(config.ledger_path, config.policy.budget)
    for round_ in range(rounds):
        ledger.charge(charge(round_))
    return ledger


def wait(config: ClientConfig, plan: Plan, key: Ed25519PrivateKey = OPERATOR) -> str:
    """Have `plan` wait for its owner's word."""
    Approvals(config.plans_path).standing(plan.digest, SignedPlan.sign(plan, key))
    return plan.digest.hex()


def see_directory(config: ClientConfig, entity: str = "Alder Ltd") -> Directory:
    names = ("alder", "birch", "cedar")
    entries = tuple(
        Entry(
            name=name,
            entity=entity if number == 0 else f"{name} Ltd",
            identity=bytes([number]) * 32,
            expires=1 << 37,
        )
        for number, name in enumerate(names)
    )
    seen = Directory(league="test", charter=CHARTER.digest, version=7, expires=2_000_000_000, entries=entries)
    Markers(config.markers_path).see_directory(seen, (CHARTER,))
    return seen


# -- who may see it -----------------------------------------------------------------------------------------------


def test_the_token_is_for_the_owner_alone_and_stays(config: ClientConfig) -> None:
    first = address(config)
    assert re.fullmatch(rf"http://127\.0\.0\.1:{PORT}/\?token=[\w-]{{43}}", first)
    assert address(config) == first
    path = config.state / TOKEN_FILE
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert first.endswith(path.read_text())


@pytest.mark.parametrize("damage", [lambda path: path.chmod(0o644), lambda path: path.write_text("short")])
def test_a_token_that_others_may_know_lets_nobody_in_and_is_replaced(
    config: ClientConfig, visit: Visitor, damage: Callable[[Path], Any]
) -> None:
    before = address(config)
    damage(config.state / TOKEN_FILE)
    assert read_token(config.state) is None
    assert visit.get("/").status_code == 403
    assert visit.get(before).status_code == 403
    after = address(config)
    assert after != before
    assert visit.get("/").status_code == 403  # sessions end with their token
    assert visit.get(after).status_code == 200
    assert visit.get("/").status_code == 200


def test_without_a_token_nobody_is_let_in(config: ClientConfig, source: Path) -> None:
    visitor = stranger(config, source)
    for path in ("/", "/?token=", "/?token=None"):
        assert visitor.get(path).status_code == 403


@pytest.mark.parametrize(
    "path", [*PAGES, "/receipt/2026-01", "/plan/00", "/nowhere", "/ledger?token={}", "/status?token={}"]
)
def test_a_stranger_sees_nothing(config: ClientConfig, source: Path, path: str) -> None:
    token = address(config).partition("token=")[2]
    answer = stranger(config, source).get(path.format(token))
    assert answer.status_code == 403
    assert "hanse-client page" in answer.text
    assert "Overview" not in answer.text
    assert "set-cookie" not in answer.headers


@pytest.mark.parametrize("path", POSTS)
def test_a_stranger_does_nothing(config: ClientConfig, source: Path, path: str) -> None:
    token = address(config).partition("token=")[2]
    visitor = stranger(config, source)
    for url in (path, f"{path}?token={token}"):
        answer = visitor.ask("POST", url, data={"length": "1h"}, headers={"Sec-Fetch-Site": "same-origin"})
        assert answer.status_code == 403
    assert Control(config.state).paused_until(datetime.now(UTC)) is None


def test_the_address_gives_a_session_and_leads_on_without_the_token(
    config: ClientConfig, source: Path
) -> None:
    visitor = stranger(config, source)
    where = address(config)
    answer = visitor.get(where)
    cookie = answer.headers["set-cookie"].lower()
    assert cookie.startswith(f"hanse-{PORT}=")
    for part in ("httponly", "samesite=strict", "path=/"):
        assert part in cookie.split("; ")
    assert '<meta http-equiv="refresh" content="0; url=/">' in answer.text
    token = where.partition("token=")[2]
    assert token not in answer.text + answer.headers["set-cookie"]
    assert visitor.get("/").status_code == 200


@pytest.mark.parametrize("change", [
    lambda name, mac: "",
    lambda name, mac: name,
    lambda name, mac: f"{name}.",
    lambda name, mac: f".{mac}",
    lambda name, mac: f"x{name}.{mac}",
    lambda name, mac: f"{name}.{mac[:-1]}",
    lambda name, mac: f"{name}.{mac[::-1]}",
    lambda name, mac: f"{name}.\u00e9",
])  # fmt: skip
def test_a_forged_session_is_none(
    config: ClientConfig, source: Path, change: Callable[[str, str], str]
) -> None:
    visitor = stranger(config, source)
    visitor.get(address(config))
    (name, _, mac) = visitor.cookies[f"hanse-{PORT}"].partition(".")
    visitor.cookies.clear()
    forged = f"hanse-{PORT}={change(name, mac)}".encode()
    assert visitor.get("/", headers=[(b"cookie", forged)]).status_code == 403


@pytest.mark.parametrize(
    "host", ["evil.example", f"evil.example:{PORT}", "127.0.0.2", "127.0.0.1.evil.example"]
)
def test_a_page_under_another_name_is_not_served(visit: Visitor, host: str) -> None:
    cookies = "; ".join(f"{name}={value}" for name, value in visit.cookies.items())
    answer = visit.get("/", headers={"Host": host, "Cookie": cookies})
    assert answer.status_code == 421
    assert "<" not in answer.text
    assert visit.get("/", headers={"Host": f"localhost:{PORT}", "Cookie": cookies}).status_code == 200


@pytest.mark.parametrize("path", [*PAGES, "/nowhere", "/static/theme.css", "/favicon.ico"])
def test_every_answer_has_the_headers(visit: Visitor, path: str) -> None:
    answer = visit.get(path)
    for name, value in HEADERS.items():
        assert answer.headers[name] == value


# -- who may do something -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("headers", [
    {},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
    {"Sec-Fetch-Site": "none"},
    {"Sec-Fetch-Site": "cross-site", "Origin": f"http://127.0.0.1:{PORT}"},
    {"Origin": "null"},
    {"Origin": "http://127.0.0.1:9999"},
    {"Origin": f"https://127.0.0.1:{PORT}"},
    {"Origin": "http://evil.example"},
])  # fmt: skip
def test_another_pages_form_does_nothing(
    config: ClientConfig, visit: Visitor, headers: dict[str, str]
) -> None:
    assert visit.post("/pause", headers, length="1h").status_code == 403
    assert Control(config.state).paused_until(datetime.now(UTC)) is None


@pytest.mark.parametrize("headers", [
    {"Sec-Fetch-Site": "same-origin", "Origin": "null"},
    {"Origin": f"http://127.0.0.1:{PORT}"},
])  # fmt: skip
def test_our_own_form_does(config: ClientConfig, visit: Visitor, headers: dict[str, str]) -> None:
    assert visit.post("/pause", headers, length="1h").status_code == 303
    assert Control(config.state).paused_until(datetime.now(UTC)) is not None


def test_a_form_has_its_sessions_key(config: ClientConfig, source: Path, visit: Visitor) -> None:
    other = stranger(config, source)
    other.get(address(config))
    assert other.key() != visit.key()
    for key in ("", "x", other.key(), visit.cookies[f"hanse-{PORT}"].partition(".")[2]):
        assert visit.post("/pause", length="1h", key=key).status_code == 403
    assert Control(config.state).paused_until(datetime.now(UTC)) is None


@pytest.mark.parametrize(("body", "kind", "code"), [
    (b"length=1h&more=" + b"x" * MAX_FORM_BYTES, "application/x-www-form-urlencoded", 413),
    (b"length=1h&length=8h", "application/x-www-form-urlencoded", 400),
    (b"length=%ff", "application/x-www-form-urlencoded", 400),
    (b"length=\xff", "application/x-www-form-urlencoded", 400),
    (b"&".join(b"f%d=1" % n for n in range(99)), "application/x-www-form-urlencoded", 400),
    (b'{"length": "1h"}', "application/json", 415),
    (b"length=1h", "text/plain", 415),
    (b"length=1h", "multipart/form-data; boundary=x", 415),
    (b"length=9h", "application/x-www-form-urlencoded", 400),
    (b"", "application/x-www-form-urlencoded", 400),
])  # fmt: skip
def test_forms_are_bounded_and_judged(
    config: ClientConfig, visit: Visitor, body: bytes, kind: str, code: int
) -> None:
    data = f"key={visit.key()}&".encode() + body
    headers = {"Sec-Fetch-Site": "same-origin", "Content-Type": kind}
    assert visit.ask("POST", "/pause", content=data, headers=headers).status_code == code
    assert Control(config.state).paused_until(datetime.now(UTC)) is None


@pytest.mark.parametrize("path", POSTS)
def test_looking_changes_nothing(visit: Visitor, path: str) -> None:
    assert visit.get(path).status_code == 405


@pytest.mark.parametrize(("to", "where"), [
    ("/ledger", "/ledger"), (f"/plan/{'0' * 64}", f"/plan/{'0' * 64}"), ("/", "/"), ("//evil.example", "/"),
    ("https://evil.example", "/"), ("/\\evil.example", "/"), ("/x\r\nSet-Cookie: a=b", "/"), ("", "/"),
])  # fmt: skip
def test_the_language_is_chosen_and_leads_to_our_own_pages(visit: Visitor, to: str, where: str) -> None:
    answer = visit.post("/language", language="zh", to=to)
    assert (answer.status_code, answer.headers["location"]) == (303, where)
    assert '<html lang="zh-Hans">' in visit.get("/").text
    visit.post("/language", language="xx", to=to)
    assert '<html lang="zh-Hans">' in visit.get("/").text
    visit.post("/language", language="en", to=to)
    assert '<html lang="en">' in visit.get("/").text


def test_the_configurations_language_is_the_first(settings: dict[str, Any], source: Path) -> None:
    config = ClientConfig.model_validate(settings | {"page": {"port": PORT, "language": "zh"}})
    visitor = stranger(config, source)
    assert "此页面已锁定" in visitor.get("/").text
    visitor.get(address(config))
    assert '<html lang="zh-Hans">' in visitor.get("/").text


def test_the_opener_tells_no_other_user(config: ClientConfig, tmp_path: Path) -> None:
    path = opener(tmp_path, address(config))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert address(config) in path.read_text()
    with pytest.raises(ConfigError, match="cannot be written"):
        opener(tmp_path / "nowhere", address(config))


# -- what it shows ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("path", PAGES)
def test_a_shop_in_which_nothing_happened_yet(
    config: ClientConfig, visit: Visitor, path: str, language: str
) -> None:
    visit.post("/language", language=language)
    answer = visit.get(path)
    assert answer.status_code == 200
    assert "None" not in answer.text
    assert not config.ledger_path.exists()  # looking makes no ledger
    assert not config.markers_path.exists()


STATES: dict[str, tuple[State, dict[str, Any], str]] = {
    "connecting": (State.CONNECTING, {}, "No connection to the league yet."),
    "waiting": (State.WAITING, {}, "Connected. Waiting for the league."),
    "training": (
        State.TRAINING,
        {"plan": "ab" * 32, "round": 3, "rounds": 60},
        "Round 3 of 60 was done last.",
    ),
    "closed": (State.CLOSED, {}, "Outside its hours."),
}


@pytest.mark.parametrize("case", STATES)
def test_a_running_daemons_state_in_words(config: ClientConfig, visit: Visitor, case: str) -> None:
    state, changes, said = STATES[case]
    with daemon(config, state=state, **changes):
        for path in ("/", "/status"):
            assert said in visit.get(path).text
    assert said not in visit.get("/").text
    assert "Your daemon does not run." in visit.get("/").text


def test_a_pause_is_seen_before_the_daemon_has_heard_of_it(config: ClientConfig, visit: Visitor) -> None:
    control = Control(config.state)
    with daemon(config, state=State.TRAINING, plan="ab" * 32, round=1, rounds=2):
        control.pause(None)
        assert "Pausing." in visit.get("/").text
    with daemon(config):
        assert "Paused until you resume." in visit.get("/").text
        until = control.pause(timedelta(hours=1))
        assert f"Paused until {until.astimezone():%Y-%m-%d %H:%M}." in visit.get("/").text
    with daemon(config, state=State.PAUSED):
        control.resume()
        assert "Resuming." in visit.get("/").text


def test_photos_traffic_and_progress(settings: dict[str, Any], source: Path) -> None:
    config = ClientConfig.model_validate(
        settings | {"page": {"port": PORT}, "network": {"monthly_megabytes": 500}}
    )
    visitor = stranger(config, source)
    visitor.get(address(config))
    with daemon(config, photos=4503, problems=2, preparing=(10, 40), megabytes=12.5):
        text = visitor.get("/").text
    for said in (">4503<", "2 can't be used", "10 of 40 are done.", "12.5 MB", "of 500 MB you allow"):
        assert said in text
    assert 'aria-label="10 of 40 photos prepared"' in text


def test_pause_and_resume(config: ClientConfig, visit: Visitor) -> None:
    control = Control(config.state)
    for length, hours in (("1h", 1), ("8h", 8)):
        answer = visit.post("/pause", length=length)
        assert (answer.status_code, answer.headers["location"]) == (303, "/")
        until = control.paused_until(datetime.now(UTC))
        assert until is not None
        assert abs(until - datetime.now(UTC) - timedelta(hours=hours)) < timedelta(minutes=1)
    visit.post("/pause", length="always")
    assert control.paused_until(datetime.now(UTC) + timedelta(days=9999)) is not None
    assert "Resume now" in visit.get("/").text
    visit.post("/resume")
    assert control.paused_until(datetime.now(UTC)) is None
    assert "Pause for 1 hour" in visit.get("/").text


def test_what_was_spent_and_what_it_means(config: ClientConfig, visit: Visitor) -> None:
    spent = fill(config, 5).spent()
    text = visit.get("/ledger").text
    shown = re.search(r"ε = ([\d.]+)</strong> of the 6 you allow is spent\. Left: ([\d.]+)\.", text)
    assert shown
    assert spent.epsilon <= float(shown[1]) < spent.epsilon + 1.1e-3
    assert float(shown[2]) <= 6 - spent.epsilon < float(shown[2]) + 1.1e-3
    bound = re.search(r"about any one photo to at most ([\d.]+) %", text)
    assert bound
    true = 100 * posterior_bound(spent.epsilon, 0.01)
    assert true <= float(bound[1]) < 1.1 * true
    assert f"about 1 in {1 / spent.delta:,.0f}" in text
    assert "What 5 rounds mean" in text
    assert "rests on other merchants" in text
    assert f"ε spent: {shown[1]} of 6" in visit.get("/").text


def test_epsilon_is_told_upward() -> None:
    assert told(2.9471) == "2.948"
    assert told(3.0) == "3"
    assert told(0.0) == "0"
    assert told(float("inf")) is None


def test_entries_page_by_page(config: ClientConfig, visit: Visitor) -> None:
    fill(config, ENTRIES_A_PAGE + 3)
    numbers = [
        [int(each) for each in re.findall(r'<th scope="row" class="number">(\d+)</th>', visit.get(path).text)]
        for path in (
            "/ledger",
            "/ledger?page=2",
            "/ledger?page=99",
            "/ledger?page=-1",
            "/ledger?page=" + "9" * 5000,
        )
    ]
    assert numbers[0] == list(range(ENTRIES_A_PAGE + 3, 3, -1))
    assert numbers[1] == numbers[2] == [3, 2, 1]
    assert numbers[3] == numbers[4] == numbers[0]


def test_the_ledger_is_checked_on_request(config: ClientConfig, visit: Visitor) -> None:
    number, last = fill(config, 2).head
    text = visit.get("/ledger?verify=yes").text
    assert "The ledger is sound." in text
    assert f"{number} · {last.hex()}" in text
    assert "The ledger is sound." not in visit.get("/ledger").text


def damage(path: Path) -> None:
    """Change a digest in a row, as a bad disk would."""
    for suffix in ("-wal", "-shm"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)
    data = path.read_bytes()
    assert b"p" * 32 in data
    path.write_bytes(data.replace(b"p" * 32, b"q" * 32, 1))


def test_a_damaged_ledger_is_told_and_the_rest_goes_on(config: ClientConfig, visit: Visitor) -> None:
    fill(config, 2)
    assert "What 2 rounds mean" in visit.get("/").text
    whole = config.ledger_path.read_bytes()
    damage(config.ledger_path)
    for path in ("/ledger", "/ledger?verify=yes"):
        answer = visit.get(path)
        assert answer.status_code == 200
        assert "Your ledger can't be read." in answer.text
        assert "the ledger is damaged" in answer.text
    for path in ("/", "/status", "/plans", "/history", "/members", "/settings"):
        assert visit.get(path).status_code == 200
    assert visit.get(f"/receipt/{datetime.now(UTC):%Y-%m}").status_code == 409
    config.ledger_path.write_bytes(whole)
    assert "What 2 rounds mean" in visit.get("/").text


def test_a_ledger_that_is_no_file_of_ours(config: ClientConfig, visit: Visitor) -> None:
    config.ledger_path.write_bytes(b"no ledger")
    assert "Your ledger can't be read." in visit.get("/").text
    config.ledger_path.unlink()
    assert "Nothing was charged yet" in visit.get("/").text


def test_receipts_by_month(config: ClientConfig, visit: Visitor, tmp_path: Path) -> None:
    from hanse_client.receipt import differences, read

    ledger = fill(config, 3)
    month = f"{datetime.now(UTC):%Y-%m}"
    assert f'href="/receipt/{month}"' in visit.get("/ledger").text
    shown = visit.get(f"/receipt/{month}")
    assert f"Privacy receipt {month}" in shown.text
    assert "<style>" not in shown.text
    saved = visit.get(f"/receipt/{month}.html")
    assert saved.headers["content-disposition"] == f'attachment; filename="receipt-{month}.html"'
    (tmp_path / "receipt.html").write_text(saved.text, encoding="utf-8")
    found, as_made = read(tmp_path / "receipt.html")
    assert as_made
    assert differences(found, ledger) == ()
    for wrong in ("2999-01", "2026-13", "x", f"{month}.pdf", "..%2f..%2fetc"):
        assert visit.get(f"/receipt/{wrong}").status_code == 404


# -- plans --------------------------------------------------------------------------------------------------------


def test_a_plan_is_explained_approved_and_refused(
    config: ClientConfig, visit: Visitor, make_plan: MakePlan
) -> None:
    plan = make_plan()
    name = wait(config, plan)
    for path in ("/", "/status", "/plans", f"/plan/{name}"):
        assert name[:16] in visit.get(path).text
    text = html.unescape(visit.get(f"/plan/{name}").text)
    for sentence in config.policy.explain(plan):
        assert sentence in text
    assert "your budget has room for it" in text
    approvals = Approvals(config.plans_path)
    assert visit.post(f"/plan/{name}/approve").headers["location"] == f"/plan/{name}"
    assert approvals.list() == {name: Standing.APPROVED}
    assert "You approved this plan." in visit.get(f"/plan/{name}").text
    assert name[:16] not in visit.get("/").text
    visit.post(f"/plan/{name}/refuse")
    assert approvals.list() == {name: Standing.REFUSED}


def test_a_plan_of_mode_trends_is_told_to_be_about_queries(
    config: ClientConfig, visit: Visitor, make_plan: MakePlan
) -> None:
    training = TrendsTraining(first_day="2026-02-23", days=28, expected_batch=500.0, noise_multiplier=20.0)
    name = wait(config, make_plan(dimension=3).model_copy(update={"training": training}))
    for path in ("/", f"/plan/{name}"):
        text = visit.get(path).text
        assert "that somebody searched your shop by a given photo to at most" in text
        assert "about any one photo" not in text


def test_what_the_policy_refuses_cannot_be_approved(
    config: ClientConfig, visit: Visitor, make_plan: MakePlan
) -> None:
    plan = make_plan({"rounds": 2000})
    name = wait(config, plan)
    text = html.unescape(visit.get(f"/plan/{name}").text)
    for reason in config.policy.reasons(plan, config.league.taxonomy):
        assert reason in text
    answer = visit.post(f"/plan/{name}/approve")
    assert answer.status_code == 409
    assert "rounds: found 2000" in answer.text
    assert Approvals(config.plans_path).list() == {name: Standing.WAITING}


def test_a_budget_without_room_is_told(config: ClientConfig, visit: Visitor, make_plan: MakePlan) -> None:
    ledger = Ledger(config.ledger_path, config.policy.budget)
    ledger.charge(Charge.of(make_plan(serial=b"a" * 16)))
    ledger.charge(Charge.of(make_plan(serial=b"b" * 16)))  # δ is used up
    name = wait(config, make_plan())
    assert "No photo was touched." in visit.get(f"/plan/{name}").text


def test_a_plan_that_takes_too_many_steps_is_not_computed(
    config: ClientConfig, visit: Visitor, make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan({"rounds": 1000, "local_steps": 1000})
    name = wait(config, plan)
    monkeypatch.setattr(Plan, "epsilon", lambda self: pytest.fail("computed"))
    for path in ("/", "/plans", f"/plan/{name}"):
        assert visit.get(path).status_code == 200


def test_forged_and_damaged_plans(config: ClientConfig, visit: Visitor, make_plan: MakePlan) -> None:
    forged = wait(config, make_plan(serial=b"f" * 16), Ed25519PrivateKey.generate())
    damaged = wait(config, make_plan(serial=b"d" * 16))
    (config.plans_path / f"{damaged}.waiting").write_bytes(b"no plan")
    swapped = "ab" * 32
    (config.plans_path / f"{swapped}.waiting").write_bytes(
        wire.encode(SignedPlan.sign(make_plan(), OPERATOR))
    )
    for name in (forged, damaged, swapped):
        assert "can't be believed" in visit.get(f"/plan/{name}").text
        assert visit.post(f"/plan/{name}/approve").status_code in (409, 422)
    assert set(Approvals(config.plans_path).list().values()) == {Standing.WAITING}
    assert visit.get("/").status_code == 200
    assert visit.post(f"/plan/{damaged}/refuse").status_code == 303


@pytest.mark.parametrize("name", ["ab", "0" * 64, "..%2f..%2fpasswd", "%00", MARKUP])
def test_no_such_plan(visit: Visitor, name: str) -> None:
    answer = visit.get(f"/plan/{name}")
    assert answer.status_code == 404
    assert MARKUP not in answer.text


# -- what strangers wrote -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", ["en", "zh"])
def test_markup_is_shown_as_text(
    config: ClientConfig, visit: Visitor, make_plan: MakePlan, language: str
) -> None:
    see_directory(config, MARKUP)
    Journal(config.state).note("declined", f"The server said {MARKUP}", plan=MARKUP)
    Journal(config.state).note(MARKUP, "an odd kind")
    taxonomy = make_plan().taxonomy.model_copy(update={"classes": (MARKUP[:60], "shoe", "bag")})
    name = wait(config, make_plan(taxonomy=taxonomy))
    visit.post("/language", language=language)
    escaped = "&lt;script&gt;alert(1)"
    with daemon(config, server="<b>server</b>", plan="<i>plan</i>", rounds=1, round=1):
        assert "<b>server" not in visit.get("/").text
        assert "&lt;b&gt;server" in visit.get("/").text
        for path in ("/history", "/members", f"/plan/{name}", "/settings", f"/history?kind={MARKUP}"):
            text = visit.get(path).text
            assert escaped in text
            assert not re.search(r"<script(?! src=\"/static/)|<img|</pre><", text)


def test_history_newest_first_by_kind_without_damaged_lines(config: ClientConfig, visit: Visitor) -> None:
    journal = Journal(config.state)
    for number in range(3):
        journal.note("round", f"Round {number}.")
        journal.note("photos", f"Changed {number}.")
    with (config.state / "journal.jsonl").open("ab") as file:
        file.write(b'{"time": "never"}\n\xff\xfe\n')
    assert re.findall(r"(Round|Changed) (\d)\.", visit.get("/history").text)[:3] == [
        ("Changed", "2"),
        ("Round", "2"),
        ("Changed", "1"),
    ]
    text = visit.get("/history?kind=round").text
    assert "Round 0." in text
    assert "Changed" not in text
    assert '<option value="round" selected>' in text


def test_members_with_their_words(settings: dict[str, Any], source: Path) -> None:
    policy = settings["policy"] | {"verified": {"birch": "01" * 32}}
    member = {"name": "alder", "entity": "Alder Ltd"}
    config = ClientConfig.model_validate(
        settings | {"page": {"port": PORT}, "policy": policy, "member": member}
    )
    visitor = stranger(config, source)
    visitor.get(address(config))
    seen = see_directory(config)
    text = visitor.get("/members").text
    for entry in seen.entries:
        assert words(entry.identity) in text
        assert entry.identity.hex() in text
    blocks = dict(re.findall(r"<h2><bdi>(\w+)</bdi>(.*?)</h2>", text, re.S))
    assert "this is you" in blocks["alder"]
    assert "you verified it" in blocks["birch"]
    assert "not verified" in blocks["cedar"]
    visitor.post("/language", language="zh")
    assert words(seen.entries[1].identity, "zh") in visitor.get("/members").text


def test_a_damaged_directory_is_told(config: ClientConfig, visit: Visitor) -> None:
    config.markers_path.write_bytes(b"no database")
    answer = visit.get("/members")
    assert answer.status_code == 200
    assert "can't be read" in answer.text


def test_settings_without_their_file(visit: Visitor, source: Path) -> None:
    assert "My shop &lt;/pre&gt;" in visit.get("/settings").text
    source.unlink()
    answer = visit.get("/settings")
    assert answer.status_code == 200
    assert "The file can't be read." in answer.text


def test_a_full_disk_is_told(config: ClientConfig, visit: Visitor, monkeypatch: pytest.MonkeyPatch) -> None:
    key = visit.key()
    (config.state / "paused").mkdir()  # nothing can be written there
    answer = visit.post("/pause", length="1h", key=key)
    assert answer.status_code == 409
    assert "cannot be written" in answer.text
    answer = visit.post("/resume", key=key)
    assert answer.status_code == 409
    assert "That did not work" in answer.text


# -- the process --------------------------------------------------------------------------------------------------


def run_page(source: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "hanse_client.page", source],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.fixture
def written(tmp_path: Path, config: ClientConfig) -> Callable[[int], Path]:
    """Return a function that writes a whole configuration, with this port."""

    def write(port: int) -> Path:
        path = tmp_path / "whole.yaml"
        league = config.league
        path.write_text(
            f"photos: photos\nstate: state\nleague:\n  operator_key: {league.operator_key}\n"
            f"  charter: {league.charter}\n  taxonomy: {{classes: [shirt, shoe, bag]}}\n"
            f"policy: {{league: test, epsilon: 6.0}}\npage: {{port: {port}}}\n"
        )
        return path

    return write


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as held:
        port: int = held.getsockname()[1]
        return port


@pytest.mark.slow
@pytest.mark.parametrize("end", ["input", "signal"])
def test_the_process_serves_until_its_daemon_is_gone(
    written: Callable[[int], Path], config: ClientConfig, wait_until: Callable[..., Any], end: str
) -> None:
    port = free_port()
    process = run_page(written(port))

    def locked() -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{port}/").status_code == 403
        except httpx.TransportError:
            assert process.poll() is None, process.stderr and process.stderr.read()
            return False

    try:
        wait_until("the page", locked)
        token = read_token(config.state)
        assert token is not None
        assert httpx.get(f"http://127.0.0.1:{port}/?token={token}").status_code == 200
        if end == "input":
            assert process.stdin
            process.stdin.close()
        else:
            process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT) == 0
        assert process.stdout
        assert process.stderr
        assert process.stdout.read() + process.stderr.read() == b""  # no log has the token
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_a_port_that_is_taken_is_told(written: Callable[[int], Path]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
        process = run_page(written(port))
        _, err = process.communicate(timeout=WAIT)
    assert process.returncode == ConfigError.exit_code
    assert f"error: port {port}: cannot be used on this machine (Address already in use)." in err.decode()


# -- a person at a real browser -----------------------------------------------------------------------------------


class Owner(Person):
    """The shop's owner at a browser."""

    pictures = "page-"


@pytest.fixture
def served(
    settings: dict[str, Any], tmp_path: Path, make_plan: MakePlan
) -> Iterator[tuple[ClientConfig, str]]:
    """A shop in the middle of its life, served on a free port: its configuration, and where its page is."""
    path = tmp_path / "hanse-client.yaml"
    path.write_text("# My shop\nphotos: photos\npage:\n  port: 8765\n")
    policy = settings["policy"] | {"approval": "manual", "verified": {"birch": "01" * 32}}
    with listen(0) as listening:
        port = listening.getsockname()[1]
        config = ClientConfig.model_validate(
            settings
            | {
                "policy": policy,
                "member": {"name": "alder", "entity": "Alder Ltd"},
                "page": {"port": port},
                "network": {"monthly_megabytes": 500},
            }
        )
        fill(config, ENTRIES_A_PAGE + 5)
        wait(config, make_plan())
        see_directory(config)
        journal = Journal(config.state)
        journal.note("started", "The daemon was started.", version="1")
        journal.note("connection", "Connected to league.example:9092.")
        journal.note("photos", "4503 photos are ready to train on, 2 can't be used.")
        for round_ in range(1, 4):
            journal.note("round", f"Round {round_} of 60: trained, charged, sent.", round=round_)
        journal.note(
            "declined",
            "Not taking part now (policy): ε: the whole plan costs 9, your policy allows 6.",
        )
        journal.note("problem", "The photos can't be made ready: the disk is full.")
        facts = {"plan": b"p".hex() * 32, "round": 55, "rounds": 60}
        photos = {"photos": 4503, "problems": 2, "megabytes": 12.5}
        with (
            daemon(config, state=State.TRAINING, **facts, **photos),
            serving(build(config, path, port), listening),
        ):
            yield config, f"http://127.0.0.1:{port}"


@pytest.mark.slow
def test_a_person_at_the_page(browser: Any, served: tuple[ClientConfig, str], tmp_path: Path) -> None:
    config, origin = served
    control = Control(config.state)
    ada = Owner(browser, origin)
    ada.enter(opener(tmp_path, address(config)).as_uri())
    assert ada.page.url == f"{origin}/"
    assert "Round 55 of 60 was done last." in ada.text()
    ada.look("overview")
    ada.press("Pause for 8 hours")
    assert control.paused_until(datetime.now(UTC)) is not None
    assert "Pausing." in ada.text()
    ada.look("pausing")
    ada.press("Resume now")
    assert control.paused_until(datetime.now(UTC)) is None
    ada.page.get_by_role("link", name="What this plan does, in full").click()
    assert "It waits for your word." in ada.text()
    ada.look("plan")
    ada.press("Approve")
    assert set(Approvals(config.plans_path).list().values()) == {Standing.APPROVED}
    assert "You approved this plan." in ada.text()
    ada.follow("Plans")
    ada.look("plans")
    ada.follow("Ledger")
    ada.press("Check the whole ledger")
    assert "The ledger is sound." in ada.text()
    ada.look("ledger")
    ada.follow("Older")
    assert "Page 2 of 2" in ada.text()
    ada.follow(f"Receipt {datetime.now(UTC):%Y-%m}")
    assert "Privacy receipt" in ada.text()
    ada.page.go_back()
    with ada.page.expect_download() as download:
        ada.page.get_by_role("link", name="save it as a file").click()
    assert download.value.suggested_filename == f"receipt-{datetime.now(UTC):%Y-%m}.html"
    ada.follow("History")
    ada.look("history")
    ada.page.get_by_label("Show").select_option("round")
    ada.press("Filter")
    assert "Round 3 of 60" in ada.text()
    assert "disk is full" not in ada.text()
    ada.follow("Members")
    ada.look("members")
    ada.follow("Settings")
    ada.page.get_by_text("Show the file").click()
    ada.look("settings")
    ada.press("中文")
    assert ada.page.url == f"{origin}/settings"
    for place in ("概览", "训练计划", "账本", "历史", "成员", "设置"):
        ada.follow(place)
        ada.look(f"zh-{place}")
    ada.press("English")
    assert "Settings" in ada.text()
    assert ada.complaints == []


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_window(browser: Any, served: tuple[ClientConfig, str], scheme: str) -> None:
    config, origin = served
    ada = Owner(browser, origin, viewport={"width": 360, "height": 740}, color_scheme=scheme)
    ada.enter(address(config))
    for path in PAGES:
        if path != "/status":
            ada.page.goto(f"{origin}{path}")
            ada.look(f"360-{scheme}-{path[1:] or 'overview'}")
    assert ada.complaints == []


@pytest.mark.slow
def test_it_keeps_itself_up_to_date(browser: Any, served: tuple[ClientConfig, str]) -> None:
    config, origin = served
    control = Control(config.state)
    ada = Owner(browser, origin)
    ada.enter(address(config))
    control.publish(status(state=State.WAITING, photos=77))
    ada.page.locator("#state").get_by_text("Waiting for the league").wait_for()
    assert "77" in ada.page.inner_text("#figures")
    assert ada.page.get_attribute("#state", "aria-live") == "polite"
    ada.page.get_by_role("button", name="Refuse").focus()  # what the keyboard is in stays
    control.publish(status(state=State.CONNECTING, photos=78))
    for name in Approvals(config.plans_path).list():
        Approvals(config.plans_path).decide(name, Standing.APPROVED)
    ada.page.locator("#state").get_by_text("No connection").wait_for()
    assert ada.page.evaluate("document.activeElement.innerText").startswith("Refuse")
    assert ada.complaints == []
    (config.state / TOKEN_FILE).unlink()  # nobody is let in any more
    ada.page.get_by_text("This page is no longer kept up to date.").wait_for()
    ada.look("stale")


@pytest.mark.slow
def test_without_scripts(browser: Any, served: tuple[ClientConfig, str]) -> None:
    config, origin = served
    ada = Owner(browser, origin, java_script_enabled=False, color_scheme="dark")
    ada.enter(address(config))
    ada.press("Pause until I resume")
    assert "Pausing." in ada.text()
    ada.press("Resume now")
    assert "Load the page again" in ada.text()
    assert "no longer kept up to date" not in ada.text()
    ada.press("Approve")
    assert "You approved this plan." in ada.text()
    ada.press("中文")
    assert "您已同意这个训练计划。" in ada.text()
    assert ada.complaints == []


@pytest.mark.slow
def test_by_keyboard_alone(browser: Any, served: tuple[ClientConfig, str]) -> None:
    config, origin = served
    ada = Owner(browser, origin)
    ada.enter(address(config))

    ada.tab_to("To the content")
    ada.page.keyboard.press("Enter")
    ada.tab_to("Pause for 1 hour")  # the first button behind the skipped head
    ada.page.keyboard.press("Enter")
    ada.page.get_by_text("Pausing.").wait_for()
    ada.tab_to("Resume now")
    ada.page.keyboard.press("Space")
    ada.page.get_by_role("button", name="Pause for 1 hour").wait_for()
    ada.tab_to("Approve")
    ada.page.keyboard.press("Enter")
    ada.page.get_by_text("You approved this plan.").wait_for()
    ada.tab_to("History")
    ada.page.keyboard.press("Enter")
    ada.page.get_by_role("heading", name="History").wait_for()
    assert ada.complaints == []


@pytest.mark.slow
def test_a_server_of_another_user_cannot_have_the_browser_act(
    browser: Any, served: tuple[ClientConfig, str]
) -> None:
    """On another port of this machine, which the browser takes for the same site and sends its cookies to."""
    from starlette.applications import Starlette
    from starlette.responses import HTMLResponse
    from starlette.routing import Route

    config, origin = served
    heard: list[str] = []

    def evil(request: Any) -> HTMLResponse:
        heard.append(request.headers.get("cookie", ""))
        return HTMLResponse(
            f'<form method="post" action="{origin}/pause"><input name="length" value="1h"><button>Win</button></form>'
        )

    ada = Owner(browser, origin)
    ada.enter(address(config))
    with listen(0) as listening, serving(Starlette(routes=[Route("/", evil)]), listening):
        ada.page.goto(f"http://127.0.0.1:{listening.getsockname()[1]}/")
        ada.press("Win")
    assert any("hanse-" in cookie for cookie in heard)  # so the cookie alone must not be enough
    assert ada.page.url == f"{origin}/pause"
    assert "That was refused" in ada.text()
    assert Control(config.state).paused_until(datetime.now(UTC)) is None


@pytest.fixture
def joining(tmp_path: Path, keys: DevelopmentKeys) -> Iterator[tuple[Wizard, str, LeagueCard]]:
    """The wizard, served on a free port: its address with the token, and a league's card."""
    card = LeagueCard(
        league="test",
        charter=CHARTER.digest.hex(),
        operator_key=signing.public_bytes(OPERATOR).hex(),
        server="league.example:9092",
        authority=keys.authority.read_text(),
        taxonomy=Taxonomy(classes=("shirt", "shoe", "bag")),
    )
    for name in ("shirt", "Schuhe", "bag"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        (tmp_path / "photos" / name / "1.jpg").write_bytes(b"")
    wizard, token = Wizard(tmp_path / "alder", "en"), new_token()
    with listen(0) as listening:
        port = listening.getsockname()[1]
        with serving(build_wizard(wizard, port, token), listening):
            yield wizard, entrance(port, token), card


def join(ada: Owner, card: LeagueCard, folder: Path, look: Callable[[str], None]) -> None:
    """Go from the card to the request, with a slip at each step."""
    page = ada.page
    look("card")
    page.get_by_label("Paste the card's text here").fill("league: test")
    ada.press("Next")
    assert "This is not a league's card." in ada.text()
    look("card-error")
    page.get_by_label("Paste the card's text here").fill(card.to_yaml())
    ada.press("Next")
    assert card.words() in ada.text()
    ada.press("Next")
    assert "Compare the words first" in ada.text()
    look("words")
    page.get_by_label("I compared all twelve words").check()
    ada.press("Next")
    page.get_by_label("Your photos on this machine").fill(str(folder / "foto"))
    ada.press("Look at this folder")
    assert "There is no such folder" in ada.text()
    look("photos")
    page.get_by_label("Your photos on this machine").fill(str(folder / "photos"))
    ada.press("Look at this folder")
    assert "3 photos in 3 folders." in ada.text()
    page.get_by_label("Your name in the league").fill("Alder Books")
    page.get_by_label("The business or person behind it").fill("Alder Ltd")
    page.get_by_label("Passphrase", exact=True).fill("one")
    page.get_by_label("Passphrase, once more").fill("two")
    ada.press("Set up my shop")
    assert "Use small letters" in ada.text()
    assert "The two are not the same." in ada.text()
    assert page.get_by_label("The business or person behind it").input_value() == "Alder Ltd"
    look("shop")
    page.get_by_label("Your name in the league").fill("alder")
    ada.press("Set up my shop")
    assert "Your shop is set up" in ada.text()
    look("request")


@pytest.mark.slow
@pytest.mark.parametrize("scripts", [True, False], ids=["with-scripts", "without"])
def test_a_person_joins(
    browser: Any, joining: tuple[Wizard, str, LeagueCard], tmp_path: Path, scripts: bool
) -> None:
    wizard, where, card = joining
    viewport = {"width": 1100 if scripts else 360, "height": 800}
    ada = Owner(browser, where.partition("/?")[0], java_script_enabled=scripts, viewport=viewport)
    ada.page.goto(where)
    ada.page.wait_for_url("**/card")
    join(ada, card, tmp_path, lambda name: ada.look(f"wizard-{name}") if scripts else None)
    asked = SignedRequest.from_text((tmp_path / "alder" / "alder.request").read_text())
    assert words(asked.request.digest) in ada.text()
    ada.press("中文")
    assert words(asked.request.digest, "zh") in ada.text()
    if scripts:
        ada.look("wizard-zh-request")
    elif SCREENSHOTS:
        ada.page.screenshot(path=f"{SCREENSHOTS}/page-wizard-360-request.png", full_page=True)
    ada.press("完成")
    assert "您可以关闭这个窗口了。" in ada.text()
    assert wizard.done.is_set()
    assert [each for each in ada.complaints if "422" not in each] == []  # Chromium tells of the slips


@pytest.mark.slow
def test_the_card_is_chosen_as_a_file_and_the_rest_in_chinese_and_dark(
    browser: Any, joining: tuple[Wizard, str, LeagueCard], tmp_path: Path
) -> None:
    _, where, card = joining
    (tmp_path / "league.yaml").write_text(card.to_yaml())
    viewport = {"width": 360, "height": 740}
    ada = Owner(browser, where.partition("/?")[0], color_scheme="dark", viewport=viewport)
    ada.page.goto(where)
    ada.page.wait_for_url("**/card")
    ada.press("中文")
    ada.page.get_by_label("或选择文件").set_input_files(tmp_path / "league.yaml")
    ada.page.wait_for_function("() => document.querySelector('#text').value !== ''")
    assert ada.page.locator("#text").input_value() == card.to_yaml()
    ada.look("wizard-zh-card")
    ada.press("下一步")
    assert card.words("zh") in ada.text()
    ada.look("wizard-zh-words")
    ada.page.get_by_label("我已与一位成员").check()
    ada.press("下一步")
    ada.page.get_by_label("照片在本机上的位置").fill(str(tmp_path / "photos"))
    ada.look("wizard-zh-photos")
    ada.press("查看这个文件夹")
    ada.look("wizard-zh-shop")
    assert ada.complaints == []
