"""The trained part of a recipe, and its exchange as one flat vector.

    module = build(recipe, classes=10)
    load_vector(module, initial_vector(recipe, classes=10, seed=1))
    to_vector(module)    # (recipe.dimension(10),) float32

The vector holds the parameters in the order of `module.parameters()`, each in row-major order: what
merchants and server send each other, and what a recognizer stores. A linear model and an MLP read features
(n, feature_dimension), a CNN reads preprocessed photos (n, c, s, s); both return logits (n, classes). Modules
suit Opacus: group normalisation, nothing in place, no buffers.
"""

import math
from collections import OrderedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hanse_common.errors import RecognizerError
from hanse_common.vision.recipe import Recipe
from hanse_common.vision.recipe_model import Mlp, SmallCnn


def build(recipe: Recipe, classes: int) -> nn.Module:
    """Return the recipe's model for `classes` classes, in training mode, all parameters zero."""
    if isinstance(recipe.model, SmallCnn):
        module = _small_cnn(recipe.model, recipe.preprocessing.channels, classes)
    elif isinstance(recipe.model, Mlp):
        module = nn.Sequential(
            OrderedDict(
                hidden=nn.Linear(recipe.feature_dimension, recipe.model.hidden),
                tanh=nn.Tanh(),
                dropout=nn.Dropout(recipe.model.dropout),
                linear=nn.Linear(recipe.model.hidden, classes),
            )
        )
    else:
        layer = nn.Linear(recipe.feature_dimension, classes)
        module = nn.Sequential(OrderedDict(dropout=nn.Dropout(recipe.model.dropout), linear=layer))
    load_vector(module, np.zeros(recipe.dimension(classes), dtype=np.float32))
    return module


def initial_vector(recipe: Recipe, classes: int, seed: int) -> NDArray[np.float32]:
    """Return the parameters that training starts from, (d,): public, and the same bits on every machine.

    Weights are uniform in ±√(6/fan_in) ("kaiming": He et al. 2015, section 2.2) or ±√(6/(fan_in + fan_out))
    ("xavier": Glorot, Bengio 2010, equation 16), from the first 53 bits of the words of PCG64(`seed`); biases
    are zero, and group normalisations begin as the identity.
    """
    source = np.random.PCG64(seed)
    module = build(recipe, classes)
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, nn.GroupNorm):
                layer.weight.fill_(1.0)
            elif isinstance(layer, nn.Linear | nn.Conv2d):
                layer.weight.copy_(_uniform(layer.weight.shape, recipe.model.initialisation, source))
    return to_vector(module)


def to_vector(module: nn.Module) -> NDArray[np.float32]:
    """Return the parameters of `module`, (d,), a copy."""
    parts = [parameter.detach().reshape(-1).float().cpu() for parameter in module.parameters()]
    vector: NDArray[np.float32] = torch.cat(parts).numpy()
    return vector


def load_vector(module: nn.Module, vector: NDArray[np.float32]) -> None:
    """Set the parameters of `module` from `vector`, (d,) float32.

    Raises `RecognizerError` when its shape or type is another, or a number is not finite; the module is left
    as it was then.
    """
    parameters = list(module.parameters())
    expected = sum(parameter.numel() for parameter in parameters)
    if vector.dtype != np.float32 or vector.shape != (expected,):
        raise RecognizerError(
            f"Model vector: found {vector.dtype} of shape {vector.shape}, "
            f"expected float32 of shape ({expected},)."
        )
    if not np.isfinite(vector).all():
        raise RecognizerError("Model vector: found numbers that are not finite; the model cannot be used.")
    parts = torch.split(torch.from_numpy(np.array(vector)), [parameter.numel() for parameter in parameters])
    with torch.no_grad():
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.copy_(part.view_as(parameter))


def _small_cnn(model: SmallCnn, channels: int, classes: int) -> nn.Sequential:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for block, outputs in enumerate((model.width, 2 * model.width, 4 * model.width), start=1):
        layers[f"conv{block}"] = nn.Conv2d(channels, outputs, kernel_size=3, padding=1)
        layers[f"norm{block}"] = nn.GroupNorm(4, outputs)
        layers[f"relu{block}"] = nn.ReLU()
        layers[f"pool{block}"] = nn.MaxPool2d(2) if block < 3 else nn.AdaptiveAvgPool2d(2)
        channels = outputs
    layers["flatten"] = nn.Flatten()
    layers["dropout"] = nn.Dropout(model.dropout)
    layers["linear"] = nn.Linear(4 * channels, classes)
    return nn.Sequential(layers)


def _uniform(shape: torch.Size, scheme: str, source: np.random.PCG64) -> Tensor:
    outputs, fan_in = shape[0], shape[1:].numel()
    fan_out = outputs * shape[2:].numel()
    bounds = {"zeros": 0.0, "kaiming": math.sqrt(6.0 / fan_in), "xavier": math.sqrt(6.0 / (fan_in + fan_out))}
    uniform = (source.random_raw(shape.numel()) >> np.uint64(11)) * 2.0**-53
    return torch.from_numpy(bounds[scheme] * (2.0 * uniform - 1.0)).reshape(shape)
