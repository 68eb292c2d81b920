"""Head surgery: rows of classes that stay are untouched, new ones disturb nobody, other features inherit by photos."""

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from scipy.special import softmax
from sklearn.linear_model import Ridge

from hanse_client.examples import Examples
from hanse_common.errors import RecognizerError
from hanse_common.vision.backbones import load_backbone
from hanse_common.vision.centring import Centre
from hanse_common.vision.extraction import extract
from hanse_common.vision.model import build, load_vector
from hanse_common.vision.recipe import Recipe
from hanse_common.vision.recipe_features import Preprocessing, Projection, Scattering
from hanse_common.vision.recipe_model import Augmentation, Linear, Mlp, SmallCnn
from hanse_common.vision.recognizer import Recognizer
from hanse_common.vision.taxonomy import Taxonomy
from hanse_server.config import PlanSettings, make_plan
from hanse_server.distillation import MIN_PHOTOS, PENALTIES, _ridge
from hanse_server.evaluation import Evaluator
from hanse_server.surgery import MARGIN, Graft, transplant
from hanse_server.whitening import fit_whitening
from hanse_simulations.central import CentralRounds
from hanse_simulations.datasets import CLASSES, fashion_mnist
from hanse_simulations.seeded import RoundRandomness

SMALL = Preprocessing(size=8, channels=1)
LINEAR = Recipe(
    preprocessing=SMALL,
    backbone=Scattering(scales=1, angles=2, groups=None, projection=Projection(dimensions=6)),
)
MLP = LINEAR.model_copy(update={"model": Mlp(hidden=5)})
CNN = Recipe(preprocessing=SMALL, backbone=None, model=SmallCnn(width=4))
WIDER = Recipe(preprocessing=SMALL, backbone=Scattering(scales=1, angles=4, groups=None))
RECIPES = pytest.mark.parametrize("recipe", [LINEAR, MLP, CNN], ids=["linear", "mlp", "cnn"])
OLD = ("Shirt", "Sneaker", "Bag", "Coat")


def recognizer(recipe: Recipe = LINEAR, seed: int = 0, scale: float = 2.0) -> Recognizer:
    rng = np.random.default_rng(seed)
    vector = (scale * rng.standard_normal(recipe.dimension(len(OLD)))).astype(np.float32)
    return Recognizer.create(recipe, Taxonomy(classes=OLD), vector, created=datetime(2026, 1, 2, tzinfo=UTC))


def child(graft: Graft, recipe: Recipe, classes: tuple[str, ...], **files: Any) -> Recognizer:
    created = datetime(2026, 1, 3, tzinfo=UTC)
    return Recognizer.create(recipe, Taxonomy(classes=classes), graft.vector, created=created, **files)


def photos(n: int, seed: int = 7) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    small = [Image.fromarray(rng.integers(0, 256, (3, 3), dtype=np.uint8)) for _ in range(n)]
    return [image.resize((8, 8), Image.Resampling.BICUBIC) for image in small]


def graft(old: Recognizer, classes: tuple[str, ...], recipe: Recipe | None = None, **more: Any) -> Graft:
    return transplant(old, recipe or old.card.recipe, Taxonomy(classes=classes), **more)


def last_layer(made: Recognizer) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    module = build(made.card.recipe, len(made.card.taxonomy.classes))
    load_vector(module, made.vector)
    state = module.state_dict()
    return state["linear.weight"].numpy(), state["linear.bias"].numpy()


@RECIPES
def test_rows_that_stay_are_copied_bit_for_bit_in_the_new_order(recipe: Recipe) -> None:
    old = recognizer(recipe)
    classes = ("Handbag", "Hat", "Shirt", "Coat")
    made = graft(old, classes, renamed={"Bag": "Handbag"})
    (weights, bias), (weights_before, bias_before) = last_layer(child(made, recipe, classes)), last_layer(old)
    np.testing.assert_array_equal(weights[[0, 2, 3]], weights_before[[2, 0, 3]])
    np.testing.assert_array_equal(bias[[0, 2, 3]], bias_before[[2, 0, 3]])
    before = recipe.dimension(0)
    np.testing.assert_array_equal(made.vector[:before], old.vector[:before])
    assert made.origins == {"Handbag": "Bag", "Hat": None, "Shirt": "Shirt", "Coat": "Coat"}
    assert tuple(made.origins) == classes
    assert made.removed == ("Sneaker",)
    assert made.fidelity is None
    assert made.parent_digest == old.digest()
    assert made.vector.dtype == np.float32


