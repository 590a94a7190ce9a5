"""The convolution that takes voxels to a BEV map, whose rows are as in `convolution`."""

from __future__ import annotations

import triton
import triton.language as tl


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
