"""The K highest logits of each group of classes in order, where equal ones come by their index.

Three steps. `count_keys` counts how often each logit occurs, `select` finds the lowest one of the K and gathers those
above it, and `place` sorts these, followed by the first of the equal ones. A logit's key, an integer, has the same
order. All programs run over blocks of a class's cells: axis 0 blocks, axis 1 classes, axis 2 clouds.

Atomic operations leave to chance only in which order `select` gathers, before they are sorted.
"""

from __future__ import annotations

import triton
import triton.language as tl

KEYS: tl.constexpr = tl.constexpr(1 << 16)
RANGES: tl.constexpr = tl.constexpr(256)  # of as many keys each, counted as well
COUNTERS: tl.constexpr = tl.constexpr((1 << 16) + 512)  # of a group: its keys, its ranges, how many were gathered
GATHERED: tl.constexpr = tl.constexpr((1 << 16) + 256)
SIGN: tl.constexpr = tl.constexpr(1 << 15)
PREFIX: tl.constexpr = tl.constexpr(1024)  # blocks whose counts are summed at once
RIVALS: tl.constexpr = tl.constexpr(256)  # peaks that others are compared with at once


@triton.jit
def count_keys(
    heatmap,  # (B, classes, H, W) float16
    cloud_stride,
    class_stride,
    cell_stride,
    num_cells,
    least,  # lower logits are left out
    group_of_class,  # (classes,)
    num_groups,
    counters,  # (B G, COUNTERS), zeros
    BLOCK: tl.constexpr,
):
    """Count the keys of each group."""
    channel, cloud = tl.program_id(1), tl.program_id(2)
    cell = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    own = heatmap + cloud * cloud_stride + channel * class_stride
    key = _keys(own, cell, cell_stride, num_cells, least)
    if tl.max(key) < 0:
        return
    counter = counters + (cloud * num_groups + tl.load(group_of_class + channel)) * COUNTERS
    found = key >= 0
    in_range = tl.histogram(tl.maximum(key, 0) // RANGES, RANGES, mask=found)
    tl.atomic_add(counter + KEYS + tl.arange(0, RANGES), in_range, mask=in_range > 0, sem="relaxed")
    tl.atomic_add(counter + tl.maximum(key, 0), found.to(tl.int32), mask=found, sem="relaxed")


@triton.jit
def select(
    heatmap,
    cloud_stride,
    class_stride,
    cell_stride,
    num_cells,
    least,
    group_of_class,
    first_class,  # (G + 1,), of each group
    num_groups,
    counters,
    lowest,  # (B G, 3): lowest key of the K or -1, how many are higher, how many of the equal ones belong to the K
    gathered,  # (B G, K, 2) key and index of the higher ones
    num_equal,  # (B, classes, blocks) keys of each block that equal the lowest
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Find the lowest key, gather the higher ones and count the equal ones."""
    block, channel, cloud = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    cell = block * BLOCK + tl.arange(0, BLOCK)
    own = heatmap + cloud * cloud_stride + channel * class_stride
    key = _keys(own, cell, cell_stride, num_cells, least)
    group = tl.load(group_of_class + channel)
    row = cloud * num_groups + group
    first = tl.load(first_class + group)
    counter = counters + row * COUNTERS

    # From the highest range, then the highest key, down to the one with which there are K.
    number = tl.arange(0, RANGES)
    count = tl.load(counter + KEYS + number)
    so_far = tl.cumsum(count, 0, reverse=True)
    at = tl.max(tl.where(so_far >= K, number, -1))
    higher = tl.sum(tl.where(number > at, count, 0))
    count = tl.load(counter + tl.maximum(at, 0) * RANGES + number)
    so_far = higher + tl.cumsum(count, 0, reverse=True)
    at_key = tl.max(tl.where(so_far >= K, number, 0))
    higher = tl.where(at < 0, higher, higher + tl.sum(tl.where(number > at_key, count, 0)))
    threshold = tl.where(at < 0, -1, at * RANGES + at_key)
    if (block == 0) & (channel == first):
        tl.store(lowest + row * 3, threshold)
        tl.store(lowest + row * 3 + 1, higher)
        tl.store(lowest + row * 3 + 2, tl.where(at < 0, 0, K - higher))

    equal = (key >= 0) & (key == threshold)
    blocks = tl.num_programs(0)
    tl.store(num_equal + (cloud * tl.num_programs(1) + channel) * blocks + block, tl.sum(equal.to(tl.int32)))
    if tl.max(key) <= threshold:
        return
    chosen = (key > threshold).to(tl.int32)
    start = tl.atomic_add(counter + GATHERED, tl.sum(chosen), sem="relaxed")
    slot = gathered + (row * K + start + tl.cumsum(chosen, 0) - 1) * 2
    tl.store(slot, key, mask=chosen > 0)
    tl.store(slot + 1, (channel - first) * num_cells + cell, mask=chosen > 0)


@triton.jit
def place(
    heatmap,
    cloud_stride,
    class_stride,
    cell_stride,
    num_cells,
    least,
    group_of_class,
    first_class,
    num_groups,
    lowest,
    gathered,
    num_equal,
    index,  # (B G, K) index in the group, (class * H + row) * W + column; -1 where there are fewer logits
    logit,  # (B G, K) float32
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,  # that a program ranks at once
):
    """Write the peaks in order."""
    block, channel, cloud = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    blocks = tl.num_programs(0)
    group = tl.load(group_of_class + channel)
    row = cloud * num_groups + group
    first = tl.load(first_class + group)
    threshold = tl.load(lowest + row * 3)
    higher = tl.load(lowest + row * 3 + 1)
    needed = tl.load(lowest + row * 3 + 2)
    index += row * K
    logit += row * K

    program = (channel - first) * blocks + block
    equal_of_group = num_equal + (cloud * tl.num_programs(1) + first) * blocks
    if tl.load(equal_of_group + program) > 0:
        earlier = 0
        start = 0
        while start < program:
            other = start + tl.arange(0, PREFIX)
            earlier += tl.sum(tl.load(equal_of_group + other, mask=other < program, other=0))
            start += PREFIX
        if earlier < needed:
            cell = block * BLOCK + tl.arange(0, BLOCK)
            own = heatmap + cloud * cloud_stride + channel * class_stride
            equal = (_keys(own, cell, cell_stride, num_cells, least) == threshold).to(tl.int32)
            position = earlier + tl.cumsum(equal, 0) - 1
            chosen = (equal > 0) & (position < needed)
            tl.store(index + higher + position, (channel - first) * num_cells + cell, mask=chosen)
            tl.store(logit + higher + position, _logit(tl.full((BLOCK,), 0, tl.int32) + threshold), mask=chosen)

    num_programs = (tl.load(first_class + group + 1) - first) * blocks
    gathered += row * K * 2
    start = program * SLOTS
    while start < K:
        slot = start + tl.arange(0, SLOTS)
        empty = (slot >= higher + needed) & (slot < K)
        tl.store(index + slot, tl.full((SLOTS,), -1, tl.int32), mask=empty)
        tl.store(logit + slot, tl.full((SLOTS,), float("-inf"), tl.float32), mask=empty)
        key = tl.load(gathered + slot * 2, mask=slot < higher, other=0)
        at = tl.load(gathered + slot * 2 + 1, mask=slot < higher, other=0)
        rank = tl.zeros((SLOTS,), tl.int32)
        rival = 0
        while rival < higher:
            other = rival + tl.arange(0, RIVALS)
            other_key = tl.load(gathered + other * 2, mask=other < higher, other=-1)[None, :]
            other_at = tl.load(gathered + other * 2 + 1, mask=other < higher, other=0)[None, :]
            better = (other_key > key[:, None]) | ((other_key == key[:, None]) & (other_at < at[:, None]))
            rank += tl.sum(better.to(tl.int32), 1)
            rival += RIVALS
        tl.store(index + rank, at, mask=slot < higher)
        tl.store(logit + rank, _logit(key), mask=slot < higher)
        start += num_programs * SLOTS


@triton.jit
def _keys(logits, cell, cell_stride, num_cells, least):
    """Keys from 0 up, higher for higher logits; -1 for what is left out."""
    value = tl.load(logits + cell * cell_stride, mask=cell < num_cells, other=float("-inf"))
    bits = value.to(tl.int16, bitcast=True).to(tl.int32) & (KEYS - 1)
    bits = tl.where(bits == SIGN, 0, bits)  # -0 equals 0
    key = tl.where(bits >= SIGN, KEYS - 1 - bits, bits + SIGN)
    return tl.where((cell < num_cells) & (value.to(tl.float32) >= least), key, -1)


@triton.jit
def _logit(key):
    """The logit of a key."""
    bits = tl.where(key >= SIGN, key - SIGN, KEYS - 1 - key)
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
