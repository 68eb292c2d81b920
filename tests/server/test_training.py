"""What a training leaves behind: a recognizer, or, after a plan of mode `mean`, a centre that a recipe can name."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hanse_common.errors import RecognizerError
from hanse_common.plan import MeanTraining, Plan, SignedPlan
from hanse_common.vision.centring import Centre, load_centre
from hanse_common.vision.recognizer import Recognizer
from hanse_server.config import Optimization, ServerConfig, Service
from hanse_server.storage import State
from hanse_server.training import Training, _check_files

MakePlan = Callable[..., Plan]


def training(plan: Plan, service: Service) -> Training:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    signed = SignedPlan.sign(plan, Ed25519PrivateKey.from_private_bytes(bytes(32)))
    config = ServerConfig.model_construct(optimization=Optimization(), evaluation=None, start=None)
    state = State.open(service.state)
    return Training(config, service, state, state.progress(signed, plan), None)


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
