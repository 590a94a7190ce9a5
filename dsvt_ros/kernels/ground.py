"""The height of the ground as in `dsvt_ros.ground`: every return, cell and plane is decided on with the same numbers.

`count_returns` counts the returns of each cell by layers and keeps the lowest one of each layer, `find_low_returns`
picks one of these a cell, `vote` finds where each plane has most cells, and `place_on_ground` takes the best plane.
Axis 1 of each grid is the cloud; programs of a cloud whose ground nobody wants return at once.

Atomic operations add whole numbers and take minima of whole numbers, whose order cannot matter.
"""

from __future__ import annotations

import triton
import triton.language as tl

NO_RETURN: tl.constexpr = tl.constexpr(2**31 - 1)  # above the key of any number


@triton.jit
def count_returns(
    points,  # (N, COLUMNS) float32
    ends,  # (B,) row after each cloud's last point
    seeks,  # (B,) int32: 0 for clouds whose ground nobody wants
    rings,  # (RINGS + 1,) float32: squared distances
    tangents,  # (OCTANT - 1,) float32
    counts,  # (B, CELLS, LAYERS) int32
    lowest,  # (B, CELLS, LAYERS) int32: key of the lowest return
    num_rows,
    min_squared_range,
    COLUMNS: tl.constexpr,
    RINGS: tl.constexpr,
    OCTANT: tl.constexpr,  # sectors of an octant
    BOTTOM: tl.constexpr,
    LAYER: tl.constexpr,
    LAYERS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Count each return in its cell and layer."""
    cloud = tl.program_id(1)
    if tl.load(seeks + cloud) == 0:
        return
    begin = tl.load(ends + cloud - 1, mask=cloud > 0, other=0)
    end = tl.minimum(tl.load(ends + cloud), num_rows)
    begin += tl.program_id(0) * ROWS
    if begin >= end:
        return
    row = begin + tl.arange(0, ROWS)
    at = row * COLUMNS
    x = tl.load(points + at, mask=row < end, other=0.0)
    y = tl.load(points + at + 1, mask=row < end, other=0.0)
    z = tl.load(points + at + 2, mask=row < end, other=0.0)

    # Coordinates that are not finite lie in no ring or no layer.
    squared = x * x + y * y
    ring = tl.full((ROWS,), -1, tl.int32)
    for border in tl.static_range(RINGS + 1):
        ring += (squared >= tl.load(rings + border)).to(tl.int32)
    layer, inside = _layer(z, BOTTOM, LAYER, LAYERS)
    inside &= (row < end) & (ring >= 0) & (ring < RINGS) & (squared + z * z >= min_squared_range)

    x_size, y_size = tl.abs(x), tl.abs(y)
    ratio = tl.div_rn(tl.minimum(x_size, y_size), tl.maximum(x_size, y_size))
    sector = tl.zeros((ROWS,), tl.int32)
    for border in tl.static_range(OCTANT - 1):
        sector += (ratio >= tl.load(tangents + border)).to(tl.int32)
    sector = tl.where(y_size > x_size, 2 * OCTANT - 1 - sector, sector)
    sector = tl.where(x < 0, 4 * OCTANT - 1 - sector, sector)
    sector = tl.where(y < 0, 8 * OCTANT - 1 - sector, sector)

    cell = (cloud * RINGS + ring) * (8 * OCTANT) + sector
    tl.atomic_add(counts + cell * LAYERS + layer, 1, mask=inside, sem="relaxed")
    tl.atomic_min(lowest + cell * LAYERS + layer, _key(z), mask=inside, sem="relaxed")


@triton.jit
def find_low_returns(
    counts,  # becomes zero
    lowest,  # becomes `NO_RETURN`
    seeks,
    low,  # (B, CELLS) float32: height of a low return, +inf in empty cells
    CELLS: tl.constexpr,
    LAYERS: tl.constexpr,
    PADDED_LAYERS: tl.constexpr,
    BELOW: tl.constexpr,
    BLOCK: tl.constexpr,  # cells of a program
):
    """The lowest return of the layer in which a cell's returns become more than one in BELOW."""
    cloud = tl.program_id(1)
    if tl.load(seeks + cloud) == 0:
        return
    cell = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    layer = tl.arange(0, PADDED_LAYERS)[None, :]
    at = (cloud * CELLS + cell)[:, None] * LAYERS + layer
    valid = (cell < CELLS)[:, None] & (layer < LAYERS)
    count = tl.load(counts + at, mask=valid, other=0)
    occupied = count > 0
    key = tl.load(lowest + at, mask=occupied, other=NO_RETURN)
    tl.store(counts + at, tl.zeros_like(count), mask=occupied)
    tl.store(lowest + at, tl.full(key.shape, NO_RETURN, tl.int32), mask=occupied)

    total = tl.sum(count, 1)
    chosen = tl.sum((BELOW * tl.cumsum(count, 1) <= total[:, None]).to(tl.int32), 1)
    key = tl.min(tl.where(layer == chosen[:, None], key, NO_RETURN), 1)
    height = tl.where(total > 0, _height(key), float("inf"))
    tl.store(low + cloud * CELLS + cell, height, mask=cell < CELLS)


@triton.jit
def vote(
    low,
    seeks,
    x_of_cell,  # (CELLS,) float32
    y_of_cell,
    slopes,  # (P, 2) float32
    weights,  # (P,) float32
    scores,  # (B, P) float32
    borders,  # (B, P) int32: the border between two layers of which that is the score
    num_planes,
    CELLS: tl.constexpr,
    PADDED_CELLS: tl.constexpr,
    BOTTOM: tl.constexpr,
    LAYER: tl.constexpr,
    LAYERS: tl.constexpr,
    PADDED_LAYERS: tl.constexpr,
):
    """Where one plane has most cells within a layer of it."""
    plane, cloud = tl.program_id(0), tl.program_id(1)
    if tl.load(seeks + cloud) == 0:
        return
    height = _heights_at_origin(low + cloud * CELLS, x_of_cell, y_of_cell, slopes, plane, CELLS, PADDED_CELLS)
    layer, inside = _layer(height, BOTTOM, LAYER, LAYERS)
    # Border b lies above layer b - 1 and below layer b, which both count for it.
    votes = tl.histogram(layer, PADDED_LAYERS, mask=inside)
    votes += tl.histogram(layer + 1, PADDED_LAYERS, mask=inside)
    border = tl.arange(0, PADDED_LAYERS)
    score = votes.to(tl.float32) * tl.load(weights + plane)
    score = tl.where((border > 0) & (border < LAYERS), score, -1.0)
    best, where = tl.max(score, 0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(scores + cloud * num_planes + plane, best)
    tl.store(borders + cloud * num_planes + plane, where)


@triton.jit
def place_on_ground(
    low,
    seeks,
    x_of_cell,
    y_of_cell,
    slopes,
    scores,
    borders,
    poses,  # (B, 3, 4) float32: the height becomes that at which the ground is at `ground_z`
    ground_z,
    num_planes,
    PADDED_PLANES: tl.constexpr,
    CELLS: tl.constexpr,
    PADDED_CELLS: tl.constexpr,
    BOTTOM: tl.constexpr,
    LAYER: tl.constexpr,
):
    """The mean height of the cells on the best plane, of equals the first."""
    cloud = tl.program_id(1)
    if tl.load(seeks + cloud) == 0:
        return
    plane = tl.arange(0, PADDED_PLANES)
    score = tl.load(scores + cloud * num_planes + plane, mask=plane < num_planes, other=-1.0)
    _, best = tl.max(score, 0, return_indices=True, return_indices_tie_break_left=True)
    border = tl.load(borders + cloud * num_planes + best).to(tl.float32) * LAYER + BOTTOM
    height = _heights_at_origin(low + cloud * CELLS, x_of_cell, y_of_cell, slopes, best, CELLS, PADDED_CELLS)
    is_ground = tl.abs(height - border) <= LAYER
    count = tl.sum(is_ground.to(tl.int32), 0)
    total = tl.sum(tl.where(is_ground, height, 0.0), 0)
    ground = tl.div_rn(total, tl.maximum(count, 1).to(tl.float32))
    tl.store(poses + cloud * 12 + 11, ground_z - ground)


@triton.jit
def _heights_at_origin(
    low, x_of_cell, y_of_cell, slopes, plane, CELLS: tl.constexpr, PADDED_CELLS: tl.constexpr
):  # fmt: skip
    """(PADDED_CELLS,) heights at the origin of planes that slope like one and go through the cells."""
    cell = tl.arange(0, PADDED_CELLS)
    height = tl.load(low + cell, mask=cell < CELLS, other=float("inf"))
    x = tl.load(x_of_cell + cell, mask=cell < CELLS, other=0.0)
    y = tl.load(y_of_cell + cell, mask=cell < CELLS, other=0.0)
    return height - tl.load(slopes + plane * 2) * x - tl.load(slopes + plane * 2 + 1) * y


@triton.jit
def _layer(height, BOTTOM: tl.constexpr, LAYER: tl.constexpr, LAYERS: tl.constexpr):
    """The layer that each height is in, and whether it is in one; 0 if not."""
    layer = tl.floor((height - BOTTOM) * (1 / LAYER))
    inside = (layer >= 0) & (layer < LAYERS)
    return tl.where(inside, layer, 0.0).to(tl.int32), inside


@triton.jit
def _key(height):
    """Whole numbers in the order of the heights."""
    bits = height.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _height(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
