"""The operator's page over a league in the middle of its life: what it shows, to whom, and a person at a browser."""

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.browser import FORM

from hanse_common.federated_report import ClassReport, Count, FederatedReport
from hanse_common.web.pages import STATIC, faults
from hanse_common.web.security import HEADERS
from hanse_common.web.serving import listen, serving
from hanse_server import page as pages
from hanse_server.live import Live
from hanse_server.metrics import CONTENT_TYPE, Metrics
from hanse_server.page import application
from hanse_server.page_data import Reader, reliability
from hanse_server.page_views import CLASSES_SHOWN, matrix, told
from hanse_server.publication import sign_release
from hanse_server.storage import State
from hanse_server.storage.schema import ParticipantRecord
from hanse_server.templates import FOLDER, STYLE

from .operator_state import CLASSES, KEY, MARKUP, NAMES, Story
from .visitor import TOKEN, Person, Visitor

PATHS = ("/", "/rounds", "/figures", "/privacy", "/versions", "/audit")
PORT = 9094


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    told = Story(tmp_path_factory.mktemp("operator") / "state", time.time(), every=15)
    told.tell()
    yield told
    told.state.database.close()


@pytest.fixture(scope="module")
def live(story: Story) -> Live:
    return story.live()


def visitor(state: State, live: Live | None, **options: Any) -> Visitor:
    """The operator, let in."""
    metrics = None if live is None else Metrics(state.folder)
    found = Visitor(application(state, live, metrics, TOKEN.encode(), port=PORT, **options))
    assert found.log_in().status_code == 303
    return found


@pytest.fixture(scope="module")
def visit(story: Story, live: Live) -> Visitor:
    return visitor(story.state, live)


@pytest.fixture
def empty(tmp_path: Path) -> Iterator[State]:
    with State.open(tmp_path / "state") as state:
        yield state


def in_chinese(visit: Visitor) -> Visitor:
    key = re.search(r'name="key" value="([^"]+)"', visit.get("/").text)
    assert key
    answer = visit.ask(
        "POST", "/language", data={"key": key[1], "language": "zh", "to": "/rounds"}, headers=FORM
    )
    assert (answer.status_code, answer.headers["location"]) == (303, "/rounds")
    return visit


# -- what it shows ------------------------------------------------------------------------------------------------


def test_every_text_has_its_chinese() -> None:
    assert faults(FOLDER) == []


@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_server_in_which_nothing_happened_yet(empty: State, language: str) -> None:
    visit = visitor(empty, Live())
    if language == "zh":
        in_chinese(visit)
    for path in (*PATHS, "/live"):
        answer = visit.get(path)
        assert answer.status_code == 200, path
        assert "None" not in answer.text
    assert ("Nothing was trained yet." in visit.get("/").text) == (language == "en")


@pytest.mark.parametrize("path", [*PATHS, "/live", "/nowhere", "/static/operator.css", "/login"])
def test_every_answer_has_the_headers_and_nothing_inline(visit: Visitor, path: str) -> None:
    answer = visit.get(path)
    for name, value in HEADERS.items():
        assert answer.headers[name] == value
    assert not re.search(
        r"<style|\sstyle=|<script(?! src)|\son[a-z]+=|javascript:|https?://(?!127)", answer.text
    )


def test_the_overview_says_how_it_is_and_what_is_to_be_done(visit: Visitor) -> None:
    text = visit.get("/").text
    for said in (
        "A training is under way.",
        "60 of 80 rounds are done.",
        "The league's directory, version 7, ends in 8 days.",
        "A merchant broke the protocol.",
        "Round 61 of 80.",
        "7 of 11",
        "hanse-server publish 4",
        "11 of 12 merchants are there; rowan is missing.",
    ):
        assert said in text, said
    assert text.index("broke the protocol") < text.index("A training is under way.")  # alerts first
    parts = visit.get("/live").text
    for name in ("alerts", "state", "tiles", "block", "next", "lines", "as-of"):
        assert f'id="{name}"' in text
        assert f'id="{name}"' in parts


