"""The two passes over a GPU's per-example gradients: their norms, and their clipped sum, each reading them once.

    kernels = load(gradients.device)                       # None where they cannot be built
    norms = kernels.norms(gradients)                       # (n,) float64
    kernels.add(total, gradients, divisors)                # total += Σ trunc(gradient / divisor)

torch's own operations do the same (`gradients`), but widen float32 to float64 in memory before they add: some 80 bytes
a number instead of 8. A row's norm is added up here in one fixed order, whatever its place and however many rows there
are, which is what the sensitivity argument in `gradients` asks for.

NVRTC, which comes with torch, compiles the kernels when they are first used, in a tenth of a second.

Reference: NVIDIA, "CUDA C++ Programming Guide", mathematical functions (`__fdiv_rn` is IEEE division).
"""

import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

ALIGNMENT = 4
"""Widths and strides are multiples of it: a thread reads so many numbers at once."""

_THREADS = 256
_COLUMNS = 1 << 14  # of one partial sum of squares

_SOURCE = """
extern "C" __global__ void squares(const float* numbers, double* sums, int width, int stride, int columns)
{
    const float4* row = (const float4*)(numbers + (long long)blockIdx.y * stride);
    int begin = blockIdx.x * columns / 4;
    int end = min(begin + columns / 4, width / 4);
    double sum = 0.0;
    for (int i = begin + threadIdx.x; i < end; i += blockDim.x) {
        float4 x = row[i];
        sum += (double)x.x * x.x + (double)x.y * x.y + (double)x.z * x.z + (double)x.w * x.w;
    }
    __shared__ double part[THREADS];
    part[threadIdx.x] = sum;
    for (int half = THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) part[threadIdx.x] += part[threadIdx.x + half];
    }
    if (threadIdx.x == 0) sums[(long long)blockIdx.y * gridDim.x + blockIdx.x] = part[0];
}

extern "C" __global__ void norms(const double* sums, double* found, int blocks)
{
    const double* row = sums + (long long)blockIdx.x * blocks;
    double sum = 0.0;
    for (int i = threadIdx.x; i < blocks; i += blockDim.x) sum += row[i];
    __shared__ double part[THREADS];
    part[threadIdx.x] = sum;
    for (int half = THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) part[threadIdx.x] += part[threadIdx.x + half];
    }
    if (threadIdx.x == 0) found[blockIdx.x] = sqrt(part[0]);
}

extern "C" __global__ void add(
    long long* total, const float* numbers, const float* divisors, int rows, int width, int stride)
{
    long long column = 4LL * (blockIdx.x * (long long)blockDim.x + threadIdx.x);
    if (column >= width) return;
    long long a = 0, b = 0, c = 0, d = 0;
    #pragma unroll 4
    for (int r = 0; r < rows; r++) {
        float divisor = divisors[r];
        float4 x = *(const float4*)(numbers + (long long)r * stride + column);
        if (divisor != 0.0f) {
            a += __float2ll_rz(__fdiv_rn(x.x, divisor));
            b += __float2ll_rz(__fdiv_rn(x.y, divisor));
            c += __float2ll_rz(__fdiv_rn(x.z, divisor));
            d += __float2ll_rz(__fdiv_rn(x.w, divisor));
        }
    }
    total[column] += a;
    total[column + 1] += b;
    total[column + 2] += c;
    total[column + 3] += d;
}
""".replace("THREADS", str(_THREADS))


class CudaSums:
    """The kernels, on one device. Gradients are float32, (n, width), rows aligned and a multiple of `ALIGNMENT` wide.

    Raises what torch raises where NVRTC or the driver does not take them.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # Private in torch, and pinned with it.
        build: Callable[..., Any] = torch.cuda._compile_kernel
        with torch.cuda.device(device):
            self._squares, self._norms, self._add = (
                build(_SOURCE, name) for name in ("squares", "norms", "add")
            )

    def norms(self, gradients: Tensor) -> Tensor:
        """Return each row's Euclidean norm, shape (n,), float64."""
        count, width = gradients.shape
        blocks = -(-width // _COLUMNS)
        sums = torch.empty((count, blocks), dtype=torch.float64, device=self._device)
        found = torch.empty(count, dtype=torch.float64, device=self._device)
        with torch.cuda.device(self._device):
            grid, block = (blocks, count, 1), (_THREADS, 1, 1)
            self._squares(grid, block, [gradients, sums, width, gradients.stride(0), _COLUMNS])
            self._norms((count, 1, 1), block, [sums, found, blocks])
        return found

    def add(self, total: Tensor, gradients: Tensor, divisors: Tensor) -> None:
        """Add each row over its divisor, cut towards zero, to `total`.

        Args:
            total: shape (width,), int64, contiguous.
            gradients: shape (n, width); finite where the divisor is not zero.
            divisors: shape (n,), float32; a row whose divisor is zero is left out. No quotient is beyond 2⁶².
        """
        count, width = gradients.shape
        blocks = -(-width // (ALIGNMENT * _THREADS))
        with torch.cuda.device(self._device):
            arguments = [total, gradients, divisors, count, width, gradients.stride(0)]
            self._add((blocks, 1, 1), (_THREADS, 1, 1), arguments)


@lru_cache
def load(device: torch.device) -> CudaSums | None:
    """Return the kernels for `device`, or None where they cannot be built, and torch's operations must do."""
    try:
        return CudaSums(device)
    except (AttributeError, RuntimeError, OSError) as error:
        log.warning("%s: the kernels for clipped sums cannot be built (%s); sums are slower.", device, error)
        return None
