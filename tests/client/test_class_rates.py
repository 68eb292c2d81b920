"""Samples with fewer of some classes: at the plan's rates, each photo by itself, and ε is that of the largest rate."""

from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np
import pytest
from pydantic import ValidationError
from scipy import stats

from hanse_client.examples import Examples
from hanse_client.training import ShopTrainer
from hanse_common import wire
from hanse_common.plan import Plan
from hanse_common.privacy.mechanism import Mechanism
from hanse_common.privacy.sampling import thinned
from hanse_common.randomness import AesCtrStream
from hanse_common.vision.recipe_model import Loss

MakePlan = Callable[..., Plan]
RATES = (0.4, 0.1, 0.02)
ALPHA = 1e-6


def examples(labels: Any, products: Any = None) -> Examples:
    return Examples.of(np.zeros((len(labels), 2), dtype=np.float32), np.asarray(labels), "cpu", products)


def with_rates(plan: Plan, rates: Any, **changes: Any) -> Plan:
    training = type(plan.training).model_validate(
        plan.training.model_dump() | {"sampling_rate": 0.4, "class_rates": rates} | changes
    )
    return Plan.model_validate(plan.model_dump() | {"training": training.model_dump()})


def test_each_class_has_its_own_rate() -> None:
    own = examples(np.repeat([0, 1, 2], 20_000))
    found = own.sample("photo", 0.4, AesCtrStream(bytes(32)), RATES)
    assert (np.diff(found) > 0).all()
    for label, rate in enumerate(RATES):
        count = int((np.asarray(own.labels)[found] == label).sum())
        assert stats.binomtest(count, 20_000, rate).pvalue > ALPHA
    without = own.sample("photo", 0.4, AesCtrStream(bytes(32)))
    assert set(found) <= set(without)


def test_a_product_is_in_a_sample_by_the_class_of_the_photo_drawn() -> None:
    own = examples([0, 2] * 10_000, [f"{index // 2}" for index in range(20_000)])
    found = own.sample("product", 0.4, AesCtrStream(bytes(32)), RATES)
    assert len(np.unique(found // 2)) == len(found)  # never two photos of one product
    assert stats.binomtest(int((found % 2 == 0).sum()), 10_000, 0.2).pvalue > ALPHA
    assert stats.binomtest(int((found % 2 == 1).sum()), 10_000, 0.01).pvalue > ALPHA


def test_how_many_photos_a_class_has_changes_nobody_elses_chance() -> None:
    """By the same coins a photo stays in or out whatever the others show. Weighted draws of a fixed number can't."""
    sample, kinds = np.arange(500), np.arange(500) % 3
    first = thinned(sample, kinds, RATES, 0.4, AesCtrStream(bytes(32)))
    others = kinds.copy()
    others[250:] = 0
    second = thinned(sample, others, RATES, 0.4, AesCtrStream(bytes(32)))
    np.testing.assert_array_equal(first[first < 250], second[second < 250])
    shorter = thinned(sample[:250], kinds[:250], RATES, 0.4, AesCtrStream(bytes(32)))
    np.testing.assert_array_equal(shorter, first[first < 250])


def test_how_many_are_sampled_varies_as_independent_coins_do() -> None:
    own, source = examples(np.repeat([0, 1, 2], 100)), AesCtrStream(bytes(32))
    counts = [len(own.sample("photo", 0.4, source, RATES)) for _ in range(2000)]
    variance = sum(100 * rate * (1 - rate) for rate in RATES)
    statistic = (len(counts) - 1) * np.var(counts, ddof=1) / variance
    assert 2 * min(stats.chi2.cdf(statistic, 1999), stats.chi2.sf(statistic, 1999)) > ALPHA


def test_a_photo_of_no_class_is_never_in_a_sample() -> None:
    own = examples([-1, 3, 7] * 100)
    assert not len(own.sample("photo", 1.0, AesCtrStream(bytes(32)), (1.0, 0.5, 0.5)))


@pytest.mark.parametrize("rates", [(0.5, 0.1, 0.1), (0.4, 0.0, 0.1), (0.4, -0.1, 0.1), (1.5, 0.1, 0.1)])
def test_rates_over_the_sampling_rate_are_refused(make_plan: MakePlan, rates: tuple[float, ...]) -> None:
    """So draws weighted without bound, which ε would not be computed for, can be neither planned nor drawn."""
    with pytest.raises(ValidationError, match="class_rates"):
        with_rates(make_plan(), rates)
    with pytest.raises(ValueError, match="at most the sampling rate"):
        examples([0, 1, 2]).sample("photo", 0.4, AesCtrStream(bytes(32)), rates)


def test_rates_are_one_for_each_class_or_none(make_plan: MakePlan) -> None:
    for rates in ((0.4,), (0.4, 0.1), (0.1,) * 4):
        with pytest.raises(ValidationError, match="expected one for each of 3 classes"):
            with_rates(make_plan(), rates)
    plan = make_plan()
    with pytest.raises(ValidationError, match=r"loss.class_weights: found 2 numbers"):
        Plan.model_validate(
            plan.model_dump()
            | {"recipe": plan.recipe.model_copy(update={"loss": Loss(class_weights=(1.0, 2.0))}).model_dump()}
        )


def test_epsilon_is_that_of_the_largest_rate(make_plan: MakePlan) -> None:
    plan = with_rates(make_plan(), RATES)
    assert plan.mechanism(3) == with_rates(make_plan(), ()).mechanism(3)
    assert plan.mechanism(1).sampling_rate == max(RATES)
    lower = with_rates(make_plan(), (), sampling_rate=0.1)
    assert plan.epsilon() > lower.epsilon()


def test_the_proof_holds_in_numbers() -> None:
    """Hockey-stick divergences of a thinned Gaussian step, both ways, do not fall as the rate grows."""
    x = np.linspace(-12, 13, 200_001)
    without, with_it = stats.norm.pdf(x), stats.norm.pdf(x, 1.0)
    for epsilon in (0.0, 0.1, 0.5, 1.0):
        divergences = []
        for rate in np.linspace(0, 0.4, 9):
            mixture = (1 - rate) * without + rate * with_it
            one, two = (
                np.trapezoid(np.maximum(0, a - np.exp(epsilon) * b), x)
                for a, b in ((mixture, without), (without, mixture))
            )
            divergences.append((one, two))
        assert (np.diff(np.array(divergences), axis=0) >= -1e-12).all()


def test_a_plan_with_rates_needs_version_3_and_one_without_stays_as_it_was(make_plan: MakePlan) -> None:
    plan = with_rates(make_plan(), RATES)
    data = wire.encode(plan)
    assert msgpack.unpackb(data, use_list=False)[0] == 3
    assert wire.decode(Plan, data) == plan
    assert msgpack.unpackb(wire.encode(with_rates(make_plan(), ())), use_list=False)[0] == 1


def test_training_draws_at_the_plans_rates(make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Photos of a class that is hardly ever drawn do not move the model."""
    monkeypatch.setattr(Mechanism, "release", lambda self, fine, randomness: fine * self.grid.fine_unit)
    plan = with_rates(make_plan(), (1e-9, 0.4, 0.4))
    features = np.ones((300, plan.recipe.feature_dimension), dtype=np.float32)

    def update(label: int) -> Any:
        own = Examples.of(features, np.full(300, label), "cpu")
        trainer = ShopTrainer(plan.recipe, plan.taxonomy, own, AesCtrStream(bytes(32)))
        return trainer.local_update(plan, 0, np.zeros(plan.dimension, dtype=np.float32))

    assert not update(0).any()
    assert update(1).any()
