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

STAGES = gl.constexpr(4)  # tiles of the ring, a power of two
STAGED = gl.constexpr(2)  # blocks of a consumer on their way to memory, another one
BLOCK_BYTES = gl.constexpr(64 * 64 * 2)

# Registers a thread: 3 warpgroups of 168 are what a multiprocessor has; most go to the consumers.
NUM_WARPS = 4
MAX_REGISTERS = 168
CONSUMER_REGISTERS = gl.constexpr(240)
PRODUCER_REGISTERS = gl.constexpr(24)

# Rows of `vectors`; see `set_attention`.
OUT_BIAS = gl.constexpr(0)
DOWN_BIAS = gl.constexpr(1)
NORM = gl.constexpr(2)
LAYER_NORM_EPS = gl.constexpr(1e-5)

SUMS = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16]))
OPERAND = gl.constexpr(gl.DotOperandLayout(operand_index=0, parent=SUMS, k_width=2))
BY_ROW = gl.constexpr(gl.SliceLayout(1, SUMS))
BY_COLUMN = gl.constexpr(gl.SliceLayout(0, SUMS))
SWIZZLED = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))


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
    tiles = [*_blocks(out)]
    for first, second in zip(_blocks(up), _blocks(down).transpose(0, 1), strict=True):
        tiles += [first, second]
    if qkv is not None:
        tiles += [*_blocks(qkv)]
    return torch.stack(tiles).to(torch.float16).flatten(0, 2).contiguous()


