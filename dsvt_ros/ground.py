"""Where the ground is below a lidar whose height nobody has told.

All that decides about a point, a cell or a plane is exactly rounded, whole or taken from a table, so that the kernels
of `fused.ground` decide alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

NEAR_M, RING_M, NUM_RINGS = 2.0, 1.0, 18
NUM_SECTORS = 120
NUM_CELLS = NUM_RINGS * NUM_SECTORS
SECTORS_OF_OCTANT = NUM_SECTORS // 8
LOWEST_M, LAYER_M, NUM_LAYERS = -5.0, 0.1, 80
BELOW = 10
"""One in so many returns of a cell may lie below its ground."""
MAX_TILT_DEG = 4


@dataclass(frozen=True)
class GroundTables:
    """What is known before any cloud; float32.

    Attributes:
        rings: (NUM_RINGS + 1,) squared distances between which the rings lie.
        tangents: (SECTORS_OF_OCTANT - 1,) of the angles between the sectors of an octant, ascending.
        x: (NUM_CELLS,) of the centre of each cell, ``ring * NUM_SECTORS + sector``.
        y: (NUM_CELLS,)
        slopes: (P, 2) of the planes along x and y.
        weights: (P,) of a vote for each plane: of planes as good the most level one wins.
    """

    rings: Tensor
    tangents: Tensor
    x: Tensor
    y: Tensor
    slopes: Tensor
    weights: Tensor


@cache  # nothing is ever forgotten, as captured CUDA graphs read these tensors where they are
def ground_tables(device: torch.device) -> GroundTables:
    """The tables on a device; the host waits for it the first time."""
    with torch.inference_mode(False):
        sector_rad = 2 * math.pi / NUM_SECTORS
        rings = (NEAR_M + RING_M * torch.arange(NUM_RINGS + 1, dtype=torch.float64)) ** 2
        tangents = torch.tan(sector_rad * torch.arange(1, SECTORS_OF_OCTANT, dtype=torch.float64))
        distances = NEAR_M + RING_M * (torch.arange(NUM_RINGS, dtype=torch.float64) + 0.5)
        angles = sector_rad * (torch.arange(NUM_SECTORS, dtype=torch.float64) + 0.5)
        tilts_deg = torch.arange(-MAX_TILT_DEG, MAX_TILT_DEG + 1, dtype=torch.float64)
        tilts_deg = torch.cartesian_prod(tilts_deg, tilts_deg)
        tables = (
            rings,
            tangents,
            torch.outer(distances, torch.cos(angles)).flatten(),
            torch.outer(distances, torch.sin(angles)).flatten(),
            torch.tan(torch.deg2rad(tilts_deg)),
            1 - 0.01 * tilts_deg.abs().sum(1),
        )
        return GroundTables(*(table.to(device, torch.float32) for table in tables))


def ground_height(points: Tensor) -> Tensor:
    """Estimate the height of the ground at the origin of a cloud, m.

    From 2 to 20 m around the origin the plane is sought, level or sloping by up to 4 degrees along x and y, on which
    most cells of 1 m and 3 degrees have their lowest returns, give or take 0.1 m. A tenth of a cell's returns may lie
    below it: reflections do. Cells count alike, so nearby walls, hedges and vehicles weigh no more than the bare ground
    around them, however many returns they give; and a slope does not smear the ground over several heights.

    Meant for ground between 5 m below the origin and 3 m above it. Level ground is found within some centimetres;
    slopes, kerbs, bumps, and clouds that show one side only cost up to 0.2 m. Without ground in sight it is the
    height of whatever resembles it most, and nothing tells.

    Args:
        points: (N, C) float32 in a frame whose z axis is up to a few degrees. Rows that are not finite count for
            nothing.

    Returns:
        0-dimensional, on the device of the points, without waiting for it; 0 where no point is near. The same points
        give the same height in any order.
    """
    tables = ground_tables(points.device)
    low = _low_returns(points, tables)
    # At the origin, of planes through the cells.
    heights = low - tables.slopes[:, :1] * tables.x - tables.slopes[:, 1:] * tables.y
    layers, is_inside = _layers(heights)
    first = torch.arange(len(heights), device=low.device)[:, None] * NUM_LAYERS
    votes = low.new_zeros(len(heights) * NUM_LAYERS)
    votes = votes.index_add(0, (first + layers).flatten(), is_inside.to(low.dtype).flatten()).view(-1, NUM_LAYERS)
    # Two neighbouring layers, since the ground may straddle a boundary.
    votes = (votes[:, :-1] + votes[:, 1:]) * tables.weights[:, None]
    best = votes.argmax()
    boundary = (best % (NUM_LAYERS - 1) + 1) * LAYER_M + LOWEST_M
    # Indexing by `best` itself would wait for the device.
    heights = heights.index_select(0, (best // (NUM_LAYERS - 1)).view(1))
    is_ground = (heights - boundary).abs() <= LAYER_M
    return torch.where(is_ground, heights, 0.0).sum() / is_ground.sum().clamp_min(1)


def _layers(heights: Tensor) -> tuple[Tensor, Tensor]:
    """The horizontal layer that each height is in, and whether it is in one; the layer is 0 or the last if not."""
    layers = ((heights - LOWEST_M) * (1 / LAYER_M)).floor()
    is_inside = (layers >= 0) & (layers < NUM_LAYERS)
    return layers.nan_to_num().clamp(0, NUM_LAYERS - 1).long(), is_inside


def _low_returns(points: Tensor, tables: GroundTables) -> Tensor:
    """(NUM_CELLS,) heights of low returns around the origin, +inf in empty cells."""
    x, y, z = points[:, 0], points[:, 1], points[:, 2]
    rings = torch.bucketize(x * x + y * y, tables.rings, right=True) - 1
    layers, is_inside = _layers(z)
    is_inside &= (rings >= 0) & (rings < NUM_RINGS)
    cells = rings.clamp(0, NUM_RINGS - 1) * NUM_SECTORS + _sectors(x, y, tables.tangents)

    # Whole numbers and minima come out the same in whatever order a GPU takes the points.
    counts = torch.zeros(NUM_CELLS * NUM_LAYERS, dtype=torch.int32, device=z.device)
    counts = counts.index_add(0, cells * NUM_LAYERS + layers, is_inside.int()).view(NUM_CELLS, NUM_LAYERS)
    counts = counts.cumsum(1)
    lowest_layer = (BELOW * counts <= counts[:, -1:]).sum(1)
    is_inside &= layers >= lowest_layer[cells]
    heights = torch.where(is_inside, z, math.inf)
    return z.new_full((NUM_CELLS,), math.inf).scatter_reduce(0, cells, heights, "amin")


def _sectors(x: Tensor, y: Tensor, tangents: Tensor) -> Tensor:
    """Sector of each point, counter-clockwise from x. Octants mirror each other: who is on a border goes either way."""
    x_size, y_size = x.abs(), y.abs()
    ratio = torch.minimum(x_size, y_size) / torch.maximum(x_size, y_size)
    sectors = torch.bucketize(ratio, tangents, right=True)
    sectors = torch.where(y_size > x_size, 2 * SECTORS_OF_OCTANT - 1 - sectors, sectors)
    sectors = torch.where(x < 0, 4 * SECTORS_OF_OCTANT - 1 - sectors, sectors)
    return torch.where(y < 0, NUM_SECTORS - 1 - sectors, sectors)
