"""What leaves in the modes with shared noise: by photo, by product, by merchant; bounded, and silent about photos."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from hanse_client.exact_sums import ExactSums
from hanse_client.examples import Examples
from hanse_client.training import ShopTrainer
from hanse_common.modes import DistributedTraining, MerchantLevelTraining
from hanse_common.plan import Cohort, Plan
from hanse_common.privacy.mechanism import Mechanism
from hanse_common.randomness import AesCtrStream
from hanse_common.secagg import ring

MakePlan = Callable[..., Plan]
FEATURES, CLASSES, DIMENSION = 6, 3, 21
ALPHA = 1e-6


def distributed(make_plan: MakePlan, **changes: Any) -> Plan:
    fields = {
        "rounds": 4,
        "sampling_rate": 1.0,
        "expected_batch": 30.0,
        "clipping_norm": 1.0,
        "noise_multiplier": 2.0,
    }
    cohort = Cohort(min_merchants=5, max_merchants=7, max_corrupt=1)
    return make_plan(cohort=cohort).model_copy(update={"training": DistributedTraining(**(fields | changes))})


def merchant_level(make_plan: MakePlan, **changes: Any) -> Plan:
    fields = {
        "rounds": 4,
        "sampling_rate": 1.0,
        "expected_batch": 5.0,
        "clipping_norm": 1.0,
        "noise_multiplier": 2.0,
        "local_steps": 5,
        "local_rate": 0.5,
        "learning_rate": 0.3,
    }
    plan = distributed(make_plan)
    return plan.model_copy(update={"training": MerchantLevelTraining(**(fields | changes))})


def arrays(count: int = 30, seed: int = 1) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(CLASSES, size=count)
    features = rng.normal(size=(count, FEATURES)) + 2 * np.eye(CLASSES, FEATURES)[labels]
    return features.astype(np.float32), labels


def contribution(
    plan: Plan, inputs: Any, labels: Any, products: Any = None, key: int = 1
) -> NDArray[np.int64]:
    examples = Examples.of(inputs, labels, "cpu", products)
    one = ShopTrainer(plan.recipe, plan.taxonomy, examples, AesCtrStream(bytes([key]) * 32))
    start = np.random.default_rng(3).normal(scale=0.3, size=plan.dimension).astype(np.float32)
    return ring.integers(one.contribution(plan, 0, start)).astype(np.int64)


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> list[NDArray[np.int64]]:
    """Note each exact sum, in fine units, that gets rounded and noise."""
    seen: list[NDArray[np.int64]] = []
    original = Mechanism.contribute

    def contribute(self: Mechanism, fine: NDArray[np.int64], limit: int, source: Any) -> NDArray[np.int64]:
        seen.append(fine.copy())
        return original(self, fine, limit, source)

    monkeypatch.setattr(Mechanism, "contribute", contribute)
    return seen


def length(fine: NDArray[np.int64], plan: Plan) -> float:
    """The exact norm over C."""
    grid = plan.mechanism(1).grid
    square = sum(int(f) ** 2 for f in fine)
    return float(square**0.5 * grid.fine_unit / grid.clipping_norm)


# The noise share, and room in the ring


@pytest.mark.parametrize("make", [distributed, merchant_level])
def test_an_empty_shop_contributes_its_share_of_noise(make_plan: MakePlan, make: Any) -> None:
    plan = make(make_plan)
    inputs, labels = arrays(0)
    found = np.concatenate([contribution(plan, inputs, labels, key=key) for key in range(1, 60)])
    share = plan.mechanism(1).noise.share
    assert share == pytest.approx(plan.mechanism(1).noise.sigma / 2)  # four honest of five
    square, law = float(np.sum((found / share) ** 2)), stats.chi2(found.size)
    assert law.ppf(ALPHA) < square < law.isf(ALPHA)


def test_the_largest_contributions_of_all_do_not_wrap(
    make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = distributed(make_plan)
    plan = plan.model_copy(update={"cohort": Cohort(min_merchants=5, max_merchants=300, max_corrupt=1)})
    inputs, labels = arrays()
    monkeypatch.setattr(
        "hanse_client.exact_sums.ExactSums.sum", lambda *_: np.full(DIMENSION, -(2**62), dtype=np.int64)
    )
    found = contribution(plan, inputs, labels)
    mechanism = plan.mechanism(1)
    assert found.min() > 0
    assert found.max() <= plan.limit
    assert 300 * plan.limit < 2**31
    assert np.abs(found - mechanism.room(plan.limit)).max() <= mechanism.reach


def test_cutting_to_the_limit_never_moves_neighbours_apart(make_plan: MakePlan) -> None:
    mechanism = distributed(make_plan).mechanism(1)
    step = mechanism.grid.fine_per_step
    limit = mechanism.reach + 50
    rng = np.random.default_rng(5)
    for _ in range(200):
        one = rng.integers(-200, 200, DIMENSION) * step
        two = one + rng.integers(-20, 20, DIMENSION) * step
        a, b = (mechanism.contribute(x, limit, AesCtrStream(bytes(32))) for x in (one, two))
        assert (np.abs(a - b) <= np.abs(one - two) // step).all()
        assert np.abs(a).max() <= limit


def test_a_limit_without_room_is_refused(make_plan: MakePlan) -> None:
    mechanism = distributed(make_plan).mechanism(1)
    with pytest.raises(ValueError, match="largest noise"):
        mechanism.contribute(np.zeros(DIMENSION, dtype=np.int64), mechanism.reach, AesCtrStream(bytes(32)))


def test_shared_noise_is_never_released_alone(make_plan: MakePlan) -> None:
    mechanism = distributed(make_plan).mechanism(1)
    with pytest.raises(ValueError, match="4 shares"):
        mechanism.release(np.zeros(DIMENSION, dtype=np.int64), AesCtrStream(bytes(32)))


def test_a_plan_without_room_is_refused(make_plan: MakePlan) -> None:
    distributed(make_plan).require_room()
    with pytest.raises(ValueError, match="expected_batch"):
        distributed(make_plan, expected_batch=1e7).require_room()
    with pytest.raises(ValueError, match="mode local"):
        distributed(make_plan).encode(np.zeros(DIMENSION))


# Units


@pytest.mark.usefixtures("bare")
def test_one_photo_more_moves_the_sum_by_at_most_the_norm(
    make_plan: MakePlan, bare: list[NDArray[np.int64]]
) -> None:
    plan = distributed(make_plan)
    inputs, labels = arrays()
    labels[-1] = (labels[-1] + 1) % CLASSES  # or its residual would be zero
    contribution(plan, 100 * inputs, labels)
    contribution(plan, 100 * inputs[:-1], labels[:-1])
    assert 0.5 < length(bare[0] - bare[1], plan) <= 1


def test_one_product_more_moves_the_sum_by_at_most_the_norm_however_many_photos(
    make_plan: MakePlan, bare: list[NDArray[np.int64]]
) -> None:
    plan = distributed(make_plan, unit="product")
    inputs, labels = arrays()
    inputs[20:], labels[20:] = 100 * inputs[20], labels[20]
    products = [f"sku {index // 2}" for index in range(20)] + ["much photographed"] * 10
    contribution(plan, inputs, labels, products)
    contribution(plan, inputs[:20], labels[:20], products[:20])
    assert 0.5 < length(bare[0] - bare[1], plan) <= 1
    by_photo = distributed(make_plan)
    contribution(by_photo, inputs, labels, products)
    contribution(by_photo, inputs[:20], labels[:20], products[:20])
    assert length(bare[2] - bare[3], plan) > 5, "by photo, ten photos count ten times"


def test_a_product_sends_one_of_its_photos_at_random_and_loners_are_products(make_plan: MakePlan) -> None:
    inputs, labels = arrays(7)
    examples = Examples.of(inputs, labels, "cpu", ["a", "b", "a", None, "a", None, "b"])
    source = AesCtrStream(bytes(32))
    samples = [examples.sample("product", 1.0, source) for _ in range(3000)]
    assert all(len(s) == 4 for s in samples)
    counts = np.bincount(np.concatenate(samples), minlength=7)
    assert counts[3] == counts[5] == 3000
    assert counts[[0, 2, 4]].sum() == counts[[1, 6]].sum() == 3000
    assert stats.chisquare(counts[[0, 2, 4]]).pvalue > ALPHA
    assert stats.chisquare(counts[[1, 6]]).pvalue > ALPHA
    rare = [len(examples.sample("product", 0.25, source)) for _ in range(3000)]
    assert np.mean(rare) == pytest.approx(1.0, abs=0.1)
    assert np.array_equal(Examples.of(inputs, labels, "cpu").sample("product", 1.0, source), np.arange(7))


# Merchant-level


def test_a_merchants_whole_update_is_clipped(make_plan: MakePlan, bare: list[NDArray[np.int64]]) -> None:
    inputs, labels = arrays()
    for rate in (0.3, 1e6):
        plan = merchant_level(make_plan, learning_rate=rate)
        contribution(plan, inputs, labels)
        assert 0.5 < length(bare[-1], plan) <= 1
    little = merchant_level(make_plan, learning_rate=0.001)
    contribution(little, inputs, labels)
    assert 0 < length(bare[-1], little) < 0.1


def test_by_its_coin_a_merchant_uploads_noise_alone(
    make_plan: MakePlan, bare: list[NDArray[np.int64]]
) -> None:
    plan = merchant_level(make_plan, sampling_rate=0.3)
    inputs, labels = arrays()
    for key in range(200):
        contribution(plan, inputs, labels, key=key)
    took_part = sum(fine.any() for fine in bare)
    assert stats.binomtest(took_part, 200, 0.3).pvalue > ALPHA


def test_the_coin_does_not_show_in_the_work(make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = merchant_level(make_plan, sampling_rate=0.3)
    trained: list[int] = []
    original = ExactSums.plain_update
    monkeypatch.setattr(ExactSums, "plain_update", lambda *a: trained.append(1) or original(*a))
    for key in range(20):
        contribution(plan, *arrays(), key=key)
    assert len(trained) == 20
    assert plan.training.work == 4 * 5


def test_a_plain_step_is_one_step_however_many_photos(
    make_plan: MakePlan, bare: list[NDArray[np.int64]], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = merchant_level(make_plan, local_rate=1.0, clipping_norm=100.0)
    contribution(plan, *arrays())
    monkeypatch.setattr("hanse_client.exact_sums.CHUNK", 7)
    contribution(plan, *arrays())
    unit = plan.mechanism(1).grid.fine_unit
    np.testing.assert_allclose(bare[0] * unit, bare[1] * unit, atol=1e-5)
    assert length(bare[0], plan) > 0.001


def test_both_penalties_enter_a_plain_step(make_plan: MakePlan, bare: list[NDArray[np.int64]]) -> None:
    plain = merchant_level(make_plan, learning_rate=0.01, local_rate=1.0, local_steps=1, clipping_norm=100.0)
    for penalty in ({"l1": 0.5}, {"l2": 0.5}):
        model = plain.recipe.model.model_copy(update=penalty)
        plan = plain.model_copy(update={"recipe": plain.recipe.model_copy(update={"model": model})})
        for each in (plain, plan):
            contribution(each, *arrays())
        start = np.random.default_rng(3).normal(scale=0.3, size=DIMENSION).astype(np.float32)
        moved = (bare[-1] - bare[-2]) * plan.mechanism(1).grid.fine_unit
        wanted = -0.01 * model.penalty_gradient(start.astype(np.float64))
        np.testing.assert_allclose(moved, wanted, atol=2e-5)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_an_update_that_is_not_finite_is_noise_alone(
    make_plan: MakePlan, bare: list[NDArray[np.int64]]
) -> None:
    inputs, labels = arrays()
    inputs[:] = np.nan
    contribution(merchant_level(make_plan), inputs, labels)
    assert not bare[0].any()


# Nothing observable depends on photos


def broken(kind: str) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    inputs, labels = arrays()
    if kind == "a photo that is not a number":
        inputs[3] = np.nan
    if kind == "an infinite photo":
        inputs[3] = np.inf
    if kind == "a label that is no class":
        labels[3] = CLASSES
    if kind == "no photos":
        return inputs[:0], labels[:0]
    return inputs, labels


@pytest.mark.parametrize("make", [distributed, merchant_level])
@pytest.mark.parametrize(
    "kind", ["a photo that is not a number", "an infinite photo", "a label that is no class", "no photos"]
)
def test_whatever_photos_are_there_a_contribution_leaves(make_plan: MakePlan, make: Any, kind: str) -> None:
    plan = make(make_plan)
    found = contribution(plan, *broken(kind))
    assert found.shape == (DIMENSION,)
    assert found.any()


@pytest.mark.parametrize("make", [distributed, merchant_level])
def test_a_training_that_fails_uploads_noise_alone(
    make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, make: Any
) -> None:
    plan = make(make_plan)
    inputs, labels = arrays()
    noise = contribution(plan, inputs[:0], labels[:0], key=2)

    def fails(*_: Any) -> Any:
        raise MemoryError("no room")

    for name in ("sum", "plain_update"):
        monkeypatch.setattr(f"hanse_client.exact_sums.ExactSums.{name}", fails)
    found = contribution(plan, inputs, labels, key=2)
    assert "noise alone" in caplog.text
    law, square = stats.chi2(DIMENSION), float(np.sum((found / plan.mechanism(1).noise.share) ** 2))
    assert law.ppf(ALPHA) < square < law.isf(ALPHA)
    assert noise.shape == found.shape


@pytest.mark.parametrize(
    "kind", ["a photo that is not a number", "an infinite photo", "a label that is no class"]
)
@pytest.mark.parametrize("closed_form", [True, False])
def test_one_bad_photo_counts_as_zero(
    make_plan: MakePlan, bare: list[NDArray[np.int64]], kind: str, closed_form: bool
) -> None:
    plan = distributed(make_plan)
    if not closed_form:  # dropout of almost nothing, drawn alike for both
        model = plan.recipe.model.model_copy(update={"dropout": 1e-9})
        plan = plan.model_copy(update={"recipe": plan.recipe.model_copy(update={"model": model})})
    inputs, labels = arrays()
    contribution(plan, *broken(kind))
    contribution(plan, np.delete(inputs, 3, axis=0), np.delete(labels, 3))
    assert bare[0].any()
    assert np.array_equal(bare[0], bare[1])
