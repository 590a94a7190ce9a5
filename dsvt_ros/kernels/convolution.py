"""Convolutions over BEV maps as matrix products, with everything that follows them up to the next one.

A map (B, H, W, C) lies in memory as rows of C float16 channels, one a cell, y after y, with one empty cell after each
row and one empty row after each map: `(batch * (H + 1) + y) * (W + 1) + x`. These cells are zero, so every tap of a
3 by 3 kernel is the same matrix shifted by a fixed number of rows; no border is a special case. Sums are float32.
Weights are (taps * channels in, channels out), taps by y, then x.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def convolve(
    x,  # descriptor of (rows, CIN), blocks [ROWS, CHUNK]
    weights,  # descriptor of (TAPS * TAPS * CIN, channels out), blocks [CHUNK, COLUMNS]
    bias,  # (channels out,) float32
    residual,  # descriptor like that of the output, added before the ReLU
    products,  # (voxels, PRODUCT_STRIDE) float16, likewise, where a cell has a voxel
    voxel_at,  # (rows,) int32: voxel in each cell, -1 for none
    output,  # descriptor of (rows, channels out), blocks [ROWS, COLUMNS]; or (B, CLASSES, H, W) float16
    height,
    width,
    num_rows,
    CIN: tl.constexpr,
    TAPS: tl.constexpr,  # 3 or 1 along an axis
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    PRODUCT_STRIDE: tl.constexpr,
    RESIDUAL: tl.constexpr,  # 0 none, 1 `residual`, 2 `products`
    RELU: tl.constexpr,
    CLASSES: tl.constexpr,  # 0 where the output is rows of cells
):
    """A 3 by 3 or 1 by 1 convolution of stride 1."""
    first = tl.program_id(0) * ROWS
    first_column = tl.program_id(1) * COLUMNS
    row_length = width + 1
    chunks: tl.constexpr = CIN // CHUNK
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in tl.range(TAPS * TAPS * chunks, num_stages=STAGES):
        tap = step // chunks
        shift = (tap // TAPS - TAPS // 2) * row_length + tap % TAPS - TAPS // 2
        a = x.load([first + shift, (step % chunks) * CHUNK])
        b = weights.load([step * CHUNK, first_column])
        sums = tl.dot(a, b, sums)
    row = first + tl.arange(0, ROWS)
    column = first_column + tl.arange(0, COLUMNS)
    sums += tl.load(bias + column)[None, :]
    inside = (row % row_length < width) & (row // row_length % (height + 1) < height) & (row < num_rows)
    if RESIDUAL == 1:
        sums += residual.load([first, first_column]).to(tl.float32)
    if RESIDUAL == 2:
        voxel = tl.load(voxel_at + row, mask=inside, other=-1)
        more = products + voxel[:, None] * PRODUCT_STRIDE + column[None, :]
        sums += tl.load(more, mask=(voxel >= 0)[:, None], other=0.0).to(tl.float32)
    if RELU:
        sums = tl.maximum(sums, 0.0)
    if CLASSES > 0:
        row_of_maps = row // row_length
        cloud, y, x_of_row = row_of_maps // (height + 1), row_of_maps % (height + 1), row % row_length
        cell = (cloud * CLASSES * height + y) * width + x_of_row
        target = output + cell[:, None] + column[None, :] * (height * width)
        tl.store(target, sums.to(tl.float16), mask=inside[:, None] & (column < CLASSES)[None, :])
    else:
        sums = tl.where(inside[:, None], sums, 0.0)
        output.store([first, first_column], sums.to(tl.float16))


@triton.jit
def convolve_strided(
    x,  # (rows in, CIN) float16
    weights,  # descriptor of (TAPS * TAPS * CIN, channels out), blocks [CHUNK, COLUMNS]
    bias,  # (channels out,) float32
    output,  # descriptor of (rows out, channels out), blocks [ROWS, COLUMNS]
    height,  # of the output
    width,
    height_in,
    width_in,
    num_rows,  # of the output
    CIN: tl.constexpr,
    TAPS: tl.constexpr,
    STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    RELU: tl.constexpr,
):
    """A convolution of a stride; one of 3 by 3 is padded by a cell, others are not."""
    first = tl.program_id(0) * ROWS
    first_column = tl.program_id(1) * COLUMNS
    row = first + tl.arange(0, ROWS)
    x_out = row % (width + 1)
    y_out = row // (width + 1) % (height + 1)
    batch = row // ((width + 1) * (height + 1))
    inside = (x_out < width) & (y_out < height) & (row < num_rows)
    row_in = (batch * (height_in + 1) + y_out * STRIDE) * (width_in + 1) + x_out * STRIDE
    chunks: tl.constexpr = CIN // CHUNK
    channel = tl.arange(0, CHUNK)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in tl.range(TAPS * TAPS * chunks, num_stages=STAGES):
        tap = step // chunks
        at = row_in + (tap // TAPS - (TAPS - 1) // 2) * (width_in + 1) + tap % TAPS - (TAPS - 1) // 2
        # Before the first row of the first map there is no padding in memory.
        source = x + at[:, None] * CIN + ((step % chunks) * CHUNK + channel)[None, :]
        a = tl.load(source, mask=(inside & (at >= 0))[:, None], other=0.0)
        b = weights.load([step * CHUNK, first_column])
        sums = tl.dot(a, b, sums)
    sums += tl.load(bias + first_column + tl.arange(0, COLUMNS))[None, :]
    if RELU:
        sums = tl.maximum(sums, 0.0)
    sums = tl.where(inside[:, None], sums, 0.0)
    output.store([first, first_column], sums.to(tl.float16))
