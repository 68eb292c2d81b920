"""The ledger against dp-accounting, against a plain model, and against damage, locks and other processes."""

import functools
import hashlib
import itertools
import math
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from dp_accounting.pld import privacy_loss_distribution
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from hanse_client.charges import UNITS, Account, Budget, Charge
from hanse_client.ledger import _INSERT, APPLICATION_ID, Ledger, Repeated, _hash, genesis
from hanse_common.errors import BudgetExceeded, HanseError, LedgerError
from hanse_common.privacy.mechanism import Mechanism

BUDGET = Budget(epsilon=3.0, delta=1e-4)
STEPWISE = Budget(epsilon=3.0, delta=1e-4, accounting="rdp-8")
PRODUCTS = Budget(epsilon=3.0, delta=1e-4, unit="product")
PLAN_STEPS = 40
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108


def charge(plan=0, round_=0, attempt=0, *, steps=4, plan_steps=PLAN_STEPS, noise=4.0, delta=1e-5, **other):
    mechanism = Mechanism(
        clipping_norm=other.pop("clipping_norm", 0.5),
        dimension=1000,
        noise_multiplier=noise,
        sampling_rate=other.pop("sampling_rate", 0.1),
        steps=steps,
        shares=other.pop("shares", 1),
    )
    digest = bytes([plan]) * 32
    return Charge(digest, round_, attempt, mechanism, plan_steps, delta, **other)


@functools.cache
def epsilon(noise=4.0, sampling_rate=0.1, steps=PLAN_STEPS, delta=1e-5) -> float:
    """ε of continuous noise, straight from dp-accounting."""
    one_step = privacy_loss_distribution.from_gaussian_mechanism(
        noise, value_discretization_interval=1e-4, sampling_prob=sampling_rate
    )
    return one_step.self_compose(steps).get_epsilon_for_delta(delta)


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "shop" / "ledger.sqlite"


@pytest.fixture
def ledger(path) -> Ledger:
    return Ledger(path, BUDGET)


@contextmanager
def raw(path: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        yield db


# What is counted


def test_a_plan_costs_what_dp_accounting_says_of_all_its_steps(ledger):
    spent = ledger.charge(charge(steps=1))
    assert spent.epsilon == pytest.approx(epsilon(), rel=2e-3)
    assert spent.epsilon >= epsilon() * (1 - 1e-9)
    assert spent.delta == 1e-5
    assert ledger.spent() == spent


def test_plans_add_up_each_with_its_own_noise_and_its_delta_once(ledger):
    ledger.charge(charge(plan=1))
    ledger.charge(charge(plan=2, noise=8.0, delta=1e-6))
    ledger.charge(charge(plan=1, round_=1))
    spent = ledger.charge(charge(plan=2, round_=1, noise=8.0, delta=1e-6))
    expected = epsilon() + epsilon(noise=8.0, delta=1e-6)
    assert spent.epsilon == pytest.approx(expected, rel=2e-3)
    assert spent.delta == pytest.approx(1.1e-5)
    assert [(plan.plan_digest[0], plan.rounds, plan.steps) for plan in spent.plans] == [(1, 2, 8), (2, 2, 8)]


def test_a_repeated_round_uses_up_steps_but_is_no_new_round(ledger):
    ledger.charge(charge(round_=3, attempt=0))
    (plan,) = ledger.charge(charge(round_=3, attempt=2)).plans
    assert (plan.rounds, plan.steps, plan.plan_steps) == (1, 8, PLAN_STEPS)
    assert ledger.last_work(charge().plan_digest) == (3, 2)
    assert ledger.last_work(bytes(31) + b"x") is None


def test_no_charge_goes_beyond_the_plans_steps(ledger):
    for round_ in range(PLAN_STEPS // 4):
        ledger.charge(charge(round_=round_))
    with pytest.raises(BudgetExceeded, match="40 steps are used up; this round would make 44"):
        ledger.charge(charge(round_=99))
    assert ledger.counter == PLAN_STEPS // 4


@pytest.mark.parametrize("work", [(2, 1), (2, 0), (1, 5), (0, 0)])
def test_work_of_a_plan_only_goes_forward(ledger, work):
    ledger.charge(charge(round_=2, attempt=1))
    ledger.charge(charge(plan=1))
    for ask in (ledger.check, ledger.charge):
        with pytest.raises(Repeated, match="round 3, attempt 2 is charged already"):
            ask(charge(round_=work[0], attempt=work[1]))
    assert ledger.counter == 2


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"noise": 8.0}, "noise_multiplier 8.0, but it was charged with 4.0"),
        ({"delta": 1e-6}, "delta 1e-06, but"),
        ({"plan_steps": 39}, "plan_steps 39, but"),
        ({"sampling_rate": 0.05}, "sampling_rate 0.05, but"),
        ({"clipping_norm": 0.25}, "clipping_norm 0.25, but"),
        ({"shares": 3}, "shares 3, but it was charged with 1"),
    ],
)
def test_the_parameters_of_a_plan_never_change(ledger, changed, name):
    ledger.charge(charge())
    with pytest.raises(LedgerError, match=name):
        ledger.charge(charge(round_=1, **changed))
    assert ledger.counter == 1


