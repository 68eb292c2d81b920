"""What leaves in mode `evaluation`: counts of the holdout alone, bounded, and silent about photos."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy import stats

from hanse_client.config import ClientConfig
from hanse_client.examples import Examples
from hanse_client.holdout_sums import CHUNK, HoldoutSums
from hanse_client.shop import Shop
from hanse_client.training import ShopTrainer
from hanse_common.evaluation import Layout
from hanse_common.modes import EvaluationTraining
from hanse_common.plan import Cohort, Plan
from hanse_common.privacy.mechanism import Mechanism
from hanse_common.randomness import AesCtrStream
from hanse_common.secagg import ring

MakePlan = Callable[..., Plan]
Bare = list[NDArray[np.int64]]
FEATURES, CLASSES = 6, 3
ALPHA = 1e-6


def evaluation(make_plan: MakePlan, **changes: Any) -> Plan:
    fields = {"rounds": 4, "expected_batch": 30.0, "noise_multiplier": 2.0}
    base = make_plan(cohort=Cohort(min_merchants=5, max_merchants=7))
    plan = base.model_copy(update={"training": EvaluationTraining(**(fields | changes))})
    return plan.model_copy(update={"dimension": plan.expected_dimension})


def holdout(count: int = 30, seed: int = 1) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(CLASSES, size=count)
    features = rng.normal(size=(count, FEATURES)) + 2 * np.eye(CLASSES, FEATURES)[labels]
    return features.astype(np.float32), labels


def model_of(plan: Plan) -> NDArray[np.float32]:
    return np.random.default_rng(3).normal(size=plan.model_dimension).astype(np.float32)


def trainer(plan: Plan, held_out: Examples | None, key: int = 1) -> ShopTrainer:
    training = replace(Examples.of(*holdout(50, seed=9), "cpu"), holdout=held_out)
    return ShopTrainer(plan.recipe, plan.taxonomy, training, AesCtrStream(bytes([key]) * 32))


def contribution(
    plan: Plan, inputs: Any, labels: Any, products: Any = None, key: int = 1
) -> NDArray[np.int64]:
    one = trainer(plan, Examples.of(inputs, labels, "cpu", products), key)
    assert one.accepts(plan)
    return ring.integers(one.contribution(plan, 0, model_of(plan))).astype(np.int64)


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> Bare:
    """Note each exact sum, in fine units, that gets rounded and noise."""
    seen: Bare = []
    original = Mechanism.contribute

    def contribute(self: Mechanism, fine: NDArray[np.int64], limit: int, source: Any) -> NDArray[np.int64]:
        seen.append(fine.copy())
        return original(self, fine, limit, source)

    monkeypatch.setattr(Mechanism, "contribute", contribute)
    return seen


def length(fine: NDArray[np.int64], plan: Plan) -> float:
    """The exact norm over C."""
    return float(sum(int(f) ** 2 for f in fine) ** 0.5 * plan.mechanism(1).grid.fine_unit)


def test_the_holdout_is_counted_and_nothing_that_is_trained_on(make_plan: MakePlan, bare: Bare) -> None:
    plan = evaluation(make_plan)
    inputs, labels = holdout()
    contribution(plan, inputs, labels)
    head = model_of(plan).reshape(-1)
    weights, bias = head[: CLASSES * FEATURES].reshape(CLASSES, FEATURES), head[CLASSES * FEATURES :]
    logits = inputs.astype(np.float64) @ weights.T + bias
    scores = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    layout = Layout(CLASSES)
    counted = (bare[0] - layout.sum(labels, scores))[: layout.parts["gap"].start]
    assert not counted.any()
    contribution(plan, inputs[:0], labels[:0])
    assert not bare[1].any()


def test_what_grows_with_the_catalog_is_made_before_the_charge(
    make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch, bare: Bare
) -> None:
    """Else running out of memory after it, and so one photo more, would show."""
    plan = evaluation(make_plan, unit="product")
    inputs, labels = holdout(30)
    one = trainer(plan, Examples.of(inputs, labels, "cpu", [f"sku {n // 2}" for n in range(30)]))
    assert one.accepts(plan)

    def no_memory(*arguments: Any, **more: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as scarce:
        scarce.setattr(np, "argsort", no_memory)
        one.contribution(plan, 0, model_of(plan))
    layout = Layout(CLASSES)
    assert bare[0][layout.parts["outcome"]].sum() == 15 * layout.weights["outcome"]


def test_a_shop_without_holdout_contributes_its_share_of_noise(make_plan: MakePlan) -> None:
    plan = evaluation(make_plan)
    found = []
    for key, held_out in enumerate([None, Examples.of(*holdout(0), "cpu")] * 5):
        one = trainer(plan, held_out, key)
        assert one.accepts(plan)
        found.append(ring.integers(one.contribution(plan, 0, model_of(plan))).astype(np.int64))
    all_ = np.concatenate(found)
    share = plan.mechanism(1).noise.share
    assert share == pytest.approx(plan.mechanism(1).noise.sigma / 2)  # four honest of five
    square, law = float(np.sum((all_ / share) ** 2)), stats.chi2(all_.size)
    assert law.ppf(ALPHA) < square < law.isf(ALPHA)


def test_one_photo_more_moves_the_sum_by_at_most_the_norm(make_plan: MakePlan, bare: Bare) -> None:
    """Exactly one vector, also when it begins another chunk and everyone behind it moves up."""
    plan = evaluation(make_plan)
    inputs, labels = holdout(CHUNK + 10)
    contribution(plan, inputs, labels)
    contribution(plan, np.delete(inputs, 5, axis=0), np.delete(labels, 5))
    contribution(plan, inputs[5:6], labels[5:6])
    assert np.array_equal(bare[0] - bare[1], bare[2])
    assert 0.9 < length(bare[2], plan) <= 1


def test_scores_on_the_edge_of_a_bin_do_not_move_with_their_place(make_plan: MakePlan, bare: Bare) -> None:
    """A server may send a model that puts all scores on an edge; a rounding by place would then tell of a photo."""
    plan = evaluation(make_plan)
    inputs = np.repeat(holdout(1)[0], 100, axis=0)
    labels = np.zeros(100, dtype=np.int64)
    contribution(plan, inputs, labels)
    contribution(plan, inputs[:1], labels[:1])
    assert np.array_equal(bare[0], 100 * bare[1])


def test_where_a_place_matters_photos_are_computed_one_at_a_time(
    make_plan: MakePlan, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = evaluation(make_plan)
    original = HoldoutSums._scores

    def by_place(self: HoldoutSums, rows: torch.Tensor) -> torch.Tensor:
        found = original(self, rows)
        return found + 1e-16 * torch.arange(len(rows))[:, None]

    monkeypatch.setattr(HoldoutSums, "_scores", by_place)
    sums = HoldoutSums(plan.recipe, plan.taxonomy, Examples.of(*holdout(5), "cpu"))
    sums.prepare()
    assert "one at a time" in caplog.text
    assert sums._rows == 1
    assert sums.sum(model_of(plan), np.arange(5)).any()


def test_one_product_is_one_vector_however_many_photos(make_plan: MakePlan, bare: Bare) -> None:
    plan = evaluation(make_plan, unit="product")
    inputs, labels = holdout(30)
    inputs[20:], labels[20:] = inputs[20], labels[20]
    products = [f"sku {index // 2}" for index in range(20)] + ["much photographed"] * 10
    contribution(plan, inputs, labels, products)
    contribution(plan, inputs[:20], labels[:20], products[:20])
    assert 0.9 < length(bare[0] - bare[1], plan) <= 1
    weight = Layout(CLASSES).weights["outcome"]
    assert bare[0][Layout(CLASSES).parts["outcome"]].sum() == 11 * weight


def test_a_sampled_evaluation_counts_a_part(make_plan: MakePlan, bare: Bare) -> None:
    plan = evaluation(make_plan, sampling_rate=0.25)
    for key in range(20):
        contribution(plan, *holdout(200), key=key)
    layout = Layout(CLASSES)
    counted = sum(fine[layout.parts["outcome"]].sum() for fine in bare) // layout.weights["outcome"]
    assert stats.binomtest(int(counted), 20 * 200, 0.25).pvalue > ALPHA


@pytest.mark.parametrize("kind", ["not a number", "infinite", "no class"])
def test_one_bad_photo_counts_as_zero(make_plan: MakePlan, bare: Bare, kind: str) -> None:
    plan = evaluation(make_plan)
    inputs, labels = holdout()
    if kind == "no class":
        labels[3] = CLASSES
    else:
        inputs[3] = np.nan if kind == "not a number" else np.inf
    contribution(plan, inputs, labels)
    contribution(plan, np.delete(inputs, 3, axis=0), np.delete(labels, 3))
    assert bare[0].any()
    assert np.array_equal(bare[0], bare[1])


def test_an_evaluation_that_fails_uploads_noise_alone(
    make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, bare: Bare
) -> None:
    plan = evaluation(make_plan)

    def fails(*_: Any) -> Any:
        raise MemoryError("no room")

    monkeypatch.setattr(HoldoutSums, "sum", fails)
    found = contribution(plan, *holdout())
    assert "noise alone" in caplog.text
    assert not bare[0].any() and found.any()


def test_a_model_of_huge_weights_is_tried_all_the_same(make_plan: MakePlan, bare: Bare) -> None:
    """Its logits overflow, so that no photo has scores."""
    plan = evaluation(make_plan)
    inputs, labels = holdout()
    one = trainer(plan, Examples.of(np.abs(inputs) + 1, labels, "cpu"))
    one.contribution(plan, 0, np.full(plan.model_dimension, 3e38, dtype=np.float32))
    one.contribution(plan, 0, np.zeros(plan.model_dimension, dtype=np.float32))
    assert not bare[0].any()
    layout = Layout(CLASSES)
    assert bare[1][layout.parts["predicted"]].tolist() == [30 * layout.weights["predicted"], 0, 0]


def test_another_dimension_is_not_accepted(make_plan: MakePlan) -> None:
    plan = evaluation(make_plan)
    one = trainer(plan, None)
    assert one.accepts(plan)
    assert not one.accepts(plan.model_copy(update={"dimension": plan.dimension + 1}))


def test_a_shops_holdout_comes_beside_its_training_photos(
    tmp_path: Path, make_plan: MakePlan, settings: dict[str, Any]
) -> None:
    for number in range(9, 40):
        path = tmp_path / "photos" / ("shirt", "shoe", "bag")[number % 3] / f"{number}.png"
        Image.fromarray(np.full((9, 9), 5 * number, dtype=np.uint8)).save(path)
    shop = Shop(ClientConfig.model_validate(settings | {"holdout_fraction": 0.5}))
    catalog, recipe = shop.catalog(), make_plan().recipe
    examples, _ = shop.examples(catalog, recipe)
    assert examples.holdout is not None and examples.holdout.holdout is None
    assert examples.labels.tolist() == [record.label for record in catalog.train]
    assert examples.holdout.labels.tolist() == [record.label for record in catalog.holdout]
    assert 0 < len(catalog.holdout) < len(catalog.records)
    whole = Shop(ClientConfig.model_validate(settings | {"state": tmp_path / "other"}))
    everything, _ = whole.examples(whole.catalog(), recipe)
    assert everything.holdout is not None and len(everything.holdout) == 0
    held_out = [index for index, record in enumerate(catalog.records) if record.holdout]
    assert torch.equal(examples.holdout.inputs, everything.inputs[held_out])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_agrees_with_cpu(make_plan: MakePlan) -> None:
    plan = evaluation(make_plan)
    inputs, labels = holdout(600)
    found = [
        HoldoutSums(plan.recipe, plan.taxonomy, Examples.of(inputs, labels, device)).sum(
            model_of(plan), np.arange(600)
        )
        for device in ("cpu", "cuda")
    ]
    layout = Layout(CLASSES)
    difference = (found[0] - found[1]) * layout.grid.fine_unit / layout.scale
    assert np.abs(difference).max() < 1e-3
