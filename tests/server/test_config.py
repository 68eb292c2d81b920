"""The annotated sample is a file that loads, names every key, and says each default as it is."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import pytest
from pydantic import BaseModel, Field

from hanse_common.config import load
from hanse_common.errors import ConfigError, PlanRefused
from hanse_common.privacy.calibration import noise_multiplier
from hanse_common.vision.recipe_features import EfficientNetLite0, TorchvisionBackbone
from hanse_common.vision.recipe_model import SmallCnn
from hanse_server.config import Blocks, Optimization, ServerConfig, make_plan
from hanse_server.optimizers import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedYogi, create


@pytest.fixture(scope="module")
def sample(root: Path) -> Path:
    return root / "server" / "hanse-server.yaml"


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from models_in(inner)


def every_model(model: type[BaseModel]) -> set[type[BaseModel]]:
    found = {model}
    for field in model.model_fields.values():
        for inner in models_in(field.annotation):
            found |= every_model(inner)
    return found


def test_the_sample_loads_and_makes_a_plan(sample: Path) -> None:
    settings = load(ServerConfig, sample)
    assert settings.signing_key == sample.parent / "operator.key"
    create(settings.optimization.optimizer)
    plan = make_plan(settings.plan, bytes(16))
    epsilon = plan.mechanism(plan.training.total_steps).epsilon(plan.delta)
    assert 0.99 * settings.plan.privacy.epsilon < epsilon <= settings.plan.privacy.epsilon


def test_the_sample_names_every_key(sample: Path) -> None:
    text = sample.read_text(encoding="utf-8")
    models = every_model(ServerConfig)
    assert {EfficientNetLite0, TorchvisionBackbone, SmallCnn} <= models
    for model in (*models, *(one.params_type for one in (FedAdagrad, FedAdam, FedAvg, FedAvgM, FedYogi))):
        for key in model.model_fields:
            assert re.search(rf"\b{key}\b", text), f"{model.__name__}.{key} is not in {sample}"


def test_every_key_in_the_sample_has_its_comment(sample: Path) -> None:
    lines = sample.read_text(encoding="utf-8").splitlines()
    keys = [number for number, line in enumerate(lines) if re.match(r" *[a-z0-9_]+:", line)]
    told = ("(required", "Default")
    for number in keys:
        name = lines[number].strip().partition(":")[0]
        above = number - 1
        while above >= 0 and lines[above].lstrip().startswith("#"):
            above -= 1
        comment = " ".join(lines[above + 1 : number])
        # `name` chooses a variant and `classes` is all of its section: the key above speaks for both.
        alone = name in ("name", "classes", "optimization")
        assert alone or any(word in comment for word in told), f"line {number + 1}: {name}"


def test_a_default_is_what_the_sample_says(sample: Path) -> None:
    settings = load(ServerConfig, sample)
    said = Optimization()
    assert settings.optimization.attempts == said.attempts == 3
    assert settings.optimization.tail_average == said.tail_average == 0.2
    assert settings.optimization.early_stop is said.early_stop is None
    assert settings.service is not None
    assert settings.service.blocks == Blocks()
    preprocessing = settings.plan.recipe.preprocessing
    assert type(preprocessing)(channels=1) == preprocessing
    cohort = settings.plan.cohort
    assert type(cohort)(min_merchants=4, max_merchants=10) == cohort


def test_all_faults_are_listed(sample: Path, tmp_path: Path) -> None:
    text = sample.read_text(encoding="utf-8")
    text = text.replace("    rounds: 100", "    rounds: many").replace("signing_key:", "signing_ky:")
    text = text.replace("    epsilon: 3", "    epsilon: -3")
    path = tmp_path / "bad.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as found:
        load(ServerConfig, path)
    for words in ("plan.training.rounds", "'many'", "signing_ky", "missing", "plan.privacy.epsilon"):
        assert words in str(found.value)


def test_what_was_renamed_is_refused_with_its_new_name(sample: Path, tmp_path: Path) -> None:
    text = sample.read_text(encoding="utf-8").replace(
        "  schedule: {name: linear, warmup: 0}", "  decay: true"
    )
    path = tmp_path / "old.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"old\.yaml:\d+: optimization: .*write schedule: \{name: linear\}"):
        load(ServerConfig, path)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("  schedule: {name: linear, warmup: 0}", "  schedule: {name: expodential}"),
        ("  early_stop: null", "  early_stop: {patience: 0}"),
        ("    cohort: {name: all}", "    cohort: {name: random, size: 5, seed: no}"),
        ("    deadlines: {factor: 3, floor: 5}", "    deadlines: {factor: 0.5}"),
    ],
)
def test_how_rounds_are_run_is_checked_where_it_is_read(
    sample: Path, tmp_path: Path, line: str, found: str
) -> None:
    text = sample.read_text(encoding="utf-8")
    assert line in text
    path = tmp_path / "bad.yaml"
    path.write_text(text.replace(line, found), encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"bad\.yaml:\d+: .*{line.split(':')[0].strip()}"):
        load(ServerConfig, path)


def test_a_promise_out_of_reach_is_refused(sample: Path) -> None:
    settings = load(ServerConfig, sample).plan
    tiny = settings.model_copy(update={"privacy": settings.privacy.model_copy(update={"epsilon": 1e-9})})
    with pytest.raises(PlanRefused, match="out of reach"):
        make_plan(tiny, bytes(16))


def test_the_walk_over_models_is_not_vacuous() -> None:
    class Inner(BaseModel):
        x: int

    class Outer(BaseModel):
        inner: Annotated[Union[Inner, None], Field()] = None  # noqa: UP007

    assert every_model(Outer) == {Inner, Outer}
    assert get_origin(Outer.model_fields["inner"].annotation) is Union


def test_the_noise_is_that_of_the_plans_own_numbers(sample: Path) -> None:
    settings = load(ServerConfig, sample).plan
    training = settings.training.model_copy(update={"clipping_norm": 0.3})
    plan = make_plan(settings.model_copy(update={"training": training}), bytes(16))
    assert plan.training.noise_multiplier == noise_multiplier(
        epsilon=settings.privacy.epsilon,
        delta=settings.privacy.delta,
        sampling_rate=training.sampling_rate,
        steps=training.total_steps,
        clipping_norm=0.3,
        dimension=plan.dimension,
        shares=settings.cohort.min_merchants - settings.cohort.max_corrupt,
    )
