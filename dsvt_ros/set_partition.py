"""Voxels to windows to sets: which voxels attend together (DSVT section 3.1, "dynamic set partition").

Nothing is sorted. Voxels come in the order of their cells, so a running count over the columns of the grid, laid out
window after window, says where in that order each of them goes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from dsvt_ros.config import ModelConfig, StageConfig
from dsvt_ros.structures import Pooling, SetPartition, StagePartition, VoxelSets


def partition_sets(coords: Tensor, model: ModelConfig, batch_size: int = 1) -> SetPartition:
    """Split the voxels of each window into sets, for all stages and the window shifts that their blocks use.

    On a GPU the host waits once a stage, for the numbers of sets and of pooled voxels.

    Args:
        coords: (V, 4) int32 voxel coordinates ``(batch, z, y, x)``, ordered by batch, x, y, z.
        model: Grid, windows, offsets and set sizes.
        batch_size: Number of clouds.

    Returns:
        The same sets, in the same order, as the published `DSVTInputLayer`.
    """
    backbone = model.backbone_3d
    stages = []
    for number, (stage, (nx, ny, nz)) in enumerate(zip(backbone.stages, model.stage_grids, strict=True)):
        shifts = tuple(sorted(set(backbone.shifts[number])))
        layout = lay_out(stage, shifts, (batch_size, nz, ny, nx), coords.device)
        places = _place(coords, layout, stage.set_size)
        opens = _opens_pool(coords, stage.pool_z) if number < len(backbone.stages) - 1 else None

        counts = torch.stack([*places.last_sets, *([] if opens is None else [opens.sum()])]).tolist()
        sets = dict(zip(shifts, _fill_sets(places, counts[: len(shifts)], stage.set_size), strict=True))
        pooling = None
        if opens is not None:
            pooling, coords = _pool(coords, opens, counts[-1], stage.pool_z)
        stages.append(StagePartition((places.cells[0], places.cells[1]), (sets.get(0), sets.get(1)), pooling))
    return SetPartition(tuple(stages), coords)


@dataclass(frozen=True)
class Layout:
    """Where the cells of a grid lie under the K window shifts that a stage uses.

    Windows count through all clouds and shifts, and so do columns of cells, window after window.

    Attributes:
        tables: By axis of ``(batch, z, y, x)`` an (R, cells) int64 table, or None where it would hold zeros. The place
            of a voxel is the sum of what they hold for its coordinates; row by row: its cell in its window under both
            shifts; for each used shift its window; its column, where those of a window go by y, x; and its column,
            where they go by x, y, which count on after all the others.
        windows: For each used shift, how many windows there are, empty ones too.
        columns: For each used shift, the columns of all its windows.
        columns_in_window: For each used shift, the columns of one window.
    """

    tables: tuple[Tensor | None, ...]
    windows: tuple[int, ...]
    columns: tuple[int, ...]
    columns_in_window: tuple[int, ...]


@cache  # some kilobytes for each stage of a model; captured CUDA graphs read them where they are
@torch.inference_mode(False)  # so that training may use them too
def lay_out(
    stage: StageConfig, shifts: tuple[int, ...], shape: tuple[int, int, int, int], device: torch.device
) -> Layout:
    """The layout for grids of (batch, z, y, x) cells."""
    # Rows as they are by axis; what belongs to no axis is added to the last one.
    cells: list[tuple[Tensor, ...]] = []
    window_of: list[tuple[Tensor, ...]] = []
    by_y: list[tuple[Tensor, ...]] = []
    by_x: list[tuple[Tensor, ...]] = []
    windows: list[int] = []
    columns: list[int] = []
    columns_in_window: list[int] = []
    for shift, ((wx, wy, wz), offset) in enumerate(zip(stage.windows, stage.offsets, strict=True)):
        batch, z, y, x = (torch.arange(cells_along) for cells_along in shape)
        # A window as tall as the grid is never shifted in z: there is nothing to pair it with.
        x, y, z = x + offset[0], y + offset[1], z + (offset[2] if wz < shape[1] else 0)
        nx, ny, nz = (int(last[-1]) // size + 1 for last, size in ((x, wx), (y, wy), (z, wz)))
        window = (batch * (nx * ny * nz), z // wz, y // wy * nz, x // wx * (ny * nz))
        b_column, z_column, y_column, x_column = (part * (wx * wy) for part in window)
        x, y, z = x % wx, y % wy, z % wz
        cells.append((0 * batch, z * (wy * wx), y * wx, x))
        if shift in shifts:
            window_of.append((*window[:3], window[3] + sum(windows)))
            x_column = x_column + sum(columns)
            by_y.append((b_column, z_column, y_column + y * wx, x_column + x))
            by_x.append((b_column, z_column, y_column + y, x_column + x * wy))
            windows.append(shape[0] * nx * ny * nz)
            columns.append(windows[-1] * wx * wy)
            columns_in_window.append(wx * wy)
    by_x = [(*others, last + sum(columns)) for *others, last in by_x]
    tables = [torch.stack(parts) for parts in zip(*cells, *window_of, *by_y, *by_x, strict=True)]
    kept = [table.to(device) if table.any() or axis == 3 else None for axis, table in enumerate(tables)]
    return Layout(tuple(kept), tuple(windows), tuple(columns), tuple(columns_in_window))


@dataclass(frozen=True)
class _Places:
    """Where voxels go, shift after shift of the K that are used.

    Attributes:
        cells: (2, V) int64, cell of each voxel in its window, for both shifts.
        window: (K V) int64, window of each voxel.
        position: (2, K V) int64, where each voxel comes when all are sorted by window, and inside a window by y, x, z
            or by x, y, z.
        sets_in_window: (W,) int64.
        numbers: (W, 4) int64, of each window its first position, voxels, slots and first slot.
        last_sets: For each used shift () int64, sets up to its last window.
    """

    cells: Tensor
    window: Tensor
    position: Tensor
    sets_in_window: Tensor
    numbers: Tensor
    last_sets: list[Tensor]


def _place(coords: Tensor, layout: Layout, set_size: int) -> _Places:
    axes = coords.T.long()
    tables = [(table, axis) for table, axis in zip(layout.tables, axes, strict=True) if table is not None]
    parts = [table.gather(1, axis.expand(len(table), -1)) for table, axis in tables]
    rows = parts[0]
    for part in parts[1:]:
        rows += part
    num_shifts, num_columns = len(layout.windows), sum(layout.columns)
    window, column = rows[2 : 2 + num_shifts].flatten(), rows[2 + num_shifts :].flatten()

    # Counting the voxels in the columns before it sorts a voxel, as those of one column already are in order.
    before = column.new_zeros(2 * num_columns + 1, dtype=torch.int32)
    before[1:].scatter_add_(0, column, before.new_ones(1).expand(len(column)))
    before = torch.cumsum(before, 0, dtype=torch.int32)
    position = before.index_select(0, column).view(2, -1).long()
    position[1] -= len(window)
    if layout.tables[1] is not None:
        voxel = torch.arange(len(window), device=window.device)
        lowest = voxel.new_full((num_columns,), len(voxel))
        lowest.scatter_reduce_(0, column[: len(window)], voxel, "amin")
        position += voxel - lowest.index_select(0, column[: len(window)])

    by_shift = torch.split(before[:num_columns], list(layout.columns))
    by_window = [shifted[::step] for shifted, step in zip(by_shift, layout.columns_in_window, strict=True)]
    first = torch.cat([*by_window, before[num_columns : num_columns + 1]]).long()
    count = first[1:] - first[:-1]
    sets = (count + (set_size - 1)) // set_size
    last_set = torch.cumsum(sets, 0)
    numbers = torch.stack([first[:-1], count, sets * set_size, (last_set - sets) * set_size], dim=1)
    last_sets = [shifted[-1] for shifted in torch.split(last_set, list(layout.windows))]
    return _Places(rows[:2], window, position, sets, numbers, last_sets)


def _fill_sets(places: _Places, last_sets: list[int], set_size: int) -> list[VoxelSets]:
    """The sets of each used shift; `last_sets` are those of `places`, as numbers."""
    position, num_shifts, num_sets = places.position, len(last_sets), last_sets[-1]
    # Slot t of the n voxels of a window with S sets of L slots holds sorted voxel floor(t * n / (S * L)): the voxels
    # are spread evenly, and the slots that are left over repeat their predecessor.
    window_of_set = torch.repeat_interleave(places.sets_in_window, output_size=num_sets)
    first, count, slots, first_slot = places.numbers.index_select(0, window_of_set)[:, :, None].unbind(1)
    slot = torch.arange(num_sets * set_size, device=position.device).view(num_sets, set_size) - first_slot
    row = first + slot * count // slots
    voxel = torch.arange(position.shape[1] // num_shifts, device=position.device).expand(2, num_shifts, -1)
    order = torch.empty_like(position).scatter_(1, position, voxel.reshape(2, -1))

    # The inverse: sorted voxel r sits unmasked in slot ceil(r * S * L / n), the first that holds it. No two sets hold
    # the same voxel.
    first, count, slots, first_slot = places.numbers.index_select(0, places.window).unbind(1)
    slot_of_voxel = ((position - first) * slots + (count - 1)) // count + first_slot

    sets = []
    for (begin, end), own_slots in zip(pairwise([0, *last_sets]), slot_of_voxel.chunk(num_shifts, 1), strict=True):
        own_row = row[begin:end]
        mask = torch.zeros((2, *own_row.shape), dtype=torch.bool, device=row.device)
        mask[:, :, 1:] = own_row[:, 1:] == own_row[:, :-1]
        indices = order.index_select(1, own_row.flatten()).view_as(mask)
        sets.append(VoxelSets(indices, mask, own_slots - begin * set_size))
    return sets


def _opens_pool(coords: Tensor, stride: int) -> Tensor:
    """(V,) bool, whether a voxel is the lowest of those that are pooled into one."""
    column = torch.cat([coords[:, :1], coords[:, 1:2] // stride, coords[:, 2:]], dim=1)
    opens = torch.ones(len(coords), dtype=torch.bool, device=coords.device)
    opens[1:] = (column[1:] != column[:-1]).any(1)
    return opens


def _pool(coords: Tensor, opens: Tensor, num_pooled: int, stride: int) -> tuple[Pooling, Tensor]:
    """Join `stride` voxels along z; also gives the coordinates of what they make, in the same order of axes."""
    target = torch.cumsum(opens, 0) - 1
    batch, z, y, x = coords.unbind(1)
    slot = target * stride + z % stride
    voxel = torch.arange(len(coords), device=coords.device)
    indices = voxel.new_zeros(num_pooled * stride).scatter_(0, slot, voxel)
    mask = torch.ones_like(indices, dtype=torch.bool).scatter_(0, slot, False)
    pooled = coords.new_empty(num_pooled, 4)
    # All voxels of a target write the same.
    pooled[target] = torch.stack([batch, z // stride, y, x], 1)
    return Pooling(indices.view(-1, stride), mask.view(-1, stride)), pooled
