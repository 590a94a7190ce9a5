"""Layer norms of sums of rows, by the quickest that a device has."""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-5
ROWS = 8
"""Rows of a block of threads, a warp each."""
LANES = 32
MAX_CHANNELS = 1024
"""Of a row that a warp holds in its registers."""

SOURCE = """
__device__ float2 floats(unsigned pair) {
    float2 value;
    asm("{ .reg .f16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high; }"
        : "=f"(value.x), "=f"(value.y) : "r"(pair));
    return value;
}

__device__ unsigned halves(float x, float y) {
    unsigned pair;
    asm("{ .reg .f16 low, high; cvt.rn.f16.f32 low, %1; cvt.rn.f16.f32 high, %2; mov.b32 %0, {low, high}; }"
        : "=r"(pair) : "f"(x), "f"(y));
    return pair;
}

__device__ float over_lanes(float value) {
    for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffff, value, distance);
    return value;
}

// Two channels of float16 are a pair. A row's other channels are in the registers of the warp's other threads.
extern "C" __global__ void norm_of_sum(
    const unsigned* x, const unsigned* other, int adds, const unsigned* weight, const unsigned* bias, unsigned* output,
    int rows
) {
    constexpr int pairs = CHANNELS / 2, steps = (pairs + 31) / 32;
    const int row = blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= rows) return;
    const long long first = (long long)row * pairs;
    float2 value[steps];
    float sum = 0;
    for (int step = 0; step < steps; ++step) {
        const int pair = step * 32 + threadIdx.x;
        value[step] = make_float2(0, 0);
        if (pair >= pairs) continue;
        const float2 a = floats(x[first + pair]), b = adds ? floats(other[first + pair]) : make_float2(0, 0);
        value[step] = make_float2(a.x + b.x, a.y + b.y);
        sum += value[step].x + value[step].y;
    }
    const float mean = over_lanes(sum) / CHANNELS;
    float squares = 0;
    for (int step = 0; step < steps; ++step) {
        if (step * 32 + threadIdx.x >= pairs) continue;
        const float dx = value[step].x - mean, dy = value[step].y - mean;
        squares += dx * dx + dy * dy;
    }
    const float scale = rsqrtf(over_lanes(squares) / CHANNELS + EPS);
    for (int step = 0; step < steps; ++step) {
        const int pair = step * 32 + threadIdx.x;
        if (pair >= pairs) continue;
        const float2 w = floats(weight[pair]), b = floats(bias[pair]);
        output[first + pair] = halves(
            (value[step].x - mean) * scale * w.x + b.x, (value[step].y - mean) * scale * w.y + b.y
        );
    }
}
"""
"""In CUDA C++, without a header: those of CUDA may be missing."""


class SumNorm(Protocol):
    """Layer norm of rows, or of the sum of two, over all channels."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor, other: Tensor | None = None) -> Tensor:
        """(V, D) float16 rows, to which `other` may be added, to new ones; `weight` and `bias` are (D,)."""
        ...


def library_norm(x: Tensor, weight: Tensor, bias: Tensor, other: Tensor | None = None) -> Tensor:
    """In operations of PyTorch; see `SumNorm`."""
    return F.layer_norm(x if other is None else x + other, x.shape[1:], weight, bias, EPS)


class CompiledNorm:
    """One kernel, which reads and writes every row once.

    PyTorch's own takes a block of threads a row, four times as long as the bytes need for rows of 192 channels.
    """

    def __init__(self, channels: int) -> None:
        """Compile for the current CUDA device.

        Raises:
            AttributeError: PyTorch compiles no kernels: it has done so since release 2.9.
            ImportError: It lacks a package that it compiles with, setuptools.
            OSError: It finds neither a CUDA toolkit nor the compiler.
            RuntimeError: It cannot compile this one.
        """
        options = [f"-DCHANNELS={channels}", f"-DEPS={EPS}f"]
        self._kernel: Any = torch.cuda._compile_kernel(SOURCE, "norm_of_sum", nvcc_options=options)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor, other: Tensor | None = None) -> Tensor:
        """See `SumNorm`."""
        adds, other = int(other is not None), x if other is None else other
        assert x.is_contiguous()
        assert other.is_contiguous()
        output = torch.empty_like(x)
        if len(x):
            arguments = [x, other, adds, weight, bias, output, len(x)]
            self._kernel((-(-len(x) // ROWS), 1, 1), (LANES, ROWS, 1), arguments)
        return output


@torch.inference_mode()
def sum_norm(device: torch.device, channels: int) -> SumNorm:
    """The quickest that works on a device for rows of so many channels."""
    if device.type != "cuda" or channels % 2 or channels > MAX_CHANNELS:
        return library_norm
    x, other = torch.randn(2, ROWS + 1, channels, device=device).half()
    weight, bias = torch.randn(2, channels, device=device).half()
    try:
        with torch.cuda.device(device):
            compiled = CompiledNorm(channels)
            found = compiled(x, weight, bias, other)
        works = torch.allclose(found, library_norm(x, weight, bias, other), rtol=1e-2, atol=1e-2)
    except (AttributeError, ImportError, OSError, RuntimeError):
        works = False
    return compiled if works else library_norm
