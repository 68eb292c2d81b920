"""A month's receipt: against the ledger as it was at the time, and against forgers."""

import html
import json
import sqlite3
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from hanse_client import cli, receipt
from hanse_client.charges import Budget, Charge, Spent
from hanse_client.config import LeagueSettings
from hanse_client.explanation import posterior_bound
from hanse_client.ledger import Ledger, genesis
from hanse_client.receipt import BYTES_A_NUMBER, DayLine, Receipt, differences, page, read
from hanse_common.errors import ConfigError, LedgerError, WireError
from hanse_common.privacy.mechanism import Mechanism
from hanse_common.secagg import ring
from hanse_common.web.pages import save

BUDGET = Budget(epsilon=3.0, delta=1e-4)
STEPWISE = replace(BUDGET, accounting="rdp-8")
NOW = datetime(2024, 6, 1, tzinfo=UTC)
KEYS = {
    name: f"{number:02x}" * 32
    for number, name in enumerate(LeagueSettings.model_fields, 1)
    if name != "taxonomy"
}

DAYS = {  # (plan, round, attempt) charged on each day
    "2024-03-30": [(1, 0, 0), (1, 1, 0)],
    "2024-03-31": [(1, 2, 0)],
    "2024-04-01": [(1, 3, 0), (2, 0, 0), (2, 1, 0)],
    "2024-04-02": [(2, 1, 1), (2, 2, 0)],
    "2024-05-31": [(2, 3, 0)],
}


def charge(plan: int, round_: int, attempt: int) -> Charge:
    mechanism = Mechanism(0.5, 1000 * plan, 8.0, 0.1, steps=4, shares=plan)
    return Charge(bytes([plan]) * 32, round_, attempt, mechanism, plan_steps=40, delta=1e-5)


def fill(path: Path, budget: Budget, days: dict[str, list[tuple[int, int, int]]]) -> dict[str, Spent]:
    """Charge a ledger day by day, and return what it said was spent at the end of each."""
    clock = [NOW]
    ledger = Ledger(path, budget, now=lambda: clock[0])
    spent = {}
    for day, charges in days.items():
        for hour, each in enumerate(charges):
            clock[0] = datetime.fromisoformat(f"{day}T{hour:02}:00:00+00:00")
            spent[day] = ledger.charge(charge(*each))
    return spent


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "ledger.sqlite"


@pytest.fixture(params=[BUDGET, STEPWISE], ids=["sum", "rdp-8"])
def budget(request: pytest.FixtureRequest) -> Budget:
    found: Budget = request.param
    return found


def april(ledger: Ledger, **changes: Any) -> Receipt:
    return Receipt.of(ledger, "2024-04", language="en", now=NOW).model_copy(update=changes)


# What it says


def test_a_month_costs_what_the_ledger_said_at_the_time(path: Path, budget: Budget) -> None:
    spent = fill(path, budget, DAYS)
    ledger = Ledger(path, budget)
    found = april(ledger)
    assert (found.epsilon_before, found.delta_before) == (
        spent["2024-03-31"].epsilon,
        spent["2024-03-31"].delta,
    )
    assert (found.epsilon_after, found.delta_after) == (
        spent["2024-04-02"].epsilon,
        spent["2024-04-02"].delta,
    )
    assert found.epsilon_after > found.epsilon_before > 0
    events = list(ledger.events())
    assert (found.start.number, found.start.hash) == (3, events[2].hash.hex())
    assert (found.end.number, found.end.hash) == (8, events[7].hash.hex())
    may = Receipt.of(ledger, "2024-05", language="en", now=NOW)
    assert may.start == found.end
    assert may.epsilon_after == ledger.spent().epsilon


def test_rounds_by_plan_and_day(path: Path) -> None:
    fill(path, BUDGET, DAYS)
    found = april(Ledger(path, BUDGET))
    assert [(line.plan[:2], line.rounds, line.charges, line.numbers, line.steps) for line in found.plans] == [
        ("01", 1, 1, 1000, 4),
        ("02", 3, 4, 2000, 16),
    ]
    assert [(line.day, line.plan[:2], line.first, line.last, line.charges) for line in found.days] == [
        ("2024-04-01", "01", 4, 4, 1),
        ("2024-04-01", "02", 1, 2, 2),
        ("2024-04-02", "02", 2, 3, 2),
    ]
    assert (found.rounds, found.charges) == (4, 5)
    assert found.bytes == BYTES_A_NUMBER * (1000 + 4 * 2000)
    assert found.in_shares
    assert not Receipt.of(Ledger(path, BUDGET), "2024-03", language="en", now=NOW).in_shares


