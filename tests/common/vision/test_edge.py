"""A recognizer as ONNX: the same pixels as Pillow's, the same answers as the recognizer's, in another library."""

import json
import re
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hanse_common.errors import ConfigError, RecognizerError
from hanse_common.vision import edge
from hanse_common.vision.centring import Centre
from hanse_common.vision.edge_graph import EdgeNetwork, _View
from hanse_common.vision.preprocessing import preprocess
from hanse_common.vision.recipe import (
    Concatenation,
    EfficientNetLite0,
    Linear,
    Mlp,
    Part,
    Preprocessing,
    Projection,
    PublicWhitening,
    Recipe,
    Scattering,
    SmallCnn,
)
from hanse_common.vision.recognizer import Recognizer
from hanse_common.vision.taxonomy import Taxonomy
from hanse_common.vision.whitening import Whitening

GUIDE = Path(__file__).parents[3] / "docs" / "edge.md"
TINY = Recipe(
    preprocessing=Preprocessing(size=8, channels=1),
    backbone=Scattering(scales=1, angles=2, groups=None, projection=Projection(dimensions=12)),
)
LITE = EfficientNetLite0(layers="stages", projection=Projection(dimensions=16))
RECIPES = {
    "scattering": TINY,
    "scattering of three scales, and an MLP": Recipe(
        preprocessing=Preprocessing(size=32, resize="pad"),
        backbone=Scattering(scales=3, angles=3, groups=3, projection=Projection(dimensions=12)),
        model=Mlp(hidden=5),
    ),
    "efficientnet-lite0": Recipe(
        preprocessing=Preprocessing(size=48, zoom=1.3), backbone=EfficientNetLite0()
    ),
    "averaged over views": Recipe(
        preprocessing=Preprocessing(size=64, resize="stretch"),
        backbone=EfficientNetLite0(pooling="gem", averaging="mirror"),
    ),
    "concatenation": Recipe(
        backbone=Concatenation(
            parts=(
                Part(preprocessing=TINY.preprocessing, backbone=TINY.backbone),
                Part(preprocessing=Preprocessing(size=48), backbone=LITE, weight=2.0),
            ),
            norm=2.0,
        ),
    ),
    "cnn": Recipe(preprocessing=Preprocessing(size=16), backbone=None, model=SmallCnn(width=4)),
}


