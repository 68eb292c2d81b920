"""What a training leaves behind: a recognizer, or, after a plan of mode `mean`, a centre that a recipe can name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hanse_common.errors import RecognizerError
from hanse_common.modes import EvaluationTraining, MeanTraining
from hanse_common.plan import Plan, SignedPlan, dimension_of
from hanse_common.vision.centring import Centre, load_centre
from hanse_common.vision.recognizer import Recognizer
from hanse_server.config import Optimization, ServerConfig, Service
from hanse_server.storage import State
from hanse_server.training import Training, _check_files

MakePlan = Callable[..., Plan]


def training(plan: Plan, service: Service, tried: Plan | None = None) -> Training:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.from_private_bytes(bytes(32))
    signed = SignedPlan.sign(plan, key)
    config = ServerConfig.model_construct(optimization=Optimization(), evaluation=None, start=None)
    state = State.open(service.state)
    evaluation = None if tried is None else state.progress(SignedPlan.sign(tried, key), tried)
    return Training(config, service, state, state.progress(signed, plan), evaluation)


def mean_plan(make_plan: MakePlan) -> Plan:
    plan = make_plan()
    fields = plan.model_dump() | {
        "recipe": plan.recipe,
        "taxonomy": plan.taxonomy,
        "cohort": plan.cohort,
        "dimension": plan.recipe.feature_dimension,
        "training": MeanTraining(expected_batch=100.0, noise_multiplier=20.0),
    }
    return Plan(**fields)


def test_a_mean_is_published_as_a_centre_that_a_recipe_can_name(
    make_plan: MakePlan, make_service: Callable[..., Service]
) -> None:
    plan, service = mean_plan(make_plan), make_service()
    mean = np.linspace(0, 1, plan.dimension, dtype=np.float32)
    path = training(plan, service).publish_centre(mean)
    assert path == service.state / "centre.safetensors"
    centre = Centre(mean, plan.epsilon(), plan.delta)
    found = load_centre(plan.recipe.model_copy(update={"centre": centre.digest}), path)
    assert found is not None
    assert np.array_equal(found.mean, mean)


def test_a_recognizer_carries_its_centre(
    make_plan: MakePlan, make_service: Callable[..., Service], tmp_path: Path
) -> None:
    plan = make_plan()
    centre = Centre(np.linspace(0, 1, plan.recipe.feature_dimension, dtype=np.float32), 0.25, 1e-6)
    path = tmp_path / "from-elsewhere.safetensors"
    path.write_bytes(centre.to_bytes())
    plan = plan.model_copy(update={"recipe": plan.recipe.model_copy(update={"centre": centre.digest})})
    service = make_service(centre=path)
    version = training(plan, service).publish(np.zeros(plan.dimension, dtype=np.float32), {"accuracy": 0.5})
    assert (version.number, version.state) == (1, "candidate")
    folder = service.state / "recognizer"
    assert (folder / "centre.safetensors").read_bytes() == path.read_bytes()
    card = Recognizer.load(folder).card
    assert card.recipe.centre == centre.digest
    # What the centre cost is part of what the recognizer cost.
    assert card.epsilon == pytest.approx(plan.epsilon() + 0.25)
    assert card.delta == pytest.approx(plan.delta + 1e-6)
    (folder / "centre.safetensors").unlink()
    with pytest.raises(RecognizerError, match="centre"):
        Recognizer.load(folder)


def test_a_missing_centre_is_found_out_before_merchants_pay(
    make_plan: MakePlan, make_service: Callable[..., Service]
) -> None:
    plan = make_plan()
    plan = plan.model_copy(update={"recipe": plan.recipe.model_copy(update={"centre": "ab" * 32})})
    with pytest.raises(RecognizerError, match="name that file"):
        _check_files(plan, make_service())


def evaluation_of(plan: Plan, **fields: Any) -> Plan:
    chosen = EvaluationTraining(rounds=2, expected_batch=500.0, **fields)
    dimension = dimension_of(chosen, plan.recipe, len(plan.taxonomy.classes))
    return plan.model_copy(update={"training": chosen, "dimension": dimension})


@pytest.mark.parametrize("unit", ["photo", "product"])
@pytest.mark.parametrize("noise", [2.0, 200.0])
def test_a_card_tells_what_those_paid_by_whom_the_recognizer_was_tried(
    make_plan: MakePlan, make_service: Callable[..., Service], unit: str, noise: float
) -> None:
    plan = make_plan({"unit": unit})
    tried = evaluation_of(plan, unit=unit, noise_multiplier=noise)
    work = training(plan, make_service(), tried)
    assert work.evaluation is not None
    alone, beside = plan.epsilon(), tried.epsilon()
    assert (beside > alone) == (noise == 2.0)
    # Before a merchant hears of an evaluation it costs nothing; then all of it, as merchants' ledgers have it.
    assert work._cost() == (alone, plan.delta)
    work.evaluation.next_attempt()
    epsilon, delta = work._cost()
    # A photo is trained on or held out. A product has photos on both sides.
    assert epsilon == pytest.approx(max(alone, beside) if unit == "photo" else alone + beside)
    assert delta == pytest.approx(plan.delta if unit == "photo" else 2 * plan.delta)
    work.publish(np.zeros(plan.dimension, dtype=np.float32), {})
    card = Recognizer.load(work.service.state / "recognizer").card
    assert (card.epsilon, card.delta) == (epsilon, delta)


def test_what_a_crash_left_of_a_recognizer_is_made_whole_when_its_training_goes_on(
    make_plan: MakePlan, make_service: Callable[..., Service]
) -> None:
    plan, service = make_plan(), make_service()
    model = np.zeros(plan.dimension, dtype=np.float32)
    version = training(plan, service).publish(model, {})
    folder = service.state / "recognizer"
    (folder / "card.json").unlink()
    (folder / ".card.json.half").write_bytes(b"{")
    folder.with_name("recognizer.new").mkdir()
    assert training(plan, service).publish(model, {}) == version
    assert Recognizer.load(folder).digest().hex() == version.digest
    assert {path.name for path in folder.iterdir()} == set(version.files)
    assert not folder.with_name("recognizer.new").exists()