def test_an_upload_has_as_many_bytes_as_it_says() -> None:
    assert len(ring.to_bytes(np.zeros(7, dtype=np.uint32))) == 7 * BYTES_A_NUMBER


def test_a_month_without_a_round(path: Path) -> None:
    fill(path, BUDGET, {"2024-03-30": [(1, 0, 0)]})
    found = april(Ledger(path, BUDGET))
    assert found.plans == found.days == ()
    assert found.start == found.end
    assert found.epsilons[1] == "0"
    assert "You took part in no round of this month." in page(found)
    assert differences(found, Ledger(path, BUDGET)) == ()


def test_an_empty_ledger(path: Path, budget: Budget) -> None:
    found = april(Ledger(path, budget))
    assert found.start == found.end
    assert (found.end.number, found.end.hash) == (0, genesis(budget).hex())
    assert found.epsilon_after == 0
    assert "Nothing was ever charged" in page(found)
    assert differences(found, Ledger(path, budget)) == ()


def test_a_clock_that_was_set_back_changes_no_month_that_is_over(path: Path) -> None:
    fill(path, BUDGET, {"2024-04-30": [(1, 0, 0)], "2024-05-01": [(1, 1, 0)]})
    before = april(Ledger(path, BUDGET))
    fill(path, BUDGET, {"2024-04-29": [(1, 2, 0)]})
    ledger = Ledger(path, BUDGET)
    assert april(ledger) == before
    assert Receipt.of(ledger, "2024-05", language="en", now=NOW).charges == 2
    assert differences(before, ledger) == ()


def test_no_promise_is_no_number(path: Path) -> None:
    """With a δ that is less than what the mechanism may fail by."""
    fill(path, STEPWISE, DAYS)
    ledger = Ledger(path, replace(STEPWISE, delta=1e-30))
    found = april(ledger)
    assert found.epsilon_after is found.suspicion is None
    assert found.epsilons == (None, None, None)
    assert "Nothing can be promised" in page(found)
    assert differences(found, ledger) == ()


def test_it_says_in_plain_words_what_that_means(path: Path) -> None:
    fill(path, BUDGET, DAYS)
    found = april(Ledger(path, BUDGET))
    bound = 100 * posterior_bound(found.epsilon_after or 0, 0.01)
    assert found.suspicion is not None
    assert bound <= float(found.suspicion) <= 1.1 * bound
    text = page(found)
    assert f"can become at most {found.suspicion} %" in text
    assert f"about 1 in {1 / found.delta_after:,.0f}" in text
    assert found.end.hash in text
    chinese = page(found.model_copy(update={"language": "zh"}))
    assert '<html lang="zh-Hans">' in chinese
    assert f"最多升到 {found.suspicion} %" in chinese


@pytest.mark.parametrize(
    ("now", "said"), [("2024-04-20T00:00:00+00:00", True), ("2024-05-01T00:00:00+00:00", False)]
)
def test_a_month_that_is_not_over_says_so(path: Path, now: str, said: bool) -> None:
    fill(path, BUDGET, DAYS)
    made = Receipt.of(Ledger(path, BUDGET), "2024-04", language="en", now=datetime.fromisoformat(now))
    assert ("This month is not over." in page(made)) is said


# Checking


def test_it_is_read_again_as_it_was(path: Path, tmp_path: Path) -> None:
    fill(path, BUDGET, DAYS)
    for language in ("en", "zh"):
        made = april(Ledger(path, BUDGET), language=language)
        save(tmp_path / language, page(made))
        assert (tmp_path / language).stat().st_mode & 0o777 == 0o600
        assert read(tmp_path / language) == (made, True)
        assert differences(made, Ledger(path, BUDGET)) == ()


def test_a_ledger_that_has_gone_on_still_agrees(path: Path, budget: Budget) -> None:
    days = list(DAYS.items())
    fill(path, budget, dict(days[:4]))
    made = april(Ledger(path, budget))
    fill(path, budget, {"2024-06-03": [(2, 3, 0), (2, 4, 0)]})
    assert differences(made, Ledger(path, budget)) == ()
    larger = replace(budget, epsilon=5.0, delta=1e-3)
    assert differences(made, Ledger(path, larger)) == (), "the policy may allow more since"


