"""Attention inside each set, in the registers of warps; the same as `set_attention.attend`, in the same letters.

Sets are small: what costs time is bytes and waiting, not products. So a warp takes one head of one set and needs
nobody else: no shared memory, no barriers. Its tensor-core instructions (``mma.sync``, on all GPUs from compute
capability 8.0) leave scores in the very registers in which the second product wants them as its left operand.

Rows come in pieces of ROWS, the extent of these instructions; there is code for each number of pieces that a set may
have, so that a set of 20 voxels does not take the time of one of 48. Keys and values of the set stay in registers,
and the queries of one piece are on their way while those before are used.

A thread's operands are pairs of channels, 8 apart. Which channels these are does not matter to a sum over all of them,
as long as both operands agree: so they are neighbours in memory, and arrive as one load. The channels of values are in
such an order that those of the result are neighbours, too (`_rows_layout`, `_values_layout`).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

ROWS = gl.constexpr(16)  # of a piece
GROUP = gl.constexpr(8)  # channels of an instruction's block of columns
# In place of the scores of slots that hold no voxel; finite, so that no softmax is NaN.
MASKED = gl.constexpr(-1e4)


@gluon.constexpr_function
def _bases(axis, begin, end):
    """Those of a layout (head, row, channel) from `begin` to before `end` along an axis: the powers of two."""
    result = []
    while begin < end:
        result.append([begin if axis == other else 0 for other in range(3)])
        begin *= 2
    return result


@gluon.constexpr_function
def _rows_layout(heads, width):
    """Of queries, keys and results in the order of memory: 4 threads to a row, a warp to a head."""
    own = width // 4
    return gl.DistributedLinearLayout(
        reg_bases=_bases(2, 1, own) + [[0, 8, 0]],
        lane_bases=_bases(2, own, width) + _bases(1, 1, 8),
        warp_bases=_bases(0, 1, heads),
        block_bases=[],
        shape=[heads, ROWS.value, width],
    )


@gluon.constexpr_function
def _values_layout(heads, width):
    """Of values in the order of memory: 8 threads to a row, each with two pairs of neighbouring rows."""
    own = width // GROUP.value
    return gl.DistributedLinearLayout(
        reg_bases=_bases(2, 1, own) + [[0, 1, 0], [0, 8, 0]],
        lane_bases=_bases(1, 2, 8) + _bases(2, own, width),
        warp_bases=_bases(0, 1, heads),
        block_bases=[],
        shape=[heads, ROWS.value, width],
    )


@gluon.jit
def attend(
    qkv,  # (V, 3 D) float16, voxels set after set; queries are scaled such that the softmax is one of powers of two
    order,  # (V,) int32, which voxels these are
    set_start,  # (S + 1,) int32, where each set begins in `order`
    num_sets,  # (1,) int32
    attended,  # (V, D) float16
    HEADS: gl.constexpr,
    WIDTH: gl.constexpr,  # channels of a head
    PADDED_WIDTH: gl.constexpr,
    PIECES: gl.constexpr,  # of the largest set
):
    """Softmax attention of as many heads as there are warps, in one set."""
    number = gl.program_id(1)
    # All at once: what a program waits for, one after the other, is what it takes.
    total, first, end = gl.load(num_sets), gl.load(set_start + number), gl.load(set_start + number + 1)
    if number < total:
        rows = qkv + first * (3 * HEADS * WIDTH)
        for pieces in gl.static_range(1, PIECES + 1):
            if gl.cdiv(end - first, ROWS) == pieces:
                _attend_set(rows, order + first, end - first, attended, HEADS, WIDTH, PADDED_WIDTH, pieces)


@gluon.jit
def _attend_set(
    qkv, order, count, attended, HEADS: gl.constexpr, WIDTH: gl.constexpr, PADDED_WIDTH: gl.constexpr,
    PIECES: gl.constexpr,
):  # fmt: skip
    """A set of `count` voxels in so many pieces, of which only the last one is not full."""
    channels: gl.constexpr = HEADS * WIDTH
    stride: gl.constexpr = 3 * channels
    WARPS: gl.constexpr = gl.num_warps()
    SUMS: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[WARPS, 1, 1], instr_shape=[1, 16, 8])
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, SUMS, 2)
    MEMORY: gl.constexpr = _rows_layout(WARPS, PADDED_WIDTH)
    VALUES: gl.constexpr = _values_layout(WARPS, PADDED_WIDTH)
    rows = qkv + _slots(MEMORY) * stride + _channels(WIDTH, MEMORY)
    value_rows = qkv + 2 * channels + _slots(VALUES) * stride + _channels(WIDTH, VALUES)
    rest = count - (PIECES - 1) * ROWS
    keys = ()
    values = ()
    for piece in gl.static_range(PIECES):
        present = _columns(MEMORY) < WIDTH
        value_present = _columns(VALUES) < WIDTH
        if piece == PIECES - 1:
            present &= _slots(MEMORY) < rest
            value_present &= _slots(VALUES) < rest
        key = gl.load(rows + (channels + piece * ROWS * stride), mask=present, other=0.0)
        keys = keys + (gl.convert_layout(_operand(key).permute((0, 2, 1)), RIGHT, assert_trivial=True),)
        value = gl.load(value_rows + piece * ROWS * stride, mask=value_present, other=0.0)
        values = values + (gl.convert_layout(_grouped(value), RIGHT, assert_trivial=True),)

    slot = gl.arange(0, ROWS, gl.SliceLayout(0, gl.SliceLayout(2, MEMORY)))[None, :]
    query, voxel = _load_queries(rows, order, slot, count, WIDTH, MEMORY, SUMS)
    # One copy of the code for all turns: that of all numbers of pieces must fit the instruction cache.
    for _ in range(PIECES):
        rows += ROWS * stride
        next_query, next_voxel = _load_queries(rows, order, slot + ROWS, count, WIDTH, MEMORY, SUMS)
        result = gl.convert_layout(_memory(_attend_piece(query, keys, values, rest)), MEMORY, assert_trivial=True)
        target = attended + (voxel * channels)[:, :, None] + _channels(WIDTH, MEMORY)
        gl.store(target, result, mask=(slot < count)[:, :, None] & (_columns(MEMORY) < WIDTH))
        query, voxel, slot = next_query, next_voxel, slot + ROWS


@gluon.jit
def _attend_piece(query, keys, values, rest):
    """The result for a piece of queries; of the last piece of keys only the first `rest` are there."""
    SUMS: gl.constexpr = query.type.layout.parent
    LEFT: gl.constexpr = query.type.layout
    WARPS: gl.constexpr = query.shape[0]
    PIECES: gl.constexpr = len(keys)
    scores = ()
    for piece in gl.static_range(PIECES):
        part = mma_v2(query, keys[piece], gl.zeros([WARPS, ROWS, ROWS], gl.float32, SUMS))
        if piece == PIECES - 1:
            key = gl.arange(0, ROWS, gl.SliceLayout(0, gl.SliceLayout(1, SUMS)))[None, None, :]
            part = gl.where(key < rest, part, MASKED)
        scores = scores + (part,)
    highest = _highest(scores)
    result = gl.zeros([WARPS, ROWS, query.shape[2]], gl.float32, SUMS)
    total = gl.zeros([WARPS, ROWS, ROWS], gl.float32, SUMS)
    for piece in gl.static_range(PIECES):
        weights = _exp2(scores[piece] - highest)
        total += weights
        result = mma_v2(gl.convert_layout(weights.to(gl.float16), LEFT, assert_trivial=True), values[piece], result)
    return (result * (1.0 / gl.sum(total, 2))[:, :, None]).to(gl.float16)


@gluon.jit
def _highest(scores):
    """Of each row, through all pieces."""
    highest = scores[0]
    for piece in gl.static_range(1, len(scores)):
        highest = gl.maximum(highest, scores[piece])
    return gl.max(highest, 2)[:, :, None]


@gluon.jit
def _exp2(x):
    """2 to the power of x; 0 where that is too small for a normal number, which spares what `gl.exp2` does for them."""
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _load_queries(rows, order, slot, count, WIDTH: gl.constexpr, MEMORY: gl.constexpr, SUMS: gl.constexpr):
    """Queries of a piece and which voxels they are of; any number of them may be missing."""
    there = slot < count
    voxel = gl.load(order + slot, mask=there, other=0)
    query = gl.load(rows, mask=there[:, :, None] & (_columns(MEMORY) < WIDTH), other=0.0)
    return gl.convert_layout(_operand(query), gl.DotOperandLayout(0, SUMS, 2), assert_trivial=True), voxel


@gluon.jit
def _slots(LAYOUT: gl.constexpr):
    return gl.arange(0, ROWS, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))[None, :, None]


@gluon.jit
def _columns(LAYOUT: gl.constexpr):
    """Channels inside a head."""
    return gl.arange(0, LAYOUT.shape[2], gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))[None, None, :]


@gluon.jit
def _channels(WIDTH: gl.constexpr, LAYOUT: gl.constexpr):
    """Channels of the program's heads."""
    WARPS: gl.constexpr = LAYOUT.shape[0]
    head = gl.program_id(0) * WARPS + gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))
    return (head * WIDTH)[:, None, None] + _columns(LAYOUT)


@gluon.jit
def _operand(x):
    """Neighbouring channels of a thread in the places where an operand of the scores has that thread's."""
    y = x.reshape([x.shape[0], ROWS, 4, x.shape[2] // GROUP, 2]).permute((0, 1, 3, 2, 4))
    return y.reshape([x.shape[0], ROWS, x.shape[2]])


@gluon.jit
def _grouped(x):
    """Neighbouring channels of a thread in one place of each group of columns."""
    y = x.reshape([x.shape[0], ROWS, GROUP, x.shape[2] // GROUP]).permute((0, 1, 3, 2))
    return y.reshape([x.shape[0], ROWS, x.shape[2]])


@gluon.jit
def _memory(x):
    """The inverse of `_grouped`."""
    y = x.reshape([x.shape[0], ROWS, x.shape[2] // GROUP, GROUP]).permute((0, 1, 3, 2))
    return y.reshape([x.shape[0], ROWS, x.shape[2]])