def _blocks(weight: Tensor) -> Tensor:
    """(N, K) as (N / CHUNK, K / CHUNK, CHUNK, CHUNK)."""
    chunk = CHUNK.value
    rows, columns = weight.shape
    return weight.detach().view(rows // chunk, chunk, columns // chunk, chunk).transpose(1, 2)


@gluon.jit
def finish_and_project(
    attended,  # descriptor of (V, D) float16
    features,  # descriptor of (V, D) float16: input of the layer
    block_input,  # descriptor of (V, D) float16: input of the block, read by its last layer
    weights,  # descriptor of `weight_blocks`
    output,  # descriptor of (V, D) float16
    qkv,  # descriptor of (V, 3 D) float16
    vectors,  # (10, D) float32
    up_bias,  # (F,) float32
    table,  # (cells, 3 D) float16 of the next layer: what each cell's position embedding and the bias add
    cell_of_voxel,  # (V,) int32
    num_voxels,  # (1,) int32
    ENDS_BLOCK: gl.constexpr,
    WITH_QKV: gl.constexpr,  # False after the last layer, which reads and writes none of the latter
    AHEAD: gl.constexpr = False,  # see `_feed_forward`
):
    """Output projection, feed-forward network, residual sums and norms; then queries, keys and values.

    Rows beyond the number of voxels are written up to the next multiple of ROWS, with values of no meaning.
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
    staging = gl.allocate_shared_memory(gl.float16, [2 * STAGED, ROWS, CHUNK], SWIZZLED)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    arrived = gl.allocate_shared_memory(gl.int64, [2 * 3, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(free.index(slot), count=2)
    for which in gl.static_range(2 * 3):
        mbarrier.init(arrived.index(which), count=1)
    fence_async_shared()

    descriptors = (attended, features, block_input, output, qkv)
    parameters = (vectors, up_bias, table, cell_of_voxel, count)
    buffers = (ring, rows, staging, full, free, arrived)
    gl.warp_specialize(
        [
            (_first_consumer, (descriptors, parameters, buffers, first, end, ENDS_BLOCK, WITH_QKV, AHEAD)),
            (_second_consumer, (descriptors, parameters, buffers, first, end, ENDS_BLOCK, WITH_QKV, AHEAD)),
            (_produce, (weights, ring, full, free, first, end, WITH_QKV)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


@gluon.jit
def _produce(weights, ring, full, free, first, end, WITH_QKV: gl.constexpr):
    """Stream all weights once for each two blocks of rows."""
    tiles: gl.constexpr = FINISH_TILES + (QKV_TILES if WITH_QKV else 0)
    tile = 0
    for turn in range(gl.cdiv(end - first, 2) * tiles):
        slot = turn & STAGES - 1
        barrier = full.index(slot)
        # A barrier that was never used counts as past its phase 1, so the first turn of each slot does not wait.
        mbarrier.wait(free.index(slot), turn // STAGES & 1 ^ 1)
        mbarrier.expect(barrier, PARTS * BLOCK_BYTES)
        for part in gl.static_range(PARTS):
            source = (tile * PARTS + part) * CHUNK
            tma.async_copy_global_to_shared(weights, [source, 0], barrier, ring.index(slot * PARTS + part))
        tile = gl.where(tile == tiles - 1, 0, tile + 1)


@gluon.jit
def _first_consumer(
    descriptors, parameters, buffers, first, end, ENDS_BLOCK: gl.constexpr, WITH_QKV: gl.constexpr, AHEAD: gl.constexpr
):
    _consume(0, descriptors, parameters, buffers, first, end, ENDS_BLOCK, WITH_QKV, AHEAD)


@gluon.jit
def _second_consumer(
    descriptors, parameters, buffers, first, end, ENDS_BLOCK: gl.constexpr, WITH_QKV: gl.constexpr, AHEAD: gl.constexpr
):
    _consume(1, descriptors, parameters, buffers, first, end, ENDS_BLOCK, WITH_QKV, AHEAD)


@gluon.jit
def _consume(
    CONSUMER: gl.constexpr,
    descriptors,
    parameters,
    buffers,
    first,
    end,
    ENDS_BLOCK: gl.constexpr,
    WITH_QKV: gl.constexpr,
    AHEAD: gl.constexpr,
):
    """Every other block of rows of a program."""
    tiles: gl.constexpr = FINISH_TILES + (QKV_TILES if WITH_QKV else 0)
    _ring, _rows, _staging, full, free, _arrived = buffers
    block = first + CONSUMER
    if block < end:
        _load_rows(CONSUMER, descriptors, buffers, block * ROWS)
    for turn in range(gl.cdiv(end - first, 2)):
        if block < end:
            _finish_block(CONSUMER, descriptors, parameters, buffers, block, end, turn, ENDS_BLOCK, WITH_QKV, AHEAD)
        else:
            # The last block has no partner: the producer still counts on both consumers.
            for tile in range(tiles):
                _await_tile(full, turn * tiles + tile)
                _release_tile(free, turn * tiles + tile)
        block += 2
    tma.store_wait(0)


@gluon.jit
def _finish_block(
    CONSUMER: gl.constexpr,
    descriptors,
    parameters,
    buffers,
    block,
    end,
    turn,
    ENDS_BLOCK: gl.constexpr,
    WITH_QKV: gl.constexpr,
    AHEAD: gl.constexpr,
):
    """ROWS rows."""
    _attended, _features, block_input, output, qkv = descriptors
    vectors, up_bias, table, cell_of_voxel, count = parameters
    ring, rows, staging, full, free, arrived = buffers
    tiles: gl.constexpr = FINISH_TILES + (QKV_TILES if WITH_QKV else 0)
    # Where this consumer's rows lie: what was attended, later the block's input; and the layer's input.
    first: gl.constexpr = CONSUMER * 2 * PARTS
    second: gl.constexpr = first + PARTS
    phase = turn & 1
    first_row = block * ROWS
    # Hides from the compiler what does not change from block to block: it would compute hundreds of addresses ahead of
    # the loop, for which there are no registers.
    zero = _opaque_zero(turn)
    vectors += zero * CHUNK
    tile = turn * tiles + zero

    if WITH_QKV:
        row = first_row + gl.arange(0, ROWS, BY_ROW)
        cell = gl.load(cell_of_voxel + row, mask=row < count, other=0)
    mbarrier.wait(arrived.index(CONSUMER * 3), phase)
    sums = _project_attended(rows, first + zero, ring, full, free, tile)
    if ENDS_BLOCK:
        _load_part(block_input, first_row, rows, first, arrived.index(CONSUMER * 3 + 2))
    mbarrier.wait(arrived.index(CONSUMER * 3 + 1), phase)
    sums = _add_rows(_add_bias(sums, vectors + OUT_BIAS * CHANNELS), rows, second + zero)
    x = _operands(_normalize(sums, vectors, 0))

    sums = _feed_forward(x, up_bias, ring, full, free, tile + OUT_TILES, AHEAD)
    sums = _add_bias(_add_operands(sums, x), vectors + DOWN_BIAS * CHANNELS)
    sums = _normalize(sums, vectors, 1)

    # As published, the input is added once more around the layer, and around the block.
    sums = _normalize(_add_rows(sums, rows, second + zero), vectors, 2)
    if ENDS_BLOCK:
        mbarrier.wait(arrived.index(CONSUMER * 3 + 2), phase)
        sums = _normalize(_add_rows(sums, rows, first + zero), vectors, 3)
    # Once all threads have read these rows, the next ones may arrive.
    fence_async_shared()
    gl.thread_barrier()
    if block + 2 < end:
        _load_rows(CONSUMER, descriptors, buffers, first_row + 2 * ROWS)

    x = _operands(sums)
    store = turn * (PARTS + (QKV_TILES if WITH_QKV else 0))
    for n in gl.static_range(PARTS):
        _store(output, first_row, n * CHUNK, _sums(x[n]), staging.index(CONSUMER * STAGED + (store + n & STAGED - 1)))
    if WITH_QKV:
        added = table + cell * (3 * CHANNELS)
        for n in range(QKV_TILES):
            value = _project(x, added + n * CHUNK, ring, full, free, tile + FINISH_TILES + n)
            buffer = CONSUMER * STAGED + (store + PARTS + n & STAGED - 1)
            _store(qkv, first_row, n * CHUNK, value, staging.index(buffer))


@gluon.jit
def _project_attended(rows, first, ring, full, free, tile):
    """Output projection."""
    sums = ()
    for n in gl.static_range(PARTS):
        slot = _await_tile(full, tile + n)
        part = warpgroup_mma_init(gl.zeros([ROWS, CHUNK], gl.float32, SUMS))
        for k in gl.static_range(PARTS):
            part = warpgroup_mma(rows.index(first + k), _weight(ring, slot, k), part, is_async=True)
        sums = sums + (part,)
        if n > 0:
            # All products of the previous tile.
            warpgroup_mma_wait(PARTS, deps=(sums[n - 1],))
            _release_tile(free, tile + n - 1)
    sums = warpgroup_mma_wait(0, deps=sums)
    _release_tile(free, tile + PARTS - 1)
    return sums


@gluon.jit
def _feed_forward(x, up_bias, ring, full, free, tile, AHEAD: gl.constexpr):
    """The feed-forward network, without the bias of its down projection.

    The hidden features exist only CHUNK channels at a time. No product is under way where the loop closes: the compiler
    would serialize all of them.
    """
    sums = ()
    for _ in gl.static_range(PARTS):
        sums = sums + (gl.zeros([ROWS, CHUNK], gl.float32, SUMS),)
    if AHEAD:
        # The next hidden features are queued right behind the down projection of these.
        hidden = warpgroup_mma_wait(0, deps=(_multiply(x, ring, _await_tile(full, tile)),))
        _release_tile(free, tile)
        for j in range(UP_PARTS - 1):
            down, up = tile + 2 * j + 1, tile + 2 * j + 2
            added = _add_down(sums, _activate(hidden, up_bias, j), ring, _await_tile(full, down))
            more = _multiply(x, ring, _await_tile(full, up))
            sums = warpgroup_mma_wait(PARTS, deps=added)
            _release_tile(free, down)
            hidden = warpgroup_mma_wait(0, deps=(more,))
            _release_tile(free, up)
        last = tile + 2 * UP_PARTS - 1
        active = _activate(hidden, up_bias, UP_PARTS - 1)
        sums = warpgroup_mma_wait(0, deps=_add_down(sums, active, ring, _await_tile(full, last)))
        _release_tile(free, last)
    else:
        for j in range(UP_PARTS):
            up, down = tile + 2 * j, tile + 2 * j + 1
            hidden = warpgroup_mma_wait(0, deps=(_multiply(x, ring, _await_tile(full, up)),))
            _release_tile(free, up)
            added = _add_down(sums, _activate(hidden, up_bias, j), ring, _await_tile(full, down))
            sums = warpgroup_mma_wait(0, deps=added)
            _release_tile(free, down)
    return sums


@gluon.jit
def _activate(hidden, up_bias, j):
    bias = gl.load(up_bias + (j + _opaque_zero(j)) * CHUNK + gl.arange(0, CHUNK, BY_COLUMN))
    return _operand(_gelu(hidden + bias[None, :]).to(gl.float16))


@gluon.jit
def _add_down(sums, active, ring, slot):
    """Begin to add the down projection of CHUNK hidden channels."""
    added = ()
    for n in gl.static_range(PARTS):
        added = added + (warpgroup_mma(active, _weight(ring, slot, n), sums[n], is_async=True),)
    return added


@gluon.jit
def _project(x, added, ring, full, free, tile):
    """CHUNK columns of the next layer's projections."""
    more = gl.load(added[:, None] + gl.arange(0, CHUNK, BY_COLUMN)[None, :])
    sums = _multiply(x, ring, _await_tile(full, tile))
    sums = warpgroup_mma_wait(0, deps=(sums,))
    _release_tile(free, tile)
    return (sums + more.to(gl.float32)).to(gl.float16)


@gluon.jit
def _multiply(x, ring, slot):
    """Begin to multiply rows by a tile of weights."""
    sums = warpgroup_mma_init(gl.zeros([ROWS, CHUNK], gl.float32, SUMS))
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
def _await_tile(full, tile):
    slot = tile & STAGES - 1
    mbarrier.wait(full.index(slot), tile // STAGES & 1)
    return slot


@gluon.jit
def _release_tile(free, tile):
    # Of one thread: all four warps must have come this far.
    gl.thread_barrier()
    mbarrier.arrive(free.index(tile & STAGES - 1), count=1)


@gluon.jit
def _load_rows(CONSUMER: gl.constexpr, descriptors, buffers, first_row):
    """Fetch what was attended and the input of the layer."""
    attended, features, _block_input, _output, _qkv = descriptors
    _ring, rows, _staging, _full, _free, arrived = buffers
    _load_part(attended, first_row, rows, CONSUMER * 2 * PARTS, arrived.index(CONSUMER * 3))
    _load_part(features, first_row, rows, CONSUMER * 2 * PARTS + PARTS, arrived.index(CONSUMER * 3 + 1))


@gluon.jit
def _load_part(source, first_row, rows, FIRST: gl.constexpr, barrier):
    mbarrier.expect(barrier, PARTS * BLOCK_BYTES)
    for part in gl.static_range(PARTS):
        tma.async_copy_global_to_shared(source, [first_row, part * CHUNK], barrier, rows.index(FIRST + part))


@gluon.jit
def _store(target, first_row, first_column, value, buffer):
    """Write a block by way of shared memory."""
    # The store before the last one has left the same buffer.
    tma.store_wait(STAGED - 1)
    gl.thread_barrier()
    buffer.store(value)
    fence_async_shared()
    gl.thread_barrier()
    tma.async_copy_shared_to_global(target, [first_row, first_column], buffer)


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
def _normalize(x, vectors, WHICH: gl.constexpr):
    """Layer norm of rows."""
    mean = (gl.sum(x[0] + x[1] + x[2], 1) / CHANNELS)[:, None]
    centred = (x[0] - mean, x[1] - mean, x[2] - mean)
    squares = centred[0] * centred[0] + centred[1] * centred[1] + centred[2] * centred[2]
    scale = gl.rsqrt(gl.sum(squares, 1) / CHANNELS + LAYER_NORM_EPS)[:, None]
    column = gl.arange(0, CHUNK, BY_COLUMN)
    result = ()
    for part in gl.static_range(PARTS):
        at = vectors + (NORM + 2 * WHICH) * CHANNELS + part * CHUNK + column
        weight, bias = gl.load(at), gl.load(at + CHANNELS)
        result = result + (centred[part] * scale * weight[None, :] + bias[None, :],)
    return result


@gluon.jit
def _add_bias(x, bias):
    column = gl.arange(0, CHUNK, BY_COLUMN)
    result = ()
    for part in gl.static_range(PARTS):
        result = result + (x[part] + gl.load(bias + part * CHUNK + column)[None, :],)
    return result


@gluon.jit
def _add_rows(x, rows, first):
    result = ()
    for part in gl.static_range(PARTS):
        result = result + (x[part] + rows.index(first + part).load(SUMS).to(gl.float32),)
    return result


@gluon.jit
def _add_operands(x, more):
    result = ()
    for part in gl.static_range(PARTS):
        result = result + (x[part] + _sums(more[part]).to(gl.float32),)
    return result


@gluon.jit
def _gelu(x):
    """`set_attention._gelu`, with the clamp to 0 and 1 as part of the last addition."""
    u = gl.minimum(x * x, 16.0)
    p = 2.25881986e-08 * u - 1.58882664e-06
    p = p * u + 4.77638772e-05
    p = p * u - 0.000812187386
    p = p * u + 0.00876369061
    p = p * u - 0.0645544115
    p = p * u + 0.397870266
    below = gl.inline_asm_elementwise(
        "fma.rn.sat.f32 $0, $1, $2, 0f3F000000;", "=f,f,f", [p, x], dtype=gl.float32, is_pure=True, pack=1
    )
    return x * below