def test_rounds_say_who_was_there(story: Story, visit: Visitor) -> None:
    text = visit.get("/rounds").text
    rounds = Reader(story.state).rounds(story.plan.digest.hex(), 50)
    found = {one.name: one for one in reliability(rounds)}
    assert set(found) == set(NAMES)
    for name in NAMES:
        row = re.search(rf"<bdi>{name}</bdi></th>(.*?)</tr>", text)
        assert row
        assert f'aria-label="{found[name].counts["uploaded"]} of {found[name].asked} uploaded"' in row[1]
    assert found["fir"].counts["declined"] > 5
    assert found["elm"].counts["blamed"] == 1
    assert "sent another plan&#39;s update" in text


def test_what_is_read_is_bounded(story: Story) -> None:
    reader, plan = Reader(story.state), story.plan.digest.hex()
    assert [one.number for one in reader.rounds(plan, 5)] == [56, 57, 58, 59, 60]
    assert len(reader.blocks(plan, 2)) == 2
    entries = reader.audit(7)
    assert len(entries) == 7
    assert entries[0].sequence > entries[-1].sequence


def test_figures_are_those_of_the_report_with_their_intervals(story: Story, visit: Visitor) -> None:
    text = visit.get("/figures").text
    reader = Reader(story.state)
    tried = reader.evaluations(story.plan.digest.hex())
    assert [one.after for one in tried] == [15, 30, 45, 60]
    report = reader.report(tried[-1].number)
    for figure in (report.accuracy, report.macro_f1):
        assert figure
        assert f"{100 * figure.value:.1f} %" in text
        assert f"{100 * figure.low:.1f} to {100 * figure.high:.1f}" in text
    for number, name in enumerate(CLASSES):
        assert f"<bdi>{name}</bdi>" in text
        assert f">{round(report.confusion[number][number].value)}</td>" in text
    first = visit.get(f"/figures?number={tried[0].number}&of=3").text
    assert "Shown is the model after round 15" in first
    assert f"In front: {CLASSES[3]}" in first


@pytest.mark.parametrize(
    "query", ["number=0", "number=999", "number=x", "of=10", "of=-1", "of=99999", "number=1&of="]
)
def test_figures_that_are_none_are_not_found(visit: Visitor, query: str) -> None:
    answer = visit.get(f"/figures?{query}")
    assert answer.status_code == 404
    assert "There is no such page" in answer.text


def test_a_league_of_many_classes_gets_a_matrix_that_can_be_read() -> None:
    classes = CLASSES_SHOWN + 5
    photo, none = Count(value=3, low=1, high=8), Count(value=0, low=0, high=5)
    rows = tuple(
        tuple(photo if row == column else none for column in range(classes)) for row in range(classes)
    )
    few = ClassReport(support=none, precision=None, recall=None, f1=None, auc=None, roc=())
    many = few.model_copy(update={"support": photo})
    names = ("accuracy", "macro_precision", "macro_recall", "macro_f1", "macro_auc", "log_loss",
             "expected_calibration_error", "overconfidence")  # fmt: skip
    figures: dict[str, Any] = dict.fromkeys(names)
    report = FederatedReport(
        unit="photo", merchants=9, photos=photo, confusion=rows, reliability=(),
        per_class=(few,) * 5 + (many,) * CLASSES_SHOWN, **figures,
    )  # fmt: skip
    found = matrix(report, [str(number) for number in range(classes)])
    assert found
    assert found["rows"] == [str(number) for number in range(5, classes)]
    assert {len(row) for row in found["counts"]} == {CLASSES_SHOWN + 1}
    assert (found["others"], found["spread"]) == (5, 5)


