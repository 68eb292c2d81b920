"""A recognizer as one network from pixels to answers, in operations that ONNX has.

    network = EdgeNetwork(recognizer)
    probabilities, embedding = network(torch.zeros(1, 480, 640, 3, dtype=torch.uint8))

Two parts of a recognizer are written anew for it, and compute the same. Pillow's resizing [1] becomes two products with
matrices of its weights, one for the photo's columns, then one for its rows, each rounded to 8 bits, for photos of any
size. For photos no taller than wide, which are shrunk no more than to the 128th part, these are Pillow's pixels, every
one. Of taller photos Pillow 13 may do the rows first, which rounds some pixels the other way. Fourier transforms in the
scattering become products with the real and imaginary parts of the transform's matrix.

References
[1] Pillow, src/libImaging/Resample.c: `precompute_coeffs` and `bicubic_filter`.
"""

import functools
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hanse_common.vision.backbones import load_backbone
from hanse_common.vision.centring import load_centre
from hanse_common.vision.model import build, load_vector
from hanse_common.vision.preprocessing import per_channel
from hanse_common.vision.recipe_features import Preprocessing
from hanse_common.vision.recognizer import Recognizer
from hanse_common.vision.scattering import ScatterNet

_LUMA: Final = (19_595.0, 38_470.0, 7_471.0)
"""Of 65 536: Pillow's weights of red, green and blue in grey, after ITU-R BT.601."""


class EdgeNetwork(nn.Module):
    """From photos, (n, height, width, 3) uint8 RGB, to probabilities, (n, classes), and, given a backbone, embeddings.

    Embeddings are (n, d) with rows of norm 1, those of `Recognizer.embeddings`. All is float32, on a CPU.
    """

    mean: Tensor | None

    def __init__(self, recognizer: Recognizer) -> None:
        """Take the recognizer's parts. Raises `RecognizerError` when the backbone cannot be loaded."""
        super().__init__()
        recipe = recognizer.card.recipe
        self.views = nn.ModuleList(_View(view) for view in recipe.views)
        self.backbone = None
        if recipe.backbone is not None:
            self.backbone = load_backbone(
                recipe, weights=recognizer.backbone_weights, whitening=recognizer.whitening
            )
            _replace_scattering(self.backbone)
            self.norm = recipe.backbone.norm
        centre = load_centre(recipe, recognizer.centre)
        self.register_buffer("mean", None if centre is None else torch.from_numpy(centre.mean.copy()))
        self.head = build(recipe, len(recognizer.card.taxonomy.classes))
        load_vector(self.head, recognizer.vector)
        self.eval()
        self.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Return the probabilities, and the embeddings where there is a backbone."""
        views = [view(images) for view in self.views]
        if self.backbone is None:
            return torch.softmax(self.head(views[0]), dim=1)
        features = self.backbone(*views)
        if self.mean is not None:
            known = (features != 0).any(dim=1, keepdim=True)
            moved = torch.where(known, F.normalize(features, dim=1) - self.mean, 0.0)
            features = self.norm * F.normalize(moved, dim=1)
        return torch.softmax(self.head(features), dim=1), F.normalize(features, dim=1)


class _View(nn.Module):
    """Pixels, (n, height, width, 3) uint8, as `preprocessing.preprocess` makes them: (n, c, size, size) float32."""

    mean: Tensor
    std: Tensor
    fill: Tensor
    luma: Tensor

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.preprocessing = preprocessing
        mean = torch.tensor(per_channel(preprocessing.mean, preprocessing)).reshape(-1, 1, 1)
        self.register_buffer("mean", mean)
        self.register_buffer(
            "std", torch.tensor(per_channel(preprocessing.std, preprocessing)).reshape(-1, 1, 1)
        )
        self.register_buffer("fill", (255.0 * mean).round().clamp(0.0, 255.0))
        self.register_buffer("luma", torch.tensor(_LUMA).reshape(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        x = images.permute(0, 3, 1, 2).float()
        if self.preprocessing.channels == 1:
            x = torch.floor(((x * self.luma).sum(dim=1, keepdim=True) + 32_768.0) / 65_536.0)
        rows, columns = (torch.arange(length, dtype=torch.float64) for length in images.shape[1:3])
        shorter, longer = torch.minimum(rows[-1], columns[-1]) + 1, torch.maximum(rows[-1], columns[-1]) + 1
        down, inside_down = self._weights(rows, shorter, longer)
        across, inside_across = self._weights(columns, shorter, longer)
        x = _whole(*(x @ part.T for part in _halves(across)))
        x = _whole(*(part @ x for part in _halves(down)))
        if self.preprocessing.resize == "pad":
            inside = inside_down[:, None] * inside_across
            x = x * inside + self.fill * (1.0 - inside)
        return (x / 255.0 - self.mean) / self.std

    def _weights(self, places: Tensor, shorter: Tensor, longer: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights, (size, length), of a side whose pixels are at `places`, and which outputs it fills."""
        size, length = self.preprocessing.size, places[-1] + 1
        outputs = torch.arange(size, dtype=torch.float64)
        inside = torch.ones(size)
        begin = torch.zeros((), dtype=torch.float64)
        if self.preprocessing.resize == "crop":
            part = torch.round(shorter / self.preprocessing.zoom).clamp_min(1.0)
            begin = torch.floor((length - part) / 2)
            scale = part / size
        elif self.preprocessing.resize == "pad":
            filled = torch.round(length * size / longer).clamp_min(1.0)
            outputs = outputs - torch.floor((size - filled) / 2)
            inside = ((outputs >= 0) & (outputs < filled)).float()
            scale = length / filled
        else:
            scale = length / size
        centres = begin + (outputs + 0.5) * scale
        weights = _bicubic((places - centres[:, None] + 0.5) / scale.clamp_min(1.0))
        total = weights.sum(dim=1, keepdim=True)
        return weights / torch.where(inside[:, None] > 0, total, 1.0), inside