@RECIPES
@pytest.mark.parametrize("seed", range(3))
def test_a_new_class_wins_no_photo_and_takes_little_from_each(recipe: Recipe, seed: int) -> None:
    old = recognizer(recipe, seed)
    classes = ("Hat", *OLD, "Scarf")
    found = child(graft(old, classes), recipe, classes).predict(photos(50))
    before = old.predict(photos(50))
    np.testing.assert_array_equal(found.argmax(1) - 1, before.argmax(1))
    taken = found[:, [0, 5]]
    assert (taken <= math.exp(-MARGIN) / 4 * found[:, 1:5].sum(1, keepdims=True) * (1 + 1e-5)).all()
    np.testing.assert_allclose(
        found[:, 1:5] / found[:, 1:5].sum(1, keepdims=True), before, rtol=1e-4, atol=1e-7
    )


def test_even_of_a_head_that_knows_nothing_a_new_class_wins_no_photo() -> None:
    created = datetime(2026, 1, 2, tzinfo=UTC)
    vector = np.zeros(LINEAR.dimension(4), dtype=np.float32)
    old = Recognizer.create(LINEAR, Taxonomy(classes=OLD), vector, created=created)
    classes = ("Hat", *OLD)
    found = child(graft(old, classes), LINEAR, classes).predict(photos(3))
    assert (found.argmax(1) == 1).all()


@RECIPES
def test_what_stays_is_told_apart_as_before_when_a_class_goes(recipe: Recipe) -> None:
    old = recognizer(recipe)
    classes = ("Coat", "Shirt", "Sneaker")
    found = child(graft(old, classes), recipe, classes).predict(photos(30))
    before = old.predict(photos(30))[:, [3, 0, 1]]
    np.testing.assert_allclose(found, before / before.sum(1, keepdims=True), rtol=1e-4, atol=1e-7)


@settings(max_examples=30, deadline=None)
@given(order=st.permutations(range(4)), recipe=st.sampled_from([LINEAR, MLP, CNN]))
def test_a_permutation_and_its_inverse_change_no_bit(order: list[int], recipe: Recipe) -> None:
    old = recognizer(recipe)
    classes = tuple(OLD[index] for index in order)
    there = child(graft(old, classes), recipe, classes)
    back = graft(there, OLD)
    np.testing.assert_array_equal(back.vector, old.vector)


@settings(max_examples=30, deadline=None)
@given(
    kept=st.lists(st.sampled_from(OLD), min_size=2, unique=True),
    added=st.lists(st.sampled_from(["Hat", "Scarf", "Belt"]), unique=True),
    renamed=st.lists(st.sampled_from(OLD), unique=True),
    data=st.data(),
)
def test_among_the_classes_kept_nothing_changes(
    kept: list[str], added: list[str], renamed: list[str], data: st.DataObject
) -> None:
    old = recognizer()
    names = {name: f"{name}s" if name in renamed else name for name in kept}
    classes = tuple(data.draw(st.permutations([*names.values(), *added])))
    made = graft(old, classes, renamed={name: names[name] for name in kept if name in renamed})
    found = child(made, LINEAR, classes).predict(photos(8))
    before = old.predict(photos(8))
    before = before[:, [OLD.index(name) for name in kept]]
    after = found[:, [classes.index(names[name]) for name in kept]]
    np.testing.assert_allclose(
        after / after.sum(1, keepdims=True), before / before.sum(1, keepdims=True), rtol=1e-4, atol=1e-7
    )
    assert {name: source for name, source in made.origins.items() if source} == {
        names[name]: name for name in kept
    }
    assert found.argmax(1).tolist() == [classes.index(names[kept[best]]) for best in before.argmax(1)]


def test_names_may_be_swapped_and_change_case() -> None:
    old = recognizer()
    swapped = graft(old, OLD, renamed={"Shirt": "Coat", "Coat": "Shirt"})
    assert swapped.origins == {"Shirt": "Coat", "Sneaker": "Sneaker", "Bag": "Bag", "Coat": "Shirt"}
    assert graft(old, ("SHIRT", "sneaker", "Bag", "Coat")).origins["SHIRT"] == "Shirt"
    np.testing.assert_array_equal(graft(old, ("SHIRT", "sneaker", "Bag", "Coat")).vector, old.vector)


