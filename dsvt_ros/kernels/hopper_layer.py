"""All of a set-attention layer that follows its attention, and the next layer's projections, as one kernel for Hopper.

The same arithmetic as `set_attention.finish_layer` and `set_attention.project`, in the same letters, for the sizes of
the published model: 192 channels, 384 hidden ones. A program keeps a multiprocessor to itself and has three parts:

- Two consumers, a warpgroup each, take 64 voxels at a time from the output projection to the next layer's queries, keys
  and values. All in between stays in their registers: sums are accumulators of the tensor cores, and become their
  left operands.
- A producer, one warp, streams the weights through a ring of shared memory that both consumers read.

The consumers are not in lockstep, only at most a ring apart, so that one's norms and GELU run during the other's
products. Every output element is written by one consumer, so repeated runs give the same bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from dsvt_ros.kernels.hopper_ring import (
    CONSUMER_REGISTERS,
    OTHER_REGISTERS,
    SWIZZLED,
    await_slot,
    release_slot,
    start_slot,
)
from dsvt_ros.kernels.set_attention import DOWN_BIAS, LAYER_NORM_EPS, NORM, OUT_BIAS, gelu_slope

# Extents of all blocks: voxels of a consumer, which are a warpgroup's rows, and channels of a swizzled line.
ROWS = gl.constexpr(64)
CHUNK = gl.constexpr(64)
PARTS = gl.constexpr(3)  # D / CHUNK
UP_PARTS = gl.constexpr(6)  # F / CHUNK
CHANNELS = gl.constexpr(192)
# PARTS blocks of weights make a tile, the unit of the ring: for one block of columns all of K, or in the down
# projection for one block of K all columns.
OUT_TILES = gl.constexpr(3)
FINISH_TILES = gl.constexpr(15)  # OUT_TILES + 2 * UP_PARTS
QKV_TILES = gl.constexpr(9)  # 3 D / CHUNK

STAGES = gl.constexpr(5)  # tiles of the ring
QKV_UNROLL = gl.constexpr(3)  # tiles of which two are in flight
BLOCK_BYTES = gl.constexpr(64 * 64 * 2)

_gelu_slope = gluon.jit(gelu_slope.fn)  # the same source in the other language

SUMS = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16]))
OPERAND = gl.constexpr(gl.DotOperandLayout(operand_index=0, parent=SUMS, k_width=2))
BY_COLUMN = gl.constexpr(gl.SliceLayout(0, SUMS))
# A thread's sums are pairs of neighbouring columns, 8 apart. Weights are in such an order that these pairs are the
# neighbouring channels NATURAL: 8 of them, 16 bytes in memory, 32 apart.
NATURAL = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [0, 32], [8, 0]],
        lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 64],
    )
)
NATURAL_ROW = gl.constexpr(gl.SliceLayout(1, NATURAL))
NATURAL_COLUMN = gl.constexpr(gl.SliceLayout(0, NATURAL))
FILL = gl.constexpr(gl.BlockedLayout([4], [32], [4], [0]))
PLAIN = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


def descriptor(matrix: Tensor) -> TensorDescriptor:
    """Of a float16 matrix, as the kernel reads and writes it."""
    return TensorDescriptor.from_tensor(matrix, [ROWS.value, CHUNK.value], SWIZZLED.value)


def weight_blocks(out: Tensor, up: Tensor, down: Tensor, qkv: Tensor | None) -> Tensor:
    """Weights of `torch.nn.Linear`, (N, K) each, as (blocks * CHUNK, CHUNK) float16 in the order of their use.

    Args:
        out: (D, D) output projection of the attention.
        up: (F, D) first of the feed-forward network.
        down: (D, F) second of it.
        qkv: (3 D, D) queries, keys and values of the next layer; None after the last.
    """
    tiles = [*_paired(_blocks(out), 2)]
    for first, second in zip(_paired(_blocks(up), 3), _paired(_blocks(down), 2).transpose(0, 1), strict=True):
        tiles += [first, second]
    if qkv is not None:
        tiles += [*_paired(_paired(_blocks(qkv), 2), 3)]
    return torch.stack(tiles).to(torch.float16).flatten(0, 2).contiguous()


def _blocks(weight: Tensor) -> Tensor:
    """(N, K) as (N / CHUNK, K / CHUNK, CHUNK, CHUNK)."""
    chunk = CHUNK.value
    rows, columns = weight.shape
    return weight.detach().view(rows // chunk, chunk, columns // chunk, chunk).transpose(1, 2)


def _paired(blocks: Tensor, dim: int) -> Tensor:
    """Channels of blocks in the order of sums; see NATURAL."""
    ordered: Tensor = blocks.unflatten(dim, (2, 4, 4, 2)).transpose(dim + 1, dim + 2).flatten(dim, dim + 3)
    return ordered


@gluon.jit
def finish_and_project(
    attended,  # descriptor of (V, D) float16
    features,  # descriptor of (V, D) float16: input of the layer
    block_input,  # descriptor of (V, D) float16: input of the block, read by its last layer
    weights,  # descriptor of `weight_blocks`
    output,  # (V, D) float16
    qkv,  # (V, 3 D) float16, voxels in the order of the next layer's sets
    vectors,  # (10, D) float32
    up_bias,  # (F,) float32
    table,  # (cells, 3 D) float16 of the next layer: what each cell's position embedding and the bias add
    cell_of_voxel,  # (V,) int32
    position,  # (V,) int32, where in the order of the next layer's sets each voxel is
    num_voxels,  # (1,) int32
    ENDS_BLOCK: gl.constexpr,
    WITH_QKV: gl.constexpr,  # False after the last layer, which reads and writes none of the latter
):
    """Output projection, feed-forward network, residual sums and norms; then queries, keys and values.

    Rows beyond the number of voxels are not written.
    """
    # All programs, one a multiprocessor, have as many blocks as each other, or one more.
    count = gl.load(num_voxels)
    blocks = gl.cdiv(count, ROWS)
    program, programs = gl.program_id(0), gl.num_programs(0)
    first = program * blocks // programs
    end = (program + 1) * blocks // programs

    ring = gl.allocate_shared_memory(gl.float16, [STAGES * PARTS, CHUNK, CHUNK], SWIZZLED)
    # What was attended, and later the block's input; then the layer's input.
    rows = gl.allocate_shared_memory(gl.float16, [2 * 2 * PARTS, ROWS, CHUNK], SWIZZLED)
    # Parameters, in rows of CHUNK.
    vector_rows = _share(vectors, 10 * CHANNELS, 32)
    bias_rows = _share(up_bias, UP_PARTS * CHUNK, 8)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    arrived = gl.allocate_shared_memory(gl.int64, [2 * 3, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(free.index(slot), count=2)
    for which in gl.static_range(2 * 3):
        mbarrier.init(arrived.index(which), count=1)
    fence_async_shared()

    descriptors = (attended, features, block_input)
    parameters = (table, cell_of_voxel, position, count, output, qkv)
    buffers = (ring, rows, (vector_rows, bias_rows), full, free, arrived)
    kind: gl.constexpr = (ENDS_BLOCK, WITH_QKV)
    gl.warp_specialize(
        [
            (_first_consumer, (descriptors, parameters, buffers, first, end, kind)),
            (_second_consumer, (descriptors, parameters, buffers, first, end, kind)),
            (_produce, (weights, ring, full, free, first, end, WITH_QKV)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, OTHER_REGISTERS],
    )


@gluon.jit
def _share(values, count, LINES: gl.constexpr):
    """A copy of float32 parameters in shared memory, as rows of CHUNK."""
    at = gl.arange(0, LINES * CHUNK, FILL)
    flat = gl.allocate_shared_memory(
        gl.float32, [LINES * CHUNK], PLAIN, gl.load(values + at, mask=at < count, other=0.0)
    )
    return flat._reinterpret(gl.float32, [LINES, CHUNK], PLAIN)


@gluon.jit
def _produce(weights, ring, full, free, first, end, WITH_QKV: gl.constexpr):
    """Stream all weights once for each two blocks of rows."""
    tiles: gl.constexpr = FINISH_TILES + (QKV_TILES if WITH_QKV else 0)
    tile = 0
    for turn in range(gl.cdiv(end - first, 2) * tiles):
        slot = turn % full.shape[0]
        barrier = start_slot(full, free, turn, PARTS * BLOCK_BYTES)
        for part in gl.static_range(PARTS):
            source = (tile * PARTS + part) * CHUNK
            tma.async_copy_global_to_shared(weights, [source, 0], barrier, ring.index(slot * PARTS + part))
        tile = gl.where(tile == tiles - 1, 0, tile + 1)


@gluon.jit
def _first_consumer(descriptors, parameters, buffers, first, end, kind: gl.constexpr):
    _consume(0, descriptors, parameters, buffers, first, end, kind)


@gluon.jit
def _second_consumer(descriptors, parameters, buffers, first, end, kind: gl.constexpr):
    _consume(1, descriptors, parameters, buffers, first, end, kind)


@gluon.jit
def _consume(CONSUMER: gl.constexpr, descriptors, parameters, buffers, first, end, kind: gl.constexpr):
    """Every other block of rows of a program."""
    tiles: gl.constexpr = FINISH_TILES + (QKV_TILES if kind[1] else 0)
    _ring, _rows, _shared, full, free, _arrived = buffers
    if first + CONSUMER < end:
        _load_rows(CONSUMER, descriptors, buffers, (first + CONSUMER) * ROWS)
    for turn in range(gl.cdiv(end - first, 2)):
        block = first + 2 * turn + CONSUMER
        if block < end:
            _finish_block(CONSUMER, descriptors, parameters, buffers, block, end, turn, kind)
        else:
            # The last block has no partner: the producer still counts on both consumers.
            for tile in range(tiles):
                await_slot(full, turn * tiles + tile)
                release_slot(free, turn * tiles + tile)


@gluon.jit
def _finish_block(CONSUMER: gl.constexpr, descriptors, parameters, buffers, block, end, turn, kind: gl.constexpr):
    """ROWS rows."""
    ENDS_BLOCK: gl.constexpr = kind[0]
    WITH_QKV: gl.constexpr = kind[1]
    _attended, _features, block_input = descriptors
    table, cell_of_voxel, position, count, output, qkv = parameters
    ring, rows, shared, full, free, arrived = buffers
    tiles: gl.constexpr = FINISH_TILES + (QKV_TILES if WITH_QKV else 0)
    # Where this consumer's rows lie: what was attended, later the block's input; and the layer's input.
    first: gl.constexpr = CONSUMER * 2 * PARTS
    second: gl.constexpr = first + PARTS
    phase = turn & 1
    first_row = block * ROWS
    # Hides from the compiler what does not change from block to block: it would compute hundreds of addresses ahead of
    # the loop, for which there are no registers.
    zero = _opaque_zero(turn)
    tile = turn * tiles + zero

    mbarrier.wait(arrived.index(CONSUMER * 3), phase)
    sums = _project_attended(rows, first + zero, ring, full, free, tile)
    if ENDS_BLOCK:
        _load_part(block_input, first_row, rows, first, arrived.index(CONSUMER * 3 + 2))
    mbarrier.wait(arrived.index(CONSUMER * 3 + 1), phase)
    sums = _add_rows(_add_vector(sums, shared, OUT_BIAS + zero), rows, second + zero)
    x = _operands(_normalize(sums, shared, NORM + zero))

    sums = _feed_forward(x, shared, ring, full, free, tile + OUT_TILES, zero)
    row = first_row + gl.arange(0, ROWS, NATURAL_ROW)
    if WITH_QKV:
        cell = gl.load(cell_of_voxel + row, mask=row < count, other=0)
        place = gl.load(position + row, mask=row < count, other=0)
    if ENDS_BLOCK:
        mbarrier.wait(arrived.index(CONSUMER * 3 + 2), phase)
    # As published, the input is added once more around the layer, and around the block.
    norms: gl.constexpr = 4 if ENDS_BLOCK else 3
    # One copy of the code for all: both consumers' together must fit the instruction cache. The first adds nothing.
    for which in range(1, norms):
        source = gl.where(which == 3, first, second)
        factor = gl.where(which == 1, 0.0, 1.0)
        sums = _add_rows(sums, rows, source + zero, factor)
        sums = _normalize(sums, shared, NORM + 2 * which)
    # Once all threads have read these rows, the next ones may arrive.
    fence_async_shared()
    gl.thread_barrier()
    if block + 2 < end:
        _load_rows(CONSUMER, descriptors, buffers, first_row + 2 * ROWS)

    x = _operands(sums)
    inside = (row < count)[:, None]
    column = gl.arange(0, CHUNK, NATURAL_COLUMN)
    own = output + (row * CHANNELS)[:, None] + column[None, :]
    for n in gl.static_range(PARTS):
        gl.store(own + n * CHUNK, _natural(_sums(x[n])), mask=inside)
    if WITH_QKV:
        added = table + (cell * (3 * CHANNELS))[:, None] + column[None, :]
        own = qkv + (place * (3 * CHANNELS))[:, None] + column[None, :]
        for n in range(0, QKV_TILES, QKV_UNROLL):
            _project(
                x, added + n * CHUNK, own + n * CHUNK, inside, ring, full, free, tile + FINISH_TILES + n, QKV_UNROLL
            )


@gluon.jit
def _project_attended(rows, first, ring, full, free, tile):
    """Output projection."""
    sums = ()
    for n in gl.static_range(PARTS):
        slot = await_slot(full, tile + n)
        part = warpgroup_mma_init(gl.zeros([ROWS, CHUNK], gl.float32, SUMS))
        for k in gl.static_range(PARTS):
            part = warpgroup_mma(rows.index(first + k), _weight(ring, slot, k), part, is_async=True)
        sums = sums + (part,)
        if n > 0:
            # All products of the previous tile.
            warpgroup_mma_wait(PARTS, deps=(sums[n - 1],))
            release_slot(free, tile + n - 1)
    sums = warpgroup_mma_wait(0, deps=sums)
    release_slot(free, tile + PARTS - 1)
    return sums


@gluon.jit
def _feed_forward(x, shared, ring, full, free, tile, zero):
    """The feed-forward network, added to its input.

    The hidden features exist only CHUNK channels at a time. No product is under way where the loop closes: the compiler
    would serialize all of them.
    """
    sums = ()
    for part in gl.static_range(PARTS):
        sums = sums + (_sums(x[part]).to(gl.float32) + _vector(shared, (DOWN_BIAS + zero) * PARTS + part),)
    for j in range(UP_PARTS):
        up, down = tile + 2 * j, tile + 2 * j + 1
        bias = shared[1].index(j).load(BY_COLUMN)
        slot = await_slot(full, up)
        hidden = warpgroup_mma_wait(0, deps=(_multiply(x, gl.zeros([ROWS, CHUNK], gl.float32, SUMS), ring, slot),))
        release_slot(free, up)
        active = _operand(_gelu(hidden + bias[None, :]).to(gl.float16))
        slot = await_slot(full, down)
        added = ()
        for n in gl.static_range(PARTS):
            added = added + (warpgroup_mma(active, _weight(ring, slot, n), sums[n], is_async=True),)
        sums = warpgroup_mma_wait(0, deps=added)
        release_slot(free, down)
    return sums


@gluon.jit
def _project(x, added, target, inside, ring, full, free, tile, TILES: gl.constexpr):
    """TILES times CHUNK columns of the next layer's projections, at most two under way."""
    more = ()
    for n in gl.static_range(TILES):
        more = more + (gl.load(added + n * CHUNK),)
    zeros = gl.zeros([ROWS, CHUNK], gl.float32, SUMS)
    sums = _multiply(x, zeros, ring, await_slot(full, tile))
    for n in gl.static_range(TILES):
        if n + 1 < TILES:
            later = _multiply(x, zeros, ring, await_slot(full, tile + n + 1))
            sums = warpgroup_mma_wait(PARTS, deps=(sums,))
        else:
            sums = warpgroup_mma_wait(0, deps=(sums,))
        release_slot(free, tile + n)
        value = (sums + _paired_sums(more[n]).to(gl.float32)).to(gl.float16)
        gl.store(target + n * CHUNK, _natural(value), mask=inside)
        if n + 1 < TILES:
            sums = later


