"""3 by 3 convolutions of `convolution` from 128 to 128 channels for Hopper, where a map has something to convolve.

Maps are divided into tiles of 8 by 16 cells. Far from all voxels a convolution has the same result in every cell, so
only tiles near one are computed; others are filled. See `tiles.list_tiles`.

A program on each multiprocessor takes every so-many-th tile, two at a time. It has four parts:

- Two consumers, a warpgroup each, take one of the two tiles. Bias and residual are the first value of their sums.
- A producer, one warp, streams both tiles, shifted by each tap, and weights through a ring of shared memory. The
  weights serve both consumers. What lies beyond a map is zero: the copies see to that.
- One warp fills. It shares nothing with the others.

A slot of the ring is free once both consumers have read it, so they are at most a ring apart. Where the last tile has
no partner, its consumer lets the copies pass. Every output is written once, so repeated runs give the same bytes.
"""

from __future__ import annotations

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
from dsvt_ros.kernels.tiles import LIST_HEADER, TALL, WIDE

CHANNELS = gl.constexpr(128)
CHUNK = gl.constexpr(64)
CHUNKS = gl.constexpr(2)
STEPS = gl.constexpr(18)  # taps by chunks
ROWS = gl.constexpr(128)  # cells of a tile, TALL * WIDE
STAGES = gl.constexpr(4)
BLOCK_BYTES = gl.constexpr(128 * 64 * 2)

BOX = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3))
SUMS = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16]))
# A thread's sums are pairs of neighbouring columns, 8 apart. Weights are in such an order that these pairs are the
# neighbouring channels NATURAL: 8 of them, 16 bytes in memory, 32 apart.
NATURAL = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [0, 32], [0, 64], [8, 0], [64, 0]],
        lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[128, 128],
    )
)
HALF = gl.constexpr(  # NATURAL's CHUNK
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [0, 32], [8, 0], [64, 0]],
        lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[128, 64],
    )
)
BY_CELL = gl.constexpr(gl.SliceLayout(1, NATURAL))
BY_CHANNEL = gl.constexpr(gl.SliceLayout(0, NATURAL))
FILL = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [1, 1], [1, 0]))


def map_descriptor(rows: Tensor, width: int) -> TensorDescriptor:
    """Of (rows, 128) float16 cells of maps with `width`, read in tiles."""
    maps = rows.view(-1, width + 1, rows.shape[1])
    return TensorDescriptor.from_tensor(maps, [TALL.value, WIDE.value, CHUNK.value], BOX.value)


def weight_descriptor(rows: Tensor) -> TensorDescriptor:
    """Of `weight_rows`."""
    return TensorDescriptor.from_tensor(rows, [CHANNELS.value, CHUNK.value], SWIZZLED.value)


def weight_rows(matrix: Tensor) -> Tensor:
    """(K, channels out) weights as (channels out, K), with channels in the order of sums; see NATURAL."""
    ordered: Tensor = matrix.T.unflatten(0, (-1, 4, 4, 2)).transpose(1, 2).flatten(0, 3)
    return ordered.contiguous()


@gluon.jit
def convolve_tiles(
    x,  # descriptor of maps
    weights,  # descriptor of `weight_rows`
    bias,  # (128,) float32
    residual,  # descriptor of maps, added before the ReLU
    products,  # (voxels, PRODUCT_STRIDE) float16, likewise, where a cell has a voxel
    voxel_at,  # (rows,) int32: voxel in each cell, -1 for none
    output,  # (rows, 128) float16
    tiles,  # a list of `tiles.list_tiles`: those near are computed, the others filled
    constant,  # (128,) float16 to fill with
    height,
    width,
    num_tiles,
    PRODUCT_STRIDE: gl.constexpr,
    RESIDUAL: gl.constexpr,  # 0 none, 1 `residual`, 2 `products`
):
    """A 3 by 3 convolution of stride 1 with ReLU."""
    a = gl.allocate_shared_memory(gl.float16, [STAGES * 2, ROWS, CHUNK], SWIZZLED)
    b = gl.allocate_shared_memory(gl.float16, [STAGES, CHANNELS, CHUNK], SWIZZLED)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(free.index(slot), count=2)
    fence_async_shared()

    ring = (a, b, full, free)
    work = (tiles, gl.load(tiles), height, width)
    added = (bias, products, voxel_at)
    kind: gl.constexpr = (PRODUCT_STRIDE, RESIDUAL)
    gl.warp_specialize(
        [
            (_first_consumer, (ring, work, added, output, kind)),
            (_second_consumer, (ring, work, added, output, kind)),
            (_produce, (x, weights, residual, ring, work, kind)),
            (_fill, (constant, work, num_tiles, output)),
        ],
        [4, 1, 1],
        [CONSUMER_REGISTERS, OTHER_REGISTERS, OTHER_REGISTERS],
    )


