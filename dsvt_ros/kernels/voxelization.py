"""Points to voxels without sorting: each point takes a number in its cell, then the occupied cells are numbered.

Where a point comes among those of its cell is left to the order of atomic additions; all that is counted is not.
`points_in_cell` and `totals` are zero before the first kernel and after the last one. Letters as in `fused.structures`;
cells are numbered as described there, and dealt out to blocks of BLOCK cells. A column is all the cells above each
other, ``(batch * nx + x) * ny + y``.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Rows of `block_sums`, and entries of `totals`.
CELLS: tl.constexpr = tl.constexpr(0)  # occupied cells; in `block_sums` those that are kept
SEGMENTS: tl.constexpr = tl.constexpr(1)  # segments of their points
POINTS: tl.constexpr = tl.constexpr(1)  # points inside the range


@triton.jit
def place_points(
    raw,  # (N, C) float32 as received
    ends,  # (B,) row after each cloud's last point
    pose,  # (B, 3, 4) float32
    limits,  # (2, 3) float32: the range's minimum and the extent of a cell
    fill,  # (C,) float32
    points,  # (N, C) float32: only those inside the range are written
    cell_of_point,  # (N,) int32: -1 for points that are no returns or outside the range
    rank_of_point,  # (N,) int32 among the points of its cell
    points_in_cell,  # (cells,) int32
    totals,  # (2,) int32
    num_rows,
    min_squared_range,
    intensity_scale,
    CLOUDS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INTENSITY: tl.constexpr,  # column; -1 if there is none
    TANH: tl.constexpr,  # a bit for each column that takes it
    NX: tl.constexpr,
    NY: tl.constexpr,
    NZ: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Move and scale the points, and let each take a number in its cell."""
    total = tl.minimum(tl.load(ends + CLOUDS - 1), num_rows)
    if tl.program_id(0) * ROWS >= total:
        return
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < total
    at = row * COLUMNS
    x = tl.load(raw + at, mask=inside, other=0.0)
    y = tl.load(raw + at + 1, mask=inside, other=0.0)
    z = tl.load(raw + at + 2, mask=inside, other=0.0)
    inside &= _is_finite(x) & _is_finite(y) & _is_finite(z) & (x * x + y * y + z * z >= min_squared_range)

    cloud = tl.zeros((ROWS,), tl.int32)
    for b in tl.static_range(CLOUDS - 1):
        cloud += (row >= tl.load(ends + b)).to(tl.int32)
    cell = cloud
    moved = ()
    for axis in tl.static_range(3):
        pose_row = pose + cloud * 12 + axis * 4
        value = x * tl.load(pose_row) + y * tl.load(pose_row + 1) + z * tl.load(pose_row + 2) + tl.load(pose_row + 3)
        value = _scaled(value, axis, intensity_scale, INTENSITY, TANH)
        moved = moved + (value,)
        # The same operations as in `voxelization`, so that points at the border of a cell fall into the same one.
        index = tl.floor(tl.div_rn(value - tl.load(limits + axis), tl.load(limits + 3 + axis)))
        size = (NX, NY, NZ)[axis]
        inside &= (index >= 0) & (index < size)
        cell = cell * size + tl.where(inside, index, 0.0).to(tl.int32)

    for column in tl.static_range(COLUMNS):
        if column < 3:
            value = moved[column]
        else:
            value = tl.load(raw + at + column, mask=inside, other=0.0)
            value = tl.where(_is_finite(value), value, tl.load(fill + column))
            value = _scaled(value, column, intensity_scale, INTENSITY, TANH)
        tl.store(points + at + column, value, mask=inside)

    rank = tl.atomic_add(points_in_cell + cell, 1, mask=inside, sem="relaxed")
    opens_cell = inside & (rank == 0)
    tl.atomic_add(totals + CELLS, tl.sum(opens_cell.to(tl.int32), 0), sem="relaxed")
    tl.atomic_add(totals + POINTS, tl.sum(inside.to(tl.int32), 0), sem="relaxed")
    tl.store(cell_of_point + row, tl.where(inside, cell, -1), mask=row < total)
    tl.store(rank_of_point + row, rank, mask=inside)


