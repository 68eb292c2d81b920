"""The photos kept ready beside the league: what is in them from one block to the next."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hanse_client import preparation as preparation_module
from hanse_client.config import ClientConfig
from hanse_client.preparation import MAX_NEW_RECIPES, NEW_RECIPE_SECONDS, Preparation, Ready
from hanse_client.shop import Shop
from hanse_common.errors import CatalogError, PlanRefused
from hanse_common.plan import Plan
from hanse_common.vision.recipe import Projection, Recipe, Scattering

Until = Callable[[str, Callable[[], Any]], Any]


@pytest.fixture
def recipe(make_plan: Callable[..., Plan]) -> Recipe:
    return make_plan().recipe


def other(recipe: Recipe, dimensions: int) -> Recipe:
    backbone = Scattering(scales=1, angles=2, groups=None, projection=Projection(dimensions=dimensions))
    return recipe.model_copy(update={"backbone": backbone})


class Notes:
    def __init__(self) -> None:
        self.texts: list[str] = []

    def __call__(self, kind: str, text: str, **facts: Any) -> None:
        self.texts.append(text)


@pytest.fixture
def notes() -> Notes:
    return Notes()


@pytest.fixture
def preparation(config: ClientConfig, notes: Notes, monkeypatch: pytest.MonkeyPatch) -> Iterator[Preparation]:
    monkeypatch.setattr(preparation_module, "RETRY_SECONDS", 0.2)
    monkeypatch.setattr("hanse_client.resources.OtherWork.busy", lambda self: False)
    with ExitStack() as stack:
        yield stack.enter_context(Preparation(Shop(config), notes))


@pytest.fixture
def get(preparation: Preparation, wait_until: Until) -> Callable[[Recipe], Ready]:
    """Return a function that asks until the photos are ready."""
    return lambda recipe: wait_until("the photos", lambda: preparation.ready(recipe))


def photo(config: ClientConfig, name: str, value: int) -> Path:
    path = config.photos / "shoe" / name
    Image.fromarray(np.full((9, 9), value, dtype=np.uint8)).save(path)
    return path


def test_the_answer_is_later_and_then_the_photos(
    preparation: Preparation, get: Any, recipe: Recipe, notes: Notes
) -> None:
    assert preparation.ready(recipe) is None
    ready = get(recipe)
    assert len(ready.examples) == 9 and ready.problems == 0
    assert preparation.counts == (9, 0)
    assert preparation.ready(recipe) is ready, "nothing is made anew"
    assert notes.texts[-1] == "9 photos are ready to train on, 0 can't be used."


def test_a_deleted_photo_is_not_trained_on_any_more_and_that_is_said(
    preparation: Preparation, config: ClientConfig, get: Any, recipe: Recipe, notes: Notes, wait_until: Until
) -> None:
    before = get(recipe)
    (config.photos / "shirt" / "0.png").unlink()
    wait_until("the change to be noticed", lambda: preparation.ready(recipe) is not before)
    assert len(get(recipe).examples) == 8
    assert any("1 was removed" in text and "not given back" in text for text in notes.texts)


def test_a_new_and_a_changed_photo_are_trained_on(
    config: ClientConfig, preparation: Preparation, get: Any, recipe: Recipe, wait_until: Until
) -> None:
    get(recipe)
    photo(config, "new.png", 200)
    wait_until(
        "the new photo", lambda: (r := preparation.ready(recipe)) is not None and len(r.examples) == 10
    )
    before = get(recipe).examples.inputs.sum()
    photo(config, "new.png", 90)

    def replaced() -> bool:
        ready = preparation.ready(recipe)
        return ready is not None and len(ready.examples) == 10 and ready.examples.inputs.sum() != before

    wait_until("the new picture", replaced)


def test_photos_that_vanish_are_a_problem_and_come_back(
    preparation: Preparation, config: ClientConfig, get: Any, recipe: Recipe, notes: Notes, wait_until: Until
) -> None:
    get(recipe)
    aside = config.photos.with_name("aside")
    config.photos.rename(aside)

    def fails() -> bool:
        try:
            preparation.ready(recipe)
        except CatalogError:
            return True
        return False

    wait_until("the failure", fails)
    assert preparation.counts is None, "photos that are gone are not trained on"
    aside.rename(config.photos)
    wait_until("the photos", lambda: not fails() and preparation.ready(recipe))
    assert sum("can't be made ready" in text for text in notes.texts) == 1


def test_an_operator_who_asks_for_ever_new_recipes_has_to_wait(
    config: ClientConfig, notes: Notes, recipe: Recipe
) -> None:
    now = [0.0]
    preparation = Preparation(
        Shop(config), notes, clock=lambda: now[0]
    )  # nothing is prepared: it does not run
    for number in range(MAX_NEW_RECIPES):
        assert preparation.ready(other(recipe, 3 + number)) is None
    with pytest.raises(PlanRefused, match="has to wait"):
        preparation.ready(other(recipe, 20))
    now[0] = NEW_RECIPE_SECONDS
    assert preparation.ready(other(recipe, 20)) is None


def test_going_back_and_forth_embeds_once(
    preparation: Preparation, get: Any, recipe: Recipe, config: ClientConfig
) -> None:
    one, two = recipe, other(recipe, 4)
    get(one)
    get(two)
    stamp = (config.state / "embeddings.sqlite").stat().st_size
    for wanted in (one, two, one):
        assert len(get(wanted).examples) == 9
    assert (config.state / "embeddings.sqlite").stat().st_size == stamp