def _bicubic(x: Tensor) -> Tensor:
    """Return Keys' cubic with a = −½ at `x`."""
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return torch.where(x < 1.0, near, torch.where(x < 2.0, far, 0.0))


def _halves(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return two float32 tensors whose sum is `weights`, float64, rounded to 22 binary places as Pillow has them.

    The first has 14 places, the second the other eight: sums of their products with 8-bit pixels have no more than 24
    bits (in the second, of up to 514 pixels), so that float32 has them exactly, in whatever order they are added.
    """
    rounded = torch.floor(weights * 2.0**22 + 0.5)
    high = torch.floor(rounded / 2.0**8 + 0.5)
    return (high / 2.0**14).float(), ((rounded - high * 2.0**8) / 2.0**22).float()


def _whole(high: Tensor, low: Tensor) -> Tensor:
    """Return high + low, exactly, rounded half up to whole numbers from 0 to 255."""
    floor = torch.floor(high + 0.5)
    return (floor + torch.floor(high + 0.5 - floor + low)).clamp(0.0, 255.0)


def _replace_scattering(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, ScatterNet):
            setattr(module, name, _RealScatterNet(child))
        else:
            _replace_scattering(child)


class _RealScatterNet(nn.Module):
    """`ScatterNet` in real numbers: a spectrum is a pair, its real and its imaginary part."""

    def __init__(self, net: ScatterNet) -> None:
        super().__init__()
        self.net = net
        self.scales = net.scales

    def forward(self, images: Tensor) -> Tensor:
        channels, side = images.shape[1], images.shape[-1]
        x = F.pad(images, [self.net.padding] * 4, mode="reflect").flatten(0, 1)
        spectrum = tuple(part[:, None] for part in _fft(x))
        averages = [self.net.average(x, 0)[:, None]]
        second: list[Tensor] = []
        for j1 in range(self.scales):
            u1 = self._modulus(spectrum, j1, 0)
            averages.append(self.net.average(u1, j1))
            if j1 + 1 < self.scales:
                spectrum1 = tuple(part[:, :, None] for part in _fft(u1))
                u2 = [
                    self.net.average(self._modulus(spectrum1, j2, j1), j2)
                    for j2 in range(j1 + 1, self.scales)
                ]
                second.append(torch.cat(u2, dim=2).flatten(1, 2))
        found = torch.cat(averages + second, dim=1)
        out = side >> self.scales
        return found.reshape(-1, channels * found.shape[1], out, out)

    def _modulus(self, spectrum: tuple[Tensor, ...], scale: int, level: int) -> Tensor:
        wavelet = self.net.get_buffer(f"psi_{scale}_{level}")
        real, imaginary = (_aliased(part * wavelet, 1 << (scale - level)) for part in spectrum)
        real, imaginary = _inverse_fft(real, imaginary)
        return (real * real + imaginary * imaginary).sqrt()


def _aliased(spectrum: Tensor, k: int) -> Tensor:
    """Return the spectrum, (…, s/k, s/k), of what has `spectrum`, (…, s, s), subsampled by k."""
    if k == 1:
        return spectrum
    side = spectrum.shape[-1] // k
    parts = [
        spectrum[..., row * side : (row + 1) * side, column * side : (column + 1) * side]
        for row in range(k)
        for column in range(k)
    ]
    return functools.reduce(torch.add, parts) / k**2


def _fft(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the real and the imaginary part of the two-dimensional transform of `x`, (…, s, s), real."""
    cosines, sines = _transform(x.shape[-1])
    real, imaginary = cosines @ x, -(sines @ x)
    return real @ cosines + imaginary @ sines, imaginary @ cosines - real @ sines


def _inverse_fft(real: Tensor, imaginary: Tensor) -> tuple[Tensor, Tensor]:
    """Return the real and the imaginary part of the inverse transform of a spectrum, each (…, s, s)."""
    side = real.shape[-1]
    cosines, sines = (part / side for part in _transform(side))
    a, b = cosines @ real - sines @ imaginary, cosines @ imaginary + sines @ real
    return a @ cosines - b @ sines, a @ sines + b @ cosines


def _transform(side: int) -> tuple[Tensor, Tensor]:
    """Return cos and sin of 2π·jk/side, each (side, side), symmetric."""
    angles = 2.0 * np.pi * (np.outer(np.arange(side), np.arange(side)) % side) / side
    return torch.from_numpy(np.cos(angles)).float(), torch.from_numpy(np.sin(angles)).float()
