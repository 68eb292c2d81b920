"""The photos kept ready beside the league: what is in them from one block to the next."""

import threading
import time
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
from hanse_common.vision.recipe import Recipe
from hanse_common.vision.recipe_features import Projection, Scattering

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


class _Slow(Shop):
    """A shop whose look at its photos waits for the test."""

    def __init__(self, config: ClientConfig) -> None:
        super().__init__(config)
        self.go, self.looks = threading.Event(), 0
        self.go.set()

    def catalog(self, *arguments: Any, **settings: Any) -> Any:
        self.looks += 1
        self.go.wait(30)
        return super().catalog(*arguments, **settings)


@pytest.mark.parametrize("embedding_another", [False, True])
def test_what_was_deleted_is_not_handed_out_while_the_photos_are_looked_through(
    config: ClientConfig, notes: Notes, recipe: Recipe, wait_until: Until, embedding_another: bool
) -> None:
    shop = _Slow(config)
    with Preparation(shop, notes) as preparation:
        wait_until("the photos", lambda: preparation.ready(recipe))
        shop.go.clear()
        looks = shop.looks
        if embedding_another:
            preparation.ready(other(recipe, 5))
            wait_until("a look for the other", lambda: shop.looks > looks)
        (config.photos / "shirt" / "0.png").unlink()
        if not embedding_another:
            wait_until("a look after the deletion", lambda: shop.looks > looks)
        given_up = time.monotonic() + 8
        while (found := preparation.ready(recipe)) is not None and time.monotonic() < given_up:
            if not embedding_another:
                break
            time.sleep(0.1)
        assert found is None, "it has not been noticed yet that it is gone, or it is handed out all the same"
        for _ in range(20):
            assert preparation.ready(recipe) is None
        shop.go.set()
        wait_until("the rest", lambda: (r := preparation.ready(recipe)) and len(r.examples) == 8)


def test_it_ends_in_the_middle_of_a_first_embedding(
    config: ClientConfig, notes: Notes, recipe: Recipe, wait_until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a real shop that takes hours, which nobody waits for."""
    shop = Shop(config)
    begun = threading.Event()

    def embed_ahead(catalog: Any, recipe: Any, stop: Callable[[], bool], *rest: Any) -> bool:
        begun.set()
        while not stop():
            time.sleep(0.01)
        return False

    monkeypatch.setattr(shop, "embed_ahead", embed_ahead)
    with Preparation(shop, notes) as preparation:
        preparation.ready(recipe)
        wait_until("the embedding", begun.is_set)
    assert not preparation._thread.is_alive()