@pytest.mark.parametrize(
    ("classes", "renamed", "text"),
    [
        (("Top", "Bag"), {"Shirt": "Top", "Coat": "Top"}, "'Shirt' and 'Coat' would both be 'Top'"),
        (("Bag", "Coat"), {"Shirt": "Bag"}, "'Shirt' and 'Bag' would both be 'Bag'"),
        (("Top", "Bag"), {"Sandal": "Top"}, "found 'Sandal', expected a class of the recognizer"),
        (("Top", "Bag"), {"Shirt": "Tops"}, "becomes 'Tops', expected a class of the new taxonomy"),
        (("Hat", "Scarf"), {}, "None of the recognizer's classes stays"),
    ],
)
def test_names_that_do_not_fit_together(
    classes: tuple[str, ...], renamed: Mapping[str, str], text: str
) -> None:
    with pytest.raises(RecognizerError, match=text):
        graft(recognizer(), classes, renamed=renamed)


@pytest.mark.parametrize("vector", [np.full(28, np.nan), np.full(28, np.inf), np.zeros(27), np.zeros((4, 7))])
def test_a_damaged_recognizer_is_not_gone_on_from(vector: NDArray[np.float64]) -> None:
    damaged = Recognizer(recognizer().card, vector.astype(np.float32))
    with pytest.raises(RecognizerError, match="expected 28 numbers, all finite"):
        graft(damaged, OLD)
    with pytest.raises(RecognizerError, match="Model vector"):
        graft(damaged, OLD, WIDER, photos=photos(MIN_PHOTOS))


def test_what_only_training_knows_of_changes_no_feature() -> None:
    linear = LINEAR.model_copy(update={"model": Linear(l2=0.1, dropout=0.2, initialisation="xavier")})
    np.testing.assert_array_equal(graft(recognizer(), OLD, linear).vector, recognizer().vector)
    cnn = CNN.model_copy(update={"augmentation": Augmentation(flip=0.5)})
    np.testing.assert_array_equal(graft(recognizer(CNN), OLD, cnn).vector, recognizer(CNN).vector)


@pytest.mark.parametrize(("before", "seed"), [(LINEAR, 3), (MLP, 0), (CNN, 2)], ids=["linear", "mlp", "cnn"])
def test_another_backbone_inherits_what_the_old_recognizer_says(before: Recipe, seed: int) -> None:
    classes = ("Coat", "Hat", "Shirt", "Sneaker", "Bag")
    old = recognizer(before, seed, scale=0.6)
    made = graft(old, classes, WIDER, photos=iter(photos(400)))
    assert made.vector.shape == (WIDER.dimension(5),)
    assert made.fidelity is not None
    assert made.fidelity.photos == 80
    # What it says of itself is so, on photos that nobody has seen before.
    new = child(made, WIDER, classes).predict(photos(400, seed=8))
    assert (new.argmax(1) != 1).all()
    kept, said = new[:, [2, 3, 4, 0]], old.predict(photos(400, seed=8))
    agreement = (kept.argmax(1) == said.argmax(1)).mean()
    divergence = _divergence(said, kept / kept.sum(1, keepdims=True))
    assert agreement == pytest.approx(made.fidelity.agreement, abs=0.1)
    assert divergence == pytest.approx(made.fidelity.divergence, rel=0.6)
    # Nobody who does not look at the photos could say it as well.
    assert agreement > np.bincount(said.argmax(1)).max() / 400
    assert divergence < 0.3 * _divergence(said, np.tile(said.mean(0), (400, 1)))


def _divergence(p: NDArray[np.float64], q: NDArray[np.float64]) -> float:
    return float((p * np.log(p / q)).sum(1).mean())


def test_whitening_and_centre_of_the_new_recipe_are_used(tmp_path: Path) -> None:
    fitted = fit_whitening(WIDER, photos(200, seed=3), 8)
    whitening, centre = tmp_path / "w", tmp_path / "c"
    whitening.write_bytes(fitted.file)
    middle = Centre(np.full(8, 0.3, dtype=np.float32), epsilon=0.05, delta=1e-6)
    centre.write_bytes(middle.to_bytes())
    recipe = fitted.recipe.model_copy(update={"centre": middle.digest})
    old = recognizer()
    files = {"whitening": whitening, "centre": centre}
    made = graft(old, OLD, recipe, photos=photos(400), **files)
    assert made.fidelity is not None
    new = child(made, recipe, OLD, **files).predict(photos(400, seed=8))
    agreement = (new.argmax(1) == old.predict(photos(400, seed=8)).argmax(1)).mean()
    assert agreement == pytest.approx(made.fidelity.agreement, abs=0.12)
    with pytest.raises(RecognizerError, match="centres features by the file"):
        graft(old, OLD, recipe, photos=photos(400), whitening=whitening)


