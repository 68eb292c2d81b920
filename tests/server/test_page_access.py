"""Who may see the operator's page: the token alone, guesses that lock no operator out, and what a cookie is worth."""

import re
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from tests.browser import FORM

from hanse_common.errors import ConfigError
from hanse_common.web.languages import Languages
from hanse_server import templates
from hanse_server.page_access import (
    FAILURES_AN_ADDRESS,
    FAILURES_IN_ALL,
    MAX_ADDRESSES,
    MAX_BURST,
    MAX_FORM_BYTES,
    MAX_SESSIONS,
    SESSION_SECONDS,
    WINDOW_SECONDS,
    Failures,
    Gate,
    deed,
)
from hanse_server.tokens import metrics_token, read_token

from .visitor import TOKEN, Visitor

LANGUAGES = Languages(templates.FOLDER, "en")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class House:
    """A gate before one page that shows the key of its session's forms, and one form."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.said: list[str] = []
        self.done: list[dict[str, str]] = []
        app = Starlette(
            routes=[
                Route("/", lambda request: PlainTextResponse(f"inside {request.state.key}")),
                Route("/metrics", lambda request: PlainTextResponse("numbers")),
                Route("/health", lambda request: PlainTextResponse("ok")),
                Route("/do", deed(self._do), methods=["POST"]),
            ]
        )
        self.gate = Gate(
            app,
            TOKEN.encode(),
            "hanse-operator-9094",
            LANGUAGES,
            lambda kind, text: self.said.append(text),
            self.clock,
        )

    def _do(self, request: Request, fields: dict[str, str]) -> PlainTextResponse:
        self.done.append(fields)
        return PlainTextResponse("done")


@pytest.fixture
def house() -> House:
    return House()


@pytest.fixture
def stranger(house: House) -> Visitor:
    return Visitor(house.gate)


@pytest.fixture
def operator(house: House) -> Visitor:
    visitor = Visitor(house.gate)
    assert visitor.log_in().headers["location"] == "/"
    return visitor


def test_without_the_token_there_is_nothing(stranger: Visitor) -> None:
    for path in ("/", "/metrics", "/nowhere", f"/?token={TOKEN}"):
        answer = stranger.get(path)
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        assert "inside" not in answer.text
        answer = stranger.get(path, headers={"Accept": "text/html"})
        assert (answer.status_code, answer.headers["location"]) == (303, "/login")
    assert stranger.ask("POST", "/do", data={"a": "b"}, headers=FORM).status_code == 401
    assert stranger.ask("POST", "/logout", headers=FORM).status_code == 401
    assert stranger.get("/health").text == "ok"
    assert 'type="password"' in stranger.get("/login").text


def test_the_token_begins_a_session_that_no_script_and_no_other_site_can_use(stranger: Visitor) -> None:
    answer = stranger.log_in(f"  {TOKEN}\n")
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    session, known = (cookie.lower().split("; ") for cookie in answer.headers.get_list("set-cookie"))
    for cookie, path in ((session, "path=/"), (known, "path=/login")):
        assert {"httponly", "samesite=strict", path} <= set(cookie)
    assert TOKEN not in str(answer.headers)
    assert stranger.get().text.startswith("inside ")
    assert stranger.get("/login").headers["location"] == "/"


@pytest.mark.parametrize("token", ["", "x", TOKEN[:-1], TOKEN + "x", TOKEN.upper(), "é" * 43])
def test_a_wrong_token_is_none(stranger: Visitor, token: str) -> None:
    answer = stranger.log_in(token)
    assert (answer.status_code, "set-cookie" in answer.headers) == (403, False)
    assert "This is not the token." in answer.text
    assert stranger.bearer(token.encode("ascii", "replace").decode()).status_code == 401


@pytest.mark.parametrize("header", ["", "Bearer", f"Basic {TOKEN}", f"Token {TOKEN}", TOKEN])
def test_only_a_bearer_is_a_bearer(stranger: Visitor, header: str) -> None:
    assert stranger.get("/metrics", headers={"Authorization": header}).status_code == 401
    assert stranger.get("/metrics", headers={"Authorization": f"bearer {TOKEN}"}).text == "numbers"


def test_a_bearer_may_look_and_not_act(house: House, stranger: Visitor) -> None:
    assert stranger.bearer(path="/").text == "inside "
    headers = FORM | {"Authorization": f"Bearer {TOKEN}"}
    for key in ("", "None"):
        assert stranger.ask("POST", "/do", data={"key": key}, headers=headers).status_code == 403
    assert house.done == []


def test_the_metrics_token_reads_metrics_and_nothing_else(house: House, stranger: Visitor) -> None:
    reading = metrics_token(TOKEN.encode()).decode()
    assert stranger.bearer(reading).text == "numbers"
    for path in ("/", "/privacy", "/metrics/", "/live"):
        assert stranger.bearer(reading, path=path).status_code == 401, path


@pytest.mark.parametrize(
    "change", [lambda name: "", lambda name: name[:-1], lambda name: name + "x", str.upper]
)
def test_a_forged_session_is_none(operator: Visitor, change: Callable[[str], str]) -> None:
    name = operator.cookies["hanse-operator-9094"]
    operator.cookies.clear()
    assert operator.get(headers={"Cookie": f"hanse-operator-9094={change(name)}"}).status_code == 401


def test_a_session_ends(house: House, operator: Visitor) -> None:
    house.clock.now += SESSION_SECONDS - 1
    assert operator.get().status_code == 200
    house.clock.now += 1
    assert operator.get().status_code == 401


def test_logging_out_ends_the_session_for_whoever_copied_it(house: House, operator: Visitor) -> None:
    copied = dict(operator.cookies)
    key = operator.get().text.removeprefix("inside ")
    assert operator.ask("POST", "/logout", data={"key": "x"}, headers=FORM).status_code == 403
    assert operator.ask("POST", "/logout", data={"key": key}, headers={}).status_code == 403
    assert operator.ask("GET", "/logout").status_code == 405
    assert operator.get().status_code == 200
    assert operator.ask("POST", "/logout", data={"key": key}, headers=FORM).headers["location"] == "/login"
    thief = Visitor(house.gate)
    thief.cookies = httpx.Cookies(copied)
    assert thief.get().status_code == 401


def test_sessions_are_bounded_and_the_oldest_goes_first(house: House, operator: Visitor) -> None:
    last = Visitor(house.gate)
    for _ in range(MAX_SESSIONS):
        house.clock.now += 1
        last.cookies.clear()
        last.log_in()
    assert operator.get().status_code == 401
    assert last.get().status_code == 200


def test_forms_need_their_own_sessions_key_and_our_own_page(house: House, operator: Visitor) -> None:
    other = Visitor(house.gate)
    other.log_in()
    key = operator.get().text.removeprefix("inside ")
    foreign = other.get().text.removeprefix("inside ")
    assert key != foreign
    assert key != operator.cookies["hanse-operator-9094"]
    for found, headers in ((foreign, FORM), ("", FORM), (key, {}), (key, {"Sec-Fetch-Site": "same-site"})):
        assert operator.ask("POST", "/do", data={"key": found}, headers=headers).status_code == 403
    assert house.done == []
    assert operator.ask("POST", "/do", data={"key": key, "a": "b"}, headers=FORM).text == "done"
    assert house.done == [{"a": "b"}]


def test_another_page_cannot_log_a_browser_in_and_forms_are_bounded(stranger: Visitor) -> None:
    for headers in ({}, {"Sec-Fetch-Site": "cross-site"}, {"Origin": "http://127.0.0.1:1"}):
        assert stranger.ask("POST", "/login", data={"token": TOKEN}, headers=headers).status_code == 403
    assert stranger.log_in("x" * MAX_FORM_BYTES).status_code == 413
    assert stranger.ask("POST", "/login", json={"token": TOKEN}, headers=FORM).status_code == 415
    assert stranger.ask("PUT", "/login").status_code == 405


def test_guessing_is_stopped_and_the_lock_ends(house: House, stranger: Visitor) -> None:
    for _ in range(FAILURES_AN_ADDRESS):
        assert stranger.log_in("guess").status_code == 403
    answer = stranger.log_in()
    assert answer.status_code == 429  # the right one is not judged either
    assert "Too many wrong tokens came." in answer.text
    assert int(answer.headers["retry-after"]) <= WINDOW_SECONDS + 1
    assert re.search(r"Try again in \d+ seconds", answer.text)
    for _ in range(50):  # what is refused does not make it longer
        house.clock.now += 1
        assert stranger.log_in("guess").status_code == 429
    house.clock.now += WINDOW_SECONDS - 50
    assert stranger.log_in().status_code == 303
    assert len(house.said) == 1


def test_who_guesses_does_not_keep_the_operator_out(
    house: House, operator: Visitor, stranger: Visitor
) -> None:
    key = operator.get().text.removeprefix("inside ")
    for _ in range(FAILURES_AN_ADDRESS):
        stranger.log_in("guess")
    assert stranger.log_in().status_code == 429
    assert operator.get().status_code == 200  # who is in stays in
    operator.ask("POST", "/logout", data={"key": key}, headers=FORM)
    assert operator.log_in().status_code == 303  # and a browser that was in comes in again
    assert stranger.bearer().text == "numbers"  # Prometheus has a count of its own


def test_a_known_browser_may_guess_no_more_than_others(house: House, operator: Visitor) -> None:
    del operator.cookies["hanse-operator-9094"]
    for _ in range(FAILURES_AN_ADDRESS):
        assert operator.log_in("guess").status_code == 403
    assert operator.log_in().status_code == 429
    assert Visitor(house.gate).log_in().status_code == 303  # what it did counts against itself alone
    known = operator.cookies["hanse-operator-9094-known"]
    name, _, mac = known.partition(".")
    assert house.gate._known(_request(known))
    for forged in (f"other.{mac}", f"{name}.{mac[::-1]}", name, ""):
        assert house.gate._known(_request(forged)) is None


def _request(known: str) -> Request:
    cookie = f"hanse-operator-9094-known={known}".encode()
    return Request({"type": "http", "headers": [(b"cookie", cookie)]})


def test_guesses_from_many_addresses_are_counted_together(house: House, operator: Visitor) -> None:
    for number in range(FAILURES_IN_ALL):
        assert Visitor(house.gate, f"127.0.1.{number}").log_in("guess").status_code == 403
    assert Visitor(house.gate, "127.0.2.1").log_in().status_code == 429
    del operator.cookies["hanse-operator-9094"]
    assert operator.log_in().status_code == 303  # its browser was in before
    house.clock.now += WINDOW_SECONDS
    assert Visitor(house.gate, "127.0.2.1").log_in().status_code == 303


def test_known_browsers_do_not_use_up_what_others_may_try(house: House) -> None:
    browsers = [Visitor(house.gate) for _ in range(FAILURES_IN_ALL // FAILURES_AN_ADDRESS)]
    for browser in browsers:
        browser.log_in()
        del browser.cookies["hanse-operator-9094"]
        for _ in range(FAILURES_AN_ADDRESS):
            assert browser.log_in("guess").status_code == 403
    assert Visitor(house.gate).log_in().status_code == 303


def test_bearers_that_guess_are_stopped_too(house: House, stranger: Visitor) -> None:
    for _ in range(FAILURES_AN_ADDRESS):
        assert stranger.bearer("guess").status_code == 401
    assert stranger.bearer().status_code == 429
    house.clock.now += WINDOW_SECONDS
    assert stranger.bearer().status_code == 200


def test_failures_take_little_memory() -> None:
    clock = Clock()
    failures = Failures(clock)
    for number in range(3 * MAX_ADDRESSES):
        clock.now += WINDOW_SECONDS
        failures.wait(str(number), known=False)
        failures.add(str(number), known=False)
    assert len(failures._each) == MAX_ADDRESSES
    assert len(failures._all) <= FAILURES_IN_ALL


def test_a_flood_at_the_door_does_not_reach_those_inside(
    house: House, operator: Visitor, stranger: Visitor
) -> None:
    answers = [stranger.get("/health").status_code for _ in range(int(MAX_BURST) + 5)]
    assert answers.count(200) in range(int(MAX_BURST) - 1, int(MAX_BURST) + 1)
    refused = stranger.get("/health")
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "2")
    assert operator.get().status_code == 200
    house.clock.now += 1
    assert stranger.get("/health").status_code == 200


def test_a_short_token_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "admin.token"
    path.write_text(TOKEN + "\n")
    assert read_token(path) == TOKEN.encode()
    for bad in ("short", "with spaces " * 5, "é" * 40):
        path.write_text(bad)
        with pytest.raises(ConfigError, match="expected at least 32 random ones"):
            read_token(path)
    with pytest.raises(ConfigError):
        read_token(tmp_path / "nowhere")
