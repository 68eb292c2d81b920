from pathlib import Path

import numpy as np
import pytest
import torch

from hanse_common.vision.scattering import ScatterNet

# Coefficients that kymatio 0.3.0 (its torch frontend) computed for the images stored beside them.
KYMATIO = Path(__file__).parent / "kymatio_0_3_0.npz"


@pytest.fixture(scope="module")
def net() -> ScatterNet:
    return ScatterNet(size=28, scales=2, angles=8)


def images(n: int, size: int = 28, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 1, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("inputs", "outputs", "scales", "angles"), [("images", "j2_l8", 2, 8), ("images16", "j3_l4", 3, 4)]
)
def test_coefficients_are_those_of_kymatio(inputs: str, outputs: str, scales: int, angles: int) -> None:
    with np.load(KYMATIO) as reference:
        x, wanted = reference[inputs], reference[outputs]
    found = ScatterNet(x.shape[-1], scales, angles)(torch.from_numpy(x)[:, None]).numpy()
    # kymatio takes π as 3.1415 in its filters' scale, hence not closer.
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_shape_and_channels(net: ScatterNet) -> None:
    x = images(6).reshape(2, 3, 28, 28)
    together = net(x)
    assert together.shape == (2, 243, 7, 7)
    torch.testing.assert_close(together[1, 81:162], net(x[1:, 1:2])[0])


def test_batches_do_not_mix(net: ScatterNet) -> None:
    x = images(19)
    torch.testing.assert_close(net(x), torch.cat([net(one[None]) for one in x]), rtol=1e-4, atol=1e-6)


def test_a_constant_has_its_value_as_average_and_nothing_else(net: ScatterNet) -> None:
    # Wavelets have mean zero, and the average has mean one up to what its ideal low-pass leaves.
    coefficients = net(torch.full((1, 1, 28, 28), 0.7))[0]
    torch.testing.assert_close(coefficients[0], torch.full((7, 7), 0.7), rtol=1e-3, atol=0)
    assert coefficients[1:].abs().max() < 1e-5


def test_scattering_is_homogeneous(net: ScatterNet) -> None:
    x = images(3)
    torch.testing.assert_close(net(3 * x), 3 * net(x), rtol=1e-4, atol=1e-5)


def test_moduli_ignore_the_sign(net: ScatterNet) -> None:
    x = images(3)
    torch.testing.assert_close(net(-x)[:, 1:], net(x)[:, 1:], rtol=1e-4, atol=1e-6)


def test_energy_does_not_grow() -> None:
    # Bruna and Mallat 2013, section 2.2: nonexpansive where the Littlewood-Paley sum is at most 1.
    net = ScatterNet(size=32, scales=2, angles=8)
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(8, 1, 32, 32, generator=generator)
    coefficients = net(noise)
    # Subsampling by 4 in both directions keeps a sixteenth of the energy.
    assert (16 * coefficients.square().sum(dim=(1, 2, 3)) < noise.square().sum(dim=(1, 2, 3))).all()


def test_distances_do_not_grow(net: ScatterNet) -> None:
    x, y = images(8, seed=3), images(8, seed=4)
    before = (x - y).square().sum(dim=(1, 2, 3))
    after = 16 * (net(x) - net(y)).square().sum(dim=(1, 2, 3))
    assert (after < before).all()


def test_translation_by_the_grid_moves_coefficients() -> None:
    net = ScatterNet(size=64, scales=2, angles=8)
    x = torch.zeros(1, 1, 64, 64)
    x[..., 24:36, 24:36] = images(1, size=12)
    moved = torch.roll(x, shifts=(4, 8), dims=(2, 3))
    torch.testing.assert_close(
        net(moved), torch.roll(net(x), shifts=(1, 2), dims=(2, 3)), rtol=1e-3, atol=1e-5
    )


def test_small_translations_change_little() -> None:
    net = ScatterNet(size=64, scales=3, angles=8)
    x = torch.zeros(1, 1, 64, 64)
    x[..., 24:36, 24:36] = images(1, size=12)
    moved = torch.roll(x, shifts=1, dims=3)
    coefficients = net(x)
    change = (net(moved) - coefficients).norm() / coefficients.norm()
    assert change < 0.5 * (moved - x).norm() / x.norm()


def test_a_quarter_turn_permutes_angles() -> None:
    # θ and θ + π/2 are 4 of 8 angles apart.
    net = ScatterNet(size=64, scales=2, angles=8)
    x = torch.zeros(1, 1, 64, 64)
    x[..., 20:41, 20:41] = images(1, size=21)
    first = net(x)[0, 1:17].sum(dim=(-1, -2)).reshape(2, 8)
    turned = net(torch.rot90(x, 1, (2, 3)))[0, 1:17].sum(dim=(-1, -2)).reshape(2, 8)
    torch.testing.assert_close(turned, torch.roll(first, 4, dims=1), rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("size", [30, 4])
def test_sizes_that_do_not_divide_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match="multiple of 4"):
        ScatterNet(size, scales=2, angles=8)
