"""A recognizer as ONNX: the same pixels as Pillow's, the same answers as the recognizer's, in another library."""

import hashlib
import json
import re
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hanse_common.errors import ConfigError, RecognizerError
from hanse_common.vision import edge
from hanse_common.vision.centring import Centre
from hanse_common.vision.edge_graph import EdgeNetwork, _View
from hanse_common.vision.preprocessing import preprocess
from hanse_common.vision.recipe import Recipe
from hanse_common.vision.recipe_features import (
    Concatenation,
    EfficientNetLite0,
    Part,
    Preprocessing,
    Projection,
    PublicWhitening,
    Scattering,
    TorchvisionBackbone,
)
from hanse_common.vision.recipe_model import Linear, Mlp, SmallCnn
from hanse_common.vision.recognizer import Recognizer
from hanse_common.vision.taxonomy import Taxonomy
from hanse_common.vision.torchvision_compat import models
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

SLOW = ("averaged over views", "concatenation")


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


@settings(deadline=None, max_examples=40)
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
    wanted = preprocess([image], view)
    if height > width:  # Pillow 13 may do a tall photo's rows first, which rounds and clips otherwise
        assert 127.5 * (found - wanted).abs().mean() < 1.0
    else:
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


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


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in RECIPES],
)
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


@pytest.mark.slow
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


@pytest.mark.slow
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


def test_quantisation_wants_photos() -> None:
    with pytest.raises(RecognizerError, match="photos to calibrate"):
        edge.quantised(b"", [])


def convolutions() -> onnx.ModelProto:
    """Return a model of two convolutions, the first small, the second in two groups with an output for each map."""
    source = np.random.default_rng(0)
    stored = {
        "first": source.uniform(0.5, 1.0, size=(2, 3, 1, 1)) * np.array([0.008, 0.003]).reshape(2, 1, 1, 1),
        "second": source.normal(size=(256, 1, 3, 3)) ** 3,
        "bias": source.normal(size=256),
        "low": np.zeros(()),
        "high": np.full((), 6.0),
        "axes": np.array([2, 3]),
    }
    node = onnx.helper.make_node
    nodes = [
        node("Cast", ["images"], ["pixels"], "cast", to=onnx.TensorProto.FLOAT),
        node("Transpose", ["pixels"], ["x"], "transpose", perm=[0, 3, 1, 2]),
        node("Conv", ["x", "first"], ["y"], "first_conv"),
        node("Clip", ["y", "low", "high"], ["z"], "clip"),
        node("Conv", ["z", "second", "bias"], ["maps"], "second_conv", group=2),
        node("ReduceMean", ["maps", "axes"], ["probabilities"], "mean", keepdims=0),
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "convolutions",
        [onnx.helper.make_tensor_value_info("images", onnx.TensorProto.UINT8, ["n", "height", "width", 3])],
        [onnx.helper.make_tensor_value_info("probabilities", onnx.TensorProto.FLOAT, ["n", 256])],
        [
            onnx.numpy_helper.from_array(value.astype(np.int64 if name == "axes" else np.float32), name)
            for name, value in stored.items()
        ],
    )
    opset = onnx.helper.make_opsetid("", edge.OPSET)
    return onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10)


def test_the_first_convolutions_stay_float32() -> None:
    model = convolutions()
    assert edge._leading_nodes(model.graph) == ["first_conv", "clip"]
    small = onnx.load_from_string(edge.quantised(model.SerializeToString(), PHOTOS))
    types = {tensor.name: tensor.data_type for tensor in small.graph.initializer}
    assert types["first"] == onnx.TensorProto.FLOAT
    assert types["second_quantized"] == onnx.TensorProto.INT8


def test_what_rounding_weights_adds_on_average_is_taken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    model = convolutions().SerializeToString()
    photos = PHOTOS[:2]

    def means(data: bytes) -> np.ndarray:
        return np.mean([edge.answers(edge.open_session(data), each)[0][0] for each in photos], axis=0)

    wanted, corrected = means(model), means(edge.quantised(model, photos))
    monkeypatch.setattr(edge, "_correct_biases", lambda *_: None)
    plain = means(edge.quantised(model, photos))
    assert np.abs(corrected - wanted).mean() < 0.5 * np.abs(plain - wanted).mean()


def test_rounding_errors_are_those_of_127_steps_a_channel() -> None:
    weight = np.array([[[[1.27, 0.004, -0.516]]], [[[0.0, 0.0, 0.0]]]])
    np.testing.assert_allclose(
        edge._rounding_error(weight), [[[[0.0, 0.004, 0.004]]], [[[0, 0, 0]]]], atol=1e-12
    )


@pytest.mark.slow
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
    model = edge.to_onnx(recognizer)
    assert_exported(recognizer, model)


def assert_exported(recognizer: Recognizer, model: bytes) -> None:
    session = edge.open_session(model)
    assert_same(recognizer, lambda images: session.run(None, {"images": images}))
    small = edge.quantised(model, PHOTOS)
    if len(model) > 1e6:  # what is not weights takes more than those of a tiny one
        assert len(small) < 0.4 * len(model)
    found = edge.parity(recognizer, small, PHOTOS)
    assert found.cosine is None or found.cosine > 0.98


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "dimension"), [("resnet18", 512), ("mobilenet_v3_small", 1024)])
def test_torchvisions_networks_are_exported(tmp_path: Path, architecture: str, dimension: int) -> None:
    torch.manual_seed(0)
    path = tmp_path / "weights.safetensors"
    path.write_bytes(safetensors.torch.save(models.get_model(architecture).state_dict()))
    backbone = TorchvisionBackbone(
        architecture=architecture,
        dimension=dimension,
        weights=hashlib.sha256(path.read_bytes()).hexdigest(),
    )
    recognizer = made(Recipe(preprocessing=Preprocessing(size=64), backbone=backbone), backbone_weights=path)
    assert_exported(recognizer, edge.to_onnx(recognizer))