def test_the_promise_what_was_said_and_what_was_seen(story: Story, visit: Visitor) -> None:
    text = visit.get("/privacy").text
    assert f"ε = {told(story.plan.epsilon())}" in text
    assert f">{told(story.evaluation.epsilon())}</td>" in text
    assert "6 merchants let you know" in text
    for name in NAMES[::2]:
        assert f"<bdi>{name}</bdi>" in text
    assert text.count('src="data:image/png;base64,') == 2
    assert "Whatever cedar learned" in text


@pytest.mark.parametrize(
    ("epsilon", "expected"), [(1.0, "1"), (2.00001, "2.001"), (0.1 + 0.2, "0.3"), (None, None)]
)
def test_epsilon_is_told_upward(epsilon: float | None, expected: str | None) -> None:
    assert told(epsilon) == expected
    assert told(float("inf")) is None


def test_versions_name_the_command_and_the_reason(visit: Visitor) -> None:
    text = visit.get("/versions").text
    for said in (
        "hanse-server publish 4",
        "hanse-server rollback 2",
        "better shoes",
        ">released<",
        ">candidate<",
    ):
        assert said in text
    assert "rollback 3" not in text  # it is the league's now


def test_the_audit_logs_head_is_in_words(story: Story, visit: Visitor) -> None:
    text = visit.get("/audit").text
    (newest,) = story.state.audit.latest(1)
    assert f">{newest.sequence} " in text
    assert len(re.findall(r'<td class="time" lang="en">', text)) == 50


def test_without_the_training_process_the_records_speak_alone(story: Story) -> None:
    alone = visitor(story.state, None)
    for path in PATHS:
        assert alone.get(path).status_code == 200
    text = alone.get("/").text
    assert "60 of 80 rounds are done." in text
    assert "cannot see what goes on at this moment" in text
    assert "data:image" not in alone.get("/privacy").text
    assert alone.get("/metrics").status_code == 404  # zeros would be lies


def test_names_and_reasons_that_are_markup_stay_text(tmp_path: Path) -> None:
    teller = Story(tmp_path / "hostile", time.time(), rounds=2, every=99)
    teller.tell(blamed=MARKUP)
    state = teller.state
    made = state.versions.find("latest")
    signed, number = sign_release(made, state.versions, KEY, "textiles", MARKUP[:200])
    state.versions.release(made.digest, signed, number, MARKUP[:200], back=False)
    state.audit.append("note", **{MARKUP[:30]: MARKUP})
    state.history.spent(MARKUP[:60], 1.0)
    with state.database.transaction() as session:
        for role in ("uploaded", "dropped", "declined", "blamed"):
            name = f"{role[:2]}{MARKUP}"[:63]
            session.add(
                ParticipantRecord(plan=teller.plan.digest.hex(), round=1, name=name, role=role, detail=MARKUP)
            )
    state.history.end_run(1, "failed", f"{MARKUP} Before: {MARKUP}")
    live = Live()
    live.note(phase="training", trip=MARKUP, connected=(MARKUP,))
    live.line(0.0, MARKUP, f"Before: {MARKUP}")
    live.line(0.0, "round", f" Before: {MARKUP}")
    live.watch(MARKUP, teller.live().snapshot().seen.upload)  # type: ignore[arg-type]
    live.watch("", teller.live().snapshot().seen.total)  # type: ignore[arg-type]
    visit = visitor(state, live)
    shown = 0
    for _ in range(2):
        for path in (*PATHS, "/live"):
            text = visit.get(path).text
            assert "<script>" not in text
            assert "<img src=x" not in text
            shown += text.count("&lt;script&gt;alert(1)")
        in_chinese(visit)
    assert shown > 20
    state.database.close()


# -- what a monitor asks ------------------------------------------------------------------------------------------