def test_a_month_that_has_gone_on_still_agrees(path: Path) -> None:
    days = list(DAYS.items())
    fill(path, BUDGET, dict(days[:3]))
    made = Receipt.of(
        Ledger(path, BUDGET), "2024-04", language="en", now=datetime(2024, 4, 1, 12, tzinfo=UTC)
    )
    fill(path, BUDGET, dict(days[3:]))
    assert made.charges == 3
    assert differences(made, Ledger(path, BUDGET)) == ()


def changed(line: Any, **changes: Any) -> Any:
    return line.model_copy(update=changes)


FORGERIES: list[tuple[str, Callable[[Receipt], dict[str, Any]]]] = [
    ("epsilon_before", lambda r: {"epsilon_before": r.epsilon_before * 0.9}),
    ("epsilon_after", lambda r: {"epsilon_after": r.epsilon_after - 1e-4}),
    ("epsilon_after", lambda r: {"epsilon_after": None}),
    ("delta_after", lambda r: {"delta_after": r.delta_after / 2}),
    ("in_shares", lambda r: {"in_shares": False}),
    ("start.number", lambda r: {"start": changed(r.start, number=2)}),
    ("start.hash", lambda r: {"start": changed(r.start, hash="0" * 64)}),
    ("end.hash", lambda r: {"end": changed(r.end, number=7)}),
    ("end.hash", lambda r: {"end": changed(r.end, hash="0" * 64)}),
    ("start.number", lambda r: {"month": "2024-03"}),
    ("plans", lambda r: {"plans": r.plans[:1]}),
    ("plans[1].charges", lambda r: {"plans": (r.plans[0], changed(r.plans[1], charges=3))}),
    ("plans[1].rounds", lambda r: {"plans": (r.plans[0], changed(r.plans[1], rounds=2))}),
    ("plans[0].numbers", lambda r: {"plans": (changed(r.plans[0], numbers=10), r.plans[1])}),
    ("plans[0].steps", lambda r: {"plans": (changed(r.plans[0], steps=0), r.plans[1])}),
    ("plans[0].plan", lambda r: {"plans": (changed(r.plans[0], plan="0" * 64), r.plans[1])}),
    ("days", lambda r: {"days": r.days[1:]}),
    ("days[0].day", lambda r: {"days": (changed(r.days[0], day="2024-04-09"), *r.days[1:])}),
    ("days[0].charges", lambda r: {"days": (changed(r.days[0], charges=0), *r.days[1:])}),
    ("days[1].last", lambda r: {"days": (r.days[0], changed(r.days[1], last=9), *r.days[2:])}),
]


@pytest.mark.parametrize(
    ("field", "forge"), FORGERIES, ids=[f"{n}-{field}" for n, (field, _) in enumerate(FORGERIES)]
)
def test_a_forged_figure_is_named(path: Path, field: str, forge: Callable[[Receipt], dict[str, Any]]) -> None:
    """By a forger who makes the page anew around it."""
    fill(path, BUDGET, DAYS)
    ledger = Ledger(path, BUDGET)
    true = april(ledger)
    found = differences(true.model_copy(update=forge(true)), ledger)
    assert field in {line.partition(":")[0] for line in found}


def test_a_forged_budget_changes_what_a_stepwise_ledger_has_spent(path: Path) -> None:
    fill(path, STEPWISE, DAYS)
    ledger = Ledger(path, STEPWISE)
    assert differences(april(ledger, budget_delta=1e-6), ledger)


def test_rows_that_are_gone_are_told(path: Path, tmp_path: Path) -> None:
    fill(path, BUDGET, DAYS)
    made = april(Ledger(path, BUDGET))
    shorter = tmp_path / "shorter.sqlite"
    fill(shorter, BUDGET, dict(list(DAYS.items())[:3]))
    (line,) = differences(made, Ledger(shorter, BUDGET))
    assert "counts 8 entries, the ledger has 6" in line
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        schema = db.execute("SELECT sql FROM sqlite_schema WHERE name = 'charge_never_deleted'").fetchone()[0]
        db.execute("DROP TRIGGER charge_never_deleted")
        db.execute("DELETE FROM charge WHERE number = 5")
        db.execute(schema)
    with pytest.raises(LedgerError, match="row 5 is missing"):
        Ledger(path, BUDGET)


