"""3 by 3 convolutions with ReLU to 64 channels for Hopper, as in CenterHead.

A map is divided into tiles of 8 by 16 cells. Channels are the rows of a product and cells its columns: few channels
keep tensor cores as busy as many cells do. Three boxes of a tile and the rows of cells above and below it, shifted
by the taps left, middle and right, serve all nine taps: a tap above or below begins a row of cells earlier or later.

A program on each multiprocessor takes every so-many-th tile, two at a time. It has three parts:

- Two consumers, a warpgroup each, take one of the two tiles.
- A producer, one warp, streams boxes through one ring of shared memory and weights, which serve both consumers,
  through another. Weights that fit there are read once. What lies beyond a map is zero: the copies see to that.

Where the last tile has no partner, its consumer lets the weights pass. Every output is written once, so repeated runs
give the same bytes.
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
from dsvt_ros.kernels.tiles import TALL, WIDE

CHANNELS = gl.constexpr(64)
CHUNK = gl.constexpr(64)
CELLS = gl.constexpr(128)  # of a tile, TALL * WIDE
MARGIN = gl.constexpr(2)  # rows of cells above and below a tile
BOX_TALL = gl.constexpr(10)  # TALL + MARGIN
BOX_BYTES = gl.constexpr(10 * 16 * 64 * 2)
WEIGHT_BYTES = gl.constexpr(3 * 64 * 64 * 2)
WEIGHTS = gl.constexpr(3)  # slots of the ring of weights

# Slots of the ring of boxes, as many as there is room for beside what a tile ends with. An even number: a consumer has
# slots of its own then. It may wait for a phase of a barrier only if it has seen the phase before.
BOXES_TO_ROWS = 6
BOXES_TO_PRODUCTS = 4

BOX = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4))
SUMS = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16]))
BY_CHANNEL = gl.constexpr(gl.SliceLayout(1, SUMS))
BY_CELL = gl.constexpr(gl.SliceLayout(0, SUMS))


def map_descriptor(rows: Tensor, height: int, width: int, tall: int = TALL.value) -> TensorDescriptor:
    """Of (rows, channels) float16 cells of maps, in boxes of so many rows of cells."""
    maps = rows.view(-1, height + 1, width + 1, rows.shape[1])
    return TensorDescriptor.from_tensor(maps, [1, tall, WIDE.value, CHUNK.value], BOX.value)


def margin_descriptor(rows: Tensor, height: int, width: int) -> TensorDescriptor:
    """Likewise, in boxes as tall as what is above and below a tile."""
    return map_descriptor(rows, height, width, MARGIN.value)


def weight_descriptor(rows: Tensor) -> TensorDescriptor:
    """Of (64, K) float16 weights, those of a channel out in a row."""
    return TensorDescriptor.from_tensor(rows, [CHANNELS.value, CHUNK.value], SWIZZLED.value)


@gluon.jit
def convolve_tiles(
    x,  # descriptor of maps, boxes of TALL
    margin,  # likewise, boxes of MARGIN
    weights,  # descriptor of weights
    bias,  # (64,) float32
    output,  # descriptor of maps, boxes of TALL
    taps,  # descriptor of (64, 64) weights: a channel in a row for each tap and class
    products,  # (tiles, PRODUCTS, 128) float32: `taps` times each cell, written in place of `output`
    height,
    width,
    num_tiles,
    CIN: gl.constexpr,
    PRODUCTS: gl.constexpr,  # 0 where `output` is written
    BOXES: gl.constexpr,  # slots of the ring of boxes
):
    """A 3 by 3 convolution of stride 1 with ReLU."""
    gl.static_assert(BOXES % 2 == 0)
    boxes = gl.allocate_shared_memory(gl.float16, [BOXES * BOX_TALL, WIDE, CHUNK], SWIZZLED)
    slices = gl.allocate_shared_memory(gl.float16, [WEIGHTS * 3, CHANNELS, CHUNK], SWIZZLED)
    results = gl.allocate_shared_memory(gl.float16, [2, CELLS, CHANNELS], SWIZZLED)
    last = gl.allocate_shared_memory(gl.float16, [1, CHANNELS, CHUNK], SWIZZLED) if PRODUCTS else results
    barriers: gl.constexpr = mbarrier.MBarrierLayout()
    boxes_full = gl.allocate_shared_memory(gl.int64, [BOXES, 1], barriers)
    boxes_free = gl.allocate_shared_memory(gl.int64, [BOXES, 1], barriers)
    slices_full = gl.allocate_shared_memory(gl.int64, [WEIGHTS, 1], barriers)
    slices_free = gl.allocate_shared_memory(gl.int64, [WEIGHTS, 1], barriers)
    last_full = gl.allocate_shared_memory(gl.int64, [1, 1], barriers)
    for slot in gl.static_range(BOXES):
        mbarrier.init(boxes_full.index(slot), count=1)
        mbarrier.init(boxes_free.index(slot), count=1)
    for slot in gl.static_range(WEIGHTS):
        mbarrier.init(slices_full.index(slot), count=1)
        mbarrier.init(slices_free.index(slot), count=2)
    mbarrier.init(last_full.index(0), count=1)
    fence_async_shared()

    inputs = (boxes, boxes_full, boxes_free)
    factors = (slices, slices_full, slices_free)
    rest = (last, last_full, results)
    work = (num_tiles, height, width)
    target = (bias, output, products)
    kind: gl.constexpr = (CIN // CHUNK, PRODUCTS, BOXES)
    gl.warp_specialize(
        [
            (_first_consumer, (inputs, factors, rest, work, target, kind)),
            (_second_consumer, (inputs, factors, rest, work, target, kind)),
            (_produce, (x, margin, weights, taps, inputs, factors, rest, work, kind)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, OTHER_REGISTERS],
    )


@gluon.jit
def _corner(work, number):
    """Map, row and column of a tile's first cell."""
    _num_tiles, height, width = work
    across = gl.cdiv(width + 1, WIDE)
    down = gl.cdiv(height + 1, TALL)
    return number // (across * down), number // across % down * TALL, number % across * WIDE


