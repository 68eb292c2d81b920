import hashlib
import json
import struct
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image
from pydantic import ValidationError
from scipy.special import softmax

from hanse_common.errors import RecognizerError
from hanse_common.vision.backbones import load_backbone, raw_features
from hanse_common.vision.extraction import extract
from hanse_common.vision.preprocessing import preprocess
from hanse_common.vision.recipe import Recipe
from hanse_common.vision.recipe_features import Preprocessing, Projection, PublicWhitening, Scattering
from hanse_common.vision.recipe_model import Linear, Loss, SmallCnn
from hanse_common.vision.recognizer import CARD_FILE, MODEL_FILE, WHITENING_FILE, Recognizer
from hanse_common.vision.taxonomy import Taxonomy
from hanse_common.vision.whitening import Whitening

TAXONOMY = Taxonomy(classes=("Shirt", "Sneaker", "Tasche"))
LINEAR = Recipe(
    preprocessing=Preprocessing(size=8), backbone=Scattering(groups=None, projection=Projection(dimensions=6))
)
CNN = Recipe(preprocessing=Preprocessing(size=8), backbone=None, model=SmallCnn(width=4))


def recognizer(recipe: Recipe = LINEAR, seed: int = 0, **figures: Any) -> Recognizer:
    vector = np.random.default_rng(seed).standard_normal(recipe.dimension(3)).astype(np.float32)
    created = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    return Recognizer.create(recipe, TAXONOMY, vector, created=created, **figures)


def photos(n: int) -> list[Image.Image]:
    generator = np.random.default_rng(7)
    return [Image.fromarray(generator.integers(0, 256, (20, 12, 3), dtype=np.uint8)) for _ in range(n)]


@pytest.mark.parametrize("recipe", [LINEAR, CNN], ids=["linear", "cnn"])
def test_what_is_saved_is_loaded(tmp_path: Path, recipe: Recipe) -> None:
    made = recognizer(
        recipe,
        metrics={"accuracy": 0.9, "macro_auc": None},
        epsilon=2.5,
        delta=1e-5,
        plan_digest=b"p" * 32,
        parent_digest=b"q" * 32,
    )
    folder = tmp_path / "a" / "b"
    made.save(folder)
    loaded = Recognizer.load(folder, digest=made.digest())
    assert loaded.card == made.card
    np.testing.assert_array_equal(loaded.vector, made.vector)
    np.testing.assert_array_equal(loaded.predict(photos(3)), made.predict(photos(3)))
    assert loaded.digest() == hashlib.sha256((folder / CARD_FILE).read_bytes()).digest()
    assert sorted(path.name for path in folder.iterdir()) == [CARD_FILE, MODEL_FILE]


def test_files_are_ordinary(tmp_path: Path) -> None:
    made = recognizer(epsilon=2.5, delta=1e-5)
    made.save(tmp_path)
    tensors = safetensors.numpy.load_file(tmp_path / MODEL_FILE)
    assert {name: value.shape for name, value in tensors.items()} == {
        "linear.weight": (3, 6),
        "linear.bias": (3,),
    }
    card = json.loads((tmp_path / CARD_FILE).read_text())
    assert card["taxonomy"]["classes"] == ["Shirt", "Sneaker", "Tasche"]
    assert card["epsilon"] == 2.5
    assert card["recipe"]["backbone"]["name"] == "scattering"
    assert card["created"] == "2026-01-02T03:04:05Z"


def test_saving_again_replaces(tmp_path: Path) -> None:
    recognizer(seed=1).save(tmp_path)
    (tmp_path / "plot.png").write_bytes(b"kept")
    newer = recognizer(seed=2)
    newer.save(tmp_path)
    np.testing.assert_array_equal(Recognizer.load(tmp_path).vector, newer.vector)
    assert (tmp_path / "plot.png").exists()