def test_another_ledger_is_told(path: Path, tmp_path: Path) -> None:
    fill(path, BUDGET, DAYS)
    made = april(Ledger(path, BUDGET))
    other = tmp_path / "other.sqlite"
    fill(other, BUDGET, {"2024-03-29": DAYS["2024-03-30"], **dict(list(DAYS.items())[1:])})
    lines = differences(made, Ledger(other, BUDGET))
    assert {line.partition(":")[0] for line in lines} == {"start.hash", "end.hash"}
    fill(tmp_path / "stepwise.sqlite", STEPWISE, DAYS)
    (line,) = differences(made, Ledger(tmp_path / "stepwise.sqlite", STEPWISE))
    assert line.startswith("another ledger: the receipt is of one by sum")


def test_an_entry_that_was_left_out_is_told(path: Path) -> None:
    """Of a receipt that ends before the month's last entry, though it is made after that."""
    fill(path, BUDGET, DAYS)
    ledger = Ledger(path, BUDGET)
    early = Receipt._made(
        list(ledger.events())[:6], BUDGET, "2024-04", "en", "2024-04-01T12:00:00+00:00", receipt.RELEASE
    )
    assert differences(early, ledger) == ()
    late = early.model_copy(update={"made": "2024-06-01T00:00:00+00:00"})
    assert differences(late, ledger) == (
        "entry 7 of this month is not in the receipt, but dated 2024-04-02T00:00:00+00:00, before it was made.",
    )


def test_a_page_that_was_edited_is_not_the_one_made(path: Path, tmp_path: Path) -> None:
    fill(path, BUDGET, DAYS)
    made = april(Ledger(path, BUDGET))
    edited = page(made).replace(f"<dd>{made.epsilons[2]}</dd>", "<dd>0.1</dd>")
    assert edited != page(made)
    (tmp_path / "edited.html").write_text(edited)
    assert read(tmp_path / "edited.html") == (made, False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: "", "found 0 records"),
        (lambda text: text + text, "found 2 records"),
        (lambda text: text.replace("sum", "best"), "accounting"),
        (lambda text: text.replace("2024-04&#34;", "2024-13&#34;"), "month"),
        (lambda text: text.replace("&#34;month&#34;", "&#34;mond&#34;"), "faults"),
        (lambda text: text.replace("&#34;start&#34;", "&#34;start&#34;: 3, &#34;x&#34;"), "start"),
        (lambda text: text.replace('<pre id="record">{', '<pre id="record">' + "[" * 100_000), "record"),
        (
            lambda text: text.replace(
                "&#34;epsilon_after&#34;: ", "&#34;epsilon_after&#34;: 1e999, &#34;y&#34;: "
            ),
            "epsilon",
        ),
    ],
)
def test_what_is_no_receipt_is_refused(
    path: Path, tmp_path: Path, change: Callable[[str], str], message: str
) -> None:
    fill(path, BUDGET, DAYS)
    (tmp_path / "file.html").write_text(change(page(april(Ledger(path, BUDGET)))), encoding="utf-8")
    with pytest.raises(WireError, match=message):
        read(tmp_path / "file.html")


@pytest.mark.parametrize(
    "extreme",
    [
        {"delta_after": 0.0},
        {"delta_after": 5e-324},
        {"epsilon_after": 5e-324, "epsilon_before": 0.0},
        {"epsilon_after": 1e308, "epsilon_before": 1e308},
        {"epsilon_before": 1e308},
        {"budget_epsilon": 5e-324},
        {
            "made": "<script>",
            "days": (DayLine(day="<b>", plan="0" * 64, first=9, last=0, charges=(1 << 53) - 1),),
        },
    ],
)
def test_extreme_figures_are_read_and_differ(path: Path, tmp_path: Path, extreme: dict[str, Any]) -> None:
    fill(path, BUDGET, DAYS)
    ledger = Ledger(path, BUDGET)
    forged = april(ledger, **extreme)
    save(tmp_path / "forged.html", page(forged))
    assert read(tmp_path / "forged.html") == (forged, True)
    assert differences(forged, ledger) or "budget_epsilon" in extreme
    assert "<script>" not in page(forged)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read(tmp_path / "missing")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(WireError, match="UTF-8"):
        read(tmp_path / "bytes")
    (tmp_path / "large").write_bytes(b" " * (receipt.MAX_BYTES + 1))
    with pytest.raises(ConfigError, match="more than"):
        read(tmp_path / "large")


