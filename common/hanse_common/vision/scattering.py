"""ScatterNet: wavelets, moduli and averages in place of learnt convolutions.

    net = ScatterNet(size=28, scales=2, angles=8)
    net(torch.zeros(5, 1, 28, 28)).shape    # (5, 81, 7, 7)

Nothing in it is learnt, so it costs no privacy, and small heads on it learn well under noise.

References
- Oyallon, Mallat: Deep roto-translation scattering for object classification. CVPR 2015.
- Bruna, Mallat: Invariant scattering convolution networks. PAMI 2013. Sections 2.1 (Morlet) and 2.2 (orders).
- Tramèr, Boneh: Differentially private learning needs better features (or much more data). ICLR 2021.
- Filter parameters, padding and subsampling are kymatio 0.3.0's, so that coefficients can be compared.
"""

import functools
import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

_PERIODS = 2
"""Filters are made periodic by adding this many copies on each side; more are below float32's resolution."""

_CPU_BLOCK = 8
"""Images transformed together on a CPU, so that intermediate values stay in its cache."""


class ScatterNet(nn.Module):
    """Scattering coefficients of orders 0, 1 and 2 of square images.

    For each channel 1 + JL + J(J−1)/2·L² coefficients, J being `scales` and L `angles`, in this order: x
    averaged; |x ∗ ψ_λ| averaged, for each scale, then angle; ||x ∗ ψ_λ| ∗ ψ_μ| averaged, for λ as before,
    then each μ of a larger scale. Averages are over 2^J pixels and subsampled as much.
    """

    def __init__(self, size: int, scales: int, angles: int) -> None:
        """Make the filters for images of `size` × `size` pixels.

        Raises `ValueError` when `size` is not a multiple of 2^`scales` that is at least twice it.
        """
        super().__init__()
        step = 2**scales
        if size % step or size < 2 * step:
            raise ValueError(f"size is {size}; expected a multiple of {step}, at least {2 * step}")
        self.scales = scales
        self.padding = step
        padded = size + 2 * step
        for j in range(scales):
            bank = np.stack([_morlet(padded, j, angle, angles) for angle in range(angles)])
            # A wavelet of scale j is applied to the image and to moduli of every smaller scale.
            for level in range(max(j, 1)):
                self._keep(f"psi_{j}_{level}", _crop(_crop(bank, level, -1), level, -2))
        for level in range(scales):
            self._keep(f"phi_{level}", _averaging(padded, scales, level))

    def _keep(self, name: str, values: NDArray[np.float64]) -> None:
        self.register_buffer(name, torch.from_numpy(values).float(), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the coefficients, (n, c·K, size/2^J, size/2^J), of float32 `images` (n, c, size, size)."""
        block = _CPU_BLOCK if images.device.type == "cpu" else max(1, images.shape[0] * images.shape[1])
        blocks = [self._coefficients(part) for part in torch.split(images.flatten(0, 1), block)]
        side = images.shape[-1] // 2**self.scales
        return torch.cat(blocks).reshape(len(images), -1, side, side)

    def _coefficients(self, images: Tensor) -> Tensor:
        """The coefficients, (n, K, size/2^J, size/2^J), of `images`, (n, size, size)."""
        x = F.pad(images, [self.padding] * 4, mode="reflect")
        spectrum = torch.fft.fft2(x)[:, None]
        averages = [self.average(x, 0)[:, None]]
        second: list[Tensor] = []
        for j1 in range(self.scales):
            u1 = self._modulus(spectrum, j1, 0)
            averages.append(self.average(u1, j1))
            larger = range(j1 + 1, self.scales)
            if larger:
                spectrum1 = torch.fft.fft2(u1)[:, :, None]
                u2 = [self.average(self._modulus(spectrum1, j2, j1), j2) for j2 in larger]
                second.append(torch.cat(u2, dim=2).flatten(1, 2))
        return torch.cat(averages + second, dim=1)

    def _modulus(self, spectrum: Tensor, scale: int, level: int) -> Tensor:
        """|x ∗ ψ| for all angles of `scale`, subsampled by 2^scale, of x given by its spectrum at `level`."""
        product = spectrum * self.get_buffer(f"psi_{scale}_{level}")
        k = 1 << (scale - level)
        if k > 1:
            # Subsampling in space is averaging the k² aliases in frequency. Added, because a mean
            # over two inner dimensions takes ten times as long.
            side = product.shape[-1] // k
            aliases = [
                product[..., row * side : (row + 1) * side, column * side : (column + 1) * side]
                for row in range(k)
                for column in range(k)
            ]
            product = functools.reduce(Tensor.add_, aliases[1:], aliases[0].clone()) / k**2
        modulus: Tensor = torch.fft.ifft2(product).abs()
        return modulus

    def average(self, x: Tensor, level: int) -> Tensor:
        """Return `x`, (…, side/2^level, side/2^level), averaged by φ and subsampled."""
        phi = self.get_buffer(f"phi_{level}")
        averages: Tensor = phi @ x @ phi.T
        return averages


def _grid(side: int) -> NDArray[np.float64]:
    return np.arange(-_PERIODS * side, (_PERIODS + 1) * side, dtype=np.float64)


def _periodic(values: NDArray[Any], side: int) -> NDArray[Any]:
    """Add up the periods of a function on `_grid` in each of its dimensions."""
    copies = 2 * _PERIODS + 1
    shape = (copies, side) * values.ndim
    summed: NDArray[Any] = values.reshape(shape).sum(axis=tuple(range(0, len(shape), 2)))
    return summed


def _morlet(side: int, scale: int, angle: int, angles: int) -> NDArray[np.float64]:
    """The spectrum, (side, side), of the Morlet wavelet ψ(u) = g(u)·(e^{iξ·u} − β), whose mean is zero.

    g is a Gaussian of deviation 0.8·2^j along ξ and L/4 times as much across it; |ξ| = 3π/4·2^−j.
    """
    sigma = 0.8 * 2.0**scale
    slant = 4.0 / angles
    theta = ((angles - 2) // 2 - angle) * math.pi / angles
    frequency = 0.75 * math.pi / 2.0**scale
    rows, columns = np.meshgrid(_grid(side), _grid(side), indexing="ij")
    along = rows * math.cos(theta) + columns * math.sin(theta)
    across = columns * math.cos(theta) - rows * math.sin(theta)
    gaussian = np.exp(-(along**2 + slant**2 * across**2) / (2 * sigma**2)) * slant / (2 * math.pi * sigma**2)
    envelope = _periodic(gaussian, side)
    wave = _periodic(gaussian * np.exp(1j * frequency * along), side)
    # A spectrum is real where the function at −u is the conjugate of that at u, as here.
    spectrum: NDArray[np.float64] = np.fft.fft2(wave - envelope * (wave.sum() / envelope.sum())).real
    return spectrum


def _crop(spectrum: NDArray[np.float64], level: int, axis: int) -> NDArray[np.float64]:
    """Keep the lowest 1/2^`level` of the frequencies along `axis`: an ideal low-pass before subsampling."""
    side = spectrum.shape[axis]
    half = side // 2 ** (level + 1)
    return np.take(spectrum, [*range(half), *range(side - half, side)], axis=axis)


def _averaging(side: int, scales: int, level: int) -> NDArray[np.float64]:
    """The matrix, (side/2^J − 2, side/2^level), that averages a line given at `level` by the Gaussian φ_J.

    φ is a product of two such averages, one for lines and one for columns; its deviation is 0.8·2^(J−1). The
    first and the last of the side/2^J averages belong to the padding and are left out.
    """
    sigma = 0.8 * 2.0 ** (scales - 1)
    gaussian = np.exp(-(_grid(side) ** 2) / (2 * sigma**2)) / (math.sqrt(2 * math.pi) * sigma)
    line = np.fft.ifft(_crop(np.fft.fft(_periodic(gaussian, side)).real, level, 0)).real
    step = 2 ** (scales - level)
    centres = np.arange(step, len(line) - step, step)
    matrix: NDArray[np.float64] = line[(centres[:, None] - np.arange(len(line))[None, :]) % len(line)]
    return matrix
