"""Windows and sets of one stage, and the voxels of the next one; the letters and rules are those of `fused/structures`.

A column is what lies above each other in one window. Its voxels follow each other, as cells are numbered with z
fastest, so a window is a small table of columns, each a first voxel and a count. On a grid one cell high, columns are
cells; on taller ones `find_columns` looks them up first. What belongs to the two window shifts comes in pairs; a shift
that no block of the stage uses has no windows.
"""

from __future__ import annotations

import triton
import triton.language as tl

VOXELS: tl.constexpr = tl.constexpr(1024)  # that one program looks at
WINDOWS: tl.constexpr = tl.constexpr(1024)  # whose counts are added at once
SETS: tl.constexpr = tl.constexpr(128)  # of a window that are written at once


@triton.jit
def _column_of(cell, HEIGHT: tl.constexpr, TALL: tl.constexpr, OFFSET: tl.constexpr, LAYERS: tl.constexpr):
    """Column of a cell; LAYERS columns of TALL cells lie above each other in a grid of HEIGHT cells."""
    return cell // HEIGHT * LAYERS + (cell % HEIGHT + OFFSET) // TALL


@triton.jit
def _mark_columns(
    columns, cell, before, after, voxel, inside, SIZE: tl.constexpr, WINDOW: tl.constexpr, OFFSET: tl.constexpr,
    NUM_ALONG: tl.constexpr, NUM_COLUMNS: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """Write where columns begin and end; `before` and `after` are the cells of the neighbouring voxels, or -1."""
    column = _column_of(cell, SIZE[2], WINDOW[SHIFT][2], OFFSET[SHIFT][2], NUM_ALONG[SHIFT][2])
    column_before = _column_of(before, SIZE[2], WINDOW[SHIFT][2], OFFSET[SHIFT][2], NUM_ALONG[SHIFT][2])
    column_after = _column_of(after, SIZE[2], WINDOW[SHIFT][2], OFFSET[SHIFT][2], NUM_ALONG[SHIFT][2])
    opens = (before < 0) | (column_before != column)
    closes = (after < 0) | (column_after != column)
    tl.store(columns + column, voxel, mask=inside & opens)
    tl.store(columns + NUM_COLUMNS[SHIFT] + column, voxel + 1, mask=inside & closes)


@triton.jit
def _find_pools(cell, before, SIZE: tl.constexpr, STRIDE: tl.constexpr):
    """Cell of the next stage's grid that each cell is pooled into, and whether the voxel before lies in another one."""
    layers: tl.constexpr = (SIZE[2] + STRIDE - 1) // STRIDE
    pool = _column_of(cell, SIZE[2], STRIDE, 0, layers)
    return pool, (before < 0) | (_column_of(before, SIZE[2], STRIDE, 0, layers) != pool)


@triton.jit
def find_columns(
    cell_of_voxel,  # (V,)
    num_voxels,  # (1,)
    columns_0,  # (2, columns) out: first voxel of each column, and the one after its last; -1 so far
    columns_1,
    pooled_in_block,  # (blocks,) out: voxels of the next stage that begin in each block of VOXELS voxels
    SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    OFFSET: tl.constexpr,
    NUM_ALONG: tl.constexpr,
    NUM_COLUMNS: tl.constexpr,  # 0: nobody needs them
    STRIDE: tl.constexpr,
):
    """For a block of voxels, where columns begin and end, and how many voxels of the next stage begin."""
    voxel = tl.program_id(0) * VOXELS + tl.arange(0, VOXELS)
    count = tl.load(num_voxels)
    inside = voxel < count
    cell = tl.load(cell_of_voxel + voxel, mask=inside, other=0)
    before = tl.load(cell_of_voxel + voxel - 1, mask=inside & (voxel > 0), other=-1)
    after = tl.load(cell_of_voxel + voxel + 1, mask=voxel + 1 < count, other=-1)
    if NUM_COLUMNS[0] > 0:
        _mark_columns(columns_0, cell, before, after, voxel, inside, SIZE, WINDOW, OFFSET, NUM_ALONG, NUM_COLUMNS, 0)
    if NUM_COLUMNS[1] > 0:
        _mark_columns(columns_1, cell, before, after, voxel, inside, SIZE, WINDOW, OFFSET, NUM_ALONG, NUM_COLUMNS, 1)
    _, opens = _find_pools(cell, before, SIZE, STRIDE)
    tl.store(pooled_in_block + tl.program_id(0), tl.sum((inside & opens).to(tl.int32)))


@triton.jit
def _read_columns(
    window, voxel_of_cell, columns, SIZE: tl.constexpr, WINDOW: tl.constexpr, OFFSET: tl.constexpr,
    NUM_ALONG: tl.constexpr, NUM_COLUMNS: tl.constexpr, TILE: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """First voxel and number of voxels of each column (x, y) of a window."""
    layer = window % NUM_ALONG[SHIFT][2]
    window_y = window // NUM_ALONG[SHIFT][2] % NUM_ALONG[SHIFT][1]
    window_x = window // (NUM_ALONG[SHIFT][2] * NUM_ALONG[SHIFT][1])  # through all clouds
    batch = window_x // NUM_ALONG[SHIFT][0]
    inner_x = tl.arange(0, TILE[SHIFT][0])[:, None]
    inner_y = tl.arange(0, TILE[SHIFT][1])[None, :]
    x = window_x % NUM_ALONG[SHIFT][0] * WINDOW[SHIFT][0] - OFFSET[SHIFT][0] + inner_x
    y = window_y * WINDOW[SHIFT][1] - OFFSET[SHIFT][1] + inner_y
    # Windows at the border reach outside the grid.
    inside_x = (inner_x < WINDOW[SHIFT][0]) & (x >= 0) & (x < SIZE[0])
    inside_y = (inner_y < WINDOW[SHIFT][1]) & (y >= 0) & (y < SIZE[1])
    inside = inside_x & inside_y
    column = (batch * SIZE[0] + x) * SIZE[1] + y
    if NUM_COLUMNS[SHIFT] == 0:
        first = tl.load(voxel_of_cell + column, mask=inside, other=-1)
        count = (first >= 0).to(tl.int32)
    else:
        column = column * NUM_ALONG[SHIFT][2] + layer
        first = tl.load(columns + column, mask=inside, other=-1)
        count = tl.load(columns + NUM_COLUMNS[SHIFT] + column, mask=inside, other=-1) - first
    return first, count


@triton.jit
def _cell_in_window(cell, SIZE: tl.constexpr, WINDOW: tl.constexpr, OFFSET: tl.constexpr, SHIFT: tl.constexpr):
    x = (cell // (SIZE[2] * SIZE[1]) % SIZE[0] + OFFSET[SHIFT][0]) % WINDOW[SHIFT][0]
    y = (cell // SIZE[2] % SIZE[1] + OFFSET[SHIFT][1]) % WINDOW[SHIFT][1]
    z = (cell % SIZE[2] + OFFSET[SHIFT][2]) % WINDOW[SHIFT][2]
    return (z * WINDOW[SHIFT][1] + y) * WINDOW[SHIFT][0] + x


@triton.jit
def count_windows(
    voxel_of_cell,  # (B nx ny nz,)
    cell_of_voxel,  # (V,)
    num_voxels,  # (1,)
    columns_0,  # (2, columns) from `find_columns`
    columns_1,
    voxels_in_window,  # (W,) out: the windows of the first shift, then those of the second
    cells_0,  # (V,) out
    cells_1,
    SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    OFFSET: tl.constexpr,
    NUM_ALONG: tl.constexpr,
    NUM_WINDOWS: tl.constexpr,
    NUM_COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Count the voxels of a window; programs beyond the windows find the cells of a block of voxels."""
    program = tl.program_id(0)
    if NUM_WINDOWS[0] > 0 and program < NUM_WINDOWS[0]:
        _, count = _read_columns(
            program, voxel_of_cell, columns_0, SIZE, WINDOW, OFFSET, NUM_ALONG, NUM_COLUMNS, TILE, 0
        )
        tl.store(voxels_in_window + program, tl.sum(count))
    if NUM_WINDOWS[1] > 0 and (program >= NUM_WINDOWS[0]) & (program < NUM_WINDOWS[0] + NUM_WINDOWS[1]):
        window = program - NUM_WINDOWS[0]
        _, count = _read_columns(
            window, voxel_of_cell, columns_1, SIZE, WINDOW, OFFSET, NUM_ALONG, NUM_COLUMNS, TILE, 1
        )
        tl.store(voxels_in_window + program, tl.sum(count))
    if program >= NUM_WINDOWS[0] + NUM_WINDOWS[1]:
        voxel = (program - (NUM_WINDOWS[0] + NUM_WINDOWS[1])) * VOXELS + tl.arange(0, VOXELS)
        inside = voxel < tl.load(num_voxels)
        cell = tl.load(cell_of_voxel + voxel, mask=inside, other=0)
        tl.store(cells_0 + voxel, _cell_in_window(cell, SIZE, WINDOW, OFFSET, 0), mask=inside)
        tl.store(cells_1 + voxel, _cell_in_window(cell, SIZE, WINDOW, OFFSET, 1), mask=inside)


@triton.jit
def _write_order(order, position, first_position, first, count, HEIGHT: tl.constexpr):
    """Write the voxels of a window, column after column, and where each of them is."""
    place = first_position + tl.cumsum(count, 0) - count
    if HEIGHT == 1:
        tl.store(order + place, first, mask=count > 0)
        tl.store(position + first, place, mask=count > 0)
    else:
        level = 0
        highest = tl.max(count)
        while level < highest:
            tl.store(order + place + level, first + level, mask=level < count)
            tl.store(position + first + level, place + level, mask=level < count)
            level += 1


@triton.jit
def _write_window(
    window, voxel_of_cell, columns, voxels_in_window, order, position, set_start, num_sets, room,
    SIZE: tl.constexpr, WINDOW: tl.constexpr, OFFSET: tl.constexpr, NUM_ALONG: tl.constexpr,
    NUM_WINDOWS: tl.constexpr, NUM_COLUMNS: tl.constexpr, TILE: tl.constexpr, SET_SIZE: tl.constexpr,
    MOST_SETS: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    windows: tl.constexpr = NUM_WINDOWS[SHIFT]
    voxels = tl.load(voxels_in_window + window)
    last = window == windows - 1
    if (voxels > 0) | last:
        voxels_before = tl.zeros((WINDOWS,), tl.int32)
        sets_before = tl.zeros((WINDOWS,), tl.int32)
        for begin in tl.static_range(0, windows, WINDOWS):
            other = begin + tl.arange(0, WINDOWS)
            counts = tl.load(voxels_in_window + other, mask=other < window, other=0)
            voxels_before += counts
            sets_before += (counts + (SET_SIZE - 1)) // SET_SIZE
        first_position = tl.sum(voxels_before)
        first_set = tl.sum(sets_before)

        # Slot t of the n voxels of a window with S sets of L slots holds sorted voxel floor(t n / (S L)). So set s
        # begins with voxel floor(s n / S); the slot before it holds another one, as n > (S - 1) L.
        sets = (voxels + (SET_SIZE - 1)) // SET_SIZE
        for begin in range(0, MOST_SETS[SHIFT], SETS):
            number = begin + tl.arange(0, SETS)
            start = first_position + number * voxels // tl.maximum(sets, 1)
            tl.store(set_start + first_set + number, start, mask=number < sets)
        if last:
            tl.store(set_start + first_set + sets, first_position + voxels)
            tl.store(num_sets, first_set + sets)

        first, count = _read_columns(
            window, voxel_of_cell, columns, SIZE, WINDOW, OFFSET, NUM_ALONG, NUM_COLUMNS, TILE, SHIFT
        )
        _write_order(order, position, first_position, tl.ravel(tl.trans(first)), tl.ravel(tl.trans(count)), SIZE[2])
        _write_order(order + room, position + room, first_position, tl.ravel(first), tl.ravel(count), SIZE[2])


@triton.jit(do_not_specialize=["room"])
def write_sets(
    voxel_of_cell,  # (B nx ny nz,)
    columns_0,  # (2, columns) from `find_columns`
    columns_1,
    voxels_in_window,  # (W,) from `count_windows`
    order_0,  # (2, V) out
    position_0,  # (2, V) out
    set_start_0,  # (S + 1,) out
    num_sets_0,  # (1,) out
    order_1,
    position_1,
    set_start_1,
    num_sets_1,
    room,  # V
    SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    OFFSET: tl.constexpr,
    NUM_ALONG: tl.constexpr,
    NUM_WINDOWS: tl.constexpr,
    NUM_COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
    SET_SIZE: tl.constexpr,
    MOST_SETS: tl.constexpr,  # of one window
):
    """Sort the voxels of a window in both orders, and split them into sets."""
    program = tl.program_id(0)
    if NUM_WINDOWS[0] > 0 and program < NUM_WINDOWS[0]:
        _write_window(
            program, voxel_of_cell, columns_0, voxels_in_window, order_0, position_0, set_start_0, num_sets_0,
            room, SIZE, WINDOW, OFFSET, NUM_ALONG, NUM_WINDOWS, NUM_COLUMNS, TILE, SET_SIZE, MOST_SETS, 0,
        )  # fmt: skip
    if NUM_WINDOWS[1] > 0 and program >= NUM_WINDOWS[0]:
        _write_window(
            program - NUM_WINDOWS[0], voxel_of_cell, columns_1, voxels_in_window + NUM_WINDOWS[0],
            order_1, position_1, set_start_1, num_sets_1, room,
            SIZE, WINDOW, OFFSET, NUM_ALONG, NUM_WINDOWS, NUM_COLUMNS, TILE, SET_SIZE, MOST_SETS, 1,
        )  # fmt: skip


@triton.jit
def pool_voxels(
    voxel_of_cell,  # (B nx ny nz,)
    cell_of_voxel,  # (V,)
    num_voxels,  # (1,)
    pooled_in_block,  # (blocks,) from `find_columns`
    pooled_of_cell,  # of the next stage's grid: voxel of each cell, out, -1 so far
    cell_of_pooled,  # (V',) out
    num_pooled,  # (1,) out
    pooled,  # (V', STRIDE) out
    SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Join the voxels of a block that lie above each other into those of the next stage."""
    layers: tl.constexpr = (SIZE[2] + STRIDE - 1) // STRIDE
    program = tl.program_id(0)
    count = tl.load(num_voxels)
    last = program == BLOCKS - 1
    if (program * VOXELS < count) | last:
        pooled_before = tl.zeros((WINDOWS,), tl.int32)
        for begin in tl.static_range(0, BLOCKS, WINDOWS):
            other = begin + tl.arange(0, WINDOWS)
            pooled_before += tl.load(pooled_in_block + other, mask=other < program, other=0)
        first = tl.sum(pooled_before)
        if last:
            tl.store(num_pooled, first + tl.load(pooled_in_block + program))

        voxel = program * VOXELS + tl.arange(0, VOXELS)
        inside = voxel < count
        cell = tl.load(cell_of_voxel + voxel, mask=inside, other=0)
        before = tl.load(cell_of_voxel + voxel - 1, mask=inside & (voxel > 0), other=-1)
        pool, opens = _find_pools(cell, before, SIZE, STRIDE)
        opens &= inside
        row = first - 1 + tl.cumsum(opens.to(tl.int32), 0)
        tl.store(pooled_of_cell + pool, row, mask=opens)
        tl.store(cell_of_pooled + row, pool, mask=opens)
        for slot in tl.static_range(STRIDE):
            z = pool % layers * STRIDE + slot
            source = tl.load(voxel_of_cell + pool // layers * SIZE[2] + z, mask=opens & (z < SIZE[2]), other=-1)
            tl.store(pooled + row * STRIDE + slot, source, mask=opens)