def test_an_mlp_takes_over_from_a_linear_head_by_public_random_units() -> None:
    wide = LINEAR.model_copy(update={"model": Mlp(hidden=64)})
    made = graft(recognizer(), OLD, wide, photos=photos(300))
    assert made.fidelity is not None
    assert made.fidelity.agreement > 0.9
    new = child(made, wide, OLD).predict(photos(300, seed=8))
    agreement = (new.argmax(1) == recognizer().predict(photos(300, seed=8)).argmax(1)).mean()
    assert agreement == pytest.approx(made.fidelity.agreement, abs=0.12)


def test_the_same_input_gives_the_same_bits() -> None:
    first, second = (graft(recognizer(), OLD, WIDER, photos=photos(150)) for _ in range(2))
    np.testing.assert_array_equal(first.vector, second.vector)
    assert first.fidelity == second.fidelity
    # Of all heads that say the same, this is the smallest.
    weights, bias = last_layer(child(first, WIDER, OLD))
    assert abs(weights.sum(0)).max() < 1e-5 * abs(weights).max()
    assert abs(bias.sum()) < 1e-5 * abs(bias).max()


@pytest.mark.parametrize("shape", [(40, 7), (20, 60)], ids=["tall", "wide"])
def test_the_closed_form_is_scikit_learns_ridge(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(5)
    x, y = rng.standard_normal(shape) + 3.0, rng.standard_normal((shape[0], 3)) - 1.0
    total = ((x - x.mean(0)) ** 2).sum()
    for penalty, head in zip(PENALTIES[4:], _ridge(x, y, PENALTIES[4:]), strict=True):
        oracle = Ridge(alpha=penalty * total, solver="svd").fit(x, y)
        np.testing.assert_allclose(head.weights, oracle.coef_, atol=1e-8)
        np.testing.assert_allclose(head.bias, oracle.intercept_, atol=1e-7)


def test_what_is_missing_to_change_the_features_is_said() -> None:
    with pytest.raises(RecognizerError, match=r"\(backbone changed\).*at least 100"):
        graft(recognizer(), OLD, WIDER)
    with pytest.raises(RecognizerError, match=r"\(centre changed\)"):
        graft(recognizer(), OLD, LINEAR.model_copy(update={"centre": "0" * 64}))
    with pytest.raises(RecognizerError, match=r"\(model changed\)"):
        graft(recognizer(MLP), OLD, MLP.model_copy(update={"model": Mlp(hidden=6)}))
    with pytest.raises(RecognizerError, match="Found 99 public photos, expected at least 100"):
        graft(recognizer(), OLD, WIDER, photos=photos(MIN_PHOTOS - 1))
    with pytest.raises(RecognizerError, match="Found 0 public photos"):
        graft(recognizer(), OLD, WIDER, photos=[])
    with pytest.raises(RecognizerError, match="do not differ"):
        graft(recognizer(), OLD, WIDER, photos=photos(1) * MIN_PHOTOS)
    with pytest.raises(RecognizerError, match="'cnn' is trained whole"):
        graft(recognizer(), OLD, CNN, photos=photos(MIN_PHOTOS))


def test_probabilities_so_small_that_they_are_zero_are_no_obstacle() -> None:
    old = recognizer()
    sure = Recognizer.create(LINEAR, old.card.taxonomy, old.vector * 5000, created=old.card.created)
    assert (softmax(old.predict(photos(2)), axis=1) > 0).all()
    assert (sure.predict(photos(MIN_PHOTOS)) == 0).any()
    made = graft(sure, OLD, WIDER, photos=photos(MIN_PHOTOS))
    assert np.isfinite(made.vector).all()
    assert made.fidelity is not None
    assert math.isfinite(made.fidelity.divergence)


# -- Under privacy, on real product photos: a start that knows something is worth its ε. ---------------------------

PUBLIC = 500


class Season:
    """Fashion-MNIST's first photos, seen by one recipe: those that train, and public ones that test."""

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        source, network = fashion_mnist(folder), load_backbone(recipe)
        self.recipe = recipe
        self.pixels = (source.train_images[:4000], source.test_images[:1500])
        self.labels = [
            torch.from_numpy(labels[: len(pixels)].astype(np.int64))
            for labels, pixels in zip((source.train_labels, source.test_labels), self.pixels, strict=True)
        ]
        self.features = [
            torch.from_numpy(extract(network, map(Image.fromarray, pixels), recipe.views))
            for pixels in self.pixels
        ]

    def train(
        self, classes: int, start: NDArray[np.float32], epsilon: float, rounds: int
    ) -> NDArray[np.float32]:
        """Return the model after `rounds` steps of DP-SGD by the first `classes` classes, at `epsilon`."""
        mine = self.labels[0] < classes
        training = {
            "mode": "distributed",
            "rounds": rounds,
            "sampling_rate": 0.25,
            "expected_batch": 1000.0,
            "clipping_norm": 1.0,
        }
        plan = make_plan(
            PlanSettings.model_validate(
                {
                    "league": "season",
                    "taxonomy": Taxonomy(classes=CLASSES[:classes]),
                    "recipe": self.recipe,
                    "training": training,
                    "privacy": {"epsilon": epsilon, "delta": 1e-5},
                    "cohort": {"min_merchants": 3, "max_merchants": 3},
                }
            ),
            bytes(16),
        )
        examples = Examples(self.features[0][mine], self.labels[0][mine])
        league = CentralRounds(plan, examples, RoundRandomness(1, "curator"))
        model = start.astype(np.float64)
        for round_ in range(rounds):
            model = model + 3.0 * league.run(round_, model.astype(np.float32)).update
        return model.astype(np.float32)

    def accuracy(self, classes: int, model: NDArray[np.float32]) -> float:
        """Return the accuracy on the public photos of the first `classes` classes that no graft has seen."""
        mine = self.labels[1] < classes
        mine[:PUBLIC] = False
        taxonomy = Taxonomy(classes=CLASSES[:classes])
        return Evaluator(self.recipe, taxonomy, self.features[1][mine], self.labels[1][mine]).accuracy(model)

    def released(self, classes: int, model: NDArray[np.float32]) -> Recognizer:
        """Return the recognizer of `model`."""
        taxonomy = Taxonomy(classes=CLASSES[:classes])
        return Recognizer.create(self.recipe, taxonomy, model, created=datetime(2026, 1, 2, tzinfo=UTC))


def zeros(recipe: Recipe, classes: int) -> NDArray[np.float32]:
    return np.zeros(recipe.dimension(classes), dtype=np.float32)


@pytest.mark.slow
def test_a_tenth_class_and_another_backbone_cost_less_epsilon_than_starting_over(data_folder: Path) -> None:
    recipe = Recipe(preprocessing=Preprocessing(size=16, channels=1), backbone=Scattering(norm=5.0))
    spring = Season(data_folder, recipe)
    nine = spring.train(9, zeros(recipe, 9), epsilon=4.0, rounds=40)
    before = spring.accuracy(9, nine)

    # A class more: nothing is lost before training, and a few rounds get further than from zeros.
    ten = graft(spring.released(9, nine), CLASSES).vector
    assert spring.accuracy(10, ten) == pytest.approx(before * 0.9, abs=0.02)
    gained = spring.accuracy(10, spring.train(10, ten, epsilon=1.0, rounds=8))
    anew = spring.accuracy(10, spring.train(10, zeros(recipe, 10), epsilon=1.0, rounds=8))
    assert gained > max(before - 0.02, anew + 0.08)

    # Another backbone: public photos carry most of it over.
    other = Recipe(
        preprocessing=Preprocessing(size=16, channels=1), backbone=Scattering(scales=1, groups=9, norm=5.0)
    )
    summer = Season(data_folder, other)
    public = [Image.fromarray(pixels) for pixels in spring.pixels[1][:PUBLIC]]
    made = graft(spring.released(9, nine), CLASSES[:9], other, photos=public)
    moved = summer.accuracy(9, made.vector)
    further = summer.accuracy(9, summer.train(9, made.vector, epsilon=1.0, rounds=8))
    alone = summer.accuracy(9, summer.train(9, zeros(other, 9), epsilon=1.0, rounds=8))
    assert moved > before - 0.05
    assert further > alone + 0.1