@gluon.jit
def _produce(x, margin, weights, taps, inputs, factors, rest, work, kind: gl.constexpr):
    """Stream boxes and weights for each two tiles."""
    CHUNKS: gl.constexpr = kind[0]
    BOXES: gl.constexpr = kind[2]
    slices, full, free = factors
    last, last_full, _results = rest
    num_tiles, _height, _width = work
    programs = gl.num_programs(0)
    if kind[1] > 0:
        mbarrier.expect(last_full.index(0), WEIGHT_BYTES // 3)
        tma.async_copy_global_to_shared(taps, [0, 0], last_full.index(0), last.index(0))
    step = 0
    for number in range(gl.program_id(0), num_tiles, 2 * programs):
        for chunk in range(CHUNKS):
            for right in range(3):
                _copy_box(x, margin, inputs, 2 * step, work, number, right, chunk, BOXES)
                if CHUNKS > 1 or step < WEIGHTS:
                    barrier = start_slot(full, free, step, WEIGHT_BYTES)
                    for down in gl.static_range(3):
                        tap = (3 * down + right) * CHUNKS + chunk
                        place = step % WEIGHTS * 3 + down
                        tma.async_copy_global_to_shared(weights, [0, tap * CHUNK], barrier, slices.index(place))
                if number + programs < num_tiles:
                    _copy_box(x, margin, inputs, 2 * step + 1, work, number + programs, right, chunk, BOXES)
                step += 1


@gluon.jit
def _copy_box(x, margin, inputs, turn, work, number, right, chunk, BOXES: gl.constexpr):
    boxes, full, free = inputs
    batch, first_y, first_x = _corner(work, number)
    barrier = start_slot(full, free, turn, BOX_BYTES)
    row = turn % BOXES * BOX_TALL
    first_x += right - 1
    channel = chunk * CHUNK
    box = boxes.index(row)._reinterpret(gl.float16, [1, TALL, WIDE, CHUNK], BOX)
    tma.async_copy_global_to_shared(x, [batch, first_y - 1, first_x, channel], barrier, box)
    box = boxes.index(row + TALL)._reinterpret(gl.float16, [1, MARGIN, WIDE, CHUNK], BOX)
    tma.async_copy_global_to_shared(margin, [batch, first_y - 1 + TALL, first_x, channel], barrier, box)


@gluon.jit
def _first_consumer(inputs, factors, rest, work, target, kind: gl.constexpr):
    _consume(0, inputs, factors, rest, work, target, kind)


@gluon.jit
def _second_consumer(inputs, factors, rest, work, target, kind: gl.constexpr):
    _consume(1, inputs, factors, rest, work, target, kind)


@gluon.jit
def _consume(CONSUMER: gl.constexpr, inputs, factors, rest, work, target, kind: gl.constexpr):
    """Every other tile of a program."""
    CHUNKS: gl.constexpr = kind[0]
    num_tiles, _height, _width = work
    _slices, full, free = factors
    step = 0
    for first in range(gl.program_id(0), num_tiles, 2 * gl.num_programs(0)):
        number = first + CONSUMER * gl.num_programs(0)
        if number < num_tiles:
            sums = _convolve_tile(CONSUMER, inputs, factors, target, step, kind)
            _finish(CONSUMER, rest, work, target, number, sums, kind)
        elif CHUNKS > 1:
            for passed in range(step, step + 3 * CHUNKS):
                await_slot(full, passed)
                release_slot(free, passed)
        step += 3 * CHUNKS
    tma.store_wait(0)


@gluon.jit
def _convolve_tile(CONSUMER: gl.constexpr, inputs, factors, target, first_step, kind: gl.constexpr):
    CHUNKS: gl.constexpr = kind[0]
    BOXES: gl.constexpr = kind[2]
    boxes, boxes_full, boxes_free = inputs
    slices, full, free = factors
    bias, _output, _products = target
    channel = gl.arange(0, CHANNELS, BY_CHANNEL)
    start = gl.load(bias + channel)[:, None] + gl.zeros([CHANNELS, CELLS], gl.float32, SUMS)
    sums = warpgroup_mma_init(start)
    for step in range(first_step, first_step + 3 * CHUNKS):
        turn = 2 * step + CONSUMER
        await_slot(boxes_full, turn)
        # Weights that are read once are there from the first phase on.
        mbarrier.wait(full.index(step % WEIGHTS), step // WEIGHTS & 1 if CHUNKS > 1 else 0)
        for down in gl.static_range(3):
            row = boxes.index(turn % BOXES * BOX_TALL + down)
            cells = row._reinterpret(gl.float16, [CELLS, CHUNK], SWIZZLED)
            sums = warpgroup_mma(slices.index(step % WEIGHTS * 3 + down), cells.permute((1, 0)), sums, is_async=True)
        # All products of the step before, whose slots are free then.
        sums = warpgroup_mma_init(warpgroup_mma_wait(3, deps=(sums,)))
        gl.thread_barrier()
        later = step > first_step
        mbarrier.arrive(boxes_free.index((turn + BOXES - 2) % BOXES), count=1, pred=later)
        if CHUNKS > 1:
            mbarrier.arrive(free.index((step + WEIGHTS - 1) % WEIGHTS), count=1, pred=later)
    sums = warpgroup_mma_wait(0, deps=(sums,))
    gl.thread_barrier()
    end = first_step + 3 * CHUNKS - 1
    mbarrier.arrive(boxes_free.index((2 * end + CONSUMER) % BOXES), count=1)
    if CHUNKS > 1:
        mbarrier.arrive(free.index(end % WEIGHTS), count=1)
    return sums


@gluon.jit
def _finish(CONSUMER: gl.constexpr, rest, work, target, number, sums, kind: gl.constexpr):
    """ReLU; then write a tile, or its products with the taps."""
    PRODUCTS: gl.constexpr = kind[1]
    _num_tiles, height, width = work
    last, last_full, results = rest
    _bias, output, products = target
    batch, first_y, first_x = _corner(work, number)
    cell = gl.arange(0, CELLS, BY_CELL)
    inside = (first_x + cell % WIDE < width) & (first_y + cell // WIDE < height)
    value = gl.where(inside[None, :], gl.maximum(sums, 0.0), 0.0).to(gl.float16)
    result = results.index(CONSUMER)
    if PRODUCTS == 0:
        tma.store_wait(0)
        gl.thread_barrier()
    result.permute((1, 0)).store(value)
    fence_async_shared()
    gl.thread_barrier()
    if PRODUCTS == 0:
        box = result._reinterpret(gl.float16, [1, TALL, WIDE, CHUNK], BOX)
        tma.async_copy_shared_to_global(output, [batch, first_y, first_x, 0], box)
    else:
        mbarrier.wait(last_full.index(0), 0)
        none = gl.zeros([CHANNELS, CELLS], gl.float32, SUMS)
        found = warpgroup_mma(last.index(0), result.permute((1, 0)), none)
        row = gl.arange(0, CHANNELS, BY_CHANNEL)
        place = products + (number * PRODUCTS + row)[:, None] * CELLS + cell[None, :]
        gl.store(place, found, mask=(row < PRODUCTS)[:, None])
