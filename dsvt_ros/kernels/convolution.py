"""Convolutions over BEV maps as matrix products, with everything that follows them up to the next one.

A map (B, H, W, C) lies in memory as rows of C float16 channels, one a cell, y after y, with one empty cell after each
row and one empty row after each map: `(batch * (H + 1) + y) * (W + 1) + x`. These cells are zero, so every tap of a
3 by 3 kernel is the same matrix shifted by a fixed number of rows; no border is a special case. Sums are float32.
Weights are (taps * channels in, channels out), taps by y, then x.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Cells of a tile, along y and x.
TALL = tl.constexpr(8)
WIDE = tl.constexpr(16)


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


@triton.jit
def index_cells(
    voxel_of_cell,  # (B W H,) int32, cells by batch, x, y
    voxel_at,  # (rows,) int32
    height,
    width,
    BLOCK: tl.constexpr,
):
    """The voxel in each cell of a map, in the order of its rows; -1 for none."""
    x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    batch = tl.program_id(2)
    inside = (x < width)[:, None] & (y < height)[None, :]
    voxel = tl.load(voxel_of_cell + (batch * width + x)[:, None] * height + y[None, :], mask=inside, other=-1)
    row = (batch * (height + 1) + y)[:, None] * (width + 1) + x[None, :]
    tl.store(voxel_at + row, tl.trans(voxel), mask=(y <= height)[:, None] & (x <= width)[None, :])


@triton.jit
def measure_tiles(
    voxel_at,  # (rows,) int32: voxel in each cell, -1 for none
    distance,  # (tiles,) int32
    height,
    width,
    REACH: tl.constexpr,
    ROOM_TALL: tl.constexpr,  # at least TALL and REACH around it
    ROOM_WIDE: tl.constexpr,
):
    """How far each tile is from the nearest cell with a voxel or beyond the map, in cells; up to REACH + 1."""
    corner_x, corner_y = tl.program_id(0) * WIDE, tl.program_id(1) * TALL
    x = corner_x - REACH + tl.arange(0, ROOM_WIDE)
    y = corner_y - REACH + tl.arange(0, ROOM_TALL)
    inside = ((y >= 0) & (y < height))[:, None] & ((x >= 0) & (x < width))[None, :]
    row = (tl.program_id(2) * (height + 1) + y)[:, None] * (width + 1) + x[None, :]
    voxel = tl.load(voxel_at + row, mask=inside, other=0)
    far_x = tl.maximum(corner_x - x, x - (corner_x + WIDE - 1))
    far_y = tl.maximum(corner_y - y, y - (corner_y + TALL - 1))
    far = tl.maximum(tl.maximum(far_y[:, None], far_x[None, :]), 0)
    nearest = tl.min(tl.min(tl.where(voxel >= 0, far, REACH + 1), 1), 0)
    tile = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    tl.store(distance + tile, tl.minimum(nearest, REACH + 1))


@triton.jit
def list_tiles(
    distance,  # (tiles,) int32
    listed,  # (radii, stride) int32
    stride,
    NUM_TILES: tl.constexpr,
    FIRST_RADIUS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """For each radius how many tiles are within it; then, from the fifth number on, first these and then the others."""
    radius = FIRST_RADIUS + tl.program_id(0)
    listed += tl.program_id(0) * stride
    count = tl.program_id(0) * 0
    for first in range(0, NUM_TILES, BLOCK):
        tile = first + tl.arange(0, BLOCK)
        near = (tl.load(distance + tile, mask=tile < NUM_TILES, other=radius + 1) <= radius).to(tl.int32)
        before = count + tl.cumsum(near) - near
        place = tl.where(near > 0, before, NUM_TILES - 1 - (tile - before))
        tl.store(listed + 4 + place, tile, mask=tile < NUM_TILES)
        count += tl.sum(near)
    tl.store(listed, count)


@triton.jit
def gather_taps(
    products,  # (voxels, PRODUCT_STRIDE) float16: tap after tap COLUMNS channels, from `multiply`
    voxel_at,  # (rows in,) int32: voxel in each cell, -1 for none
    bias,  # (COLUMNS,) float32
    output,  # (rows out, COLUMNS) float16
    height,  # of the output
    width,
    height_in,
    width_in,
    num_lines_in,  # of all maps, with the empty ones
    PRODUCT_STRIDE: tl.constexpr,
    STRIDE: tl.constexpr,
    CELLS: tl.constexpr,  # of a line that a program computes
    ROOM: tl.constexpr,  # at least (CELLS - 1) * STRIDE + 3
    COLUMNS: tl.constexpr,
):
    """A 3 by 3 convolution with ReLU over few voxels: each cell sums what the voxels around it add.

    A program goes along three lines at once; each voxel it meets adds to the cells left of it, at it and right of it.
    """
    line = tl.program_id(0)
    first = tl.program_id(1) * CELLS
    y = line % (height + 1)
    line_in = line // (height + 1) * (height_in + 1) + tl.minimum(y * STRIDE, height_in)
    # Above the first map it is as empty as below the last.
    above = voxel_at + tl.where(line_in > 0, line_in - 1, num_lines_in - 1) * (width_in + 1)
    level = voxel_at + line_in * (width_in + 1)
    below = voxel_at + tl.minimum(line_in + 1, num_lines_in - 1) * (width_in + 1)
    around = first * STRIDE - 1 + tl.arange(0, ROOM)
    read = (around >= 0) & (around < tl.minimum((first + CELLS - 1) * STRIDE + 2, width_in))
    near = tl.maximum(tl.load(above + around, mask=read, other=-1), tl.load(level + around, mask=read, other=-1))
    near = tl.maximum(near, tl.load(below + around, mask=read, other=-1))
    column = tl.arange(0, COLUMNS)
    nothing = tl.load(bias + column)
    target = output + line * (width + 1) * COLUMNS + column
    if (tl.max(near) < 0) | (y == height):
        cells = first + tl.arange(0, CELLS)
        alike = tl.where(((cells < width) & (y < height))[:, None], tl.maximum(nothing, 0.0)[None, :], 0.0)
        tl.store(target[None, :] + cells[:, None] * COLUMNS, alike.to(tl.float16), mask=(cells <= width)[:, None])
    else:
        now = nothing
        later = nothing
        for step in range(CELLS + 2):
            x = first - 1 + step
            done = now
            now = later
            later = nothing
            for right in tl.static_range(STRIDE):
                x_in = x * STRIDE + right
                x_in = tl.where((x_in >= 0) & (x_in < width_in), x_in, width_in)
                for y_in in tl.static_range(3):
                    voxel = tl.load((above if y_in == 0 else level if y_in == 1 else below) + x_in)
                    if voxel >= 0:
                        taps = products + voxel * PRODUCT_STRIDE + y_in * 3 * COLUMNS + column
                        if right == STRIDE - 1:
                            later += tl.load(taps).to(tl.float32)
                        if right == 0:
                            now += tl.load(taps + COLUMNS).to(tl.float32)
                        if STRIDE == 1:
                            done += tl.load(taps + 2 * COLUMNS).to(tl.float32)
                        elif right == 1:
                            now += tl.load(taps + 2 * COLUMNS).to(tl.float32)
            # What is done is the cell before.
            done = tl.where(x <= width, tl.maximum(done, 0.0), 0.0)
            if (x > first) & (x <= width + 1):
                tl.store(target + (x - 1) * COLUMNS, done.to(tl.float16))


@triton.jit
def sum_taps(
    products,  # (tiles, 9 * CLASSES, TALL * WIDE) float32: what each cell of a tile has for its neighbours, by taps
    bias,  # (CLASSES,) float32
    output,  # (B, CLASSES, H, W) float16
    height,
    width,
    CLASSES: tl.constexpr,
    ROOM: tl.constexpr,  # at least CLASSES
):
    """The rest of a 3 by 3 convolution to few channels: each cell sums what the cells around it have for it."""
    across = tl.cdiv(width + 1, WIDE)
    down = tl.cdiv(height + 1, TALL)
    tile = tl.program_id(0)
    batch = tile // (across * down)
    cell = tl.arange(0, TALL * WIDE)
    y = tile // across % down * TALL + cell // WIDE
    x = tile % across * WIDE + cell % WIDE
    number = tl.arange(0, ROOM)
    real = (number < CLASSES)[:, None]
    sums = tl.load(bias + number, mask=number < CLASSES, other=0.0)[:, None] + tl.zeros((ROOM, TALL * WIDE), tl.float32)
    for tap in tl.static_range(9):
        from_y, from_x = y + tap // 3 - 1, x + tap % 3 - 1
        inside = (from_y >= 0) & (from_y < height) & (from_x >= 0) & (from_x < width)
        tile_of = (batch * down + from_y // TALL) * across + from_x // WIDE
        place = tile_of * (9 * CLASSES * TALL * WIDE) + from_y % TALL * WIDE + from_x % WIDE
        row = (tap * CLASSES + number) * (TALL * WIDE)
        sums += tl.load(products + place[None, :] + row[:, None], mask=real & inside[None, :], other=0.0)
    target = output + ((batch * CLASSES + number[:, None]) * height + y[None, :]) * width + x[None, :]
    tl.store(target, sums.to(tl.float16), mask=real & ((y < height) & (x < width))[None, :])