def test_a_crash_between_the_files_is_noticed(tmp_path: Path) -> None:
    older, newer = recognizer(seed=1), recognizer(seed=2)
    older.save(tmp_path)
    card = (tmp_path / CARD_FILE).read_bytes()
    newer.save(tmp_path)
    (tmp_path / CARD_FILE).write_bytes(card)
    with pytest.raises(RecognizerError, match="do not belong together"):
        Recognizer.load(tmp_path)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RecognizerError, match="cannot save"):
        recognizer().save(tmp_path / "file")


def test_later_changes_of_the_vector_do_not_reach_the_recognizer(tmp_path: Path) -> None:
    vector = np.ones(LINEAR.dimension(3), dtype=np.float32)
    made = Recognizer.create(LINEAR, TAXONOMY, vector, created=datetime.now(UTC))
    vector[:] = 2
    assert (made.vector == 1).all()
    made.save(tmp_path)


def test_a_card_is_saved_with_its_own_vector_only(tmp_path: Path) -> None:
    with pytest.raises(RecognizerError, match="another vector"):
        Recognizer(recognizer(seed=1).card, recognizer(seed=2).vector).save(tmp_path)


@pytest.mark.parametrize("recipe", [LINEAR, CNN], ids=["linear", "cnn"])
def test_probabilities(recipe: Recipe) -> None:
    # More photos than go into one batch.
    found = recognizer(recipe).predict(photos(70))
    assert (found.shape, found.dtype) == ((70, 3), np.float64)
    np.testing.assert_allclose(found.sum(axis=1), 1.0, rtol=0, atol=1e-12)
    assert (found > 0).all()
    np.testing.assert_allclose(recognizer(recipe).predict(photos(70)[66:]), found[66:], rtol=1e-4)
    assert recognizer(recipe).predict([]).shape == (0, 3)


def test_probabilities_by_the_definition() -> None:
    made = recognizer()
    features = load_backbone(LINEAR)(preprocess(photos(5), LINEAR.preprocessing)).numpy()
    weight, bias = made.vector[:18].reshape(3, 6), made.vector[18:]
    np.testing.assert_allclose(
        made.predict(photos(5)), softmax(features @ weight.T + bias, axis=1), rtol=1e-5
    )


def test_dropout_does_not_touch_predictions() -> None:
    made = recognizer(LINEAR.model_copy(update={"model": Linear(dropout=0.9)}))
    np.testing.assert_array_equal(made.predict(photos(4)), made.predict(photos(4)))


def test_vectors_that_are_none_of_the_recipe() -> None:
    with pytest.raises(RecognizerError, match="expected float32 of shape"):
        Recognizer.create(LINEAR, TAXONOMY, np.zeros(5, dtype=np.float32), created=datetime.now(UTC))
    endless = np.full(LINEAR.dimension(3), np.inf, dtype=np.float32)
    with pytest.raises(RecognizerError, match="not finite"):
        Recognizer.create(LINEAR, TAXONOMY, endless, created=datetime.now(UTC))


def test_figures_that_no_card_may_hold() -> None:
    for figures in ({"epsilon": float("nan")}, {"delta": 2.0}, {"metrics": {"accuracy": float("inf")}}):
        with pytest.raises(ValidationError):
            recognizer(**figures)


# What happens to files on their way, and what loading says.


def _edit(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        card = json.loads((folder / CARD_FILE).read_text())
        change(card)
        (folder / CARD_FILE).write_text(json.dumps(card))

    return apply


def _replace_model(tensors: dict[str, np.ndarray[Any, Any]]) -> Callable[[Path], None]:
    """Replace the model and fix its digest, as whoever made a hostile recognizer would."""

    def apply(folder: Path) -> None:
        data = safetensors.numpy.save(tensors)
        _replace_bytes(data)(folder)

    return apply


def _replace_bytes(data: bytes) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / MODEL_FILE).write_bytes(data)
        _edit(lambda card: card.update(model_digest=hashlib.sha256(data).hexdigest()))(folder)

    return apply


def _flip(name: str, position: int) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[position] ^= 1
        (folder / name).write_bytes(data)

    return apply


