"""Transposed convolutions over BEV maps, whose rows are as in `convolution`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def upsample(
    x,  # descriptor of (rows in, CIN), blocks [ROWS, CHUNK]
    weights,  # descriptor of (STRIDE * STRIDE * CIN, channels out), blocks [CHUNK, COLUMNS]
    bias,  # (channels out,) float32
    output,  # (rows out, OUTPUT_STRIDE) float16, from its first channel on
    height,  # of the input
    width,
    CIN: tl.constexpr,
    OUTPUT_STRIDE: tl.constexpr,
    STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A transposed convolution with kernels as wide as their stride, and ReLU: each cell becomes STRIDE by STRIDE.

    A program takes cells of one line to one of STRIDE lines, place after place along x; it reads for the next place
    while it writes.
    """
    below = tl.program_id(0) % STRIDE
    first_column = tl.program_id(0) // STRIDE * COLUMNS
    first = tl.program_id(1) * ROWS
    line = tl.program_id(2)
    y = line % (height + 1)
    # Of the padding, only one row and one column is there in the output.
    if (y == height) & (below > 0):
        return
    chunks: tl.constexpr = CIN // CHUNK
    cell = first + tl.arange(0, ROWS)
    column = first_column + tl.arange(0, COLUMNS)
    inside = (cell < width) & (y < height)
    line_out = line // (height + 1) * (height * STRIDE + 1) + y * STRIDE + below
    target = output + line_out * (width * STRIDE + 1) * OUTPUT_STRIDE
    target += cell[:, None] * (STRIDE * OUTPUT_STRIDE) + column[None, :]
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in tl.range(STRIDE * chunks, num_stages=STAGES):
        a = x.load([line * (width + 1) + first, step % chunks * CHUNK])
        b = weights.load([below * STRIDE * CIN + step * CHUNK, first_column])
        sums = tl.dot(a, b, sums)
        if step % chunks == chunks - 1:
            right = step // chunks
            result = tl.maximum(sums + tl.load(bias + column)[None, :], 0.0)
            result = tl.where(inside[:, None], result, 0.0)
            kept = (cell < width) | ((cell == width) & (right == 0))
            tl.store(target + right * OUTPUT_STRIDE, result.to(tl.float16), mask=kept[:, None])
            sums = tl.zeros((ROWS, COLUMNS), tl.float32)