@triton.jit
def count_columns(
    points_in_cell,
    totals,
    column_at,  # (columns,) int32, by distance
    occupied,  # (columns,) int32 in that order: occupied cells
    column_sums,  # (blocks of columns,) int32: the same for COLUMNS columns
    room,  # V
    num_columns,
    NZ: tl.constexpr,
    PADDED_NZ: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """If there are more voxels than room: how many lie in each column, the nearest first."""
    if tl.load(totals + CELLS) <= room:
        return
    position = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    column = tl.load(column_at + position, mask=position < num_columns, other=0)
    z = tl.arange(0, PADDED_NZ)
    valid = (position < num_columns)[:, None] & (z < NZ)[None, :]
    count = tl.load(points_in_cell + column[:, None] * NZ + z[None, :], mask=valid, other=0)
    number = tl.sum((count != 0).to(tl.int32), 1)
    tl.store(occupied + position, number, mask=position < num_columns)
    tl.store(column_sums + tl.program_id(0), tl.sum(number, 0))


@triton.jit
def count_blocks(
    points_in_cell,  # of dropped cells: becomes negative
    block_sums,  # (2, blocks) int32
    totals,
    column_at,
    position_of_column,  # the inverse of `column_at`
    occupied,
    column_sums,
    room,
    num_columns,
    num_cells,
    NZ: tl.constexpr,
    PADDED_NZ: tl.constexpr,
    COLUMNS: tl.constexpr,
    COLUMN_BLOCKS: tl.constexpr,  # padded
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    SEGMENT: tl.constexpr,  # points of a segment
):
    """Count what is kept in each block of cells: if there are more voxels than room, the nearest, of equals by cell."""
    cell = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    count = tl.load(points_in_cell + cell, mask=cell < num_cells, other=0)
    if tl.load(totals + CELLS) > room:
        # Find the first cell in this order that has no place: its block of columns, its column, its z.
        block = tl.arange(0, COLUMN_BLOCKS)
        number = tl.load(column_sums + block, mask=block < tl.cdiv(num_columns, COLUMNS), other=0)
        first, left = _whole(number, room)
        position = first * COLUMNS + tl.arange(0, COLUMNS)
        number = tl.load(occupied + position, mask=position < num_columns, other=0)
        whole, left = _whole(number, left)
        cut = first * COLUMNS + whole
        z = tl.arange(0, PADDED_NZ)
        # Others may be negating these counts just now; zero stays zero.
        in_column = tl.load(points_in_cell + tl.load(column_at + cut) * NZ + z, mask=z < NZ, other=0)
        below, left = _whole((in_column != 0).to(tl.int32), left)
        cut = cut * NZ + below

        column_position = tl.load(position_of_column + cell // NZ, mask=count != 0, other=0)
        is_kept = column_position * NZ + cell % NZ < cut
        tl.store(points_in_cell + cell, -count, mask=(count != 0) & ~is_kept)
        count = tl.where(is_kept, count, 0)
    sums = block_sums + tl.program_id(0)
    tl.store(sums + CELLS * BLOCKS, tl.sum((count != 0).to(tl.int32), 0))
    tl.store(sums + SEGMENTS * BLOCKS, tl.sum(tl.cdiv(count, SEGMENT), 0))


@triton.jit
def _whole(number, room):
    """How many leading entries of `number` fit into the room together, and what room they leave."""
    upto = tl.cumsum(number, 0)
    fits = upto <= room
    return tl.sum(fits.to(tl.int32), 0), room - tl.max(tl.where(fits, upto, 0), 0)


@triton.jit
def number_voxels(
    points_in_cell,
    block_sums,
    totals,
    voxel_of_cell,
    cell_of_voxel,
    points_in_voxel,
    segment_start,  # (V,) int32
    offset_sum,  # (V, 3) int64: becomes zero for voxels with several segments
    slots,  # (G, SEGMENT) int32: becomes -1 in each voxel's last segment
    num_voxels,
    num_segments,
    num_points,
    num_dropped,
    room,
    num_cells,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    SEGMENT: tl.constexpr,
    STEP: tl.constexpr,
):
    """Number the cells that are kept, and the segments in them."""
    pid = tl.program_id(0)
    cell = pid * BLOCK + tl.arange(0, BLOCK)
    own_voxels = tl.load(block_sums + CELLS * BLOCKS + pid)
    own_segments = tl.load(block_sums + SEGMENTS * BLOCKS + pid)
    is_last = pid == BLOCKS - 1
    if own_voxels == 0 and not is_last:
        tl.store(voxel_of_cell + cell, tl.full((BLOCK,), -1, tl.int32), mask=cell < num_cells)
        return
    first_voxel = tl.zeros((STEP,), tl.int32)
    first_segment = tl.zeros((STEP,), tl.int32)
    for start in range(0, BLOCKS, STEP):
        block = start + tl.arange(0, STEP)
        first_voxel += tl.load(block_sums + CELLS * BLOCKS + block, mask=block < pid, other=0)
        first_segment += tl.load(block_sums + SEGMENTS * BLOCKS + block, mask=block < pid, other=0)
    voxels_before = tl.sum(first_voxel, 0)
    segments_before = tl.sum(first_segment, 0)

    count = tl.load(points_in_cell + cell, mask=cell < num_cells, other=0)
    is_kept = count > 0
    voxel = voxels_before + tl.cumsum(is_kept.to(tl.int32), 0) - 1
    length = tl.where(is_kept, tl.cdiv(count, SEGMENT), 0)
    end = segments_before + tl.cumsum(length, 0)
    tl.store(voxel_of_cell + cell, tl.where(is_kept, voxel, -1), mask=cell < num_cells)
    tl.store(cell_of_voxel + voxel, cell, mask=is_kept)
    tl.store(points_in_voxel + voxel, count, mask=is_kept)
    tl.store(segment_start + voxel, end - length, mask=is_kept)
    zero = tl.zeros((BLOCK,), tl.int64)
    for axis in tl.static_range(3):
        tl.store(offset_sum + voxel * 3 + axis, zero, mask=count > SEGMENT)
    last = slots + (end - 1)[:, None] * SEGMENT + tl.arange(0, SEGMENT)[None, :]
    tl.store(last, tl.full((BLOCK, SEGMENT), -1, tl.int32), mask=is_kept[:, None])
    if is_last:
        tl.store(num_voxels, voxels_before + own_voxels)
        tl.store(num_segments, segments_before + own_segments)
        tl.store(num_points, tl.load(totals + POINTS))
        tl.store(num_dropped, tl.maximum(tl.load(totals + CELLS) - room, 0))


@triton.jit
def fill_segments(
    ends,
    cell_of_point,
    rank_of_point,
    voxel_of_cell,
    segment_start,
    voxel_of_segment,  # (G,) int32
    slots,
    points_in_cell,  # becomes zero
    totals,  # becomes zero
    num_rows,
    CLOUDS: tl.constexpr,
    SEGMENT: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Put the points into segments, and leave zeros for the next frame."""
    if tl.program_id(0) == 0:
        tl.store(totals + CELLS, 0)
        tl.store(totals + POINTS, 0)
    total = tl.minimum(tl.load(ends + CLOUDS - 1), num_rows)
    if tl.program_id(0) * ROWS >= total:
        return
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cell = tl.load(cell_of_point + row, mask=row < total, other=-1)
    inside = cell >= 0
    rank = tl.load(rank_of_point + row, mask=inside, other=0)
    tl.store(points_in_cell + cell, tl.zeros((ROWS,), tl.int32), mask=inside & (rank == 0))
    voxel = tl.load(voxel_of_cell + cell, mask=inside, other=-1)
    is_kept = voxel >= 0
    segment = tl.load(segment_start + voxel, mask=is_kept, other=0) + rank // SEGMENT
    tl.store(voxel_of_segment + segment, voxel, mask=is_kept & (rank % SEGMENT == 0))
    tl.store(slots + segment * SEGMENT + rank % SEGMENT, row, mask=is_kept)


@triton.jit
def sum_offsets(
    points,
    limits,
    cell_of_voxel,
    points_in_voxel,
    voxel_of_segment,
    slots,
    num_segments,
    offset_sum,
    COLUMNS: tl.constexpr,
    NX: tl.constexpr,
    NY: tl.constexpr,
    NZ: tl.constexpr,
    SEGMENT: tl.constexpr,
    SCALE: tl.constexpr,
    ROWS: tl.constexpr,  # segments of a program
):
    """Add up the offsets of the points of each segment, and of the segments of a voxel if there are several."""
    total = tl.load(num_segments)
    if tl.program_id(0) * ROWS >= total:
        return
    segment = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = segment < total
    point = tl.load(slots + segment[:, None] * SEGMENT + tl.arange(0, SEGMENT)[None, :], mask=inside[:, None], other=-1)
    voxel = tl.load(voxel_of_segment + segment, mask=inside, other=0)
    cell = tl.load(cell_of_voxel + voxel, mask=inside, other=0)
    is_part = tl.load(points_in_voxel + voxel, mask=inside, other=0) > SEGMENT
    for axis in tl.static_range(3):
        minimum = tl.load(limits + axis)
        extent = tl.load(limits + 3 + axis)
        corner = lower_corner(cell, axis, minimum, extent, NX, NY, NZ)[:, None]
        value = tl.load(points + point * COLUMNS + axis, mask=point >= 0, other=0.0)
        offset = tl.where(point >= 0, tl.floor((value - corner) * (SCALE / extent) + 0.5), 0.0)
        steps = tl.sum(offset.to(tl.int64), 1)
        at = offset_sum + voxel * 3 + axis
        tl.store(at, steps, mask=inside & ~is_part)
        tl.atomic_add(at, steps, mask=is_part, sem="relaxed")


@triton.jit
def lower_corner(cell, axis: tl.constexpr, minimum, extent, NX: tl.constexpr, NY: tl.constexpr, NZ: tl.constexpr):
    """Where a cell begins along an axis, m; the same bits in every kernel, as offsets refer to it."""
    if axis == 0:
        index = cell // (NY * NZ) % NX
    elif axis == 1:
        index = cell // NZ % NY
    else:
        index = cell % NZ
    return tl.fma(index.to(tl.float32), extent, minimum)


@triton.jit
def _is_finite(value):
    return tl.abs(value) < float("inf")


@triton.jit
def _scaled(value, column: tl.constexpr, intensity_scale, INTENSITY: tl.constexpr, TANH: tl.constexpr):
    if column == INTENSITY:
        value = value * intensity_scale
    if (TANH >> column) % 2 == 1:
        value = 1.0 - 2.0 / (tl.exp(2.0 * value) + 1.0)
    return value