def _other_size(card: dict[str, Any]) -> None:
    card["recipe"]["preprocessing"]["size"] = 16


F32 = np.float32
DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "no model": (lambda folder: (folder / MODEL_FILE).unlink(), "No such file"),
    "no card": (lambda folder: (folder / CARD_FILE).unlink(), "No such file"),
    "model's last bit": (_flip(MODEL_FILE, -1), "do not belong together"),
    "model's header": (_flip(MODEL_FILE, 12), "do not belong together"),
    "model cut": (
        lambda f: (f / MODEL_FILE).write_bytes((f / MODEL_FILE).read_bytes()[:-4]),
        "do not belong",
    ),
    "model too large": (lambda f: (f / MODEL_FILE).write_bytes(bytes(1 << 17)), "more than"),
    "model is no safetensors": (_replace_bytes(b"text"), "do not fit the recipe"),
    "header longer than the file": (
        _replace_bytes(struct.pack("<Q", 1 << 60) + b"{}"),
        "do not fit the recipe",
    ),
    "other shapes": (
        _replace_model({"linear.weight": np.zeros((3, 7), F32), "linear.bias": np.zeros(3, F32)}),
        "do not fit the recipe",
    ),
    "missing tensor": (_replace_model({"linear.weight": np.zeros((3, 6), F32)}), "do not fit the recipe"),
    "extra tensor": (
        _replace_model(
            {
                "linear.weight": np.zeros((3, 6), F32),
                "linear.bias": np.zeros(3, F32),
                "backdoor": np.zeros(3, F32),
            }
        ),
        "do not fit the recipe",
    ),
    "not finite": (
        _replace_model({"linear.weight": np.full((3, 6), np.nan, F32), "linear.bias": np.zeros(3, F32)}),
        "not finite",
    ),
    "card is no JSON": (lambda f: (f / CARD_FILE).write_text("{"), "card.json"),
    "card is no text": (lambda f: (f / CARD_FILE).write_bytes(b"\xff\xfe" * 40), "card.json"),
    "card nests deeply": (lambda f: (f / CARD_FILE).write_text("[" * 500_000), "card.json"),
    "card is huge": (lambda f: (f / CARD_FILE).write_bytes(b" " * (1 << 21)), "more than 1048576 bytes"),
    "card of a later format": (_edit(lambda card: card.update(format_version=2)), "format_version"),
    "unknown key": (_edit(lambda card: card.update(code="import os")), "code"),
    "other recipe": (_edit(_other_size), "the recipe's digest is"),
    "other recipe digest": (
        _edit(lambda card: card.update(recipe_digest=64 * "0")),
        "the recipe's digest is",
    ),
    "other model digest": (_edit(lambda card: card.update(model_digest=64 * "0")), "do not belong together"),
    "class too many": (
        _edit(lambda card: card["taxonomy"]["classes"].append("Hose")),
        "do not fit the recipe",
    ),
    "one class twice": (_edit(lambda card: card["taxonomy"].update(classes=["A", "A", "B"])), "taxonomy"),
    "many metrics": (_edit(lambda card: card.update(metrics={str(i): 0 for i in range(65)})), "metrics"),
    "endless number": (_edit(lambda card: card.update(epsilon=float("inf"))), "epsilon"),
    "negative epsilon": (_edit(lambda card: card.update(epsilon=-1)), "epsilon"),
    "text for a number": (_edit(lambda card: card.update(epsilon="2.5")), "epsilon"),
    "no time zone": (_edit(lambda card: card.update(created="2026-01-02T03:04:05")), "created"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_reported(tmp_path: Path, damage: str) -> None:
    recognizer(epsilon=2.5).save(tmp_path)
    apply, reason = DAMAGE[damage]
    apply(tmp_path)
    with pytest.raises(RecognizerError, match=reason):
        Recognizer.load(tmp_path)


def test_a_digest_from_elsewhere_covers_every_claim(tmp_path: Path) -> None:
    made = recognizer(epsilon=2.5)
    made.save(tmp_path)
    _edit(lambda card: card.update(epsilon=0.1))(tmp_path)
    assert Recognizer.load(tmp_path).card.epsilon == 0.1
    with pytest.raises(RecognizerError, match="another card"):
        Recognizer.load(tmp_path, digest=made.digest())


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(RecognizerError, match="No such file"):
        Recognizer.load(tmp_path / "nowhere")


# Whitening travels with the recognizer.


@pytest.fixture
def whitened(tmp_path: Path) -> Recognizer:
    """A recognizer whose whitening lies outside its folder, in a file that others may have written otherwise."""
    features = extract(raw_features(LINEAR), photos(30), LINEAR.views)
    whitening = Whitening.fit(features, 5)
    tensors = {"matrix": whitening.matrix.copy(), "mean": whitening.mean}
    data = safetensors.numpy.save(tensors, metadata={"made_by": "the operator"})
    path = tmp_path / "from-the-operator.safetensors"
    path.write_bytes(data)
    name = PublicWhitening(dimensions=5, weights=hashlib.sha256(data).hexdigest())
    backbone = LINEAR.backbone.model_copy(update={"projection": None, "whitening": name})  # type: ignore[union-attr]
    return recognizer(LINEAR.model_copy(update={"backbone": backbone}), whitening=path)


def test_a_whitened_recognizer_is_saved_with_its_whitening(whitened: Recognizer, tmp_path: Path) -> None:
    before = whitened.predict(photos(3))
    whitened.save(tmp_path / "saved")
    (tmp_path / "saved").rename(tmp_path / "elsewhere")
    (tmp_path / "from-the-operator.safetensors").unlink()
    loaded = Recognizer.load(tmp_path / "elsewhere", digest=whitened.digest())
    np.testing.assert_array_equal(loaded.predict(photos(3)), before)
    loaded.save(tmp_path / "elsewhere")  # over itself
    loaded.save(tmp_path / "copy")
    np.testing.assert_array_equal(Recognizer.load(tmp_path / "copy").predict(photos(3)), before)
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == sorted(
        [CARD_FILE, MODEL_FILE, WHITENING_FILE]
    )


@pytest.mark.parametrize("position", [10, -1], ids=["header", "last bit"])
def test_a_tampered_whitening_is_noticed_at_once(whitened: Recognizer, tmp_path: Path, position: int) -> None:
    whitened.save(tmp_path)
    _flip(WHITENING_FILE, position)(tmp_path)
    with pytest.raises(RecognizerError, match="SHA-256"):
        Recognizer.load(tmp_path)


def test_a_missing_whitening_is_noticed_at_once(whitened: Recognizer, tmp_path: Path) -> None:
    whitened.save(tmp_path)
    (tmp_path / WHITENING_FILE).unlink()
    with pytest.raises(RecognizerError, match="expected a whitening"):
        Recognizer.load(tmp_path)


def test_nothing_is_saved_without_the_whitening(whitened: Recognizer, tmp_path: Path) -> None:
    (tmp_path / "from-the-operator.safetensors").unlink()
    with pytest.raises(RecognizerError, match="expected a whitening"):
        whitened.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_card_from_before_an_option_was_known_keeps_its_digest(tmp_path: Path) -> None:
    made = recognizer()
    made.save(tmp_path)
    data = (tmp_path / "card.json").read_bytes()
    written = json.loads(data)["recipe"]
    assert "loss" not in written
    assert "zoom" not in written["preprocessing"]
    assert Recognizer.load(tmp_path, digest=hashlib.sha256(data).digest()).digest() == made.digest()
    smoothed = recognizer(LINEAR.model_copy(update={"loss": Loss(smoothing=0.1)}))
    smoothed.save(tmp_path / "other")
    assert json.loads((tmp_path / "other/card.json").read_bytes())["recipe"]["loss"]["smoothing"] == 0.1
    assert Recognizer.load(tmp_path / "other").card == smoothed.card