@gluon.jit
def _corner(work, number):
    """Row of maps, row of the map and column of a tile's first cell."""
    tiles, _active, height, width = work
    tile = gl.load(tiles + LIST_HEADER + number)
    across = gl.cdiv(width + 1, WIDE)
    down = gl.cdiv(height + 1, TALL)
    y = tile // across % down * TALL
    return tile // (across * down) * (height + 1) + y, y, tile % across * WIDE


@gluon.jit
def _produce(x, weights, residual, ring, work, kind: gl.constexpr):
    """Stream tiles and weights for each two tiles; for a last one without a partner, itself once more."""
    a, b, full, free = ring
    _tiles, active, _height, _width = work
    programs = gl.num_programs(0)
    turn = 0
    for number in range(gl.program_id(0), active, 2 * programs):
        first_row, _y, first_x = _corner(work, number)
        partner = number + gl.where(number + programs < active, programs, 0)
        second_row, _y, second_x = _corner(work, partner)
        if kind[1] == 1:
            for chunk in range(CHUNKS):
                barrier = start_slot(full, free, turn, 2 * BLOCK_BYTES)
                place = 2 * (turn % STAGES)
                channel = chunk * CHUNK
                tma.async_copy_global_to_shared(residual, [first_row, first_x, channel], barrier, _box(a, place))
                tma.async_copy_global_to_shared(residual, [second_row, second_x, channel], barrier, _box(a, place + 1))
                turn += 1
        for step in range(STEPS):
            barrier = start_slot(full, free, turn, 3 * BLOCK_BYTES)
            place = 2 * (turn % STAGES)
            down = step // (3 * CHUNKS) - 1
            right = step // CHUNKS % 3 - 1
            channel = step % CHUNKS * CHUNK
            tma.async_copy_global_to_shared(x, [first_row + down, first_x + right, channel], barrier, _box(a, place))
            tma.async_copy_global_to_shared(weights, [0, step * CHUNK], barrier, b.index(turn % STAGES))
            tma.async_copy_global_to_shared(
                x, [second_row + down, second_x + right, channel], barrier, _box(a, place + 1)
            )
            turn += 1


@gluon.jit
def _box(a, place):
    return a.index(place)._reinterpret(gl.float16, [TALL, WIDE, CHUNK], BOX)


@gluon.jit
def _fill(constant, work, num_tiles, output):
    """Fill the tiles far from all voxels; none of them has a cell of the padding."""
    _tiles, active, _height, width = work
    x = gl.arange(0, WIDE, gl.SliceLayout(1, FILL))
    channel = gl.arange(0, CHANNELS, gl.SliceLayout(0, FILL))
    value = gl.load(constant + channel)[None, :] + gl.zeros([WIDE, CHANNELS], gl.float16, FILL)
    for number in range(active + gl.program_id(0), num_tiles, gl.num_programs(0)):
        first_row, _y, first_x = _corner(work, number)
        for y in range(TALL):
            cell = (first_row + y) * (width + 1) + first_x + x
            gl.store(output + cell[:, None] * CHANNELS + channel[None, :], value)


@gluon.jit
def _first_consumer(ring, work, added, output, kind: gl.constexpr):
    _consume(0, ring, work, added, output, kind)


@gluon.jit
def _second_consumer(ring, work, added, output, kind: gl.constexpr):
    _consume(1, ring, work, added, output, kind)


