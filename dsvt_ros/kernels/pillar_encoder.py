"""The pillar encoder of two layers as kernels that deal out segments of points, encode them, and finish dense voxels.

With h a point's features after the first layer and m their maximum in its voxel, the second layer is
``max relu(A h + B m + b) = relu(max(A h) + B m + b)``: B m is the same for all points of a voxel, and rounding keeps
the order. So A h is needed at the points, B m only at the voxels.

Inputs and weights of the first layer are sums of two float16 numbers each, since coordinates of tens of metres do not
fit one, and what is the same for all points of a voxel is worked out only once: ``W (p - mean) = W (p - corner) -
W (mean - corner)``, and so on.

Segments come in classes, each of which is a list: first those of voxels with several segments, whose maxima meet in
memory; then the others, by length: more than half of `POINTS`, more than a quarter, and so on. So programs hardly wait
for the longest of their segments. The order in a list is left to chance: each row of a product has its own sums.

Letters as in `fused.structures`; H channels after the first layer, padded to HIDDEN_PARTS chunks of HIDDEN, D = PARTS
CHUNK after the second one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dsvt_ros.kernels.voxelization import lower_corner

LOWEST: tl.constexpr = tl.constexpr(-(2**31))  # in `maxima`: below the key of any number
LARGEST: tl.constexpr = tl.constexpr(65504.0)  # that float16 holds


@triton.jit
def deal_segments(
    points_in_voxel,
    voxel_of_segment,
    slots,  # (G, POINTS) int32
    num_segments,
    lists,  # (CLASSES + 1, G) int32: segments of each class; then the voxels with several segments
    list_lengths,  # (CLASSES + 1,) int32: zero before
    maxima,  # (V, WIDTH) int32: becomes LOWEST for voxels with several segments
    capacity,  # G
    POINTS: tl.constexpr,
    CLASSES: tl.constexpr,
    LISTS: tl.constexpr,  # CLASSES + 1, padded
    WIDTH: tl.constexpr,
    PIECE: tl.constexpr,  # of WIDTH
    ROWS: tl.constexpr,  # segments of a program
):
    """Make the lists of segments and voxels, and clear what will be a maximum."""
    total = tl.load(num_segments)
    if tl.program_id(0) * ROWS >= total:
        return
    segment = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = segment < total
    voxel = tl.load(voxel_of_segment + segment, mask=inside, other=-1)
    voxel_before = tl.load(voxel_of_segment + segment - 1, mask=inside & (segment > 0), other=-1)
    slot = tl.load(slots + segment[:, None] * POINTS + tl.arange(0, POINTS)[None, :], mask=inside[:, None], other=-1)
    length = tl.sum((slot >= 0).to(tl.int32), 1)
    is_part = tl.load(points_in_voxel + voxel, mask=inside, other=0) > POINTS
    opens_voxel = is_part & (voxel != voxel_before)
    kind = tl.full((ROWS,), 1, tl.int32)
    for halvings in tl.static_range(1, CLASSES - 1):
        kind += (length <= POINTS >> halvings).to(tl.int32)
    kind = tl.where(is_part, 0, kind)
    entry = tl.arange(0, LISTS)
    which = entry[None, :]
    is_in = (inside[:, None] & (kind[:, None] == which)) | (opens_voxel[:, None] & (which == CLASSES))
    number = is_in.to(tl.int32)
    start = tl.atomic_add(list_lengths + entry, tl.sum(number, 0), mask=entry <= CLASSES, sem="relaxed")
    at = which * capacity + start[None, :] + tl.cumsum(number, 0) - 1
    tl.store(lists + at, tl.where(which == CLASSES, voxel[:, None], segment[:, None]), mask=is_in)
    for first in tl.static_range(0, WIDTH, PIECE):
        keys = maxima + voxel[:, None] * WIDTH + (first + tl.arange(0, PIECE))[None, :]
        tl.store(keys, tl.full((ROWS, PIECE), LOWEST, tl.int32), mask=opens_voxel[:, None])


@triton.jit
def encode_segments(
    points,  # (N, C) float32
    cell_of_voxel,
    points_in_voxel,
    offset_sum,
    voxel_of_segment,
    slots,
    lists,
    list_lengths,
    limits,  # (2, 3) float32: the range's minimum and the extent of a cell
    first_weights,  # (HIDDEN_PARTS, 4 INPUTS, HIDDEN) float16: both terms of each weight, twice
    point_weights,  # tiles of A, float16
    voxel_weights,  # tiles of B, float16
    bias,  # (D,) float32
    maxima,  # (V, H + D) int32, keys of the maximum of h and A h: of voxels with several segments
    features,  # (V, D) float16: of voxels with one segment
    capacity,  # G
    COLUMNS: tl.constexpr,
    INPUTS: tl.constexpr,  # C + 7, padded
    NX: tl.constexpr,
    NY: tl.constexpr,
    NZ: tl.constexpr,
    SCALE: tl.constexpr,
    POINTS: tl.constexpr,  # of a segment
    CLASSES: tl.constexpr,
    HIDDEN: tl.constexpr,
    HIDDEN_PARTS: tl.constexpr,
    CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
    RESIDENT: tl.constexpr,
    ROWS: tl.constexpr,  # segments of a program
):
    """Encode segments of one class, one point of each at a time, so that maxima need no look at other rows."""
    program = tl.program_id(0)
    kind = -1
    first_row = 0
    total = 0
    longest = 0
    for c in tl.static_range(CLASSES):
        length = tl.load(list_lengths + c)
        programs = tl.cdiv(length, ROWS)
        if (program >= 0) & (program < programs):
            kind = c
            first_row = program * ROWS
            total = length
            longest = POINTS if c == 0 else POINTS >> (c - 1)
        program -= programs
    if kind < 0:
        return
    # Rows beyond the last segment repeat it, which changes no maximum.
    row = tl.minimum(first_row + tl.arange(0, ROWS), total - 1)
    segment = tl.load(lists + kind * capacity + row)
    first_slot = segment * POINTS
    point = tl.load(slots + first_slot)
    voxel = tl.load(voxel_of_segment + segment)
    entry = tl.arange(0, INPUTS)
    # Points are loaded one slot ahead, their numbers two; empty slots repeat the point before.
    loaded = tl.load(
        points + (point[:, None] * COLUMNS + entry[None, :]), mask=(entry < COLUMNS)[None, :], other=0.0
    )
    point = tl.load(slots + first_slot + 1, mask=longest > 1, other=-1)

    # A row of the first layer's input: the point from its voxel's corner, its other columns, the corner, the mean from
    # the corner, and 1 for the bias. What is the same for all points is subtracted from what is loaded of each.
    cell = tl.load(cell_of_voxel + voxel)
    share = 1.0 / tl.load(points_in_voxel + voxel).to(tl.float32)
    less = tl.where(entry == COLUMNS + 6, -1.0, 0.0)[None, :] + tl.zeros((ROWS, INPUTS), tl.float32)
    for axis in tl.static_range(3):
        minimum = tl.load(limits + axis)
        extent = tl.load(limits + 3 + axis)
        corner = lower_corner(cell, axis, minimum, extent, NX, NY, NZ)[:, None]
        steps = tl.load(offset_sum + voxel * 3 + axis).to(tl.float32)
        mean = (steps * share * (extent / SCALE))[:, None]
        less = tl.where((entry == axis)[None, :], corner, less)
        less = tl.where((entry == COLUMNS + axis)[None, :], -corner, less)
        less = tl.where((entry == COLUMNS + 3 + axis)[None, :], -mean, less)

    # A is loaded before the loop if it stays in shared memory, where Hopper's products read it; others would keep it in
    # registers.
    hidden_column = tl.arange(0, HIDDEN)
    column = tl.arange(0, CHUNK)
    width: tl.constexpr = HIDDEN * HIDDEN_PARTS
    tile = point_weights + hidden_column[:, None] * CHUNK + column[None, :]
    first_tiles = _tiles(first_weights, 4 * INPUTS, HIDDEN, HIDDEN_PARTS)
    hidden_most = ()
    for _ in tl.static_range(HIDDEN_PARTS):
        hidden_most = hidden_most + (tl.zeros((ROWS, HIDDEN), tl.float16),)
    point_tiles = _tiles(point_weights, HIDDEN, CHUNK, PARTS * HIDDEN_PARTS if RESIDENT else 0)
    most = ()
    for _ in tl.static_range(PARTS):
        most = most + (tl.full((ROWS, CHUNK), float("-inf"), tl.float16),)

    slot = 0
    while slot < longest:
        inputs = tl.minimum(tl.maximum(loaded - less, -LARGEST), LARGEST)
        is_loaded = (point >= 0)[:, None] & (entry < COLUMNS)[None, :]
        loaded = tl.load(points + (point[:, None] * COLUMNS + entry[None, :]), mask=is_loaded, other=loaded)
        point = tl.load(slots + first_slot + slot + 2, mask=slot + 2 < longest, other=-1)
        high = inputs.to(tl.float16)
        both = tl.join(high, (inputs - high.to(tl.float32)).to(tl.float16))
        terms = tl.join(both, both).reshape(ROWS, 4 * INPUTS)
        hidden = ()
        hidden_more = ()
        for j in tl.static_range(HIDDEN_PARTS):
            half = tl.maximum(tl.dot(terms, first_tiles[j]), 0.0).to(tl.float16)
            hidden = hidden + (half,)
            hidden_more = hidden_more + (tl.maximum(hidden_most[j], half),)
        hidden_most = hidden_more
        more = ()
        for n in tl.static_range(PARTS):
            sums = tl.zeros((ROWS, CHUNK), tl.float32)
            for j in tl.static_range(HIDDEN_PARTS):
                own = tile + (n * HIDDEN_PARTS + j) * (HIDDEN * CHUNK)
                sums = tl.dot(hidden[j], point_tiles[n * HIDDEN_PARTS + j] if RESIDENT else tl.load(own), sums)
            more = more + (tl.maximum(most[n], sums.to(tl.float16)),)
        most = more
        slot += 1

    # Voxels are loaded again in each branch, as the loop needs the registers.
    if kind == 0:
        voxel = tl.load(voxel_of_segment + tl.load(lists + row))
        keys = maxima + voxel[:, None] * (width + PARTS * CHUNK)
        # With no more than the alignment of an entry, neighbours of a warp take neighbouring entries.
        for j in tl.static_range(HIDDEN_PARTS):
            at = tl.multiple_of(keys + (j * HIDDEN + hidden_column)[None, :], [4, 8])
            tl.atomic_max(at, _key(hidden_most[j]), sem="relaxed")
        for n in tl.static_range(PARTS):
            at = tl.multiple_of(keys + (width + n * CHUNK + column)[None, :], [4, 8])
            tl.atomic_max(at, _key(most[n]), sem="relaxed")
    else:
        voxel = tl.load(voxel_of_segment + tl.load(lists + kind * capacity + row))
        result_at = features + voxel[:, None] * (PARTS * CHUNK) + column[None, :]
        voxel_tiles = _tiles(voxel_weights, HIDDEN, CHUNK, PARTS * HIDDEN_PARTS)
        for n in tl.static_range(PARTS):
            result = _finished(most[n], hidden_most, voxel_tiles, bias, n, HIDDEN_PARTS, CHUNK)
            tl.store(result_at + n * CHUNK, result)


@triton.jit
def finish_voxels(
    voxels,  # (G,) int32, the last one of `lists`
    num_voxels,
    voxel_weights,
    bias,
    maxima,
    features,  # (V, D) float16: of voxels with several segments
    HIDDEN: tl.constexpr,
    HIDDEN_PARTS: tl.constexpr,
    CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,  # voxels of a program
):
    """The second layer of voxels with several segments."""
    total = tl.load(num_voxels)
    if tl.program_id(0) * ROWS >= total:
        return
    row = tl.minimum(tl.program_id(0) * ROWS + tl.arange(0, ROWS), total - 1)
    voxel = tl.load(voxels + row)
    hidden_column = tl.arange(0, HIDDEN)
    column = tl.arange(0, CHUNK)
    width: tl.constexpr = HIDDEN * HIDDEN_PARTS
    keys = maxima + voxel[:, None] * (width + PARTS * CHUNK)
    voxel_tiles = _tiles(voxel_weights, HIDDEN, CHUNK, PARTS * HIDDEN_PARTS)
    hidden = ()
    for j in tl.static_range(HIDDEN_PARTS):
        hidden = hidden + (_float(tl.load(keys + (j * HIDDEN + hidden_column)[None, :])),)
    at = features + voxel[:, None] * (PARTS * CHUNK) + column[None, :]
    for n in tl.static_range(PARTS):
        most = _float(tl.load(keys + (width + n * CHUNK + column)[None, :]))
        result = _finished(most, hidden, voxel_tiles, bias, n, HIDDEN_PARTS, CHUNK)
        tl.store(at + n * CHUNK, result)


@triton.jit
def _tiles(weights, HIDDEN: tl.constexpr, CHUNK: tl.constexpr, COUNT: tl.constexpr):
    """All tiles of a matrix, so that they are loaded together."""
    at = weights + tl.arange(0, HIDDEN)[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    tiles = ()
    for i in tl.static_range(COUNT):
        tiles = tiles + (tl.load(at + i * (HIDDEN * CHUNK)),)
    return tiles


@triton.jit
def _finished(most, hidden, voxel_tiles, bias, n: tl.constexpr, HIDDEN_PARTS: tl.constexpr, CHUNK: tl.constexpr):
    """CHUNK channels of the result, from the maxima of A h and h, and the tiles of B."""
    sums = most.to(tl.float32) + tl.load(bias + n * CHUNK + tl.arange(0, CHUNK))[None, :]
    for j in tl.static_range(HIDDEN_PARTS):
        sums = tl.dot(hidden[j], voxel_tiles[n * HIDDEN_PARTS + j], sums)
    return tl.maximum(sums, 0.0).to(tl.float16)


@triton.jit
def _key(value):
    """Integers in the order of float16 numbers; there is no atomic maximum of those themselves."""
    bits = value.to(tl.float32).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _float(key):
    """The inverse."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True).to(tl.float16)
