"""Tiles of maps, and which of them are near a voxel or the border."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dsvt_ros.fused.convolution import BevRows
from dsvt_ros.fused.extents import power_of_two

LIST_BLOCK = 2048
"""Tiles that a program looks at at once."""


def tiles_of(x: BevRows) -> tuple[int, int, int]:
    """(across, down, B): tiles of a map, with the cells around it, along x and y; and maps."""
    from dsvt_ros.kernels.tiles import TALL, WIDE

    across, down = -(-(x.width + 1) // WIDE.value), -(-(x.height + 1) // TALL.value)
    return across, down, x.rows.shape[0] // ((x.height + 1) * (x.width + 1))


def list_tiles(x: BevRows, voxel_at: Tensor, *, first_radius: int, reach: int) -> Tensor:
    """For each radius from the first to `reach` the tiles within it of a voxel or of what is beyond the map.

    Args:
        x: A map.
        voxel_at: (rows,) int32, the voxel in each of its cells, -1 for none.
        first_radius: In cells, like all others.
        reach: The last radius.

    Returns:
        (radii, stride) int32, a list a row: how many tiles are within the radius; from column `LIST_HEADER` on these,
        and then the others, backwards. A tile has the number ``(batch * down + y) * across + x``, see `tiles_of`.
    """
    from dsvt_ros.kernels import tiles as kernels

    grid = tiles_of(x)
    count, radii = math.prod(grid), reach + 1 - first_radius
    room = [power_of_two(extent.value + 2 * reach) for extent in (kernels.TALL, kernels.WIDE)]
    distance = voxel_at.new_empty(count)
    kernels.measure_tiles[grid](
        voxel_at, distance, x.height, x.width, REACH=reach, ROOM_TALL=room[0], ROOM_WIDE=room[1], num_warps=1
    )
    listed = voxel_at.new_empty(radii, _list_stride(count))
    kernels.list_tiles[(radii,)](
        distance, listed, listed.stride(0), NUM_TILES=count, FIRST_RADIUS=first_radius, BLOCK=LIST_BLOCK, num_warps=8
    )
    return listed


def every_tile(grid: tuple[int, int, int], lists: int, device: torch.device) -> Tensor:
    """(lists, stride) int32: so many lists, as from `list_tiles`, of all tiles of a `grid` as `tiles_of` gives it."""
    from dsvt_ros.kernels.tiles import LIST_HEADER

    count, first = math.prod(grid), LIST_HEADER.value
    listed = torch.zeros(lists, _list_stride(count), dtype=torch.int32, device=device)
    listed[:, 0] = count
    listed[:, first : first + count] = torch.arange(count, device=device)
    return listed


def _list_stride(count: int) -> int:
    """Room for a list of so many tiles, and as much more as lets the next one begin at a multiple of 16 bytes."""
    from dsvt_ros.kernels.tiles import LIST_HEADER

    return int(LIST_HEADER.value) + -(-count // 4) * 4
