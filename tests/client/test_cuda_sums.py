"""The kernels for clipped sums: norms in one order whatever the rows, and sums that are exact integers."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hanse_client import cuda_sums
from hanse_client.gradients import ClippedSum

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

WIDTHS = [16, 1024, 16384, 16400, 100_016]


def kernels() -> cuda_sums.CudaSums:
    found = cuda_sums.load(torch.device("cuda:0"))
    assert found is not None
    return found


def numbers(rows: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(width)
    sizes = 10.0 ** torch.linspace(-20, 18, rows)
    return torch.randn(rows, width, generator=generator) * sizes[:, None]


@pytest.mark.parametrize("width", WIDTHS)
def test_norms_are_those_of_float64(width: int) -> None:
    rows = numbers(9, width)
    expected = np.linalg.norm(rows.double().numpy(), axis=1)
    np.testing.assert_allclose(kernels().norms(rows.cuda()).cpu().numpy(), expected, rtol=1e-13)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_norms_bits_depend_on_its_own_row_alone(width: int) -> None:
    rows = numbers(50, width).cuda()
    whole = kernels().norms(rows)
    order = torch.randperm(50).cuda()
    assert torch.equal(kernels().norms(rows[order]), whole[order])
    for count in (1, 2, 33):
        assert torch.equal(kernels().norms(rows[:count]), whole[:count])


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("count", [1, 3, 130])
def test_sums_are_those_of_numpys_integers(width: int, count: int) -> None:
    rows = numbers(count, width)
    rows[count // 2, 5] = torch.nan
    lengths = rows.nan_to_num(0.0).norm(dim=1) * 2.0**-45  # quotients up to 2⁴⁵
    divisors = torch.where(torch.arange(count) == count // 2, 0.0, lengths)
    total = torch.arange(width, dtype=torch.int64).cuda()
    kernels().add(total, rows.cuda(), divisors.cuda())
    used = divisors.numpy() != 0
    quotients = rows.numpy()[used] / divisors.numpy()[used, None]
    assert quotients.dtype == np.float32
    expected = np.trunc(quotients).astype(np.int64).sum(axis=0) + np.arange(width)
    np.testing.assert_array_equal(total.cpu().numpy(), expected)


def clipped_sum(inputs: Tensor, targets: Tensor) -> NDArray[np.int64]:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(40, 70), nn.Tanh(), nn.Linear(70, 5)).cuda()
    with ClippedSum(model, 0.7, -34, microbatch=64) as clipped:
        return clipped.sum(inputs, targets)


def test_where_they_cannot_be_built_torch_gives_the_same_sums(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("no NVRTC")

    torch.manual_seed(1)
    inputs, targets = 3 * torch.randn(150, 40).cuda(), torch.randint(0, 5, (150,)).cuda()
    inputs[7] = torch.inf
    expected = clipped_sum(inputs, targets)
    monkeypatch.setattr(torch.cuda, "_compile_kernel", fails)
    cuda_sums.load.cache_clear()
    try:
        found = clipped_sum(inputs, targets)
    finally:
        cuda_sums.load.cache_clear()
    assert "cannot be built (no NVRTC)" in caplog.text
    # Norms may differ in float64's last bits, and so a divisor in float32's.
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