def test_metrics_are_for_the_token_alone(story: Story, live: Live) -> None:
    stranger = Visitor(application(story.state, live, Metrics(story.state.folder), TOKEN.encode(), port=PORT))
    assert stranger.get("/metrics").status_code == 401
    answer = stranger.bearer()
    assert answer.headers["content-type"] == CONTENT_TYPE
    assert "hanse_build_info" in answer.text
    assert "hanse_state_free_bytes" in answer.text


def test_health_and_readiness_say_one_word_to_anybody(empty: State, monkeypatch: pytest.MonkeyPatch) -> None:
    up = True
    app = application(empty, Live(), None, TOKEN.encode(), port=PORT, ready=lambda: up)
    stranger = Visitor(app)
    assert (stranger.get("/health").text, stranger.get("/ready").text) == ("ok\n", "ready\n")
    up = False
    assert stranger.get("/ready").text == "ready\n"  # found out once a second, whoever asks how often
    monkeypatch.setattr(pages, "READY_SECONDS", 0.0)
    answer = stranger.get("/ready")
    assert (answer.status_code, answer.text) == (503, "not ready\n")
    assert stranger.get("/health").text == "ok\n"


def test_a_database_that_is_gone_is_not_ready_and_is_told(empty: State) -> None:
    visit = visitor(empty, Live())
    empty.database.close()
    (empty.folder / "hanse.sqlite").write_bytes(b"no database" * 1000)
    for path in empty.folder.glob("hanse.sqlite-*"):
        path.unlink()
    assert visit.get("/ready").text == "not ready\n"
    answer = visit.get("/rounds")
    assert answer.status_code == 503
    assert "That did not work" in answer.text


@pytest.mark.parametrize("host", ["evil.example", "evil.example:9094", "127.0.0.2"])
def test_a_page_under_another_name_is_not_served(visit: Visitor, host: str) -> None:
    cookies = "; ".join(f"{name}={value}" for name, value in visit.cookies.items())
    for path in ("/", "/health", "/metrics"):
        headers = {"Host": host, "Cookie": cookies, "Authorization": f"Bearer {TOKEN}"}
        assert visit.get(path, headers=headers).status_code == 421


def test_nothing_can_be_changed(visit: Visitor) -> None:
    for path in (*PATHS, "/metrics", "/health"):
        for method in ("POST", "PUT", "DELETE", "PATCH"):
            assert visit.ask(method, path, headers=FORM).status_code == 405
    text = "".join(visit.get(path).text for path in PATHS)
    assert set(re.findall(r'<form method="(\w+)" action="([^"]+)"', text)) == {
        ("post", "/language"),
        ("post", "/logout"),
    }
    assert visit.get("/docs").status_code == visit.get("/openapi.json").status_code == 404


def test_the_pages_own_style_uses_the_themes_colours() -> None:
    css = STYLE.read_text()
    assert re.findall(r"#[0-9a-fA-F]{3,8}\b|rgba?\(|hsla?\(|url\(|@import", css) == []
    theme = (STATIC / "theme.css").read_text()
    for name in re.findall(r"var\((--[\w-]+)\)", css):
        assert f"{name}:" in theme


# -- a person at a real browser -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def origin(story: Story, live: Live) -> Iterator[str]:
    with listen(0) as listening:
        port = listening.getsockname()[1]
        app = application(story.state, live, Metrics(story.state.folder), TOKEN.encode(), port=port)
        with serving(app, listening):
            yield f"http://127.0.0.1:{port}"


