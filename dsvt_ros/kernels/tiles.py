"""Tiles of BEV maps, and which of them are near a voxel or the border; maps are as in `convolution`."""

from __future__ import annotations

import triton
import triton.language as tl

# Cells of a tile, along y and x.
TALL = tl.constexpr(8)
WIDE = tl.constexpr(16)
# Numbers of a list before its tiles: how many are near, and what fills 16 bytes up.
LIST_HEADER = tl.constexpr(4)


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
    listed,  # (radii, stride) int32: how many are near; from LIST_HEADER on these, and then the others
    stride,
    NUM_TILES: tl.constexpr,
    FIRST_RADIUS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """For each radius the tiles within it and, in reverse order, the others."""
    radius = FIRST_RADIUS + tl.program_id(0)
    listed += tl.program_id(0) * stride
    count = tl.program_id(0) * 0
    for first in range(0, NUM_TILES, BLOCK):
        tile = first + tl.arange(0, BLOCK)
        near = (tl.load(distance + tile, mask=tile < NUM_TILES, other=radius + 1) <= radius).to(tl.int32)
        before = count + tl.cumsum(near) - near
        place = tl.where(near > 0, before, NUM_TILES - 1 - (tile - before))
        tl.store(listed + LIST_HEADER + place, tile, mask=tile < NUM_TILES)
        count += tl.sum(near)
    tl.store(listed, count)