def test_the_budget_is_never_exceeded_in_epsilon(path):
    one = Mechanism(0.5, 1000, 4.0, 0.1, PLAN_STEPS).epsilon(1e-5)
    ledger = Ledger(path, Budget(2 * one, 1e-4))
    ledger.charge(charge(plan=1))
    ledger.charge(charge(plan=2))
    with pytest.raises(BudgetExceeded, match=r"ε = 1\..* of a budget of ε"):
        ledger.charge(charge(plan=3))
    assert ledger.spent().epsilon == 2 * one
    ledger.charge(charge(plan=2, round_=1))  # what is set aside can still be used


def test_the_budget_is_never_exceeded_in_delta_and_no_rounding_gets_in_the_way(path):
    ledger = Ledger(path, Budget(100.0, 1e-5))
    for plan in range(10):
        ledger.charge(charge(plan, delta=1e-6))
    with pytest.raises(BudgetExceeded, match=r"δ = 1\.1e-05"):
        ledger.charge(charge(plan=10, delta=1e-6))


def test_a_plan_without_any_epsilon_is_refused(ledger):
    for without in (charge(noise=0.5, plan_steps=10**9), charge(delta=1e-30)):
        with pytest.raises(BudgetExceeded, match="ε = inf"):
            ledger.charge(without)


def test_check_writes_nothing_and_says_what_charge_will(ledger):
    whole = ledger.check(charge())
    assert whole == ledger.check(charge())
    assert (whole.plans[0].steps, ledger.counter) == (PLAN_STEPS, 0)
    spent = ledger.charge(charge())
    assert (whole.epsilon, whole.delta) == (spent.epsilon, spent.delta)
    assert ledger.counter == 1
    with pytest.raises(BudgetExceeded):
        ledger.check(charge(plan=1, noise=1.0, plan_steps=1000))


def test_a_smaller_budget_refuses_but_still_shows_what_is_spent(path, ledger):
    spent = ledger.charge(charge())
    poorer = Ledger(path, Budget(spent.epsilon / 2, 1e-4))
    assert poorer.spent() == spent
    with pytest.raises(BudgetExceeded):
        poorer.charge(charge(round_=1))


def test_events_are_the_charges_as_they_were_made(ledger):
    charges = [
        charge(),
        charge(plan=7, round_=5, noise=8.0, shares=5),
        charge(round_=1, attempt=3, steps=2),
    ]
    for each in charges:
        ledger.charge(each)
    events = list(ledger.events())
    assert [event.charge for event in events] == charges
    assert [event.number for event in events] == [1, 2, 3]
    assert all(event.time.endswith("+00:00") and len(event.hash) == 32 for event in events)
    assert [event.previous for event in events] == [genesis(BUDGET), *(event.hash for event in events[:-1])]
    assert ledger.head == (3, events[-1].hash)


@pytest.mark.parametrize(
    "wrong",
    [{"round_": -1}, {"attempt": -1}, {"steps": 41}, {"delta": 0.0}, {"delta": math.nan}, {"unit": "shop"}],
)
def test_a_charge_out_of_range_cannot_be_made(wrong):
    with pytest.raises(ValueError, match="Expected"):
        charge(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [(0.0, 1e-5), (math.inf, 1e-5), (math.nan, 1e-5), (1.0, 0.0), (1.0, 1.0), (1.0, 1e-5, "best of both"),
     (1.0, 1e-5, "sum", "shop")],
)  # fmt: skip
def test_a_budget_out_of_range_cannot_be_made(wrong):
    with pytest.raises(ValueError, match=r"[Ee]xpected"):
        Budget(*wrong)


# Counting steps instead of plans


def steps_that_fit(budget: Budget, **changes) -> int:
    """How many single steps of one plan a budget has room for, from the filter alone."""
    use = Account(bytes(32), charge(**changes).parameters).use()
    fits = (replace(use, steps=steps) for steps in itertools.count(1))
    return next(
        each.steps - 1 for each in fits if budget.filter.spent([each], budget.delta)[0] > budget.epsilon
    )