@gluon.jit
def _consume(CONSUMER: gl.constexpr, ring, work, added, output, kind: gl.constexpr):
    """Every other tile of a program."""
    _a, _b, full, free = ring
    _tiles, active, _height, _width = work
    turns: gl.constexpr = STEPS + (CHUNKS if kind[1] == 1 else 0)
    turn = 0
    for first in range(gl.program_id(0), active, 2 * gl.num_programs(0)):
        number = first + CONSUMER * gl.num_programs(0)
        if number < active:
            _convolve_tile(CONSUMER, ring, work, added, output, number, turn, kind)
        else:
            for passed in range(turn, turn + turns):
                await_slot(full, passed)
                release_slot(free, passed)
        turn += turns


@gluon.jit
def _convolve_tile(CONSUMER: gl.constexpr, ring, work, added, output, number, turn, kind: gl.constexpr):
    a, b, full, free = ring
    bias, products, voxel_at = added
    _tiles, _active, height, width = work
    PRODUCT_STRIDE: gl.constexpr = kind[0]
    RESIDUAL: gl.constexpr = kind[1]

    first_row, first_y, first_x = _corner(work, number)
    cell = gl.arange(0, ROWS, BY_CELL)
    channel = gl.arange(0, CHANNELS, BY_CHANNEL)
    y = cell // WIDE
    x = first_x + cell % WIDE
    row = (first_row + y) * (width + 1) + x
    inside = (x < width) & (first_y + y < height)
    start = gl.load(bias + channel)[None, :] + gl.zeros([ROWS, CHANNELS], gl.float32, NATURAL)
    if RESIDUAL == 1:
        left = _take(CONSUMER, ring, turn)
        right = _take(CONSUMER, ring, turn + 1)
        turn += CHUNKS
        both = gl.join(left, right).permute((0, 2, 1)).reshape([ROWS, CHANNELS])
        start += gl.convert_layout(both, NATURAL, assert_trivial=True).to(gl.float32)
    if RESIDUAL == 2:
        voxel = gl.load(voxel_at + row, mask=inside, other=-1)
        more = products + voxel[:, None] * PRODUCT_STRIDE + channel[None, :]
        start += gl.load(more, mask=(voxel >= 0)[:, None], other=0.0).to(gl.float32)
    sums = warpgroup_mma_init(_paired(start))
    for step in range(STEPS):
        slot = await_slot(full, turn + step)
        sums = warpgroup_mma(a.index(2 * slot + CONSUMER), b.index(slot).permute((1, 0)), sums, is_async=True)
        # All products of the step before, whose slot is free then.
        sums = warpgroup_mma_init(warpgroup_mma_wait(1, deps=(sums,)))
        gl.thread_barrier()
        mbarrier.arrive(free.index((turn + step + STAGES - 1) % STAGES), count=1, pred=step > 0)
    sums = warpgroup_mma_wait(0, deps=(sums,))
    release_slot(free, turn + STEPS - 1)
    value = gl.where(inside[:, None], _natural(gl.maximum(sums, 0.0).to(gl.float16)), 0.0)
    written = (x <= width) & (first_y + y <= height)
    gl.store(output + row[:, None] * CHANNELS + channel[None, :], value, mask=written[:, None])


@gluon.jit
def _take(CONSUMER: gl.constexpr, ring, turn):
    """A block of the ring in registers."""
    a, _b, full, free = ring
    slot = await_slot(full, turn)
    block = a.index(2 * slot + CONSUMER).load(HALF)
    # Loads may be under way beyond a barrier of threads; a copy could overtake them.
    fence_async_shared()
    release_slot(free, turn)
    return block


@gluon.jit
def _natural(x):
    """A block in the layout of sums as one whose columns are in the order of memory; no data move."""
    x = x.reshape([ROWS, CHANNELS // 32, 4, 4, 2]).permute((0, 1, 3, 2, 4)).reshape([ROWS, CHANNELS])
    return gl.convert_layout(x, NATURAL, assert_trivial=True)


@gluon.jit
def _paired(x):
    """The inverse of `_natural`."""
    x = x.reshape([ROWS, CHANNELS // 32, 4, 4, 2]).permute((0, 1, 3, 2, 4)).reshape([ROWS, CHANNELS])
    return gl.convert_layout(x, SUMS, assert_trivial=True)