@gluon.jit
def _multiply(x, sums, ring, slot):
    """Begin to add products of rows and a tile of weights."""
    sums = warpgroup_mma_init(sums)
    for k in gl.static_range(PARTS):
        sums = warpgroup_mma(x[k], _weight(ring, slot, k), sums, is_async=True)
    return sums


@gluon.jit
def _weight(ring, slot, part):
    return ring.index(slot * PARTS + part).permute((1, 0))


@gluon.jit
def _opaque_zero(changing):
    """0, of which the compiler knows only that it comes from something that changes."""
    return gl.inline_asm_elementwise("and.b32 $0, $1, 0;", "=r,r", [changing], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _load_rows(CONSUMER: gl.constexpr, descriptors, buffers, first_row):
    """Fetch what was attended and the input of the layer."""
    attended, features, _block_input = descriptors
    _ring, rows, _shared, _full, _free, arrived = buffers
    _load_part(attended, first_row, rows, CONSUMER * 2 * PARTS, arrived.index(CONSUMER * 3))
    _load_part(features, first_row, rows, CONSUMER * 2 * PARTS + PARTS, arrived.index(CONSUMER * 3 + 1))


@gluon.jit
def _load_part(source, first_row, rows, FIRST: gl.constexpr, barrier):
    mbarrier.expect(barrier, PARTS * BLOCK_BYTES)
    for part in gl.static_range(PARTS):
        tma.async_copy_global_to_shared(source, [first_row, part * CHUNK], barrier, rows.index(FIRST + part))


@gluon.jit
def _natural(x):
    """A block in the layout of sums as one whose columns are in the order of memory; no data move."""
    x = x.reshape([ROWS, 2, 4, 4, 2]).permute((0, 1, 3, 2, 4)).reshape([ROWS, CHUNK])
    return gl.convert_layout(x, NATURAL)


@gluon.jit
def _paired_sums(x):
    """The inverse of `_natural`."""
    x = x.reshape([ROWS, 2, 4, 4, 2]).permute((0, 1, 3, 2, 4)).reshape([ROWS, CHUNK])
    return gl.convert_layout(x, SUMS)


@gluon.jit
def _vector(shared, line):
    """A vector's CHUNK elements for each row of sums."""
    x = shared[0].index(line).load(NATURAL_COLUMN).reshape([2, 4, 4, 2]).permute((0, 2, 1, 3)).reshape([CHUNK])
    return gl.convert_layout(x, BY_COLUMN, assert_trivial=True)[None, :]


@gluon.jit
def _sums(x):
    """An operand in the layout of sums."""
    return gl.convert_layout(x, SUMS, assert_trivial=True)


@gluon.jit
def _operand(x):
    # Sums and left operands lie in the same registers.
    return gl.convert_layout(x, OPERAND, assert_trivial=True)


@gluon.jit
def _operands(x):
    result = ()
    for part in gl.static_range(PARTS):
        result = result + (_operand(x[part].to(gl.float16)),)
    return result


@gluon.jit
def _normalize(x, shared, at):
    """Layer norm of rows."""
    mean = gl.sum(x[0] + x[1] + x[2], 1) / CHANNELS
    squares = gl.sum(x[0] * x[0] + x[1] * x[1] + x[2] * x[2], 1) / CHANNELS
    scale = gl.rsqrt(gl.maximum(squares - mean * mean, 0.0) + LAYER_NORM_EPS)
    shift = (-mean * scale)[:, None]
    scale = scale[:, None]
    result = ()
    for part in gl.static_range(PARTS):
        weight, bias = _vector(shared, at * PARTS + part), _vector(shared, (at + 1) * PARTS + part)
        result = result + ((x[part] * scale + shift) * weight + bias,)
    return result


@gluon.jit
def _add_vector(x, shared, which):
    result = ()
    for part in gl.static_range(PARTS):
        result = result + (x[part] + _vector(shared, which * PARTS + part),)
    return result


@gluon.jit
def _add_rows(x, rows, first, factor=1.0):
    result = ()
    for part in gl.static_range(PARTS):
        result = result + (x[part] + _paired_sums(rows.index(first + part).load(NATURAL)).to(gl.float32) * factor,)
    return result


@gluon.jit
def _gelu(x):
    """`set_attention._gelu`, with the clamp to 0 and 1 as part of the last addition."""
    p = _gelu_slope(gl.minimum(x * x, 16.0))
    below = gl.inline_asm_elementwise(
        "fma.rn.sat.f32 $0, $1, $2, 0f3F000000;", "=f,f,f", [p, x], dtype=gl.float32, is_pure=True, pack=1
    )
    return x * below