def test_a_person_at_the_page(browser: Any, origin: str) -> None:
    ada = Person(browser, origin)
    ada.page.goto(f"{origin}/figures")
    assert ada.page.url == f"{origin}/login"
    ada.look("login")
    ada.log_in()
    ada.look("overview")
    for place in ("Rounds", "Figures", "Privacy", "Versions", "Audit log"):
        ada.follow(place)
        assert ada.page.inner_text("h1") == place
        ada.look(place.lower())
    ada.press("中文")
    ada.follow("概览")
    ada.look("zh-overview")
    ada.press("退出")
    assert ada.page.url == f"{origin}/login"
    ada.page.goto(f"{origin}/rounds")
    assert ada.page.url == f"{origin}/login"
    assert ada.complaints == []


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "width"), [("dark", 1000), ("light", 400), ("dark", 400)])
def test_every_page_in_other_windows_and_both_languages(
    browser: Any, origin: str, scheme: str, width: int
) -> None:
    ada = Person(browser, origin, viewport={"width": width, "height": 800}, color_scheme=scheme)
    ada.log_in()
    for language in ("en", "zh"):
        for path in PATHS:
            ada.page.goto(f"{origin}{path}")
            ada.look(f"{language}-{scheme}-{width}-{path[1:] or 'overview'}")
        if language == "en":
            ada.press("中文")
    assert ada.complaints == []


@pytest.mark.slow
def test_a_wrong_token_is_told(browser: Any, origin: str) -> None:
    ada = Person(browser, origin)
    ada.page.goto(origin)
    ada.page.get_by_label("Admin token").fill("wrong")
    ada.press("Log in")
    assert "This is not the token." in ada.text()
    assert ada.page.get_attribute("#token", "aria-invalid") == "true"
    ada.look("wrong")
    assert [one for one in ada.complaints if "403" not in one] == []  # Chromium tells of the slip


@pytest.mark.slow
def test_it_keeps_itself_up_to_date(browser: Any, story: Story) -> None:
    live = story.live()
    with listen(0) as listening:
        port = listening.getsockname()[1]
        app = application(story.state, live, None, TOKEN.encode(), port=port)
        with serving(app, listening):
            ada = Person(browser, f"http://127.0.0.1:{port}")
            ada.log_in()
            live.trip("upload", 11, 11)
            live.trip("agreed", 3, 11)
            ada.page.locator("#block").get_by_text("3 of 11").wait_for()
            assert ada.page.get_attribute("#alerts", "aria-live") == "polite"
            ada.page.get_by_role("link", name="Look at its figures").focus()  # what the keyboard is in stays
            ada.page.wait_for_timeout(3500)
            assert ada.page.evaluate("document.activeElement.innerText") == "Look at its figures"
            assert ada.complaints == []
            ada.context.clear_cookies()  # the session is gone
            ada.page.get_by_text("This page is no longer kept up to date.").wait_for()
            ada.look("stale")


@pytest.mark.slow
def test_without_scripts(browser: Any, origin: str) -> None:
    ada = Person(browser, origin, java_script_enabled=False, color_scheme="dark")
    ada.log_in()
    assert "This page loads itself again every half minute." in ada.text()
    assert "no longer kept up to date" not in ada.text()
    ada.press("中文")
    assert "训练正在进行。" in ada.text()
    ada.press("退出")
    assert ada.page.url == f"{origin}/login"
    assert ada.complaints == []


@pytest.mark.slow
def test_by_keyboard_alone(browser: Any, origin: str) -> None:
    ada = Person(browser, origin)
    ada.page.goto(origin)
    ada.page.keyboard.press("Tab")  # to the token: the name beside it is for password managers
    ada.page.keyboard.type(TOKEN)
    ada.page.keyboard.press("Enter")
    ada.page.wait_for_url(f"{origin}/")

    ada.tab_to("To the content")
    ada.page.keyboard.press("Enter")
    ada.tab_to("Look at its figures")
    ada.page.keyboard.press("Enter")
    ada.page.get_by_role("heading", name="Figures", exact=True).wait_for()
    ada.tab_to("All evaluations as a table")
    ada.page.keyboard.press("Enter")
    ada.tab_to("Evaluation 1")
    ada.page.keyboard.press("Enter")
    ada.page.get_by_text("Shown is the model after round 15").wait_for()
    ada.tab_to("Log out")
    ada.page.keyboard.press("Enter")
    ada.page.wait_for_url(f"{origin}/login")
    assert ada.complaints == []
