"""The bound of a round's sum: honest merchants stay below it, at their worst and in every mode, and not far below."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hanse_client.examples import Examples
from hanse_client.training import ShopTrainer
from hanse_common.counting import most_of_a_class
from hanse_common.errors import RoundFailed
from hanse_common.evaluation import CLIPPING_NORM
from hanse_common.messages import Start
from hanse_common.modes import TRAININGS
from hanse_common.plan import Cohort, Plan
from hanse_common.secagg import ring
from hanse_common.vision.recipe_model import Linear
from hanse_server import plausibility
from hanse_server.plausibility import ABUNDANCE, Verdict, judge
from hanse_simulations.seeded import SeededRandomness

MakePlan = Callable[..., Plan]

COHORT = Cohort(min_merchants=4, max_merchants=8, upload_slot=0)
MODES: dict[str, dict[str, Any]] = {
    "distributed": {"expected_batch": 2000.0, "sampling_rate": 0.2},
    "mean": {"rounds": 1, "sampling_rate": 1.0, "clipping_norm": 1.0, "expected_batch": 500.0},
    "evaluation": {"sampling_rate": 1.0, "clipping_norm": CLIPPING_NORM, "expected_batch": 500.0},
    "trends": {
        "rounds": 1,
        "sampling_rate": 1.0,
        "expected_batch": 500.0,
        "first_day": "2026-11-16",
        "days": 7,
    },
    "merchant-level": {"local_steps": 2, "local_rate": 0.5, "learning_rate": 0.1, "sampling_rate": 1.0},
    "local": {"local_steps": 3, "learning_rate": 0.5, "momentum": 0.9, "expected_batch": 200.0},
}


def plan_of(make_plan: MakePlan, mode: str, model: Linear | None = None, **training: Any) -> Plan:
    common = {
        "rounds": 4,
        "sampling_rate": 0.2,
        "expected_batch": 20.0,
        "clipping_norm": 1.0,
        "noise_multiplier": 2.0,
    }
    chosen = TRAININGS[mode](**(common | MODES[mode] | training))
    plain = make_plan()
    recipe = plain.recipe if model is None else plain.recipe.model_copy(update={"model": model})
    provisional = make_plan(recipe=recipe, cohort=COHORT, serial=bytes(16))
    fields = provisional.model_dump() | {"recipe": recipe, "training": chosen, "cohort": COHORT}
    fields["taxonomy"] = provisional.taxonomy
    dimension = Plan.model_construct(**fields).expected_dimension
    return Plan(**(fields | {"dimension": dimension}))


def direction(plan: Plan, rng: np.random.Generator) -> NDArray[np.float64]:
    drawn = rng.normal(size=plan.dimension)
    return np.asarray(drawn / np.linalg.norm(drawn))


class Aligned(ShopTrainer):
    """All photos that are sampled pull one way, as far as clipping lets them."""

    def __init__(self, plan: Plan, pull: NDArray[np.float64], rng: np.random.Generator, photos: int) -> None:
        empty = Examples.of(np.zeros((1, 6), dtype=np.float32), np.zeros(1, dtype=np.int64), "cpu")
        super().__init__(
            plan.recipe, plan.taxonomy, empty, SeededRandomness(int(rng.integers(1 << 60)), "aligned")
        )
        self._pull, self._rng, self._photos = pull, rng, photos

    def _exact_sum(self, weights: Any, unit: Any, mechanism: Any, rates: Any = ()) -> NDArray[np.int64]:
        sampled = self._rng.binomial(self._photos, mechanism.sampling_rate)
        fine = np.ldexp(mechanism.clipping_norm * self._pull, -mechanism.grid.fine_exponent)
        return np.asarray(sampled * np.trunc(fine).astype(np.int64))


def worst_honest_sum(
    plan: Plan, merchants: int, rng: np.random.Generator, model_norm: float = 0.0
) -> tuple[NDArray[np.float32], NDArray[np.uint32]]:
    """Return the model, and the sum of honest merchants with as many photos as the plan allows, all pulling one way."""
    training, pull = plan.training, direction(plan, rng)
    model = (model_norm * pull).astype(np.float32)
    league = ABUNDANCE * training.expected_batch / training.sampling_rate
    total = np.zeros(plan.dimension, dtype=np.uint32)
    for _ in range(merchants):
        if training.mode == "local":
            total += Aligned(plan, pull, rng, math.floor(league)).contribution(plan, 0, model)
            continue
        mechanism = plan.mechanism(1)
        randomness = SeededRandomness(int(rng.integers(1 << 60)), "honest")
        if training.mode == "trends":  # as many queries of each class as a merchant may have
            most = np.full(plan.dimension, round(most_of_a_class(plan) / mechanism.grid.fine_unit))
            total += ring.residues(mechanism.contribute(most, plan.limit, randomness))
            continue
        photos = 1 if training.mode == "merchant-level" else math.floor(league / merchants)
        fine = np.trunc(np.ldexp(mechanism.clipping_norm * pull, -mechanism.grid.fine_exponent)).astype(
            np.int64
        )
        sampled = int(rng.binomial(photos, training.sampling_rate))
        total += ring.residues(mechanism.contribute(sampled * fine, plan.limit, randomness))
    return model, total


@pytest.mark.parametrize("mode", MODES)
def test_the_worst_honest_sum_is_plausible_and_near_the_bound(make_plan: MakePlan, mode: str) -> None:
    quiet: dict[str, Any] = {"noise_multiplier": 0.15} if mode == "merchant-level" else {}
    plan, rng = plan_of(make_plan, mode, **quiet), np.random.default_rng(1)
    for _ in range(50):
        model, total = worst_honest_sum(plan, 6, rng)
        verdict = judge(plan, 0, model, total, 6)
        assert verdict.plausible
        assert verdict.norm > 0.65 * verdict.bound


def test_one_class_alone_cannot_have_what_all_may_have_together(make_plan: MakePlan) -> None:
    """A poisoner adds no more to a class than all merchants' queries of it may be."""
    plan, randomness = plan_of(make_plan, "trends"), SeededRandomness(3, "honest")
    mechanism, merchants = plan.mechanism(1), 6
    most = round(most_of_a_class(plan) / mechanism.grid.fine_unit)
    verdicts = []
    for times in (merchants, merchants + 1):
        total = np.zeros(plan.dimension, dtype=np.uint32)
        for merchant in range(merchants):
            queries = np.zeros(plan.dimension, dtype=np.int64)
            queries[0] = most + (times - merchants) * most * (merchant == 0)
            total += ring.residues(mechanism.contribute(queries, plan.limit, randomness))
        verdicts.append(judge(plan, 0, np.zeros(plan.dimension, np.float32), total, merchants))
    assert verdicts[0].plausible and not verdicts[1].plausible