# The command


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Return a function that calls the command in the shop's folder."""
    league = KEYS | {"taxonomy": {"classes": ["shirt", "shoe"]}}
    policy = {"league": "test", "epsilon": 3.0, "delta": 1e-4}
    config = {"photos": "photos", "state": "state", "league": league, "policy": policy}
    (tmp_path / "hanse-client.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["hanse-client", "receipt", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capfd.readouterr()
        return int(caught.value.code or 0), captured.out, captured.err

    return run


def test_the_command_writes_and_verifies(run: Run, path: Path, tmp_path: Path) -> None:
    fill(path, BUDGET, DAYS)
    code, out, _ = run("--month", "2024-04")
    assert code == 0
    assert out.startswith("Wrote receipt-2024-04.html. 2024-04: rounds 4, uploads at most 5; ε ")
    file = tmp_path / "receipt-2024-04.html"
    assert file.stat().st_mode & 0o777 == 0o600
    code, out, _ = run("--verify", "receipt-2024-04.html")
    assert code == 0
    assert "receipt-2024-04.html agrees with the ledger." in out
    assert "gone on since: 1 more entry." in out
    assert run("--out", "last.html")[1].startswith("Wrote last.html. 2024-05: rounds 1,")
    assert run("--month", "2024-04", "--out", "zh.html", "--language", "zh")[0] == 0
    assert run("--verify", "zh.html")[0] == 0


def test_the_command_tells_what_differs(run: Run, path: Path, tmp_path: Path) -> None:
    fill(path, BUDGET, DAYS)
    true = april(Ledger(path, BUDGET))
    save(tmp_path / "forged.html", page(true.model_copy(update={"epsilon_after": 0.1})))
    code, out, err = run("--verify", "forged.html")
    assert (code, out) == (13, "")
    assert err.startswith("error: forged.html: epsilon_after: the receipt says 0.1, the ledger gives ")
    edited = page(true).replace(f"<dd>{true.epsilons[2]}</dd>", "<dd>0.1</dd>")
    (tmp_path / "edited.html").write_text(edited)
    code, _, err = run("--verify", "edited.html")
    assert code == 13
    assert "it was edited" in err


def test_a_receipt_of_another_release_is_checked_by_its_record(run: Run, path: Path, tmp_path: Path) -> None:
    fill(path, BUDGET, DAYS)
    old = april(Ledger(path, BUDGET), release="0.0.1")
    (tmp_path / "old.html").write_text(page(old).replace("</body>", "<p>Looks otherwise.</p></body>"))
    code, out, _ = run("--verify", "old.html")
    assert code == 0
    assert "made by release 0.0.1, so only its record was checked" in out
    assert f"{old.epsilons[2]} after it" in out


def test_the_record_is_json_that_anyone_can_read(run: Run, path: Path, tmp_path: Path) -> None:
    fill(path, BUDGET, DAYS)
    run("--month", "2024-04")
    text = (tmp_path / "receipt-2024-04.html").read_text(encoding="utf-8")
    record = json.loads(html.unescape(text.split('<pre id="record">')[1].split("</pre>")[0]))
    assert record["end"]["number"] == 8
    assert record["epsilon_after"] == april(Ledger(path, BUDGET)).epsilon_after


@pytest.mark.parametrize("month", ["2024-13", "2024", "2024-4", "9999-01", "../../x"])
def test_months_that_are_none(run: Run, path: Path, tmp_path: Path, month: str) -> None:
    fill(path, BUDGET, DAYS)
    code, _, err = run("--month", month)
    assert code == 10
    assert "--month: found" in err
    assert not list(tmp_path.glob("*.html"))


def test_nothing_is_overwritten(run: Run, path: Path, tmp_path: Path) -> None:
    fill(path, BUDGET, DAYS)
    (tmp_path / "mine.html").write_text("mine")
    code, _, err = run("--out", "mine.html")
    assert code == 10
    assert "there is a file already" in err
    assert (tmp_path / "mine.html").read_text() == "mine"


def test_without_a_ledger(run: Run, path: Path, tmp_path: Path) -> None:
    code, out, _ = run()
    assert code == 0
    assert "no ledger yet" in out
    fill(path, BUDGET, DAYS)
    run("--out", "receipt.html")
    path.unlink()
    code, _, err = run("--verify", "receipt.html")
    assert code == 13
    assert "no ledger yet" in err
    assert not path.exists()
