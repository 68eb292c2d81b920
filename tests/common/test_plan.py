"""Plan and messages: canonical, signed, bounded."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import ValidationError

from hanse_common import messages, signing, wire
from hanse_common.errors import SignatureInvalid, WireError
from hanse_common.evaluation import Layout
from hanse_common.messages import DeclineCode, Declined, Start
from hanse_common.modes import TRAININGS, EvaluationTraining, MeanTraining, TrendsTraining
from hanse_common.plan import Cohort, Plan, SignedPlan
from hanse_common.secagg import ring
from hanse_common.secagg.messages import Upload
from hanse_common.secagg.ring import Ring
from hanse_common.vision.recipe import Recipe
from hanse_common.vision.recipe_features import Preprocessing, TorchvisionBackbone
from hanse_common.vision.recipe_model import Mlp

MakePlan = Callable[..., Plan]


def test_a_plan_survives_the_wire(make_plan: MakePlan) -> None:
    plan = make_plan()
    again = wire.decode(Plan, wire.encode(plan))
    assert again == plan
    assert again.digest == plan.digest


def test_the_digest_tells_any_two_plans_apart(make_plan: MakePlan) -> None:
    plan = make_plan()
    others = [
        make_plan(league="other"),
        make_plan(serial=b"x" * 16),
        make_plan(delta=1e-6),
        make_plan({"noise_multiplier": 2.0000001}),
        make_plan({"decay": True}),
        make_plan({"proximal": 1e-3}),
        make_plan(cohort=Cohort(min_merchants=3, max_merchants=6)),
        make_plan(cohort=Cohort(min_merchants=4, max_merchants=5, max_corrupt=2)),
    ]
    assert len({plan.digest, *(other.digest for other in others)}) == len(others) + 1


def test_a_signed_plan_opens_with_the_pinned_key_only(make_plan: MakePlan) -> None:
    key = Ed25519PrivateKey.generate()
    plan = make_plan()
    signed = SignedPlan.sign(plan, key)
    assert signed.open(signing.public_bytes(key)) == plan
    with pytest.raises(SignatureInvalid):
        signed.open(signing.public_bytes(Ed25519PrivateKey.generate()))
    with pytest.raises(SignatureInvalid):
        signed.open(b"")
    forged = signed.model_copy(update={"plan": wire.encode(make_plan({"noise_multiplier": 0.1}))})
    with pytest.raises(SignatureInvalid):
        forged.open(signing.public_bytes(key))


@pytest.mark.parametrize(
    "change",
    [
        {"sampling_rate": 0.0},
        {"sampling_rate": 1.5},
        {"noise_multiplier": 0.0},
        {"noise_multiplier": float("nan")},
        {"rounds": 0},
        {"rounds": 1.0},
        {"clipping_norm": -1.0},
        {"proximal": -1.0},
        {"proximal": float("inf")},
        {"mode": "trust-me"},
        {"surprise": 1},
    ],
)
def test_impossible_training_is_refused(make_plan: MakePlan, change: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        make_plan(change)


def test_a_cohort_in_the_wrong_order_is_refused() -> None:
    with pytest.raises(ValidationError, match="min_merchants"):
        Cohort(min_merchants=6, max_merchants=5)


def test_repeats_are_paid_for(make_plan: MakePlan) -> None:
    plan = make_plan({"rounds": 4, "repeats": 3, "local_steps": 2})
    assert plan.training.total_steps == 14
    assert plan.mechanism(14).steps == 14


def test_the_learning_rate_decays_to_zero_over_the_rounds(make_plan: MakePlan) -> None:
    training = make_plan({"decay": True, "learning_rate": 2.0}).training
    assert [training.learning_rate_of(r) for r in range(4)] == [2.0, 1.5, 1.0, 0.5]
    assert make_plan({"learning_rate": 2.0}).training.learning_rate_of(3) == 2.0


def test_every_message_survives_the_wire(make_plan: MakePlan) -> None:
    signed = SignedPlan.sign(make_plan(), Ed25519PrivateKey.generate())
    work = {"plan_digest": bytes(32), "round": 3, "attempt": 1}
    for message in (
        Start(**work, model=b"1234"),
        Declined(**work, code=DeclineCode.BUDGET),
        Declined(**work, code=DeclineCode.SHARES, culprit=bytes(32)),
        Upload(**work, vector=b"12345678"),
        signed,
    ):
        assert wire.decode(type(message), wire.encode(message), messages.MAX_MESSAGE_BYTES) == message


def test_an_unknown_decline_code_is_refused() -> None:
    work = {"plan_digest": bytes(32), "round": 0, "attempt": 0}
    data = wire.encode(Declined(**work, code=DeclineCode.BUDGET)).replace(b"budget", b"gossip")
    with pytest.raises(WireError, match="code"):
        wire.decode(Declined, data)


def test_models_are_finite_and_of_the_right_length() -> None:
    model = np.array([1.5, -2.0, 0.0], dtype=np.float32)
    data = messages.model_to_bytes(model)
    assert np.array_equal(messages.model_from_bytes(data, 3), model)
    with pytest.raises(WireError, match="12 bytes, expected 16"):
        messages.model_from_bytes(data, 4)
    for bad in (np.nan, np.inf, -np.inf):
        broken = messages.model_to_bytes(np.array([0.0, bad], dtype=np.float32))
        with pytest.raises(WireError, match="not finite"):
            messages.model_from_bytes(broken, 2)


def test_bounds_of_plan_and_cohort_hold(make_plan: MakePlan) -> None:
    for impossible in (
        lambda: make_plan({"rounds": 100_000, "local_steps": 11}),  # over a million steps
        lambda: make_plan(delta=1e-2),
        lambda: Cohort(min_merchants=2, max_merchants=5),
        lambda: Cohort(min_merchants=3, max_merchants=301),
        lambda: Cohort(min_merchants=3, max_merchants=5, max_corrupt=0),
        lambda: Cohort(min_merchants=3, max_merchants=5, max_corrupt=2),
        lambda: Cohort(min_merchants=7, max_merchants=9, max_corrupt=4),
    ):
        with pytest.raises(ValidationError):
            impossible()


def test_the_ring_has_room_for_the_largest_cohort(make_plan: MakePlan) -> None:
    plan = make_plan({"update_bound": 8.0}, cohort=Cohort(min_merchants=3, max_merchants=5))
    largest = plan.encode(np.full(plan.dimension, 9.0))
    assert np.array_equal(largest, Ring(8.0, 5).encode(np.full(plan.dimension, 8.0)))
    assert np.allclose(plan.decode(5 * largest, 5), 8.0, atol=Ring(8.0, 5).step)


def test_a_model_on_the_wire_is_little_endian() -> None:
    assert messages.model_to_bytes(np.array([1.0], dtype=np.float32)) == b"\x00\x00\x80\x3f"


# Modes


def shared(make_plan: MakePlan, mode: str = "distributed", **training: Any) -> Plan:
    fields = {
        "rounds": 4,
        "repeats": 1,
        "sampling_rate": 0.2,
        "expected_batch": 20.0,
        "clipping_norm": 1.0,
        "noise_multiplier": 2.0,
    }
    if mode == "merchant-level":
        fields |= {"local_steps": 2, "local_rate": 0.5, "learning_rate": 0.1}
    cohort = Cohort(min_merchants=5, max_merchants=7, max_corrupt=2)
    plan = make_plan(cohort=cohort)
    return plan.model_copy(update={"training": TRAININGS[mode](**(fields | training))})


@pytest.mark.parametrize(("mode", "shares"), [("distributed", 3), ("merchant-level", 3), ("local", 1)])
def test_noise_is_in_as_many_shares_as_honest_merchants_are_sure(
    make_plan: MakePlan, mode: str, shares: int
) -> None:
    plan = make_plan() if mode == "local" else shared(make_plan, mode)
    assert plan.mechanism(1).shares == shares
    assert wire.decode(Plan, wire.encode(plan)) == plan
    assert plan.training.mode == mode


def test_a_step_of_the_league_is_a_round_whatever_merchants_do_inside(make_plan: MakePlan) -> None:
    for mode in ("distributed", "merchant-level"):
        training = shared(make_plan, mode).training
        assert (training.steps_per_round, training.total_steps) == (1, 5)


def test_a_sum_on_the_grid_is_decoded_over_the_expected_batch(make_plan: MakePlan) -> None:
    plan = shared(make_plan)
    steps = np.arange(-10, 11, dtype=np.int64)
    update = plan.decode(ring.residues(steps), 6)
    assert np.array_equal(update, steps * plan.mechanism(1).grid.step / 20.0)
    assert np.array_equal(plan.decode(ring.residues(steps), 5), update)


def test_two_modes_of_equal_numbers_are_two_plans(make_plan: MakePlan) -> None:
    by_photo, by_product = shared(make_plan), shared(make_plan, unit="product")
    assert by_photo.digest != by_product.digest
    with pytest.raises(ValidationError):
        shared(make_plan, unit="merchant")
    with pytest.raises(ValidationError):
        shared(make_plan, "merchant-level", unit="photo")


def test_an_evaluation_sends_a_model_and_gets_a_sum_of_another_length(make_plan: MakePlan) -> None:
    trained = shared(make_plan)
    assert trained.model_dimension == trained.dimension == trained.expected_dimension
    plan = shared(make_plan, "evaluation", sampling_rate=1.0)
    plan = plan.model_copy(update={"dimension": plan.expected_dimension})
    assert plan.dimension == Layout(3).dimension
    assert plan.model_dimension == trained.dimension
    assert plan.mechanism(1).shares == 3
    steps = np.arange(-10, 11, dtype=np.int64)
    assert np.array_equal(plan.decode(ring.residues(steps), 6), steps * plan.mechanism(1).grid.step)
    assert wire.decode(Plan, wire.encode(plan)) == plan
    with pytest.raises(ValidationError, match="clipping_norm"):
        shared(make_plan, "evaluation", clipping_norm=0.5)
    many = {"classes": [f"class {number}" for number in range(257)]}
    with pytest.raises(ValidationError, match="found 257 classes, expected 2 to 256"):
        Plan.model_validate(plan.model_dump() | {"taxonomy": many}, strict=False)


def trends(make_plan: MakePlan, **changes: Any) -> Plan:
    fields: dict[str, Any] = {
        "first_day": "2026-02-23",
        "days": 7,
        "expected_batch": 500.0,
        "noise_multiplier": 9.0,
    }
    cohort = Cohort(min_merchants=4, max_merchants=6, max_corrupt=1)
    return make_plan(cohort=cohort, dimension=3).model_copy(
        update={"training": TrendsTraining(**(fields | changes))}
    )


def test_a_trends_plan_counts_queries_of_days_that_exist(make_plan: MakePlan) -> None:
    plan = trends(make_plan)
    assert plan.expected_dimension == plan.dimension == plan.model_dimension == 3
    assert plan.mechanism(1).shares == 3
    assert isinstance(plan.training, TrendsTraining) and plan.training.end.isoformat() == "2026-03-02"
    steps = np.array([-5, 0, 700], dtype=np.int64)
    assert np.array_equal(plan.decode(ring.residues(steps), 6), steps * plan.mechanism(1).grid.step)
    data = wire.encode(plan)
    assert data[1] == 3, "merchants of the version before must not take it for anything else"
    assert wire.decode(Plan, data) == plan
    for changes in (
        {"first_day": "2026-02-30"},
        {"first_day": "20260223"},
        {"first_day": "2026-W09-1"},
        {"first_day": "9999-12-30"},
        {"days": 0},
        {"days": 367},
        {"rounds": 2},
        {"sampling_rate": 0.5},
        {"clipping_norm": 2.0},
        {"unit": "product"},
    ):
        with pytest.raises(ValidationError):
            trends(make_plan, **changes)


def test_a_model_that_is_too_large_is_no_plan_where_another_vector_is_uploaded(make_plan: MakePlan) -> None:
    """Else a merchant builds a model of gigabytes before anything refuses the plan."""
    plan = make_plan()
    backbone = TorchvisionBackbone(architecture="resnet18", dimension=1 << 17, weights="ab" * 32)
    preprocessing = Preprocessing(size=224, channels=3)
    for mode, hidden, fits in ((EvaluationTraining, 256, True), (EvaluationTraining, 4096, False),
                               (MeanTraining, 4096, False)):  # fmt: skip
        recipe = Recipe(preprocessing=preprocessing, backbone=backbone, model=Mlp(hidden=hidden))
        fields = plan.model_dump() | {"recipe": recipe, "taxonomy": plan.taxonomy, "cohort": plan.cohort}
        fields |= {"training": mode(rounds=1, expected_batch=500.0, noise_multiplier=9.0), "dimension": 100}
        if fits:
            Plan(**fields)
            continue
        with pytest.raises(ValidationError, match="its model has"):
            Plan(**fields)


def test_a_slot_leaves_room_in_the_deadline() -> None:
    with pytest.raises(ValidationError, match="upload_slot"):
        Cohort(min_merchants=3, max_merchants=5, upload_deadline=10, upload_slot=6)