LOUD: dict[str, Any] = {"expected_batch": 4.0, "noise_multiplier": 20.0}


@pytest.mark.parametrize(
    ("mode", "own", "near"),
    [
        ("distributed", LOUD, 0.7),
        ("mean", LOUD, 0.7),
        ("evaluation", LOUD, 0.7),
        ("trends", LOUD, 0.7),
        ("merchant-level", {}, 0.7),
        ("local", LOUD | {"update_bound": 64.0}, 0.3),
    ],
)
def test_the_tails_are_those_of_the_noise_that_is_drawn(
    make_plan: MakePlan, mode: str, own: dict[str, Any], near: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a failure of 1 in 20 instead of 1e-9, the worst honest sums fail no more often than that."""
    monkeypatch.setattr(plausibility, "FAILURE", 0.05)
    plan, rng = plan_of(make_plan, mode, **own), np.random.default_rng(2)
    verdicts = [judge(plan, 0, *worst_honest_sum(plan, 6, rng), 6) for _ in range(200)]
    assert sum(not verdict.plausible for verdict in verdicts) <= 0.05 * len(verdicts)
    assert max(verdict.norm / verdict.bound for verdict in verdicts) > near


@pytest.mark.parametrize("contributions", [0.0, 3.0, 100.0])
@pytest.mark.parametrize("dimension", [1, 30])
def test_noise_along_the_contributions_and_across_them_counts(contributions: float, dimension: int) -> None:
    rng, failure = np.random.default_rng(4), 0.05
    sums = rng.normal(size=(5000, dimension)) * 2.0
    sums[:, 0] += contributions
    bound = plausibility._with_noise(contributions, 4.0, dimension, math.log(2 / failure))
    longer = np.linalg.norm(sums, axis=1) > bound
    assert longer.mean() <= failure
    assert np.quantile(np.linalg.norm(sums, axis=1), 0.99) > 0.6 * bound


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    mode=st.sampled_from(sorted(MODES)),
    merchants=st.integers(4, 8),
    expected_batch=st.floats(1, 3000),
    sampling_rate=st.floats(0.05, 1),
    clipping_norm=st.floats(0.05, 20),
    noise_multiplier=st.floats(0.5, 8),
    rate=st.floats(0.01, 3),
    momentum=st.floats(0, 0.95),
    steps=st.integers(1, 6),
    penalties=st.tuples(st.floats(0, 0.2), st.floats(0, 1)),
    proximal=st.sampled_from([0.0, 0.1, 1.0, 10.0]),
    update_bound=st.floats(0.05, 64),
    model_norm=st.floats(0, 10),
    seed=st.integers(0, 1 << 32),
)
def test_an_honest_sum_of_any_plan_is_plausible(
    make_plan: MakePlan, mode: str, merchants: int, expected_batch: float, sampling_rate: float,
    clipping_norm: float, noise_multiplier: float, rate: float, momentum: float, steps: int,
    penalties: tuple[float, float], proximal: float, update_bound: float, model_norm: float, seed: int,
) -> None:  # fmt: skip
    changes: dict[str, Any] = {"noise_multiplier": noise_multiplier, "expected_batch": expected_batch}
    if mode not in ("mean", "evaluation", "trends"):
        changes |= {"sampling_rate": sampling_rate, "clipping_norm": clipping_norm}
    if mode == "local":
        changes |= {
            "local_steps": steps,
            "learning_rate": rate,
            "momentum": momentum,
            "update_bound": update_bound,
            "proximal": proximal,
        }
    plan = plan_of(make_plan, mode, Linear(l1=penalties[0], l2=penalties[1]), **changes)
    rng = np.random.default_rng(seed)
    model, total = worst_honest_sum(plan, merchants, rng, model_norm if mode == "local" else 0.0)
    verdict = judge(plan, 0, model, total, merchants)
    assert verdict.plausible


@pytest.mark.parametrize("mode", MODES)
def test_random_residues_are_never_plausible(make_plan: MakePlan, mode: str) -> None:
    plan, rng = plan_of(make_plan, mode), np.random.default_rng(3)
    model, total = worst_honest_sum(plan, 5, rng)
    drawn = rng.integers(0, 1 << 32, plan.dimension, dtype=np.uint32)
    assert not judge(plan, 0, model, total + drawn, 6).plausible


def test_a_local_bound_falls_with_the_learning_rate_and_survives_a_recursion_that_explodes(
    make_plan: MakePlan,
) -> None:
    decaying = plan_of(make_plan, "local", decay=True)
    assert plausibility.bound(decaying, 2, 0.0, 5) < 0.6 * plausibility.bound(decaying, 0, 0.0, 5)
    wild = plan_of(make_plan, "local", Linear(l2=1.0), learning_rate=1e9, local_steps=500, update_bound=2.0)
    assert plausibility.bound(wild, 0, 1.0, 5) == pytest.approx(5 * 2.0 * math.sqrt(wild.dimension), rel=1e-6)


def test_a_proximal_term_that_overshoots_is_in_the_bound(make_plan: MakePlan) -> None:
    # At a rate times proximal of 5 each step multiplies the distance from the start by 4.
    plan = plan_of(
        make_plan, "local", learning_rate=0.5, momentum=0.0, local_steps=8, proximal=10.0, update_bound=1e4
    )
    model, total = worst_honest_sum(plan, 5, np.random.default_rng(5))
    assert judge(plan, 0, model, total, 5).plausible
    calm = plan_of(make_plan, "local", learning_rate=0.5, momentum=0.0, local_steps=8, update_bound=1e4)
    pulled = plan_of(
        make_plan, "local", learning_rate=0.5, momentum=0.0, local_steps=8, proximal=1.0, update_bound=1e4
    )
    assert plausibility.bound(pulled, 0, 0.0, 5) < 0.5 * plausibility.bound(calm, 0, 0.0, 5)


def test_a_norm_is_exact_over_many_numbers_and_of_the_whole_ring(make_plan: MakePlan) -> None:
    values = np.resize(np.array([2**31 - 1, 1 - 2**31], dtype=np.int32), 200_001)
    assert plausibility._norm(values) == pytest.approx((2**31 - 1) * math.sqrt(200_001), rel=1e-12)
    assert plausibility._norm(np.full(100_000, 3e30, dtype=np.float32)) == pytest.approx(
        3e30 * math.sqrt(1e5)
    )


def test_the_refusal_names_norm_and_bound_and_what_may_be_wrong(make_plan: MakePlan) -> None:
    text = Verdict(120.0, 45.0).refusal(plan_of(make_plan, "distributed"), 6)
    assert "norm 120" in text and "below 45" in text and "nobody can tell who" in text
    assert "2 times the photos that expected_batch (2000)" in text
    assert "expected_batch" not in Verdict(120.0, 45.0).refusal(plan_of(make_plan, "merchant-level"), 6)


# Through secure aggregation: each merchant of `make_masked` uploads its own number in every coordinate.


def uploads(league: Any, plan: Plan, value: Callable[[Start], float]) -> None:
    for member in league.members.values():
        member.update = lambda start: np.full(plan.dimension, value(start))


def run(rounds: Any, plan: Plan) -> Any:
    return rounds.run(0, np.zeros(plan.dimension, dtype=np.float32))


@pytest.fixture
def small(make_plan: MakePlan) -> Plan:
    return make_plan({"learning_rate": 0.5})


def test_an_implausible_sum_fails_the_round(small: Plan, make_masked: Callable[..., Any]) -> None:
    league, rounds = make_masked(small, attempts=2)
    uploads(league, small, lambda start: 7.0)
    with pytest.raises(RoundFailed, match=r"Attempt 2: The sum of 4 uploads has norm 128\.3"):
        run(rounds, small)


def test_a_later_attempt_is_used_and_tells_of_the_one_before(
    small: Plan, make_masked: Callable[..., Any]
) -> None:
    league, rounds = make_masked(small, attempts=2)
    uploads(league, small, lambda start: 0.5 if start.attempt else 7.0)
    outcome = run(rounds, small)
    assert np.allclose(outcome.update, 0.5, atol=1e-6)
    assert outcome.norm == pytest.approx(4 * 0.5 * math.sqrt(small.dimension), rel=1e-5)
    assert outcome.norm < outcome.bound == plausibility.bound(small, 0, 0.0, 4)
    (failure,) = outcome.failures
    assert "nobody can tell who" in str(failure)
    assert not outcome.blamed
