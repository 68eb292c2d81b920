"""Lineage: ε and δ add up over generations, ancestors are named, and cards without them stay what they were."""

import hashlib
import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from hanse_common.errors import RecognizerError
from hanse_common.vision.lineage import MAX_ANCESTORS, Ancestor, inherited
from hanse_common.vision.recipe import Recipe
from hanse_common.vision.recipe_features import Preprocessing, Projection, Scattering
from hanse_common.vision.recognizer import CARD_FILE, Card, Recognizer
from hanse_common.vision.taxonomy import Taxonomy

RECIPE = Recipe(
    preprocessing=Preprocessing(size=8), backbone=Scattering(groups=None, projection=Projection(dimensions=6))
)
TAXONOMY = Taxonomy(classes=("Shirt", "Sneaker"))
COSTS = st.tuples(st.floats(0, 100), st.floats(0, 1e-3))


def recognizer(**figures: Any) -> Recognizer:
    vector = np.arange(RECIPE.dimension(2), dtype=np.float32)
    created = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    return Recognizer.create(RECIPE, TAXONOMY, vector, created=created, **figures)


def child_of(parent: Recognizer, epsilon: float | None, delta: float | None, plan: bytes) -> Recognizer:
    line = parent.card.descend(epsilon=epsilon, delta=delta)
    return recognizer(
        epsilon=line.epsilon,
        delta=line.delta,
        plan_digest=plan,
        parent_digest=line.parent_digest,
        lineage=line.lineage,
    )


def test_each_generation_adds_what_it_cost_and_names_all_before_it(tmp_path: Path) -> None:
    first = recognizer(epsilon=2.0, delta=1e-5, plan_digest=b"1" * 32)
    second = child_of(first, 0.5, 1e-6, b"2" * 32)
    third = child_of(second, 0.25, 1e-6, b"3" * 32)
    assert third.card.epsilon == pytest.approx(2.75)
    assert third.card.delta == pytest.approx(1.2e-5)
    assert third.card.parent_digest == second.digest().hex()
    assert third.card.lineage == (
        Ancestor(digest=second.digest().hex(), plan_digest=(b"2" * 32).hex()),
        Ancestor(digest=first.digest().hex(), plan_digest=(b"1" * 32).hex()),
    )
    third.save(tmp_path)
    loaded = Recognizer.load(tmp_path, digest=third.digest())
    assert loaded.card == third.card
    assert loaded.card.format_version == 2


@given(st.lists(COSTS, min_size=1, max_size=12))
def test_what_a_photo_paid_in_all_is_the_sum_of_all_trainings(costs: list[tuple[float, float]]) -> None:
    total = costs[0]
    ancestors: tuple[Ancestor, ...] = ()
    for generation, cost in enumerate(costs[1:]):
        line = inherited(f"{generation:064x}", None, ancestors, parent_cost=total, own_cost=cost)
        assert line.epsilon is not None
        assert line.delta is not None
        total, ancestors = (line.epsilon, line.delta), line.lineage
    assert total[0] == pytest.approx(math.fsum(cost[0] for cost in costs))
    assert total[1] == pytest.approx(min(1.0, math.fsum(cost[1] for cost in costs)))
    assert len(ancestors) == len(costs) - 1


@pytest.mark.parametrize(("parent", "own"), [(None, (1.0, 1e-5)), ((1.0, 1e-5), None), (None, None)])
def test_without_a_guarantee_on_either_side_there_is_none(
    parent: tuple[float, float] | None, own: tuple[float, float] | None
) -> None:
    line = inherited("0" * 64, None, (), parent_cost=parent, own_cost=own)
    assert (line.epsilon, line.delta) == (None, None)
    assert len(line.lineage) == 1


def test_delta_stops_at_one() -> None:
    assert inherited("0" * 64, None, (), parent_cost=(1, 0.7), own_cost=(1, 0.7)).delta == 1.0


@pytest.mark.parametrize("cost", [(-1.0, 0.0), (math.nan, 0.0), (1.0, -1e-9), (1.0, 1.5), (1.0, math.nan)])
def test_a_cost_that_is_none_is_refused(cost: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="expected ε from 0"):
        inherited("0" * 64, None, (), parent_cost=(1.0, 0.0), own_cost=cost)
    with pytest.raises(ValueError, match="expected ε from 0"):
        inherited("0" * 64, None, (), parent_cost=cost, own_cost=(1.0, 0.0))


def test_the_nearest_ancestors_are_kept() -> None:
    ancestors = tuple(Ancestor(digest=f"{number:064x}") for number in range(MAX_ANCESTORS))
    line = inherited("f" * 64, "e" * 64, ancestors, parent_cost=None, own_cost=None)
    assert len(line.lineage) == MAX_ANCESTORS
    assert line.lineage == (Ancestor(digest="f" * 64, plan_digest="e" * 64), *ancestors[:-1])


def test_a_card_of_before_lineage_is_read_written_and_named_by_the_same_bytes(tmp_path: Path) -> None:
    made = recognizer(epsilon=2.0, delta=1e-5, parent_digest=b"g" * 32)
    made.save(tmp_path)
    data = (tmp_path / CARD_FILE).read_bytes()
    assert json.loads(data)["format_version"] == 1
    assert "lineage" not in json.loads(data)
    loaded = Recognizer.load(tmp_path, digest=hashlib.sha256(data).digest())
    assert loaded.card.to_bytes() == data
    # The one ancestor that it names is a grandparent of what is trained from it.
    line = loaded.card.descend(epsilon=0.0, delta=0.0)
    assert line.lineage == (Ancestor(digest=loaded.digest().hex()), Ancestor(digest=(b"g" * 32).hex()))


def altered(**changes: Any) -> str:
    tree = json.loads(child_of(recognizer(), 1.0, 1e-5, b"2" * 32).card.to_bytes())
    return json.dumps(tree | changes)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"format_version": 1}, "expected 2 with a lineage"),
        ({"lineage": []}, "expected 2 with a lineage"),
        ({"format_version": 3}, "Input should be 1 or 2"),
        ({"parent_digest": "0" * 64}, "lineage begins with"),
        ({"parent_digest": None}, "lineage begins with"),
        ({"lineage": [{"digest": "f" * 64}] * 2, "parent_digest": "f" * 64}, "ancestors that differ"),
        ({"lineage": [{"digest": f"{n:064x}"} for n in range(MAX_ANCESTORS + 1)]}, "at most 64"),
        ({"lineage": [{"digest": "short"}]}, "should match pattern"),
    ],
)
def test_a_lineage_that_cannot_be_is_refused(changes: dict[str, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=text):
        Card.model_validate_json(altered(**changes))
    (tmp_path / CARD_FILE).write_text(altered(**changes))
    with pytest.raises(RecognizerError, match=text):
        Recognizer.load(tmp_path)