def made(recipe: Recipe, **files: Path) -> Recognizer:
    vector = np.random.default_rng(0).normal(size=recipe.dimension(3)).astype(np.float32)
    taxonomy = Taxonomy(classes=("Hemd", "Schuh", "Tüte"))
    return Recognizer.create(
        recipe, taxonomy, vector, created=datetime(2026, 1, 1, tzinfo=UTC), epsilon=2.5, delta=1e-5, **files
    )


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Return a picture with smooth parts, edges and noise."""
    source = np.random.default_rng(seed)
    coarse = Image.fromarray(source.integers(0, 256, (6, 7, 3), dtype=np.uint8)).resize((width, height))
    noise = source.normal(scale=9, size=(height, width, 3))
    return Image.fromarray(np.clip(np.asarray(coarse) + noise, 0, 255).astype(np.uint8))


PHOTOS = [photo(60, 45, 1), photo(90, 33, 2), photo(8, 8, 3), photo(7, 5, 4), photo(300, 201, 5)]


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 90),
    st.integers(1, 90),
    st.integers(2, 40),
    st.sampled_from(["crop", "pad", "stretch"]),
    st.sampled_from([1, 3]),
    st.sampled_from([1.0, 1.5, 3.0]),
)
def test_pixels_are_pillows_to_the_bit(
    width: int, height: int, size: int, resize: str, channels: int, zoom: float
) -> None:
    view = Preprocessing(
        size=max(8, size),
        resize=resize,
        channels=channels,
        zoom=zoom if resize == "crop" else 1.0,
        mean=(0.3,),
    )
    image = photo(width, height, width * 100 + height)
    found = _View(view)(torch.from_numpy(edge.pixels(image).copy()))
    levels = 2 if height > width else 0  # Pillow 13 may do a tall photo's rows first
    torch.testing.assert_close(found, preprocess([image], view), rtol=0, atol=levels / 127.5 + 1e-6)


def test_large_photos_are_shrunk_to_pillows_pixels_too() -> None:
    view = Preprocessing(size=8)
    image = photo(1030, 1000)
    assert max(image.size) / view.size > 128
    found = _View(view)(torch.from_numpy(edge.pixels(image).copy()))
    torch.testing.assert_close(found, preprocess([image], view), rtol=0, atol=1e-6)


def assert_same(recognizer: Recognizer, run: Callable[[np.ndarray], list[np.ndarray]]) -> None:
    for image in PHOTOS:
        found = run(edge.pixels(image))
        features = recognizer.features([image])
        np.testing.assert_allclose(found[0], recognizer.probabilities(features), atol=1e-5)
        if recognizer.card.recipe.backbone is not None:
            np.testing.assert_allclose(found[1], recognizer.embeddings(features), atol=1e-5)


@pytest.mark.parametrize("name", RECIPES)
def test_the_network_says_what_the_recognizer_says(name: str) -> None:
    recognizer = made(RECIPES[name])
    network = EdgeNetwork(recognizer)

    def run(images: np.ndarray) -> list[np.ndarray]:
        with torch.inference_mode():
            found = network(torch.from_numpy(images.copy()))
        return [each.numpy() for each in (found if isinstance(found, tuple) else (found,))]

    assert_same(recognizer, run)


def centred_and_whitened(folder: Path) -> Recognizer:
    """Return a recognizer with a whitening and a centre, in files."""
    source = np.random.default_rng(0)
    backbone = Scattering(scales=1, angles=2, groups=None)
    raw = Recipe(preprocessing=TINY.preprocessing, backbone=backbone).raw_dimension
    whitening = Whitening.fit(source.normal(size=(40, raw)).astype(np.float32), 6)
    centre = Centre(source.normal(scale=0.2, size=6).astype(np.float32), 0.1, 1e-6)
    (folder / "whitening").write_bytes(whitening.to_bytes())
    (folder / "centre").write_bytes(centre.to_bytes())
    import hashlib

    named = PublicWhitening(dimensions=6, weights=hashlib.sha256(whitening.to_bytes()).hexdigest())
    recipe = Recipe(
        preprocessing=TINY.preprocessing,
        backbone=backbone.model_copy(update={"whitening": named, "norm": 3.0}),
        centre=centre.digest,
        model=Linear(),
    )
    return made(recipe, whitening=folder / "whitening", centre=folder / "centre")


@pytest.fixture(scope="module")
def recognizer(tmp_path_factory: pytest.TempPathFactory) -> Recognizer:
    return centred_and_whitened(tmp_path_factory.mktemp("recognizer"))


@pytest.fixture(scope="module")
def model(recognizer: Recognizer) -> bytes:
    return edge.to_onnx(recognizer)


def test_onnxruntime_says_what_the_recognizer_says(recognizer: Recognizer, model: bytes) -> None:
    session = edge.open_session(model)
    assert_same(recognizer, lambda images: session.run(None, {"images": images}))
    two = np.concatenate([edge.pixels(PHOTOS[0]), edge.pixels(photo(60, 45, 9))])
    probabilities, embedding = session.run(None, {"images": two})
    assert (probabilities.shape, embedding.shape) == ((2, 3), (2, 6))
    np.testing.assert_allclose(np.linalg.norm(embedding, axis=1), 1.0, rtol=1e-5)
    found = edge.parity(recognizer, model, PHOTOS)
    assert (found.photos, found.agreement) == (5, 1.0)
    assert found.difference < edge.TOLERANCE
    assert found.cosine == pytest.approx(1.0)
    other = made(recognizer.card.recipe, whitening=recognizer.whitening, centre=recognizer.centre)
    assert edge.parity(Recognizer.create(
        other.card.recipe, other.card.taxonomy, -other.vector, created=other.card.created,
        whitening=other.whitening, centre=other.centre,
    ), model, PHOTOS).difference > 0.01  # fmt: skip


def test_the_file_says_what_it_is(recognizer: Recognizer, model: bytes) -> None:
    said = edge.open_session(model).get_modelmeta().custom_metadata_map
    assert json.loads(said["hanse.classes"]) == ["Hemd", "Schuh", "Tüte"]
    assert said["hanse.recognizer"] == recognizer.digest().hex()
    assert said["hanse.embedding"] == recognizer.embedding_digest().hex()
    assert (float(said["hanse.epsilon"]), float(said["hanse.delta"])) == (2.5, 1e-5)
    loaded = onnx.load_from_string(model)
    onnx.checker.check_model(loaded, full_check=True)
    assert {entry.domain for entry in loaded.opset_import} == {""}
    assert str(Path.cwd()).encode() not in model


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ConfigError, match=re.escape("hanse[edge]")):
        edge.to_onnx(made(TINY))


def test_what_onnx_has_no_counterpart_of_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise torch.onnx.errors.OnnxExporterError("no such thing")

    monkeypatch.setattr(torch.onnx, "export", fails)
    with pytest.raises(RecognizerError, match=r"'scattering' can't be exported.*no such thing"):
        edge.to_onnx(made(TINY))


def test_quantisation_wants_photos(model: bytes) -> None:
    with pytest.raises(RecognizerError, match="photos to calibrate"):
        edge.quantised(model, [])


def test_a_quantised_matrix_keeps_the_metadata_and_most_of_the_answer(
    recognizer: Recognizer, model: bytes
) -> None:
    small = edge.quantised(model, PHOTOS)
    found = edge.parity(recognizer, small, PHOTOS)
    assert found.cosine is not None
    assert found.cosine > 0.99
    said = edge.open_session(small).get_modelmeta().custom_metadata_map
    assert said == edge.metadata(recognizer)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_every_kind_of_recipe_is_exported(name: str) -> None:
    recognizer = made(RECIPES[name])
    session = edge.open_session(edge.to_onnx(recognizer))
    assert_same(recognizer, lambda images: session.run(None, {"images": images}))