def test_by_rdp_a_charge_pays_for_its_steps_and_check_for_the_whole_plan(path):
    room = steps_that_fit(STEPWISE, plan_steps=10**6)
    assert 50 < room < 5000
    ledger = Ledger(path, STEPWISE)
    with pytest.raises(BudgetExceeded):
        ledger.check(charge(steps=1, plan_steps=room + 1))
    ledger.check(charge(steps=1, plan_steps=room))
    assert ledger.counter == 0
    spent = ledger.charge(charge(steps=room - 1, plan_steps=room + 1))
    assert spent.epsilon < STEPWISE.epsilon and spent.delta == STEPWISE.delta
    last = ledger.charge(charge(round_=1, steps=1, plan_steps=room + 1))
    assert spent.epsilon < last.epsilon <= STEPWISE.epsilon
    with pytest.raises(BudgetExceeded, match="No photo was touched"):
        ledger.charge(charge(round_=2, steps=1, plan_steps=room + 1))
    assert ledger.counter == 2 and ledger.spent() == last


def test_by_rdp_what_one_plan_left_unused_is_there_for_the_next(path):
    room = steps_that_fit(STEPWISE, plan_steps=10**6) // 10 * 10
    ledger, by_plans = Ledger(path, STEPWISE), Ledger(path.with_name("sum"), BUDGET)
    begun = [charge(plan, steps=room // 10, plan_steps=room * 9 // 10) for plan in range(11)]
    for each in begun[:10]:
        ledger.charge(each)
    with pytest.raises(BudgetExceeded):
        ledger.charge(begun[10])
    by_plans.charge(begun[0])
    with pytest.raises(BudgetExceeded):
        by_plans.charge(begun[1])


def test_by_rdp_the_rest_of_a_plan_is_judged_beside_what_others_took_meanwhile(path):
    room = steps_that_fit(STEPWISE, plan_steps=10**6)
    ledger = Ledger(path, STEPWISE)
    ledger.charge(charge(0, steps=1, plan_steps=room))
    ledger.check(charge(0, round_=1, steps=1, plan_steps=room))
    ledger.charge(charge(1, steps=room // 2, plan_steps=room))
    with pytest.raises(BudgetExceeded):
        ledger.check(charge(0, round_=1, steps=1, plan_steps=room))
    ledger.charge(charge(0, round_=1, steps=1, plan_steps=room))  # what is charged still fits


@pytest.mark.parametrize(("made", "opened"), [(BUDGET, STEPWISE), (STEPWISE, BUDGET)])
def test_a_ledger_keeps_the_filter_it_was_made_with(path, made, opened):
    kept = Ledger(path, made)
    for _ in range(2):  # before and after the first charge
        with pytest.raises(
            LedgerError, match=f"adds up by {made.accounting}, .*Put `accounting: {made.accounting}`"
        ):
            Ledger(path, opened)
        if not kept.counter:
            kept.charge(charge())
    assert Ledger(path, made).counter == 1


@pytest.mark.parametrize(("made", "opened"), list(itertools.permutations(UNITS, 2)))
def test_a_ledger_keeps_the_unit_it_was_made_with(path, made, opened):
    kept = Ledger(path, replace(BUDGET, unit=made))
    for _ in range(2):  # before and after the first charge
        with pytest.raises(
            LedgerError, match=f"account of one {made}, but the policy says {opened}.*Put `unit: {made}` back"
        ):
            Ledger(path, replace(BUDGET, unit=opened))
        if not kept.counter:
            kept.charge(charge(unit=made))
    assert Ledger(path, replace(BUDGET, unit=made)).counter == 1


@pytest.mark.parametrize(("kept", "asked"), list(itertools.permutations(UNITS, 2)))
def test_a_charge_of_another_unit_is_refused(path, kept, asked):
    """Be it a new plan's or one's that was charged before, and be there room for it or not."""
    ledger = Ledger(path, replace(BUDGET, unit=kept))
    ledger.charge(charge(unit=kept))
    spent = ledger.spent()
    for other in (
        charge(plan=1, unit=asked),
        charge(round_=1, unit=asked),
        charge(plan=1, noise=0.5, unit=asked),
    ):
        for ask in (ledger.check, ledger.charge):
            with pytest.raises(
                LedgerError, match=f"said of one {asked}, expected {kept}.* Nothing was charged"
            ):
                ask(other)
    assert (ledger.counter, ledger.spent()) == (1, spent)
    assert Ledger(path, replace(BUDGET, unit=kept)).spent() == spent


def test_the_genesis_is_the_hash_of_a_text_that_others_can_write():
    assert genesis(BUDGET) == hashlib.sha256(b"hanse ledger 2 sum photo").digest()
    merchants = Budget(1.0, 1e-5, "rdp-8", "merchant")
    assert genesis(merchants) == hashlib.sha256(b"hanse ledger 2 rdp-8 merchant").digest()


@pytest.mark.parametrize(
    "statement",
    ["UPDATE terms SET filter = 'rdp-8'", "UPDATE terms SET unit = 'product'", "DELETE FROM terms",
     "INSERT INTO terms VALUES ('rdp-8', 'photo')",
     "REPLACE INTO terms (rowid, filter, unit) VALUES (1, 'rdp-8', 'photo')"],
)  # fmt: skip
def test_filter_and_unit_are_never_changed(path, ledger, statement):
    with raw(path) as db, pytest.raises(sqlite3.IntegrityError, match="a ledger has one filter and one unit"):
        db.execute(statement)
    assert ledger.counter == 0


@pytest.mark.parametrize(
    ("statement", "found"),
    [
        ("UPDATE terms SET filter = 'rdp-8'", "row 1 is not what was written"),
        ("UPDATE terms SET unit = 'product'", "row 1 is not what was written"),
        ("UPDATE terms SET filter = 'none'", "found none photo where its filter and unit are"),
        ("UPDATE terms SET unit = 'shop'", "found sum shop where its filter and unit are"),
        ("DELETE FROM terms", "found nothing where"),
        ("INSERT INTO terms VALUES ('sum', 'photo')", "found sum photo, sum photo where"),
    ],
)
def test_a_filter_or_unit_changed_by_force_breaks_the_chain(path, ledger, statement, found):
    ledger.charge(charge())
    with tampering(path) as db:
        db.execute(statement)
    changed = STEPWISE if "rdp" in statement else PRODUCTS if "product" in statement else BUDGET
    with pytest.raises(LedgerError, match=f"damaged: {found}"):
        Ledger(path, changed)


def test_a_charge_counts_no_old_row_again(path):
    """A charge is made in every training step, so its time must not grow with the ledger."""
    ledger = Ledger(path, STEPWISE)
    for round_ in range(3):
        ledger.charge(charge(round_=round_, steps=1))
    statements: list[str] = []
    connect = sqlite3.connect

    def traced(*args, **kwargs):
        db = connect(*args, **kwargs)
        db.set_trace_callback(statements.append)
        return db

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sqlite3, "connect", traced)
        ledger.charge(charge(round_=3, steps=1))
    reads = [each for each in statements if "FROM charge" in each and "max(number)" not in each]
    assert [re.sub(r".* WHERE", "WHERE", each) for each in reads] == [
        "WHERE number = 3",
        "WHERE number > 3 ORDER BY number",
    ]


class AgainstAPlainModel(RuleBasedStateMachine):
    """Charges in any order, with reopening in between, do what a dictionary says."""

    noises = (4.0, 8.0, 2.0)
    costs = tuple(Mechanism(0.5, 1000, noise, 0.1, PLAN_STEPS).epsilon(1e-5) for noise in noises)
    budget = Budget(1.05 * (costs[0] + costs[2]), 1e-4)

    @initialize()
    def begin(self):
        self.folder = tempfile.TemporaryDirectory(dir=MEMORY)
        self.path = Path(self.folder.name) / "ledger.sqlite"
        self.rows: list[tuple[int, int, int, int]] = []
        self.reopen()

    @rule()
    def reopen(self):
        self.ledger = Ledger(self.path, self.budget)

    @rule(
        plan=st.integers(0, 2),
        round_=st.integers(0, 6),
        attempt=st.integers(0, 2),
        steps=st.sampled_from([1, 8, 20]),
    )
    def charge(self, plan, round_, attempt, steps):
        asked = charge(plan, round_, attempt, steps=steps, noise=self.noises[plan])
        mine = [row for row in self.rows if row[0] == plan]
        plans = {row[0] for row in self.rows} | {plan}
        expected: type[HanseError] | None = None
        if mine and (round_, attempt) <= max(row[1:3] for row in mine):
            expected = Repeated
        elif (
            sum(row[3] for row in mine) + steps > PLAN_STEPS
            or sum(self.costs[each] for each in plans) > self.budget.epsilon
        ):
            expected = BudgetExceeded
        for ask in (self.ledger.check, self.ledger.charge):
            if expected is None:
                assert {plan.plan_digest[0] for plan in ask(asked).plans} == plans
            else:
                with pytest.raises(expected):
                    ask(asked)
        if expected is None:
            self.rows.append((plan, round_, attempt, steps))

    @invariant()
    def the_ledger_says_what_the_model_says(self):
        spent = self.ledger.spent()
        plans = list(dict.fromkeys(row[0] for row in self.rows))
        assert [plan.plan_digest[0] for plan in spent.plans] == plans
        assert [plan.steps for plan in spent.plans] == [
            sum(row[3] for row in self.rows if row[0] == plan) for plan in plans
        ]
        assert spent.epsilon == pytest.approx(sum(self.costs[plan] for plan in plans))
        assert spent.epsilon <= self.budget.epsilon
        assert self.ledger.counter == len(self.rows)

    def teardown(self):
        if hasattr(self, "folder"):
            self.folder.cleanup()


TestAgainstAPlainModel = AgainstAPlainModel.TestCase
TestAgainstAPlainModel.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)


# How it is kept


def test_only_the_owner_may_read_it(path):
    old = os.umask(0)
    try:
        Ledger(path, BUDGET).charge(charge())
        modes = {file.stat().st_mode & 0o777 for file in path.parent.iterdir()}
        assert modes == {0o600}
        with raw(path) as db:  # keeps the journal there
            db.execute("SELECT * FROM charge").fetchall()
            assert {file.stat().st_mode & 0o777 for file in path.parent.iterdir()} == {0o600}
            assert len(list(path.parent.iterdir())) == 3
        path.chmod(0o644)
        Ledger(path, BUDGET)
        assert path.stat().st_mode & 0o777 == 0o600
    finally:
        os.umask(old)


def test_every_commit_is_synced(ledger):
    with ledger._transaction("IMMEDIATE") as (db, _):
        assert db.execute("PRAGMA synchronous").fetchone() == (2,)
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE charge SET steps = 1",
        "UPDATE charge SET hash = hash",
        "DELETE FROM charge WHERE number = 2",
        "INSERT OR REPLACE INTO charge SELECT * FROM charge WHERE number = 2",
        """REPLACE INTO charge SELECT 9, time, zeroblob(32), round, attempt, steps, plan_steps, clipping_norm,
        dimension, noise_multiplier, sampling_rate, shares, delta, unit, hash FROM charge WHERE number = 1""",
    ],
)
def test_rows_are_only_ever_added(path, ledger, statement):
    for round_ in range(3):
        ledger.charge(charge(round_=round_))
    with raw(path) as db, pytest.raises(sqlite3.IntegrityError, match="only grows"):
        db.execute(statement)
    assert ledger.counter == 3


