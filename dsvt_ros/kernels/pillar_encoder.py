"""The pillar encoder of two layers as two kernels: one for segments of points, one for voxels of several segments.

With h a point's features after the first layer and m their maximum in its voxel, the second layer is
``max relu(A h + B m + b) = relu(max(A h) + B m + b)``: B m is the same for all points of a voxel, and rounding keeps
the order. So A h is needed at the points, B m only at the voxels.

The first layer is done in float32 (coordinates of tens of metres do not fit float16), and what is the same for all
points of a voxel only once: ``W (p - mean) = W (p - corner) - W (mean - corner)``, and so on. Letters as in
`fused.structures`; H channels after the first layer, padded to HIDDEN_PARTS chunks of HIDDEN, D = PARTS CHUNK after the
second one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dsvt_ros.kernels.voxelization import lower_corner

LOWEST: tl.constexpr = tl.constexpr(-(2**31))  # in `maxima` between calls: below the key of any number


@triton.jit
def encode_segments(
    points,  # (N, C) float32
    cell_of_voxel,
    points_in_voxel,
    offset_sum,
    voxel_of_segment,
    slots,  # (G, POINTS) int32
    num_segments,
    limits,  # (2, 3) float32: the range's minimum and the extent of a cell
    first_weights,  # (INPUTS, H) float32
    point_weights,  # tiles of A, float16
    voxel_weights,  # tiles of B, float16
    bias,  # (D,) float32
    maxima,  # (V, H + D) int32, keys of the maximum of h and A h: of voxels with several segments
    features,  # (V, D) float16: of voxels with one segment
    COLUMNS: tl.constexpr,
    INPUTS: tl.constexpr,  # C + 7, padded
    NX: tl.constexpr,
    NY: tl.constexpr,
    NZ: tl.constexpr,
    SCALE: tl.constexpr,
    POINTS: tl.constexpr,  # of a segment
    HIDDEN: tl.constexpr,
    HIDDEN_PARTS: tl.constexpr,
    CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,  # segments of a program
):
    """Encode segments, one point of each at a time, so that maxima need no look at other rows."""
    total = tl.load(num_segments)
    if tl.program_id(0) * ROWS >= total:
        return
    segment = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = segment < total
    voxel = tl.load(voxel_of_segment + segment, mask=inside, other=0)
    cell = tl.load(cell_of_voxel + voxel, mask=inside, other=0)
    count = tl.load(points_in_voxel + voxel, mask=inside, other=1)
    # A row of the first layer's input: the point from its voxel's corner, its other columns, the corner, the mean from
    # the corner, and 1 for the bias. What is the same for all points is subtracted from what is loaded of each.
    entry = tl.arange(0, INPUTS)
    less = tl.where(entry == COLUMNS + 6, -1.0, 0.0)[None, :] + tl.zeros((ROWS, INPUTS), tl.float32)
    for axis in tl.static_range(3):
        minimum = tl.load(limits + axis)
        extent = tl.load(limits + 3 + axis)
        corner = lower_corner(cell, axis, minimum, extent, NX, NY, NZ)[:, None]
        steps = tl.load(offset_sum + voxel * 3 + axis, mask=inside, other=0).to(tl.float32)
        mean = (steps / count.to(tl.float32) * (extent / SCALE))[:, None]
        less = tl.where((entry == axis)[None, :], corner, less)
        less = tl.where((entry == COLUMNS + axis)[None, :], -corner, less)
        less = tl.where((entry == COLUMNS + 3 + axis)[None, :], -mean, less)

    hidden_column = tl.arange(0, HIDDEN)
    column = tl.arange(0, CHUNK)
    width: tl.constexpr = HIDDEN * HIDDEN_PARTS
    hidden_most = ()
    for _ in tl.static_range(HIDDEN_PARTS):
        hidden_most = hidden_most + (tl.zeros((ROWS, HIDDEN), tl.float16),)
    most = ()
    for _ in tl.static_range(PARTS):
        most = most + (tl.full((ROWS, CHUNK), float("-inf"), tl.float16),)

    first_tile = entry[:, None] * width + hidden_column[None, :]
    tile = hidden_column[:, None] * CHUNK + column[None, :]
    is_loaded = inside[:, None] & (entry < COLUMNS)[None, :]
    first_point = tl.load(slots + segment * POINTS, mask=inside, other=0)
    for slot in tl.range(POINTS):
        # Empty slots repeat the first point.
        point = tl.load(slots + segment * POINTS + slot, mask=inside, other=0)
        point = tl.where(point < 0, first_point, point)
        inputs = tl.load(points + point[:, None] * COLUMNS + entry[None, :], mask=is_loaded, other=0.0) - less
        hidden = ()
        hidden_more = ()
        for j in tl.static_range(HIDDEN_PARTS):
            weight = tl.load(first_weights + j * HIDDEN + first_tile)
            sums = tl.dot(inputs, weight, input_precision="tf32x3")
            half = tl.maximum(sums, 0.0).to(tl.float16)
            hidden = hidden + (half,)
            hidden_more = hidden_more + (tl.maximum(hidden_most[j], half),)
        hidden_most = hidden_more
        more = ()
        for n in tl.static_range(PARTS):
            sums = tl.zeros((ROWS, CHUNK), tl.float32)
            for j in tl.static_range(HIDDEN_PARTS):
                weight = tl.load(point_weights + (n * HIDDEN_PARTS + j) * (HIDDEN * CHUNK) + tile)
                sums = tl.dot(hidden[j], weight, sums)
            more = more + (tl.maximum(most[n], sums.to(tl.float16)),)
        most = more

    is_whole = (inside & (count <= POINTS))[:, None]
    is_part = (inside & (count > POINTS))[:, None]
    keys = maxima + voxel[:, None] * (width + PARTS * CHUNK)
    for j in tl.static_range(HIDDEN_PARTS):
        at = keys + (j * HIDDEN + hidden_column)[None, :]
        tl.atomic_max(at, _key(hidden_most[j]), mask=is_part, sem="relaxed")
    for n in tl.static_range(PARTS):
        at = keys + (width + n * CHUNK + column)[None, :]
        tl.atomic_max(at, _key(most[n]), mask=is_part, sem="relaxed")
    at = features + voxel[:, None] * (PARTS * CHUNK) + column[None, :]
    for n in tl.static_range(PARTS):
        result = _finished(most[n], hidden_most, voxel_weights, bias, n, HIDDEN, HIDDEN_PARTS, CHUNK)
        tl.store(at + n * CHUNK, result, mask=is_whole)


@triton.jit
def finish_voxels(
    points_in_voxel,
    num_voxels,
    voxel_weights,
    bias,
    maxima,  # read, and reset for the next frame
    features,  # (V, D) float16: of voxels with several segments
    POINTS: tl.constexpr,
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
    voxel = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = tl.load(points_in_voxel + voxel, mask=voxel < total, other=0) > POINTS
    if tl.sum(inside.to(tl.int32), 0) == 0:
        return
    inside = inside[:, None]
    hidden_column = tl.arange(0, HIDDEN)
    column = tl.arange(0, CHUNK)
    width: tl.constexpr = HIDDEN * HIDDEN_PARTS
    keys = maxima + voxel[:, None] * (width + PARTS * CHUNK)
    hidden = ()
    for j in tl.static_range(HIDDEN_PARTS):
        at = keys + (j * HIDDEN + hidden_column)[None, :]
        hidden = hidden + (_float(tl.load(at, mask=inside, other=0)),)
        tl.store(at, tl.full((ROWS, HIDDEN), LOWEST, tl.int32), mask=inside)
    for n in tl.static_range(PARTS):
        at = keys + (width + n * CHUNK + column)[None, :]
        most = _float(tl.load(at, mask=inside, other=0))
        tl.store(at, tl.full((ROWS, CHUNK), LOWEST, tl.int32), mask=inside)
        result = _finished(most, hidden, voxel_weights, bias, n, HIDDEN, HIDDEN_PARTS, CHUNK)
        own = voxel[:, None] * (PARTS * CHUNK) + (n * CHUNK + column)[None, :]
        tl.store(features + own, result, mask=inside)


@triton.jit
def _finished(
    most,
    hidden,
    voxel_weights,
    bias,
    n: tl.constexpr,
    HIDDEN: tl.constexpr,
    HIDDEN_PARTS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """CHUNK channels of the result, from the maxima of A h and h."""
    column = tl.arange(0, CHUNK)
    tile = tl.arange(0, HIDDEN)[:, None] * CHUNK + column[None, :]
    sums = most.to(tl.float32) + tl.load(bias + n * CHUNK + column)[None, :]
    for j in tl.static_range(HIDDEN_PARTS):
        weight = tl.load(voxel_weights + (n * HIDDEN_PARTS + j) * (HIDDEN * CHUNK) + tile)
        sums = tl.dot(hidden[j], weight, sums)
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