@contextmanager
def tampering(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection to the ledger with its triggers out of the way, put back afterwards."""
    with raw(path) as db:
        triggers = db.execute("SELECT name, sql FROM sqlite_schema WHERE type = 'trigger'").fetchall()
        for name, _ in triggers:
            db.execute(f"DROP TRIGGER {name}")
        yield db
        for _, sql in triggers:
            db.execute(sql)


COLUMNS = {
    "time": "'2020-01-01'",
    "plan_digest": "zeroblob(32)",
    "round": "17",
    "attempt": "17",
    "steps": "1",
    "plan_steps": "400",
    "clipping_norm": "0.6",
    "dimension": "10",
    "noise_multiplier": "40.0",
    "sampling_rate": "0.01",
    "shares": "2",
    "unit": "'merchant'",
    "delta": "1e-9",
    "hash": "zeroblob(32)",
}


@pytest.mark.parametrize(("column", "value"), COLUMNS.items())
def test_an_altered_row_is_named(path, ledger, column, value):
    for round_ in range(4):
        ledger.charge(charge(plan=1, round_=round_))
    with tampering(path) as db:
        db.execute(f"UPDATE charge SET {column} = {value} WHERE number = 3")  # noqa: S608
    for look in (ledger.verify, lambda: Ledger(path, BUDGET)):
        with pytest.raises(LedgerError, match="row 3 is not what was written"):
            look()


def test_an_altered_row_with_a_hash_to_match_breaks_the_chain_behind_it(path, ledger):
    for round_ in range(4):
        ledger.charge(charge(plan=1, round_=round_))
    with tampering(path) as db:
        (previous,) = db.execute("SELECT hash FROM charge WHERE number = 2").fetchone()
        row = list(db.execute("SELECT * FROM charge WHERE number = 3").fetchone())
        row[5] = 1
        db.execute("UPDATE charge SET steps = 1, hash = ? WHERE number = 3", (_hash(previous, row[:-1]),))
    with pytest.raises(LedgerError, match="row 4 is not what was written"):
        ledger.verify()


def test_every_column_is_covered_by_the_tests_above(path, ledger):
    with raw(path) as db:
        names = {name for _, name, *_ in db.execute("PRAGMA table_info(charge)")}
    assert names == {"number", *COLUMNS}


def test_a_row_taken_out_or_moved_is_named(path, ledger):
    for round_ in range(4):
        ledger.charge(charge(round_=round_))
    with tampering(path) as db:
        db.execute("DELETE FROM charge WHERE number = 2")
    with pytest.raises(LedgerError, match="row 2 is missing, the next one found is 3"):
        ledger.verify()
    with tampering(path) as db:
        db.execute("UPDATE charge SET number = number - 1 WHERE number > 2")
    with pytest.raises(LedgerError, match="row 2 is not what was written"):
        ledger.verify()


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"noise_multiplier": 8.0}, "row 2 does not go with its plan's rows before"),
        ({"round": 0}, "row 2 does not go with its plan's rows before"),  # backwards
        ({"unit": "product"}, "row 2 does not go with its plan's rows before"),
        ({"plan_digest": b"x" * 32, "unit": "product"}, "row 2 is of another unit, product"),
        (
            {"plan_digest": b"x" * 32, "sampling_rate": 2.0},
            "row 2 has parameters that no plan has: Expected 0 <",
        ),
    ],
)
def test_rows_that_no_ledger_writes_are_damage_though_well_chained(path, ledger, changes, found):
    ledger.charge(charge(round_=1))
    with raw(path) as db:
        db.row_factory = sqlite3.Row
        first = dict(db.execute("SELECT * FROM charge").fetchone())
        row = {**first, "number": 2, "round": 2, **changes}
        row["hash"] = _hash(first["hash"], list(row.values())[:-1])
        db.execute(_INSERT, list(row.values()))
    with pytest.raises(LedgerError, match=found):
        Ledger(path, BUDGET)


@pytest.mark.parametrize(
    "statement",
    [
        "DROP TRIGGER charge_never_deleted",
        "DROP INDEX charge_once",
        "DROP TRIGGER terms_never_changed",
        "CREATE TRIGGER extra AFTER INSERT ON charge BEGIN SELECT 1; END",
        "PRAGMA journal_mode = DELETE",
    ],
)
def test_an_altered_schema_is_damage(path, ledger, statement):
    with raw(path) as db:
        db.execute(statement)
    for look in (ledger.spent, lambda: Ledger(path, BUDGET)):
        with pytest.raises(LedgerError, match="not as they were made"):
            look()


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Ledger:
    ledger = Ledger(tmp_path_factory.mktemp("sound") / "ledger.sqlite", BUDGET)
    for round_ in range(8):
        ledger.charge(charge(plan=round_ % 2, round_=round_))
    return ledger


def opens_the_same_or_not_at_all(path: Path, content: bytes, sound: Ledger) -> bool:
    path.write_bytes(content)
    try:
        ledger = Ledger(path, BUDGET)
    except LedgerError as error:
        return str(path) in str(error)
    return ledger.spent() == sound.spent() and ledger.counter == sound.counter


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), change=st.integers(1, 255))
def test_a_damaged_byte_is_noticed_or_harmless(tmp_path, sound, place, change):
    content = bytearray(sound.path.read_bytes())
    used = [index for index, byte in enumerate(content) if byte]
    index = used[int(place * len(used))]
    content[index] ^= change
    assert opens_the_same_or_not_at_all(tmp_path / "ledger.sqlite", bytes(content), sound)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(share=0.875)  # the filter's and unit's page is gone: NULL where their names are
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_file_cut_short_is_noticed_or_had_only_zeros_there(tmp_path, sound, share):
    content = sound.path.read_bytes()
    cut = content[: int(share * len(content))]
    assert opens_the_same_or_not_at_all(tmp_path / "ledger.sqlite", cut, sound)


@pytest.mark.parametrize("name", ["charge_in_order", "coalesce", "CREATE TABLE", "+00:00"])
def test_text_that_is_no_text_is_damage(tmp_path, sound, name):
    content = sound.path.read_bytes()
    assert name.encode() in content
    path = tmp_path / "ledger.sqlite"
    path.write_bytes(content.replace(name.encode(), b"\x80" + name[1:].encode()))
    with pytest.raises(LedgerError, match="damaged"):
        Ledger(path, BUDGET)


@pytest.mark.parametrize("text", [b"", b"hello, this is a text of some length, not a database" * 50])
def test_a_file_that_is_no_ledger_is_refused_and_left_alone(tmp_path, text):
    path = tmp_path / "ledger.sqlite"
    path.write_bytes(text)
    with pytest.raises(LedgerError, match="expected a ledger"):
        Ledger(path, BUDGET)
    assert path.read_bytes() == text


def test_another_programs_database_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "ledger.sqlite"
    with raw(path) as db:
        db.execute("CREATE TABLE bookmarks (url TEXT)")
    before = path.read_bytes()
    with pytest.raises(LedgerError, match="another program's file"):
        Ledger(path, BUDGET)
    assert path.read_bytes() == before


def test_a_newer_version_asks_for_an_update(path, ledger):
    with raw(path) as db:
        db.execute("PRAGMA user_version = 3")
    with pytest.raises(LedgerError, match="version 3, expected 2; update hanse-client"):
        Ledger(path, BUDGET)


def test_an_older_version_is_refused_and_left_alone(path):
    """As the releases before this one made it; none of them knew filters and units."""
    path.parent.mkdir()
    with raw(path) as db:
        db.execute("CREATE TABLE charge (number INTEGER PRIMARY KEY, hash BLOB NOT NULL) STRICT")
        db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        db.execute("PRAGMA user_version = 1")
    before = path.read_bytes()
    with pytest.raises(LedgerError, match=r"version 1, expected 2; .*do not delete it"):
        Ledger(path, BUDGET)
    assert path.read_bytes() == before


def test_a_folder_or_a_place_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(LedgerError, match=str(tmp_path)):
        Ledger(tmp_path, BUDGET)
    (tmp_path / "file").touch()
    with pytest.raises(LedgerError, match="cannot make"):
        Ledger(tmp_path / "file" / "ledger.sqlite", BUDGET)


def test_a_ledger_that_vanished_is_not_silently_made_again(path, ledger):
    ledger.charge(charge())
    path.unlink()
    with pytest.raises(LedgerError, match="cannot be opened"):
        ledger.charge(charge(round_=1))
    assert not path.exists()


def test_an_older_ledger_put_in_its_place_is_noticed(path, ledger):
    ledger.charge(charge())
    backup = path.with_name("backup")
    shutil.copy(path, backup)
    ledger.charge(charge(plan=1))
    backup.replace(path)
    for look in (ledger.spent, lambda: ledger.charge(charge(plan=2))):
        with pytest.raises(LedgerError, match="row 2 is gone or another"):
            look()


def test_a_ledger_locked_by_another_process_says_so(path):
    ledger = Ledger(path, BUDGET, timeout=0.05)
    with raw(path) as db:
        db.execute("BEGIN IMMEDIATE")
        with pytest.raises(LedgerError, match="another process is writing"):
            ledger.charge(charge())
        assert ledger.spent().plans == ()  # readers do not wait
    ledger.charge(charge())


def test_a_full_disk_says_so_and_charges_nothing(path, ledger, monkeypatch):
    ledger.charge(charge())
    connect = sqlite3.connect

    def connect_to_a_full_disk(*args, **kwargs):
        db = connect(*args, **kwargs)
        db.execute("PRAGMA max_page_count = 1")  # SQLite then gives SQLITE_FULL where the file would grow
        return db

    monkeypatch.setattr(sqlite3, "connect", connect_to_a_full_disk)
    charged = 1
    with pytest.raises(LedgerError, match="disk is full, so nothing was charged"):
        for round_ in range(1, 500):
            ledger.charge(
                charge(round_=round_, steps=1, plan_steps=PLAN_STEPS) if round_ < 30 else charge(plan=round_)
            )
            charged += 1
    monkeypatch.undo()
    assert ledger.counter == charged


SHOPKEEPER = """
import sys
from pathlib import Path
from hanse_client.charges import Budget, Charge
from hanse_client.ledger import Ledger
from hanse_common.errors import BudgetExceeded, LedgerError
from hanse_common.privacy.mechanism import Mechanism

path, name, epsilon = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
mechanism = Mechanism(0.5, 1000, 4.0, 0.1, 4)
print("ready", flush=True)
sys.stdin.readline()
ledger = Ledger(path, Budget(epsilon, 1e-3), timeout=60)
done = []
for number in range(20):
    for plan in (number, 100 + 20 * name + number):
        try:
            ledger.charge(Charge(bytes([plan]) * 32, 0, 0, mechanism, 40, 1e-5))
            done.append(plan)
        except BudgetExceeded:
            pass
        except LedgerError as error:
            if type(error) is LedgerError:
                raise
print(*done)
"""


def test_processes_that_charge_at_once_never_overrun_the_budget_nor_charge_twice(path):
    """Three processes make the ledger together, and race for the same plans and for plans of their own."""
    one = Mechanism(0.5, 1000, 4.0, 0.1, PLAN_STEPS).epsilon(1e-5)
    room = 25
    command = [sys.executable, "-c", SHOPKEEPER, str(path)]
    processes = [
        subprocess.Popen(
            [*command, str(name), repr((room + 0.5) * one)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in range(3)
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    done = []
    for process in processes:
        output, _ = process.communicate()
        assert process.returncode == 0
        done += output.split()
    ledger = Ledger(path, BUDGET)
    assert len(done) == len(set(done)) == ledger.counter == room
    assert ledger.spent().epsilon == pytest.approx(room * one)


def test_threads_may_share_a_ledger(path):
    ledger = Ledger(path, Budget(1000.0, 1e-2))

    def run(plan: int) -> None:
        for round_ in range(5):
            ledger.charge(charge(plan, round_))
            ledger.spent()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, range(8)))
    ledger.verify()
    assert ledger.counter == 40


# -- a pace: so much a month --------------------------------------------------------------------------------------


class Calendar:
    def __init__(self, *day: int) -> None:
        self.now = datetime(*day, tzinfo=UTC)  # type: ignore[misc,arg-type]

    def __call__(self) -> datetime:
        return self.now


def paced(path: Path, calendar: Calendar, accounting: str = "sum", monthly: float = 1.5) -> Ledger:
    return Ledger(path, Budget(100.0, 1e-2, accounting, monthly=monthly), now=calendar)


def small(number: int, round_: int = 0, steps: int = 1, plan_steps: int = 10) -> Charge:
    """ε of all ten steps is about 1.2, of one alone 0.9."""
    mechanism = Mechanism(1.0, 10, 4.0, 1.0, steps)
    return Charge(bytes([number]) * 32, round_, 0, mechanism, plan_steps, 1e-5)


def test_a_month_has_its_own_bound(tmp_path: Path) -> None:
    calendar = Calendar(2026, 3, 30)
    ledger = paced(tmp_path / "ledger.sqlite", calendar, monthly=5.0)
    one = ledger.charge(small(1)).epsilon
    assert 2.5 < one < 5.0, "two do not fit"
    with pytest.raises(BudgetExceeded, match=r"this month, of 5 \(monthly_epsilon\)"):
        ledger.charge(small(2))
    ledger.charge(small(1, 1))  # the plan is paid for
    for ask in (ledger.check, ledger.charge):
        with pytest.raises(BudgetExceeded, match="this month"):
            ask(small(2))
    assert ledger.counter == 2
    calendar.now = datetime(2026, 4, 1, tzinfo=UTC)
    ledger.check(small(2))
    again = paced(tmp_path / "ledger.sqlite", calendar, monthly=5.0)
    assert again.charge(small(2)).epsilon == pytest.approx(2 * one)
    again.charge(small(1, 2))  # an earlier month's plan costs nothing more
    with pytest.raises(BudgetExceeded):
        again.charge(small(3))


def test_a_month_has_its_own_delta(tmp_path: Path) -> None:
    calendar = Calendar(2026, 3, 30)
    budget = Budget(100.0, 1e-2, monthly_delta=1e-5)
    ledger = Ledger(tmp_path / "ledger.sqlite", budget, now=calendar)
    ledger.charge(small(1))
    with pytest.raises(
        BudgetExceeded, match=r"δ = 2e-05 would be spent this month, of 1e-05 \(monthly_delta\)"
    ):
        ledger.charge(small(2))
    calendar.now = datetime(2026, 4, 1, tzinfo=UTC)
    ledger.charge(small(2))


def test_a_clock_that_is_set_back_begins_no_month_anew(tmp_path: Path) -> None:
    calendar = Calendar(2026, 4, 2)
    ledger = paced(tmp_path / "ledger.sqlite", calendar, monthly=5.0)
    ledger.charge(small(1))
    for month in (3, 2, 1):
        calendar.now = datetime(2026, month, 1, tzinfo=UTC)
        with pytest.raises(BudgetExceeded, match="a clock that was once set forward"):
            paced(tmp_path / "ledger.sqlite", calendar, monthly=5.0).charge(small(2))
    calendar.now = datetime(2026, 4, 30, tzinfo=UTC)
    with pytest.raises(BudgetExceeded):
        ledger.charge(small(2))


def test_where_steps_are_paid_a_month_has_those_taken_in_it(tmp_path: Path) -> None:
    calendar = Calendar(2026, 3, 30)
    budget = Budget(100.0, 1e-5, "rdp-8", monthly=3.0)
    path = tmp_path / "ledger.sqlite"
    ledger = Ledger(path, budget, now=calendar)
    taken = 0
    with pytest.raises(BudgetExceeded, match="this month"):
        for round_ in range(100):
            ledger.charge(small(1, round_, plan_steps=100))
            taken += 1
    assert 1 < taken < 100
    calendar.now = datetime(2026, 4, 1, tzinfo=UTC)
    again = Ledger(path, budget, now=calendar)
    before = taken
    with pytest.raises(BudgetExceeded, match="this month"):
        for round_ in range(before, 100):
            again.charge(small(1, round_, plan_steps=100))
            taken += 1
    assert taken == 2 * before, "a month is like another"


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3)), min_size=1, max_size=12),
    st.sampled_from(["sum", "rdp-8"]),
)
def test_a_ledger_read_anew_knows_its_month_as_well_as_one_that_saw_it_pass(
    moves: list[tuple[int, int]], accounting: str
) -> None:
    """Months pass (or the clock goes back); each charge is let through by both or by neither."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        path, calendar = Path(folder) / "ledger.sqlite", Calendar(2026, 6, 1)
        ledger = paced(path, calendar, accounting, monthly=5.0)
        rounds: Counter[int] = Counter()
        for month, plan in moves:
            calendar.now = datetime(2026, month + 4, 1, tzinfo=UTC)
            charge = small(plan, rounds[plan])
            fresh = paced(path, calendar, accounting, monthly=5.0)
            allowed = []
            for one in (ledger, fresh):
                try:
                    one.check(charge)
                except BudgetExceeded:
                    allowed.append(False)
                else:
                    allowed.append(True)
            assert allowed[0] == allowed[1]
            if allowed[0]:
                ledger.charge(charge)
                rounds[plan] += 1
